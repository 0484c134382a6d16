"""Runs the examples of a documentation page: its `console` and `python` blocks, in order, in one folder.

- A ```console block holds commands, on lines that begin with `$ `, each followed by what it prints (stdout and stderr).
- A ```python block is executed; the names it defines stay for the later blocks of the page. A ```text block right
  behind it is what it prints.
- A ```yaml block marked with a file's name is written to that file.
- In what is printed, `...` stands for any text, and alone on a line for any lines. In a block that is marked
  `measured` (```console measured), every number stands for any number.
- Commands run in this process: `burnish`, `optimize`, `cat FILE` and `echo $?`, with environment switches before them.
"""

from __future__ import annotations

import io
import re
import shlex
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from burnish.tools import cli, terminal

_FENCE = re.compile(r"^( *)(`{3,})([^\n`]*)\n(.*?)^\1\2 *$", re.MULTILINE | re.DOTALL)
_NUMBER = re.compile(r"\d[\d,]*(?:\\\.\d+)?(?:e(?:\\-|\\\+|\+|-)?\d+)?")
_ANY_NUMBER = r"\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?"


class ExampleFailed(AssertionError):
    """An example prints something else than its page shows."""


@dataclass(frozen=True)
class Block:
    """A fenced block: the first word of its mark, the other words, its text and where it stands in the page."""

    kind: str
    words: tuple[str, ...]
    text: str
    start: int
    end: int


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page; those inside another block belong to it."""
    found = []
    for match in _FENCE.finditer(page):
        kind, *words = match[3].split() or [""]
        lines = [line.removeprefix(match[1]) for line in match[4].splitlines(keepends=True)]
        found.append(Block(kind, tuple(words), "".join(lines), match.start(4), match.end(4)))
    return found


def matches(shown: str, printed: str, *, measured: bool = False) -> bool:
    """Whether `printed` is what the page shows; blanks at the ends of lines do not count."""
    pattern = ""
    for line in shown.rstrip().splitlines():
        if line.strip() == "...":
            pattern += r"(?:[^\n]*\n)*?"
            continue
        text = r"[^\n]*?".join(map(re.escape, line.rstrip().split("...")))
        if measured:
            text = re.sub(r"(?:\\ )+", r"[ ]+", _NUMBER.sub(lambda _: _ANY_NUMBER, text))
        pattern += text + "\n"
    lines = [line.rstrip() for line in printed.rstrip().splitlines()]
    return re.fullmatch(pattern, "".join(f"{line}\n" for line in lines)) is not None


@dataclass
class Shell:
    """Runs the commands of a page in this process and remembers the last exit code."""

    monkeypatch: pytest.MonkeyPatch
    code: int = 0

    def run(self, line: str) -> str:
        """What a command prints, stdout and stderr in the order of writing."""
        words = shlex.split(line)
        with self.monkeypatch.context() as environment:
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                environment.setenv(*words.pop(0).split("=", 1))
            return self._run(words)

    def _run(self, words: list[str]) -> str:
        if words == ["echo", "$?"]:
            return f"{self.code}\n"
        if words[0] == "cat":
            return "".join(Path(word).read_text(encoding="utf-8") for word in words[1:])
        printed = io.StringIO()
        with redirect_stdout(printed), redirect_stderr(printed), pytest.raises(SystemExit) as ended:
            if words[0] == "optimize":
                words = ["burnish", *words]
            if words[0] != "burnish":
                raise ExampleFailed(f"no example may run `{words[0]}`")
            terminal.run(cli.burnish, prog_name="burnish", args=words[1:])
        self.code = int(ended.value.code or 0)
        return printed.getvalue()


def run_page(page: Path, monkeypatch: pytest.MonkeyPatch, *, bless: bool = False) -> None:
    """Run every example of `page` in the current folder.

    Args:
        page: the Markdown file.
        monkeypatch: undoes what the examples set.
        bless: write what examples print into the page where it is not what the page shows.

    Raises:
        ExampleFailed: when an example prints something else than the page shows.
    """
    source = page.read_text(encoding="utf-8")
    module = types.ModuleType("example")
    monkeypatch.setitem(sys.modules, "example", module)
    shell = Shell(monkeypatch)
    found = blocks(source)
    changes: list[tuple[Block, str]] = []
    for block, behind in zip(found, [*found[1:], None], strict=True):
        if block.kind == "yaml" and block.words:
            Path(block.words[0]).parent.mkdir(parents=True, exist_ok=True)
            Path(block.words[0]).write_text(block.text, encoding="utf-8")
        elif block.kind == "console":
            text = ""
            for command, shown in _commands(block.text):
                text += f"$ {command}\n" + _compared(
                    page, f"$ {command}", shown, shell.run(command.replace("\\\n", " ")), block, bless
                )
            changes.append((block, text))
        elif block.kind == "python":
            printed = _execute(page, source, block, vars(module))
            if behind is not None and behind.kind == "text" and _adjoin(source, block, behind):
                changes.append((behind, _compared(page, block.text, behind.text, printed, behind, bless)))
            elif printed:
                raise ExampleFailed(f"{page.name} does not show what this prints:\n{block.text}\n{printed}")
    if bless:
        for block, text in reversed(changes):
            source = source[: block.start] + text + source[block.end :]
        page.write_text(source, encoding="utf-8")


def _execute(page: Path, source: str, block: Block, names: dict[str, Any]) -> str:
    line = source.count("\n", 0, block.start)
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(compile("\n" * line + block.text, str(page), "exec"), names)
    return printed.getvalue()


def _adjoin(source: str, block: Block, behind: Block) -> bool:
    """Whether nothing but fences stands between two blocks."""
    return re.fullmatch(r"[ `]*\s*`+text[^\n]*\n", source[block.end : behind.start]) is not None


def _commands(text: str) -> Iterator[tuple[str, str]]:
    """The commands of a console block, each with what it prints."""
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command = re.match(r"(?:[^\n]*\\\n)*[^\n]*", part)[0]  # type: ignore[index]
        yield command, part[len(command) :].removeprefix("\n")


def _compared(page: Path, what: str, shown: str, printed: str, block: Block, bless: bool) -> str:
    if matches(shown, printed, measured="measured" in block.words):
        return shown
    if bless:
        return "".join(f"{line.rstrip()}\n" for line in printed.rstrip().splitlines())
    raise ExampleFailed(f"{page.name}: this example\n{what}\nshould print\n{shown}\nand prints\n{printed}")


def headings(page: str) -> Mapping[str, int]:
    """The anchors that a page's headings give, as GitHub makes them, with how often each occurs."""
    for block in reversed(blocks(page)):
        page = page[: block.start] + page[block.end :]
    anchors: dict[str, int] = {}
    for title in re.findall(r"^#+ +(.*?) *$", page, re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        anchors[anchor] = anchors.get(anchor, 0) + 1
    return anchors
