"""A few of the onnx package's cases, compiled by TVM; all of them are run by `tools/research/tvm_nodes.py`."""

from __future__ import annotations

import warnings

import pytest

pytest.importorskip("tvm")

from burnish.tools.research import node_tests, tvm_nodes  # noqa: E402

RIGHT = {
    "test_attention_4d_diff_heads_with_past_and_present", "test_averagepool_2d_ceil", "test_clip_default_inbounds",
    "test_convtranspose_pads", "test_flatten_negative_axis2", "test_hardmax_axis_1",
    "test_mod_mixed_sign_int32", "test_round", "test_softmax_axis_0",
    "test_slice_neg_steps", "test_tile", "test_rms_normalization_2d_axis0",
}  # fmt: skip
REFUSED = {
    "test_reduce_max_empty_set",
    "test_nonzero_example",
    "test_maxpool_with_argmax_2d_precomputed_pads",
    "test_if",
}


def test_cases_are_right_or_refused() -> None:
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case in node_tests.cases():
            if case.name in RIGHT | REFUSED:
                expected = tvm_nodes._expected(case)
                assert expected is not None, case.name
                found[case.name] = tvm_nodes.judge(case, expected, "lowering")
    assert {name for name, (result, _) in found.items() if result == "right"} >= RIGHT
    assert not {name: why for name, (result, why) in found.items() if result == "wrong"}
