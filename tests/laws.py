"""The laws that every pass is held to, on every golden case."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from functools import partial

import numpy as np
import onnx
import onnx_ir as oir

from burnish.backends.reference.runner import ReferenceRunner
from burnish.ir import edit, facts
from burnish.ir.errors import InputError
from burnish.ir.samples import Sample
from burnish.ir.text import text, type_text
from burnish.passes import verify
from burnish.passes.base import ExactPass, Outcome, Pass

_SIZES = (1, 2, 5)


def _declare_runtime_operators() -> None:
    """Let the ONNX checker know the operators that ONNX Runtime keeps in the standard domain, in every opset."""
    for name, like, version in (
        ("SimplifiedLayerNormalization", "RMSNormalization", 23),
        ("LayerNormalization", "LayerNormalization", 17),
    ):
        schema = onnx.defs.get_schema(like, version)
        onnx.defs.register_schema(
            onnx.defs.OpSchema(
                name,
                "",
                1,
                inputs=schema.inputs,
                outputs=schema.outputs,
                attributes=list(schema.attributes.values()),
                type_constraints=[(one.type_param_str, one.allowed_type_strs, "") for one in schema.type_constraints],
            )
        )


_declare_runtime_operators()


class LawBroken(AssertionError):
    """A pass broke a law, or did not do what its golden file says; shown without a traceback."""


def rewrite(one: Pass, model: oir.Model, limit: int | None = None) -> tuple[oir.Model, Outcome]:
    """A rewritten copy of `model` and the pass's own account, which is checked against the text of the model."""
    name = one.pass_name()
    facts.check(model, one.needs, name, "before")
    after, outcome = model.clone(), Outcome(name, limit)
    after.meta.pop("burnish.names", None)
    one.rewrite(after, outcome)
    edit.separate_names(after)
    changed = text(after) != text(model)
    if changed != (outcome.rewritten > 0):
        says = "is changed" if changed else "is unchanged"
        raise LawBroken(f"`rewritten` is {outcome.rewritten}, but the text of the model {says}:\n\n{text(after)}")
    facts.check(
        after,
        (*(fact for fact in one.needs if fact not in one.breaks), *(one.gives if limit is None else ())),
        name,
        "after",
    )
    return after, outcome


def check_laws(one: Pass, before: oir.Model, after: oir.Model, outcome: Outcome) -> None:
    """Check everything that must hold after `one` has made `after` from `before`.

    Raises:
        LawBroken: for the first law that does not hold.
    """
    for skip in outcome.skipped:
        if not skip.reason.strip():
            raise LawBroken(f"{skip.node} was skipped without a reason")
    _, again = rewrite(one, after)
    if again.rewritten:
        raise LawBroken(f"a second run rewrites {again.rewritten} more: {', '.join(again.changed_nodes)}")
    _, none = rewrite(one, before, limit=0)
    if none.rewritten:
        raise LawBroken("a run that may rewrite nothing rewrites something: ask `outcome.take` before each rewrite")
    check_contract(before, after)
    check_nothing_unused(before, after)
    proto = oir.to_proto(after)
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise LawBroken(f"the ONNX checker refuses the result: {error}\n\n{text(after)}") from None
    if isinstance(one, ExactPass):
        check_same_outputs(before, after)


def check_contract(before: oir.Model, after: oir.Model) -> None:
    """Names, order, dtypes and dims of inputs and outputs are what they were."""
    for role in ("inputs", "outputs"):
        old, new = (
            [f"{value.name}: {type_text(value)}" for value in getattr(model.graph, role)] for model in (before, after)
        )
        if old != new:
            raise LawBroken(f"the {role} were {', '.join(old)} and are {', '.join(new)}")


def check_nothing_unused(before: oir.Model, after: oir.Model) -> None:
    """No initializer and no node is left that nobody reads, unless it was so before."""
    left = _unused(after) - _unused(before)
    if left:
        raise LawBroken(f"nobody reads {', '.join(sorted(left))} any more:\n\n{text(after)}")


def _unused(model: oir.Model) -> set[str]:
    found = set()
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in graph.initializers.values():
            if not (value.uses() or value.is_graph_output() or value.is_graph_input()):
                found.add(f"`{value.name}`")
        for node in graph:
            if not any(out.uses() or out.is_graph_output() for out in node.outputs):
                found.add(f"`{node.outputs[0].name}`")
    return found


