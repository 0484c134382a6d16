"""How the commands speak: whole rows in files, text as it is, help where help is asked for."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.table import Table

import burnish
from burnish.passes import catalog
from burnish.tools import cli, terminal

Said = tuple[int, str, str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Runs `burnish` in this process: (exit code, stdout, stderr)."""

    def call(*words: str) -> Said:
        with pytest.raises(SystemExit) as ended:
            terminal.run(cli.burnish, prog_name="burnish", args=list(words))
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return call


def test_a_row_of_a_table_is_one_line_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("name", "reason", box=None, pad_edge=False)
    table.add_row("a", "long " * 40)
    table.add_row("b [/x] [batch, 4]", "short")
    terminal.show(table, terminal.out())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and not any(line.endswith(" ") for line in lines)
    assert lines[2] == "b [/x] [batch, 4]  short"


def test_text_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.out().print("[bold]x[/bold] :smile: [1, n]")
    terminal.talk().print("[/] :smile:")
    said = capsys.readouterr()
    assert (said.out, said.err) == ("[bold]x[/bold] :smile: [1, n]\n", "[/] :smile:\n")


def test_burnish_alone_shows_its_help(run: Callable[..., Said]) -> None:
    code, out, err = run()
    assert code == 2 and not out and err.startswith("Usage: burnish") and "error" not in err


def test_the_version(run: Callable[..., Said]) -> None:
    assert run("--version") == (0, f"burnish {burnish.__version__}\n", "")


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(run: Callable[..., Said], command: str) -> None:
    code, out, err = run(command, "--help")
    assert code == 0 and not err and out.startswith(f"Usage: burnish {command}")


def test_every_option_of_a_pass_is_documented(run: Callable[..., Said]) -> None:
    code, out, _ = run("passes", "--json")
    found = json.loads(out)
    assert code == 0 and [one["name"] for one in found] == catalog.names()
    assert not [f"{one['name']}{{{o['name']}}}" for one in found for o in one["options"] if not o["help"]]


def test_why_of_an_unknown_pass_is_refused_before_any_work(run: Callable[..., Said]) -> None:
    code, _, err = run("optimize", "no-such-file.onnx", "--dry-run", "--why", "fuse-atention")
    assert code == 2 and "did you mean `fuse-attention`?" in err


def test_quantities_have_three_digits_and_a_letter() -> None:
    numbers = (0, 0.084, 5, 999, 999.6, 385_187_552, 999_999, 6.4e17, -2500, None)
    spelled = ["0", "0.084", "5", "999", "1 k", "385 M", "1 M", "640 P", "-2.5 k", "?"]
    assert [terminal.quantity(number) for number in numbers] == spelled


def test_the_shapes_of_many_inputs_are_cut_short() -> None:
    assert terminal.shapes({"ids": [1, 5], "mask": []}) == "ids [1, 5], mask []"
    many = {f"x{number}": [number] for number in range(7)}
    assert terminal.shapes(many) == "x0 [0], x1 [1], x2 [2], x3 [3], x4 [4], and 2 more inputs"


@pytest.mark.parametrize(("seconds", "shown"), [(0.1, False), (2.5, True)])
def test_a_step_that_takes_long_is_shown_though_nothing_else_is_told(seconds: float, shown: bool) -> None:
    code = (
        "import time; from burnish.tools import terminal\n"
        "with terminal.progress('optimize') as tell:\n"
        f"    tell('reading the model', 0, 1); time.sleep({seconds})\n"
    )
    ours, theirs = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(Path(burnish.__file__).absolute().parents[1]), "TERM": "xterm"}
    with subprocess.Popen([sys.executable, "-c", code], stderr=theirs, env=environment) as process:
        os.close(theirs)
        said = b""
        try:
            while piece := os.read(ours, 1 << 16):
                said += piece
        except OSError:
            pass  # how Linux tells that the other end is closed
    os.close(ours)
    assert process.returncode == 0 and (b"reading the model" in said) == shown
