"""The weights of a model, layer by layer, as the few numbers that a lock keeps of them."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import onnx_ir as oir

from burnish.ir import text
from burnish.ir.canonical import tensor_text
from burnish.ir.segments import Line, Segment
from burnish.ir.weights import tensor_of
from burnish.tools.check.lock import SKETCH, LayerLock, SegmentLock
from burnish.tools.check.sketch import DIGITS, are_numbers, norm, rounded, sketch

_Known = dict[tuple[str, str, int], tuple[float, np.ndarray | None]]
"""Norm and sketch of weights by their hash, their dtype and shape, and their place among the weights of a node."""


def code_of(segments: list[Segment]) -> dict[str, list[str]]:
    """The lines of the segments by their keys; segments of equal structure have one key."""
    return {_key(one): [line.text for line in one.lines] for one in segments}


def locks_of(segments: list[Segment]) -> list[SegmentLock]:
    """The segments with their layers; every weight is read once."""
    known: _Known = {}
    return [
        SegmentLock(
            name=one.name,
            code=_key(one),
            structure=one.structure,
            weights=one.weights,
            layers=[
                found for number, line in enumerate(one.lines) if (found := _layer(number, line, known)) is not None
            ],
        )
        for one in segments
    ]


def _key(segment: Segment) -> str:
    return f"{'block' if segment.block is not None else 'part'} {segment.structure[:8]}"


def _layer(number: int, line: Line, known: _Known) -> LayerLock | None:
    tensors = [tensor for value in line.node.inputs if (tensor := tensor_of(value)) is not None and _counts(tensor)]
    if not tensors:
        return None
    state = hashlib.blake2b(digest_size=8)
    total, sums, numbers = 0.0, np.zeros(SKETCH), False
    for turn, tensor in enumerate(tensors):
        content = text.weight_hash(tensor)
        state.update(content.encode())
        key = (content, text.tensor_kind(tensor), turn)
        if key not in known:
            known[key] = _summed(tensor, turn)
        size, part = known[key]
        total = math.hypot(total, size)
        if part is not None:
            numbers = True
            sums += part
    return LayerLock(
        line=number,
        name=line.node.name or "",
        weights=state.hexdigest(),
        norm=rounded(total, total, DIGITS),
        sketch=tuple(rounded(one, total, DIGITS) for one in sums.tolist()) if numbers else (),
    )


def _counts(tensor: oir.TensorProtocol) -> bool:
    """Whether a constant is a weight: neither one number nor so few that they are structure and shown in the line."""
    return tensor.size > 1 and tensor_text(tensor) == text.tensor_kind(tensor)


def _summed(tensor: oir.TensorProtocol, turn: int) -> tuple[float, np.ndarray | None]:
    array = tensor.numpy()
    return (norm(array), np.asarray(sketch(array, turn))) if are_numbers(array) else (0.0, None)
