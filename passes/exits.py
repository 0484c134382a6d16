"""The way out of a model: its blocks as one chain, states of blocks mixed, tokens pooled before the head."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, match
from burnish.ir.errors import InputError
from burnish.ir.inference import Inference
from burnish.ir.views.block import Block, Structure
from burnish.ir.views.flow import Flow
from burnish.ir.views.norm import norms
from burnish.ir.walk import is_op
from burnish.passes.shared import Shared
from burnish.passes.skip_norms import not_splittable, split

_POOLS = frozenset(
    """Cast Clip Div Expand Gather GatherND Identity Max Mul ReduceMax ReduceMean ReduceSum Reshape Shape Slice Split
    Squeeze Sum Transpose Unsqueeze Where""".split()
)
"""Operators that take tokens apart or average them, and learn nothing."""


def chain(structure: Structure) -> list[Block]:
    """The blocks of a model that is one stack on one stream.

    Raises:
        InputError: it is none, with the reason: an encoder and a decoder, stages of several widths, towers.
    """
    blocks = structure.blocks
    crossing = next((block for block in blocks if "cross-attention" in block.kinds), None)
    if crossing is not None:
        raise InputError(
            f"block {crossing.index} has cross-attention: which of two stacks would end early is not clear",
            hint="take blocks out of encoder or decoder with `remove-blocks`",
        )
    for before, behind in zip(blocks, blocks[1:], strict=False):
        if before.exit is not behind.entry:
            raise InputError(
                f"blocks {before.index} and {behind.index} are not on one stream", hint="see `burnish inspect --blocks`"
            )
    for block in blocks:
        if block.entry_shape is None or block.entry_shape != block.exit_shape:
            reason = block.refusal or "it changes the shape of the stream"
            raise InputError(f"block {block.index} is another stage: {reason}", hint="see `burnish inspect --blocks`")
    return blocks


def read_between(blocks: Sequence[Block]) -> str | None:
    """What reads the stream between blocks that follow each other, besides them, in words; None when nothing does."""
    for before, behind in zip(blocks, blocks[1:], strict=False):
        own = {*behind.nodes, *before.nodes, before.adders[1], behind.adders[0]}
        if before.exit.is_graph_output():
            return f"the state behind block {before.index} is the output `{before.exit.name}`"
        reader = next((node for node in match.consumers(before.exit) if node not in own), None)
        if reader is not None:
            return f"{match.describe(reader)} reads the state behind block {before.index}"
    return None


class Head:
    """What reads the stream behind the last block of a chain.

    Args:
        model: changed by `mix` and `pool`.
        blocks: the chain.
        count: of how many of the last blocks the states are wanted.

    Raises:
        InputError: a state cannot be had.
    """

    def __init__(self, model: oir.Model, blocks: Sequence[Block], count: int) -> None:
        self.model, self.last = model, blocks[-1]
        self.states = [_state(block) for block in blocks[-count:]]
        if any(state.graph is not model.graph for state in self.states):
            raise InputError("its blocks are in a branch or a loop", hint="only `pooling=keep` and `last=1` work there")
        self.facts = Inference(model)
        self.made = Shared(model, self.facts, "exit")
        own = {node for block in blocks for node in block.nodes}
        state = self.states[-1]
        self._readers = [(use.node, use.idx) for use in state.uses() if use.node not in own]

    def mix(self, how: str) -> None:
        """Let the head read the mean, the maximum or a weighted sum of the states.

        Args:
            how: `mean`, `max` or `weighted`: weights of 1 / number of states each, which training may change.
        """
        old = self.states[-1]
        mixed = self._mixed(self.states, how)
        for node, index in self._readers:
            node.replace_input_with(index, mixed)
        if old.is_graph_output():
            _become_output(self.model, old, mixed)
        self.states = [mixed]

    def _mixed(self, values: Sequence[oir.Value], how: str) -> oir.Value:
        if how != "weighted":
            return self.made.step({"mean": "Mean", "max": "Max"}[how], *values)
        weighed = [self._weighed(value, number, len(values)) for number, value in enumerate(values)]
        return self.made.step("Sum", *weighed)

    def _weighed(self, value: oir.Value, number: int, count: int) -> oir.Value:
        weight = edit.add_constant(self.model, f"exit.weight.{number}", self._array(np.full(1, 1 / count), value))
        return self.made.step("Mul", value, weight)

    def _array(self, array: np.ndarray, like: oir.Value) -> oir.TensorProtocol:
        return oir.tensor(array.astype((self.facts.dtype(like) or oir.DataType.FLOAT).numpy()))

    def pool(self, tokens: str, layers: str, longest: int) -> None:
        """Let another pooling take the place of the one by which the head makes one state of all tokens.

        States of several layers are mixed before the tokens are pooled, unless the latter is by maximum and the former
        by weights: a maximum comes first (EarlyBIRD's five mixes).

        Args:
            tokens: `first`, `max`, `mean` or `weighted`: a mean of states times weights of 1, one for each position.
            layers: as for `mix`, where there are several states.
            longest: how many positions have a weight of their own; those behind share the last one.

        Raises:
            InputError: the head pools in no way that could be replaced, or padding cannot be told.
        """
        apart = tokens == "max" and layers == "weighted" and len(self.states) > 1
        if len(self.states) > 1 and not apart:
            self.mix(layers)
        source, result = self._pooling()
        if apart and source is not self.states[-1]:
            raise InputError(
                "a norm stands between the layers and the pooling, so maxima of several layers have no place",
                hint="give another `mix`, or `last=1`",
            )
        keep = None if tokens == "first" else self._tokens()
        if apart:
            pooled = self._mixed([self._pooled(state, tokens, keep, longest) for state in self.states], layers)
        else:
            pooled = self._pooled(source, tokens, keep, longest)
        old = result.producer()
        edit.replace_value(result, pooled)
        if old is not None:
            edit.remove_unused([old])

    def _pooling(self) -> tuple[oir.Value, oir.Value]:
        """The states of tokens that the head pools, and what it makes of them: one state of the stream's width."""
        stream = self.states[-1]
        source = next((norm.output for norm in norms(self.model) if _is_only_reader(norm.nodes, stream)), stream)
        shape = self.facts.shape(stream)
        if shape is None or len(shape) != 3:
            raise InputError(f"the stream has the shape {shape}, which is not [batch, tokens, width]")
        wanted = shape[0], shape[2]
        behind = _behind(source)
        for node in (node for node in self.model.graph if node in behind):
            for value in node.outputs:
                if self.facts.shape(value) == wanted and not _reaches_output(source, value):
                    region = behind - _behind(value)
                    odd = next((one for one in region if not is_op(one, *_POOLS)), None)
                    if odd is not None:
                        raise InputError(f"{match.describe(odd)} of the head takes part in its pooling")
                    summed = any(is_op(one, "ReduceSum") for one in region)
                    return source, _divided(value, behind, summed)
        raise InputError(
            "the head makes no single state of all tokens, which another pooling could take the place of",
            hint="leave `pooling=keep`",
        )

    def _tokens(self) -> oir.Value | None:
        """Which tokens are no padding, by the mask of the last attention.

        Returns:
            bool [batch or 1, tokens, 1]; None where all count.
        """
        layer = self.last.attention[-1] if self.last.attention else None
        flow = Flow(self.model.graph)
        values = [(one, value) for one in (layer.mask if layer else ()) for value in (*one.values, one.keep)]
        varying = [(one, value) for one, value in values if value is not None and flow.varies(value)]
        if layer is None or not varying:
            return None
        mask, value = varying[0]
        rank, floats = match.rank(value), bool(value.dtype and value.dtype.is_floating_point())
        if len(varying) > 1 or layer.causal is not False or rank is None or rank < 3 or floats != (mask.keep is None):
            cause = "which tokens are padding cannot be told from the mask of the attention"
            raise InputError(cause, hint="`pooling=first` does not ask")
        if not floats:
            value = self.made.step("Not", value) if mask.inverted else value
            value = self.made.step("Cast", value, to=int(oir.DataType.FLOAT))
        top = self.reduced("ReduceMax", value, list(range(1, rank - 1)))
        kept = self.made.step("Greater", top, self.number(_LOW if floats else 0.5, top))
        if self.facts.opset >= 13:
            return self.made.step("Unsqueeze", kept, self.made.integers([2]))
        return self.made.step("Unsqueeze", kept, axes=[2])

    def _pooled(self, states: oir.Value, how: str, keep: oir.Value | None, longest: int) -> oir.Value:
        """The states [batch, tokens, width] of one layer as one state [batch, width]."""
        made = self.made
        if how == "first":
            return made.step("Gather", states, made.scalar(0), axis=1)
        if how == "max":
            if keep is not None:
                states = made.step("Where", keep, states, self.number(-np.inf, states))
            return self.reduced("ReduceMax", states, [1])
        if how == "weighted":
            states = made.step("Mul", states, self._position_weights(states, longest))
        if keep is None:
            return self.reduced("ReduceMean", states, [1])
        total = self.reduced("ReduceSum", made.step("Where", keep, states, self.number(0.0, states)), [1])
        ones = made.step("Cast", keep, to=int(self.facts.dtype(states) or oir.DataType.FLOAT))
        count = made.step("Max", self.reduced("ReduceSum", ones, [1]), self.number(1.0, states))
        return made.step("Div", total, count)

    def _position_weights(self, states: oir.Value, longest: int) -> oir.Value:
        """A weight of 1 for each position, [tokens, 1]."""
        made, size = self.made, (self.facts.shape(states) or (None, None))[1]
        count = size if isinstance(size, int) else longest
        table = edit.add_constant(self.model, "exit.positions", self._array(np.ones((count, 1)), states))
        if isinstance(size, int) or size is None:
            return table
        length = made.squeezed(made.length(size, (states, 1)), 0)
        places = made.step("Range", made.scalar(0), length, made.scalar(1))
        return made.step("Gather", table, made.step("Min", places, made.scalar(count - 1)), axis=0)

    def number(self, number: float, like: oir.Value) -> oir.Value:
        """A constant scalar of the dtype of a value."""
        return self.made.number(number, self.facts.dtype(like) or oir.DataType.FLOAT)

    def reduced(self, op: str, value: oir.Value, axes: list[int]) -> oir.Value:
        """A reduction over axes, which go."""
        by_input = self.facts.opset >= (13 if op == "ReduceSum" else 18)
        if by_input:
            return self.made.step(op, value, self.made.integers(axes), keepdims=0)
        return self.made.step(op, value, keepdims=0, axes=axes)


_LOW = -50.0
"""What an additive mask adds to the scores of padding is below it, and to those of other tokens is 0."""


def _state(block: Block) -> oir.Value:
    """The stream behind a block as a value of its own, a sum that a skip-normalization makes taken out of it."""
    adder = block.adders[1]
    if adder is None:
        return block.exit
    reason = not_splittable(adder)
    if reason is not None:
        raise InputError(f"the state behind block {block.index} is inside {match.describe(adder)}: {reason}")
    return split(adder)


def _become_output(model: oir.Model, old: oir.Value, new: oir.Value) -> None:
    """Let `new` be the output that `old` is, under its name; readers of `old` keep it."""
    name, graph = edit.release_name(model, old), model.graph
    old.name, new.name = edit.unique_name(model, f"{name}_state"), name
    new.type, new.shape = old.type, old.shape
    new.meta.update(old.meta)
    graph.outputs[graph.outputs.index(old)] = new


def _is_only_reader(nodes: Sequence[oir.Node], value: oir.Value) -> bool:
    """Whether nodes of a norm, and nothing else, read `value`."""
    found = match.readers(value)
    return bool(found) and not value.is_graph_output() and all(node in nodes for node in found)


def _behind(value: oir.Value) -> set[oir.Node]:
    """The nodes that compute with what is computed from `value`."""
    found: set[oir.Node] = set()
    pending = [value]
    while pending:
        for node in match.readers(pending.pop()):
            if node not in found:
                found.add(node)
                pending += node.outputs
    return found


def _reaches_output(source: oir.Value, without: oir.Value) -> bool:
    """Whether an output is computed from `source` by a way that does not pass `without`."""
    pending, seen = [source], {source, without}
    while pending:
        value = pending.pop()
        if value.is_graph_output():
            return True
        for out in (out for node in match.readers(value) for out in node.outputs):
            if out not in seen:
                seen.add(out)
                pending.append(out)
    return False


def _divided(value: oir.Value, behind: set[oir.Node], summed: bool) -> oir.Value:
    """A sum of tokens behind its division by their number; what no sum is, and what is divided already, as it is."""
    if not summed:
        return value
    node = match.sole_reader(value, "Div", "Mul")
    if node is None:
        return value
    other = node.inputs[1] if node.inputs[0] is value else node.inputs[0]
    own = other is not None and (other.producer() in behind or match.rank(other) not in (0, 2))
    return value if own else node.outputs[0]
