"""Sessions on borrowed weights compute what ordinary ones do, and errors are ours."""

from __future__ import annotations

import gc
import sys
import weakref
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as oir
import pytest
from onnx import helper, numpy_helper

from burnish.backends.ort.session import Level, executor, from_path
from burnish.ir.errors import InputError, MissingPackageError
from burnish.ir.text import fingerprint


def random(*shape: int, seed: int = 0) -> np.ndarray:
    """Normal float32 numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


W, THEN, ELSE = (random(64, 64, seed=i) for i in range(3))


def nested() -> onnx.ModelProto:
    """Large weights in the main graph, in a nested graph under the same name, and in Constant nodes of both."""
    here = helper.make_tensor_value_info
    then_branch = helper.make_graph(
        [helper.make_node("MatMul", ["x", "inner"], ["a"])],
        "then",
        [],
        [here("a", 1, None)],
        [numpy_helper.from_array(THEN, "inner")],
    )
    else_branch = helper.make_graph(
        [helper.make_node("Constant", [], ["b"], value=numpy_helper.from_array(ELSE))], "else", [], [here("b", 1, None)]
    )
    nodes = [
        helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(ELSE)),
        helper.make_node("MatMul", ["x0", "w"], ["x1"]),
        helper.make_node("Add", ["x1", "k"], ["x"]),
        helper.make_node("If", ["p"], ["y"], then_branch=then_branch, else_branch=else_branch),
    ]
    inputs = [here("x0", 1, [64, 64]), here("p", 9, [])]
    graph = helper.make_graph(nodes, "g", inputs, [here("y", 1, [64, 64])], [numpy_helper.from_array(W, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.mark.parametrize("level", ["all", "off"])
@pytest.mark.parametrize("lean", [False, True])
def test_weights_are_borrowed_wherever_they_stand(level: Level, lean: bool) -> None:
    model = oir.serde.deserialize_model(nested())
    before = fingerprint(model)
    runner = executor(level=level, lean=lean)(model)
    x = random(64, 64, seed=7)
    assert np.allclose(runner.run({"x0": x, "p": np.array(True)})["y"], (x @ W + ELSE) @ THEN, atol=1e-4)
    assert np.array_equal(runner.run({"x0": x, "p": np.array(False)})["y"], ELSE)
    assert fingerprint(model) == before


def test_a_bound_call_keeps_what_it_borrows_when_the_runner_is_gone() -> None:
    model = oir.serde.deserialize_model(nested())
    runner = executor()(model)
    call = runner.bound({"x0": random(64, 64, seed=7), "p": np.array(True)})
    lent = [weakref.ref(one) for one in runner._lent]
    runner.close()
    del runner, model
    gc.collect()
    assert len(lent) > 2 and all(one() is not None for one in lent)
    call()
    del call
    gc.collect()
    assert all(one() is None for one in lent)


def test_external_files_are_read_through_the_model(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(nested(), path, save_as_external_data=True, size_threshold=0, location="weights.bin")
    x = random(64, 64, seed=7)
    feeds = {"x0": x, "p": np.array(True)}
    expected = from_path(path).run(feeds)["y"]
    assert np.array_equal(executor()(oir.load(path)).run(feeds)["y"], expected)


def test_narrow_dtypes() -> None:
    brain = random(64, 64).astype(ml_dtypes.bfloat16)
    four = np.random.default_rng(1).integers(-8, 8, (64, 64)).astype(ml_dtypes.int4)
    eight = random(64, 64, seed=2).astype(ml_dtypes.float8_e4m3fn)
    nodes = [
        helper.make_node("Cast", ["w"], ["wf"], to=1),
        helper.make_node("DequantizeLinear", ["q", "s"], ["qf"]),
        helper.make_node("DequantizeLinear", ["e", "s"], ["ef"]),
        helper.make_node("Sum", ["wf", "qf", "ef"], ["z"]),
        helper.make_node("Cast", ["x"], ["xf"], to=1),
        helper.make_node("Add", ["z", "xf"], ["t"]),
        helper.make_node("Cast", ["t"], ["y"], to=16),
    ]
    stored = [
        numpy_helper.from_array(brain, "w"),
        numpy_helper.from_array(four, "q"),
        numpy_helper.from_array(eight, "e"),
        numpy_helper.from_array(np.array(0.5, np.float32), "s"),
    ]
    ports = [[helper.make_tensor_value_info(n, 16, [64, 64])] for n in "xy"]
    graph = helper.make_graph(nodes, "g", *ports, stored)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    x = random(64, 64, seed=3).astype(ml_dtypes.bfloat16)
    found = executor()(oir.serde.deserialize_model(proto)).run({"x": x})["y"]
    wide = [array.astype(np.float32) for array in (brain, four, eight, x)]
    expected = (wide[0] + 0.5 * wide[1] + 0.5 * wide[2] + wide[3]).astype(ml_dtypes.bfloat16)
    assert found.dtype == ml_dtypes.bfloat16
    assert np.allclose(found.astype(np.float32), expected.astype(np.float32), rtol=1e-2)


def test_refused_inputs_name_cause_and_node() -> None:
    text = """<ir_version: 10, opset_import: ["": 21]> g (float[N,3] x, int64[K] i) => (float[M,3] y)
        { [pick] y = Gather (x, i) }"""
    runner = executor()(oir.serde.deserialize_model(onnx.parser.parse_model(text)))
    with pytest.raises(InputError, match="out of data bounds") as caught:
        runner.run({"x": random(2, 3), "i": np.array([5])})
    assert caught.value.place == "Gather `pick`"
    with pytest.raises(InputError, match="index: 1 Got: 4 Expected: 3"):
        runner.run({"x": random(2, 4), "i": np.array([0])})
    with pytest.raises(InputError, match="Unexpected input data type"):
        runner.run({"x": random(2, 3).astype(np.float64), "i": np.array([0])})
    with pytest.raises(InputError, match="Required inputs"):
        runner.run({"x": random(2, 3)})
    runner.close()
    with pytest.raises(InputError, match="closed"):
        runner.run({"x": random(2, 3), "i": np.array([0])})


def test_models_that_cannot_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    with pytest.raises(InputError, match="cannot load the model"):
        from_path(tmp_path / "bad.onnx")
    text = '<ir_version: 10, opset_import: ["": 21, "far": 1]> g (float x) => (float y) { y = far.Away (x) }'
    with pytest.raises(InputError, match="far.Away|far:Away"):
        executor()(oir.serde.deserialize_model(onnx.parser.parse_model(text)))


def test_a_missing_runtime_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingPackageError) as caught:
        executor()(oir.serde.deserialize_model(nested()))
    assert caught.value.hint == "pip install 'burnish[cpu]'"


def test_a_missing_gpu_says_what_to_install() -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    with pytest.raises(MissingPackageError, match="cannot use CUDA"):
        executor(target="ort-cuda")(oir.serde.deserialize_model(nested()))


def test_why_a_model_is_refused_is_told_also_where_weights_are_borrowed(capfd: pytest.CaptureFixture[str]) -> None:
    """ONNX Runtime's Python would say why, try once more without the weights, and complain that they are missing."""
    model = onnx.parser.parse_model("""
    <ir_version: 10, opset_import: ["": 21]>
    g (float[N, 16, 6, 6] x) => (float[N, 16, 4, 4] y, float[N, 16, 4, 4] t) {
      v = DequantizeLinear <axis = 0> (w, s)  t = Conv (x, v, s)  u = Conv (x, v, s)  y = Add (t, u)
    }""")
    model.graph.initializer.append(numpy_helper.from_array(np.ones((16, 16, 3, 3), np.int8), "w"))
    model.graph.initializer.append(numpy_helper.from_array(np.ones(16, np.float32), "s"))
    with pytest.raises(InputError, match="producing output: t"):
        executor()(oir.from_proto(model))
    assert "EP Error" not in "".join(capfd.readouterr())
