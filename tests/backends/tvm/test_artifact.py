"""What an artefact holds, and that nothing of a damaged, foreign or malicious one is loaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm")

import artefacts  # noqa: E402

from burnish.backends import tvm as backend  # noqa: E402
from burnish.backends.aside import BEFORE  # noqa: E402
from burnish.backends.tvm import artifact, weights_file  # noqa: E402
from burnish.ir.errors import InputError  # noqa: E402


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return artefacts.write(tmp_path_factory.mktemp("made") / "out")


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(made, tmp_path / "out"))


def test_the_manifest_says_what_the_folder_holds(made: Path) -> None:
    said = json.loads((made / "manifest.json").read_text())
    assert (said["format"], said["version"], said["verified"]) == ("burnish-artefact", 1, True)
    assert said["inputs"][0] == {"name": "x", "dtype": "float32", "shape": ["batch", "seq", 8]}
    assert [one["name"] for one in said["outputs"]] == ["y", "j"]
    (step,) = said["steps"]
    assert (step["kind"], step["function"], step["weights"]) == ("tvm", "region_0", ["w"])
    assert step["evidence"]["error"] <= step["evidence"]["allowed"] == 1e-4
    for one in said["files"]:
        content = (made / one["path"]).read_bytes()
        assert (len(content), sha256(content).hexdigest()) == (one["bytes"], one["sha256"])


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "code changed": (lambda f: flip(f / "code.so", 5000), "SHA-256"),
    "weights changed": (lambda f: flip(f / "weights.safetensors", -5), "SHA-256"),
    "header of the weights changed": (lambda f: flip(f / "weights.safetensors", 3), "header|SHA-256"),
    "code cut off": (lambda f: os.truncate(f / "code.so", 100), "bytes in place of"),
    "weights cut off": (lambda f: os.truncate(f / "weights.safetensors", 100), "bytes in place of"),
    "code missing": (lambda f: (f / "code.so").unlink(), "missing"),
    "manifest missing": (lambda f: (f / "manifest.json").unlink(), "no artefact"),
    "manifest cut off": (lambda f: os.truncate(f / "manifest.json", 300), "cannot be read"),
    "manifest of zeros": (lambda f: (f / "manifest.json").write_bytes(b"\0" * 50), "cannot be read"),
    "manifest nested deeply": (lambda f: (f / "manifest.json").write_bytes(b"[" * 100000), "cannot be read"),
    "another format": (lambda f: artefacts.change(f, lambda m: m.update(format="x")), "no manifest of burnish"),
    "a newer format": (lambda f: artefacts.change(f, lambda m: m.update(version=2)), "format 2"),
    "another TVM": (lambda f: artefacts.change(f, lambda m: m["versions"].update({"apache-tvm": "0.1"})), "0.1, and"),
    "another field": (lambda f: artefacts.change(f, lambda m: m.update(run="rm")), "cannot be read"),
    "no files listed": (lambda f: artefacts.change(f, lambda m: m.update(files=[])), "does not list `code.so`"),
    "weights not listed": (lambda f: artefacts.change(f, lambda m: m["files"].pop()), "does not list `weights"),
    "another processor": (lambda f: artefacts.change(f, lambda m: m.update(extensions=["avx9"])), "lacks avx9"),
    "another function": (
        lambda f: artefacts.change(f, lambda m: m["steps"][0].update(function="nothing")),
        "no function `nothing`",
    ),
    "another weight": (
        lambda f: artefacts.change(f, lambda m: m["steps"][0].update(weights=["v"])),
        "`v` is not in it",
    ),
    "a value that nothing makes": (
        lambda f: artefacts.change(f, lambda m: m["steps"][0].update(inputs=["x", "k"])),
        "nothing makes the value `k`",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_foreign_artefact_is_refused(folder: Path, damage: str) -> None:
    act, message = DAMAGES[damage]
    act(folder)
    with pytest.raises(InputError, match=message):
        backend.load(folder)


@pytest.mark.parametrize(
    "path", ["../secret", "/etc/passwd", "a/../../secret", "", ".", "records/../../secret", "a\0b", "a\\b"]
)
def test_a_manifest_cannot_lead_out_of_the_folder(folder: Path, path: str) -> None:
    (folder.parent / "secret").write_bytes(b"")
    entry = {"path": path, "sha256": sha256(b"").hexdigest(), "bytes": 0}
    artefacts.change(folder, lambda m: m["files"].append(entry))
    with pytest.raises(InputError, match="leads out of the folder"):
        backend.load(folder)


@pytest.mark.parametrize("name", ["code.so", "weights.safetensors", "manifest.json"])
def test_links_are_refused(folder: Path, name: str) -> None:
    shutil.move(folder / name, folder.parent / name)
    (folder / name).symlink_to(folder.parent / name)
    with pytest.raises(InputError, match="link|no file of its own"):
        backend.load(folder)


def test_hashes_are_checked_before_code_is_loaded(folder: Path) -> None:
    """A library that would end the process when it is loaded; the manifest lists another hash."""
    source = folder.parent / "die.c"
    source.write_text("#include <stdlib.h>\n__attribute__((constructor)) void die(void) { _Exit(7); }\n")
    subprocess.run(["gcc", "-shared", "-fPIC", source, "-o", folder / "code.so"], check=True)
    size = (folder / "code.so").stat().st_size
    artefacts.change(folder, lambda m: m["files"][0].update(bytes=size))
    code = f"from burnish.backends import tvm; tvm.load({str(folder)!r})"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=False)
    assert ran.returncode == 1 and "SHA-256" in ran.stderr


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(__file__).parents[3] / ".src")}


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        backend.load(tmp_path / "nothing")
    with pytest.raises(InputError, match="no artefact"):
        backend.load(tmp_path)


def manifest() -> artifact.Manifest:
    return artifact.Manifest(target="llvm", versions={}, fingerprint="", inputs=(), outputs=(), steps=())


def test_without_a_commit_nothing_is_left_and_the_older_artefact_stays(folder: Path) -> None:
    before = {one.name: one.read_bytes() for one in folder.iterdir()}
    with pytest.raises(KeyboardInterrupt), artifact.staged(folder) as stage:
        (stage.path / "code.so").write_bytes(b"half")
        raise KeyboardInterrupt
    assert {one.name: one.read_bytes() for one in folder.iterdir()} == before
    assert os.listdir(folder.parent) == ["out"]


def test_a_commit_that_fails_puts_the_older_artefact_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(os.listdir(folder))
    rename = os.rename

    def refuse(source: Path, target: Path) -> None:
        if Path(target) == folder and Path(source).parent.name != BEFORE:
            raise OSError(28, "No space left on device")
        rename(source, target)

    with artifact.staged(folder) as stage:
        stage.seal(manifest())
        monkeypatch.setattr(os, "rename", refuse)
        with pytest.raises(InputError, match="No space left"):
            stage.commit()
    assert sorted(os.listdir(folder)) == before and os.listdir(folder.parent) == ["out"]


def test_a_process_killed_between_the_two_renames_is_put_right_by_the_next(folder: Path) -> None:
    before = sorted(os.listdir(folder))
    code = f"""
