"""Gates around the attention of a block: a router reads the stream, and decides row by row whether it is computed.

What the gate does (Router-Tuning, MindSkip; arXiv:2410.13184): the mean of the stream over the tokens of a row, times
the router's weights, plus its bias, is the row's score. Where that is negative, the attention adds nothing to the row.
No row depends on others: the nodes of the attention run when some row wants them, and zeros go to the rows that do not.

A decoder decides while a row has no past, and holds the decision: the keys that a skipped attention keeps are the
number `SKIPPED`, by which the gate knows in each later call what was decided. Caches are as long as they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from burnish.ir import dims, edit, match
from burnish.ir.inference import Inference, Shape
from burnish.ir.views.block import Block
from burnish.ir.walk import is_op
from burnish.passes.depth_branches import Branch, attention_of
from burnish.passes.sites import Keep

SKIPPED = -32768.0
"""All keys of a token for which the attention was not computed; no layer computes it in all elements at once."""

_OPSET = 13
"""The first in which axes are inputs of the operators that are written."""
_LAST = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Router:
    """What decides, in the numbers of the stream itself.

    Attributes:
        weight: float64 [features].
        bias: its score of a stream of zeros; the attention is computed where a score is 0 or more.
    """

    weight: np.ndarray
    bias: float


@dataclass(frozen=True)
class Padding:
    """The input that says which tokens count, [batch, tokens], or with those of a past before them.

    Attributes:
        input: its name.
        kept: the number that lets a token count.
        additive: 0 lets a token count, a large negative number does not.
        tail: whether a past comes first.
    """

    input: str
    kept: int = 1
    additive: bool = False
    tail: bool = False


@dataclass(frozen=True, eq=False)
class Place:
    """An attention that can have a gate.

    Attributes:
        branch: what is gated.
        stream: what the router reads, [batch, tokens, features], to which the attention is added.
        features: of the stream.
        keys: the node that joins the old keys with the new ones; None without a cache.
        time: the axis along which it does.
        size: elements of the keys of one token of one row.
    """

    branch: Branch
    stream: oir.Value
    features: int
    keys: oir.Node | None = None
    time: int = 0
    size: int = 0


def place_of(model: oir.Model, block: Block, facts: Inference) -> Place | str | None:
    """Where the attention of a block can have a gate, or why it cannot; None where it has no attention."""
    branch, part = attention_of(block), block.part("attention")
    if not isinstance(branch, Branch) or part is None:
        return branch if isinstance(branch, str) else None
    stream, shape = part.entry, facts.shape(part.entry)
    if model.opset_imports.get("", 1) < _OPSET:
        return f"a gate needs opset {_OPSET}"
    if any(layer.cross for layer in block.attention):
        return "it reads another sequence too"
    if stream.graph is not model.graph or any(node.graph is not model.graph for node in branch.nodes):
        return "it is inside a sub-graph"
    if facts.dtype(stream) not in (oir.DataType.FLOAT, oir.DataType.DOUBLE):
        return "its stream is not in float32 or float64; convert the model after this pass"
    if shape is None or len(shape) != 3 or not isinstance(shape[2], int) or facts.shape(branch.result) != shape:
        return "its stream is not [batch, tokens, features] with known features"
    if shape[1] == 1 or not _is_batch(model, shape, facts) or _rows_second(block, shape, facts):
        return "it is not known that the first axis of its stream is the batch"
    if not branch.outputs:
        held = any(layer.cache for layer in block.attention)
        return "it has no cache of its own to hold a decision in" if held else Place(branch, stream, shape[2])
    return _with_cache(block, branch, stream, shape[2], facts)


def _is_batch(model: oir.Model, shape: Shape, facts: Inference) -> bool:
    """Whether inputs of the model have as many rows as the stream."""
    return any((facts.shape(value) or (None,))[0] == shape[0] for value in model.graph.inputs)


def _rows_second(block: Block, shape: Shape, facts: Inference) -> bool:
    """Whether the scores have as many rows as the second axis of the stream, and not as many as the first."""
    for layer in block.attention:
        scores = facts.shape(layer.anchor.outputs[0])
        if scores and dims.divide_exactly(scores[0], shape[0]) is None:
            if dims.divide_exactly(scores[0], shape[1]) is not None:
                return True
    return False


def _with_cache(block: Block, branch: Branch, stream: oir.Value, features: int, facts: Inference) -> Place | str:
    """The place of an attention with a cache of its own that Concat grows."""
    if len(block.attention) != 1 or len(branch.inputs) != 2 or len(branch.outputs) != 2:
        return "its block has other caches than one of keys and one of values"
    cache = block.attention[0].cache
    if cache.kind != "kv" or cache.form != "append" or cache.key is None or cache.key.past is None:
        return "its cache does not grow by what is added behind it"
    for port in branch.outputs:
        node, own = port.producer(), set(branch.nodes)
        if node is None or not is_op(node, "Concat"):
            return f"its cache is kept by {match.describe(node) if node is not None else 'the caller'}, not by a Concat"
        if node not in own:
            return "another layer reads its keys or values"
        if len(node.inputs) != 2 or node.inputs[0] not in branch.inputs:
            return "its cache is joined with more than its new keys or values"
    keys = cache.key.present.producer() if cache.key.present is not None else None
    shape, axes = facts.shape(cache.key.past), cache.key.past_axes
    if keys is None or shape is None or axes[:1] != ("batch",) or axes.count("past") != 1:
        return "the axes of its cache are not known"
    time = axes.index("past")
    rest = [size for axis, size in enumerate(shape) if axis not in (0, time)]
    if not all(isinstance(size, int) for size in rest):
        return "the sizes of its cache are not known"
    return Place(branch, stream, features, keys, time, int(np.prod([size for size in rest if isinstance(size, int)])))


def padding_of(keep: Keep | str | None) -> Padding | str | None:
    """The padding of a stream as `Context.keeps` tells of it, or why a gate cannot leave it out; None for none."""
    if keep is None or isinstance(keep, str):
        return keep if keep is None else f"it cannot be told which tokens are padding: {keep}"
    if keep.axes != (0, 1) or keep.used not in (None, (0, 1)):
        return f"the mask `{keep.input}` is not [batch, tokens]"
    return Padding(keep.input, keep.kept, keep.additive, keep.tail)


def write(model: oir.Model, place: Place, facts: Inference, router: Router, padding: Padding | None) -> None:
    """Put a gate around an attention.

    Args:
        model: changed in place.
        place: in the main graph; `facts` are of the model before.
        facts: take in what is added.
        router: decides.
        padding: which tokens it does not look at; None where all count.
    """
    branch = place.branch
    made = _Maker(model, branch, facts)
    skip = _skips(made, model, place, router, padding)
    some = made("Less", [made.reduced("ReduceMin", made.cast(skip, oir.DataType.FLOAT), None), made.number(0.5)])
    ports = list(branch.outputs)
    past = {port: old for port in ports if (node := port.producer()) is not None and (old := node.inputs[0])}
    join = branch.join
    graph = model.graph
    graph.remove(branch.nodes)  # their values are still read, until the If takes their place
    inside = _Maker(model, branch, facts, oir.Graph([], [], nodes=branch.nodes, name="attention"))
    result = branch.result
    if facts.shape(place.stream)[0] != 1:  # type: ignore[index]
        zero = made.number(0.0, facts.dtype(result))
        result = inside("Where", [inside.unsqueezed(skip, 3), zero, result])
        for port in ports:
            node = port.producer()
            assert node is not None and node.inputs[1] is not None
            number = made.number(SKIPPED if node is place.keys else 0.0, facts.dtype(node.inputs[1]))
            rows = inside.unsqueezed(skip, len(facts.shape(node.inputs[1]) or ()), before=node)
            node.replace_input_with(1, inside("Where", [rows, number, node.inputs[1]], before=node))
    beside = _Maker(model, branch, facts, oir.Graph([], [], nodes=[], name="none"))
    nothing = [beside.filled(beside("Shape", [place.stream]), 0.0, facts.dtype(result))]
    for port in ports:
        node = port.producer()
        assert node is not None
        axis = match.attribute(node, "axis")
        sizes = beside.sizes(past[port], axis, place.stream)
        new = beside.filled(sizes, SKIPPED if node is place.keys else 0.0, facts.dtype(past[port]))
        nothing.append(beside("Concat", [past[port], new], axis=axis))
    _close(model, join, made, inside, beside, some, [branch.result, *ports], [result, *ports], nothing)


def _close(
    model: oir.Model, join: oir.Node, made: _Maker, inside: _Maker, beside: _Maker, some: oir.Value,
    old: Sequence[oir.Value], then: Sequence[oir.Value], other: Sequence[oir.Value],
) -> None:  # fmt: skip
    """Let an If give what the attention gave: `then` in its first branch, `other` in its second."""
    branches = {}
    node = edit.make("If", [some], {}, like=made.like, outputs=len(old))
    for before, out in zip(old, node.outputs, strict=True):
        out.type, out.shape = before.type, before.shape
    edit.insert_before(join, [node])
    inner = inside.graph
    own = {inner_node for inner_node in (inner or ())}
    for before, out in zip(old, node.outputs, strict=True):
        if before.is_graph_output():
            outputs = model.graph.outputs
            outputs[outputs.index(before)] = out
            before.name, out.name = None, before.name
            out.meta.update(before.meta)
        for use in list(before.uses()):
            if use.node not in own:
                use.node.replace_input_with(use.idx, out)
    for name, maker, values in (("then_branch", inside, then), ("else_branch", beside, other)):
        assert maker.graph is not None
        maker.graph.outputs.extend(values)
        branches[name] = maker.graph
    for name, graph in branches.items():
        node.attributes[name] = oir.AttrGraph(name, graph)
    model.graph.sort()


def _skips(made: _Maker, model: oir.Model, place: Place, router: Router, padding: Padding | None) -> oir.Value:
    """Booleans [batch]: the rows to which the attention adds nothing."""
    stream, dtype = place.stream, made.facts.dtype(place.stream)
    mask, fresh = None, None
    if padding is not None:
        given = next(value for value in model.graph.inputs if value.name == padding.input)
        now, before = given, None
        if padding.tail:
            length = made("Neg", [made.part(made("Shape", [stream]), 1)])
            now = made("Slice", [given, length, made.integers(_LAST), made.integers(1)])
            before = made("Slice", [given, made.integers(0), length, made.integers(1)])
        mask = made.counted(now, padding)
        if before is not None and place.keys is not None:
            count = made.reduced("ReduceSum", made.cast(made.counted(before, padding), oir.DataType.FLOAT), [1])
            fresh = made("Less", [count, made.number(0.5)])
    if mask is None:
        mean = made.reduced("ReduceMean", stream, [1])
    else:
        kept = made("Where", [made.unsqueezed(mask, 3, 2), stream, made.number(0.0, dtype)])
        count = made.reduced("ReduceSum", made.cast(mask, dtype), [1], keep=True)
        mean = made.reduced("ReduceSum", kept, [1])
        mean = made("Div", [mean, made("Max", [count, made.number(1.0, dtype)])])
    weight = edit.add_rounded(model, f"{made.like[0].name}_router", router.weight, made.known(dtype))
    score = made.reduced("ReduceSum", made("Mul", [mean, weight]), [1])
    score = made("Add", [score, made.number(router.bias, dtype)])
    skip = made("Less", [score, made.number(0.0, dtype)])
    if place.keys is None:
        return skip
    past = place.keys.inputs[0]
    assert past is not None
    if fresh is None:
        fresh = made("Equal", [made.part(made("Shape", [past]), place.time), made.integers(0)])
    last = made("Slice", [past, made.integers(-1), made.integers(_LAST), made.integers(place.time)])
    held = made("Equal", [last, made.number(SKIPPED, made.facts.dtype(past))])
    rest = [axis for axis in range(len(made.facts.shape(past) or ())) if axis]
    count = made.reduced("ReduceSum", made.cast(held, oir.DataType.FLOAT), rest)
    held = made("Greater", [count, made.number(place.size - 0.5)])
    return made("Or", [made("And", [fresh, skip]), made("And", [made("Not", [fresh]), held])])


def decides(model: oir.Model) -> bool:
    """Whether the first tokens of a row decide what a decoder computes: an If gives a cache, and past keys choose."""
    pasts = set(model.graph.inputs)
    for value in model.graph.outputs:
        node = value.producer()
        if node is None or not is_op(node, "If") or match.rank(value) in (None, 0, 1):
            continue
        pending, seen = [node.inputs[0]], set[oir.Value]()
        while pending:
            one = pending.pop()
            if one is None or one in seen:
                continue
            seen.add(one)
            if one in pasts and (match.rank(one) or 0) >= 3:
                return True
            above = one.producer()
            if above is not None and not is_op(above, "Shape", "Size"):
                pending += above.inputs
    return False


class _Maker:
    """Writes nodes before the join of a branch or, where a graph is given, at its end."""

    def __init__(self, model: oir.Model, branch: Branch, facts: Inference, graph: oir.Graph | None = None) -> None:
        self._model, self._join, self.facts, self.graph = model, branch.join, facts, graph
        self.like = branch.nodes

    def __call__(
        self, operator: str, inputs: list[oir.Value | None], before: oir.Node | None = None, **attributes: object
    ) -> oir.Value:
        node = edit.make(operator, inputs, attributes, like=self.like)
        if self.graph is not None and before is None:
            self.graph.append(node)
        else:
            edit.insert_before(self._join if before is None else before, [node])
        self.facts.follow(node)
        return node.outputs[0]

    def known(self, dtype: oir.DataType | None) -> oir.DataType:
        """A dtype that was proven before."""
        assert dtype is not None
        return dtype

    def number(self, number: float, dtype: oir.DataType | None = oir.DataType.FLOAT) -> oir.Value:
        """A constant in the main graph."""
        return edit.add_rounded(self._model, "gate", np.array(number, np.float64), self.known(dtype))

    def integers(self, *numbers: int) -> oir.Value:
        """A constant int64 [n]."""
        return edit.add_constant(self._model, "gate", np.array(numbers, np.int64))

    def cast(self, value: oir.Value, dtype: oir.DataType | None) -> oir.Value:
        """The value in another dtype."""
        return self("Cast", [value], to=int(self.known(dtype)))

    def reduced(self, operator: str, value: oir.Value, axes: list[int] | None, *, keep: bool = False) -> oir.Value:
        """A reduction over axes, over all of them for None."""
        since = 13 if operator == "ReduceSum" else 18
        if axes is None:
            return self(operator, [value], keepdims=int(keep))
        if self.facts.opset < since:
            return self(operator, [value], axes=axes, keepdims=int(keep))
        return self(operator, [value, self.integers(*axes)], keepdims=int(keep))

    def unsqueezed(self, value: oir.Value, rank: int, own: int = 1, before: oir.Node | None = None) -> oir.Value:
        """A value of rank `own` with axes of size 1 behind, up to a rank."""
        return self("Unsqueeze", [value, self.integers(*range(own, rank))], before)

    def part(self, sizes: oir.Value, axis: int) -> oir.Value:
        """One of some sizes, int64 [1]."""
        return self("Gather", [sizes, self.integers(axis)], axis=0)

    def counted(self, mask: oir.Value, padding: Padding) -> oir.Value:
        """Booleans, true where a token counts."""
        dtype = self.known(self.facts.dtype(mask))
        if padding.additive:
            return self("Greater", [mask, self.number(-1.0, dtype)])
        if dtype == oir.DataType.BOOL:
            return mask if padding.kept else self("Not", [mask])
        kept = edit.add_constant(self._model, "gate", np.array(padding.kept, dtype.numpy()))
        return self("Equal", [mask, kept])

    def sizes(self, past: oir.Value, axis: int, stream: oir.Value) -> oir.Value:
        """The sizes of what new tokens add to a past along an axis."""
        axis %= len(self.facts.shape(past) or ())
        whole, tokens = self("Shape", [past]), self.part(self("Shape", [stream]), 1)
        first = [self("Slice", [whole, self.integers(0), self.integers(axis), self.integers(0)])] if axis else []
        behind = self("Slice", [whole, self.integers(axis + 1), self.integers(_LAST), self.integers(0)])
        return self("Concat", [*first, tokens, behind], axis=0)

    def filled(self, sizes: oir.Value, number: float, dtype: oir.DataType | None) -> oir.Value:
        """A value of these sizes, the same number everywhere."""
        array = np.array([number], self.known(dtype).numpy())
        return self("ConstantOfShape", [sizes], value=oir.tensor(array))
