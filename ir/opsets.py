"""Raise nodes of the standard domain to a newer opset: which changed, and one small function for each that did."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, match

NEWEST = 25
"""The newest opset that `raise` writes."""

MISJUDGED = ("STFT",)
"""Operators for which `onnx` infers wrong shapes."""

Adapter = Callable[[oir.Model, oir.Node], str | None]
"""Changes a node in place to its newer form; gives the reason when that cannot be done."""


def obstacle(node: oir.Node, old: int, new: int) -> str | None:
    """Why `node` cannot be raised from opset `old` to `new` by `upgrade`; None when it can."""
    for step in _steps(node.op_type, old, new):
        if step is None:
            return f"opset {new} has no {node.op_type}, and there is no known replacement"
        if not _same_interface(node.op_type, *step) and (node.op_type, step[1]) not in ADAPTERS:
            return f"{node.op_type} changed in opset {step[1]}, and there is no adapter for it"
    if node.op_type == "BatchNormalization" and len(node.outputs) > 1:
        return "it is a BatchNormalization in training form"
    if node.op_type == "Swish" and old <= 24 < new:
        return "ONNX Runtime cannot run Swish in opsets after 24"
    if node.op_type == "Attention" and len(node.outputs) > 3 and old < 24 <= new:
        return "its fourth output has other values for masked positions in opset 24"
    return None


def upgrade(model: oir.Model, node: oir.Node, old: int, new: int) -> str | None:
    """Rewrite `node` in place from opset `old` to `new`; gives the reason when an adapter finds that it cannot."""
    for step in _steps(node.op_type, old, new):
        adapter = ADAPTERS.get((node.op_type, step[1])) if step is not None else None
        if adapter is not None and (reason := adapter(model, node)) is not None:
            return reason
    return None


@cache
def _steps(op: str, old: int, new: int) -> tuple[tuple[int, int] | None, ...]:
    """The versions of `op` that lie between two opsets, pairwise; None where it is gone."""
    import onnx.defs

    found: list[tuple[int, int] | None] = []
    version = _since(op, old)
    if version is None:
        return ()
    for opset in range(old + 1, new + 1):
        later = _since(op, opset)
        if later is None or onnx.defs.get_schema(op, opset, "").deprecated:
            found.append((version, opset) if (op, opset) in ADAPTERS else None)
            break
        if later != version:
            found.append((version, later))
            version = later
    return tuple(found)


def _since(op: str, opset: int) -> int | None:
    import onnx.defs

    return onnx.defs.get_schema(op, opset, "").since_version if onnx.defs.has(op, opset, "") else None


@cache
def _same_interface(op: str, old: int, new: int) -> bool:
    """Whether a node written for `old` reads the same under `new`: same attributes and defaults, no fewer inputs."""
    import onnx.defs

    if (op, new) in REDEFINED:
        return False
    before, after = onnx.defs.get_schema(op, old, ""), onnx.defs.get_schema(op, new, "")
    for name, attribute in before.attributes.items():
        later = after.attributes.get(name)
        if later is None or later.default_value.SerializeToString() != attribute.default_value.SerializeToString():
            return False
    added = [a for name, a in after.attributes.items() if name not in before.attributes]
    if any(a.required for a in added) or after.min_input > before.min_input:
        return False
    return after.max_input >= before.max_input


REDEFINED = {("RoiAlign", 16), ("GroupNormalization", 21), ("Resize", 11), ("TopK", 10)}
"""Versions whose schema looks compatible and whose meaning changed."""


def _to_input(name: str, index: int) -> Adapter:
    """An integer list that was an attribute becomes input `index`."""

    def adapter(model: oir.Model, node: oir.Node) -> str | None:
        value = match.attribute(node, name)
        if value is None:
            return None
        node.attributes.pop(name)
        array = np.asarray(value, np.int64).reshape(-1)
        edit.set_input(node, index, edit.add_constant(model, f"{node.name}_{name}", array))
        return None

    return adapter


def _clip(model: oir.Model, node: oir.Node) -> str | None:
    dtype = node.inputs[0].dtype if node.inputs[0] is not None else None
    if dtype is None:
        return "its dtype is unknown"
    for index, name in ((1, "min"), (2, "max")):
        value = match.attribute(node, name)
        if value is not None:
            node.attributes.pop(name)
            edit.set_input(
                node, index, edit.add_constant(model, f"{node.name}_{name}", np.asarray(value, dtype.numpy()))
            )
    return None


def _pad(model: oir.Model, node: oir.Node) -> str | None:
    dtype = node.inputs[0].dtype if node.inputs[0] is not None else None
    value = match.attribute(node, "value", 0.0)
    if value and dtype is None:
        return "its dtype is unknown"
    _to_input("pads", 1)(model, node)
    node.attributes.pop("value", None)
    if value and dtype is not None:
        edit.set_input(node, 2, edit.add_constant(model, f"{node.name}_value", np.asarray(value, dtype.numpy())))
    return None


def _slice(model: oir.Model, node: oir.Node) -> str | None:
    for index, name in enumerate(("starts", "ends", "axes"), 1):
        _to_input(name, index)(model, node)
    return None


def _dropout(model: oir.Model, node: oir.Node) -> str | None:
    node.attributes.pop("ratio", None)
    return None


def _softmax(model: oir.Model, node: oir.Node) -> str | None:
    """Before opset 13 the axes from `axis` on were normalized together; on the last axis both forms agree."""
    rank = match.rank(node.inputs[0])
    axis = int(match.attribute(node, "axis", 1))
    if rank is None:
        return "the rank of its input is unknown"
    axis += rank if axis < 0 else 0
    if axis == rank - 1 or all(match.dim(node.inputs[0], later) == 1 for later in range(axis + 1, rank)):
        node.attributes["axis"] = oir.AttrInt64("axis", axis)
        return None
    source, shape = node.inputs[0], edit.make("Shape", [node.inputs[0]], like=node)
    flat = edit.make("Flatten", [source], {"axis": axis}, like=node)
    soft = edit.make(node.op_type, [flat.outputs[0]], {"axis": 1}, like=node)
    back = edit.make("Reshape", [soft.outputs[0], shape.outputs[0]], like=node)
    for step in (flat, soft, back):
        step.outputs[0].dtype = source.dtype if source is not None else None  # type: ignore[assignment]
    edit.replace_node(node, [shape, flat, soft, back])
    return None


def _upsample(model: oir.Model, node: oir.Node) -> str | None:
    """Upsample of opset 9 becomes Resize of opset 11, whose two choices are spelled out."""
    node.op_type = "Resize"
    return _resize(model, node)


def _resize(model: oir.Model, node: oir.Node) -> str | None:
    edit.set_input(node, 2, node.inputs[1])
    edit.set_input(node, 1, edit.add_constant(model, f"{node.name}_roi", np.zeros(0, np.float32)))
    node.attributes["coordinate_transformation_mode"] = oir.AttrString("coordinate_transformation_mode", "asymmetric")
    if match.attribute(node, "mode", "nearest") == "nearest":
        node.attributes["nearest_mode"] = oir.AttrString("nearest_mode", "floor")
    return None


def _grid_sample(model: oir.Model, node: oir.Node) -> str | None:
    names = {"bilinear": "linear", "bicubic": "cubic"}
    mode = match.attribute(node, "mode", "bilinear")
    node.attributes["mode"] = oir.AttrString("mode", names.get(mode, mode))
    return None


def _roi_align(model: oir.Model, node: oir.Node) -> str | None:
    node.attributes["coordinate_transformation_mode"] = oir.AttrString(
        "coordinate_transformation_mode", "output_half_pixel"
    )
    return None


def _split_outputs(model: oir.Model, node: oir.Node) -> str | None:
    """From opset 18 an even split without sizes has to say how many parts it makes."""
    if match.input_of(node, 1) is None:
        node.attributes["num_outputs"] = oir.AttrInt64("num_outputs", len(node.outputs))
    return None


def _scatter(model: oir.Model, node: oir.Node) -> str | None:
    node.op_type = "ScatterElements"
    return None


def _dft(model: oir.Model, node: oir.Node) -> str | None:
    axis = match.attribute(node, "axis", 1)
    node.attributes.pop("axis", None)
    edit.set_input(node, 2, edit.add_constant(model, f"{node.name}_axis", np.asarray(axis, np.int64)))
    return None


def _unchanged(model: oir.Model, node: oir.Node) -> str | None:
    """The schema changed only in what `obstacle` refuses, or in what inference never uses."""
    return None


_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")

ADAPTERS: dict[tuple[str, int], Adapter] = {
    ("BatchNormalization", 14): _unchanged,
    ("Clip", 11): _clip,
    ("Constant", 11): _unchanged,
    ("DFT", 20): _dft,
    ("Dropout", 12): _dropout,
    ("GridSample", 20): _grid_sample,
    ("Hardmax", 13): _softmax,
    ("LogSoftmax", 13): _softmax,
    ("Pad", 11): _pad,
    ("ReduceSum", 13): _to_input("axes", 1),
    ("Resize", 11): _resize,
    ("RoiAlign", 16): _roi_align,
    ("Scatter", 11): _scatter,
    ("Slice", 10): _slice,
    ("Softmax", 13): _softmax,
    ("Split", 13): _to_input("split", 1),
    ("Split", 18): _split_outputs,
    ("Squeeze", 13): _to_input("axes", 1),
    ("TopK", 10): _to_input("k", 1),
    ("Unsqueeze", 13): _to_input("axes", 1),
    ("Upsample", 10): _upsample,
    **{(f"Reduce{name}", 18): _to_input("axes", 1) for name in _REDUCTIONS},
}
"""What to do to a node when its operator's version becomes the given one."""
