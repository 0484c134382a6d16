"""`burnish check lock` and `run`, and the same in Python: exit codes, files, GitHub Actions, what is refused."""

from __future__ import annotations

import json
import os
import resource
import shlex
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import numpy_helper

import burnish
from burnish.ir.errors import InputError
from burnish.tools import terminal
from burnish.tools.check_command import check_command

BODY = """
<ir_version: 10, opset_import: ["": 21]>
g (float[N,4] x) => (float[N,4] y)
<float[4] a = {1.0, 2.0, 3.0, 4.0}>
{
  [first] p = Mul (x, a)
  [second] y = Tanh (p)
}
"""


def save(path: Path, text: str = BODY, scale: float = 1.0) -> Path:
    """A model's file; the weight scaled."""
    model = onnx.parser.parse_model(text)
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor) * np.float32(scale)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(model, path)
    return path


def check(*arguments: str | Path) -> Result:
    """The command's result; our own errors are raised."""
    result = CliRunner().invoke(check_command, list(map(str, arguments)), standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model with its lock beside it; the current folder is theirs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    save(tmp_path / "m.onnx")
    check("lock", "m.onnx")
    return tmp_path / "m.onnx"


def test_what_was_locked_passes(model: Path) -> None:
    assert (model.parent / "m.lock.yaml").is_file()
    result = check("run", "m.onnx")
    assert (result.return_value, result.stdout) == (0, "`m.onnx` is what `m.lock.yaml` says\n")


def test_one_run_writes_every_report(model: Path) -> None:
    save(model, scale=1.5)
    result = check("run", "m.onnx", "--json", "r.json", "--junit", "r.xml", "--sarif", "r.sarif")
    assert result.return_value == 1
    assert result.stdout.startswith("`m.onnx` regressed from `m.lock.yaml`: ")
    assert json.loads(Path("r.json").read_text(encoding="utf-8"))["verdict"] == "regression"
    assert ET.parse("r.xml").getroot().get("failures") != "0"
    (run,) = json.loads(Path("r.sarif").read_text(encoding="utf-8"))["runs"]
    first = run["results"][0]
    region = first["locations"][0]["physicalLocation"]["region"]["startLine"]
    assert first["level"] == "error" and region > 1
    assert json.loads(check("run", "m.onnx", "--json", "-").stdout) == json.loads(Path("r.json").read_text("utf-8"))


def test_the_old_model_names_the_node_where_the_numbers_part(model: Path) -> None:
    save(model.parent / "new.onnx", BODY.replace("Tanh", "Sigmoid"))
    result = check("run", "new.onnx", "--lock", "m.lock.yaml", "--old", "m.onnx")
    assert "Sigmoid" in result.stdout.splitlines()[0]
    assert "second" in result.stdout


def test_an_update_takes_over_another_order_of_outputs(model: Path) -> None:
    text = BODY.replace("(float[N,4] y)", "(float[N,4] y, float[N,4] z)").replace("[first]", "z = Tanh (x) [first]")
    check("lock", save(model, text), "-o", "two.lock.yaml")
    save(model, text.replace("float[N,4] y, float[N,4] z", "float[N,4] z, float[N,4] y"))
    assert check("run", model, "--lock", "two.lock.yaml").return_value == 1
    assert "`two.lock.yaml` is written anew" in check("run", model, "--lock", "two.lock.yaml", "--update").output
    assert check("run", model, "--lock", "two.lock.yaml").return_value == 0


def test_an_update_is_accepted_once(model: Path) -> None:
    save(model, scale=1.5)
    result = check("run", "m.onnx", "--update")
    assert result.return_value == 0
    assert result.stdout.startswith("`m.lock.yaml` is written anew\naccepted ")
    assert check("run", "m.onnx").return_value == 0
    before = Path("m.lock.yaml").read_bytes()
    assert check("run", "m.onnx", "--update").stdout == "`m.lock.yaml` stays as it is\n"
    assert Path("m.lock.yaml").read_bytes() == before


def test_tolerances_are_read_from_a_file(model: Path) -> None:
    save(model, scale=1.001)
    Path("t.yaml").write_text("weights: 1%\nvalues: 1%\n", encoding="utf-8")
    assert check("run", "m.onnx").return_value == 1
    result = check("run", "m.onnx", "--tolerance", "t.yaml")
    assert result.return_value == 0
    assert "within tolerance" in result.stdout and "tolerated" in result.stdout


def test_without_running_outputs_are_not_compared(model: Path) -> None:
    found = check("run", "m.onnx", "--no-run")
    assert found.return_value == 0
    assert "not run" in found.stdout


def test_samples_that_were_given_are_asked_for(model: Path) -> None:
    np.savez("d.npz", x=np.ones((3, 4), np.float32))
    assert "1 output on" in check("lock", "m.onnx", "--data", "d.npz").stdout
    assert check("run", "m.onnx", "--data", "d.npz").return_value == 0
    assert check("run", "m.onnx", "--no-run").return_value == 0
    with pytest.raises(InputError, match="samples that were given") as caught:
        check("run", "m.onnx")
    assert "--data" in str(caught.value.hint)


def test_github_actions_get_annotations_and_a_summary(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "summary.md")
    monkeypatch.setenv("GITHUB_WORKSPACE", str(model.parent))
    save(model, scale=1.5)
    first = check("run", "m.onnx")
    assert "::error file=m.lock.yaml,line=" in first.stderr
    assert "::" not in first.stdout
    check("run", "m.onnx", "--json", "-")
    summary = Path("summary.md").read_text(encoding="utf-8")
    assert summary.count("### ") == 2 and "**regression**" in summary


@pytest.mark.parametrize("name", ["x\n::error::y", "##[error]x", "::add-mask::x", "\x1b[31m", "<img src=a>|`b`"])
def test_names_of_a_model_are_no_commands(name: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "summary.md")
    proto = onnx.load("m.onnx")
    proto.graph.input[0].name = proto.graph.node[0].input[0] = proto.graph.node[1].name = name
    proto.graph.node[1].op_type = "Sigmoid"
    onnx.save(proto, "m.onnx")
    result = check("run", "m.onnx", "--no-run")
    assert result.return_value == 1
    assert all(one.isprintable() and not one.startswith("::") for one in result.stdout.splitlines())
    assert "##[" not in result.stdout
    assert all(one.startswith(("::error file=m.lock.yaml,", "::notice file=")) for one in result.stderr.splitlines())
    assert "<img" not in Path("summary.md").read_text(encoding="utf-8")


def test_a_check_that_cannot_be_made_is_reported_too(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "summary.md")
    model.write_bytes(b"no model")
    options = ["run", "m.onnx", "--json", "r.json", "--junit", "r.xml", "--sarif", "r.sarif"]
    result = CliRunner().invoke(check_command, options, standalone_mode=False)
    assert isinstance(result.exception, InputError)
    assert result.stderr.startswith("::error file=")
    found = json.loads(Path("r.json").read_text(encoding="utf-8"))
    assert (found["verdict"], found["reason"]) == ("failed", f"m.onnx: {result.exception.cause}")
    assert ET.parse("r.xml").getroot().get("errors") == "1"
    (run,) = json.loads(Path("r.sarif").read_text(encoding="utf-8"))["runs"]
    assert run["invocations"][0]["executionSuccessful"] is False
    assert "was not checked" in Path("summary.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["run", "other.onnx"], "there is no such lock file"),
        (["run", "m.onnx", "--lock", "nowhere.lock.yaml"], "there is no such lock file"),
        (["run", "nowhere.onnx"], "nowhere.onnx"),
        (["run", "m.onnx", "--lock", "m.onnx"], "m.onnx"),
        (["run", "m.onnx", "--old", "nowhere.onnx"], "nowhere.onnx"),
        (["run", "m.onnx", "--tolerance", "nowhere.yaml"], "nowhere.yaml"),
        (["run", "m.onnx", "--json", "m.onnx"], "this file is read"),
        (["run", "m.onnx", "--json", "m.lock.yaml"], "this file is read"),
        (["run", "m.onnx", "--json", "-", "--junit", "-"], "goes there already"),
        (["run", "m.onnx", "--junit", "nowhere/r.xml"], "there is no such folder"),
        (["lock", "m.onnx", "-o", "notes.txt"], "no lock file"),
        (["lock", "m.onnx", "-o", "m.onnx"], "this file is read"),
        (["lock", "nowhere.onnx"], "nowhere.onnx"),
    ],
)
def test_what_cannot_be_done_is_said_and_leaves_everything(model: Path, arguments: list[str], cause: str) -> None:
    save(model.parent / "other.onnx")
    Path("notes.txt").write_text("mine", encoding="utf-8")
    before = {path: path.read_bytes() for path in model.parent.iterdir()}
    with pytest.raises(InputError) as caught:
        check(*arguments)
    assert cause in str(caught.value)
    assert caught.value.hint
    assert {path: path.read_bytes() for path in model.parent.iterdir()} == before


