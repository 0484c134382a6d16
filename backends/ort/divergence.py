"""Find the first node where two models part: observe a few inner values at a time and close in.

Only a handful of values is observed in one run, so the memory stays that of an ordinary run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from burnish.backends.ort.observe import outputs_exchanged
from burnish.backends.ort.session import OrtRunner
from burnish.ir import weights
from burnish.passes.verify import relative_error

PROBES = 8
"""Values observed in one run."""
_SHOWN = 8

Load = Callable[[oir.Model], OrtRunner]
Pair = tuple[oir.Value, oir.Value]


@dataclass(frozen=True)
class Parting:
    """Where two models part on one sample.

    Attributes:
        value: the first value that differs, in either model, and the nodes that compute it.
        error: its relative error.
        agreeing: the latest value before it that agrees, likewise; None when it hangs on the inputs alone.
        observed: how many values were compared.
        matched: how many values exist in both models.
    """

    value: Pair
    error: float
    agreeing: Pair | None
    observed: int
    matched: int


def expressions(model: oir.Model) -> dict[oir.Value, int]:
    """A hash of how each value of the main graph is computed; floats count by dtype and shape alone."""
    found: dict[oir.Value, int] = {}

    def of(value: oir.Value | None) -> int:
        if value is None:
            return 0
        if value not in found:
            found[value] = _leaf(value)
        return found[value]

    for node in model.graph:
        if any(weights.is_constant(out) for out in node.outputs):
            continue
        operands = [of(value) for value in node.inputs]
        if node.op_type in ("Add", "Mul", "Max", "Min", "And", "Or", "Equal"):
            operands.sort()
        attributes = sorted((name, _spelled(a)) for name, a in node.attributes.items())
        for index, out in enumerate(node.outputs):
            found[out] = hash((node.domain, node.op_type, index, tuple(operands), tuple(attributes)))
    return found


def _leaf(value: oir.Value) -> int:
    tensor = weights.tensor_of(value)
    if tensor is None:
        return hash(value.name)
    content = tensor.numpy().tobytes() if tensor.size <= _SHOWN and tensor.dtype.is_integer() else b""
    return hash((tensor.dtype, tuple(str(d) for d in tensor.shape), content))


def _spelled(attribute: oir.Attr) -> str:
    if attribute.type in (oir.AttributeType.GRAPH, oir.AttributeType.GRAPHS, oir.AttributeType.TENSOR):
        return str(attribute.type)
    return repr(attribute.value)


def matched_values(a: oir.Model, b: oir.Model) -> list[Pair]:
    """The computed values that exist in both models, in `a`'s order: by name, else by unique structure."""
    hashes_a, hashes_b = expressions(a), expressions(b)
    computed_a, computed_b = _computed(a), _computed(b)
    names = {str(value.name): value for value in computed_b}
    once: dict[int, oir.Value | None] = {}
    for value in computed_b:
        once[hashes_b[value]] = None if hashes_b[value] in once else value
    repeated: dict[int, int] = {}
    for value in computed_a:
        repeated[hashes_a[value]] = repeated.get(hashes_a[value], 0) + 1
    pairs: list[Pair] = []
    for value in computed_a:
        other = names.get(str(value.name))
        if other is None and repeated[hashes_a[value]] == 1:
            other = once.get(hashes_a[value])
        if other is not None and _alike(value, other):
            pairs.append((value, other))
    return pairs


def _computed(model: oir.Model) -> list[oir.Value]:
    return [out for node in model.graph for out in node.outputs if out.name and not weights.is_constant(out)]


def _alike(a: oir.Value, b: oir.Value) -> bool:
    """Whether two values could be the same tensor, as far as their types say."""
    if a.dtype is not None and b.dtype is not None and a.dtype != b.dtype:
        return False
    return a.shape is None or b.shape is None or len(a.shape) == len(b.shape)


