"""The batch is found in the model's inputs, and samples are made of any number of rows."""

from __future__ import annotations

import numpy as np
import onnx_ir as oir
import pytest

from burnish.frontends.batch import batch_axes, with_rows
from burnish.ir.errors import InputError


def model(inputs: str, body: str) -> oir.Model:
    return oir.from_onnx_text(f'<ir_version: 10, opset_import: ["": 20]> g ({inputs}) => (y) {{ {body} }}')


def test_the_batch_is_the_first_symbol_wherever_it_stands() -> None:
    found = batch_axes(model("float[N, 4] x, float[2, N, 4] h, float s", "a = Add (x, h)  y = Mul (a, s)"))
    assert found == {"x": 0, "h": 1}


def test_rows_are_repeated_or_cut() -> None:
    feeds = {"x": np.arange(6).reshape(3, 2), "h": np.arange(6).reshape(2, 3, 1), "s": np.array(1.0)}
    made = with_rows(feeds, {"x": 0, "h": 1}, 5)
    assert made["x"][:, 0].tolist() == [0, 2, 4, 0, 2]
    assert made["h"][1, :, 0].tolist() == [3, 4, 5, 3, 4]
    assert made["s"] is feeds["s"]
    assert with_rows(feeds, {"x": 0}, 1)["x"].shape == (1, 2)


@pytest.mark.parametrize("inputs", ["float[1, 4] x", "float[4] x", "float x"])
def test_a_fixed_batch_is_refused(inputs: str) -> None:
    with pytest.raises(InputError, match="the batch is fixed"):
        batch_axes(model(inputs, "y = Relu (x)"))


def test_no_row_cannot_be_repeated() -> None:
    with pytest.raises(InputError, match="no rows"):
        with_rows({"x": np.zeros((0, 4))}, {"x": 0}, 2)
