"""The torch bridge on whole models, beside onnx2torch: `python -m burnish.tools.research.fx_models FOLDER [NAME...]`.

Every model of the zoo (or those named) that FOLDER (`.zoo` when it is `-`) holds: outputs beside ONNX Runtime's on made
samples of several shapes, gradients of every parameter, and what ONNX Runtime computes after all parameters were
changed and written back. Rows go to `docs/results/fx.json`, one model at a time; `fx_page` makes the page of them.

onnx2torch is measured where it can be imported (`pip install --no-deps --target DIR onnx2torch`, then `PYTHONPATH`);
torchvision, which two of its modules import, is replaced by an empty module, since it would replace torch.
"""

from __future__ import annotations

import json
import sys
import time
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as oir

from burnish.backends.fx import bridge
from burnish.backends.fx.builder import to_graph_module
from burnish.backends.fx.runner import FxRunner
from burnish.backends.fx.write_back import write_back
from burnish.backends.ort.session import executor
from burnish.backends.reference.runner import ReferenceRunner
from burnish.frontends import onnx_file, synthesis
from burnish.ir.errors import BurnishError
from burnish.ir.samples import Sample
from burnish.ir.walk import walk
from burnish.passes.verify import NOISE_FACTOR, relative_error
from burnish.tools.research import zoo

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results" / "fx.json"
CLOSE = 1e-5
Arrays = Mapping[str, np.ndarray]


def measure(path: Path) -> dict[str, Any]:
    """Everything about one model; `failed` holds the message when the bridge cannot express or run it."""
    model = read(path)
    row: dict[str, Any] = {"model": path.stem, "nodes": sum(1 for _ in model.graph.all_nodes())}
    runner = executor()(model)
    kept: list[tuple[Sample, dict[str, np.ndarray]]] = []
    for sample in synthesis.synthesise(model):
        try:
            kept.append((sample, runner.run(sample.feeds)))
        except BurnishError:
            continue
    runner.close()
    row["samples"] = len(kept)
    row["shapes"] = len({tuple((k, v.shape) for k, v in s.feeds.items()) for s, _ in kept})
    try:
        row |= _bridge(model, path, kept)
    except Exception as error:
        row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"[:200]
    row["onnx2torch"] = _other(path, kept)
    return row


def read(path: Path) -> oir.Model:
    """The model of a file, fit for comparing arithmetic.

    ONNX Runtime's optimizer forgets to declare its own domain, which its reader does not mind and ours does. Where
    MatMulNBits may round activations to eight bits (`accuracy_level`), it is told not to.
    """
    import onnx

    proto = onnx.load(path, load_external_data=False)
    mended = _declare(proto) and not any(tensor.external_data for tensor in proto.graph.initializer)
    model = onnx_file.read_bytes(proto.SerializeToString()) if mended else onnx_file.read(path)
    for node in walk(model, "MatMulNBits", domain="com.microsoft"):
        node.attributes.pop("accuracy_level", None)
    return model


def _declare(proto: Any) -> bool:
    """Declare ONNX Runtime's domain where it is not; whether that changed anything."""
    lacks = "com.microsoft" not in [entry.domain for entry in proto.opset_import]
    if lacks:
        proto.opset_import.add(domain="com.microsoft", version=1)
    return lacks


def _bridge(model: oir.Model, path: Path, kept: list[tuple[Sample, dict[str, np.ndarray]]]) -> dict[str, Any]:
    start = time.process_time()
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        module = to_graph_module(model)
    row: dict[str, Any] = {"build_s": round(time.process_time() - start, 3)}
    row["opaque"] = list(bridge.bridge_of(module).opaque)
    fx = FxRunner(module)
    row |= _errors(model, kept, fx.run)
    row |= _gradients(module, [sample.feeds for sample, _ in kept])
    row |= _written(module, path, [sample.feeds for sample, _ in kept[:3]])
    return row