import os, signal
from pathlib import Path
from burnish.backends.tvm import artifact
folder, rename = Path({str(folder)!r}), os.rename
def killed(source, target):
    if Path(target) == folder:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
with artifact.staged(folder) as stage:
    stage.seal(artifact.Manifest(target="llvm", versions={{}}, fingerprint="", inputs=(), outputs=(), steps=()))
    os.rename = killed
    stage.commit()
"""
    ran = subprocess.run([sys.executable, "-c", code], env=environment(), check=False)
    assert ran.returncode == -9 and not folder.exists()
    with artifact.staged(folder.parent / "other"):
        pass
    assert sorted(os.listdir(folder)) == before and os.listdir(folder.parent) == ["out"]


def test_weights_are_a_safetensors_file_that_others_read(tmp_path: Path) -> None:
    from ml_dtypes import bfloat16

    draw = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "a": draw.standard_normal((3, 5)).astype(np.float32),
        "ü/.0": draw.integers(0, 9, (2, 1, 2)),
        "scalar": np.array(3, np.int8),
        "empty": np.zeros((0, 4), np.float16),
        "half": draw.standard_normal(7).astype(bfloat16),
        "yes": np.array([True, False]),
    }
    file, seen = tmp_path / "w.safetensors", sha256()
    weights_file.write(file, arrays)
    with open(file, "rb") as stream:
        found = weights_file.read(file, stream, seen.update)
    assert seen.hexdigest() == sha256(file.read_bytes()).hexdigest()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype and np.array_equal(found[name], array)
        assert not array.size or found[name].ctypes.data % 64 == 0
    theirs = pytest.importorskip("safetensors.numpy")
    other = theirs.load_file(file)
    assert set(other) == set(arrays) and np.array_equal(other["a"], arrays["a"])


@pytest.mark.parametrize(
    "header",
    [
        b"{}extra",
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}',
        b'{"a":{"dtype":"X","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
        b'["a"]',
        b'{"a":3}',
        b"[" * 10000,
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: bytes) -> None:
    file = tmp_path / "w.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with open(file, "rb") as stream, pytest.raises(InputError, match="no safetensors file"):
        weights_file.read(file, stream, lambda block: None)
