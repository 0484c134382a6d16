"""Model-local functions are written out where they are called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as oir

from burnish.ir.functions import inline
from burnish.ir.walk import walk
from burnish.passes.base import ExactPass, Outcome


@dataclass(frozen=True)
class InlineFunctions(ExactPass):
    """Write out the model's own functions where they are called."""

    gives: ClassVar[tuple[str, ...]] = ("inlined",)

    def rewrite(self, model: oir.Model, outcome: Outcome) -> None:
        if not model.functions:
            return
        calls = [node.op_type for node in walk(model) if node.op_identifier() in model.functions]
        if not outcome.take_model(calls):
            return
        inline(model)
        model.functions.clear()
        model.meta.pop("burnish.names", None)
