"""Operators on sequences of tensors, which are tuples here."""

from __future__ import annotations

import torch

from burnish.backends.fx.registry import operator
from burnish.backends.fx.values import Tensor, Value, host, integer, integers, tensor, tensors


@operator("SequenceEmpty")
def sequence_empty(dtype: int = 1) -> tuple[Value, ...]:
    """A sequence of no tensors."""
    return ()


@operator("SequenceConstruct")
def sequence_construct(*values: Value) -> tuple[Value, ...]:
    """The inputs as a sequence."""
    return tuple(tensor(v) for v in values)


@operator("SequenceInsert", static=(2,))
def sequence_insert(sequence: tuple[Value, ...], value: Value, position: Value = None) -> tuple[Value, ...]:
    """With a tensor inserted, at the end by default."""
    place = len(sequence) if position is None else integer(position)
    place = place + len(sequence) if place < 0 else place
    return (*sequence[:place], tensor(value), *sequence[place:])


@operator("SequenceErase", static=(1,))
def sequence_erase(sequence: tuple[Value, ...], position: Value = None) -> tuple[Value, ...]:
    """Without one tensor, the last by default."""
    place = (-1 if position is None else integer(position)) % len(sequence)
    return (*sequence[:place], *sequence[place + 1 :])


@operator("SequenceAt", static=(1,))
def sequence_at(sequence: tuple[Value, ...], position: Value) -> Value:
    """One tensor of a sequence."""
    return sequence[integer(position)]


@operator("SequenceLength")
def sequence_length(sequence: tuple[Value, ...]) -> int:
    """How many tensors there are, as a host value."""
    return len(sequence)


@operator("ConcatFromSequence")
def concat_from_sequence(sequence: tuple[Value, ...], axis: int, new_axis: int = 0) -> Tensor:
    """The tensors behind each other along an axis, or stacked along a new one."""
    parts = tensors(*sequence)
    return torch.stack(parts, axis) if new_axis else torch.cat(parts, axis)


@operator("SplitToSequence", static=(1,))
def split_to_sequence(x: Value, split: Value = None, axis: int = 0, keepdims: int = 1) -> tuple[Value, ...]:
    """Parts of the given sizes as a sequence; by default single slices, without the axis unless `keepdims`."""
    x, split = tensor(x), host(split)
    if split is None:
        return tuple(x.split(1, axis) if keepdims else x.unbind(axis))
    return tuple(x.split(integer(split) if isinstance(split, int) else integers(split), axis))
