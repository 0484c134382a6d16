"""What must hold of rounding a matrix for the data that it multiplies."""

from __future__ import annotations

import numpy as np
import pytest
from factor_models import KINDS, model_of, samples_of

import burnish
from burnish.backends.reference.runner import ReferenceRunner
from burnish.ir.errors import InputError
from burnish.ir.samples import Sample
from burnish.passes import catalog, lossy
from burnish.passes.base import Outcome
from burnish.passes.grids import Grid, Scales, dequantize, quantize
from burnish.passes.lossy import LossyPass
from burnish.passes.moments import moments
from burnish.passes.weight_rounding import Rounding, change, rounded
from burnish.passes.weight_sites import Matrix, matrices
from burnish.tools.lossy_context import context_for

SIZE = 72


def rows(count: int = 400, seed: int = 0) -> np.ndarray:
    """Correlated rows with a few channels that are far larger than the others."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((count, SIZE // 2)) @ rng.standard_normal((SIZE // 2, SIZE)) / 6
    return (mixed + 0.2 * rng.standard_normal((count, SIZE))) * np.exp(rng.standard_normal(SIZE))


MOMENT = (rows().T @ rows() / 400)[None]
WEIGHT = np.random.default_rng(1).standard_normal((50, SIZE)) / 8


def made(
    rounding: Rounding, bits: int = 4, symmetric: bool = True, block: int = 32, **options: bool
) -> tuple[np.ndarray, Scales]:
    signed, mirrored = options.get("signed", False), options.get("mirrored", True)
    kind = np.dtype(np.float32)
    return rounded(WEIGHT, Grid(bits, signed, symmetric), block, rounding, mirrored=mirrored, dtype=kind, moment=MOMENT)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [16, 32, 128])
def test_what_data_are_used_for_changes_the_outputs_less(bits: int, symmetric: bool, block: int) -> None:
    changes = {}
    for rounding in ("nearest", "mse", "gptq"):
        levels, scales = made(rounding, bits, symmetric, block)  # type: ignore[arg-type]
        assert levels.min() >= scales.grid.low and levels.max() <= scales.grid.high
        changes[rounding] = change(WEIGHT, levels, scales, MOMENT)
    assert changes["gptq"] < 0.5 * changes["mse"] and changes["gptq"] < 0.5 * changes["nearest"]


def test_no_integer_can_be_moved_for_the_better() -> None:
    levels, scales = made("gptq", symmetric=False)
    damped = MOMENT + 0.01 * np.trace(MOMENT[0]) / SIZE * np.eye(SIZE)
    best = change(WEIGHT, levels, scales, damped)
    rng = np.random.default_rng(0)
    for _ in range(200):
        row, column, step = rng.integers(len(WEIGHT)), rng.integers(SIZE), rng.choice((-1, 1))
        other = levels.copy()
        other[row, column] = np.clip(int(other[row, column]) + step, 0, 15)
        assert change(WEIGHT, other, scales, damped) >= best * (1 - 1e-4)


def test_unit_moments_are_the_plain_squared_error() -> None:
    levels, scales = rounded(
        WEIGHT, Grid(4), 32, "gptq", mirrored=False, dtype=np.dtype(np.float32), moment=np.eye(SIZE)[None]
    )
    plain, plain_scales = rounded(WEIGHT, Grid(4), 32, "mse", mirrored=False, dtype=np.dtype(np.float32))
    errors = [((dequantize(*one) - WEIGHT) ** 2).sum() for one in ((levels, scales), (plain, plain_scales))]
    assert errors[0] <= errors[1] * 1.0001 and (scales.scale > 0).all()
    assert (quantize(WEIGHT, scales) == levels).all()


def test_inputs_that_are_never_seen_and_moments_of_one_row() -> None:
    moment = MOMENT.copy()
    moment[:, 5], moment[:, :, 5] = 0, 0
    for one in (moment, np.outer(rows()[0], rows()[0])[None], np.zeros((1, SIZE, SIZE))):
        levels, scales = rounded(WEIGHT, Grid(4), 32, "gptq", mirrored=True, dtype=np.dtype(np.float32), moment=one)
        assert np.isfinite(dequantize(levels, scales)).all()
        assert np.abs(dequantize(levels, scales) - WEIGHT).max() < 2 * np.abs(WEIGHT).max()


@pytest.mark.parametrize("form", ["matmul-nbits", "dequantize"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_samples_make_the_model_better_and_its_bytes_are_the_same_every_time(form: str, symmetric: bool) -> None:
    source = '<ir_version: 10, opset_import: ["": 21]>\n' + KINDS["three that share"]
    model = model_of(source)
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((6, 24)) * np.exp(rng.standard_normal(24))
    samples = [Sample(str(i), {"x": (rng.standard_normal((9, 7, 6)) @ mix).astype(np.float32)}) for i in range(6)]
    context = context_for(model, samples[:4])
    wanted = ReferenceRunner(model).run(samples[5].feeds)
    errors, texts = {}, set()
    for rounding in ("mse", "gptq", "gptq"):
        one = catalog.make("quantize-weights", {"bits": 4, "rounding": rounding, "form": form, "symmetric": symmetric})
        assert isinstance(one, LossyPass) and one.decided == (rounding == "gptq")
        after = lossy.apply(model, one.propose(model, context, Outcome("quantize-weights")), [one])[0]
        found = ReferenceRunner(after).run(samples[5].feeds)
        errors[rounding] = sum(float(((found[name] - array) ** 2).sum()) for name, array in wanted.items())
        if rounding == "gptq":
            tensors = [value.const_value for value in after.graph.initializers.values()]
            texts.add(b"".join(tensor.tobytes() for tensor in tensors if tensor is not None))
    assert errors["gptq"] < 0.5 * errors["mse"] and len(texts) == 1


def test_moments_of_layers_with_one_weight_are_those_of_all_they_read() -> None:
    model = model_of(
        "g (float[N, 24] x, float[N, 24] z) => (float[N, 8] a, float[N, 8] b) <float[24, 8] w> "
        "{ a = MatMul (x, w)  r = Relu (z)  b = MatMul (r, w) }"
    )
    ((name, matrix, _),) = matrices(model)
    assert isinstance(matrix, Matrix) and len(matrix.linears) == 2
    samples = samples_of(model, rows=100)
    ((got, moment),) = moments(model, {name: matrix.linears}, context_for(model, samples))
    assert got == name and not isinstance(moment, str)
    read = np.concatenate([np.concatenate([s.feeds["x"], np.maximum(s.feeds["z"], 0)]) for s in samples])
    np.testing.assert_allclose(moment[0], read.T @ read / len(read), atol=1e-4)


def test_without_samples_gptq_is_refused_and_with_them_it_runs() -> None:
    model = model_of(KINDS["MatMul"])
    with pytest.raises(InputError, match="no samples to measure on"):
        burnish.optimize(model, passes=["quantize-weights{bits=4,rounding=gptq}"])
    found = burnish.optimize(
        model, passes=["quantize-weights{bits=4,rounding=gptq}"], data=[one.feeds for one in samples_of(model)]
    )
    assert found.lossy is not None and [edit.option for edit in found.lossy.edits] == ["int4 block 32"]


@pytest.mark.parametrize(("bits", "groups"), [(4, 1), (4, 2), (8, 6)])
def test_convolutions_are_rounded_for_the_patches_that_they_see(bits: int, groups: int) -> None:
    source = (
        '<ir_version: 10, opset_import: ["": 21]>\n'
        f"g (float[N, 6, 9, 9] x) => (float[N, 12, 5, 5] y) <float[12, {6 // groups}, 3, 3] w, float[12] b> "
        f"{{ y = Conv <pads = [1, 1, 1, 1], strides = [2, 2], group = {groups}> (x, w, b) }}"
    )
    model = model_of(source)
    rng = np.random.default_rng(0)
    smooth = np.cumsum(np.cumsum(rng.standard_normal((40, 6, 9, 9)), 2), 3) + 3
    samples = [Sample(str(index), {"x": one[None].astype(np.float32)}) for index, one in enumerate(smooth)]
    wanted = ReferenceRunner(model).run(samples[39].feeds)["y"]
    errors, texts = {}, set()
    for rounding in ("nearest", "mse", "gptq", "gptq"):
        one = catalog.make("quantize-weights", {"bits": bits, "rounding": rounding, "convolutions": True})
        assert isinstance(one, LossyPass)
        outcome = Outcome("quantize-weights")
        context = context_for(model, samples[:39])
        edits = one.propose(model, context, outcome) if one.decided else one.asked(model, outcome)
        after = lossy.apply(model, edits, [one])[0]
        errors[rounding] = float(((ReferenceRunner(after).run(samples[39].feeds)["y"] - wanted) ** 2).sum())
        tensors = [value.const_value for value in after.graph.initializers.values()]
        texts.add((rounding, b"".join(tensor.tobytes() for tensor in tensors if tensor is not None)))
    assert errors["gptq"] < 0.7 * min(errors["nearest"], errors["mse"]) and len(texts) == 3


def test_groups_are_rounded_as_each_by_itself() -> None:
    moments = np.stack([rows(seed=seed).T @ rows(seed=seed) / 400 for seed in range(5)])
    together = rounded(WEIGHT, Grid(4), 32, "gptq", mirrored=True, dtype=np.dtype(np.float32), moment=moments)
    for index, one in enumerate(moments):
        part = slice(10 * index, 10 * index + 10)
        alone = rounded(WEIGHT[part], Grid(4), 32, "gptq", mirrored=True, dtype=np.dtype(np.float32), moment=one[None])
        assert (together[0][part] == alone[0]).mean() > 0.99
        np.testing.assert_allclose(together[1].scale[part], alone[1].scale, rtol=1e-3)
