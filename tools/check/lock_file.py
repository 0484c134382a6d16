"""Lock files: read with distrust, written whole or not at all, in a form that a change shows up in as a short diff."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from burnish.ir.errors import InputError
from burnish.tools import whole_file
from burnish.tools.check import yaml_tree
from burnish.tools.check.lock import SKETCH, VERSION, Lock

_HEAD = "# What the model was when it was locked, for `burnish check run`. Review it as you review code.\n"
_WHAT = "a lock file, as `burnish check lock` writes it"
_IS_LOCK = re.compile(rb"^lock:\s*\d", re.MULTILINE)
_LONG = 500
_PLAIN = re.compile(r"[A-Za-z_][\w./-]*(?: [\w./-]+)*\Z", re.ASCII)
_PLAIN_ALONE = re.compile(r"[A-Za-z_][ -~]*(?<! )\Z")
_NOT_PLAIN = re.compile(r": |:\Z| #")
_HASH = re.compile(r"[0-9a-f]{8,}\Z")  # some are numbers to YAML; quoting all of them looks the same in every line
_WORDS = frozenset("null true false yes no on off y n".split())
_UNPRINTABLE = re.compile("[\x7f-\xa0\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")
_STEP = re.compile(r"\.([\w-]+)|\[(\d+)\]")


def read(path: str | Path) -> Lock:
    """Read a lock file.

    Raises:
        InputError: it cannot be read, is no lock file or one of a newer burnish; with the line.
    """
    tree = yaml_tree.read(path, _WHAT)
    value = tree.value
    if not isinstance(value, dict) or "lock" not in value:
        raise InputError("this is no lock file", place=str(path), hint=f"give {_WHAT}")
    version = value["lock"]
    if type(version) is not int or version < 1:
        raise tree.fail(tree.line(("lock",)), "the version of a lock file is a whole number from 1", f"give {_WHAT}")
    if version > VERSION:
        cause = f"it was written by a newer burnish: its form is {version}, known is {VERSION}"
        raise tree.fail(tree.line(("lock",)), cause, "install the burnish that wrote it, or write it anew")
    _check_finite(tree, value, ())
    try:
        lock = msgspec.convert(value, Lock, strict=True)
    except msgspec.ValidationError as error:
        cause, _, place = str(error).partition(" - at `")
        cause = cause[0].lower() + cause[1:]
        where, reached = place.rstrip("`"), _key(place, value)
        cause = f"{cause} (`{where.removeprefix('$.')}`)" if where else cause
        raise tree.fail(tree.line(reached), cause, "write the lock anew with `burnish check lock`") from None
    _check_whole(tree, lock)
    return lock


def line_of(path: str | Path, key: tuple[str | int, ...]) -> int:
    """The line of the value at `key` in a lock file, or of the longest beginning of the key that is there; 1 for none.

    Raises:
        InputError: the file cannot be read.
    """
    return yaml_tree.read(path, _WHAT).line(key)


def write(lock: Lock, path: str | Path) -> None:
    """Write a lock file, whole or not at all; a lock file that is there is replaced.

    Raises:
        InputError: it cannot be written, or there is a file that is no lock file.
    """
    file = Path(path)
    try:
        if file.is_file() and file.stat().st_size:
            with file.open("rb") as stream:
                if not _IS_LOCK.search(stream.read(1 << 12)):
                    cause = "there is a file that is no lock file"
                    raise InputError(cause, place=str(path), hint="give another name, or remove it")
    except OSError as error:
        raise InputError(
            f"it cannot be replaced: {error.strerror}", place=str(path), hint="give another name"
        ) from None
    whole_file.write(path, text(lock))


def text(lock: Lock) -> str:
    """A lock as the text of its file; the same lock gives the same text."""
    return _HEAD + "\n".join(_block(msgspec.to_builtins(lock), "", ())) + "\n"


def _check_finite(tree: yaml_tree.Tree, value: Any, key: yaml_tree.Key) -> None:
    """Refuse numbers that are not finite, such as 1e999."""
    if isinstance(value, float) and not math.isfinite(value):
        raise tree.fail(tree.line(key), "the number is not finite", "write the lock anew with `burnish check lock`")
    if isinstance(value, dict | list):
        for name, part in value.items() if isinstance(value, dict) else enumerate(value):
            _check_finite(tree, part, (*key, name))


def _check_whole(tree: yaml_tree.Tree, lock: Lock) -> None:
    """Refuse a lock whose parts do not belong to each other."""
    hint = "write the lock anew with `burnish check lock`"
    for number, segment in enumerate(lock.segments):
        if segment.code not in lock.code:
            cause = f"there is no code `{segment.code}`"
            raise tree.fail(tree.line(("segments", number, "code")), cause, hint)
        for turn, layer in enumerate(segment.layers):
            key = ("segments", number, "layers", turn)
            if layer.line >= len(lock.code[segment.code]):
                raise tree.fail(tree.line(key), f"its code has no line {layer.line}", hint)
            _check_sketch(tree, layer.sketch, key)
    for number, sample in enumerate(lock.values):
        for name, output in sample.outputs.items():
            _check_sketch(tree, output.sketch, ("values", number, "outputs", name))


def _check_sketch(tree: yaml_tree.Tree, sketch: tuple[float, ...], key: yaml_tree.Key) -> None:
    if len(sketch) not in (0, SKETCH):
        cause = f"a sketch has {SKETCH} numbers or none, not {len(sketch)}"
        raise tree.fail(tree.line(key), cause, "write the lock anew with `burnish check lock`")


def _key(place: str, value: Any) -> yaml_tree.Key:
    """The key in `$.segments[3].norm` of msgspec, which does not tell the keys of plain dictionaries (`[...]`)."""
    key: list[str | int] = []
    for name, index in _STEP.findall(place.split("[...]")[0]):
        key.append(name or int(index))
    return tuple(key)


_FLOWING = (("opsets",), ("sizes", "bytes"), ("sizes", "at"), ("metric",), ("latency",))
"""Mappings that are written on one line, as are all parts of `layers`, `roles` and `outputs`."""


def _flows(key: tuple[str, ...]) -> bool:
    return (
        key in _FLOWING
        or (len(key) > 1 and key[-2] in ("layers", "roles") and key[0] in ("segments", "samples"))
        or (len(key) > 2 and key[0] == "values" and key[-2] == "outputs")
    )


def _block(value: dict[str, Any], indent: str, place: tuple[str, ...]) -> Iterator[str]:
    for name, part in value.items():
        head, key = f"{indent}{_name(name, indent)}:", (*place, name)
        if part is None or part == [] or part == {} or not isinstance(part, dict | list) or _flows(key):
            yield f"{head} {_flow(part, alone=True)}"
            continue
        yield head
        if isinstance(part, dict):
            yield from _block(part, indent + "  ", key)
            continue
        for one in part:
            if isinstance(one, dict) and not _flows((*key, "-")):
                first, *rest = _block(one, indent + "    ", (*key, "-"))
                yield f"{indent}  - {first.lstrip()}"
                yield from rest
            else:
                yield f"{indent}  - {_flow(one, alone=True)}"


def _flow(value: Any, *, alone: bool = False) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_name(name)}: {_flow(part)}" for name, part in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return _scalar(value, alone=alone)


def _name(name: str, indent: str | None = None) -> str:
    """A key; one that is too long for YAML to see it as one by itself is marked, on a line of its own in a block."""
    shown = _scalar(name, alone=False)
    if len(shown) < _LONG:
        return shown
    return f"? {shown} " if indent is None else f"? {shown}\n{indent}"


def _scalar(value: object, *, alone: bool) -> str:
    """A scalar: text without quotes where that is sure to be read as text; `alone` when nothing follows on its line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        shown = repr(value)
        return shown.replace("e", ".0e") if "e" in shown and "." not in shown else shown
    said = str(value)
    plain = (_PLAIN_ALONE if alone else _PLAIN).match(said) and said.lower() not in _WORDS
    if plain and not _HASH.match(said) and not _NOT_PLAIN.search(said):
        return said
    return _UNPRINTABLE.sub(_escaped, json.dumps(said, ensure_ascii=False))


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    return "\\uFFFD" if 0xD800 <= code < 0xE000 or code >= 0xFFFE else f"\\u{code:04X}"
