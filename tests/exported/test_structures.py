"""The exported graphs without weights that other tests read: all there, small, and they run once filled."""

import numpy as np
import onnx
import onnx_ir as oir
import pytest

from burnish.backends.ort import session
from burnish.frontends.synthesis import synthesise, usable
from burnish.tools.research import structures, zoo

LARGEST = 3_000_000
"""Bytes that all of them may have together."""


def test_every_small_family_and_every_trained_model_is_packed():
    assert set(structures.names()) >= set(zoo.REAL)
    assert sum(file.stat().st_size for file in structures.FOLDER.iterdir()) < LARGEST


def test_equal_and_transposed_weights_stay_so():
    model = onnx.ModelProto()
    weight = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32)
    for name, values in {"a": weight, "same": weight, "turned": weight.T, "other": weight + 1}.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    structures.strip(model)
    for tensor in model.graph.initializer:
        assert not tensor.raw_data
        structures.fill(tensor)
    first, same, turned, other = (onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer)
    assert np.array_equal(first, same)
    assert np.array_equal(first.T, turned)
    assert not np.array_equal(first, other)
    assert abs(first - weight).mean() > 0.1


def test_tensors_with_structure_are_kept():
    model = onnx.ModelProto()
    angles = np.outer(np.arange(20), 1e4 ** -(np.arange(4) / 4)).astype(np.float32)
    kept = [np.arange(100), np.float32(1e-5), np.repeat(np.float32([0, -100]), 50), np.cos(angles), np.sin(angles)]
    for index, values in enumerate(kept):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values), f"w{index}"))
    structures.strip(model)
    for tensor, values in zip(model.graph.initializer, kept, strict=True):
        assert np.array_equal(onnx.numpy_helper.to_array(tensor), values)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if "smollm2" in name else []) for name in structures.names()]
)
def test_a_filled_model_runs(name):
    model = oir.from_proto(structures.load(name))
    run = session.executor(level="basic", lean=True)(model)
    kept, _ = usable(synthesise(model, settings=1)[:3], run)
    outputs = run.run(kept[0].feeds)
    run.close()
    assert outputs
    assert all(np.isfinite(output).all() for output in outputs.values())
