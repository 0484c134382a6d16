"""A model is written whole or not at all, and the same model gives the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as oir
import onnxruntime
import pytest

from burnish.backends import onnx_metadata, onnx_writer
from burnish.frontends import onnx_file
from burnish.ir import text
from burnish.ir.errors import InputError

MLP = """<ir_version: 10, opset_import: ["": 20]>
mlp (float[n,64] x) => (float[n,64] y) { h = MatMul (x, w) r = Relu (h) y = Add (r, b) }"""


def mlp(size: int = 64) -> oir.Model:
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model(MLP)
    for name, shape in (("w", (size, size)), ("b", (size,)), ("idle", (33, 5))):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(rng.standard_normal(shape, np.float32), name))
    return oir.from_proto(proto)


def run(path):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.ones((2, 64), np.float32)})[0]


def names(folder):
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.parametrize("external", [None, True, False])
def test_what_is_read_back_is_what_was_written(tmp_path, external):
    model, path = mlp(), tmp_path / "m.onnx"
    before = text.text(model)
    files = onnx_writer.write(model, path, external=external)
    assert names(tmp_path) == (["m.onnx", "m.onnx.data"] if external else ["m.onnx"])
    assert [file.name for file in files] == names(tmp_path)
    assert text.text(onnx_file.read(path)) == before == text.text(model)
    assert list(onnx_file.read(path).graph.initializers) == ["w", "b", "idle"]
    onnx.checker.check_model(path, full_check=True)
    expected = np.maximum(model.graph.initializers["w"].const_value.numpy().sum(0), 0)
    np.testing.assert_allclose(run(path)[0], expected + model.graph.initializers["b"].const_value.numpy(), rtol=1e-5)


@pytest.mark.parametrize("external", [True, False])
def test_same_model_same_bytes(tmp_path, external):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        onnx_writer.write(mlp(), tmp_path / name / "m.onnx", external=external)
    onnx_writer.write(onnx_file.read(tmp_path / "one" / "m.onnx"), tmp_path / "m.onnx", external=external)
    for file in (tmp_path / "one").iterdir():
        content = file.read_bytes()
        assert content == (tmp_path / "two" / file.name).read_bytes() == (tmp_path / file.name).read_bytes()


def test_every_dtype_survives(tmp_path):
    proto = onnx.parser.parse_model(MLP)
    kinds = ["FLOAT16", "BFLOAT16", "INT8", "BOOL", "DOUBLE", "INT4", "UINT2", "FLOAT8E4M3FN", "INT64", "COMPLEX64"]
    model = mlp()
    del proto
    for name in kinds:
        kind = oir.DataType[name]
        array = np.random.default_rng(1).integers(0, 2, (61, 97)).astype(kind.numpy())
        tensor = oir.tensor(array, dtype=kind, name=name)
        value = oir.Value(name=name, type=oir.TensorType(kind), shape=oir.Shape(array.shape), const_value=tensor)
        model.graph.initializers.add(value)
    for external in (True, False):
        onnx_writer.write(model, tmp_path / "m.onnx", external=external)
        assert text.text(onnx_file.read(tmp_path / "m.onnx")) == text.text(model)


def test_external_data_stay_external_and_point_into_the_new_file(tmp_path):
    onnx_writer.write(mlp(), tmp_path / "old.onnx", external=True)
    (tmp_path / "new").mkdir()
    onnx_writer.write(onnx_file.read(tmp_path / "old.onnx"), tmp_path / "new" / "new.onnx")
    assert names(tmp_path / "new") == ["new.onnx", "new.onnx.data"]
    expected = run(tmp_path / "old.onnx")
    (tmp_path / "old.onnx.data").unlink()
    np.testing.assert_array_equal(run(tmp_path / "new" / "new.onnx"), expected)
    for tensor in onnx.load(tmp_path / "new" / "new.onnx", load_external_data=False).graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        assert not entries or entries["location"] == "new.onnx.data"
        assert tensor.name != "w" or int(entries["offset"]) % 4096 == 0


def test_a_model_too_large_for_one_file_gets_a_data_file(tmp_path):
    path = tmp_path / "m.onnx"
    assert len(onnx_writer.write(mlp(), path, limit=20_000)) == 2
    assert len(onnx_writer.write(mlp(), path, limit=40_000)) == 1
    with pytest.raises(InputError, match="more than fits") as caught:
        onnx_writer.write(mlp(), path, external=False, limit=20_000)
    assert "external" in caught.value.hint


@pytest.mark.parametrize("external", [True, False])
def test_a_staged_model_runs_before_it_has_its_name(tmp_path, external):
    path = tmp_path / "m.onnx"
    with onnx_writer.staged(mlp(), path, external=external) as stage:
        expected = run(stage.path)
        assert not path.exists()
        stage.commit()
    np.testing.assert_array_equal(run(path), expected)
    assert names(tmp_path) == (["m.onnx", "m.onnx.data"] if external else ["m.onnx"])


def test_without_a_commit_nothing_is_left(tmp_path):
    with onnx_writer.staged(mlp(), tmp_path / "m.onnx", external=True):
        pass
    with pytest.raises(RuntimeError), onnx_writer.staged(mlp(), tmp_path / "m.onnx"):
        raise RuntimeError("verification failed")
    assert names(tmp_path) == []


KILLED = """
import os, signal, sys
import test_onnx_writer as t
path, moment = t.Path(sys.argv[1]), sys.argv[2]
kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
with t.onnx_writer.staged(t.mlp(), path, external=True) as stage:
    if moment == "between":
        replace = os.replace
        os.replace = lambda old, new: kill() if new == path else replace(old, new)
        stage.commit()
    kill()
