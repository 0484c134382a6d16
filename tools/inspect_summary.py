"""What a model consists of and what it costs, read from its file: nothing is run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from burnish.tools import terminal

if TYPE_CHECKING:
    import onnx_ir as oir

    from burnish.tools.subject import Subject


def report(subject: Subject) -> dict[str, Any]:
    """All that `burnish inspect` shows without a section, as the JSON document that `--json` prints.

    Unknown numbers are None; `unknown` says why, and the `at_least` beside each is the sum over what is known.
    """
    from burnish.ir import concrete, cost, liveness

    model, numbers, top = subject.model, subject.numbers, subject.top
    copy = concrete.concrete(model, numbers)
    costs = cost.model_cost(copy, numbers)
    memory = liveness.activation_peak(copy, numbers)
    largest = sorted(costs.stored, key=lambda one: (-one.bytes, one.name))[:top]
    return {
        "file": subject.file,
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


def show(found: dict[str, Any]) -> None:
    """Print the report as tables."""
    out = terminal.out()
    for line in _summary(found):
        out.print(line)
    ports = [
        (kind, one["name"], one["dtype"] or "?", terminal.shape(one["shape"]))
        for kind in ("input", "output")
        for one in found[f"{kind}s"]
    ]
    terminal.show(terminal.table("Inputs and outputs", ["", "name", "dtype", "shape"], ports), out)
    dtypes = [
        (name, f"{one['parameters']:,}", terminal.size(one["bytes"]))
        for name, one in found["parameters"]["by_dtype"].items()
    ]
    terminal.show(terminal.table("Parameters", ["dtype", ">count", ">bytes"], dtypes), out)
    work = [">multiply-adds", ">element operations"]
    operators = [(name, str(one["nodes"]), *_work(one)) for name, one in found["operators"].items()]
    terminal.show(terminal.table("Operators", ["operator", ">nodes", *work], operators), out)
    nodes = [(one["name"] or "", one["operator"], *_work(one)) for one in found["costliest_nodes"]]
    terminal.show(terminal.table("Costliest nodes", ["node", "operator", *work], nodes), out)
    tensors = [
        (t["name"], t["dtype"], terminal.shape(t["shape"]), terminal.size(t["bytes"])) for t in found["largest_tensors"]
    ]
    terminal.show(terminal.table("Largest tensors", ["tensor", "dtype", "shape", ">bytes"], tensors), out)
    live = [(one["name"], terminal.size(one["bytes"])) for one in found["activations"]["live"]]
    terminal.show(terminal.table("Alive at the activation peak", ["value", ">bytes"], live), out)
    example = ",".join(f"{name}=1" for name in found["open_dims"])
    hint = f"give the dynamic dimensions numbers, such as `--dims {example}`" if example else None
    terminal.unknown(found["unknown"], hint)


def _summary(found: dict[str, Any]) -> list[str]:
    parameters, cost, memory = found["parameters"], found["cost"], found["activations"]
    opsets = ", ".join(f"{domain} {version}" for domain, version in found["opsets"].items())
    node, quantity = memory["at_node"], terminal.quantity
    rows = {
        "file": found["file"],
        "format": "; ".join(filter(None, (f"IR {found['ir_version']}", f"opset {opsets}", found["producer"]))),
        "parameters": f"{parameters['total']:,} in {terminal.size(parameters['bytes'])}",
        "multiply-adds": _or_at_least(cost["multiply_adds"], cost["multiply_adds_at_least"], quantity),
        "element operations": _or_at_least(cost["element_operations"], cost["element_operations_at_least"], quantity),
        "activation peak": _or_at_least(memory["peak_bytes"], memory["peak_bytes_at_least"], terminal.size),
        "largest node": terminal.size(memory["largest_node_bytes"]),
    }
    if node:
        rows["activation peak"] += f" at {node['operator']} {node['name'] or ''}"
    if cost["loops_counted_once"]:
        rows["loops"] = "counted for one iteration where only the run decides how many there are"
    return [f"{name:20}{text}" for name, text in rows.items()]


def _work(one: dict[str, Any]) -> tuple[str, str]:
    return terminal.quantity(one["multiply_adds"]), terminal.quantity(one["element_operations"])


def _or_at_least(number: int | None, at_least: int, spell: Any) -> str:
    return str(spell(number)) if number is not None else f"unknown; at least {spell(at_least)}"
