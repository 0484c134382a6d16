"""The layers of a model: its residual blocks, in stacks, with what they do and whether they can be dropped."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from burnish.tools import terminal

if TYPE_CHECKING:
    import onnx_ir as oir

    from burnish.ir.views.block import Block, Part
    from burnish.tools.subject import Subject


def report(subject: Subject) -> dict[str, Any]:
    """The stacks and blocks of the model, read on the normal form of a copy and told in the model's own names.

    A name is None where the normal form has no value of that name in the model, or where there is no such place.
    """
    from burnish.ir.edit import sources
    from burnish.ir.views.blocks import stacks
    from burnish.ir.views.codebook import codebooks
    from burnish.ir.views.product_keys import ProductKeys, product_keys
    from burnish.ir.walk import walk
    from burnish.passes.pipeline import Pipeline
    from burnish.passes.recipes import NORMAL_FORM

    model = Pipeline(NORMAL_FORM).rewrite(subject.model).model
    found = stacks(model)
    known = {value.name for node in walk(subject.model) for value in node.outputs}
    known |= {value.name for value in subject.model.graph.inputs}
    letters = {b.hash: letter for stack in found.stacks for b, letter in zip(stack.blocks, stack.pattern, strict=True)}
    return {
        "stacks": [
            {
                "pattern": stack.pattern,
                "kinds": _kinds(stack.blocks),
                "blocks": [block.index for block in stack.blocks],
                "parameters": sum(block.parameters for block in stack.blocks),
            }
            for stack in found.stacks
        ],
        "blocks": [_block(block, letters[block.hash], known) for block in found.blocks],
        "codebooks": [
            {"codes": codes, "features": features, "node": sources(book.anchor)[0]}
            for book in codebooks(model)
            for codes, features in [book.codes().shape]
        ],
        "product_keys": [
            {
                "node": sources(one.anchor)[0],
                "heads": one.heads,
                "keys": [one.outer.keys, one.inner.keys],
                "chosen": one.kept,
                "table": None if one.table is None else list(one.table),
            }
            for one in product_keys(model)
            if isinstance(one, ProductKeys)
        ],
        "missing": list(found.missing),
    }


def _kinds(blocks: Iterable[Block]) -> list[str]:
    return list(dict.fromkeys(kind for block in blocks for kind in block.kinds))


def _block(block: Block, group: str, known: set[str | None]) -> dict[str, Any]:
    from burnish.ir.edit import sources

    def name(value: oir.Value | None) -> str | None:
        return value.name if value is not None and value.name in known else None

    def spelled(part: Part) -> dict[str, Any]:
        return {
            "kinds": list(part.kinds),
            "entry": name(part.entry),
            "source": name(part.source),
            "results": [name(value) for value in part.results],
            "exit": name(part.exit),
            "inner": [spelled(inner) for inner in part.inner],
        }

    return {
        "index": block.index,
        "group": group,
        "hash": block.hash,
        "kinds": list(block.kinds),
        "form": block.form,
        "parallel": block.parallel,
        "entry": name(block.entry),
        "attention_in": name(block.attention_in),
        "attention_out": name(block.attention_out),
        "mid": name(block.mid),
        "mlp_in": name(block.mlp_in),
        "mlp_out": name(block.mlp_out),
        "exit": name(block.exit),
        "shape": None if block.entry_shape is None else [_size(size) for size in block.entry_shape],
        "parts": [spelled(part) for part in block.parts],
        "attention": [
            {
                "heads": layer.heads,
                "kv_heads": layer.kv_heads,
                "head_size": layer.head_size,
                "value_size": layer.value_size,
                "causal": layer.causal,
                "window": layer.window,
                "cross": layer.cross,
                "cache": layer.cache.kind,
            }
            for layer in block.attention
        ],
        "experts": [
            {
                "count": one.count,
                "chosen": one.chosen,
                "spelling": one.spelling,
                "matrices": [[matrix.out_features, matrix.in_features] for matrix in one.matrices],
            }
            for one in block.experts
        ],
        "inputs": [value.name for value in block.inputs],
        "outputs": [value.name for value in block.outputs],
        "parameters": block.parameters,
        "nodes": list(dict.fromkeys(source for node in block.nodes for source in sources(node))),
        "read_outside": [
            {"value": value.name, "node": sources(reader)[0], "operator": reader.op_type}
            for value, reader in block.read_outside
        ],
        "droppable": block.droppable,
        "refusal": block.refusal,
    }


def _size(size: Any) -> int | str:
    return size if isinstance(size, int) else str(size)


def show(found: dict[str, Any]) -> None:
    """Print the report as tables."""
    out = terminal.out()
    blocks = {one["index"]: one for one in found["blocks"]}
    stacks = [
        (str(number), one["pattern"], _words(one["kinds"]), str(len(one["blocks"])), f"{one['parameters']:,}")
        for number, one in enumerate(found["stacks"])
    ]
    columns = ["stack", "pattern", "does", ">blocks", ">parameters"]
    terminal.show(terminal.table("Stacks of blocks on one stream", columns, stacks), out)
    rows = [
        (str(number), *_row(blocks[index])) for number, stack in enumerate(found["stacks"]) for index in stack["blocks"]
    ]
    columns = [
        "stack",
        "block",
        "like",
        "does",
        "form",
        "heads",
        "experts",
        "cache",
        ">parameters",
        ">nodes",
        "droppable",
    ]
    terminal.show(terminal.table("Blocks", columns, rows), out)
    if found["codebooks"]:
        books = [(one["node"], str(one["codes"]), str(one["features"])) for one in found["codebooks"]]
        terminal.show(terminal.table("Codebooks", ["search", ">codes", ">features"], books), out)
    if found["product_keys"]:
        memories = _memories(found["product_keys"])
        terminal.show(terminal.table("Memories looked up by product keys", _MEMORY, memories), out)
    if found["missing"]:
        terminal.show(terminal.table("Not read", [""], [(reason,) for reason in found["missing"]]), out)


_MEMORY = ["lookup", ">heads", ">keys", ">chosen", ">rows", ">width"]


def _memories(found: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [
        (
            one["node"],
            str(one["heads"]),
            " x ".join(map(str, one["keys"])),
            str(one["chosen"]),
            *(("-", "-") if one["table"] is None else (f"{one['table'][0]:,}", str(one["table"][1]))),
        )
        for one in found
    ]


def _row(one: dict[str, Any]) -> tuple[str, ...]:
    heads = {_heads(layer) for layer in one["attention"]}
    ports = len(one["inputs"]), len(one["outputs"])
    return (
        str(one["index"]),
        one["group"],
        _words(one["kinds"]) + (" in parallel" if one["parallel"] else ""),
        one["form"],
        ", ".join(sorted(heads)) or "-",
        ", ".join(f"{mixture['chosen']} of {mixture['count']}" for mixture in one["experts"]) or "-",
        f"{_memory(one)}: {ports[0]} in, {ports[1]} out" if any(ports) else "-",
        f"{one['parameters']:,}",
        str(len(one["nodes"])),
        "yes" if one["droppable"] else f"no: {one['refusal']}",
    )


def _heads(layer: dict[str, Any]) -> str:
    """Heads, key heads where there are fewer, and elements of a head: `32/8 x 64`."""
    shared = f"/{layer['kv_heads']}" if layer["kv_heads"] != layer["heads"] else ""
    return f"{layer['heads']}{shared} x {layer['head_size']}"


def _memory(one: dict[str, Any]) -> str:
    """What the inputs and outputs of a block hold: the caches of its attentions, else a state."""
    kinds = [layer["cache"] for layer in one["attention"] if layer["cache"] != "none"]
    return ", ".join(dict.fromkeys(kinds)) or "state"


def _words(kinds: list[str]) -> str:
    return ", ".join(kinds)
