"""What a user may give by mistake: one message, exit code 2, nothing written, and no file of theirs touched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from burnish.tools import cli

MODEL = """
<ir_version: 8, opset_import: ["": 17]>
g (float[N, 4] x) => (float[N, 4] y) { a = Identity (x)  y = Relu (a) }
"""
FUNCTIONS = """
import sys
import numpy as np

number = 3

def fails(): raise RuntimeError("boom")
def leaves(): sys.exit(0)
def number_of(): return 42
def nothing(): return None
def texts(): return ["a"]
def half():
    yield {"x": np.ones((1, 4), np.float32)}
    sys.exit(0)
def other_name(): return [{"z": np.ones((1, 4), np.float32)}]
def ragged(): return [{"x": [[1.0, 2.0], [3.0]]}]
def objects(): return [{"x": np.array([object()])}]
def none_at_all(): return []
def needs(one): return one
"""
CALL = (
    "import sys; sys.argv = ['optimize', *sys.argv[1:]]\nfrom burnish.tools.cli import optimize_main\noptimize_main()"
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    onnx.save(onnx.parser.parse_model(MODEL), tmp_path / "model.onnx")
    (tmp_path / "bad_samples.py").write_text(FUNCTIONS)
    (tmp_path / "leaves_at_once.py").write_text("raise SystemExit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["optimize", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        cli.optimize_main()
    return int(stopped.value.code or 0), capsys.readouterr().err


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def environment() -> dict[str, str]:
    return dict(os.environ, PYTHONPATH=str(Path(cli.__file__).parents[2]))


def arrays(x: np.ndarray, **more: np.ndarray) -> dict[str, np.ndarray]:
    return {"x": x, **more}


ONES = np.ones((2, 4), np.float32)
DATA: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "objects": (arrays(np.array([object()])), "Python objects"),
    "records": (arrays(np.zeros((2, 4), [("a", "f4")])), "records"),
    "dates": (arrays(np.zeros((2, 4), "M8[s]")), "datetime64"),
    "complex numbers": (arrays(ONES.astype(np.complex64)), "complex64"),
    "integers": (arrays(ONES.astype(int)), "int64"),
    "too large": (arrays(np.full((2, 4), 1e300)), "too large"),
    "other dims": (arrays(np.ones((2, 5), np.float32)), "length 5"),
    "no samples": (arrays(np.ones((0, 2, 4), np.float32)), "no samples"),
    "labels of samples": (arrays(np.ones((5, 2, 4), np.float32), labels=np.ones(3)), "3 labels for 5"),
    "labels of rows": (arrays(np.ones((5, 4), np.float32), labels=np.ones(3)), "3 labels for 5"),
    "another name": ({"xx": ONES}, "did you mean it by `xx`?"),
    "an array too many": (arrays(ONES, z=ONES), "no input `z`"),
}


@pytest.mark.parametrize("what", DATA)
def test_arrays_that_are_no_samples(what, folder, capsys, monkeypatch):
    given, cause = DATA[what]
    np.savez(folder / "data.npz", **given)  # type: ignore[arg-type]
    before = content(folder)
    code, err = run(capsys, monkeypatch, "model.onnx", "-o", "out.onnx", "--data", "data.npz")
    assert code == 2 and err.startswith("error: ") and cause in err, err
    assert content(folder) == before


@pytest.mark.parametrize(
    "name, cause",
    [
        ("bad_samples:fails", "RuntimeError: boom"),
        ("bad_samples:leaves", "SystemExit"),
        ("bad_samples:half", "reading sample 1 failed: SystemExit"),
        ("bad_samples:number_of", "cannot be iterated"),
        ("bad_samples:nothing", "cannot be iterated"),
        ("bad_samples:texts", "a sample is a str"),
        ("bad_samples:other_name", "`x` is missing"),
        ("bad_samples:ragged", "no array"),
        ("bad_samples:objects", "not numbers"),
        ("bad_samples:none_at_all", "no samples"),
        ("bad_samples:needs", "missing 1 required"),
        ("bad_samples:number", "no function `number`\n\nhint: did you mean `number_of`?"),
        ("leaves_at_once:samples", "SystemExit"),
        ("not_there_at_all:samples", "No module named"),
        ("", "no such file"),
    ],
)
def test_functions_that_give_no_samples(name, cause, folder, capsys, monkeypatch):
    before = content(folder)
    code, err = run(capsys, monkeypatch, "model.onnx", "-o", "out.onnx", "--data", name)
    assert code == 2 and err.startswith("error: ") and cause in err, err
    assert content(folder) == before


@pytest.mark.parametrize(
    "words, cause",
    [
        (["-o", "out.onnx/"], "is a folder"),
        (["-o", "model.onnx/out.onnx"], "is not a folder"),
        (["-o", "link.onnx"], "being read"),
        (["-o", "hard.onnx"], "being read"),
        (["-o", "recipe.yaml", "--recipe", "recipe.yaml"], "being read"),
        (["-o", "data.npz", "--data", "data.npz"], "being read"),
        (["-o", "/dev/full"], "not a regular file"),
        (["-o", "x" * 300], "name too long"),
        (["-o", "out.onnx", "--report", "model.onnx"], "no report"),
        (["-o", "out.onnx", "--report", "out.onnx"], "same name"),
        (["-o", "out.onnx", "--report", "/dev/full"], "cannot be written there"),
        (["-o", "out.onnx", "--opset", "12"], "older opset"),
        (["-o", "out.onnx", "--recipe", "deep.yaml"], "nested too deeply"),
        (["-o", "out.onnx", "--recipe", "twice.yaml"], "given twice"),
        (["-o", "out.onnx", "-p", "quantize-weights{bits=8,bits=4}"], "`bits` of `quantize-weights` is given twice"),
    ],
)
def test_targets_and_recipes_that_cannot_be(words, cause, folder, capsys, monkeypatch):
    (folder / "link.onnx").symlink_to(folder / "model.onnx")
    (folder / "hard.onnx").hardlink_to(folder / "model.onnx")
    (folder / "recipe.yaml").write_text("passes: [drop-identity]\n")
    (folder / "twice.yaml").write_text("passes: [drop-identity]\npasses: [drop-unused]\n")
    (folder / "deep.yaml").write_text("[" * 5000)
    np.savez(folder / "data.npz", x=ONES)
    before = content(folder)
    code, err = run(capsys, monkeypatch, "model.onnx", *words)
    assert code == 2 and err.startswith("error: ") and cause.lower() in err.lower(), err
    assert content(folder) == before


def test_a_path_that_is_too_long_is_an_error(folder, capsys, monkeypatch):
    code, err = run(capsys, monkeypatch, "a/" * 3000, "-o", "out.onnx")
    assert code == 2 and err.startswith("error: ") and "defect" not in err


def test_a_defect_is_one_message_with_its_place(folder, capsys, monkeypatch):
    from burnish.tools import api

    monkeypatch.setattr(api, "optimize", lambda *given, **named: {}["key"])
    code, err = run(capsys, monkeypatch, "model.onnx", "-o", "out.onnx")
    assert code == 2 and err.startswith("error: KeyError: 'key'") and "test_bad_input.py:" in err


@pytest.mark.parametrize("name", ["a b.onnx", "日本 é.onnx", "new\nline.onnx", "-dash.onnx", "[red]%s{0}'\"`$.onnx"])
def test_any_name_is_a_name(name, folder, capsys, monkeypatch):
    (folder / name).write_bytes((folder / "model.onnx").read_bytes())
    code, err = run(capsys, monkeypatch, "-o", f"out {name}", "--verify", "off", "--", name)
    assert code == 0 and (folder / f"out {name}").exists(), err


def shell(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a line of bash in which `optimize` is the command."""
    line = f'optimize() {{ "{sys.executable}" -c "$CALL" "$@"; }}; {line}'
    return subprocess.run(
        ["bash", "-c", line], cwd=folder, env=environment() | {"CALL": CALL}, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "line, code",
    [
        ("optimize model.onnx -o out.onnx --verify off >&-", 0),
        ("optimize model.onnx -o out.onnx --verify off 2>&- <&-", 0),
        ("optimize model.onnx -o out.onnx --verify off >/dev/full", 2),
        ("PYTHONIOENCODING=ascii optimize nicht-da-\u65e5.onnx -o out.onnx", 2),
        ("set -o pipefail; optimize --help | true", 0),
    ],
)
def test_streams_that_are_closed_full_or_ascii(line, code, folder):
    found = shell(line, folder)
    assert found.returncode in (code, 141) and "Traceback" not in found.stderr and "Exception" not in found.stderr
    assert found.returncode != 2 or found.stderr.startswith("error: ")


