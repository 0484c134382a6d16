"""Small model files, good and bad, and what every refusal of one says."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from burnish.frontends import onnx_file
from burnish.ir.errors import InputError

HEAD = '<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1, "custom": 1]>\n'
MLP = HEAD + "mlp (float[n,16] x) => (float[n,16] y) { h = MatMul (x, w) r = Relu (h) y = Add (r, b) }"


def parsed(body: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(HEAD + body)


def mlp() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(MLP)
    model.graph.initializer.append(onnx.numpy_helper.from_array(rng.standard_normal((16, 16), np.float32), "w"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(rng.standard_normal(16, np.float32), "b"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(rng.standard_normal((40, 40), np.float32), "unused"))
    return model


def saved(model: onnx.ModelProto, folder, name="model.onnx"):
    path = folder / name
    path.write_bytes(model.SerializeToString())
    return path


def with_data(folder, location="model.data"):
    """A model whose weights are in `location`, which may be a bad one, and always in model.data."""
    model, data = mlp(), b""
    for tensor in model.graph.initializer:
        tensor.data_location = onnx.TensorProto.EXTERNAL
        entries = {"location": location, "offset": str(len(data)), "length": str(len(tensor.raw_data))}
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=value)
        data += tensor.raw_data
        tensor.ClearField("raw_data")
    (folder / "model.data").write_bytes(data)
    return saved(model, folder), model


def refused(path, cause: str) -> InputError:
    with pytest.raises(InputError, match=cause) as caught:
        onnx_file.read(path)
    error = caught.value
    assert error.hint and error.place and error.place.startswith(str(path))
    assert "\n" not in error.cause and len(error.cause) < 400
    return error
