"""Every model of the zoo that is measured, in every flavour: verified for each target, and recognised.

Slow, and in need of what `tools/research/zoo.py` builds models with: `make test-slow`.
"""

import pytest

from burnish.ir.walk import walk
from burnish.tools import api
from burnish.tools.research import exact, zoo

pytestmark = pytest.mark.slow

LAYERS = {
    "bert": (6, 13, 6, 0),
    "vit": (6, 13, 6, 0),
    "llama": (6, 13, 6, 12),
    "a2": (6, 13, 6, 0),
    "a3": (30, 61, 30, 60),
}
"""Attention, norms, activations and rotary embeddings in a model of each family."""


@pytest.fixture(scope="module")
def built():
    pytest.importorskip(
        "transformers", reason="the zoo is built with transformers and the packages of its requirements"
    )
    return zoo.path


@pytest.mark.parametrize("target", ["onnx", "ort-cpu"])
@pytest.mark.parametrize("name", zoo.MEASURED)
def test_the_rewritten_model_computes_the_same(name, target, built, tmp_path):
    result = api.optimize(built(name), tmp_path / "out.onnx", target=target, guard=["size"])
    check = result.proof.verification
    assert check is not None and check.holds
    assert len(check.samples) >= 3
    assert not result.undone
    expected = LAYERS.get(name.split("-")[0])
    if target == "ort-cpu" and expected is not None:
        operators = [node.op_type for node in walk(result.model)]
        found = tuple(sum(operators.count(op) for op in members) for members in exact.FAMILIES.values())
        assert found == expected
