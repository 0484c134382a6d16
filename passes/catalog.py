"""Find passes by file, and read them from text: `fuse-attention{target=ort-cpu}`."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import keyword
import re
import types
import typing
from functools import cache
from pathlib import Path
from typing import Any

from burnish.ir.errors import InputError
from burnish.passes.base import Pass

_ITEM = re.compile(r"\s*([A-Za-z0-9_-]+)\s*(?:\{([^{}]*)\})?\s*(,|$)")


@cache
def _files() -> dict[str, str]:
    """Pass names and the modules that hold them: every file in a sub-folder of `passes`."""
    root = Path(__file__).parent
    found = {
        path.stem.replace("_", "-"): f"burnish.passes.{path.parent.name}.{path.stem}"
        for path in sorted(root.glob("*/*.py"))
        if not path.stem.startswith("_")
    }
    return dict(sorted(found.items()))


def names() -> list[str]:
    """The names of all passes, sorted."""
    return list(_files())


def nearest(wrong: str, known: typing.Iterable[str]) -> str:
    """A hint that names the nearest known word."""
    known = list(known)
    close = difflib.get_close_matches(wrong, known, n=1, cutoff=0.5)
    return f"did you mean `{close[0]}`?" if close else f"known are: {', '.join(f'`{k}`' for k in known)}"


def load(name: str) -> type[Pass]:
    """The class of a pass.

    Raises:
        InputError: when there is no pass of that name; the hint names the nearest one.
    """
    module_name = _files().get(name)
    if module_name is None:
        close = difflib.get_close_matches(name, names(), n=1, cutoff=0.5)
        hint = "".join(f"did you mean `{one}`? " for one in close) + "`burnish passes` lists them all"
        raise InputError(f"there is no pass `{name}`", hint=hint)
    module = importlib.import_module(module_name)
    for member in vars(module).values():
        if isinstance(member, type) and issubclass(member, Pass) and member.__module__ == module_name:
            return member
    raise TypeError(f"`{module_name}` defines no pass")


def options(kind: type[Pass]) -> dict[str, tuple[Any, Any]]:
    """The options of a pass: name -> (type, default). The field of an option that is a word of Python ends in `_`."""
    hints = typing.get_type_hints(kind)
    return {f.name.rstrip("_"): (hints[f.name], f.default) for f in dataclasses.fields(kind)}


def _field(option: str) -> str:
    return f"{option}_" if keyword.iskeyword(option) else option


def make(name: str, given: dict[str, Any] | None = None, *, place: str | None = None) -> Pass:
    """A pass with options, which may be text.

    Raises:
        InputError: for an unknown pass or option (with the nearest name) and for a value of the wrong type.
    """
    kind = load(name)
    known = options(kind)
    values = {}
    for key, value in (given or {}).items():
        field = key.replace("-", "_")
        if field not in known:
            raise InputError(
                f"pass `{name}` has no option `{key}`",
                place=place,
                hint=nearest(field, known) if known else f"`{name}` takes no options",
            )
        values[_field(field)] = converted(value, known[field][0], f"{name}{{{key}}}", place)
    return kind(**values)


def converted(value: Any, wanted: Any, option: str, place: str | None) -> Any:
    """A value, which may be text, as an option of a type.

    Raises:
        InputError: it is none; `option` is what the text is called.
    """
    origin = typing.get_origin(wanted)
    if origin is typing.Literal:
        choices = typing.get_args(wanted)
        if value in choices:
            return value
        raise InputError(f"`{option}` cannot be `{value}`", place=place, hint=nearest(str(value), map(str, choices)))
    if origin in (typing.Union, types.UnionType):
        inner = [a for a in typing.get_args(wanted) if a is not type(None)]
        return None if value in (None, "none", "None") else converted(value, inner[0], option, place)
    text = str(value).strip()
    try:
        if wanted is bool:
            return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[text.lower()]
        if wanted in (int, float):
            if isinstance(value, bool):
                raise ValueError
            return wanted(text)
        if wanted is str:
            return text
    except (KeyError, ValueError):
        raise InputError(
            f"`{option}` cannot be `{value}`", place=place, hint=f"give a value of type {wanted.__name__}"
        ) from None
    raise TypeError(f"option `{option}` has the unsupported type {wanted}")


def parse(spec: str) -> list[Pass]:
    """The passes of a list such as `fold-constants,fuse-attention{target=ort-cpu}`.

    Raises:
        InputError: when the text is no such list, or names an unknown pass or option.
    """
    found, position = [], 0
    while position < len(spec.rstrip()):
        item = _ITEM.match(spec, position)
        if item is None:
            raise InputError(
                f"cannot read `{spec[position:]}` in the list of passes `{spec}`",
                hint="write `name` or `name{option=value;option=value}`, separated by commas",
            )
        pairs = [pair for pair in re.split(r"[;,]", item[2] or "") if pair.strip()]
        given = {}
        for pair in pairs:
            key, equals, value = pair.partition("=")
            if not equals:
                raise InputError(
                    f"option `{pair}` of `{item[1]}` has no value", hint=f"write `{item[1]}{{{pair}=value}}`"
                )
            if key.strip() in given:
                raise InputError(f"option `{key.strip()}` of `{item[1]}` is given twice", hint="give it once")
            given[key.strip()] = value.strip()
        found.append(make(item[1], given))
        position = item.end()
    return found


def spec(one: Pass) -> str:
    """The text that `parse` reads back as `one`: its name and the options that differ from the defaults."""
    changed = [
        f"{name}={getattr(one, _field(name))}"
        for name, (_, default) in options(type(one)).items()
        if getattr(one, _field(name)) != default
    ]
    return one.pass_name() + (f"{{{','.join(changed)}}}" if changed else "")
