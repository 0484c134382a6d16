"""The onnx package's node tests through TVM: `python -m burnish.tools.research.tvm_nodes --out results.jsonl`.

Each case that ONNX Runtime runs, and agrees on with the expected outputs, is compiled for this machine twice: by
`burnish.backends.tvm.lowering`, and by TVM's own ONNX importer. Inputs that the operators need when they are compiled
(sizes, axes: the inputs an exporter writes as initializers) are made initializers where a case is refused without. The
importer is given the case as it is and, when that is not right, once more with every input but the first held.

One line of JSON for each case and way: `right`, `wrong` or `refused`, and why. Work is done in a child process, which
is started again behind a case that kills it. `--only TEXT` takes the cases whose names hold it, `--resume` leaves out
what the file has. `tvm_lowering` makes the page.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as oir

from burnish.backends.tvm.lowering import lower, refusal
from burnish.frontends import onnx_file
from burnish.ir import weights
from burnish.ir.errors import InputError
from burnish.ir.inference import Inference
from burnish.passes import recipes
from burnish.passes.pipeline import Pipeline
from burnish.tools.research import node_tests
from burnish.tools.research.node_tests import Case

RECIPE = recipes.named("default", "onnx", None)[:-1]
TOLERANCE = {"float64": 1e-7, "float32": 1e-4, "float16": 8e-3, "bfloat16": 6e-2}
"""Relative error against ONNX Runtime, by dtype; 0 for every other one."""


def main() -> None:
    """Run the cases and write a line for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="cases whose name contains it")
    parser.add_argument("--ways", default="lowering,importer")
    parser.add_argument("--resume", action="store_true", help="leave out the cases in the file")
    given = parser.parse_args()
    done: set[str] = set()
    if given.resume and given.out.exists():
        done = {json.loads(line)["case"] for line in given.out.read_text().splitlines()}
    else:
        given.out.write_text("")
    names = [case.name for case in node_tests.cases() if given.only in case.name and case.name not in done]
    while names:
        names = _round(names, given.ways.split(","), given.out)


def _round(names: list[str], ways: list[str], out: Path) -> list[str]:
    """Run cases in a child until it is through or dies; what is left to do."""
    context = multiprocessing.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    child = context.Process(target=_work, args=(names, ways, writer))
    child.start()
    writer.close()
    current: tuple[str, str] | None = None
    try:
        while True:
            said = reader.recv()
            if isinstance(said, tuple):
                current = said
                continue
            with out.open("a") as file:
                file.write(json.dumps(said) + "\n")
    except EOFError:
        child.join()
    if child.exitcode == 0 or current is None:
        return []
    with out.open("a") as file:
        line = {"case": current[0], "way": current[1], "result": "refused", "why": "the process was killed"}
        file.write(json.dumps(line) + "\n")
    return names[names.index(current[0]) + 1 :]


