"""What blocks are: parts that add to a residual stream, blocks of such parts, stacks of blocks."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as oir

from burnish.ir.dims import Dim
from burnish.ir.views.attention_layer import AttentionLayer
from burnish.ir.views.experts import Experts


@dataclass(frozen=True)
class Part:
    """One residual sum of a block.

    Attributes:
        kinds: what its branches do, of `burnish.ir.views.kinds.KINDS`.
        entry: what it is added to.
        source: what its first matrices read, before it is rearranged; a normed `entry` in most models;
            None when they read several values.
        results: what is added, one value a branch, that of the attention first; `entry` may be scaled before, and
            constants may be added as well.
        exit: the stream behind it.
        inner: residual sums inside its branches.
    """

    kinds: tuple[str, ...]
    entry: oir.Value
    source: oir.Value | None
    results: tuple[oir.Value, ...]
    exit: oir.Value
    inner: tuple[Part, ...] = ()

    @property
    def parallel(self) -> bool:
        """Whether attention and mlp read the same stream and are added at once."""
        return not self.inner and "attention" in self.kinds and bool({"mlp", "moe"} & set(self.kinds))

    def result(self, *, first: bool) -> oir.Value | None:
        """What the first or the last branch adds; None when branches of several kinds are added as one value."""
        return self.results[0 if first else -1] if (len(self.results) > 1) == self.parallel else None


@dataclass(frozen=True, eq=False)
class Block:
    """A residual block.

    Where the residual is a pair that a skip-normalization adds up, `entry` or `exit` is the sum, which may be an output
    of no node: `adders` then names the node that adds it.

    Attributes:
        index: its number in the model, from 0.
        parts: its residual sums, first to last.
        form: `plain`, `skip-fused`, `post-norm` or `cnn`.
        hash: equal for blocks that differ in the numbers of their weights only.
        nodes: what it consists of, sizes and masks that only it needs included.
        parameters: elements of the weights that its nodes read, each weight once; single numbers and int64 are none.
        entry_shape, exit_shape: proven shapes of the stream; None when unknown.
        inputs, outputs: its own inputs and outputs of the graph: the old and new state of a cache.
        read_outside: inner values that nodes outside read, with one such node; removal depends on them.
        attention: its attention layers, in the order of the graph.
        experts: its mixtures of experts.
        adders: skip-normalizations that add up `entry` and `exit`, None where these are plain values.
        refusal: why it cannot be dropped, in plain words; None when it can.
    """

    index: int
    parts: tuple[Part, ...]
    form: str
    hash: str
    nodes: tuple[oir.Node, ...]
    parameters: int
    entry_shape: tuple[Dim, ...] | None
    exit_shape: tuple[Dim, ...] | None
    inputs: tuple[oir.Value, ...]
    outputs: tuple[oir.Value, ...]
    read_outside: tuple[tuple[oir.Value, oir.Node], ...]
    attention: tuple[AttentionLayer, ...]
    experts: tuple[Experts, ...]
    adders: tuple[oir.Node | None, oir.Node | None]
    refusal: str | None

    @property
    def entry(self) -> oir.Value:
        """The stream before the block."""
        return self.parts[0].entry

    @property
    def exit(self) -> oir.Value:
        """The stream behind the block."""
        return self.parts[-1].exit

    @property
    def kinds(self) -> tuple[str, ...]:
        """What it does, in the order of its parts; two of a kind are named once."""
        return tuple(dict.fromkeys(kind for part in self.parts for kind in part.kinds))

    @property
    def droppable(self) -> bool:
        """Whether it may be dropped."""
        return self.refusal is None

    @property
    def parallel(self) -> bool:
        """Whether attention and mlp read the same stream and are added at once."""
        return any(part.parallel for part in self.parts)

    def part(self, *wanted: str) -> Part | None:
        """The first part, of those that hold no others, of one of these kinds."""
        simple = (inner for part in self.parts for inner in (part.inner or (part,)))
        return next((part for part in simple if set(wanted) & set(part.kinds)), None)

    @property
    def attention_in(self) -> oir.Value | None:
        """What the queries are computed from; keys and values too, in self-attention."""
        part = self.part("attention")
        return part.source if part is not None else None

    @property
    def attention_out(self) -> oir.Value | None:
        """What the attention adds to the stream; None when it is added together with something else."""
        part = self.part("attention")
        return part.result(first=True) if part is not None else None

    @property
    def mid(self) -> oir.Value | None:
        """The stream before the last part; None when there is one only."""
        return self.parts[-1].entry if len(self.parts) > 1 else None

    @property
    def mlp_in(self) -> oir.Value | None:
        """What the first matrices of the mlp, or the router and the experts, read."""
        part = self.part("mlp", "moe")
        return part.source if part is not None else None

    @property
    def mlp_out(self) -> oir.Value | None:
        """What the mlp or the experts add to the stream; None when it is added together with something else."""
        part = self.part("mlp", "moe")
        return part.result(first=False) if part is not None else None


@dataclass(frozen=True)
class Stack:
    """Blocks that follow each other on one stream of one width.

    Attributes:
        blocks: first to last.
        pattern: a letter for each block, the same for blocks of the same hash: `AAAA`, `ABAB`.
    """

    blocks: tuple[Block, ...]
    pattern: str


@dataclass(frozen=True)
class Structure:
    """What was found of a model.

    Attributes:
        stacks: in the order of their first blocks.
        missing: what could not be read, one sentence each.
    """

    stacks: tuple[Stack, ...]
    missing: tuple[str, ...] = field(default=())

    @property
    def blocks(self) -> list[Block]:
        """All blocks, by index."""
        return sorted((block for stack in self.stacks for block in stack.blocks), key=lambda block: block.index)
