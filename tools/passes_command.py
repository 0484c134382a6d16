"""`burnish passes`: the passes, one line each, and their options."""

from __future__ import annotations

import inspect
import json
import re
import typing
from typing import Any

import click

from burnish.tools import terminal


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def passes_command(name: str | None, as_json: bool) -> int:
    """List the passes, or show one with its options and its full description."""
    from burnish.passes import catalog

    found = [describe(one) for one in ([name] if name else catalog.names())]
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return 0
    console = terminal.out()
    if name is None:
        from rich.table import Table

        table = Table("pass", "kind", "what it does", box=None, pad_edge=False)
        for one in found:
            table.add_row(one["name"], "lossy" if one["lossy"] else "exact", one["summary"])
        terminal.show(table, console)
        return 0
    one = found[0]
    title = f"{one['name']} (lossy)" if one["lossy"] else one["name"]
    console.print("\n\n".join(filter(None, (title, one["summary"], one["details"]))))
    if one["options"]:
        console.print("\noptions:")
    for option in one["options"]:
        console.print(f"  {option['name']}: {option['type']} = {option['default']}")
        console.print(f"      {option['help']}")
    return 0


def describe(name: str) -> dict[str, Any]:
    """What a pass's class says: `name`, `lossy`, `summary`, `details`, `options` with type, default and help.

    Raises:
        InputError: when there is no pass of that name.
    """
    from burnish.passes import catalog
    from burnish.passes.lossy import LossyPass

    kind = catalog.load(name)
    prose, _, attributes = (inspect.getdoc(kind) or "").partition("Attributes:\n")
    summary, _, details = prose.strip().partition("\n")
    helps = {key.rstrip("_"): " ".join(text.split()) for key, text in _ATTRIBUTE.findall(attributes)}
    listed = [
        {"name": key, "type": _type_name(wanted), "default": default, "help": helps.get(key, "")}
        for key, (wanted, default) in catalog.options(kind).items()
    ]
    lossy = issubclass(kind, LossyPass)
    return {"name": name, "lossy": lossy, "summary": summary, "details": details.strip(), "options": listed}


_ATTRIBUTE = re.compile(r"^    (\w+): (.*(?:\n {8}.*)*)", re.MULTILINE)


def _type_name(wanted: Any) -> str:
    if typing.get_origin(wanted) is typing.Literal:
        return " | ".join(map(str, typing.get_args(wanted)))
    return wanted.__name__ if isinstance(wanted, type) else str(wanted)
