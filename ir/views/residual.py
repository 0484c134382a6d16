"""Residual sums: a value joined by what is computed from it, `y = x + f(x)`, found by what depends on what."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import onnx_ir as oir

from burnish.ir import match, weights
from burnish.ir.inference import Inference
from burnish.ir.views.flow import CONTRACTIONS, Flow, Step
from burnish.ir.views.norm import Norm

_ADDS = ("Add", "Sum")
_SAME = ("Identity", "Cast", "CastLike", "Dropout", "Mul", "Div", "Add", "Sub", "DequantizeLinear", "QuantizeLinear")
_CHOICES = ("ArgMax", "ArgMin")
_ON_SCORES = ("Add", "Mul", "Div", "Sub", "Cast", "Where", "Max", "Clip", "Tanh", "Reshape", "Identity", "Squeeze")
RESHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
MOVES = (*RESHAPES, "Transpose")
_UNARY = (
    *MOVES,
    *_SAME,
    *"Relu Clip LeakyRelu PRelu Elu Selu Celu Gelu Sigmoid HardSigmoid HardSwish Tanh Mish BatchNormalization".split(),
)
_ARITHMETIC = frozenset(
    (*_SAME, *MOVES, "Pow", "Sqrt", "Reciprocal", "Neg", "ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2")
)
"""What a norm is spelled with."""

_LONGEST = 10
"""Steps on the shortcut of a residual sum, or behind it before the next one begins."""


@dataclass(frozen=True)
class Residual:
    """One residual sum.

    Attributes:
        entry: what is carried past the branches.
        terms: what is added to it, one value a branch.
        join: the sum.
        projected: the shortcut computes something of its own, such as a convolution of stride 2.
        region: the steps from `entry` to `join`, as bits of the flow.
        exit: `join`, or what a norm or activation makes of it before the next residual sum begins.
        tail: the operators from `join` to `exit`.
        inner: residual sums inside the branches.
    """

    entry: oir.Value
    terms: tuple[oir.Value, ...]
    join: oir.Value
    projected: bool
    region: int
    exit: oir.Value
    tail: tuple[str, ...] = ()
    inner: tuple[Residual, ...] = ()


def residuals(flow: Flow) -> list[Residual]:
    """The residual sums around contractions, in topological order; inner ones too."""
    found = []
    for step in flow.steps:
        if step.op in _ADDS:
            one = _residual(flow, step.outputs[0], _terms(flow, step))
            if one is None or not one.region & flow.contractions or _are_scores(one.join):
                continue
            if _is_float(one.entry) and _reaches(flow, one):
                found.append(one)
    return found


def _is_float(value: oir.Value) -> bool:
    dtype = match.tensor_dtype(value)
    if dtype is not None:
        return dtype.is_floating_point()
    return match.producer(value, "QuantizeLinear", "DynamicQuantizeLinear") is None


def _reaches(flow: Flow, one: Residual) -> bool:
    """Whether every branch computes with `entry` itself, and not only with a code that was chosen by it."""
    if not any(step.op in _CHOICES for step in flow.members(one.region)):
        return True
    reached = {one.entry}
    for step in flow.members(one.region):
        if step.op not in _CHOICES and not reached.isdisjoint(step.data):
            reached.update(step.outputs)
    return all(term in reached for term in one.terms)


def _are_scores(value: oir.Value) -> bool:
    """Whether a softmax is all that is made of `value`: then what is added to it is a mask or a bias of positions.

    From the second layer on the scores depend on the mask, through what the first layer made with it.
    """
    for _ in range(_LONGEST):
        readers = match.consumers(value)
        if any(one.op_type in ("Softmax", "Exp") for one in readers):
            return True
        if len(readers) != 1 or readers[0].op_type not in _ON_SCORES:
            return False
        value = readers[0].outputs[0]
    return False


def _terms(flow: Flow, step: Step) -> list[oir.Value]:
    return [value for value in step.data if flow.varies(value)]


def _residual(flow: Flow, join: oir.Value, terms: list[oir.Value]) -> Residual | None:
    """The residual sum whose result is `join`; sums among its terms are taken apart only as far as needed."""
    for opened in range(4):
        if len(terms) < 2:
            return None
        for entry in terms:
            rest = tuple(one for one in terms if one is not entry)
            if rest and all(flow.depends(one, entry) for one in rest):
                return Residual(entry, rest, join, False, flow.between(entry, join), join)
        if opened == 0:
            shortcut = _shortcut(flow, terms)
            if shortcut is not None:
                term, entry, projected = shortcut
                rest = tuple(one for one in terms if one is not term)
                return Residual(entry, rest, join, projected, flow.between(entry, join), join)
        inner = next((one for one in terms if (step := flow.step(one)) is not None and step.op in _ADDS), None)
        if inner is None:
            return None
        terms = [one for one in terms if one is not inner] + _terms(flow, flow.step(inner))  # type: ignore[arg-type]
    return None


def _shortcut(flow: Flow, terms: list[oir.Value]) -> tuple[oir.Value, oir.Value, bool] | None:
    """(term, value, projected): a short chain of steps makes the term from a value on which all other terms depend."""
    best: tuple[int, oir.Value, oir.Value, bool] | None = None
    for term in terms:
        value, projected, matrices = term, False, 0
        for length in range(1, _LONGEST):
            step = flow.step(value)
            above = _terms(flow, step) if step is not None and step.node is not None else []
            matrices += step is not None and step.op in CONTRACTIONS
            if step is None or len(above) != 1 or matrices > 1:
                break
            projected |= step.op not in _SAME
            value = above[0]
            if not _is_float(value):
                if match.producer(value, "QuantizeLinear", "DynamicQuantizeLinear") is None:
                    break
                continue
            if all(flow.depends(one, value) for one in terms if one is not term):
                if best is None or length < best[0]:
                    best = length, term, value, projected
                break
    return None if best is None else best[1:]


def lights(flow: Flow, norms: Iterable[Norm]) -> dict[oir.Value, tuple[oir.Value, str]]:
    """What norms, activations and factors make of one value: by result, (that value, the operator)."""
    found = {one.output: (one.input, f"{one.kind} norm") for one in norms}
    for step in flow.steps:
        if step.node is None or step.part == "sum":
            continue
        if step.part == "norm" or step.op in _UNARY and len(step.data) == 1:
            found[step.outputs[0]] = step.data[0], "norm" if step.part else step.op
        elif step.op == "Mul" and len(step.data) == 2:
            for value, gate in (step.data, step.data[::-1]):
                sigmoid = flow.step(gate)
                if sigmoid is not None and sigmoid.op in ("Sigmoid", "HardSigmoid") and sigmoid.data == (value,):
                    found[step.outputs[0]] = value, "Swish"
    return found


def outermost(flow: Flow, found: list[Residual]) -> list[Residual]:
    """The residual sums that lie in no other, those left out that only hold repeated ones (a skip over a whole stage).

    Args:
        flow: the flow of the graph.
        found: residual sums in topological order.
    """
    inside: dict[int, list[Residual]] = {}
    roots: list[Residual] = []
    open_ones: list[Residual] = []
    for one in sorted(found, key=lambda r: -r.region.bit_count()):
        around = [other for other in open_ones if one.region & ~other.region == 0]
        if around:
            inside.setdefault(id(around[-1]), []).append(one)
        else:
            roots.append(one)
        open_ones.append(one)
    result: list[Residual] = []
    pending = roots
    while pending:
        one = pending.pop()
        within = inside.get(id(one), [])
        others = (other for other in within if other.entry is not one.entry or not set(other.terms) <= set(one.terms))
        inner = sorted(others, key=lambda r: flow.source[r.join])
        if _only_holds(flow, one, inner):
            pending += within
        else:
            result.append(replace(one, inner=tuple(inner)))
    return sorted(result, key=lambda r: flow.source[r.join])


def _only_holds(flow: Flow, one: Residual, inner: list[Residual]) -> bool:
    if one.projected and inner:
        return True
    if any(other.projected and _convolves(flow, other) for other in inner):
        return True
    keys = [skeleton(flow, other.region) for other in inner]
    return any(
        keys[i] == keys[j] and flow.depends(inner[j].entry, inner[i].entry) for j in range(len(inner)) for i in range(j)
    )


def _convolves(flow: Flow, one: Residual) -> bool:
    return any("Conv" in step.op for step in flow.members(one.region & flow.contractions))


def skeleton(flow: Flow, region: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """The contractions of a region with the shapes of their weights, in an order that is the same for all exporters."""
    found = []
    for step in flow.members(region & flow.contractions):
        tensors = [weights.tensor_of(value) for value in step.node.inputs] if step.node is not None else []
        sizes = [tuple(t.shape.numpy()) for t in tensors if t is not None and len(t.shape) > 1]
        found.append((step.op, sizes[0] if sizes else ()))
    return tuple(sorted(found))


def runs(
    flow: Flow, found: list[Residual], light: Mapping[oir.Value, tuple[oir.Value, str]], facts: Inference
) -> list[list[Residual]]:
    """Residual sums in runs, each of which begins where the one before it ends.

    Args:
        flow: the flow of the graph.
        found: residual sums in topological order, none inside another.
        light: see `lights`.
        facts: what is proven of the model.

    Returns:
        The runs, each behind those that it depends on, with `exit` and `tail` of each sum set. Behind the last sum of a
        run its tail is that of the last sum of its kind before it, where the same operators stand there too, and give
        the same shape.
    """
    by_join = {one.join: one for one in found}
    joins = sum(1 << flow.source[join] for join in by_join)
    open_runs: dict[oir.Value, list[Residual]] = {}
    result: list[list[Residual]] = []
    for one in found:
        value, tail = one.entry, list[str]()
        while value not in by_join and value in light and len(tail) < _LONGEST:
            value, op = light[value]
            tail.insert(0, op)
        if value not in by_join and (above := _made_of(flow, value, joins)) is not None:
            value, op = above, "norm"
            tail.insert(0, op)
        run = open_runs.pop(value, None)
        if run is None:
            run = []
            result.append(run)
        else:
            run[-1] = _ending(flow, run[-1], one.entry, tuple(tail))
        run.append(one)
        open_runs[one.join] = run
    readers: dict[oir.Value, list[tuple[oir.Value, str]]] = {}
    for value, (source, op) in light.items():
        readers.setdefault(source, []).append((value, op))
    for run in result:
        kind = skeleton(flow, run[-1].region)
        alike = [one for one in run[:-1] if skeleton(flow, one.region) == kind] or run[:-1]
        tail = list(alike[-1].tail) if alike else []
        end = _behind(readers, run[-1].join, tail)
        if end is not None and facts.shape(end) != facts.shape(alike[-1].exit if alike else end):
            end = None
        while end is None and tail and tail[-1] in MOVES:
            tail.pop()
            end = _behind(readers, run[-1].join, tail)
        if end is not None:
            run[-1] = _ending(flow, run[-1], end, tuple(tail))
    return sorted(result, key=lambda run: _rank(flow, run[-1].join))


def _rank(flow: Flow, join: oir.Value) -> tuple[int, int]:
    """How many steps a sum depends on, then the first of them, an input: an order that the file does not influence."""
    before = flow.before[flow.source[join]]
    return before.bit_count(), before & -before


def _made_of(flow: Flow, value: oir.Value, joins: int) -> oir.Value | None:
    """The nearest residual sum, when `value` is made of it alone by arithmetic: a norm in a spelling no view knows."""
    before = flow.before[flow.source[value]] & joins
    if not before:
        return None
    join = flow.steps[before.bit_length() - 1].outputs[0]
    between = flow.between(join, value)
    if not {step.op for step in flow.members(between)} <= _ARITHMETIC:
        return None
    inner = {out for step in flow.members(between) for out in step.outputs}
    read = {one for step in flow.members(between) for one in _terms(flow, step)}
    return None if read - inner - {join} else join


def _behind(
    readers: Mapping[oir.Value, list[tuple[oir.Value, str]]], value: oir.Value, tail: list[str]
) -> oir.Value | None:
    """What the operators of `tail` make of `value`; None where they do not stand behind it."""
    for op in tail:
        after = [out for out, other in readers.get(value, []) if other == op]
        if len(after) != 1:
            return None
        value = after[0]
    return value


def _ending(flow: Flow, one: Residual, exit: oir.Value, tail: tuple[str, ...]) -> Residual:
    return replace(one, exit=exit, tail=tail, region=flow.between(one.entry, exit))
