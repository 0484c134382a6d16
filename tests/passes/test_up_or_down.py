"""What must hold of learning for each weight whether it is rounded up or down."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
from factor_models import model_of, samples_of

import burnish
from burnish.ir.text import fingerprint
from burnish.passes import catalog, lossy
from burnish.passes.base import Outcome
from burnish.passes.grids import Grid, Scales, dequantize, fit
from burnish.passes.lossy import Edit, LossyPass
from burnish.passes.up_or_down import up_or_down
from burnish.passes.weight_rounding import change, rounded_layer
from burnish.tools import cli
from burnish.tools.lossy_context import context_for

SHAPES = {"one group": (1, 12, 27), "groups": (3, 4, 18), "depthwise": (10, 1, 9)}
"""Groups, outputs of a group, inputs."""


def problem(groups: int, out: int, size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A weight [groups * out, in], and moments of correlated rows."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((groups, 300, size)) @ rng.standard_normal((groups, size, size)) + 0.5
    return rng.standard_normal((groups * out, size)) / 5, rows.transpose(0, 2, 1) @ rows / 300


def changes(weight: np.ndarray, levels: np.ndarray, scale: np.ndarray, moment: np.ndarray) -> np.ndarray:
    """By how much each output changes."""
    apart = (weight - levels * scale[:, None]).reshape(len(moment), -1, weight.shape[1])
    return np.asarray(np.einsum("goi,gij,goj->go", apart, moment, apart)).reshape(-1)


def learned(weight: np.ndarray, scale: np.ndarray, moment: np.ndarray, grid: Grid, steps: int) -> np.ndarray:
    groups, size = len(moment), weight.shape[1]

    def turned(rows: np.ndarray) -> np.ndarray:
        return rows.reshape(groups, -1, rows.shape[1]).transpose(0, 2, 1).astype(np.float32)

    ends = np.float32(grid.low), np.float32(grid.high)
    found = up_or_down(turned(weight), turned(scale[:, None]), *ends, moment.astype(np.float32), steps)  # type: ignore[arg-type]
    return np.asarray(found.transpose(0, 2, 1).reshape(-1, size))


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("reach", [1.0, 0.5])
def test_each_weight_goes_to_a_neighbour_and_no_output_is_worse_than_nearest(
    kind: str, bits: int, reach: float
) -> None:
    weight, moment = problem(*SHAPES[kind])
    grid = Grid(bits)
    scale = fit(weight, grid, 0, clip="mse").scale.astype(np.float64) * reach
    nearest = np.clip(np.rint(weight / scale[:, None]), grid.low, grid.high)
    levels = learned(weight, scale, moment, grid, 300)
    assert levels.min() >= grid.low and levels.max() <= grid.high
    inside = np.clip(weight / scale[:, None], grid.low, grid.high)
    assert (np.abs(levels - nearest) <= 1).all() and (np.abs(levels - inside) <= 1 + 1e-5).all()
    before, after = changes(weight, nearest, scale, moment), changes(weight, levels, scale, moment)
    assert (after <= before * (1 + 1e-4)).all()
    if reach == 1:  # else what is cut off is most of the change
        assert after.sum() < 0.8 * before.sum()


def test_few_weights_are_rounded_almost_as_well_as_they_can_be() -> None:
    weight, moment = problem(1, 40, 8)
    scale = fit(weight, Grid(4), 0).scale.astype(np.float64)
    below = np.floor(weight / scale[:, None])
    choices = np.array(list(itertools.product((0, 1), repeat=8)))
    best = np.min([changes(weight, np.clip(below + one, -8, 7), scale, moment) for one in choices], 0)
    nearest = changes(weight, np.rint(weight / scale[:, None]), scale, moment)
    found = changes(weight, learned(weight, scale, moment, Grid(4), 1000), scale, moment)
    assert (found >= best * (1 - 1e-4)).all()
    assert found.sum() - best.sum() < 0.4 * (nearest.sum() - best.sum())


@pytest.mark.parametrize("kind", SHAPES)
def test_no_output_is_worse_than_by_gptq(kind: str) -> None:
    weight, moment = problem(*SHAPES[kind], seed=1)
    found = {s: rounded_layer(weight, Grid(4), moment, np.dtype(np.float32), steps=s) for s in (0, 300)}
    means = np.trace(moment, axis1=1, axis2=2)[:, None, None] / moment.shape[1]
    damped = moment + 0.01 * means * np.eye(moment.shape[1])
    before, after = (changes(weight, one[0], one[1].scale.astype(np.float64), damped) for one in found.values())
    assert (after <= before * (1 + 1e-4)).all() and after.sum() < before.sum()
    again = rounded_layer(weight, Grid(4), moment, np.dtype(np.float32), steps=300)
    assert (again[0] == found[300][0]).all() and again[1].scale.tobytes() == found[300][1].scale.tobytes()


@pytest.mark.parametrize("nothing", ["weight", "moment", "an output", "an input"])
def test_what_is_zero_stays_zero_and_harms_nothing(nothing: str) -> None:
    weight, moment = problem(2, 4, 18)
    if nothing == "weight":
        weight[:] = 0
    elif nothing == "moment":
        moment[:] = 0
    elif nothing == "an output":
        weight[3] = 0
    else:
        moment[:, 5], moment[:, :, 5] = 0, 0
    levels, scales = rounded_layer(weight, Grid(4), moment, np.dtype(np.float32), steps=100)
    assert np.isfinite(scales.scale).all() and (scales.scale > 0).all() and (levels[(weight == 0).all(1)] == 0).all()
    assert np.abs(dequantize(levels, Scales(Grid(4), scales.scale, scales.zero_point, 0)) - weight).max() < 0.5
    assert change(weight, levels, scales, moment) < 0.1


MIXED = """<ir_version: 10, opset_import: ["": 21]>
g (float[N, 6, 20] x) => (float[N, 8, 12] y)
    <int64[1] zero = {0}, int64[1] eight = {8}, int64[1] two = {2},
     float[16, 6, 5] a, float[16, 1, 5] b, float[8, 4, 5] c, float[8] d, float[8, 12] e> {
  p = Conv <pads = [2, 2]> (x, a)
  q = Relu (p)
  r = Conv <group = 16, strides = [2], pads = [2, 2]> (q, b)
  s = Conv <group = 4, auto_pad = "SAME_UPPER"> (r, c, d)
  t = Slice (s, zero, eight, two)
  y = MatMul (t, e)
}"""


def proposed(rounding: str, bits: int = 4, **options: object) -> tuple[str, dict[str, Edit], Outcome]:
    """The fingerprint of what all edits make, the edits by site, and the account."""
    model = model_of(MIXED)
    given = {"bits": bits, "rounding": rounding, "convolutions": True, **options}
    one, outcome = catalog.make("quantize-weights", given), Outcome("quantize-weights")
    assert isinstance(one, LossyPass) and one.decided == (bits > 0)
    edits = one.propose(model, context_for(model, samples_of(model)), outcome)
    return fingerprint(lossy.apply(model, edits, [one])[0]) if bits else "", {e.key: e for e in edits}, outcome


def test_convolutions_are_learned_and_linear_layers_are_as_by_gptq() -> None:
    (plain, gptq, before), (text, found, after) = proposed("gptq"), proposed("adaround", steps=200)
    assert text == proposed("adaround", steps=200)[0]
    by_site = {edit.site: edit for edit in gptq.values()}
    assert len(found) == 4
    for edit in found.values():
        other = by_site[edit.site]
        if edit.option.endswith("per channel"):
            assert edit.payload["levels"].dtype == np.int8
        else:
            assert all(np.array_equal(edit.payload[name], array) for name, array in other.payload.items())
    site = next(edit.site for edit in found.values())  # the first, so that both had the same to round
    losses = [next(e for key, e in one.errors.items() if f"| {site} |" in key) for one in (after, before)]
    assert losses[0] <= losses[1] and text != plain


def test_a_search_gets_each_convolution_in_both_sizes() -> None:
    _, found, _ = proposed("adaround", bits=0, steps=20)
    assert sum(edit.option.endswith("per channel") and "levels" in edit.payload for edit in found.values()) == 6


def test_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "m.onnx", tmp_path / "out.onnx"
    model = model_of(MIXED)
    burnish.emit(model, path)
    samples = samples_of(model)
    np.savez(tmp_path / "x.npz", x=np.concatenate([one.feeds["x"] for one in samples]))

    def run(options: str, *words: str) -> tuple[int, str]:
        monkeypatch.setattr(
            sys, "argv", ["optimize", str(path), "-o", str(out), "-p", f"quantize-weights{{{options}}}", *words]
        )
        with pytest.raises(SystemExit) as stopped:
            cli.optimize_main()
        shown = capsys.readouterr()
        return int(stopped.value.code or 0), " ".join((shown.out + shown.err).split())

    code, output = run("bits=4,rounding=adaround,convolutions=true")
    assert code == 2 and "samples" in output
    code, output = run("bits=4,rounding=adaround", "--data", str(tmp_path / "x.npz"))
    assert code == 2 and "`rounding=adaround` is for convolutions" in output and "convolutions=true" in output
    code, output = run("bits=4,rounding=adaround,convolutions=true,steps=50", "--data", str(tmp_path / "x.npz"))
    assert code == 0 and "edits 4" in output and out.exists()