"""


@pytest.mark.parametrize("moment", ["staged", "between"])
def test_the_next_one_removes_what_a_killed_process_left_and_puts_old_weights_back(tmp_path, moment):
    path, other = tmp_path / "m.onnx", tmp_path / "other.onnx"
    onnx_writer.write(scaled := mlp(), path, external=True)
    weight = scaled.graph.initializers["w"]
    weight.const_value = oir.tensor(2 * weight.const_value.numpy(), name="w")
    onnx_writer.write(scaled, path, external=True)
    expected = run(path)
    tests = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tests), str(tests.parents[1] / ".src")])}
    with onnx_writer.staged(scaled, other) as living:
        killed = subprocess.run([sys.executable, "-c", KILLED, str(path), moment], env=environment, timeout=300)
        assert killed.returncode == -signal.SIGKILL
        assert len(list(tmp_path.glob(".burnish-*"))) == 2
        onnx_writer.write(scaled, tmp_path / "third.onnx")
        assert len(list(tmp_path.glob(".burnish-*"))) == 1
        living.commit()
    assert names(tmp_path) == ["m.onnx", "m.onnx.data", "other.onnx", "third.onnx"]
    np.testing.assert_array_equal(run(path), expected)


@pytest.mark.parametrize("external", [True, False])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupt_in_the_middle_leaves_the_old_file(tmp_path, monkeypatch, external, error):
    path = tmp_path / "m.onnx"
    onnx_writer.write(mlp(), path, external=external)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    model = mlp()
    unchanged = text.text(model)
    kind = InputError if isinstance(error, OSError) else KeyboardInterrupt
    for step in ("_copy", "_finish"):
        with monkeypatch.context() as patch:
            patch.setattr(onnx_writer, step, lambda *_: (_ for _ in ()).throw(error))
            with pytest.raises(kind):
                onnx_writer.write(model, path, external=external)
    real, calls = os.replace, []

    def fail_at_the_last(source, target):
        if str(target) == str(path):
            calls.append(source)
            raise error
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail_at_the_last)
        with pytest.raises(kind):
            onnx_writer.write(mlp(), path, external=external)
    assert calls
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert text.text(model) == unchanged


@pytest.mark.parametrize("external", [True, False])
def test_a_full_disk(tmp_path, external):
    script = """
        import resource, sys
        import numpy as np, onnx_ir as oir
        from burnish.backends import onnx_writer
        from burnish.ir.errors import InputError
        value = oir.Value(name="x", type=oir.TensorType(oir.DataType.FLOAT), shape=oir.Shape([1]))
        node = oir.node("Relu", [value])
        node.outputs[0].name = "y"
        graph = oir.Graph([value], node.outputs, nodes=[node], opset_imports={"": 20}, name="g")
        model = oir.Model(graph, ir_version=10)
        for i in range(8):
            tensor = oir.tensor(np.ones((400, 400), np.float32), name=f"w{i}")
            model.graph.initializers.add(oir.Value(name=tensor.name, const_value=tensor))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
        try:
            onnx_writer.write(model, sys.argv[1], external=sys.argv[2] == "True")
        except InputError as error:
            print(error.cause, "|", error.hint)
            sys.exit(error.exit_code)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "m.onnx"), str(external)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ".src"})
    assert done.returncode == 2, done.stderr
    assert "cannot be written" in done.stdout and "disk" in done.stdout
    assert names(tmp_path) == [] and done.stderr == ""


