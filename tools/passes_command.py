"""`burnish passes`: the passes, one line each, and their options."""

from __future__ import annotations

import inspect
import json
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

    chosen = [name] if name else catalog.names()
    found = [_describe(one) for one in chosen]
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return 0
    from rich.table import Table

    console = terminal.out()
    if name:
        console.print(f"{name}\n\n{inspect.getdoc(catalog.load(name))}", markup=False)
    else:
        table = Table("pass", "what it does", box=None, pad_edge=False)
        for one in found:
            table.add_row(one["name"], one["summary"])
        console.print(table)
        return 0
    for option in found[0]["options"]:
        console.print(f"  {option['name']}: {option['type']} = {option['default']!r}", markup=False)
    return 0


def _describe(name: str) -> dict[str, Any]:
    from burnish.passes import catalog

    kind = catalog.load(name)
    listed = [
        {"name": key, "type": _type_name(wanted), "default": default}
        for key, (wanted, default) in catalog.options(kind).items()
    ]
    return {"name": name, "summary": (inspect.getdoc(kind) or "").splitlines()[0], "options": listed}


def _type_name(wanted: Any) -> str:
    if typing.get_origin(wanted) is typing.Literal:
        return " | ".join(map(str, typing.get_args(wanted)))
    return wanted.__name__ if isinstance(wanted, type) else str(wanted)
