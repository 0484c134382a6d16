"""Attention layers: what the view reads is what the module has, and what it writes is what the model then computes."""

from __future__ import annotations

import numpy as np
import onnx_ir as oir
import pytest
from attention_laws import check_scale, check_writes, layer_of, normal
from attention_modules import LAYERS, export


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_of_torch_is_read_and_written(name: str) -> None:
    proto, feeds, truth = export(name)
    raw = oir.from_proto(proto)
    models = [normal(raw)]
    if name != "normed":  # whose norm is read only where all shapes are declared
        models.append(raw)
    for model in models:
        layer = layer_of(model)
        read = layer.read()
        for one in ("query", "key", "value", "output", "query_bias"):
            found, wanted = getattr(read, one), getattr(truth, one)
            assert (found is None) == (wanted is None)
            if found is not None:
                np.testing.assert_array_equal(found, wanted)
        assert (layer.heads, layer.kv_heads, layer.head_size) == (4, truth.key.shape[0], 6)
        assert layer.scale == pytest.approx(6**-0.5)
        assert not layer.cache
        facts = dict(truth.facts)
        assert layer.cross == facts.pop("cross", False)
        assert layer.packed == facts.pop("packed", False)
        assert layer.softcap == pytest.approx(facts.pop("softcap", 0.0))
        turned = layer.rotary
        assert (turned.dims if turned is not None else 0) == facts.pop("turns", 0)
        assert turned is None or turned.interleaved == facts.pop("interleaved")
        norm = layer.query_norm
        assert (norm.per_head if norm is not None else None) == facts.pop("per_head", None)
        assert len(layer.mask) == facts.pop("masks", len(layer.mask))
        check_scale(model.clone(), feeds)
        check_writes(model, feeds, elements=turned is None and norm is None, heads_differ=name == "windows")
