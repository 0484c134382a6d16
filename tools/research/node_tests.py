"""The onnx package's own backend tests, optimized: `python -m burnish.tools.research.node_tests`.

Writes `docs/results/node-tests.md`: how many of the cases ONNX Runtime runs, and how many of these stay correct under
each recipe. Every case travels the way of `optimize`: written, read, rewritten with all facts checked, written, read,
and run. `--only TEXT` takes the cases whose name contains it and only prints.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from burnish.backends import onnx_writer
from burnish.backends.ort import session
from burnish.frontends import onnx_file
from burnish.ir.errors import BurnishError
from burnish.passes import recipes, verify
from burnish.passes.pipeline import Pipeline

PAGE = Path(__file__).resolve().parents[2] / "docs" / "results" / "node-tests.md"
CONSTANT = "default, inputs made constants"
RECIPES: dict[str, tuple[str, int | None]] = {
    "default": ("onnx", None),
    "default, `--target ort-cpu`": ("ort-cpu", None),
    f"default, `--opset {recipes.NEWEST_OPSET}`": ("onnx", recipes.NEWEST_OPSET),
    CONSTANT: ("onnx", None),
}
"""The recipes: target and opset. The last one makes initializers of the inputs first: all of it may be folded."""

_WIDER = {
    **dict.fromkeys(("BFLOAT16", "FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ"), "FLOAT"),
    **dict.fromkeys(("FLOAT4E2M1", "FLOAT8E8M0"), "FLOAT"),
    **dict.fromkeys(("INT4", "UINT4", "INT2", "UINT2"), "INT32"),
}
"""Dtypes that do not pass through NumPy, and one that holds their values; a Cast is added for the comparison."""


@dataclass(frozen=True)
class Case:
    """One test: the model, one set of inputs and the expected outputs, in order; None for an absent optional.

    There are no expected outputs in the group `light`.
    """

    name: str
    group: str
    model: onnx.ModelProto
    inputs: Sequence[Any]
    expected: Sequence[Any] = ()


@dataclass
class Count:
    """What became of the cases of one group.

    Attributes:
        cases: how many there are.
        run: how many ONNX Runtime runs before any rewrite.
        asked: by recipe, how many of these it was run on: all, but for those whose constants ONNX Runtime refuses.
        correct: by recipe, how many are correct afterwards.
        changed: by recipe, how many of the correct ones it changed.
        wrong: (case, recipe, what is wrong).
    """

    cases: int = 0
    run: int = 0
    asked: dict[str, int] = field(default_factory=lambda: dict.fromkeys(RECIPES, 0))
    correct: dict[str, int] = field(default_factory=lambda: dict.fromkeys(RECIPES, 0))
    changed: dict[str, int] = field(default_factory=lambda: dict.fromkeys(RECIPES, 0))
    wrong: list[tuple[str, str, str]] = field(default_factory=list)


class Different(Exception):
    """A result is not what it has to be."""


def cases() -> Iterator[Case]:
    """Every case that the onnx package ships with its model and data, or with a model that runs on made data."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for one in collect_testcases(None):
            if one.model is not None and one.data_sets:
                yield Case(one.name, "node", one.model, *one.data_sets[0])
    data = Path(onnx.__file__).parent / "backend" / "test" / "data"
    for group in ("simple", "pytorch-operator", "pytorch-converted"):
        for folder in sorted((data / group).iterdir()):
            model = onnx.load(folder / "model.onnx")
            pairs = _stored(folder, "input", model.graph.input), _stored(folder, "output", model.graph.output)
            yield Case(folder.name, group, model, *pairs)
    for file in sorted((data / "light").glob("*.onnx")):
        model = onnx.load(file)
        held = {tensor.name for tensor in model.graph.initializer}
        yield Case(file.stem, "light", model, [_made(v.type) for v in model.graph.input if v.name not in held])


def _stored(folder: Path, role: str, values: Sequence[onnx.ValueInfoProto]) -> list[Any]:
    found = (folder / "test_data_set_0").glob(f"{role}_*.pb")
    files = sorted(found, key=lambda file: int(file.stem.removeprefix(f"{role}_")))
    return [_read(file.read_bytes(), value.type) for file, value in zip(files, values, strict=False)]


def _read(data: bytes, kind: onnx.TypeProto) -> Any:
    if kind.HasField("sequence_type"):
        return onnx.numpy_helper.to_list(onnx.SequenceProto.FromString(data))
    if kind.HasField("optional_type"):
        return onnx.numpy_helper.to_optional(onnx.OptionalProto.FromString(data))
    return onnx.numpy_helper.to_array(onnx.TensorProto.FromString(data))


def _made(kind: onnx.TypeProto) -> np.ndarray:
    shape = [dim.dim_value or 1 for dim in kind.tensor_type.shape.dim]
    values = np.random.default_rng(0).standard_normal(shape)
    return values.astype(onnx.helper.tensor_dtype_to_np_dtype(kind.tensor_type.elem_type))


