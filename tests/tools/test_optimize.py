"""`optimize` as a user runs it: exit codes, messages, and that nothing is left behind when it fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from commands import runner

from burnish.tools import cli

MODEL = """
<ir_version: 8, opset_import: ["": 17]>
g (float[N, 3, 8, 8] image) => (float[N, 4, 6, 6] y)
<float[4, 3, 3, 3] w, float[4] scale = {1.0, 2.0, 3.0, 4.0}, float[4] bias = {0.0, 1.0, 0.0, 1.0},
 float[4] mean = {0.1, 0.2, 0.3, 0.4}, float[4] var = {1.0, 2.0, 1.0, 2.0}> {
  c = Conv (image, w)
  b = BatchNormalization (c, scale, bias, mean, var)
  i = Identity (b)
  y = Relu (i)
}
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    proto = onnx.parser.parse_model(MODEL)
    weights = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weights, "w"))
    path = tmp_path / "model.onnx"
    onnx.save(proto, path)
    return path


@pytest.fixture
def optimize(monkeypatch, capsys, tmp_path):
    """Runs the command in this process: (exit code, stdout, stderr)."""
    return runner(monkeypatch, capsys, tmp_path, "optimize")


def test_it_folds_verifies_and_reports(model, optimize, tmp_path):
    given = ("--guard", "size", "--report", tmp_path / "report.json")
    code, out, _ = optimize(model, "-o", tmp_path / "out.onnx", *given)
    assert code == 0
    assert [node.op_type for node in onnx.load(tmp_path / "out.onnx").graph.node] == ["Conv", "Relu"]
    assert "verified" in out and "float64" in out
    report = json.loads((tmp_path / "report.json").read_text())
    fold = next(one for one in report["passes"] if one["pass"] == "fold-batchnorm")
    assert (fold["eligible"], fold["matched"], fold["changed"]) == (1, 1, 1)
    assert report["verification"]["holds"] and report["verification"]["float64"]["relative_error"] < 1e-9


def test_the_same_input_gives_the_same_bytes(model, optimize, tmp_path):
    for name in ("one.onnx", "two.onnx"):
        assert optimize(model, "-o", tmp_path / name, "--guard", "size")[0] == 0
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()


def test_provenance_is_in_the_model(model, optimize, tmp_path):
    optimize(model, "-o", tmp_path / "out.onnx", "--verify", "off")
    kept = {entry.key: entry.value for entry in onnx.load(tmp_path / "out.onnx").metadata_props}
    assert len(kept["burnish.input_sha256"]) == 64
    assert json.loads(kept["burnish.fired"])["fold-batchnorm"] == 1


def test_a_dry_run_writes_nothing(model, optimize, tmp_path):
    before = sorted(tmp_path.iterdir())
    assert optimize(model, "--dry-run")[0] == 0
    assert sorted(tmp_path.iterdir()) == before


def test_why_lists_the_sites_that_were_left(model, optimize, tmp_path):
    code, out, _ = optimize(model, "--dry-run", "--verify", "off", "--why", "fold-batchnorm")
    assert code == 0 and "1 eligible, 1 matched, 1 changed" in out


def test_as_python_runs(model, optimize, tmp_path):
    code, out, _ = optimize(model, "-o", tmp_path / "out.onnx", "--verify", "off", "--as-python")
    assert code == 0 and not (tmp_path / "out.onnx").exists()
    exec(compile(out, "<as-python>", "exec"), {})
    assert (tmp_path / "out.onnx").exists()


