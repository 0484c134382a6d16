"""YAML from people one does not know: values and the lines they stand on, without anything that runs or grows.

Read are mappings, sequences and scalars. Anchors, aliases, tags, several documents and repeated keys are refused, as is
what is nested deeply. Plain scalars are null, true, false, whole numbers, decimal numbers or text, as in JSON.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from burnish.ir.errors import InputError

LARGEST = 16 << 20
"""Bytes of a file that is read."""

DEEPEST = 12
"""Mappings and sequences inside each other."""

MOST = 500_000
"""Values in a file."""

Key = tuple[str | int, ...]

_WHOLE = re.compile(r"[-+]?\d{1,18}\Z")
_DECIMAL = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\Z")
_WORDS: dict[str, object] = {"": None, "~": None, "null": None, "true": True, "false": False}


@dataclass
class Tree:
    """What a file holds.

    Attributes:
        path: the file.
        value: dictionaries, lists, text, numbers, truth values and None.
        lines: the line of each part by its path from the root, from 1.
        text: the lines of the file.
    """

    path: str
    value: Any = None
    lines: dict[Key, int] = field(default_factory=dict)
    text: list[str] = field(default_factory=list)

    def line(self, key: Key) -> int:
        """The line of the part at `key`, or of the longest beginning of it that is there; 1 for the whole."""
        while key and key not in self.lines:
            key = key[:-1]
        return self.lines.get(key, 1)

    def fail(self, line: int, cause: str, hint: str) -> InputError:
        """An error that shows a line."""
        shown = self.text[line - 1].rstrip()[:200] if 0 < line <= len(self.text) else ""
        return InputError(f"{cause}\n    {shown}" if shown else cause, place=f"{self.path}:{line}", hint=hint)


def read(path: str | Path, what: str) -> Tree:
    """Read a YAML file.

    Args:
        path: the file.
        what: what it should be, for the errors: `a lock file`.

    Raises:
        InputError: it cannot be read, is too large or too deep, or is not of this kind of YAML; with the line.
    """
    tree = Tree(str(path))
    source = _text(path, what)
    tree.text = source.split("\n")
    _Builder(tree).build(source)
    return tree


def _text(path: str | Path, what: str) -> str:
    place, hint = str(path), f"name {what}"
    try:
        file = Path(path)
        if file.exists() and not file.is_file():
            raise InputError("it is not a file", place=place, hint=hint)
        with file.open("rb") as stream:
            data = stream.read(LARGEST + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"it cannot be read: {reason}", place=place, hint=hint) from None
    if len(data) > LARGEST:
        raise InputError(f"it has more than {LARGEST >> 20} MiB", place=place, hint=hint)
    try:
        return data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        raise InputError("it is not text", place=place, hint=f"give {what}: YAML in UTF-8") from None


class _Builder:
    """Makes values of the parser's events, without recursion."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.stack: list[tuple[Any, Key]] = []
        self.key: tuple[str, int] | None = None
        self.done = False

    def build(self, source: str) -> None:
        import yaml

        loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        try:
            for event in yaml.parse(source, Loader=loader):
                self.take(event, yaml)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = mark.line + 1 if mark else 1
            raise self.tree.fail(line, f"this is not YAML: {error.problem}", "mind indentation and colons") from None
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            cause = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"this is not YAML: {cause}", place=self.tree.path, hint="is it the right file?") from None

    def take(self, event: Any, yaml: Any) -> None:
        line = event.start_mark.line + 1
        if isinstance(event, yaml.DocumentStartEvent) and self.done:
            raise self.tree.fail(line, "there is a second document", "one file holds one document")
        if getattr(event, "anchor", None) is not None:
            raise self.tree.fail(line, "anchors and aliases are not read", "write the value out")
        if getattr(event, "tag", None) is not None and event.tag != "!":
            raise self.tree.fail(line, f"tags are not read, and there is `{event.tag}`", "write plain values")
        if isinstance(event, yaml.ScalarEvent):
            self.scalar(event, line)
        elif isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            if len(self.stack) >= DEEPEST:
                raise self.tree.fail(line, "it is nested too deeply", f"{DEEPEST} levels are read")
            made: Any = {} if isinstance(event, yaml.MappingStartEvent) else []
            self.stack.append((made, self.put(made, line)))
        elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            self.stack.pop()

    def scalar(self, event: Any, line: int) -> None:
        parent = self.stack[-1][0] if self.stack else None
        if isinstance(parent, dict) and self.key is None:
            if event.value in parent:
                raise self.tree.fail(line, f"`{event.value}` is given twice", "keep one of them")
            self.key = (event.value, line)
        else:
            self.put(_resolved(event), line)

    def put(self, value: Any, line: int) -> Key:
        """Add a value to what is being made; gives its path."""
        if len(self.tree.lines) >= MOST:
            raise self.tree.fail(line, f"it holds more than {MOST} values", "is it the right file?")
        if not self.stack:
            self.tree.value, self.done = value, True
            return ()
        parent, place = self.stack[-1]
        if isinstance(parent, list):
            key: Key = (*place, len(parent))
            parent.append(value)
        elif self.key is None:
            raise self.tree.fail(line, "a key must be text", "write `name: value`")
        else:
            name, line = self.key
            self.key = None
            key = (*place, name)
            parent[name] = value
        self.tree.lines[key] = line
        return key


def _resolved(event: Any) -> object:
    text: str = event.value
    if not event.implicit[0]:
        return text
    if text in _WORDS:
        return _WORDS[text]
    if _WHOLE.match(text):
        return int(text)
    return float(text) if len(text) < 400 and _DECIMAL.match(text) else text
