"""Learned rotations and scales: they lower the loss, merge exactly, and survive a kill."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as oir
import pytest
from laws import check_same_outputs
from small_llama import WORDS, decoder

from burnish.backends.fx.builder import to_graph_module
from burnish.backends.fx.objective import tensors
from burnish.backends.fx.rotation import LearnOptions, _kept, _space, compared, learn
from burnish.backends.fx.rotation_steps import Turns
from burnish.backends.fx.rotation_student import make_student
from burnish.backends.fx.straight_through import through_rounding
from burnish.frontends import onnx_file
from burnish.ir import weights
from burnish.ir.errors import InputError
from burnish.ir.samples import Sample
from burnish.passes import learned, simulated
from burnish.passes.pipeline import Pipeline
from burnish.passes.recipes import NORMAL_FORM
from burnish.passes.simulated import Bits

torch = pytest.importorskip("torch")
DEMO = Path(__file__).resolve().parents[3] / "tools" / "demo"


def samples(count: int, seed: int = 0) -> list[Sample]:
    random = np.random.default_rng(seed)
    return [Sample(f"text {index}", {"ids": random.integers(0, WORDS, (8, 12))}) for index in range(count)]


def test_learning_lowers_the_loss_and_what_is_learned_merges_exactly() -> None:
    model = decoder()
    least: list[float] = []
    options = LearnOptions(bits=Bits(3, 3, 3), steps=60, angle=0.03, scale_rate=0.02)
    found = learn(model, samples(6), options, lambda step, loss, so_far: least.append(so_far))
    assert least[-1] < 0.8 * least[0]
    turn = found.turn
    assert np.abs(turn @ turn.T - np.eye(len(turn))).max() < 1e-12
    assert all(np.abs(logs).max() > 0 for logs in found.gated_logs)
    merged = model.clone()
    learned.merge(merged, found)
    check_same_outputs(model, merged)


def vit() -> oir.Model:
    """A convolution and positions write its stream, and one matrix makes queries, keys and values."""
    return Pipeline(NORMAL_FORM).rewrite(onnx_file.read(DEMO / "digits_vit.onnx")).model


@pytest.mark.parametrize(("network", "hadamard"), [(decoder, True), (decoder, False), (vit, False)])
def test_the_student_computes_what_the_merged_model_does(network: Callable[[], oir.Model], hadamard: bool) -> None:
    from burnish.backends.ort.session import executor

    model, bits = network(), Bits(0, 0, 0)
    found, random = learned.initial(model, 1), np.random.default_rng(0)
    for all_of_them in (found.norm_logs, found.value_logs, found.gated_logs):
        for logs in all_of_them:
            logs += 0.3 * random.standard_normal(logs.shape)
    for scores in found.score_logs:
        if scores is not None:
            scores += np.tile(0.3 * random.standard_normal((len(scores), scores.shape[1] // 2)), 2)
    student = make_student(model, bits, hadamard=hadamard)
    (sample,) = (
        samples(1) if network is decoder else [Sample("noise", {"image": random.random((2, 1, 8, 8), np.float32)})]
    )
    with torch.no_grad():
        scores = torch.func.functional_call(
            student.module, student.weights(_space(found)), tuple(torch.from_numpy(x) for x in sample.feeds.values())
        )[0]
    merged = model.clone()
    learned.merge(merged, found)
    simulated.simulate(merged, bits, hadamard=hadamard)
    for one in (merged, model):
        (expected,) = executor()(one).run(sample.feeds).values()
        assert np.abs(scores.numpy() - expected).max() < 1e-4 * np.abs(expected).max()


def test_a_run_that_was_killed_goes_on_to_the_same_result(tmp_path) -> None:
    model, options = decoder(), LearnOptions(steps=6, every=2)
    whole = learn(model, samples(3), options)

    class Killed(Exception):
        pass

    def kill(step: int, loss: float, least: float) -> None:
        if step == 5:
            raise Killed

    with pytest.raises(Killed):
        learn(model, samples(3), options, kill, folder=tmp_path)
    steps: list[int] = []
    rest = learn(model, samples(3), options, lambda step, *_: steps.append(step), folder=tmp_path)
    assert steps == [5, 6]
    assert np.array_equal(whole.turn, rest.turn)
    assert all(np.array_equal(one, other) for one, other in zip(whole.gated_logs, rest.gated_logs, strict=True))


def test_the_loss_is_that_of_the_largest_scores_alone() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0, -9.0]])
    largest, where = scores.topk(2, -1)
    assert float(compared(scores, largest, where)) == pytest.approx(0)
    assert float(compared(scores + torch.tensor([5.0, 0, 0, 5.0]), largest, where)) == pytest.approx(0, abs=1e-6)
    assert float(compared(scores.flip(-1), largest, where)) > 0.1


def test_what_cannot_be_learned_is_said() -> None:
    with pytest.raises(InputError, match="there are no samples"):
        learn(decoder(), [])
    with pytest.raises(InputError, match="`seed` is -1"):
        learn(decoder(), samples(1), LearnOptions(seed=-1))
    with pytest.raises(InputError, match="`starts` is 0"):
        learn(decoder(), samples(1), LearnOptions(starts=0))


def test_what_is_learned_for_layer_norms_keeps_the_mean_of_rows_in_float64() -> None:
    noise = [
        Sample(str(seed), {"image": np.random.default_rng(seed).random((2, 1, 8, 8), np.float32)}) for seed in (0, 1)
    ]
    turn = learn(vit(), noise, LearnOptions(steps=3)).turn
    assert np.abs(turn.sum(0) - 1).max() < 1e-13 and np.abs(turn @ turn.T - np.eye(len(turn))).max() < 1e-13


def test_the_model_keeps_what_it_knows_beyond_its_dtype() -> None:
    model = vit()
    before = {name: weights.unrounded(value) for name, value in model.graph.initializers.items()}
    make_student(model, Bits(4, 4, 4), hadamard=True)
    assert any(one is not None for one in before.values())
    assert all(weights.unrounded(value) is before[name] for name, value in model.graph.initializers.items())


def test_all_that_is_learned_with_lies_on_the_device_that_is_asked_for() -> None:
    """The device `meta` stands for a GPU: it refuses what lies elsewhere."""
    model, (sample,) = decoder(), samples(1)
    with torch.device("meta"):
        student = make_student(model, Bits(4, 4, 4), hadamard=True)
        space = _space(learned.initial(model, 0))
        weights_now = student.weights(space)
        inputs = tensors(student.module, sample.feeds)
        scores = torch.func.functional_call(student.module, weights_now, tuple(inputs))[0]
        compared(scores, *scores.detach().topk(5)).backward()
        student.pull_back(space, weights_now)
        kept = torch.eye(len(space.turn))[:2]
        turns = Turns([space.turn, *space.values], [kept, *([None] * len(space.values))])
        turns.step(0.01)
    held = [*weights_now.values(), *space.scales(), *turns.matrices, *turns.first, scores, *student.module.parameters()]
    assert {one.device.type for one in held} == {"meta"}


def test_a_device_that_torch_lacks_is_an_error_with_a_hint() -> None:
    with pytest.raises(InputError, match="torch cannot use the device `cuda:99`") as refused:
        learn(decoder(), samples(1), LearnOptions(device="cuda:99"))
    assert "driver" in str(refused.value.hint)


def test_rates_that_are_too_large_are_halved_until_they_lower_the_loss() -> None:
    least: list[float] = []
    options = LearnOptions(bits=Bits(3, 3, 3), steps=60, angle=0.3, scale_rate=0.2, every=2)
    learn(decoder(), samples(6), options, lambda step, loss, so_far: least.append(so_far))
    assert least[-1] < 0.3 * least[0]


def rounded_by_hand(x: torch.Tensor, share: float) -> torch.Tensor:
    """Rows on 4-bit grids over a share of their range; gradients are those of the numbers inside and of the range."""
    low, high = (share * one for one in (x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)))
    step = (high - low) / 15
    with torch.no_grad():
        offset = torch.round(low / step)
        whole = torch.round(x / step) - offset
        error = torch.where((whole < 0) | (whole > 15), offset - low / step, torch.round(x / step) - x / step)
    place = torch.where(whole > 15, high, torch.where(whole < 0, low, x))
    y = place + error * (step - step.detach())
    exact = ((whole.clamp(0, 15) + offset) * step).detach()
    return y + (exact - y).detach()


@pytest.mark.parametrize("share", [1.0, 0.8])
def test_gradients_pass_straight_through_rounding_also_at_the_ends_of_grids(share: float) -> None:
    """All that a reader of rounded rows tells back is told to what was rounded: 6 % of the numbers lie at an end."""
    source = onnx.helper.make_model(
        onnx.parser.parse_graph("g (float[40, 64] x, float[64, 64] w) => (float[40, 64] y) { y = MatMul (x, w) }"),
        opset_imports=[onnx.helper.make_opsetid("", 18)],
    )
    model = oir.serde.deserialize_model(onnx.shape_inference.infer_shapes(source))
    simulated.TokenRounding(model).round(model.graph.inputs[0], 4, share)
    module = to_graph_module(model)
    through_rounding(module, 18)
    module.recompile()
    random = torch.Generator().manual_seed(0)
    x, w, back = (torch.randn(size, 64, generator=random) for size in (40, 64, 40))
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    for leaf, y in zip(leaves, (module(leaves[0], w)[0], rounded_by_hand(leaves[1], share) @ w), strict=True):
        (y * back).sum().backward()
        assert leaf.grad is not None and float(leaf.grad.norm()) > 1
    one, other = (leaf.grad for leaf in leaves)
    assert one is not None and other is not None
    assert float((one - other).norm()) < 1e-4 * float(other.norm())


def test_a_step_leaves_the_channels_in_place_that_are_massive() -> None:
    """The stream's first token has one channel a hundred times as large as the others, which one norm reads."""
    model, loud = decoder(), 5
    (table,) = (one.parameter.source for one in learned.stream_of(model).constants)
    array = table.const_value.numpy().copy()
    array[:, loud] *= 100
    table.const_value = oir.tensor(array, name=table.name)
    kept = _kept(model, samples(1)[0])
    assert kept is not None and torch.equal(kept.abs(), torch.eye(array.shape[1])[[loud]])
    before, after = (learn(model, samples(6), LearnOptions(steps=steps, angle=0.1)).turn for steps in (0, 8))
    moved = np.abs(before - after).max(1)
    assert moved[loud] < 1e-5 < 1e-2 < np.delete(moved, loud).min()
