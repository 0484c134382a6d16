"""Balance channels between the constants on both sides of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as oir

from burnish.ir.inference import Inference
from burnish.ir.views.attention_layer import AttentionLayer, attention_layers
from burnish.ir.views.norm import norms
from burnish.passes import scaling
from burnish.passes.base import ExactPass, Outcome
from burnish.passes.turning import value_refusal

_DONE = "burnish.balanced"
_NOTHING = 1e-6
"""The largest logarithm of a scale that is none."""


@dataclass(frozen=True)
class ScalePairs(ExactPass):
    """Divide channels on one side and multiply them on the other, so that both sides reach equally far.

    The model computes what it did. The scales are those of OSTQuant (Hu et al. 2025, arXiv:2501.13987), each chosen to
    balance the largest weights of both sides (Nagel et al. 2019, arXiv:1906.04721). Scales of queries and keys are tied
    within the pairs that a rotary embedding turns. One place is balanced after the other, and a model once.

    Attributes:
        norms: the gain of each norm and the layers that read it.
        values: the values of each head and the output layer.
        scores: the queries and keys of each head.
        gated: both sides of the product of a gated MLP.
    """

    norms: bool = True
    values: bool = True
    scores: bool = True
    gated: bool = True
    needs: ClassVar[tuple[str, ...]] = ("inlined",)

    def rewrite(self, model: oir.Model, outcome: Outcome) -> None:
        """See the class."""

        if _DONE in model.metadata_props:
            outcome.skip(model.graph[0], "the model is balanced already", matched=False)
            return
        for norm in list(norms(model)) if self.norms else []:
            readers = scaling.norm_readers(norm)
            if isinstance(readers, str):
                outcome.skip(norm.nodes[0], readers)
                continue
            logs = scaling.norm_scales(norm, readers)
            if _counts(logs) and outcome.take(norm.nodes[0]):
                scaling.scale_norm(model, norm, logs)
        layers = self._attention(model) if self.values else []
        for layer in layers:
            if reason := value_refusal(layer, layers):
                outcome.skip(layer.anchor, reason)
                continue
            logs = scaling.value_scales(layer)
            if _counts(logs) and outcome.take(layer.anchor):
                scaling.scale_values(model, layer, logs)
        layers = self._attention(model) if self.scores else []
        for layer in layers:
            groups = scaling.score_pairs(layer, layers)
            if isinstance(groups, str):
                outcome.skip(layer.anchor, groups)
                continue
            logs = scaling.score_scales(layer, groups)
            if _counts(logs) and outcome.take(layer.anchor):
                scaling.scale_scores(model, layer, logs)
        for one in list(scaling.find_gated(model, Inference(model))) if self.gated else []:
            if isinstance(one, tuple):
                outcome.skip(*one)
                continue
            logs = scaling.gated_scales(one)
            if _counts(logs) and outcome.take(one.up.node):
                scaling.scale_gated(model, one, logs)
        if outcome.rewritten:
            model.metadata_props[_DONE] = "weights"

    def _attention(self, model: oir.Model) -> list[AttentionLayer]:
        return [one for one in attention_layers(model) if isinstance(one, AttentionLayer)]


def _counts(logs: np.ndarray) -> bool:
    return bool(np.abs(logs).max() > _NOTHING)
