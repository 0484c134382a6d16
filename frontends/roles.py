"""What each input of a model means, read from what the graph does with it, never from names alone.

The index of a `Gather` is an identifier below the table's rows, the condition that sends scores to minus infinity is a
mask, what is concatenated into an output of the same layout is a cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as oir

from burnish.frontends.uses import Evidence, follow, links_of
from burnish.ir import match


@dataclass(frozen=True)
class Role:
    """What one input means.

    Attributes:
        kind: "ids", "positions", "mask", "past", "state", "image", "signal", "choice", "size", "lengths" (of each row),
            "ends" (index of each row's last position), "total" (past and new positions together), "text", "number"
            (floating point) or "integer".
        lowest: the smallest allowed value of ids and positions.
        rows: one more than the largest allowed value of ids and positions; None when nothing bounds it.
        kept: of a mask of zeros and ones, the value that lets a position through.
        additive: whether a mask is added to the scores (0 lets through, a large negative number does not).
        choices: the numbers a choice takes: those the graph compares it with, and one that is none of them.
        special: numbers that ids are compared with, a padding token for instance.
        axis: of a past, the axis that grows.
        channels: of an image, what the first convolution reads.
        window: of a signal, (the longest kernel, the shortest stride) of the first convolutions.
    """

    kind: str
    lowest: int = 0
    rows: int | None = None
    kept: int = 1
    additive: bool = False
    choices: tuple[int, ...] = ()
    special: tuple[int, ...] = ()
    axis: int = 0
    channels: int | None = None
    window: tuple[int, int] = (1, 1)


def required_inputs(model: oir.Model) -> list[oir.Value]:
    """The inputs a caller has to give: graph inputs without a default value."""
    return [value for value in model.graph.inputs if value.const_value is None]


def roles(model: oir.Model) -> dict[str, Role]:
    """The role of every required input, by name.

    Args:
        model: read only; its shapes are used where it has them, none are inferred.
    """
    links = links_of(model)
    return {str(v.name): _decide(v, follow(v, model, links), model) for v in required_inputs(model)}


def _decide(value: oir.Value, evidence: Evidence, model: oir.Model) -> Role:
    """The one role that the evidence supports best."""
    found, dtype, rank = evidence.found, value.dtype, match.rank(value)
    if dtype == oir.DataType.STRING:
        return Role("text")
    kept = 1 if evidence.kept is None else evidence.kept
    lowest, rows = max(0, evidence.lowest), evidence.rows
    if dtype is not None and dtype.is_floating_point():
        return _decide_float(value, evidence, model, kept)
    single = rank == 0 or match.static_shape(value) == (1,)
    if single and dtype == oir.DataType.BOOL:
        return Role("choice", choices=(0, 1))
    for kind in ("total", "lengths", "ends"):
        if kind in found:
            return Role(kind)
    if single and evidence.equals:
        return Role("choice", choices=_choices(evidence.equals))
    named = "ids" in found and "position" in str(value.name).lower()
    if "positions" in found or named:
        return Role("positions", lowest=lowest, rows=rows)
    if "ids" in found:
        return Role("ids", special=tuple(sorted(evidence.equals)), lowest=lowest, rows=rows)
    if dtype == oir.DataType.BOOL or (not single and found & {"mask", "complement"}):
        return Role("mask", kept=kept)
    if "convolved" in found or dtype == oir.DataType.UINT8:
        return Role("image" if "convolved" in found and rank == 4 else "ids", rows=256, channels=evidence.channels)
    if "index" in found:
        return Role("ids", lowest=lowest, rows=rows or 1)
    if "size" in found:
        return Role("size")
    return Role("mask", kept=kept) if rank and rank >= 2 and found & {"counted", "scales"} else Role("integer")


def _decide_float(value: oir.Value, evidence: Evidence, model: oir.Model, kept: int) -> Role:
    found, rank = evidence.found, match.rank(value)
    if "past" in found:
        return Role("past", axis=_growing_axis(value, evidence.axis or 0, model))
    if "state" in found:
        return Role("state")
    if "additive" in found and "convolved" not in found:
        return Role("mask", additive=True)
    if "mask" in found and "convolved" not in found:
        return Role("mask", kept=kept)
    if "convolved" in found:
        window = (max((k for k, _ in evidence.kernels), default=1), min((s for _, s in evidence.kernels), default=1))
        kind = "image" if rank is not None and rank >= 4 else "signal"
        return Role(kind, channels=evidence.channels, window=window)
    comes_back = [output for output in model.graph.outputs if _alike(value, output)]
    return Role("state" if rank is not None and rank >= 2 and comes_back and len(model.graph.inputs) > 1 else "number")


def _growing_axis(value: oir.Value, axis: int, model: oir.Model) -> int:
    """The axis of a past that grows: the only one by which it differs from an output, else the concatenation's."""
    shape = value.shape
    if shape is None:
        return axis
    for output in model.graph.outputs:
        if output.shape is not None and len(output.shape) == len(shape) and output.dtype == value.dtype:
            pairs = enumerate(zip(shape, output.shape, strict=True))
            differing = [a for a, (i, o) in pairs if not isinstance(i, int) and str(i) != str(o)]
            if len(differing) == 1:
                return differing[0]
    return axis % len(shape)


def _alike(one: oir.Value, other: oir.Value) -> bool:
    """Whether two values have one dtype and the same shape, axis by axis, as far as it is declared."""
    if one.shape is None or other.shape is None or one.dtype != other.dtype or len(one.shape) != len(other.shape):
        return False
    pairs = list(zip(one.shape, other.shape, strict=True))
    fixed = [a for a, b in pairs if isinstance(a, int) and a == b]
    return bool(fixed) and all(a == b or not (isinstance(a, int) and isinstance(b, int)) for a, b in pairs)


def _choices(equals: set[int]) -> tuple[int, ...]:
    listed = sorted(equals, reverse=True)
    other = next(n for n in (listed[-1] // 2, listed[-1] + 1, listed[0] + 1) if n not in equals)
    return (*listed, other)