def test_exit_codes_of_the_program(model: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(burnish.__file__).parents[1])}
    start = "from burnish.tools.cli import main; main()"

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", start, "check", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    save(model, scale=1.5)
    assert run("run", "m.onnx").returncode == 1
    missing = run("run", "m.onnx", "--lock", "nowhere")
    assert (missing.returncode, missing.stdout) == (2, "")
    assert "hint: write it with `burnish check lock -o nowhere m.onnx`" in missing.stderr


def test_the_same_in_python(model: Path) -> None:
    lock = burnish.lock("m.onnx")
    assert lock == burnish.lock(burnish.load("m.onnx"), "again.lock.yaml")
    assert burnish.check("m.onnx", "again.lock.yaml").passed
    changed = onnx.parser.parse_model(BODY.replace("Tanh", "Sigmoid"))
    report = burnish.check(changed, lock, old="m.onnx")
    assert not report.passed
    assert (report.model, report.lock) == ("ModelProto", "")


@pytest.fixture
def several(model: Path) -> list[str]:
    """Three models: one as it was, one that regressed, one without a lock."""
    save(model.parent / "changed.onnx")
    check("lock", "changed.onnx")
    save(model.parent / "changed.onnx", scale=1.5)
    save(model.parent / "free.onnx")
    return ["m.onnx", "free.onnx", "changed.onnx"]


