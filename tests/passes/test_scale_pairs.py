"""Scales between constants: exact where they are tied as rotary embedding needs it, and wrong where they are not."""

from __future__ import annotations

import numpy as np
import onnx_ir as oir
import pytest
from laws import LawBroken, check_laws, check_same_outputs, rewrite
from small_llama import KEY_HEADS, SIZE, decoder

from burnish.ir.inference import Inference
from burnish.ir.views.attention_layer import AttentionLayer, attention_layers
from burnish.ir.views.norm import norms
from burnish.passes import catalog, scaling
from burnish.passes.exact.scale_pairs import ScalePairs
from burnish.passes.scaling import Gated

RANDOM = np.random.default_rng(0)


def layers(model: oir.Model) -> list[AttentionLayer]:
    return [one for one in attention_layers(model) if isinstance(one, AttentionLayer)]


def test_every_pair_of_a_decoder_is_balanced_exactly() -> None:
    model = decoder()
    after, outcome = rewrite(ScalePairs(), model)
    assert outcome.rewritten == 2 * (2 + 1 + 1 + 1) + 1
    check_laws(ScalePairs(), model, after, outcome)


@pytest.mark.parametrize("spec", ["rotate-residual,scale-pairs", "scale-pairs,rotate-residual{online=true}"])
def test_scales_and_rotations_follow_each_other(spec: str) -> None:
    before = model = decoder()
    for one in catalog.parse(spec):
        model, outcome = rewrite(one, model)
        assert outcome.rewritten > 2
    check_same_outputs(before, model)


def test_tied_scales_of_scores_change_nothing_and_untied_ones_do() -> None:
    for tied in (True, False):
        model = decoder()
        for layer in layers(model):
            groups = scaling.score_pairs(layer)
            assert isinstance(groups, np.ndarray) and groups.tolist() == [0, 1, 2, 3] * 2
            logs = RANDOM.standard_normal((KEY_HEADS, SIZE))
            scaling.scale_scores(model, layer, logs[:, groups] if tied else logs)
        if tied:
            check_same_outputs(decoder(), model)
        else:
            with pytest.raises(LawBroken):
                check_same_outputs(decoder(), model)


def test_any_scales_of_the_other_pairs_change_nothing() -> None:
    model = decoder()
    for layer in layers(model):
        scaling.scale_values(model, layer, RANDOM.standard_normal((KEY_HEADS, SIZE)))
    for one in list(scaling.find_gated(model, Inference(model))):
        assert isinstance(one, Gated)
        scaling.scale_gated(model, one, RANDOM.standard_normal(len(one.rows)))
    for norm in list(norms(model))[:4]:
        assert isinstance(scaling.norm_readers(norm), tuple)
        scaling.scale_norm(model, norm, RANDOM.standard_normal(32))
    check_same_outputs(decoder(), model)


def test_balanced_sides_reach_equally_far() -> None:
    writing, reading = np.array([4.0, 1.0, 0.0, 1e-9]), np.array([1.0, 9.0, 1.0, 1e9])
    scale = np.exp(scaling.balance(writing, reading))
    assert np.allclose(scale, [2.0, 1 / 3, 1.0, 1.0]), "channels that carry nothing stay"
    assert np.allclose((writing / scale)[:2], (reading * scale)[:2])
