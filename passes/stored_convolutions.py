"""Weights of convolutions as integers behind a DequantizeLinear, a scale for each output: smaller, not faster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as oir

from burnish.ir import weights
from burnish.ir.views.convolution import Convolution, find_convolution
from burnish.passes import catalog, qdq
from burnish.passes.base import Outcome
from burnish.passes.grids import Clip, Grid, Scales, dequantize, fit, quantize
from burnish.passes.in_turn import Both, in_turn
from burnish.passes.layers import layers, lost, unusable
from burnish.passes.lossy import Context, Edit, LossyPass, Savings, apply
from burnish.passes.weight_rounding import error, rounded_layer

_OPSETS = {8: 13, 4: 21}
"""The bits that are stored, and the first opset whose DequantizeLinear takes them for each output."""

_HALF_SCALES = 19
"""The first opset whose DequantizeLinear gives float16."""


def found(model: oir.Model, wanted: bool = True) -> dict[str, Convolution]:
    """The convolutions of a model by name; none where they are not wanted."""
    return {name: layer for name, layer in layers(model).items() if wanted and isinstance(layer, Convolution)}


def of(model: oir.Model, wanted: bool, context: Context, outcome: Outcome) -> dict[str, Convolution]:
    """What is `found`, but none where edits are chosen by time: what is stored in few bits is computed as before."""
    images = found(model, wanted)
    for layer in images.values() if context.timed else ():
        outcome.skip(layer.node, "a convolution that is stored in few bits is computed as before, which saves no time")
    return {} if context.timed else images


def edits(
    model: oir.Model,
    spec: str,
    name: str,
    layer: Convolution,
    wanted: Sequence[int],
    seen: Both | np.ndarray | None,
    steps: int,
    outcome: Outcome,
) -> list[Edit]:
    """Storing the weight of a convolution in each of the wanted bits; where it stays, `outcome` is told why.

    Args:
        model: the model.
        spec: of the pass.
        name: of the layer.
        layer: the layer.
        wanted: bits.
        seen: the moment of the patches it multiplies, [groups, in, in], or what `in_turn` tells of them: integers are
            rounded for it. None to round later.
        steps: of AdaRound; 0 for GPTQ alone.
        outcome: takes what stays.
    """
    made = []
    tensor = weights.tensor_of(layer.parameter.source)
    for bits in wanted:
        reason = _refusal(layer, bits, model.graph.opset_imports.get("", 1))
        if reason is not None or tensor is None:
            outcome.skip(layer.node, str(reason))
            continue
        count = layer.parameter.shape[_axis(layer)]
        stored = -(-tensor.size * bits // 8) + count * tensor.dtype.bitwidth // 8 + -(-count * bits // 8)
        if stored >= tensor.nbytes:
            outcome.skip(layer.node, f"{bits} bits with their scales take no fewer bytes")
            continue
        savings = Savings(-2 * count, tensor.nbytes - stored, 0)
        anchor = str(layer.node.name)
        edit = Edit(spec, name, f"int{bits} per channel", frozenset({anchor}), savings, anchors=(anchor,))
        made.append(edit if seen is None else _measured(edit, layer, bits, seen, steps, outcome))
    return made


def measured(layer: Convolution) -> bool:
    """Whether samples tell how to round it; a transposed convolution shares scales between what it computes apart."""
    return not layer.transposed


def bits_of(edit: Edit) -> int:
    """The bits that an edit stores."""
    return int(edit.option.split()[0].removeprefix("int"))


def edits_in_turn(
    model: oir.Model,
    one: LossyPass,
    how: tuple[int, int],
    images: Mapping[str, Convolution],
    others: Sequence[Edit],
    context: Context,
    limit: int,
    outcome: Outcome,
) -> list[Edit]:
    """Storing convolutions in so many bits, each rounded for what it reads once all that is before it is stored so.

    Args:
        model: the model.
        one: the pass.
        how: bits, 8 or 4, and steps of AdaRound, 0 for GPTQ alone.
        images: the convolutions, which `measured` lets through, by name.
        others: edits of the pass to other layers.
        context: samples and what observes.
        limit: bytes that are held at once.
        outcome: takes what stays.
    """
    made, (bits, steps) = list(others), how
    turns = in_turn(model, images, context, limit, lambda: apply(model, made, [one])[0], outcome)
    for number, (name, seen) in enumerate(turns):
        context.on_step("rounding", number, len(images))
        known = None if isinstance(seen, str) else seen
        found = edits(model, catalog.spec(one), name, images[name], [bits], known, steps, outcome)
        if found and isinstance(seen, str):
            outcome.notes[f"rounded by `mse` in place of `{'adaround' if steps else 'gptq'}`: {seen}"] += 1
        made.extend(found)
    return made[len(others) :]


def _measured(edit: Edit, layer: Convolution, bits: int, seen: Both | np.ndarray, steps: int, outcome: Outcome) -> Edit:
    assert layer.dtype is not None
    weight = layer.weight()
    wanted, moment = (seen.target(weight), seen.moment) if isinstance(seen, Both) else (weight, seen)
    levels, scales = rounded_layer(wanted, Grid(bits), moment, layer.dtype.numpy(), steps=steps)
    outcome.errors[edit.key] = error(wanted, levels, scales, moment)
    return replace(edit, payload={"levels": levels, "scale": scales.scale})


def write(model: oir.Model, node: oir.Node, edit: Edit, clip: Clip, outcome: Outcome) -> None:
    """Store the weight of a convolution in so many bits, with one positive scale for each output.

    Args:
        model: the model.
        node: the convolution.
        edit: says how many, and holds integers and scales where samples have made them.
        clip: how scales are fitted where they have not.
        outcome: takes the error then.
    """
    layer, grid = find_convolution(node), Grid(bits_of(edit))
    assert layer is not None and layer.dtype is not None
    if edit.payload:
        scale = edit.payload["scale"]
        scales = Scales(grid, scale, np.zeros(scale.shape, grid.dtype), 0)
        qdq.put_weight(model, node, 1, edit.payload["levels"], scales)
        return
    numbers = layer.parameter.read()
    scales = fit(numbers, grid, _axis(layer), clip=clip, dtype=layer.dtype.numpy())
    levels = quantize(numbers, scales)
    lost = np.linalg.norm(numbers - dequantize(levels, scales)) / max(np.linalg.norm(numbers), np.finfo(float).tiny)
    outcome.errors[edit.key] = float(lost)
    qdq.put_weight(model, node, 1, levels, scales)


def _axis(layer: Convolution) -> int:
    return 1 if layer.transposed else 0


def _refusal(layer: Convolution, bits: int, opset: int) -> str | None:
    if layer.read_only is not None:
        return layer.read_only
    if layer.shared:
        return f"{layer.shared[0].op_type} shares the weight"
    if layer.parameter.steps:
        return f"its weight lies behind a {layer.parameter.steps[0].op_type}"
    if layer.dtype not in (oir.DataType.FLOAT, oir.DataType.FLOAT16):
        return "its weight is not float32 or float16"
    if (reason := unusable(layer.parameter)) is not None:
        return reason
    if (reason := lost(layer)) is not None:
        return reason
    if bits not in _OPSETS:
        return f"convolutions are not stored in {bits} bits"
    least = max(_OPSETS[bits], _HALF_SCALES if layer.dtype == oir.DataType.FLOAT16 else 0)
    if opset < least:
        kind = " of float16" if least == _HALF_SCALES else ""
        return (
            f"{bits} bits for each output{kind} need opset {least}, and the model has {opset}: raise it with `--opset`"
        )
    return None
