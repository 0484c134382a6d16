"""What a mask's computation proves of its elements by their distance from the diagonal.

A tensor [..., i, j] is described by runs of values: whenever an element lies between `low` and `high`, its i - j lies
in a band. Runs are necessary conditions, so what they exclude is proven, however the mask was computed: comparisons of
positions, triangles, choices, sums and products, or constants. Axes that meet in a broadcast and are not declared to be
one are taken to be equal.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from burnish.ir import dims, match, weights
from burnish.ir.dims import Dim
from burnish.ir.inference import Inference
from burnish.ir.views import heads
from burnish.ir.views.ramps import read_ramp
from burnish.ir.walk import is_op

HIDDEN = -9000.0
"""A score this much lower than others vanishes in the softmax: exporters hide with -10000, -1e9 or less."""

_MOST_RUNS = 12
_LARGEST = 1 << 22
_INFINITE = float("inf")


@dataclass(frozen=True)
class Band:
    """low <= i - j <= high; None where there is no bound. `empty`: nothing satisfies it."""

    low: Dim | None = None
    high: Dim | None = None
    empty: bool = False

    def meet(self, other: Band) -> Band:
        """Both hold."""
        if self.empty or other.empty:
            return NOWHERE
        low = _tighter(self.low, other.low, 1)
        high = _tighter(self.high, other.high, -1)
        if low is not None and high is not None and dims.compare(low, high) == 1:
            return NOWHERE
        return Band(low, high)

    def join(self, other: Band) -> Band:
        """The smallest band that holds both."""
        if self.empty or other.empty:
            return other if self.empty else self
        return Band(_looser(self.low, other.low, 1), _looser(self.high, other.high, -1))

    def moved(self, by: Dim) -> Band:
        """With `by` added to i - j."""
        if self.empty:
            return self
        low = dims.add(self.low, by) if self.low is not None else None
        return Band(low, dims.add(self.high, by) if self.high is not None else None)


EVERYWHERE, NOWHERE = Band(), Band(empty=True)


def _tighter(one: Dim | None, other: Dim | None, sign: int) -> Dim | None:
    if one is None or other is None:
        return other if one is None else one
    return other if dims.compare(one, other) == -sign else one


def _looser(one: Dim | None, other: Dim | None, sign: int) -> Dim | None:
    if one is None or other is None:
        return None
    found = dims.compare(one, other)
    if found is None:
        return None
    return one if found == -sign or found == 0 else other


@dataclass(frozen=True)
class Run:
    """Elements between `low` and `high`, which lie in `band` only."""

    low: float
    high: float
    band: Band


Runs = tuple[Run, ...]
ANYTHING: Runs = (Run(-_INFINITE, _INFINITE, EVERYWHERE),)


def any_band(runs: Runs, low: float, high: float) -> Band:
    """Where an element may be that lies between `low` and `high`."""
    found = NOWHERE
    for run in runs:
        if run.high >= low and run.low <= high:
            found = found.join(run.band)
    return found


def _kept(runs: Iterable[Run]) -> Runs:
    """Runs without the empty ones, equal intervals joined, at most so many."""
    found: dict[tuple[float, float], Band] = {}
    for run in runs:
        if not run.band.empty:
            key = (run.low, run.high)
            found[key] = found[key].join(run.band) if key in found else run.band
    if any(np.isnan(key).any() for key in found):
        return ANYTHING
    if len(found) <= _MOST_RUNS:
        return tuple(Run(*key, band) for key, band in found.items())
    merged = []
    for hidden in (True, False):
        some = {key: band for key, band in found.items() if (key[1] <= HIDDEN) == hidden}
        band = NOWHERE
        for one in some.values():
            band = band.join(one)
        if some:
            merged.append(Run(min(low for low, _ in some), max(high for _, high in some), band))
    return tuple(merged)


def fits(shape: tuple[Dim, ...] | None, last: tuple[Dim, ...]) -> bool:
    """Whether a tensor of `shape` has the last two axes `last`, and is not repeated along one of them."""
    if shape is None or len(shape) < 2:
        return False
    return all(one == other or one != 1 for one, other in zip(shape[-2:], last, strict=False))


class Bands:
    """The runs of the values of a model, by the last two axes."""

    def __init__(self, facts: Inference) -> None:
        self.facts = facts
        self._known: dict[oir.Value, Runs] = {}

    def of(self, value: oir.Value | None) -> Runs:
        """The runs of a numeric or boolean value; a bool is 0 or 1."""
        if value is None:
            return ANYTHING
        if value not in self._known:
            self._known[value] = ANYTHING
            self._known[value] = self._read(value)
        return self._known[value]

    def _read(self, value: oir.Value) -> Runs:
        tensor = weights.tensor_of(value)
        if tensor is not None:
            known = 0 < tensor.size <= _LARGEST and tensor.dtype != oir.DataType.STRING
            return _constant(tensor) if known else ANYTHING
        node = value.producer()
        if node is None:
            return _BOOLS if self.facts.dtype(value) == oir.DataType.BOOL else ANYTHING
        found = self._computed(node, value)
        if found == ANYTHING and self.facts.dtype(value) == oir.DataType.BOOL:
            return _BOOLS
        return found

    def _computed(self, node: oir.Node, value: oir.Value) -> Runs:
        op = node.op_type if is_op(node, node.op_type) else ""
        if op in ("Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal"):
            return self._compared(node)
        if op in ("Add", "Sub", "Mul", "Div", "Min", "Max", "And", "Or") and len(node.inputs) == 2:
            return _combined(op, *(self._aligned(one, value) for one in node.inputs))
        if op == "Where":
            return self._chosen(node, value)
        if op == "Not":
            return tuple(Run(1 - run.high, 1 - run.low, run.band) for run in self.of(node.inputs[0]))
        if op == "Neg":
            return tuple(Run(-run.high, -run.low, run.band) for run in self.of(node.inputs[0]))
        if op == "Cast":
            return self._cast(node, value)
        if op == "ConstantOfShape":
            fill = match.attribute(node, "value")
            return _single(float(fill.numpy().reshape(-1)[0]) if fill is not None else 0.0)
        if op == "Trilu":
            return self._triangle(node)
        if op in ("Sigmoid", "Softmax"):
            return (Run(0.0, 1.0, EVERYWHERE),)
        if op == "Tanh":
            return (Run(-1.0, 1.0, EVERYWHERE),)
        return self._moved(node, value)

    def _aligned(self, value: oir.Value | None, into: oir.Value) -> Runs:
        """The runs of an operand; one that is repeated along one of the last axes of `into` has no band there."""
        runs, whole = self.of(value), self.facts.shape(into)
        return runs if whole is not None and fits(self.facts.shape(value), whole[-2:]) else _everywhere(runs)

    def _compared(self, node: oir.Node) -> Runs:
        left, right = (read_ramp(value, self.facts) for value in node.inputs)
        if left is None or right is None:
            return self._against(node)
        across = left.minus(right)
        if all(slope > 0 for _, slope in across.slopes) and dims.at_least(across.start, 0):
            always = {"GreaterOrEqual": 1.0, "Less": 0.0}.get(node.op_type)
            if always is not None:
                return _single(always)
        down, over = across.slope(2), across.slope(1)
        if (down, over) not in ((1, -1), (-1, 1)) or across.others(2):
            return _BOOLS
        low, high = {
            "Less": (None, -1), "LessOrEqual": (None, 0), "Greater": (1, None), "GreaterOrEqual": (0, None),
            "Equal": (0, 0),
        }[node.op_type]  # fmt: skip
        yes = _shifted(Band(low, high), across.start, down)
        no = EVERYWHERE
        if high is None and low is not None:
            no = _shifted(Band(None, low - 1), across.start, down)
        elif low is None and high is not None:
            no = _shifted(Band(high + 1, None), across.start, down)
        return _kept((Run(1.0, 1.0, yes), Run(0.0, 0.0, no)))

    def _against(self, node: oir.Node) -> Runs:
        """A comparison with one number."""
        number = heads.number(node.inputs[1], self.facts)
        op = node.op_type
        if number is None:
            return _BOOLS
        yes, no = NOWHERE, NOWHERE
        for run in self.of(node.inputs[0]):
            may, must = {
                "Less": (run.low < number, run.high < number),
                "LessOrEqual": (run.low <= number, run.high <= number),
                "Greater": (run.high > number, run.low > number),
                "GreaterOrEqual": (run.high >= number, run.low >= number),
                "Equal": (run.low <= number <= run.high, run.low == number == run.high),
            }[op]
            yes = yes.join(run.band) if may else yes
            no = no if must else no.join(run.band)
        return _kept((Run(1.0, 1.0, yes), Run(0.0, 0.0, no)))

    def _chosen(self, node: oir.Node, value: oir.Value) -> Runs:
        condition = self._aligned(node.inputs[0], value)
        yes, no = any_band(condition, 1.0, 1.0), any_band(condition, 0.0, 0.0)
        found = [Run(run.low, run.high, run.band.meet(yes)) for run in self._aligned(node.inputs[1], value)]
        found += [Run(run.low, run.high, run.band.meet(no)) for run in self._aligned(node.inputs[2], value)]
        return _kept(found)

    def _cast(self, node: oir.Node, value: oir.Value) -> Runs:
        runs, kind = self.of(node.inputs[0]), self.facts.dtype(value)
        if kind == oir.DataType.BOOL:
            no = any_band(runs, 0.0, 0.0)
            yes = NOWHERE
            for run in runs:
                yes = yes if run.low == 0.0 == run.high else yes.join(run.band)
            return _kept((Run(1.0, 1.0, yes), Run(0.0, 0.0, no)))
        if kind is None or kind.is_floating_point() or all(run.low == run.high == round(run.low) for run in runs):
            return runs
        return ANYTHING

    def _triangle(self, node: oir.Node) -> Runs:
        k = self.facts.integers(match.input_of(node, 1)) if match.input_of(node, 1) is not None else [0]
        if k is None:
            return ANYTHING
        upper = match.attribute(node, "upper", 1)
        edge = dims.negate(k[0])
        inside = Band(None, edge) if upper else Band(edge, None)
        outside = Band(dims.add(edge, 1), None) if upper else Band(None, dims.add(edge, -1))
        kept = [Run(run.low, run.high, run.band.meet(inside)) for run in self.of(node.inputs[0])]
        return _kept([*kept, Run(0.0, 0.0, outside)])

    def _moved(self, node: oir.Node, value: oir.Value) -> Runs:
        """Movement: of the last two axes only cuts are followed; else what remains are the numbers."""
        source = match.input_of(node, 0)
        if not is_op(node, *_MOVES) or source is None:
            return ANYTHING
        runs = self.of(source)
        before, after = self.facts.shape(source), self.facts.shape(value)
        if is_op(node, "Slice") and before is not None and len(before) >= 2:
            return self._cut(node, runs, len(before))
        if is_op(node, "Concat", "Gather", "GatherND", "GatherElements", "Split", "Tile", "Transpose"):
            if is_op(node, "Concat"):
                runs = tuple(run for one in node.inputs for run in self.of(one))
            return _everywhere(runs)
        keeps = heads.keeps(node, self.facts) or is_op(node, "Expand")
        if before is not None and after is not None and not keeps:
            keeps = before[-2:] == after[-2:] and len(before) >= 2
        if is_op(node, "Expand") and (before is None or after is None or before[-2:] != after[-2:]):
            keeps = False
        return runs if keeps else _everywhere(runs)

    def _cut(self, node: oir.Node, runs: Runs, rank: int) -> Runs:
        from burnish.ir.content_rules import slices

        spans = slices(self.facts, node, rank)
        if spans is None or any(step != 1 for _, _, step in spans.values()):
            return _everywhere(runs)
        starts: list[Dim] = []
        for axis in (rank - 2, rank - 1):
            start = spans[axis][0] if axis in spans else 0
            size = (self.facts.shape(node.inputs[0]) or ())[axis]
            if not dims.at_least(start, 0):
                start = dims.add(start, size)
            if not dims.at_least(start, 0):
                return _everywhere(runs)
            starts.append(start)
        by = dims.subtract(starts[1], starts[0])
        return tuple(Run(run.low, run.high, run.band.moved(by)) for run in runs)


_MOVES = (
    "Identity Expand Unsqueeze Squeeze Reshape Flatten Transpose Slice Gather GatherND GatherElements Tile Split Concat"
    " Dropout"
).split()
_BOOLS: Runs = (Run(1.0, 1.0, EVERYWHERE), Run(0.0, 0.0, EVERYWHERE))


def _everywhere(runs: Runs) -> Runs:
    return _kept(Run(run.low, run.high, EVERYWHERE) for run in runs)


def _single(number: float) -> Runs:
    return (Run(number, number, EVERYWHERE),)


def _shifted(band: Band, start: Dim, down: int) -> Band:
    """The band of i - j when down * (i - j) + start lies in `band`."""
    moved = band.moved(dims.negate(start))
    if down == 1:
        return moved
    low = dims.negate(moved.high) if moved.high is not None else None
    return Band(low, dims.negate(moved.low) if moved.low is not None else None)


def _constant(tensor: oir.TensorProtocol) -> Runs:
    array = tensor.numpy().astype(np.float64)
    values = np.unique(array)
    if np.isnan(values).any():
        return ANYTHING
    if array.ndim < 2 or values.size > _MOST_RUNS:
        return (Run(float(values[0]), float(values[-1]), EVERYWHERE),)
    distance = np.arange(array.shape[-2])[:, None] - np.arange(array.shape[-1])[None]
    spread = np.broadcast_to(distance, array.shape)
    found = []
    for number in values.tolist():
        own = spread[array == number]
        low, high = int(own.min()), int(own.max())
        # Where the table itself ends is no bound that the mask sets.
        band = Band(low if low > distance.min() else None, high if high < distance.max() else None)
        wide = array.shape[-2] == 1 or array.shape[-1] == 1
        found.append(Run(number, number, EVERYWHERE if wide else band))
    return tuple(found)


def _combined(op: str, left: Runs, right: Runs) -> Runs:
    with np.errstate(all="ignore"):
        found = []
        for one in left:
            for other in right:
                low, high = _interval(op, one, other)
                found.append(Run(low, high, one.band.meet(other.band)))
    return _kept(found)


def _interval(op: str, one: Run, other: Run) -> tuple[float, float]:
    a, b, c, d = one.low, one.high, other.low, other.high
    if op == "Add":
        return float(np.add(a, c)), float(np.add(b, d))
    if op == "Sub":
        return float(np.subtract(a, d)), float(np.subtract(b, c))
    if op in ("Min", "And"):
        return min(a, c), min(b, d)
    if op in ("Max", "Or"):
        return max(a, c), max(b, d)
    if op == "Div":
        if c <= 0 <= d:
            return -_INFINITE, _INFINITE
        ends = [a / c, a / d, b / c, b / d]
    else:
        ends = [0.0 if 0.0 in (x, y) else x * y for x in (a, b) for y in (c, d)]
    return min(ends), max(ends)
