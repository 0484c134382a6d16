"""Attention layers whose attention is one operator: the standard's Attention and ONNX Runtime's."""

from __future__ import annotations

import onnx_ir as oir

from burnish.ir.views.attention import Miss
from burnish.ir.views.attention_layer import AttentionLayer, Context

OPERATORS = ("Attention",)


def read(node: oir.Node, context: Context) -> AttentionLayer | Miss | None:
    """The layer around the operator."""
    return None
