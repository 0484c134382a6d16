"""Attention with a ReLU kernel in the place of a softmax attention, which it remembers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, match
from burnish.ir.inference import Inference
from burnish.ir.views.attention import Attention, Source
from burnish.ir.walk import walk
from burnish.passes.attention_writer import AttentionWriter
from burnish.passes.masks import Masks
from burnish.passes.shared import Shared

EPSILON = 1e-6
"""Added to the sum of the weights of a row, of which a ReLU may leave none."""

_FORMER = "burnish.former_attention"


@dataclass(frozen=True, eq=False)
class Linear:
    """What is written.

    Attributes:
        kv_first: keys are multiplied with values first.
        weight: of the convolution of the values, [value size, 1, 1, taps]; None for no convolution.
    """

    kv_first: bool
    weight: np.ndarray | None


@dataclass(frozen=True)
class Former:
    """A softmax attention that was there before: `softmax(scale q k') v`.

    Attributes:
        scale: of the scores.
        queries, keys, values: the names of what is read, [batch, heads, tokens, size].
    """

    scale: float
    queries: str
    keys: str
    values: str


@dataclass(frozen=True)
class Replaced:
    """A place where an attention was replaced.

    Attributes:
        former: the attention.
        output: what its replacement computes, [batch, heads, tokens, value size].
        trained: the weight of the convolution, where there is one.
    """

    former: Former
    output: oir.Value
    trained: tuple[oir.Value, ...]


def refusal(model: oir.Model, found: Attention, facts: Inference) -> str | None:
    """Why an attention cannot be replaced, in plain words; None when it can."""
    if found.mask or found.guard:
        return "its scores are masked"
    if any(found.anchor.attributes.get(name) for name in ("is_causal", "softcap")):
        return "its scores are masked or capped"
    if found.anchor.graph is not model.graph:
        return "it is inside a sub-graph"
    if found.sequence != found.total:
        return "it has another number of keys than of queries"
    if facts.dtype(found.end.outputs[0]) not in (oir.DataType.FLOAT, oir.DataType.DOUBLE) or found.wide:
        return "it is not in float32 or float64; convert the model after this pass"
    parts = [_heads(one) for one in (found.queries, found.keys, found.values)]
    if any(part is None for part in parts) or _output(found) is None:
        return "queries, keys, values or result are not laid out as [batch, heads, tokens, size]"
    if found.scale * np.prod([part.scale for part in parts if part is not None]) <= 0:
        return "its scale is not positive"
    return None


def _heads(sources: tuple[Source, ...]) -> Source | None:
    return next((one for one in sources if not one.flat and not one.repeated and one.past is None), None)


def _output(found: Attention) -> oir.Value | None:
    return next((value for value, flat in found.outputs if not flat), None)


def cheaper(found: Attention, sizes: Mapping[str, int]) -> str:
    """`kv` or `qk`, whichever takes fewer multiply-adds; `kv` where the number of tokens is not known."""
    tokens = found.total if isinstance(found.total, int) else sizes.get(str(found.total))
    width = found.head_size * found.value_size * 2
    return "kv" if tokens is None or tokens * (found.head_size + found.value_size) > width else "qk"


def write(model: oir.Model, found: Attention, facts: Inference, linear: Linear) -> None:
    """Put the kernel in the place of a softmax attention that `refusal` does not refuse."""
    writer = AttentionWriter(model, facts, Masks(model, facts, Shared(model, facts, "mask")), "onnx")
    sources = [_heads(one) for one in (found.queries, found.keys, found.values)]
    out = _output(found)
    assert out is not None
    q, k, v = (writer.operand(one, found.end) for one in sources if one is not None)
    scale = found.scale * float(np.prod([one.scale for one in sources if one is not None]))
    made = _Maker(model, found, facts)
    left, right = made("Relu", [q]), made("Relu", [k])
    if linear.kv_first:
        turned = made("Transpose", [right], perm=[0, 1, 3, 2])
        product = made("MatMul", [left, made("MatMul", [turned, v])])
        total = made("MatMul", [left, made("Transpose", [made.sum(right, 2)], perm=[0, 1, 3, 2])])
    else:
        weights = made("MatMul", [left, made("Transpose", [right], perm=[0, 1, 3, 2])])
        product, total = made("MatMul", [weights, v]), made.sum(weights, 3)
    result = made("Div", [product, made("Add", [total, made.number(EPSILON)])])
    if linear.weight is not None:
        half = linear.weight.shape[-1] // 2
        moved = made("Transpose", [v], perm=[0, 3, 1, 2])
        kernel = made.weight(linear.weight)
        mixed = made(
            "Conv", [moved, kernel], group=found.value_size, kernel_shape=[1, 2 * half + 1], pads=[0, half] * 2
        )
        result = made("Add", [result, made("Transpose", [mixed], perm=[0, 2, 3, 1])])
    node = result.producer()
    assert node is not None
    node.meta[_FORMER] = Former(scale, str(q.name), str(k.name), str(v.name))
    stale = out.producer()
    edit.replace_value(out, result)
    edit.remove_unused([] if stale is None else [stale])


class _Maker:
    """Puts nodes before the end of an attention, with what is inferred of them."""

    def __init__(self, model: oir.Model, found: Attention, facts: Inference) -> None:
        self._model, self._found, self._facts = model, found, facts
        dtype = facts.dtype(found.end.outputs[0])
        assert dtype is not None
        self._dtype = dtype

    def __call__(self, operator: str, inputs: list[oir.Value], **attributes: object) -> oir.Value:
        node = edit.make(operator, inputs, attributes, like=(self._found.anchor, *self._found.nodes))
        edit.insert_before(self._found.end, [node])
        self._facts.follow(node)
        return node.outputs[0]

    def number(self, number: float) -> oir.Value:
        return edit.add_rounded(self._model, "epsilon", np.array(number), self._dtype)

    def weight(self, array: np.ndarray) -> oir.Value:
        return edit.add_rounded(self._model, f"{self._found.anchor.name}_taps", array, self._dtype)

    def sum(self, value: oir.Value, axis: int) -> oir.Value:
        """The sum over an axis, which stays with the size 1."""
        if self._facts.opset < 13:
            return self("ReduceSum", [value], axes=[axis], keepdims=1)
        axes = edit.add_constant(self._model, "axes", np.array([axis], np.int64))
        return self("ReduceSum", [value, axes], keepdims=1)


def replaced(model: oir.Model) -> Iterator[Replaced]:
    """The places where this process has replaced attentions of the model, in order."""
    for node in walk(model):
        kept = node.meta.get(_FORMER)
        if isinstance(kept, Former):
            mixed = match.operand(node, "Transpose")
            kernel = match.producer(mixed[0].inputs[0], "Conv") if mixed is not None else None
            weight = match.input_of(kernel, 1) if kernel is not None else None
            yield Replaced(kept, node.outputs[0], () if weight is None else (weight,))