def check_same_outputs(before: oir.Model, after: oir.Model) -> None:
    """Both models give the same outputs in ONNX Runtime, with and without its optimizations, and in float64 to 1e-9.

    Raises:
        LawBroken: when an output differs, or when no input can be found that the first model accepts.
    """
    samples = list(make_samples(before))
    plain, optimized = (_expected(OrtRunner(before, optimize), samples) for optimize in (False, True))
    other = OrtRunner(before, optimize=True)
    for label, expected in (("disabled", plain), ("enabled", optimized)):
        runner = _load(after, optimize=label == "enabled")
        result = verify.compare(expected, runner, partial(expected.differences, other))
        for check in result.outputs:
            if not check.holds:
                raise LawBroken(
                    f"with ONNX Runtime's optimizations {label}, output `{check.output}` differs by {check.error:.3g} "
                    f"(allowed: {check.tolerance:.3g}) on {check.sample}\n\n{text(after)}"
                )
    exact = ReferenceRunner(before), ReferenceRunner(after)
    for sample, _ in plain.kept:
        error = verify.replay(*exact, sample)
        if not error <= verify.REPLAY_TOLERANCE:
            raise LawBroken(f"in float64 the outputs differ by {error:.3g} on {sample.name}\n\n{text(after)}")


def _expected(runner: OrtRunner, samples: list[Sample]) -> verify.Expected:
    try:
        return verify.Expected(runner, samples)
    except InputError as error:
        raise LawBroken(error.cause) from None


def _load(model: oir.Model, optimize: bool) -> OrtRunner:
    try:
        return OrtRunner(model, optimize)
    except InputError as error:
        raise LawBroken(f"ONNX Runtime does not load the result: {error.cause}\n\n{text(model)}") from None


class OrtRunner:
    """Runs a small model in ONNX Runtime on one thread."""

    def __init__(self, model: oir.Model, optimize: bool) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        level = ort.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
        try:
            data = oir.to_proto(model).SerializeToString()
            self.session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise InputError(f"ONNX Runtime cannot load the model: {error}") from error
        self.outputs = [output.name for output in self.session.get_outputs()]

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs by name."""
        try:
            return dict(zip(self.outputs, self.session.run(None, dict(feeds)), strict=True))
        except Exception as error:
            raise InputError(f"ONNX Runtime cannot run the model: {error}") from error

    def close(self) -> None:
        """Free the session."""
        del self.session


def make_samples(model: oir.Model) -> Iterator[Sample]:
    """Seeded inputs with every dynamic dim a different size of 1, 2, 5 in turn, then with all of them the same size.

    A dim called `total` beside one called `new` covers the new tokens and the longest of those called `past`, `past_0`.
    """
    names = sorted({_dim_name(value, axis) for value, axis in _dynamic(model)})
    settings = [{name: _SIZES[(turn + at) % 3] for at, name in enumerate(names)} for turn in range(3)]
    settings += [dict.fromkeys(names, size) for size in _SIZES] if len(names) > 1 else []
    for number, sizes in enumerate(settings):
        if {"new", "total"} <= sizes.keys():
            sizes["total"] = sizes["new"] + max(size for name, size in sizes.items() if name.startswith("past"))
        shown = ", ".join(f"{name}={size}" for name, size in sizes.items())
        feeds = {value.name or "": _feed(value, sizes, number) for value in _fed(model)}
        yield Sample(f"sample {number}" + (f" with {shown}" if shown else ""), feeds)


def _fed(model: oir.Model) -> list[oir.Value]:
    return [value for value in model.graph.inputs if value.const_value is None]


def _dynamic(model: oir.Model) -> Iterator[tuple[oir.Value, int]]:
    for value in _fed(model):
        for axis, size in enumerate(value.shape or ()):
            if not isinstance(size, int):
                yield value, axis


def _dim_name(value: oir.Value, axis: int) -> str:
    size = value.shape[axis] if value.shape is not None else None
    name = size.value if isinstance(size, oir.SymbolicDim) else None
    return str(name) if name is not None else f"{value.name}.{axis}"


def _feed(value: oir.Value, sizes: Mapping[str, int], seed: int) -> np.ndarray:
    """Normal floats (four times as large in every third sample), integers of 0, 1, 2, random booleans."""
    random = np.random.default_rng([seed, zlib.crc32((value.name or "").encode())])
    shape = [
        size if isinstance(size, int) else sizes[_dim_name(value, axis)] for axis, size in enumerate(value.shape or ())
    ]
    dtype = value.dtype.numpy() if value.dtype is not None else np.dtype(np.float32)
    if dtype.kind == "b":
        return np.asarray(random.random(shape) < 0.5)
    if dtype.kind in "iu":
        return random.integers(0, 3, shape).astype(dtype)
    return (random.standard_normal(shape) * (4.0 if seed % 3 == 2 else 1.0)).astype(dtype)
