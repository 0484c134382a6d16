"""Any bytes end in a model or in an error with a place, a cause and a hint."""

from __future__ import annotations

import hashlib
import os
import pickle
import random
import resource
import zipfile

import numpy as np
import onnx
import onnx_ir as oir
import pytest

from burnish import frontends
from burnish.backends import onnx_writer
from burnish.frontends import onnx_file
from burnish.ir import origin, text
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


def test_external_data(tmp_path):
    path, _ = with_data(tmp_path)
    model = onnx_file.read(path)
    expected = onnx_file.read_bytes(mlp().SerializeToString())
    assert text.text(model) == text.text(expected)
    assert isinstance(model.graph.initializers["w"].const_value, oir.ExternalTensor)
    assert set(origin.files(model)) == {path, tmp_path / "model.data"}


def test_external_data_in_a_constant_node(tmp_path):
    model = parsed("g (float[2] x) => (float[2] y) { c = Constant <value = float[2] {1, 2}> () y = Add (x, c) }")
    tensor = model.graph.node[0].attribute[0].t
    (tmp_path / "c.data").write_bytes(np.array([3, 4], np.float32).tobytes())
    tensor.ClearField("float_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="c.data")
    loaded = onnx_file.read(saved(model, tmp_path))
    assert loaded.graph[0].attributes["value"].as_tensor().numpy().tolist() == [3, 4]


def test_a_download_cache_of_links(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    path, _ = with_data(tmp_path / "blobs")
    for source, name in ((path, "model.onnx"), (tmp_path / "blobs" / "model.data", "model.data")):
        (tmp_path / "snapshot" / name).symlink_to(source)
    linked = onnx_file.read(tmp_path / "snapshot" / "model.onnx")
    assert text.text(linked) == text.text(onnx_file.read(path))


def test_hard_links(tmp_path):
    path, _ = with_data(tmp_path)
    os.link(tmp_path / "model.data", tmp_path / "same.data")
    assert onnx_file.read(path).graph.initializers["b"].const_value.numpy().shape == (16,)


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


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "empty"),
        (b"This is a README, not a model.\n" * 50, "not an ONNX model"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (b"<!DOCTYPE html>", "HTML"),
        (b"{}", "JSON"),
        (pickle.dumps({"a": 1}), "pickle"),
        (bytes(1000), "not an ONNX model"),
        (b"\x08\x07", "no graph|which operator set"),
    ],
)
def test_not_a_model(tmp_path, content, cause):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    refused(path, cause)


def test_a_torch_checkpoint(tmp_path):
    path = tmp_path / "model.onnx"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"")
    assert "module" in refused(path, "zip").hint


def test_what_cannot_be_opened(tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"x")
    assert "a.onnx" in refused(tmp_path, "folder").hint
    refused(tmp_path / "none.onnx", "no such file")
    refused(tmp_path / ("n" * 300), "too long")
    os.mkfifo(tmp_path / "pipe.onnx")
    refused(tmp_path / "pipe.onnx", "regular file")
    refused("/dev/null", "regular file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path):
    path = saved(mlp(), tmp_path)
    path.chmod(0)
    refused(path, "Permission denied")


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.999])
def test_truncated(tmp_path, kept):
    path = saved(mlp(), tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    refused(path, "only a part")


def test_missing_and_truncated_external_data(tmp_path):
    path, _ = with_data(tmp_path)
    data = tmp_path / "model.data"
    data.write_bytes(data.read_bytes()[:-1])
    assert "unused" in refused(path, "has only").place
    data.unlink()
    refused(path, "`model.data` is missing")
    data.mkdir()
    refused(path, "cannot be read|regular")


@pytest.mark.parametrize(
    "location", ["../secret.data", "a/../../secret.data", "/etc/passwd", "C:\\x.data", "", "a\0b", "."]
)
def test_external_data_outside_the_folder(tmp_path, location):
    (tmp_path / "secret.data").write_bytes(bytes(10000))
    (tmp_path / "inside").mkdir()
    path, _ = with_data(tmp_path / "inside", location)
    refused(path, "absolute|climbs|without|cannot be read|regular")


def test_external_data_behind_a_link(tmp_path):
    (tmp_path / "inside").mkdir()
    path, _ = with_data(tmp_path / "inside")
    os.replace(tmp_path / "inside" / "model.data", tmp_path / "secret.data")
    (tmp_path / "inside" / "model.data").symlink_to(tmp_path / "secret.data")
    refused(path, "link out of")
    (tmp_path / "inside" / "model.data").unlink()
    (tmp_path / "inside" / "folder").symlink_to(tmp_path)
    path, _ = with_data(tmp_path / "inside", "folder/secret.data")
    refused(path, "link out of")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("offset", "-4"),
        ("offset", "x"),
        ("length", "3"),
        ("length", "-1"),
        ("offset", str(1 << 62)),
        ("location", "\0inline"),
    ],
)
def test_external_entries_that_lie(tmp_path, key, value):
    path, model = with_data(tmp_path)
    for entry in model.graph.initializer[2].external_data:
        if entry.key == key:
            entry.value = value
    path.write_bytes(model.SerializeToString())
    refused(path, "external data")


