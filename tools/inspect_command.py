"""`burnish inspect`: what a model consists of and what it costs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from burnish.tools import terminal

if TYPE_CHECKING:
    import onnx_ir as oir


@click.command("inspect")
@click.argument("model", type=click.Path())
@click.option("--dims", default="", metavar="NAME=N,...", help="Numbers for dynamic dimensions, by name or INPUT.AXIS.")
@click.option("--top", default=10, show_default=True, type=click.IntRange(min=0), help="Length of the lists.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of tables.")
def inspect_command(model: str, dims: str, top: int, as_json: bool) -> None:
    """Show what MODEL consists of and what it costs: operators, parameters, multiply-adds, tensors, memory."""
    from burnish.frontends import onnx_file

    found = inspection(onnx_file.read(model), dims, top, file=model)
    if as_json:
        click.echo(json.dumps(found, indent=2, allow_nan=False))
    else:
        _print_tables(found)


def parse_dims(text: str, model: oir.Model) -> dict[str, int]:
    """The numbers in `batch=1,seq=128`.

    Args:
        text: pairs of name and number; a name is that of a dimension of an input, or `INPUT.AXIS`.
        model: the model whose dimensions they are.

    Raises:
        InputError: a pair cannot be read or names no dimension of an input.
    """
    import difflib

    from burnish.ir.concrete import open_dims
    from burnish.ir.errors import InputError

    ranks = [(value.name, len(value.shape)) for value in model.graph.inputs if value.shape is not None]
    names = list(
        dict.fromkeys([*open_dims(model, {}), *(f"{name}.{axis}" for name, rank in ranks for axis in range(rank))])
    )
    found: dict[str, int] = {}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = (part.strip() for part in pair.rpartition("="))
        if not name or not number.isdecimal():
            raise InputError(f"`{pair}` is not NAME=NUMBER", place="--dims", hint="write `--dims batch=1,seq=128`")
        if name not in names:
            spelled = {one.lower(): one for one in names}
            close = difflib.get_close_matches(name.lower(), spelled, n=1)
            listed = ", ".join(f"`{one}`" for one in names) or "none"
            hint = f"did you mean `{spelled[close[0]]}`?" if close else f"the dimensions are: {listed}"
            raise InputError(f"no input has a dimension `{name}`", place="--dims", hint=hint)
        found[name] = int(number)
    return found


def inspection(model: oir.Model, dims: str = "", top: int = 10, *, file: str = "") -> dict[str, Any]:
    """All that `burnish inspect` shows, as the JSON document that `--json` prints.

    Unknown numbers are None; `unknown` says why, and the `at_least` beside each is the sum over what is known.

    Args:
        model: the model; it is not changed.
        dims: as for `parse_dims`.
        top: the length of the lists of nodes and tensors.
        file: the name of the file, for the report.
    """
    from burnish.ir import concrete, cost, liveness

    numbers = parse_dims(dims, model)
    copy = concrete.concrete(model, numbers)
    costs = cost.model_cost(copy, numbers)
    memory = liveness.activation_peak(copy, numbers)
    largest = sorted(costs.stored, key=lambda one: (-one.bytes, one.name))[:top]
    return {
        "file": file,
        "ir_version": model.ir_version,
        "producer": " ".join(filter(None, (model.producer_name, model.producer_version))),
        "opsets": {domain or "ai.onnx": version for domain, version in model.opset_imports.items()},
        "functions": len(model.functions),
        "inputs": [_port(value) for value in model.graph.inputs if not value.is_initializer()],
        "outputs": [_port(value) for value in model.graph.outputs],
        "dims": numbers,
        "open_dims": concrete.open_dims(model, numbers),
        "parameters": {
            "total": costs.total.parameters,
            "bytes": sum(one.bytes for one in costs.stored),
            "by_dtype": {
                name: {"parameters": one.parameters, "bytes": one.bytes} for name, one in costs.by_dtype.items()
            },
        },
        "cost": _cost(costs.total, costs.at_least),
        "operators": {
            name: {"nodes": count, **_cost(one, one, totals=False)} for name, (count, one) in costs.operators.items()
        },
        "costliest_nodes": _costliest(costs.nodes, top),
        "largest_tensors": [
            {"name": one.name, "dtype": one.dtype, "shape": list(one.shape), "bytes": one.bytes} for one in largest
        ],
        "activations": {
            "peak_bytes": memory.peak,
            "peak_bytes_at_least": memory.at_least,
            "at_node": None
            if memory.at is None
            else {"name": memory.at.name, "operator": cost.operator_name(memory.at)},
            "live": [{"name": one.value.name, "bytes": one.bytes} for one in memory.live[:top]],
            "largest_node_bytes": memory.lower_bound,
        },
        "unknown": list(dict.fromkeys((*costs.total.unknown, *memory.unknown))),
    }


def _port(value: oir.Value) -> dict[str, Any]:
    dims = None if value.shape is None else [size if isinstance(size, int) else size.value for size in value.shape]
    return {"name": value.name, "dtype": value.dtype.name if value.dtype is not None else None, "shape": dims}


def _cost(cost: Any, at_least: Any, *, totals: bool = True) -> dict[str, Any]:
    found: dict[str, Any] = {"multiply_adds": cost.macs, "element_operations": cost.operations}
    if totals:
        found |= {"bytes_read": cost.bytes_read, "bytes_written": cost.bytes_written}
        found |= {f"{name}_at_least": getattr(at_least, key) for name, key in _TOTALS.items()}
        found["loops_counted_once"] = cost.per_iteration
    return found


_TOTALS = {
    "multiply_adds": "macs",
    "element_operations": "operations",
    "bytes_read": "bytes_read",
    "bytes_written": "bytes_written",
}


def _costliest(nodes: Any, top: int) -> list[dict[str, Any]]:
    from burnish.ir.cost import operator_name

    known = [part for part in nodes if part.cost.macs or part.cost.operations]
    known.sort(key=lambda part: (-(part.cost.macs or 0), -(part.cost.operations or 0)))
    return [
        {
            "name": part.node.name,
            "operator": operator_name(part.node),
            "multiply_adds": part.cost.macs,
            "element_operations": part.cost.operations,
            "parameters": part.cost.parameters,
            "bytes_read": part.cost.bytes_read,
            "bytes_written": part.cost.bytes_written,
        }
        for part in known[:top]
    ]


def _print_tables(found: dict[str, Any]) -> None:
    out = terminal.out()
    for line in _summary(found):
        out.print(line)
    ports = [
        (kind, one["name"], one["dtype"] or "?", _shape(one["shape"]))
        for kind in ("input", "output")
        for one in found[f"{kind}s"]
    ]
    terminal.show(_table("Inputs and outputs", ["", "name", "dtype", "shape"], ports), out)
    dtypes = [
        (name, f"{one['parameters']:,}", terminal.size(one["bytes"]))
        for name, one in found["parameters"]["by_dtype"].items()
    ]
    terminal.show(_table("Parameters", ["dtype", ">count", ">bytes"], dtypes), out)
    work = [">multiply-adds", ">element operations"]
    operators = [(name, str(one["nodes"]), *_work(one)) for name, one in found["operators"].items()]
    terminal.show(_table("Operators", ["operator", ">nodes", *work], operators), out)
    nodes = [(one["name"] or "", one["operator"], *_work(one)) for one in found["costliest_nodes"]]
    terminal.show(_table("Costliest nodes", ["node", "operator", *work], nodes), out)
    tensors = [(t["name"], t["dtype"], _shape(t["shape"]), terminal.size(t["bytes"])) for t in found["largest_tensors"]]
    terminal.show(_table("Largest tensors", ["tensor", "dtype", "shape", ">bytes"], tensors), out)
    live = [(one["name"], terminal.size(one["bytes"])) for one in found["activations"]["live"]]
    terminal.show(_table("Alive at the activation peak", ["value", ">bytes"], live), out)
    _say_what_is_unknown(found)


def _summary(found: dict[str, Any]) -> list[str]:
    parameters, cost, memory = found["parameters"], found["cost"], found["activations"]
    opsets = ", ".join(f"{domain} {version}" for domain, version in found["opsets"].items())
    node = memory["at_node"]
    rows = {
        "file": found["file"],
        "format": "; ".join(filter(None, (f"IR {found['ir_version']}", f"opset {opsets}", found["producer"]))),
        "parameters": f"{parameters['total']:,} in {terminal.size(parameters['bytes'])}",
        "multiply-adds": _or_at_least(cost["multiply_adds"], cost["multiply_adds_at_least"], _count),
        "element operations": _or_at_least(cost["element_operations"], cost["element_operations_at_least"], _count),
        "activation peak": _or_at_least(memory["peak_bytes"], memory["peak_bytes_at_least"], terminal.size),
        "largest node": terminal.size(memory["largest_node_bytes"]),
    }
    if node:
        rows["activation peak"] += f" at {node['operator']} {node['name'] or ''}"
    if cost["loops_counted_once"]:
        rows["loops"] = "counted for one iteration where only the run decides how many there are"
    return [f"{name:20}{text}" for name, text in rows.items()]


def _work(one: dict[str, Any]) -> tuple[str, str]:
    return _count(one["multiply_adds"]), _count(one["element_operations"])


def _say_what_is_unknown(found: dict[str, Any]) -> None:
    reasons = found["unknown"]
    if not reasons:
        return
    talk = terminal.talk()
    more = f", and {len(reasons) - 3} more" if len(reasons) > 3 else ""
    talk.print(f"not everything is known: {'; '.join(reasons[:3])}{more}")
    if found["open_dims"]:
        example = ",".join(f"{name}=1" for name in found["open_dims"])
        talk.print(f"\nhint: give the dynamic dimensions numbers, such as `--dims {example}`")


def _table(title: str, columns: list[str], rows: Sequence[tuple[str, ...]]) -> Any:
    """A table; a column whose name starts with `>` is right-aligned."""
    from rich.table import Table

    table = Table(title=f"\n{title}", title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _or_at_least(number: int | None, at_least: int, spell: Any) -> str:
    return str(spell(number)) if number is not None else f"unknown; at least {spell(at_least)}"


def _count(number: int | None) -> str:
    """A count in powers of 1000, three digits: 385 M."""
    if number is None:
        return "?"
    if number < 1000:
        return str(number)
    power = min(int(math.log10(number) / 3 + 1e-9), 5)
    return f"{number / 1000**power:.3g} {' kMGTP'[power]}"


def _shape(shape: list[Any] | None) -> str:
    return "?" if shape is None else "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"
