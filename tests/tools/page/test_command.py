"""`optimize --report out.html` as a user runs it."""

from pathlib import Path

import onnx
import onnx.parser
import pytest
from click.testing import CliRunner
from commands import runner

from burnish.ir.errors import InputError
from burnish.tools import cli
from burnish.tools.check import lock_file
from burnish.tools.check_command import check_command
from burnish.tools.page import render

DEMO = Path(cli.__file__).parent / "demo"
MODEL = DEMO / "digits_vit.onnx"


@pytest.fixture
def optimize(monkeypatch, capsys, tmp_path):
    """Runs the command in this process: (exit code, stdout, stderr)."""
    return runner(monkeypatch, capsys, tmp_path, "optimize", DEMO / "digits_resnet.onnx")


def test_the_page_says_what_was_measured_and_may_be_written_again(optimize, tmp_path):
    words = ("-o", "out.onnx", "--report", "out.html")
    assert optimize(*words)[0] == 0
    text = (tmp_path / "out.html").read_text()
    assert render.is_page(text.encode())
    for said in ("digits_resnet.onnx", "fold-batchnorm", "float64", "largest relative error", "blocks", "out.onnx"):
        assert said in text
    assert optimize(*words)[0] == 0


def test_nothing_is_claimed_of_a_run_that_verified_nothing(optimize, tmp_path):
    assert optimize("--dry-run", "--verify", "off", "--guard", "off", "--report", "out.html")[0] == 0
    text = (tmp_path / "out.html").read_text()
    assert "not verified" in text and "nothing was verified" in text
    assert "largest relative error" not in text and "time of a run" not in text
    assert "Counted for batch=1." in text


@pytest.mark.parametrize("head", ["<!doctype html>\n<p>mine</p>", "{}", "notes"])
def test_a_file_that_is_no_report_stays(optimize, tmp_path, head):
    (tmp_path / "out.html").write_text(head)
    code, _, err = optimize("-o", "out.onnx", "--report", "out.html")
    assert code == 2 and "no report" in err
    assert (tmp_path / "out.html").read_text() == head and not (tmp_path / "out.onnx").exists()


@pytest.fixture
def check(monkeypatch, tmp_path):
    """Runs `burnish check` in this process: its exit code; errors of burnish are raised."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)

    def run(*words: object) -> int:
        result = CliRunner().invoke(check_command, [str(word) for word in words], standalone_mode=False)
        if result.exception is not None:
            raise result.exception
        return int(result.return_value)

    return run


def test_a_check_writes_a_page_that_passes_regresses_or_says_why_not(check, changed, tmp_path):
    report, _, _ = changed
    lock_file.write(report.old, "a.lock.yaml")
    words = ("--lock", "a.lock.yaml", "--no-run", "--report", "out.html")
    assert check("run", MODEL, *words) == 0
    assert "passed</span>" in (tmp_path / "out.html").read_text()
    assert check("run", report.model, *words, "--old", MODEL) == 1
    text = (tmp_path / "out.html").read_text()
    assert "regressed</span>" in text and "a.lock.yaml" in text and "Erf is now Tanh" in text
    with pytest.raises(InputError):
        check("run", "missing.onnx", *words)
    assert "could not run</span>" in (tmp_path / "out.html").read_text()


def test_a_matrix_writes_a_page_of_all_models(check, tmp_path):
    for folder, word in (("before", "Relu"), ("after", "Tanh")):
        (tmp_path / folder).mkdir()
        for file, op in (("same", "Abs"), ("other", word)):
            proto = onnx.parser.parse_model(
                f'<ir_version: 8, opset_import: ["": 17]> g (float[2] x) => (float[2] y) {{ y = {op} (x) }}'
            )
            onnx.save(proto, tmp_path / folder / f"{file}.onnx")
    (tmp_path / "after" / "broken.onnx").write_bytes(b"no model")
    (tmp_path / "before" / "broken.onnx").write_bytes(b"no model")
    assert check("matrix", "before", "after", "--jobs", 1, "--no-run", "--report", "out.html") == 2
    text = (tmp_path / "out.html").read_text()
    for said in (
        "3 models: 1 failed, 1 regression, 1 fine",
        "same.onnx",
        "other.onnx",
        "Relu is now Tanh",
        "broken.onnx",
    ):
        assert said in text


@pytest.mark.parametrize("name", ["out.txt", "-", "mine.html"])
def test_a_check_replaces_nothing_that_is_no_page(check, tmp_path, name):
    (tmp_path / "mine.html").write_text("<p>mine</p>")
    with pytest.raises(InputError, match="no report|written as .html"):
        check("run", MODEL, "--lock", "a.lock.yaml", "--report", name)
    assert (tmp_path / "mine.html").read_text() == "<p>mine</p>"
