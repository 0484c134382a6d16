"""`optimize --report out.html` as a user runs it."""

import sys
from pathlib import Path

import pytest

from burnish.tools import cli
from burnish.tools.page import render

DEMO = Path(cli.__file__).parent / "demo"


@pytest.fixture
def optimize(monkeypatch, capsys, tmp_path):
    """Runs the command in this process: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["optimize", str(DEMO / "digits_resnet.onnx"), *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            cli.optimize_main()
        said = capsys.readouterr()
        return int(stopped.value.code or 0), said.out, said.err

    return run


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
