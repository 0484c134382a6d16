"""Any bytes end in a model or in an error with a place, a cause and a hint."""

from __future__ import annotations

import os
import pickle
import random
import zipfile

import onnx
import pytest
from onnx_files import HEAD, mlp, parsed, refused, saved, with_data

from burnish.backends import onnx_writer
from burnish.frontends import onnx_file
from burnish.ir.errors import InputError


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