def test_without_a_runtime_the_error_gives_the_pip_line(folder):
    block = (
        "import sys\nclass Absent:\n    def find_spec(self, name, *rest):\n"
        "        if name.split('.')[0] == 'onnxruntime': raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    words = [sys.executable, "-c", block + CALL, "model.onnx", "-o", "out.onnx"]
    found = subprocess.run(words, cwd=folder, env=environment(), capture_output=True, text=True)
    assert found.returncode == 2 and "pip install 'burnish[cpu]'" in found.stderr, found.stderr
    assert not (folder / "out.onnx").exists()
    assert (
        subprocess.run([*words, "--verify", "off"], cwd=folder, env=environment(), capture_output=True).returncode == 0
    )


def test_the_runtime_reports_nothing_to_its_maker(folder):
    code = (
        "import os\nfrom burnish.backends.ort import session\nsession.runtime()\n"
        "print(os.environ['ORT_DISABLE_TELEMETRY'])"
    )
    given = {name: value for name, value in environment().items() if name != "ORT_DISABLE_TELEMETRY"}
    found = subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, text=True, check=True)
    assert found.stdout == "1\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_end_at_any_moment_leaves_the_old_file_or_the_new_one(number, folder):
    words = [sys.executable, "-c", CALL, "model.onnx", "-o", "out.onnx", "--verify", "off"]
    subprocess.run(words, cwd=folder, env=environment(), check=True, capture_output=True)
    whole, names = (folder / "out.onnx").read_bytes(), sorted(path.name for path in folder.iterdir())
    for delay in (0.3, 0.45, 0.6):
        (folder / "out.onnx").write_bytes(b"old")
        with subprocess.Popen(words, cwd=folder, env=environment(), stdout=-3, stderr=-3) as process:
            time.sleep(delay)
            process.send_signal(number)
        assert (folder / "out.onnx").read_bytes() in (b"old", whole)
        assert sorted(path.name for path in folder.iterdir()) == names


def test_two_that_write_one_file_leave_one_whole_file(folder):
    words = [sys.executable, "-c", CALL, "model.onnx", "-o", "out.onnx", "--verify", "off"]
    both = [subprocess.Popen(words, cwd=folder, env=environment(), stdout=-3, stderr=-3) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    onnx.checker.check_model(onnx.load(folder / "out.onnx"))
    assert not list(folder.glob(".burnish-*"))
