"""A part of a model on integers, without the conversions at its ends that its neighbours make unnecessary."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, match
from burnish.ir.walk import is_op, walk
from burnish.passes import grids, qdq


def without_conversions(
    part: oir.Model, feeds: Mapping[str, np.ndarray], sources: Mapping[str, str], names: Collection[str]
) -> dict[str, np.ndarray]:
    """Let a part take in and give out integers; convolutions take and give them with the channels last, as kernels do.

    Args:
        part: changed in place.
        feeds: an array for each of its inputs.
        sources: what the value that comes into each input is called in the whole model.
        names: the values of the whole model that are integers there, under its names.

    Returns:
        The feeds, as integers where the part takes integers now.
    """
    found = dict(feeds)
    spatial = bool(walk(part, "Conv"))
    for value in list(part.graph.inputs):
        readers = match.consumers(value)
        quantize = readers[0] if len(readers) == 1 and is_op(readers[0], "QuantizeLinear") else None
        scales = None if quantize is None else _scales(quantize)
        if sources[str(value.name)] not in names or quantize is None or scales is None:
            continue
        levels = grids.quantize(found[str(value.name)].astype(np.float64), scales)
        last = _channels_last(levels.ndim) if spatial else None
        value.type = oir.TensorType(oir.DataType.from_numpy(levels.dtype))
        if last is None:
            edit.bypass(quantize, value)
        else:
            value.shape = oir.Shape([None] * levels.ndim)
            levels = np.ascontiguousarray(levels.transpose(last))
            back = edit.make("Transpose", [value], {"perm": np.argsort(last).tolist()}, like=quantize)
            edit.replace_node(quantize, back)
        found[str(value.name)] = levels
    for index, value in enumerate(part.graph.outputs):
        whole = match.producer(value, "DequantizeLinear")
        end = None if whole is None else whole.inputs[0]
        there = match.producer(end, "QuantizeLinear")
        if whole is None or end is None or there is None or value.uses():
            continue
        if there.inputs[0] is None or there.inputs[0].name not in names:
            continue
        last = _channels_last(match.rank(value) or 0) if spatial else None
        if last is not None:
            turned = edit.make("Transpose", [end], {"perm": list(last)}, like=whole)
            turned.outputs[0].type = end.type
            edit.insert_before(whole, [turned])
            end = turned.outputs[0]
        value.name, end.name = None, value.name
        part.graph.outputs[index] = end
        edit.remove_unused([whole])
    return found


def _scales(quantize: oir.Node) -> grids.Scales | None:
    backs = [node for node in match.consumers(quantize.outputs[0]) if is_op(node, "DequantizeLinear")]
    return qdq.scales_of(backs[0].outputs[0]) if backs else None


def _channels_last(rank: int) -> tuple[int, ...] | None:
    return (0, *range(2, rank), 1) if rank >= 3 else None
