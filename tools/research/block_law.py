"""A graph without a block against the torch module without it, for every family and exporter of the zoo.

`python -m burnish.tools.research.block_law` writes `docs/results/blocks.md`; with names of families it only prints what
it sees of these. Every block that can be dropped is dropped alone; then ONNX Runtime runs what is left, on the inputs
that the module was exported with. Families whose modules cannot do without a layer (caches that are counted, T5's first
layer, which computes the positions of all) are compared with their TorchScript export without the same block instead.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as oir
import torch
from torch import nn

from burnish.frontends import onnx_file
from burnish.ir.views.block_drop import drop, obstacle
from burnish.ir.views.blocks import stacks
from burnish.passes.pipeline import Pipeline
from burnish.passes.recipes import NORMAL_FORM
from burnish.tools.research import zoo, zoo_families

PAGE = Path(__file__).resolve().parents[2] / "docs" / "results" / "blocks.md"
Place = tuple[Any, "int | str"]
"""Where a block stands in its module: a list and an index, or a module and an attribute."""

Outputs = dict[str, np.ndarray]
AGAINST_TORCH = (
    "resnet resnet-basic mobilenet efficientnet vit-timm swin bert-s gpt2 llama-nocache gemma phi mixtral unet".split()
)


@dataclass
class Row:
    """What was seen of one family."""

    family: str
    spellings: int = 0
    blocks: int = 0
    drops: int = 0
    worst: float = 0.0
    kept: set[str] = field(default_factory=set)


class _Skipped(nn.Module):
    """Gives its first argument, and has all else of the block it stands for."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = [block]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.block[0], name)

    def forward(self, x: torch.Tensor, *others: Any, **options: Any) -> torch.Tensor:
        return x


def places(family: str, module: Any) -> list[Place]:
    """The residual blocks of a module, in the order in which they run."""
    if family == "swin":
        return [(module.layers, i) for i, layer in enumerate(module.layers) if "Block" in type(layer).__name__]
    if family in ("mobilenet", "efficientnet"):
        return [(owner, i) for owner, i, block in _children(module) if getattr(block, "use_res_connect", False)]
    if family == "unet":
        down: list[Place] = [(part, i) for i in range(2) for part in (module.down1, module.attend_down1)]
        middle: list[Place] = [(module.down2, 0), (module.down2, 1)]
        middle += [(module, name) for name in ("middle1", "attend_middle", "middle2")]
        up: list[Place] = [(module.up2, i) for i in range(3)]
        return [*down, *middle, *up, *((part, i) for i in range(3) for part in (module.up1, module.attend_up1))]
    lists = [part for _, part in module.named_modules() if isinstance(part, nn.ModuleList | nn.Sequential)]
    longest = next(part for part in lists if len({type(one) for one in part}) == 1 and len(part) > 1 and _deep(part))
    return [(longest, i) for i in range(len(longest))]


def _children(module: nn.Module) -> Iterator[tuple[Any, int, nn.Module]]:
    for part in module.modules():
        if isinstance(part, nn.Sequential):
            yield from ((part, i, block) for i, block in enumerate(part))


def _deep(part: Any) -> bool:
    return any(True for _ in part[0].children())


@contextmanager
def without(place: Place) -> Iterator[None]:
    """The module without a block, for a while."""
    owner, key = place
    old = getattr(owner, key) if isinstance(key, str) else owner[key]
    put: Callable[[nn.Module], None] = (
        (lambda one: setattr(owner, key, one)) if isinstance(key, str) else (lambda one: owner.__setitem__(key, one))
    )
    put(_Skipped(old))
    try:
        yield
    finally:
        put(old)