def test_a_model_in_memory_has_no_folder_for_external_data(tmp_path):
    _, model = with_data(tmp_path)
    with pytest.raises(InputError, match="no folder"):
        frontends.load(model)


STRUCTURE = {
    "cycle": "g (float[2] x) => (float[2] y) { a = Add (x, b) b = Relu (a) y = Relu (b) }",
    "made by nothing": "g (float[2] x) => (float[2] y) { y = Add (x, ghost) }",
    "output `z` is made by nothing": "g (float[2] x) => (float[2] z) { y = Relu (x) }",
    "made twice": "g (float[2] x) => (float[2] y) { y = Relu (x) y = Neg (x) }",
    "`x` is made twice": "g (float[2] x) => (float[2] x) { x = Relu (x) }",
}


@pytest.mark.parametrize("cause", STRUCTURE)
def test_broken_structure(tmp_path, cause):
    refused(saved(parsed(STRUCTURE[cause]), tmp_path), cause)


def test_a_cycle_through_a_branch(tmp_path):
    body = """g (float[2] x, bool c) => (float[2] y) {
      a = If (c) <then_branch = t () => (float[2] p) { p = Relu (b) },
                  else_branch = e () => (float[2] q) { q = Neg (x) }>
      b = Relu (a)
      y = Relu (b)
    }"""
    refused(saved(parsed(body), tmp_path), "cycle.*`a` .If.*`b` .Relu")


def test_functions_that_stand_for_more_nodes_than_any_memory_holds(tmp_path):
    """Each function calls the one before twice: 40 of them are a file of some kilobytes and 2 ** 40 nodes."""
    layers = [
        onnx.helper.make_function(
            "local", f"f{depth}", ["x"], ["y"],
            [
                onnx.helper.make_node(f"f{depth - 1}" if depth else "Relu", [a], [b], domain="local" if depth else "")
                for a, b in (("x", "m"), ("m", "y"))
            ],
            [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("local", 1)],
        )
        for depth in range(40)
    ]  # fmt: skip
    for count, allowed in ((10, True), (40, False)):
        model = parsed(f"g (float[2] x) => (float[2] y) {{ y = local.f{count - 1} (x) }}")
        model.opset_import.append(onnx.helper.make_opsetid("local", 1))
        model.functions.extend(layers[:count])
        path = saved(model, tmp_path, f"{count}.onnx")
        if allowed:
            onnx_file.read(path)
        else:
            refused(path, r"its functions stand for 1.1e\+12 nodes")


def test_duplicate_initializers_and_inputs(tmp_path):
    model = mlp()
    model.graph.initializer.append(model.graph.initializer[0])
    refused(saved(model, tmp_path), "`w` is made twice")
    model = mlp()
    model.graph.input.append(model.graph.input[0])
    refused(saved(model, tmp_path), "`x` is made twice")
    model = mlp()
    model.graph.initializer[2].name = ""
    refused(saved(model, tmp_path), "no name")


def test_functions_that_call_each_other(tmp_path):
    functions = """<domain: "custom", opset_import: ["": 20, "custom": 1]> one (a) => (b) { b = custom.two (a) }
    <domain: "custom", opset_import: ["": 20, "custom": 1]> two (a) => (b) { b = custom.one (a) }"""
    model = onnx.parser.parse_model(HEAD + "g (float[2] x) => (float[2] y) { y = custom.one (x) }\n" + functions)
    refused(saved(model, tmp_path), "functions call each other")


TYPES = {
    "inconsistent type": "g (float[2] x, int64[2] z) => (float[2] y) { [named] y = Add (x, z) }",
    "unsupported type": "g (int64[2] x) => (int64[2] y) { y = Sqrt (x) }",
    "declared int64 but is computed as float": "g (float[2] x) => (int64[2] y) { y = Relu (x) }",
    "input size 1 not in range": "g (float[2] x) => (float[2] y) { y = Add (x) }",
    "[Nn]o opset import": "g (float[2] x) => (float[2] y) { y = nowhere.Op (x) }",
}


@pytest.mark.parametrize("cause", TYPES)
def test_type_mismatch(tmp_path, cause):
    error = refused(saved(parsed(TYPES[cause]), tmp_path), cause)
    assert cause != "inconsistent type" or "`named` (Add)" in error.place


def test_versions(tmp_path):
    model = mlp()
    model.ir_version = 1000
    assert "upgrade" in refused(saved(model, tmp_path), "IR version 1000").hint
    model = mlp()
    model.opset_import[0].version = 1000
    refused(saved(model, tmp_path), "opset 1000")
    model.opset_import[0].version = 6
    refused(saved(model, tmp_path), "opset 6 is too old, and `onnx` cannot raise it")
    old = onnx.parser.parse_model(
        '<ir_version: 3, opset_import: ["": 6]> g (float[2,3] x) => (float[2,3] y) { y = Relu (x) }'
    )
    assert onnx_file.read(saved(old, tmp_path)).opset_imports[""] == 9
    del model.opset_import[:]
    refused(saved(model, tmp_path), "which operator set")