def _worst(found: Arrays, wanted: Arrays) -> float:
    if list(found) != list(wanted):
        return float("inf")
    return max((relative_error(np.asarray(found[n]), np.asarray(wanted[n])) for n in wanted), default=0.0)


def _errors(model: oir.Model, kept: Sequence[Any], run: Callable[[Arrays], Arrays]) -> dict[str, Any]:
    """The worst error against ONNX Runtime, and where it is large, how far each is from the float64 interpreter.

    ONNX Runtime's distance is the larger of those with and without its optimizations, and of what it makes of inputs
    that were moved by one rounding: some inputs are made to amplify.
    """
    worst, judged = 0.0, []
    far = []
    for sample, wanted in kept:
        found = run(sample.feeds)
        error = _worst(found, wanted)
        worst = max(worst, error)
        if error > CLOSE:
            far.append((sample, wanted, found))
    if far:
        exact = ReferenceRunner(model)
        plain = executor(level="off")(model)
        for sample, wanted, found in far:
            truth = {n: v.astype(wanted[n].dtype) for n, v in exact.run(sample.feeds).items()}
            other, nudged = plain.run(sample.feeds), plain.run(_nudged(sample.feeds))
            runtime = max(_worst(wanted, truth), _worst(other, truth), _worst(nudged, other))
            judged.append({"sample": sample.name, "torch": _worst(found, truth), "onnxruntime": runtime})
        plain.close()
    bad = [j for j in judged if j["torch"] > max(CLOSE, NOISE_FACTOR * j["onnxruntime"])]
    return {"error": worst, "judged": judged, "right": not bad}


def _nudged(feeds: Arrays) -> dict[str, np.ndarray]:
    """The feeds with every float32 moved by one rounding, up or down."""
    random = np.random.default_rng(0)
    far = {n: random.choice([-np.inf, np.inf], a.shape).astype(a.dtype) for n, a in feeds.items() if a.dtype == "f4"}
    return {n: np.nextafter(a, far[n]) if n in far else a for n, a in feeds.items()}


def _tensors(feeds: Arrays) -> list[Any]:
    return [bridge.to_torch(array, oir.DataType.from_numpy(array.dtype)) for array in feeds.values()]


def _gradients(module: Any, feeds: Sequence[Arrays]) -> dict[str, Any]:
    """Which parameters no gradient reaches, and which of them the outputs do depend on after all."""
    import torch

    parameters = dict(module.named_parameters())
    reached: set[str] = set()
    for one in feeds:
        if len(reached) == len(parameters):
            break
        outputs = [o for o in module(*_tensors(one)) if isinstance(o, torch.Tensor) and o.is_floating_point()]
        generator = torch.Generator().manual_seed(0)
        terms = [(o.double() * torch.randn(o.shape, generator=generator, dtype=torch.float64)).sum() for o in outputs]
        total = sum(t for t in terms if torch.isfinite(t))
        if not isinstance(total, torch.Tensor) or not total.requires_grad:
            continue
        module.zero_grad()
        total.backward()
        reached |= {n for n, p in parameters.items() if p.grad is not None and bool((p.grad != 0).any())}
    module.zero_grad()
    silent = [name for name in parameters if name not in reached]
    smooth = [name for name in silent if not _only_chooses(module, name)]
    return {
        "parameters": len(parameters), "weights": sum(p.numel() for p in parameters.values()),
        "silent": silent, "missed": [n for n in smooth if _matters(module, parameters[n], feeds[:3])],
    }  # fmt: skip


def _only_chooses(module: Any, name: str) -> bool:
    """Whether all ways from a parameter to the outputs lead through an ArgMin, an ArgMax or a shape: no gradient."""
    pending = [node for node in module.graph.nodes if node.op == "get_attr" and node.target == name]
    seen = set(pending)
    while pending:
        node = pending.pop()
        if node.op == "output":
            return False
        if node.meta.get("onnx_op", ("", ""))[1] not in ("ArgMin", "ArgMax", "Shape", "Size"):
            pending += [user for user in node.users if user not in seen]
            seen.update(node.users)
    return True


