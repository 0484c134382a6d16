"""The long tail of operators, from onnx's own reference implementation, fed with float64."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as oir

from burnish.backends.reference.registry import REAL, Call, Operator
from burnish.ir.errors import InputError
from burnish.ir.match import describe

if TYPE_CHECKING:
    import onnx

_TO_FLOAT64 = {dtype.numpy() for dtype in REAL if dtype != oir.DataType.DOUBLE}


def _widened(value: Any) -> Any:
    if isinstance(value, list):
        return [_widened(v) for v in value]
    if isinstance(value, np.ndarray):
        if value.dtype in _TO_FLOAT64:
            return value.astype(np.float64)
        if value.dtype.kind in "SU":
            return value.astype(object)
    return value


def _proto(node: oir.Node, call: Call) -> onnx.NodeProto:
    import onnx

    proto = oir.serde.serialize_node(node)
    for i, attribute in enumerate(list(proto.attribute)):
        if attribute.ref_attr_name and call.get(attribute.name) is not None:
            proto.attribute[i].CopyFrom(onnx.helper.make_attribute(attribute.name, call.get(attribute.name)))
    kept = [a for a in proto.attribute if not a.ref_attr_name]
    del proto.attribute[:]
    proto.attribute.extend(kept)
    return proto


def _silent(*_: Any) -> None:
    """Where the reference implementation writes its log."""


def find(node: oir.Node, version: int) -> Operator:
    """The reference implementation of `node`'s operator at opset `version`.

    Raises:
        InputError: there is none.
    """
    from onnx.reference import ReferenceEvaluator
    from onnx.reference.ops import load_op
    from onnx.reference.ops.aionnxml import load_op as load_learner

    domain = "" if node.domain == "ai.onnx" else node.domain
    missing = InputError(
        f"no float64 implementation of {domain + '::' if domain else ''}{node.op_type} (opset {version})",
        place=describe(node),
    )
    # Of these onnx has only a newer form, or another idea of the last windows than the standard's.
    unsound = node.op_type == "RoiAlign" and version < 16 or node.op_type == "LpPool" and "ceil_mode" in node.attributes
    if domain not in ("", "ai.onnx.ml") or unsound and not domain:
        raise missing
    made: dict[int, Any] = {}

    def run(call: Call, *inputs: Any) -> Any:
        step = made.get(id(call))
        if step is None:
            proto = _proto(node, call)
            types = [
                oir.serde.serialize_type(oir.TensorType(oir.DataType.from_numpy(x.dtype)))
                for x in inputs
                if isinstance(x, np.ndarray)
            ]
            try:
                if domain:
                    kind = load_learner(domain, node.op_type, version)
                else:
                    kind = load_op(
                        "", node.op_type, version, node=proto, input_types=types, evaluator_cls=ReferenceEvaluator
                    )
            except (NotImplementedError, RuntimeError) as error:
                raise missing from error
            parameters = {
                "log": _silent, "opsets": {"": version, domain: version}, "verbose": 0, "new_ops": None,
                "evaluator_cls": ReferenceEvaluator,
            }  # fmt: skip
            step = made[id(call)] = kind(proto, parameters)
        found = tuple(_widened(v) for v in step.run(*inputs))
        return found if len(found) > 1 else found[0]

    return run