def test_as_python_does_the_same_with_every_option(model, optimize, tmp_path, capsys):
    np.savez(tmp_path / "data.npz", image=np.ones((2, 3, 8, 8), np.float32))
    words = [model, "-o", "out.onnx", "--recipe", "normal-form", "-p", "fold-batchnorm{largest_copy=1}"]
    words += ["--without", "share-repeats", "--data", "data.npz", "--target", "ort-cpu", "--opset", "23"]
    words += ["--verify", "each", "--guard", "size", "--require-change", "fold-batchnorm"]
    words += ["--report", "report.json", "--why", "fold-batchnorm"]
    code, said, _ = optimize(*words)
    assert code == 0
    made, report = Path("out.onnx").read_bytes(), json.loads(Path("report.json").read_text())
    Path("out.onnx").unlink()
    Path("report.json").unlink()
    exec(compile(optimize(*words, "--as-python")[1], "<as-python>", "exec"), {})
    assert capsys.readouterr().out == said and Path("out.onnx").read_bytes() == made
    again = json.loads(Path("report.json").read_text())
    for one in (*report["passes"], *again["passes"]):
        del one["cpu_seconds"]
    assert again == report


def test_a_required_pass_that_does_nothing_is_exit_code_4(model, optimize, tmp_path):
    code, _, err = optimize(model, "-o", tmp_path / "out.onnx", "--require-change", "fuse-activation")
    assert code == 4 and "`fuse-activation`" in err and not (tmp_path / "out.onnx").exists()
    assert optimize(model, "-o", tmp_path / "out.onnx", "--require-change", "fold-batchnorm", "--guard", "off")[0] == 0


def test_a_recipe_file_is_followed(model, optimize, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("passes:\n  - lift-constants\n  - infer-types\n  - fold-batchnorm\nverify: each\nguard: off\n")
    assert optimize(model, "-o", tmp_path / "out.onnx", "--recipe", recipe)[0] == 0
    operators = [node.op_type for node in onnx.load(tmp_path / "out.onnx").graph.node]
    assert operators == ["Conv", "Identity", "Relu"]


@pytest.mark.parametrize(
    "text, line, cause",
    [
        ("passes:\n  - fold-batchnorms\n", 2, "fold-batchnorm`?"),
        ("passes:\n  - fold-batchnorm\nverfy: each\n", 3, "verify`?"),
        ("passes:\n  - fold-batchnorm\ntarget: vulkan\n", 3, "`target` cannot be `vulkan`"),
        ("passes:\n  - fold-batchnorm: {speed: 3}\n", 2, "no option `speed`"),
        ("passes: fold-batchnorm\n", 1, "`passes` is a list"),
        ("passes:\n  - [a\n", 3, "not YAML"),
        ("- fold-batchnorm\n", 1, "a recipe is a mapping"),
        ("opset: 17\n", 1, "names no passes"),
        ("passes:\n  - fold-batchnorm\nmax-size: half\n", 3, "write `max-size: 50%`"),
    ],
)
def test_a_mistake_in_a_recipe_is_shown_with_its_line(model, optimize, tmp_path, text, line, cause):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    code, _, err = optimize(model, "-o", tmp_path / "out.onnx", "--recipe", recipe)
    assert code == 2 and f"recipe.yaml:{line}" in err and cause in err
    assert not (tmp_path / "out.onnx").exists()


def _bad_inputs(folder: Path, model: Path) -> dict[str, list[object]]:
    """Command lines that cannot run, by what is wrong with them."""
    text, truncated = folder / "text.onnx", folder / "truncated.onnx"
    text.write_text("not a model")
    truncated.write_bytes(model.read_bytes()[:200])
    wrong_data, foreign = folder / "wrong.npz", folder / "foreign.npz"
    wrong_data.write_text("no archive")
    np.savez(foreign, picture=np.zeros((1, 3, 8, 8), np.float32))
    out = ["-o", folder / "out.onnx"]
    return {
        "no such file": [folder / "nothing.onnx", *out],
        "a folder": [folder, *out],
        "not a model": [text, *out],
        "truncated": [truncated, *out],
        "no output": [model],
        "output equals input": [model, "-o", model],
        "output in no folder": [model, "-o", folder / "nowhere" / "out.onnx"],
        "output is a folder": [model, "-o", folder],
        "unknown pass": [model, *out, "-p", "fold-batchnrom"],
        "unknown option of a pass": [model, *out, "-p", "raise-opset{too=20}"],
        "wrong value of an option": [model, *out, "-p", "raise-opset{to=new}"],
        "unreadable list of passes": [model, *out, "-p", "fold-batchnorm{"],
        "unknown recipe": [model, *out, "--recipe", "smal"],
        "unknown target": [model, *out, "--target", "tpu"],
        "unknown flag": [model, *out, "--fast"],
        "impossible opset": [model, *out, "--opset", "99"],
        "samples that are no archive": [model, *out, "--data", wrong_data],
        "samples that do not fit": [model, *out, "--data", foreign],
        "samples that do not exist": [model, *out, "--data", folder / "none.npz"],
        "required pass not in the recipe": [
            model,
            *out,
            "--recipe",
            "normal-form",
            "--require-change",
            "fold-batchnorm",
        ],
        "report in no folder": [model, *out, "--report", folder / "nowhere" / "r.json"],
    }


def test_bad_input_is_one_message_exit_code_2_and_nothing_written(model, optimize, tmp_path):
    for what, words in _bad_inputs(tmp_path, model).items():
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        code, out, err = optimize(*words)
        assert code == 2, (what, code, err)
        assert err.startswith("error: ") and "Traceback" not in err and not out, (what, err)
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before, what


def test_unknown_names_come_with_the_nearest(model, optimize, tmp_path):
    _, _, err = optimize(model, "-o", tmp_path / "out.onnx", "-p", "fold-batchnrom")
    assert "did you mean `fold-batchnorm`?" in err
    _, _, err = optimize(model, "--dry-run", "-p", "raise-opset{when=never}")
    assert "known are: `always`, `softmax`" in err


def test_an_unknown_operator_is_kept(optimize, tmp_path):
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17, "acme": 1]> g (float[N] x) => (float[N] y)'
        " { a = Identity (x)  b = acme.Turn (a)  y = Relu (b) }"
    )
    onnx.save(proto, tmp_path / "custom.onnx")
    code, out, err = optimize(tmp_path / "custom.onnx", "-o", tmp_path / "out.onnx")
    assert code == 0, err
    assert [node.op_type for node in onnx.load(tmp_path / "out.onnx").graph.node] == ["Turn", "Relu"]
    assert "verified  nothing: the runtime does not know acme.Turn" in out


