"""Few bits, simulated: on the grids they claim, and borne better behind rotations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as oir
from golden import parse_graph
from laws import OrtRunner
from small_llama import WIDTH, WORDS, decoder

from burnish.ir.views.linear import linears
from burnish.ir.views.norm import norms
from burnish.passes import catalog, scaling, simulated
from burnish.passes.base import Outcome
from burnish.passes.simulated import Bits

DEMO = Path(__file__).resolve().parents[2] / "tools" / "demo"
IDS = np.random.default_rng(0).integers(0, WORDS, (8, 12))


def scores(model: oir.Model) -> np.ndarray:
    return OrtRunner(model, optimize=True).run({"ids": IDS})["logits"].astype(np.float64)


def behind(model: oir.Model, spec: str) -> oir.Model:
    copy = model.clone()
    for one in catalog.parse(spec):
        one.rewrite(copy, Outcome(one.pass_name()))
    return copy


def error(model: oir.Model, spec: str, bits: Bits) -> float:
    expected = scores(model)
    copy = behind(model, spec) if spec else model.clone()
    simulated.simulate(copy, bits, hadamard=bool(spec))
    return float(np.linalg.norm(scores(copy) - expected) / np.linalg.norm(expected))


def test_no_bits_change_nothing_and_few_bits_something() -> None:
    model = decoder()
    assert error(model, "", Bits(0, 0, 0)) == 0
    found = [error(model, "", bits) for bits in (Bits(16, 16, 16), Bits(8, 8, 8), Bits(4, 4, 4), Bits(2, 2, 2))]
    assert found[0] < 1e-3 and found == sorted(found)
    assert all(error(model, "", bits) > 0 for bits in (Bits(4, 0, 0), Bits(0, 4, 0), Bits(0, 0, 4)))


def test_layers_have_as_many_levels_as_their_bits_say() -> None:
    model = decoder()
    names = simulated.simulate(model, Bits(3, 0, 0))
    assert len(names) == 2 * 7, "all but the head"
    few = [one for one in linears(model) if one.output.name in names]
    assert all(len(np.unique(row)) <= 8 for layer in few for row in layer.weight())


def outlier(model: oir.Model, channel: int = 3, size: float = 50.0) -> None:
    """Let a channel behind each norm reach `size` times as far, and the weights that read it the less."""
    for norm in list(norms(model)):
        logs = np.zeros(WIDTH)
        logs[channel] = -np.log(size)
        scaling.scale_norm(model, norm, logs)


def test_a_channel_that_stands_out_is_borne_behind_a_rotation() -> None:
    model = decoder()
    outlier(model)
    bits = Bits(4, 4, 0)
    nothing = error(model, "", bits)
    random = np.mean([error(model, f"rotate-residual{{seed={seed}}}", bits) for seed in range(3)])
    ours = np.mean([error(model, f"rotate-residual{{init=klt;seed={seed}}}", bits) for seed in range(3)])
    assert nothing > 1.5 * random, (nothing, random, ours)
    assert ours < 1.1 * random, (nothing, random, ours)
    assert error(model, "rotate-residual", Bits(0, 0, 0)) < 1e-4


def test_keys_and_values_of_one_matrix_are_rounded_and_queries_are_not() -> None:
    from burnish.frontends import onnx_file
    from burnish.passes.pipeline import Pipeline
    from burnish.passes.recipes import NORMAL_FORM

    model = Pipeline(NORMAL_FORM).rewrite(onnx_file.read(DEMO / "digits_vit.onnx")).model
    packed = next(layer for layer in linears(model) if layer.out_features == 3 * layer.in_features)
    before, value = model.clone(), packed.output
    simulated.simulate(model, Bits(0, 0, 2))
    (chosen,) = (node for node in model.graph if node.op_type == "Where" and value in node.inputs)
    before.graph.outputs.append(next(v for node in before.graph for v in node.outputs if v.name == value.name))
    model.graph.outputs.append(chosen.outputs[0])
    image = np.random.default_rng(0).random((2, 1, 8, 8), np.float32)
    (*_, exact), (*_, few) = (OrtRunner(one, optimize=False).run({"image": image}).values() for one in (before, model))
    width = packed.in_features
    assert np.array_equal(exact[..., :width], few[..., :width])
    heads = few[..., width:].reshape(-1, width // 4)
    assert np.abs(exact - few).max() > 0.01 and all(len(np.unique(row)) <= 4 for row in heads)


def test_what_a_loop_carries_needs_no_known_shape() -> None:
    proto = parse_graph("""
    g (float[N, 16] x, int64 n) => (float[N, 16] z) <float[16, 16] w, bool go = {1}> {
      z = Loop (n, go, x) <body = b (int64 i, bool on, float[N, 16] s) => (bool still, float[N, 16] t) {
        still = Identity (on)  p = MatMul (s, w)  t = Tanh (p)
      }>
    }""")
    proto.graph.node[0].attribute[0].g.input[2].type.tensor_type.ClearField("shape")
    model, feeds = oir.from_proto(proto), {"x": np.eye(4, 16, dtype=np.float32), "n": np.array(3)}
    expected = OrtRunner(model, optimize=True).run(feeds)["z"]
    simulated.simulate(model, Bits(0, 8, 0))
    found = OrtRunner(model, optimize=True).run(feeds)["z"]
    assert 0 < np.linalg.norm(found - expected) < 0.03 * np.linalg.norm(expected)
