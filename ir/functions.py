"""The functions of a model, written out where they are called."""

from __future__ import annotations

import onnx_ir as oir

from burnish.ir.errors import InputError


def inline(model: oir.Model) -> None:
    """Replace all calls of the model's own functions by their bodies.

    Raises:
        InputError: a function cannot be written out: it is of another opset than the model.
    """
    from onnx_ir.passes.common import InlinePass

    if not model.functions:
        return
    try:
        InlinePass()(model)
    except ValueError as error:
        hint = "export the model and its functions with one opset"
        raise InputError(f"the functions of the model cannot be inlined: {error}", hint=hint) from error