def run(model: onnx.ModelProto, inputs: Sequence[Any], level: str = "ORT_ENABLE_ALL") -> list[Any]:
    """The outputs in ONNX Runtime; those of dtypes that NumPy lacks in a wider one that holds their values."""
    model, feeds = _plain(model, inputs)
    ort = session.runtime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.add_session_config_entry("session.disable_prepacking", "1")
    found = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(found.run(None, feeds))


def _plain(model: onnx.ModelProto, inputs: Sequence[Any]) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """The model with the inputs that Python cannot hand over as initializers, and casts behind such outputs."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    held = {tensor.name for tensor in copy.graph.initializer}
    fed = [value for value in copy.graph.input if value.name not in held]
    if len(inputs) > len(fed):
        fed = list(copy.graph.input)
    feeds = {}
    for value, array in zip(fed, inputs, strict=False):
        if _wider(value.type) is not None:
            _hold(copy, value, array)
        else:
            feeds[value.name] = array
    for value in copy.graph.output:
        wider = _wider(value.type)
        if wider is not None:
            copy.graph.node.add(op_type="Cast", input=[value.name], output=[f"{value.name}.wider"])
            copy.graph.node[-1].attribute.append(onnx.helper.make_attribute("to", wider))
            value.name += ".wider"
            value.type.tensor_type.elem_type = wider
    return copy, feeds


def _wider(kind: onnx.TypeProto) -> int | None:
    name = onnx.TensorProto.DataType.Name(kind.tensor_type.elem_type)
    return onnx.TensorProto.DataType.Value(_WIDER[name]) if name in _WIDER else None


def _hold(model: onnx.ModelProto, value: onnx.ValueInfoProto, array: Any) -> None:
    """Make an initializer of an input."""
    model.graph.initializer.append(_tensor(array, value))
    model.graph.input.remove(value)


def _tensor(array: Any, value: onnx.ValueInfoProto) -> onnx.TensorProto:
    if isinstance(array, onnx.TensorProto):
        tensor = onnx.TensorProto()
        tensor.CopyFrom(array)
        tensor.name = value.name
        return tensor
    return onnx.numpy_helper.from_array(np.asarray(array), value.name)


def with_constants(case: Case) -> Case:
    """The case with its tensors inside the model."""
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    model.ir_version = max(model.ir_version, 4)
    left = []
    for value, array in list(zip(list(model.graph.input), case.inputs, strict=False)):
        if value.type.HasField("tensor_type") and array is not None:
            _hold(model, value, array)
        else:
            left.append(array)
    return Case(case.name, case.group, model, left, case.expected)


def rewritten(model: onnx.ModelProto, target: str, opset: int | None, folder: Path) -> tuple[onnx.ModelProto, int]:
    """The model as `optimize` would write it, and how many rewrites were made.

    Raises:
        BurnishError: a refusal, a failed pass, or a fact that does not hold.
    """
    source, result = folder / "model.onnx", folder / "result.onnx"
    source.write_bytes(model.SerializeToString())
    done = Pipeline(recipes.named("default", target, opset)).rewrite(onnx_file.read(source), check=True)
    onnx_writer.write(done.model, result)
    onnx_file.read(result)
    return onnx.load(result), done.rewritten


def check_contract(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    """Names, order, types and dims of inputs and outputs are what they were.

    Raises:
        Different: they are not.
    """
    for role in ("input", "output"):
        old, new = (
            [(value.name, value.type.SerializeToString(deterministic=True)) for value in getattr(model.graph, role)]
            for model in (before, after)
        )
        if old != new:
            kinds = [
                ", ".join(f"{v.name}: {_shown(v.type)}" for v in getattr(model.graph, role))
                for model in (before, after)
            ]
            raise Different(f"the {role}s were {kinds[0]} and are {kinds[1]}")


def _shown(kind: onnx.TypeProto) -> str:
    return " ".join(str(kind).split())


def difference(found: Any, expected: Any) -> float:
    """The relative error of one output (the worst of a sequence); infinite where kinds, dtypes or shapes differ."""
    if expected is None or found is None:
        return 0.0 if found is expected else float("inf")
    if isinstance(expected, dict):
        same = isinstance(found, dict) and list(found) == list(expected)
        return max((difference(found[key], expected[key]) for key in expected), default=0.0) if same else float("inf")
    if isinstance(expected, list):
        if not isinstance(found, list) or len(found) != len(expected):
            return float("inf")
        return max((difference(a, b) for a, b in zip(found, expected, strict=True)), default=0.0)
    left, right = np.asarray(found), np.asarray(expected)
    return verify.relative_error(left, right) if left.dtype == right.dtype else float("inf")


def tolerance(expected: Any) -> float:
    """What the dtype's rounding allows."""
    if isinstance(expected, list):
        return max(map(tolerance, expected), default=0.0)
    return verify.ROUNDING.get(expected.dtype.name, 0.0) if isinstance(expected, np.ndarray) else 0.0