def _work(names: list[str], ways: list[str], writer: Any) -> None:
    _hush()
    wanted = set(names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case in node_tests.cases():
            if case.name not in wanted:
                continue
            expected = _expected(case)
            if expected is None:
                writer.send({"case": case.name, "group": case.group, "way": "ort", "result": "refused", "why": ""})
                continue
            for way in ways:
                writer.send((case.name, way))
                result, why = judge(case, expected, way)
                writer.send({"case": case.name, "group": case.group, "way": way, "result": result, "why": why[:300]})


def _hush() -> None:
    """What TVM says to the terminal goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)


def _expected(case: Case) -> list[Any] | None:
    """The outputs of ONNX Runtime; None where it does not run the case, or not as the onnx package expects."""
    try:
        found = node_tests.run(case.model, case.inputs)
        again = node_tests.run(case.model, case.inputs)
    except Exception:
        return None
    if any(not isinstance(one, np.ndarray) for one in found):
        return None
    if any(node_tests.difference(a, b) != 0 for a, b in zip(again, found, strict=True)):
        return None
    for one, other in zip(found, case.expected, strict=False):
        if isinstance(other, np.ndarray) and other.dtype == one.dtype and not node_tests.difference(one, other) <= 1e-2:
            return None
    return found


def judge(case: Case, expected: list[Any], way: str) -> tuple[str, str]:
    """`right`, `wrong` or `refused`, and why."""
    function = {"lowering": by_lowering, "importer": by_importer}[way]
    try:
        found = function(case, expected)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        return "refused", kind + (lines[0] if isinstance(error, InputError) else lines[-1])
    return ("right", "") if not found else ("wrong", found)


def by_lowering(case: Case, expected: list[Any]) -> str:
    """Compiled by our lowering; what is wrong, or nothing."""
    from burnish.backends.tvm import compiling
    from burnish.backends.tvm.runner import TvmRunner
    from burnish.backends.tvm.target import parse

    model, left = normal(case)
    lowered = lower(model)
    target = parse("llvm")
    code = compiling.build(compiling.scheduled(compiling.fused(lowered.module, target), target), target)
    import tvm

    arrays = [tensor.numpy() for value in lowered.weights if (tensor := weights.tensor_of(value)) is not None]
    runner = TvmRunner(code, tvm.cpu(), lowered.inputs, lowered.outputs, arrays)
    return compared(list(runner.run(left).values()), expected)


def normal(case: Case) -> tuple[oir.Model, dict[str, np.ndarray]]:
    """The case in the normal form, with held inputs where it is refused without, and what is fed."""
    model, left = _rewritten(case)
    facts = Inference(model)
    refused = [node for node in model.graph if refusal(node, facts, dict(model.opset_imports))]
    if not any("depends on data" in str(refusal(node, facts, dict(model.opset_imports))) for node in refused):
        return model, left
    first = next(iter(left), "")
    return _rewritten(holding(case, {name for name in left if name != first}))


def holding(case: Case, names: set[str]) -> Case:
    """The case with inputs as initializers."""
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    model.ir_version = max(model.ir_version, 4)
    left = []
    for value, array in list(zip(list(model.graph.input), case.inputs, strict=False)):
        if value.name in names:
            node_tests._hold(model, value, array)
        else:
            left.append(array)
    return replace(case, model=model, inputs=left)


def _rewritten(case: Case) -> tuple[oir.Model, dict[str, np.ndarray]]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        file.write_bytes(case.model.SerializeToString())
        model = Pipeline(RECIPE).rewrite(onnx_file.read(file)).model
    held = {tensor.name for tensor in case.model.graph.initializer}
    fed = [value.name for value in case.model.graph.input if value.name not in held]
    return model, {name: _plain(one) for name, one in zip(fed, case.inputs, strict=False)}


def _plain(array: Any) -> np.ndarray:
    return onnx.numpy_helper.to_array(array) if isinstance(array, onnx.TensorProto) else np.asarray(array)


def compared(found: list[np.ndarray], expected: list[np.ndarray]) -> str:
    """What is wrong with the outputs; nothing when they are right."""
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        if one.shape != other.shape:
            return f"output {index} has the shape {one.shape}, not {other.shape}"
        name = one.dtype.name if one.dtype.name in TOLERANCE else other.dtype.name
        error = node_tests.difference(one.astype(other.dtype), other)
        if not error <= TOLERANCE.get(name, 0.0):
            return f"output {index} differs by {error:.3g}"
        if one.dtype != other.dtype and one.dtype.name not in ("bfloat16",):
            return f"output {index} is {one.dtype}, not {other.dtype}"
    return ""


def by_importer(case: Case, expected: list[Any]) -> str:
    """Compiled by TVM's importer; what is wrong, or nothing."""
    try:
        found = _imported(case, expected)
    except Exception:
        found = "refused"
    if not found:
        return ""
    held = {value.name for value in case.model.graph.input[1:]} - {t.name for t in case.model.graph.initializer}
    return _imported(holding(case, held), expected) if held else _imported(case, expected)


def _imported(case: Case, expected: list[Any]) -> str:
    import tvm
    from tvm import relax
    from tvm.relax.frontend.onnx import from_onnx
    from tvm.runtime import vm

    target = tvm.target.Target({"kind": "llvm"})
    module = from_onnx(case.model)
    with target, tvm.transform.PassContext(opt_level=3):
        code = tvm.compile(module, target=target, relax_pipeline=relax.get_default_pipeline(target))
    machine: Any = vm.VirtualMachine(code, tvm.cpu())
    found = machine["main"](*[tvm.runtime.tensor(np.asarray(_plain(one), order="C")) for one in case.inputs])
    several = [found] if isinstance(found, tvm.runtime.Tensor) else list(found)
    return compared([one.numpy() for one in several], expected)


def lines(path: Path) -> Iterator[dict[str, str]]:
    """The lines of a file of results."""
    for line in path.read_text().splitlines():
        yield json.loads(line)


if __name__ == "__main__":
    main()