class _Search:
    """What is known of the matched values on one sample."""

    def __init__(
        self, models: tuple[oir.Model, oir.Model], feeds: Mapping[str, np.ndarray], tolerance: float, load: Load
    ):
        self.models, self.feeds, self.tolerance, self.load = models, feeds, tolerance, load
        self.pairs = matched_values(*models)
        self.partner = dict(self.pairs)
        self.order = {value: i for i, (value, _) in enumerate(self.pairs)}
        self.errors: dict[oir.Value, float] = {}

    def observe(self, values: Sequence[oir.Value]) -> None:
        """Compute and compare `values` in both models, a few at a time."""
        new = [value for value in dict.fromkeys(values) if value not in self.errors]
        for start in range(0, len(new), PROBES):
            some = new[start : start + PROBES]
            found = []
            for model, observed in zip(self.models, (some, [self.partner[v] for v in some]), strict=True):
                with outputs_exchanged(model, observed):
                    runner = self.load(model)
                    found.append(list(runner.run(self.feeds).values()))
                    runner.close()
            for value, one, other in zip(some, *found, strict=True):
                self.errors[value] = relative_error(other, one)

    def differs(self, value: oir.Value) -> bool:
        """Whether an observed value differs by more than the tolerance."""
        return self.errors[value] > self.tolerance

    def before(self, value: oir.Value) -> list[oir.Value]:
        """The matched values that `value` hangs on, in order."""
        seen: set[oir.Value] = set()
        stack = [value]
        while stack:
            node = stack.pop().producer()
            for operand in _operands(node):
                if operand not in seen:
                    seen.add(operand)
                    stack.append(operand)
        return sorted((v for v in seen if v in self.order), key=self.order.__getitem__)

    def nearest(self, value: oir.Value) -> list[oir.Value]:
        """The matched values that `value` hangs on with no other matched value between, in order."""
        found: set[oir.Value] = set()
        stack, seen = [value], {value}
        while stack:
            node = stack.pop().producer()
            for operand in _operands(node):
                if operand in self.order:
                    found.add(operand)
                elif operand not in seen:
                    seen.add(operand)
                    stack.append(operand)
        return sorted(found, key=self.order.__getitem__)


def _operands(node: oir.Node | None) -> Iterator[oir.Value]:
    """What a node reads, inside its nested graphs too."""
    if node is None:
        return
    yield from (v for v in node.inputs if v is not None)
    for attribute in node.attributes.values():
        if attribute.type == oir.AttributeType.GRAPH:
            for inner in attribute.as_graph():
                yield from _operands(inner)


def first_difference(
    a: oir.Model, b: oir.Model, feeds: Mapping[str, np.ndarray], tolerance: float, load: Load, *, output: str
) -> Parting | None:
    """The first value on the way to `output` that differs although every value before it agrees.

    Args:
        a: one model; its outputs are exchanged while the search runs, and put back.
        b: the other, with the same inputs.
        feeds: a sample on which the two differ.
        tolerance: relative error up to which values agree.
        load: makes a runner; best without optimizations, which make inner values disappear.
        output: the output of `a` that differs.

    Returns:
        None when `output` does not differ with inner values observed, or exists in one model only.

    Raises:
        InputError: a model cannot be run.
    """
    search = _Search((a, b), feeds, tolerance, load)
    candidate = next((v for v in a.graph.outputs if v.name == output), None)
    if candidate is None or candidate not in search.order:
        return None
    search.observe([candidate])
    if not search.differs(candidate):
        return None
    while True:
        earlier = [v for v in search.before(candidate) if v not in search.errors or search.differs(v)]
        unseen = [v for v in earlier if v not in search.errors]
        step = max(1, len(unseen) // PROBES)
        probes = unseen[::-1][::step][:PROBES]
        search.observe(probes)
        differing = [v for v in earlier if v in search.errors and search.differs(v)]
        if differing:
            candidate = differing[0]
            continue
        close = search.nearest(candidate)
        search.observe(close)
        differing = [v for v in close if search.differs(v)]
        if not differing:
            last = (close[-1], search.partner[close[-1]]) if close else None
            pair = (candidate, search.partner[candidate])
            return Parting(pair, search.errors[candidate], last, len(search.errors), len(search.pairs))
        candidate = differing[0]