def _environment() -> dict[str, str]:
    return dict(os.environ, PYTHONPATH=str(Path(cli.__file__).parents[2]))


def test_help_is_quick_and_loads_no_framework():
    code = (
        "import sys; sys.argv = ['optimize', '--help']\n"
        "from burnish.tools.cli import optimize_main\n"
        "try: optimize_main()\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'tvm', 'onnxruntime', 'onnx', 'numpy') if m in sys.modules], file=sys.stderr)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment(), check=True)
    assert found.stderr.strip().splitlines()[-1] == "[]" and "Exit codes" in found.stdout


def test_an_interrupt_leaves_nothing(model, tmp_path):
    code = (
        "import os, signal, sys\n"
        "from burnish.backends import onnx_writer\n"
        "write = onnx_writer._write_files\n"
        "def late(*given):\n    write(*given)\n    os.kill(os.getpid(), signal.SIGINT)\n"
        "onnx_writer._write_files = late\n"
        "from burnish.tools.cli import optimize_main\n"
        f"sys.argv = ['optimize', {str(model)!r}, '-o', {str(tmp_path / 'out.onnx')!r}, '--verify', 'off']\n"
        "optimize_main()"
    )
    before = sorted(tmp_path.iterdir())
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment())
    assert found.returncode == 2 and "interrupted" in found.stderr and "Traceback" not in found.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_a_full_disk_leaves_nothing(model, tmp_path):
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))\n"
        "from burnish.tools.cli import optimize_main\n"
        f"sys.argv = ['optimize', {str(model)!r}, '-o', {str(tmp_path / 'out.onnx')!r}, '--verify', 'off']\n"
        "optimize_main()"
    )
    before = sorted(tmp_path.iterdir())
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment())
    assert found.returncode == 2 and found.stderr.startswith("error: "), found.stderr
    assert sorted(tmp_path.iterdir()) == before