def test_the_model_that_is_read_is_never_overwritten(tmp_path):
    path = tmp_path / "m.onnx"
    onnx_writer.write(mlp(), path, external=True)
    model = onnx_file.read(path)
    os.symlink(path, tmp_path / "link.onnx")
    os.symlink(tmp_path / "m.onnx.data", tmp_path / "other.onnx.data")
    before = path.read_bytes()
    for target in ("m.onnx", "link.onnx", "m.onnx.data", "other.onnx"):
        with pytest.raises(InputError, match="being read"):
            onnx_writer.write(model.clone(), tmp_path / target)
    with pytest.raises(InputError, match="being read"):
        onnx_writer.check_target(path, path)
    assert path.read_bytes() == before
    onnx_writer.write(mlp(), tmp_path / "inline.onnx")
    with pytest.raises(InputError, match="being read"):
        onnx_writer.write(onnx_file.read(tmp_path / "inline.onnx").clone(), tmp_path / "inline.onnx")


def test_targets_that_cannot_be_written(tmp_path):
    for target in (tmp_path, tmp_path / "no" / "m.onnx", tmp_path / ("n" * 300), "/dev/null", "/proc/m.onnx", "/"):
        with pytest.raises(InputError) as caught:
            onnx_writer.write(mlp(), target)
        assert caught.value.hint and caught.value.place
    assert names(tmp_path) == []


def test_private_metadata_are_dropped_and_the_users_are_kept(tmp_path):
    model = mlp()
    node = model.graph[0]
    node.metadata_props.update({"pkg.torch.onnx.stack_trace": 'File "/home/me/net.py"', "namespace": "a", "mine": "1"})
    node.doc_string = "/home/me/net.py(12): forward"
    model.graph[1].doc_string = "the activation"
    model.graph.metadata_props["pkg.torch.export.ExportedProgram.graph_signature"] = "secret"
    model.graph.initializers["w"].metadata_props["pkg.onnxscript.optimizer.folded_from"] = "secret"
    model.graph.initializers["w"].const_value.metadata_props["pkg.torch.onnx.original_node_name"] = "secret"
    model.metadata_props["character"] = "abc"
    onnx_metadata.strip_private(model)
    onnx_writer.write(model, tmp_path / "m.onnx")
    content = (tmp_path / "m.onnx").read_bytes()
    assert not any(word in content for word in (b"/home", b"pkg.", b"secret", b"namespace"))
    loaded = onnx_file.read(tmp_path / "m.onnx")
    assert loaded.metadata_props == {"character": "abc"}
    assert loaded.graph[0].metadata_props == {"mine": "1"}
    assert loaded.graph[1].doc_string == "the activation"


def test_provenance_is_deterministic():
    texts = []
    for fired in ({"a": 1, "b": 2}, {"b": 2, "a": 1}):
        model = mlp()
        onnx_metadata.provenance(model, version="1", recipe=["a", "b{x=1}"], input_fingerprint="f00d", fired=fired)
        texts.append(dict(model.metadata_props))
    assert texts[0] == texts[1]
    assert json.loads(texts[0]["burnish.fired"]) == {"a": 1, "b": 2}
    assert all(key.startswith("burnish.") for key in texts[0])