def test_of_several_models_each_has_the_lock_beside_it(several: list[str]) -> None:
    reports = ("--json", "r.json", "--junit", "r.xml", "--sarif", "r.sarif", "--report", "r.html")
    result = check("run", "--if-locked", *several, *reports)
    assert result.return_value == 1
    first, second, *_ = result.stdout.splitlines()
    assert first == "`m.onnx` is what `m.lock.yaml` says"
    assert second.startswith("`changed.onnx` regressed from `changed.lock.yaml`: ")
    assert "free.onnx" not in result.stdout
    document = json.loads(Path("r.json").read_text(encoding="utf-8"))
    states = [(one["model"], one["state"]) for one in document["models"]]
    assert states == [("m.onnx", "fine"), ("changed.onnx", "regression")]
    assert [suite.get("name") for suite in ET.parse("r.xml").getroot()] == ["m.onnx", "changed.onnx"]
    assert "changed.onnx" in Path("r.html").read_text(encoding="utf-8")
    assert check("run", "--if-locked", *several, "--update").return_value == 0
    assert check("run", "--if-locked", *several).return_value == 0


def test_a_model_that_cannot_be_checked_does_not_stop_the_others(several: list[str]) -> None:
    with pytest.raises(InputError, match="there is no such lock file") as caught:
        check("run", "nowhere.onnx", *several, "--json", "r.json")
    assert caught.value.place == "free.lock.yaml"
    states = [one["state"] for one in json.loads(Path("r.json").read_text(encoding="utf-8"))["models"]]
    assert states == ["failed", "fine", "failed", "regression"]


def test_a_model_without_a_lock_is_left_alone_on_request(several: list[str]) -> None:
    result = check("run", "--if-locked", "free.onnx", "--json", "r.json")
    assert (result.return_value, result.stdout) == (0, "")
    assert json.loads(Path("r.json").read_text(encoding="utf-8"))["models"] == []


@pytest.mark.parametrize("option", ["--lock", "--old", "--data"])
def test_options_for_one_model_are_refused_for_several(several: list[str], option: str) -> None:
    with pytest.raises(InputError, match="this is for one model"):
        check("run", *several, option, "m.onnx")


