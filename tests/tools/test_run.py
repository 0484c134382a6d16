"""`burnish run` as a user runs it, on ONNX files and on compiled models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from commands import Run, runner

DEMO = Path(__file__).parents[2] / "tools" / "demo"


@pytest.fixture
def burnish(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs the command in this process: (exit code, stdout, stderr)."""
    return runner(monkeypatch, capfd, tmp_path, "burnish")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two samples of three images."""
    with np.load(DEMO / "digits.npz") as digits:
        images = digits["image"][:6]
    np.savez(tmp_path / "d.npz", image=images.reshape(2, 3, *images.shape[1:]))
    return tmp_path / "d.npz"


def test_an_onnx_file_and_its_compiled_form_give_the_same(burnish: Run, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("tvm")
    resnet = DEMO / "digits_resnet.onnx"
    assert burnish("optimize", resnet, "-o", "out", "--target", "llvm", "--regions", "all", "--guard", "size")[0] == 0
    code, out, err = burnish("run", "out", "--data", data, "-o", "y.npz")
    assert (code, err) == (0, "") and "logits  float32  [3, 10]" in out and "11 kernels untuned" in out
    assert burnish("run", resnet, "--data", data, "-o", "z.npz")[0] == 0
    with np.load("y.npz") as ours, np.load("z.npz") as theirs:
        assert ours["logits"].shape == (2, 3, 10)
        np.testing.assert_allclose(ours["logits"], theirs["logits"], rtol=1e-4, atol=1e-4)
    found = json.loads(burnish("run", "out", "--data", data, "--json")[1])
    assert found["samples"] == 2 and found["verified"] is True and found["outputs"]["logits"]["nans"] == 0
    assert found["seconds"]["median"] > 0
    code, _, err = burnish("run", "out")
    assert code == 2 and "--data" in err
    assert burnish("run", "out", "--data", data, "-o", "out/y.npz")[0] == 2
    content = bytearray((tmp_path / "out" / "code.so").read_bytes())
    content[4000] ^= 1
    (tmp_path / "out" / "code.so").unlink()  # this process has the other one loaded
    (tmp_path / "out" / "code.so").write_bytes(content)
    code, out, err = burnish("run", "out", "--data", data)
    assert code == 2 and out == "" and "SHA-256" in err and "hint:" in err


def test_samples_are_made_for_an_onnx_file(burnish: Run) -> None:
    code, out, _ = burnish("run", DEMO / "digits_resnet.onnx")
    assert code == 0 and "logits" in out and "ONNX Runtime, 1 thread" in out


@pytest.mark.parametrize(
    "words, cause",
    [
        (("nothing.onnx",), "no such file"),
        ((DEMO / "digits_resnet.onnx", "--data", "nothing.npz"), "no such file"),
        ((DEMO / "digits_resnet.onnx", "-o", "y.txt"), "`.npz`"),
        ((DEMO / "digits_resnet.onnx", "-o", "none/y.npz"), "cannot be written there"),
        ((DEMO / "digits_resnet.onnx", "--data", "d.npz", "-o", "d.npz"), "part of what is read"),
        (("d.npz",), "hint"),
    ],
)
def test_what_cannot_be_run_is_exit_code_2(burnish: Run, data: Path, words: tuple[object, ...], cause: str) -> None:
    code, out, err = burnish("run", *words)
    assert (code, out) == (2, "") and cause in err


def test_a_folder_that_is_no_artefact_is_refused(burnish: Run, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("tvm")
    (tmp_path / "folder").mkdir()
    code, _, err = burnish("run", "folder", "--data", data)
    assert code == 2 and "no artefact" in err


def test_nan_and_infinite_outputs_are_counted_not_averaged(burnish: Run, tmp_path: Path) -> None:
    import onnx

    text = '<ir_version: 8, opset_import: ["": 17]> g (float[n] x) => (float[n] y) { y = Sqrt (x) }'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    np.savez(tmp_path / "x.npz", x=np.float32([4, -1, 9, np.inf]))
    found = json.loads(burnish("run", "m.onnx", "--data", "x.npz", "--json")[1])["outputs"]["y"]
    assert (found["lowest"], found["highest"], found["mean"], found["nans"]) == (2.0, None, None, 1)
