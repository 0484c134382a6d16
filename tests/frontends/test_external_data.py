"""Weights in files of their own: read wherever they lie in the folder, refused outside of it."""

from __future__ import annotations

import os

import numpy as np
import onnx
import onnx_ir as oir
import pytest
from onnx_files import mlp, parsed, refused, saved, with_data

from burnish import frontends
from burnish.frontends import onnx_file
from burnish.ir import origin, text
from burnish.ir.errors import InputError


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
