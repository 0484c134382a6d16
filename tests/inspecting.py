"""Runs `burnish inspect` in this process, as a shell would."""

from __future__ import annotations

import pytest

from burnish.tools import cli, terminal


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """The exit code of `burnish inspect`, and what it prints to stdout and to stderr."""
    with pytest.raises(SystemExit) as ended:
        terminal.run(cli.burnish, prog_name="burnish", args=["inspect", *words])
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err