def run(model: oir.Model, feeds: dict[str, np.ndarray]) -> Outputs:
    """The outputs of a model in ONNX Runtime; feeds that it does not take are left out."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    data = oir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    taken = {one.name for one in session.get_inputs()}
    found = session.run(None, {name: value for name, value in feeds.items() if name in taken})
    return dict(zip([one.name for one in session.get_outputs()], found, strict=True))


def measure(family: str) -> Row:
    """Drop every block of every spelling of a family, and compare."""
    network = zoo_families.build(family, "sdpa")
    feeds = {name: value.numpy() for name, value in zip(network.input_names, network.inputs, strict=True)}
    by_torch = family in AGAINST_TORCH
    expected: dict[int, Outputs] = {}
    row = Row(family)
    here = places(family, network.module) if by_torch else []
    for flavour in zoo_families.FLAVOURS[family]:
        name = f"{family}-{flavour}"
        if name not in zoo_families.FILES:
            continue
        model = Pipeline(NORMAL_FORM).rewrite(onnx_file.read(zoo.path(name))).model
        blocks = stacks(model).blocks
        row.spellings += 1
        row.blocks = len(blocks)
        if by_torch and len(here) != len(blocks):
            raise AssertionError(f"{name}: {len(blocks)} blocks were found, the module has {len(here)}")
        for block in blocks:
            if not block.droppable:
                row.kept.add((block.refusal or "").partition(":")[0])
                continue
            left = model.clone()
            structure = stacks(left)
            reason = obstacle(structure, [structure.blocks[block.index]])
            if reason is not None:
                row.kept.add(reason)
                continue
            drop(left, structure, [structure.blocks[block.index]])
            found = run(left, feeds)
            if block.index not in expected:
                expected[block.index] = found if not by_torch else _torch(network, here[block.index])
                if not by_torch:
                    continue
            row.drops += 1
            row.worst = max(row.worst, _error(found, expected[block.index]))
    return row


def _torch(network: Any, place: Place) -> Outputs:
    with without(place), torch.no_grad():
        found = network.module(*network.inputs)
    values = (found,) if isinstance(found, torch.Tensor) else tuple(found)
    return {name: value.numpy() for name, value in zip(network.output_names, values, strict=True)}


def _error(found: Outputs, expected: Outputs) -> float:
    if set(found) != set(expected):
        raise AssertionError(f"other outputs: {set(found) ^ set(expected)}")
    return max(
        float(np.abs(found[name] - value).max() / max(np.abs(value).max(), 1e-6)) for name, value in expected.items()
    )


_HEAD = """# Dropping blocks, measured

Made by `python -m burnish.tools.research.block_law`. Each residual block that `inspect --blocks` calls droppable is
dropped alone from the normal form of each spelling of the family (exporters of torch, onnxslim, onnxsim, the fusions of
ONNX Runtime and onnxscript); what is left runs in ONNX Runtime. The error is the largest difference of any output,
relative to the largest number in it, against the torch module without that block, or, marked with *, against the
TorchScript export without it, where torch's module does not run without the layer."""


def page(rows: Sequence[Row]) -> str:
    """The page with the table."""
    lines = [*_HEAD.splitlines(), ""]
    lines += [
        "| family | spellings | blocks | drops compared | worst error | blocks that stay, because |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        mark = "" if row.family in AGAINST_TORCH else "*"
        kept = "; ".join(sorted(row.kept))
        lines.append(
            f"| {row.family}{mark} | {row.spellings} | {row.blocks} | {row.drops} | {row.worst:.0e} | {kept} |"
        )
    total, worst = sum(row.drops for row in rows), max(row.worst for row in rows)
    return "\n".join([*lines, "", f"{total} drops in all; the worst error is {worst:.1e}.", ""])


def main(arguments: Sequence[str]) -> int:
    """Run the command."""
    torch.set_num_threads(1)
    families = list(arguments) or [one for one in zoo_families.FLAVOURS if one != "mixtral-loop"]
    rows = []
    for family in families:
        rows.append(measure(family))
        print(rows[-1], flush=True)
    if not arguments:
        PAGE.write_text(page(rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
