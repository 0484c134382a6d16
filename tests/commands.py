"""Runs commands in this process, as a shell would."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from burnish.tools import cli

Run = Callable[..., tuple[int, str, str]]


def runner(monkeypatch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str], folder: Path, *first: object) -> Run:
    """What runs `optimize` or `burnish` in a folder: words that follow `first` to (exit code, stdout, stderr)."""
    monkeypatch.chdir(folder)

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [*map(str, first), *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            (cli.optimize_main if first[0] == "optimize" else cli.main)()
        said = capture.readouterr()
        return int(stopped.value.code or 0), said.out, said.err

    return run
