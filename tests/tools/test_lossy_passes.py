"""Several lossy passes in one run: which of them gets a layer, and which leaves it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from golden import parse_graph
from lossy_runs import optimize

import burnish
from burnish.ir.errors import UnchangedError
from burnish.passes import recipes
from burnish.tools import report

pytestmark = pytest.mark.usefixtures("own_cache")


def test_of_passes_that_want_one_layer_the_first_gets_it(tmp_path: Path) -> None:
    result = optimize(tmp_path, "digits_resnet", passes=list(recipes.QUANTIZED["int8"]), max_drop=None)
    found = result.lossy
    assert found is not None
    claimed = [claim for edit in found.edits for claim in edit.claims]
    assert len(claimed) == len(set(claimed))
    dynamic, static, _ = (step.outcome for step in found.steps)
    assert dynamic.rewritten == 1 and static.rewritten == 8, "the convolution on the image stays as it is"
    taken = "`quantize-dynamic{balanced=True}` has it: int8, inputs in each run"
    assert taken in [skip.reason for skip in static.skipped]
    assert result.sizes[1] < 0.35 * result.sizes[0]


def test_a_pass_of_a_recipe_that_saves_little_leaves_its_layers_to_the_next(tmp_path: Path) -> None:
    found = optimize(tmp_path, "digits_resnet", passes=None, recipe="int8", max_drop=None).lossy
    assert found is not None
    dynamic, static, _ = (step.outcome for step in found.steps)
    assert dynamic.rewritten == 0 and static.rewritten == 8
    assert "all edits of the pass together make the file" in dynamic.skipped[-1].reason
    assert [skip.reason for skip in static.skipped if "of the squared error and saves" in skip.reason]


def test_a_small_last_layer_stays_where_it_makes_much_of_the_error(tmp_path: Path) -> None:
    errors, bytes_left = {}, {}
    for asked in ({"passes": None, "recipe": "int8"}, {"passes": ["quantize-static"]}):
        result = optimize(tmp_path, "digits_resnet", max_drop=None, metric="relative-error", **asked)
        found = report.as_dict(result)["lossy"]
        errors["recipe" in asked], bytes_left["recipe" in asked] = found["result"]["drop"], result.sizes[1]
    assert errors[True] < 0.97 * errors[False]
    assert bytes_left[False] < bytes_left[True] < bytes_left[False] + 0.01 * result.sizes[0]


def test_a_recipe_that_leaves_every_layer_as_it_is_ends_with_exit_code_4(tmp_path: Path) -> None:
    source = (
        '<opset_import: ["": 17]> g (float[N, 4, 22, 22] x) => (float[N, 10] y) '
        "<float[256, 4, 20, 20] v, float[256, 10] a, float[256, 10] b> { h = Conv (x, v) "
        "k = ReduceMean <axes = [2, 3], keepdims = 0> (h)  i = MatMul (k, a) "
        "t = Tanh (k)  j = MatMul (t, b)  y = Add (i, j) }"
    )
    random = np.random.default_rng(0)
    data = [{"x": random.standard_normal((4, 4, 22, 22)).astype(np.float32)} for _ in range(12)]
    with pytest.raises(UnchangedError, match=r"rounding it makes \d+% of the squared error"):
        burnish.optimize(parse_graph(source), tmp_path / "out.onnx", recipe="int8", data=data, guard=["size"])
    assert not (tmp_path / "out.onnx").exists()


def test_a_search_mixes_encodings_within_the_budget(tmp_path: Path) -> None:
    others = ["remove-blocks", "drop-attention", "drop-mlp", "project-rank"]
    result = optimize(tmp_path, "digits_resnet", passes=None, recipe="mixed", without=others)
    found = report.as_dict(result)["lossy"]
    assert found["result"]["drop"] + found["result"]["spread"] <= found["budget"]["allowed"]
    assert result.lossy is not None
    made, tried = {edit.spec for edit in result.lossy.edits}, " ".join(result.lossy.scores)
    assert made >= {"quantize-static", "quantize-weights{convolutions=True}"} and "cast-half{stored=True}" in tried
    assert result.sizes[1] < 0.35 * result.sizes[0]


def test_a_pass_that_is_named_twice_edits_once_and_each_setting_has_its_own_account(tmp_path: Path) -> None:
    asked = {"data": None, "max_drop": None}
    twice = optimize(tmp_path, passes=2 * ["quantize-weights{bits=4}"], **asked)
    once = optimize(tmp_path, passes=["quantize-weights{bits=4}"], **asked)
    assert twice.lossy is not None and once.lossy is not None
    assert twice.lossy.fired() == once.lossy.fired()
    two = optimize(tmp_path, passes=["quantize-weights{bits=4}", "quantize-weights{bits=8}"], **asked)
    assert two.lossy is not None
    made = len(two.lossy.edits)
    assert [step.outcome.rewritten for step in two.lossy.steps] == [made, 0]
    taken = [[skip for skip in step.outcome.skipped if "has it" in skip.reason] for step in two.lossy.steps]
    assert [len(skips) for skips in taken] == [0, made]