def test_nothing_is_called_written_that_was_not(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = Path("m.lock.yaml").read_bytes()
    save(model, scale=1.5)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 9, limit[1]))  # as a full disk
    try:
        with pytest.raises(SystemExit) as ended:
            terminal.run(check_command, args=["run", "m.onnx", "--update"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    said = capfd.readouterr()
    assert (ended.value.code, said.out) == (2, "")
    assert said.err.startswith("error: m.lock.yaml: it cannot be written: ") and "has room" in said.err
    assert Path("m.lock.yaml").read_bytes() == before and not list(Path().glob(".burnish*"))


def test_a_renewed_lock_keeps_its_rights(model: Path) -> None:
    save(model, scale=1.5)
    os.chmod("m.lock.yaml", 0o600)
    check("run", "m.onnx", "--update")
    assert os.stat("m.lock.yaml").st_mode & 0o777 == 0o600
    os.chmod("m.lock.yaml", 0o444)
    save(model, scale=2.5)
    if os.geteuid() != 0:  # who may write everything
        with pytest.raises(InputError, match="read-only"):
            check("run", "m.onnx", "--update")


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("a b.onnx", "burnish check lock 'a b.onnx'"),
        ("-x.onnx", "burnish check lock -- -x.onnx"),
        ("$(id).onnx", "burnish check lock '$(id).onnx'"),
    ],
)
def test_the_command_of_a_hint_can_be_run(model: Path, name: str, command: str) -> None:
    save(Path(name))
    with pytest.raises(InputError) as caught:
        check("run", "--", name)
    assert caught.value.hint == f"write it with `{command}`"
    assert check(*shlex.split(command)[2:]).return_value == 0
    assert check("run", "--", name).return_value == 0


def test_models_of_other_names_have_locks_of_their_own(model: Path) -> None:
    for version, scale in ((1, 1.0), (2, 2.0)):
        save(Path(f"encoder.v{version}"), scale=scale)
        check("lock", f"encoder.v{version}")
    for version in (1, 2):
        assert check("run", f"encoder.v{version}").return_value == 0
        assert Path(f"encoder.v{version}.lock.yaml").is_file()
    for folder in (".", "..", "/"):
        for command in ("lock", "run"):
            with pytest.raises(InputError):
                check(command, folder)


def test_a_lock_of_the_graph_alone_runs_nothing(model: Path) -> None:
    text = BODY.replace('["": 21]', '["": 21, "own": 1]').replace("Tanh", "own.Thing")
    save(Path("own.onnx"), text)
    with pytest.raises(InputError, match="cannot load the model"):
        check("lock", "own.onnx")
    check("lock", "own.onnx", "--no-run")
    before = Path("own.lock.yaml").read_bytes()
    result = check("run", "own.onnx", "--update")
    assert (result.return_value, result.stdout) == (0, "`own.lock.yaml` stays as it is\n")
    save(Path("own.onnx"), text.replace("own.Thing", "own.Other"))
    assert "own.Other" in check("run", "own.onnx").stdout.splitlines()[0]
    assert Path("own.lock.yaml").read_bytes() == before


def test_an_old_model_that_was_not_locked_is_refused(model: Path) -> None:
    save(Path("other.onnx"), scale=3.0)
    with pytest.raises(InputError, match="not the one that was locked") as caught:
        check("run", "m.onnx", "--old", "other.onnx")
    assert caught.value.place == "m.lock.yaml"


def test_a_graph_that_contradicts_itself_is_no_defect_of_ours(model: Path) -> None:
    graph = '<ir_version: 10, opset_import: ["": 21]> g (float[2,4] x) => (float[2,4] y, int64[R] r)'
    save(Path("bad.onnx"), graph + " { y = Relu (x)  q = Shape (x)  r = Concat <axis = 1> (q, q) }")
    for options in ((), ("--no-run",)):
        with pytest.raises(InputError):
            check("run", "bad.onnx", "--lock", "m.lock.yaml", *options)
    with pytest.raises(InputError, match="not valid ONNX"):
        check("lock", "bad.onnx", "--no-run")


def test_a_metric_that_cannot_be_told_is_not_refused_by_the_model(model: Path) -> None:
    np.savez("d.npz", x=np.ones((3, 4), np.float32), labels=np.array([0, 1, 3]))
    with pytest.raises(InputError, match="`auc` takes two") as caught:
        check("lock", "m.onnx", "-o", "n.lock.yaml", "--data", "d.npz", "--metric", "auc")
    assert "refuses" not in caught.value.cause
    assert not Path("n.lock.yaml").exists()
