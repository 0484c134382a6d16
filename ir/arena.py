"""How little memory the activations of a model can share: one arena, with an offset in it for every value.

Three numbers of bytes, each at most the one before: every value with memory of its own that is never given back
(unplanned); the same where a node writes over an input that nobody reads any more (in place); and one arena that values
share whose lifetimes do not overlap. The arena cannot be smaller than what is alive at the worst moment.

The values are placed largest first, each in the smallest gap that fits ("greedy by size" of Pisarchyk and Lee,
Efficient Memory Management for Deep Neural Net Inference, 2020). Runtimes place by their own rules: this is what is
possible, `inspect --memory` shows what ONNX Runtime uses beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from burnish.ir.liveness import Lifetime, Timeline, bytes_alive
from burnish.ir.walk import is_op

_VIEWS = ("Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Dropout")
_ELEMENTWISE = (
    "Abs Acos Acosh Add Asin Asinh Atan Atanh BatchNormalization Cast Ceil Celu Clip Cos Cosh Div Elu Erf Exp "
    "Floor Gelu HardSigmoid HardSwish LeakyRelu Log Max Mean Min Mish Mul Neg Not PRelu Pow Reciprocal Relu Round "
    "Selu Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Sub Sum Swish Tan Tanh ThresholdedRelu Where"
).split()
_IN_PLACE = (*_VIEWS, *_ELEMENTWISE)


@dataclass(frozen=True)
class Buffer:
    """A stretch of the arena.

    Attributes:
        values: the values that lie in it one after the other, each written over the one before.
        bytes: its size.
        first: the first moment at which it is needed.
        last: the last one.
        offset: where it begins, in bytes.
    """

    values: tuple[oir.Value, ...]
    bytes: int
    first: int
    last: int
    offset: int


@dataclass(frozen=True)
class Arena:
    """Where every activation lies, and what that saves.

    Attributes:
        buffers: all stretches, by offset.
        bytes: the size of the arena.
        unplanned: bytes if every value had memory of its own for the whole run.
        in_place: the same where nodes write over inputs that nobody reads any more.
        bound: the most bytes alive at one moment when nodes work in place; no arena is smaller.
    """

    buffers: tuple[Buffer, ...]
    bytes: int
    unplanned: int
    in_place: int
    bound: int


def plan(timeline: Timeline) -> Arena:
    """An arena for the activations of a timeline.

    No two buffers that are needed at one moment overlap. Inputs and outputs of the model have their place in it too;
    inputs are never written over.
    """
    merged = _merged(timeline)
    spans = [(one[0].first, max(part.last for part in one), max(part.bytes for part in one)) for one in merged]
    placed: list[Buffer] = []
    taken = np.zeros((4, 0), np.int64)  # first, last, offset, end of what is placed, by offset
    for index in sorted(range(len(spans)), key=lambda index: (-spans[index][2], spans[index][0])):
        first, last, size = spans[index]
        offset = _offset(taken[2:, (taken[0] <= last) & (taken[1] >= first)], size)
        at = np.searchsorted(taken[2], offset, side="right")
        taken = np.insert(taken, at, (first, last, offset, offset + size), axis=1)
        placed.append(Buffer(tuple(part.value for part in merged[index]), size, first, last, offset))
    return Arena(
        tuple(sorted(placed, key=lambda one: (one.offset, one.first))),
        max((one.offset + one.bytes for one in placed), default=0),
        sum(one.bytes for one in timeline.lifetimes),
        sum(size for _, _, size in spans),
        max(bytes_alive(spans, len(timeline.nodes)), default=0),
    )


def _offset(neighbours: np.ndarray, size: int) -> int:
    """Where `size` bytes fit beside what is needed meanwhile: the smallest gap, else behind all.

    `neighbours` are offsets and ends [2, n], by offset.
    """
    offsets, ends = neighbours[0], np.maximum.accumulate(np.concatenate([[0], neighbours[1]]))
    gaps = offsets - ends[:-1]
    wide = np.flatnonzero(gaps >= size)
    return int(ends[wide[gaps[wide].argmin()]] if wide.size else ends[-1])


def _merged(timeline: Timeline) -> list[list[Lifetime]]:
    """The lifetimes, chained where a node can write its output over an input that dies there."""
    by_value = {id(one.value): one for one in timeline.lifetimes}
    chains: dict[int, list[Lifetime]] = {}
    for one in timeline.lifetimes:
        before = _written_over(one, by_value)
        chain = chains.pop(id(before.value), None) if before is not None else None
        chains[id(one.value)] = [*(chain or ()), one]
    return list(chains.values())


def _written_over(one: Lifetime, by_value: dict[int, Lifetime]) -> Lifetime | None:
    """The lifetime of the input over which the node of `one` can write it."""
    node = one.value.producer()
    if node is None or not is_op(node, *_IN_PLACE):
        return None
    for value in node.inputs[:1] if is_op(node, *_VIEWS) else node.inputs:
        found = by_value.get(id(value))
        if found is None or value is None or value.is_graph_input() or value.is_graph_output():
            continue
        if found.last == one.first and found.bytes == one.bytes and value.graph is one.value.graph:
            return found
    return None
