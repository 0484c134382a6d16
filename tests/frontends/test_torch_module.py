"""A traced module computes what the module computes, and what cannot be traced says why."""

from __future__ import annotations

import builtins
import io
import pickle
import warnings
import zipfile

import numpy as np
import onnx_ir as oir
import pytest

from burnish import frontends
from burnish.backends import onnx_writer
from burnish.frontends import torch_module
from burnish.ir import origin
from burnish.ir.errors import InputError, MissingPackageError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(8)
        self.head = torch.nn.Linear(8, 4)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


class Branches(torch.nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class AwkwardNames(torch.nn.Module):
    """Buffers with the names that the exporter gives to its own values."""

    def __init__(self):
        super().__init__()
        for number in range(4):
            self.register_buffer(f"val_{number}", torch.full((4,), number + 1.0))

    def forward(self, x):
        return torch.softmax((x + self.val_0) * self.val_1 - self.val_2.exp() / self.val_3, -1)


@pytest.fixture(scope="module")
def image():
    torch.manual_seed(0)
    return torch.randn(2, 3, 8, 8)


@pytest.fixture(scope="module")
def program(image):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(Small().eval(), (image,))


def outputs(model: oir.Model, path, feeds):
    import onnxruntime

    onnx_writer.write(model, path)
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feeds)


def test_outputs_batchnorm_names_and_dynamic_dims_are_kept(tmp_path, image):
    module = Small()
    module.norm.running_mean += 0.3
    model = frontends.load(
        module, image, dynamic_shapes=({0: torch.export.Dim("batch")},), input_names=["image"], output_names=["val_0"]
    )
    assert module.training and module.norm.training
    assert any("training mode" in note for note in origin.notes(model))
    assert [value.name for value in model.graph.inputs] == ["image"]
    assert [value.name for value in model.graph.outputs] == ["val_0"]
    assert str(model.graph.inputs[0].shape[0]) == "batch"
    assert "BatchNormalization" in [node.op_type for node in model.graph]
    assert {"conv.weight", "norm.running_mean", "head.bias"} <= model.graph.initializers.keys()
    batch = torch.cat([image, image, image])
    (result,) = outputs(model, tmp_path / "m.onnx", {"image": batch.numpy()})
    np.testing.assert_allclose(result, module.eval()(batch).detach().numpy(), rtol=1e-5, atol=1e-6)


def test_inputs_by_name_and_as_arrays(tmp_path, image):
    model = frontends.load(Small().eval(), {"x": image.numpy()})
    assert [value.name for value in model.graph.inputs] == ["x"]
    assert not origin.notes(model)


def test_parameters_named_like_the_exporters_own_values(tmp_path):
    module, x = AwkwardNames(), torch.randn(2, 4)
    (result,) = outputs(frontends.load(module, x), tmp_path / "m.onnx", {"x": x.numpy()})
    np.testing.assert_allclose(result, module(x).numpy(), rtol=1e-5, atol=1e-6)
    frontends.load(tmp_path / "m.onnx")


def test_a_saved_program(tmp_path, image, program):
    path = tmp_path / "model.pt2"
    torch.export.save(program, path)
    (result,) = outputs(frontends.load(path), tmp_path / "m.onnx", {"x": image.numpy()})
    np.testing.assert_allclose(result, program.module()(image).detach().numpy(), rtol=1e-5, atol=1e-6)


def test_a_program_that_would_run_code_is_refused(tmp_path, program):
    path, bad = tmp_path / "model.pt2", tmp_path / "bad.pt2"
    torch.export.save(program, path)

    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    buffer = io.BytesIO()
    torch.save(Payload(), buffer)
    for poison in (buffer.getvalue(), pickle.dumps(Payload())):
        with zipfile.ZipFile(path) as source, zipfile.ZipFile(bad, "w") as target:
            for name in source.namelist():
                target.writestr(name, poison if name.endswith("sample_inputs/model.pt") else source.read(name))
        with pytest.raises(InputError, match="could run code"):
            frontends.load(bad)
        assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut off"])
def test_a_file_that_is_no_program(tmp_path, content):
    path = tmp_path / "model.pt2"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"not a \.pt2 file"):
        frontends.load(path)


def test_what_cannot_be_traced_says_why_in_one_line(image, capfd, program):
    with pytest.raises(InputError, match="data-dependent") as caught:
        frontends.load(Branches(), image)
    assert "Python branch" in caught.value.hint
    with pytest.raises(InputError, match="needs inputs"):
        frontends.load(Small())
    with pytest.raises(InputError, match="cannot be traced") as caught:
        frontends.load(Small().eval(), (image, image))
    assert "inputs" in caught.value.hint
    with pytest.raises(InputError, match="dynamic dims already"):
        frontends.load(program, dynamic_shapes={})
    assert capfd.readouterr() == ("", "")


def test_without_torch_the_error_gives_the_pip_line(monkeypatch, tmp_path):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "torch":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MissingPackageError) as caught:
        torch_module.read_program(tmp_path / "model.pt2")
    assert caught.value.hint == "pip install 'burnish[torch]'"
