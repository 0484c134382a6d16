"""A file becomes the model that it holds, odd but valid ones too."""

from __future__ import annotations

import hashlib
import resource

import numpy as np
import onnx
import onnx_ir as oir
import pytest
from onnx_files import HEAD, mlp, parsed, saved, with_data

from burnish import frontends
from burnish.frontends import onnx_file
from burnish.ir import origin, text
from burnish.ir.errors import InputError


def test_weights_are_read_from_the_file_when_asked(tmp_path):
    proto = mlp()
    model = onnx_file.read(saved(proto, tmp_path))
    for tensor in proto.graph.initializer:
        array = model.graph.initializers[tensor.name].const_value.numpy()
        np.testing.assert_array_equal(array, onnx.numpy_helper.to_array(tensor))
        assert array.flags.aligned
    assert oir.to_proto(model).graph.initializer[0].raw_data == proto.graph.initializer[0].raw_data
    assert origin.files(model) == (tmp_path / "model.onnx",)


@pytest.mark.parametrize("dtype", ["FLOAT16", "BFLOAT16", "INT8", "BOOL", "DOUBLE", "INT4", "UINT2", "FLOAT8E4M3FN"])
def test_large_weights_of_every_width(tmp_path, dtype):
    kind = oir.DataType[dtype]
    array = np.random.default_rng(1).integers(0, 2, (127, 97)).astype(kind.numpy())
    proto = parsed("g (float[2] x) => (float[2] y) { y = Relu (x) }")
    proto.graph.initializer.append(oir.to_proto(oir.tensor(array, dtype=kind, name="w")))
    tensor = onnx_file.read(saved(proto, tmp_path)).graph.initializers["w"].const_value
    assert isinstance(tensor, oir.LazyTensor)
    np.testing.assert_array_equal(tensor.numpy().astype(np.float32), array.astype(np.float32))
    assert tensor.tobytes() == proto.graph.initializer[0].raw_data


def test_reading_does_not_load_the_weights(tmp_path):
    proto = parsed("g (float[2] x) => (float[2] y) { y = Relu (x) }")
    tensor = proto.graph.initializer.add(name="w", data_type=onnx.TensorProto.FLOAT, raw_data=bytes(200_000_000))
    tensor.dims.append(50_000_000)
    path = saved(proto, tmp_path)
    del proto, tensor
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = onnx_file.read(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 20_000
    assert model.graph.initializers["w"].const_value.nbytes == 200_000_000


def test_odd_but_valid_models(tmp_path):
    body = """g (float[2] x, bool c) => (float[2] y) {
      a = custom.Mystery (x)
      b = Unheard (a)
      d = com.microsoft.Gelu (b)
      y = If (c) <then_branch = t () => (float[2] p) { p = Relu (d) },
                  else_branch = e () => (float[2] q) { q = Neg (d) }>
    }"""
    model = onnx_file.read(saved(parsed(body), tmp_path))
    assert [node.op_type for node in model.graph] == ["Mystery", "Unheard", "Gelu", "If"]


def test_duplicate_and_empty_node_names(tmp_path):
    model = parsed("g (float[2] x) => (float[2] y) { a = Relu (x) b = Relu (a) y = Relu (b) }")
    model.graph.node[0].name = model.graph.node[1].name = "same"
    assert len(onnx_file.read(saved(model, tmp_path)).graph) == 3


def test_model_local_functions(tmp_path):
    functions = '<domain: "custom", opset_import: ["": 20]> twice (a) => (b) { b = Add (a, a) }'
    model = onnx.parser.parse_model(HEAD + "g (float[2] x) => (float[2] y) { y = custom.twice (x) }\n" + functions)
    assert len(onnx_file.read(saved(model, tmp_path)).functions) == 1


def test_wrong_declared_shapes_are_dropped(tmp_path):
    model = parsed("g (float[2,3] x) => (float[7] y) <float[5,5] h> { h = Relu (x) y = Relu (h) }")
    loaded = onnx_file.read(saved(model, tmp_path))
    assert [tuple(node.outputs[0].shape) for node in loaded.graph] == [(2, 3), (2, 3)]
    assert len(origin.notes(loaded)) == 2


def test_fused_operators_need_no_opset_of_their_domain(tmp_path):
    model = parsed("g (float[2] x) => (float[2] y) { y = com.microsoft.Gelu (x) }")
    kept = [entry for entry in model.opset_import if entry.domain != "com.microsoft"]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    loaded = onnx_file.read(saved(model, tmp_path))
    assert loaded.opset_imports["com.microsoft"] == 1
    assert origin.notes(loaded) == ("the model did not say which version of com.microsoft it uses, and was given 1",)


def test_nodes_out_of_order_are_sorted(tmp_path):
    model = parsed("g (float[2] x) => (float[2] y) { a = Relu (x) y = Neg (a) }")
    model.graph.node.insert(0, model.graph.node.pop())
    loaded = onnx_file.read(saved(model, tmp_path))
    assert [node.op_type for node in loaded.graph] == ["Relu", "Neg"]
    assert origin.notes(loaded)


def test_fingerprint(tmp_path):
    path = saved(mlp(), tmp_path)
    assert onnx_file.fingerprint(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    path, _ = with_data(tmp_path)
    data = tmp_path / "model.data"
    lines = "".join(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in (path, data))
    assert onnx_file.fingerprint(path) == hashlib.sha256(lines.encode()).hexdigest()
    data.write_bytes(bytes([1]) + data.read_bytes()[1:])
    assert onnx_file.fingerprint(path) != hashlib.sha256(lines.encode()).hexdigest()
    data.unlink()
    with pytest.raises(InputError, match="missing"):
        onnx_file.fingerprint(path)


def test_load_chooses_by_what_it_is_given(tmp_path):
    model = frontends.load(mlp())
    assert frontends.load(model) is model
    assert text.text(frontends.load(str(saved(mlp(), tmp_path)))) == text.text(model)
    (tmp_path / "weights.safetensors").write_bytes(b"x")
    for source in (tmp_path / "weights.safetensors", 3, tmp_path / "nothing.pt"):
        with pytest.raises(InputError) as caught:
            frontends.load(source)
        assert caught.value.hint