def _matters(module: Any, parameter: Any, feeds: Sequence[Arrays]) -> bool:
    """Whether an output changes with a parameter."""
    import torch

    with torch.no_grad():
        before = [module(*_tensors(one)) for one in feeds]
        kept = parameter.clone()
        parameter.add_(torch.randn_like(parameter) * (1e-2 + parameter.abs().mean()))
        after = [module(*_tensors(one)) for one in feeds]
        parameter.copy_(kept)
    pairs = [(a, b) for x, y in zip(before, after, strict=True) for a, b in zip(x, y, strict=True)]
    return any(not torch.equal(a, b) for a, b in pairs if isinstance(a, torch.Tensor))


def _written(module: Any, path: Path, feeds: Sequence[Arrays]) -> dict[str, Any]:
    """Nothing is written when nothing was trained; after a change of every parameter both sides agree again."""
    import torch

    again = read(path)
    untouched = write_back(module, again) == []
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.0 + 0.02 * torch.randn(parameter.shape, generator=generator))
    names = write_back(module, again)
    runner, fx = executor()(again), FxRunner(module)
    found = _errors(again, [(Sample("", dict(one)), runner.run(one)) for one in feeds], fx.run)
    runner.close()
    changeable = [n for n, p in module.named_parameters() if bool((p != 0).any())]
    return {
        "identity": untouched, "written": len(names) == len(changeable), "written_error": found["error"],
        "written_right": found["right"],
    }  # fmt: skip


def _other(path: Path, kept: Sequence[Any]) -> dict[str, Any] | None:
    """The same with onnx2torch; None when it is not installed."""
    try:
        convert = _onnx2torch()
    except ImportError:
        return None
    import onnx
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            proto = onnx.load(path)
            _declare(proto)
            module = convert(proto).eval()
            row: dict[str, Any] = {"parameters": sum(1 for _ in module.parameters()), "error": None}
            worst = 0.0
            for sample, wanted in kept:
                with torch.no_grad():
                    found = module(*_tensors(sample.feeds))
                values = found if isinstance(found, list | tuple) else [found]
                worst = max(worst, _worst({n: v.numpy() for n, v in zip(wanted, values, strict=True)}, wanted))
            return row | {"error": worst}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:160]}


def _onnx2torch() -> Callable[[Any], Any]:
    """Its `convert`, with an empty torchvision."""
    for name in ("torchvision", "torchvision.ops"):
        if name not in sys.modules:
            stub: Any = types.ModuleType(name)
            stub.roi_align = stub.nms = None
            stub.ops = stub
            sys.modules[name] = stub
    from onnx2torch import convert  # type: ignore[import-not-found]

    found: Callable[[Any], Any] = convert
    return found


def main(arguments: Sequence[str]) -> int:
    """Measure, and keep every row as soon as it is known."""
    import torch

    if not arguments:
        print(__doc__, file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    folder = zoo.ROOT if arguments[0] == "-" else Path(arguments[0])
    names = list(arguments[1:]) or [name for name in zoo.NAMES if (folder / f"{name}.onnx").exists()]
    rows = {row["model"]: row for row in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
    for name in names:
        start = time.perf_counter()
        try:
            row = measure(folder / f"{name}.onnx")
        except BurnishError as error:
            row = {"model": name, "unreadable": str(error).splitlines()[0][:200]}
        rows[name] = row
        lines = ",\n".join(json.dumps(rows[n]) for n in sorted(rows))
        RESULTS.write_text(f"[\n{lines}\n]\n")
        shown = {k: v for k, v in row.items() if k not in ("model", "onnx2torch")}
        print(f"{name} ({time.perf_counter() - start:.1f} s): {shown}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