@pytest.mark.parametrize(
    ("dims", "dtype", "cause"),
    [
        ([-1, 16], 1, "negative"),
        ([1 << 40, 1 << 40], 1, "claims"),
        ([1 << 62, 1 << 62, 0], 1, "dims need 0"),
        ([1 << 34], 1, "dims need"),
        ([16, 15], 1, "holds 1024 bytes, its dims need 960"),
        ([16, 16], 0, "data type 0"),
        ([16, 16], 999, "data type 999"),
        ([16, 16], 8, "holds 0 strings"),
    ],
)
@pytest.mark.parametrize("large", [False, True])
def test_tensors_that_lie(tmp_path, dims, dtype, cause, large):
    model = mlp()
    tensor = model.graph.initializer[0]
    if large:
        tensor.raw_data = tensor.raw_data * 2
        cause = cause.replace("1024", "2048")
    del tensor.dims[:]
    tensor.dims.extend(dims)
    tensor.data_type = dtype
    refused(saved(model, tmp_path), "holds|have" if large and dtype == 8 else cause)


def test_tensors_without_data(tmp_path):
    model = mlp()
    model.graph.initializer[0].ClearField("raw_data")
    refused(saved(model, tmp_path), "holds 0 values")
    model.graph.initializer[0].float_data.extend([1.0] * 3)
    refused(saved(model, tmp_path), "holds 3 values")
    model.graph.sparse_initializer.add()
    refused(saved(model, tmp_path), "sparse")


def test_deep_nesting_and_bad_names(tmp_path):
    path = tmp_path / "model.onnx"
    graph = onnx.GraphProto(name="deep")
    content = graph.SerializeToString()
    for _ in range(300):
        attribute = b"\x32" + onnx_length(content) + content
        node = b"\x2a" + onnx_length(attribute) + attribute
        content = b"\x0a" + onnx_length(node) + node
    head = onnx.ModelProto(ir_version=10, opset_import=[onnx.OperatorSetIdProto(version=20)]).SerializeToString()
    path.write_bytes(head + b"\x3a" + onnx_length(content) + content)
    refused(path, ".")
    path.write_bytes(mlp().SerializeToString().replace(b"MatMul", b"Mat\xff\xfel"))
    refused(path, "UTF-8")
    path.write_bytes(mlp().SerializeToString().replace(b"MatMul", b"M\n\x1b[1m"))
    onnx_file.read(path)


def onnx_length(content: bytes) -> bytes:
    from burnish.ir.wire import encode_varint

    return encode_varint(len(content))


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


def seeds(tmp_path) -> list[bytes]:
    branch = """g (float[2] x, bool c) => (float[2] y) {
      k = Constant <value = float[2] {1, 2}> ()
      y = If (c) <then_branch = t () => (float[2] p) { p = Add (x, k) },
                  else_branch = e () => (float[2] q) { q = Neg (x) }>
    }"""
    function = '<domain: "custom", opset_import: ["": 20]> twice (a) => (b) { b = Add (a, a) }'
    call = onnx.parser.parse_model(HEAD + "g (float[2] x) => (float[2] y) { y = custom.twice (x) }\n" + function)
    models = [mlp(), parsed(branch), call, with_data(tmp_path)[1]]
    return [model.SerializeToString() for model in models]


def mutated(content: bytes, rng: random.Random) -> bytes:
    out = bytearray(content)
    # The payload of a weight says nothing about the structure: change the first part most.
    reach = len(out) if rng.random() < 0.2 else min(len(out), 400)
    for _ in range(rng.randint(1, 2)):
        place = rng.randrange(reach)
        match rng.randrange(5):
            case 0:
                out[place : place + 1] = bytes([rng.randrange(256)])
            case 1:
                out[place : place + 1] = bytes([out[min(place, len(out) - 1)] ^ (1 << rng.randrange(8))])
            case 2:
                del out[place : place + rng.randint(1, 8)]
            case 3:
                out[place:place] = out[place : place + rng.randint(1, 30)]
            case 4:
                out[place:place] = rng.randbytes(rng.randint(1, 4))
    return bytes(out)


def test_mutated_files_end_in_a_model_or_an_error(tmp_path):
    rng, path = random.Random(0), tmp_path / "fuzz.onnx"
    ends = {"model": 0, "error": 0}
    for content in seeds(tmp_path):
        for _ in range(150):
            path.write_bytes(mutated(content, rng))
            try:
                model = onnx_file.read(path)
                onnx_writer.write(model, tmp_path / "out.onnx")
                onnx_file.read(tmp_path / "out.onnx")
                ends["model"] += 1
            except InputError as error:
                assert error.hint and error.place
                ends["error"] += 1
    assert min(ends.values()) > 50, ends
