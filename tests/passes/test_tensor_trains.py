"""What must hold of tensor trains."""

from __future__ import annotations

import numpy as np
import pytest
from factor_models import KINDS, error, model_of, samples_of

from burnish.ir import weights
from burnish.ir.walk import walk
from burnish.passes import catalog, factors, lossy, tensor_trains
from burnish.passes.base import Outcome
from burnish.passes.lossy import LossyPass
from burnish.tools.lossy_context import context_for


def test_sizes_are_split_as_evenly_as_they_go() -> None:
    assert tensor_trains.modes(384, 2) == [16, 24]
    assert tensor_trains.modes(64, 3) == [4, 4, 4]
    assert tensor_trains.modes(24, 3) == [2, 3, 4]
    assert tensor_trains.modes(7, 2) is None and tensor_trains.modes(4, 3) is None


@pytest.mark.parametrize("kind", ["MatMul", "MatMul and Add", "Gemm"])
@pytest.mark.parametrize("count", [2, 3])
def test_at_full_rank_a_layer_computes_what_it_did_and_holds_more(kind: str, count: int) -> None:
    model = model_of(KINDS[kind])
    copy = model.clone()
    (node,) = walk(copy, "MatMul", "Gemm")
    layer = factors.found(node)
    weight = layer.weight().T
    inputs, outputs = (tensor_trains.modes(size, count) for size in weight.shape)
    assert inputs is not None and outputs is not None
    cores = tensor_trains.decompose(weight, inputs, outputs, weight.size)
    np.testing.assert_allclose(tensor_trains.compose(cores), weight, atol=1e-12)
    assert sum(core.size for core in cores) > weight.size
    tensor_trains.write(copy, layer, cores)  # type: ignore[arg-type]
    assert error(model, copy, samples_of(model)) <= 1e-5


def test_a_product_of_small_matrices_is_proposed_and_loses_nothing() -> None:
    model = model_of(KINDS["MatMul"])
    rng = np.random.default_rng(0)
    (node,) = walk(model, "MatMul")
    weight = np.kron(rng.standard_normal((4, 5)), rng.standard_normal((6, 8)))
    assert node.inputs[1] is not None
    node.inputs[1].const_value = weights.rounded(weight, node.inputs[1].dtype, node.inputs[1].name)  # type: ignore[arg-type]
    one = catalog.make("tensor-train", {"share": 0.2})
    assert isinstance(one, LossyPass)
    samples = samples_of(model)
    (edit,) = one.propose(model, context_for(model, samples), Outcome("tensor-train"))
    assert error(model, lossy.apply(model, [edit], [one])[0], samples) <= 1e-5