def check_outputs(found: list[Any], expected: list[Any], other: list[Any], random: bool) -> None:
    """Every output is the original's, to its dtype's rounding or what ONNX Runtime's own optimizations change.

    Raises:
        Different: one is not.
    """
    for index, (new, old) in enumerate(zip(found, expected, strict=True)):
        if random:
            if np.asarray(new).shape != np.asarray(old).shape or np.asarray(new).dtype != np.asarray(old).dtype:
                raise Different(f"output {index} has another shape or dtype")
            continue
        error = difference(new, old)
        allowed = max(tolerance(old), verify.NOISE_FACTOR * difference(other[index], old) if other else 0.0)
        if not error <= allowed:
            raise Different(f"output {index} differs by {error:.3g} (allowed: {allowed:.3g})")


def judge(case: Case, folder: Path, count: Count) -> None:
    """Run one case under every recipe and enter the result into `count`."""
    count.cases += 1
    held = with_constants(case)
    try:
        expected = run(case.model, case.inputs)
        again = run(case.model, case.inputs)
    except Exception:
        return
    count.run += 1
    random = any(difference(a, b) != 0 for a, b in zip(again, expected, strict=True))
    try:
        other = run(case.model, case.inputs, "ORT_DISABLE_ALL")
    except Exception:
        other = []
    for recipe, (target, opset) in RECIPES.items():
        one = held if recipe == CONSTANT else case
        if recipe == CONSTANT and not _same_when_held(held, expected, random):
            continue
        count.asked[recipe] += 1
        try:
            model, changes = rewritten(one.model, target, opset, folder)
            check_contract(one.model, model)
            check_outputs(run(model, one.inputs), expected, other, random)
        except (BurnishError, Different) as error:
            count.wrong.append((case.name, recipe, str(error)))
        except Exception as error:
            count.wrong.append((case.name, recipe, f"{type(error).__name__}: {error}"))
        else:
            count.correct[recipe] += 1
            count.changed[recipe] += changes > 0


def _same_when_held(held: Case, expected: list[Any], random: bool) -> bool:
    """Whether ONNX Runtime itself still gives the expected outputs when the inputs are constants."""
    try:
        check_outputs(run(held.model, held.inputs), expected, [], random)
    except Exception:
        return False
    return True


def measure(only: str = "") -> dict[str, Count]:
    """Counts by group of all cases whose name contains `only`."""
    counts: dict[str, Count] = {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case in cases():
            if only in case.name:
                judge(case, Path(folder), counts.setdefault(case.group, Count()))
    return counts


def main() -> None:
    """Measure, print what is wrong, and write the page when all cases were taken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name contains it")
    only = parser.parse_args().only
    counts = measure(only)
    for group, count in counts.items():
        print(group, count.cases, count.run, count.asked, count.correct, count.changed)
        for wrong in count.wrong:
            print("   ", *wrong, sep=" | ")
    if not only:
        PAGE.write_text(page(counts))


def page(counts: dict[str, Count]) -> str:
    """The page of results."""
    lines = [
        "| cases | shipped | run by ONNX Runtime | " + " | ".join(RECIPES) + " |",
        "| --- " * (3 + len(RECIPES)) + "|",
    ]
    for group, count in counts.items():
        cells = [f"{count.correct[one]} of {count.asked[one]} ({count.changed[one]})" for one in RECIPES]
        lines.append(f"| {group} | {count.cases} | {count.run} | {' | '.join(cells)} |")
    wrong = [
        f"- {name}, {recipe}: {' '.join(cause.split())}" for c in counts.values() for name, recipe, cause in c.wrong
    ]
    found = ["## Wrong", "", *wrong] if wrong else ["All are correct under every recipe."]
    return "\n".join(
        [_PREFACE.format(onnx=onnx.__version__, ort=session.runtime().__version__), *lines, "", *found, ""]
    )


_PREFACE = """# The onnx package's own tests, optimized

Made by `python -m burnish.tools.research.node_tests`, with onnx {onnx} and ONNX Runtime {ort} on CPU. The onnx package
ships these models with their data (`light` without: they are run on made data). For each recipe: how many of those that
ONNX Runtime runs are correct after `optimize`, and in brackets how many the recipe changed. Correct means: the passes
raise no error and keep every fact, the result can be written and read back, the names, order, types and dims of inputs
and outputs are the same, and ONNX Runtime computes the same from it, to the dtype's rounding (sequences, optionals,
strings and NaN included; of random operators shapes and dtypes only). In the last column all inputs are constants of
the model, so all that can be folded is; where ONNX Runtime itself then computes something else, nothing is asked.
"""


if __name__ == "__main__":
    main()
