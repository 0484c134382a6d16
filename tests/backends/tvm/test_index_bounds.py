"""Inputs that pick rows are held to the rows that there are, as ONNX Runtime holds them."""

from __future__ import annotations

import onnx_ir as oir
import pytest

from burnish.backends.tvm.index_bounds import bounds


def of(text: str) -> dict[str, tuple[int, int]]:
    return bounds(oir.from_onnx_text(f'<ir_version: 10, opset_import: ["": 18]> {text}'))


@pytest.mark.parametrize(
    "text, found",
    [
        ("g (float[5, 4] t, int64[n] i) => (float[n, 4] y) { y = Gather(t, i) }", {"i": (-5, 4)}),
        ("g (float[5, 4] t, int64[n] i) => (float[5, n] y) { y = Gather<axis=-1>(t, i) }", {"i": (-4, 3)}),
        (
            """g (float[5, 4] t, float[3, 4] u, int32[n] i) => (float[m, 4] y, float[m, 4] z) <int64[2] s = {-1, 1}> {
            a = Cast<to=7>(i)  b = Reshape(a, s)  y = Gather(t, b)  z = Gather(u, b) }""",
            {"i": (-3, 2)},
        ),
        ("g (float[k, 4] t, int64[n] i) => (float[n, 4] y) { y = Gather(t, i) }", {}),
        (
            """g (float[5, 4] t, int64[n] i) => (float[n, 4] y) <int64 c = {2}> { a = Add(i, c)  y = Gather(t, a) }""",
            {},
        ),
        ("g (int64[5] t, int64[1] i) => (int64[1] y) { y = Add(t, i) }", {}),
        ("g (int64[5] i, int64[1] j) => (int64[1] y) { y = Gather(i, j) }", {"j": (-5, 4)}),
        (
            """g (float[5, 4] t, int64[n] i) => (float[n, 4] y) { f = Cast<to=1>(i)  a = Cast<to=7>(f)
            y = Gather(t, a) }""",
            {},
        ),
    ],
)
def test_an_input_is_bounded_by_the_axis_it_picks_from(text: str, found: dict[str, tuple[int, int]]) -> None:
    assert of(text) == found
