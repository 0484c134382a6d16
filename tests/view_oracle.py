"""What views claim, held against numbers: claims are computed again from the inner values that ONNX Runtime gives."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import numpy as np
import onnx
import onnx_ir as oir
import onnxruntime

from burnish.ir.text import text
from burnish.ir.views.attention_layer import AttentionLayer, attention_layers
from burnish.ir.views.block_drop import drop, obstacle
from burnish.ir.views.blocks import stacks
from burnish.ir.views.trail import HeadNorm
from burnish.ir.views.turned import Turned
from burnish.ir.walk import is_op

Arrays = dict[str, np.ndarray]
SEEN = 1e-6
"""A probability from which on a query sees a key."""


class NotRun(Exception):
    """ONNX Runtime does not take the model, or its results are not finite."""


def run(proto: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> Arrays:
    """The outputs of a model by name. NotRun when it is no model."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        names = {one.name for one in session.get_inputs()}
        outputs = [one.name for one in session.get_outputs()]
        found = session.run(None, {name: array for name, array in feeds.items() if name in names})
    except Exception as error:
        raise NotRun(str(error)) from error
    return dict(zip(outputs, (np.asarray(one) for one in found), strict=True))


def inner(model: oir.Model, feeds: Mapping[str, np.ndarray]) -> Arrays:
    """Every value of the main graph by name: inputs, weights and results."""
    proto = oir.to_proto(model)
    given = {one.name for one in proto.graph.output}
    for node in proto.graph.node:
        for name in node.output:
            if name and name not in given:
                proto.graph.output.add().name = name
                given.add(name)
    found = run(proto, feeds)
    found |= feeds
    for tensor in proto.graph.initializer:
        found[tensor.name] = onnx.numpy_helper.to_array(tensor)
    return found


def close(one: np.ndarray, other: np.ndarray, tolerance: float = 1e-3) -> bool:
    """Equal but for rounding, beside the largest element."""
    if one.shape != other.shape:
        return False
    largest = float(np.abs(other).max(initial=0.0))
    return bool(np.abs(one.astype(np.float64) - other).max(initial=0.0) <= tolerance * max(largest, 1e-3))


class Layer:
    """One attention layer with the numbers of one run."""

    def __init__(self, layer: AttentionLayer, values: Arrays) -> None:
        self.layer, self.values = layer, values
        self.scores = values[layer.anchor.inputs[0].name]
        self.probabilities = values[layer.anchor.outputs[0].name]
        self.new = 0

    def complaints(self) -> Iterator[str]:
        """What is wrong of what the view claims of the layer's mask and result."""
        yield from self._reach()
        if self.layer.cache.kind != "unknown" and not self._computes():
            yield "the result is not what the view describes"

    def _reach(self) -> Iterator[str]:
        s, t = self.probabilities.shape[-2:]
        seen = self.probabilities.reshape(-1, s, t) > SEEN
        later = np.arange(t)[None] > np.arange(s)[:, None] + (t - s)
        # A row of a softmax over nothing but hidden keys is spread evenly: those are taken for granted not to be.
        spread = np.ptp(self.probabilities.reshape(-1, s, t), axis=-1, keepdims=True) < SEEN
        ahead = (seen & later & ~spread).any()
        if self.layer.causal and ahead:
            yield "causal, but a query sees a later key"
        alike = (seen == seen[:, :1]).all()
        if self.layer.causal is False and s > 1 and t > 1 and not alike and not (seen & later).any():
            yield "not causal, but no query sees a later key"
        if self.layer.window is not None and ((seen & ~spread).sum(-1) > self.layer.window).any():
            yield f"window {self.layer.window}, but a query sees {seen.sum(-1).max()} keys"

    def _computes(self) -> bool:
        layer, heads = self.layer, self.layer.read()
        s, t = self.probabilities.shape[-2:]
        result = self._value(layer.result)
        for flip in (False, True):
            try:
                q = self._side(layer.source, heads.query, heads.query_bias, layer.query_norm, layer.rotary, s, flip)
                k = self._kept(layer.cache.key, "size")
                v = self._kept(layer.cache.value, "size")
                self.new = t - (k.shape[1] if k is not None else 0)
                if heads.key is not None and heads.value is not None:
                    rotary, norm = layer.key_rotary, layer.key_norm
                    late = rotary is not None and self.new != t and t in self._value(rotary.cos).shape[:-1]
                    turned = None if late else rotary
                    own = self._side(layer.memory, heads.key, heads.key_bias, norm, turned, self.new, flip)
                    k = own if k is None else np.concatenate([k, own], 1)
                    k = self._turned(k, rotary) if late and rotary is not None else k
                    own = self._side(layer.value_memory, heads.value, heads.value_bias, None, None, self.new, flip)
                    v = own if v is None else np.concatenate([v, own], 1)
            except ValueError:
                continue
            assert k is not None and v is not None
            if {q.shape[0]} != {k.shape[0], v.shape[0]}:
                q, k, v = (np.broadcast_to(one, (max(len(q), len(k), len(v)), *one.shape[1:])) for one in (q, k, v))
            k, v = (np.repeat(one, layer.heads // layer.kv_heads, 2) for one in (k, v))
            scores = np.einsum("bshd,bthd->bhst", q, k) * layer.scale
            if layer.softcap:
                scores = layer.softcap * np.tanh(scores / layer.softcap)
            for masked in self._masked(scores):
                with np.errstate(invalid="ignore"):
                    spread = np.exp(masked - masked.max(-1, keepdims=True))
                    # A query that sees no key has the result zero, where a model replaces what is no number.
                    weights = np.nan_to_num(spread / spread.sum(-1, keepdims=True))
                y = np.einsum("bhst,bthe,ohe->bso", weights, v, heads.output)
                y = y if heads.output_bias is None else y + heads.output_bias
                y = y.swapaxes(0, 1) if flip else y
                if y.size == result.size and close(y.reshape(result.shape), result):
                    return True
        return False

    def _value(self, value: oir.Value | None) -> np.ndarray:
        assert value is not None
        return np.asarray(self.values[value.name], np.float64)  # type: ignore[index]

    def _side(
        self, source: oir.Value | None, weight: np.ndarray, bias: np.ndarray | None, norm: HeadNorm | None,
        turned: Turned | None, length: int, flip: bool,
    ) -> np.ndarray:  # fmt: skip
        """[batch, length, heads, size] of queries, keys or values; ValueError where `flip` does not fit."""
        x = self._value(source)
        x = x.reshape(length, -1, x.shape[-1]).swapaxes(0, 1) if flip else x.reshape(-1, length, x.shape[-1])
        y = np.einsum("bsi,hdi->bshd", x, weight)
        y = y if bias is None else y + bias
        if norm is not None:
            y = self._normed(y, norm)
        return y if turned is None else self._turned(y, turned)

    @staticmethod
    def _normed(x: np.ndarray, own: HeadNorm) -> np.ndarray:
        shape, norm = x.shape, own.norm
        x = x if own.per_head else x.reshape(*shape[:2], -1)
        x = x - x.mean(-1, keepdims=True) if norm.kind == "layer" else x
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + norm.epsilon)
        return np.asarray(x * norm.gain(x.shape[-1]) + norm.offset(x.shape[-1])).reshape(shape)

    def _turned(self, x: np.ndarray, turned: Turned) -> np.ndarray:
        tables = []
        for value in (turned.cos, turned.sin):
            table = self._value(value)
            if turned.position is not None:
                table = table[self.values[turned.position.name].astype(np.int64)]  # type: ignore[index]
            table = table.reshape([n for n in table.shape[:-1] if n != 1] + [table.shape[-1]])
            table = table.reshape((1,) * (3 - table.ndim) + table.shape) if table.ndim < 3 else table
            if table.shape[1] not in (1, x.shape[1]):
                raise ValueError
            tables.append(table[:, :, None])
        cos, sin = tables
        part = x[..., turned.start : turned.start + turned.dims]
        half = turned.dims // 2
        first, second = (
            (part[..., ::2], part[..., 1::2]) if turned.interleaved else (part[..., :half], part[..., half:])
        )
        if cos.shape[-1] == half:
            cos_1 = cos_2 = cos
            sin_1 = sin_2 = sin
        elif turned.interleaved:
            (cos_1, cos_2), (sin_1, sin_2) = ((one[..., ::2], one[..., 1::2]) for one in (cos, sin))
        else:
            (cos_1, cos_2), (sin_1, sin_2) = ((one[..., :half], one[..., half:]) for one in (cos, sin))
        one, other = first * cos_1 - second * sin_1, second * cos_2 + first * sin_2
        new = np.stack([one, other], -1).reshape(part.shape) if turned.interleaved else np.concatenate([one, other], -1)
        y = x.copy()
        y[..., turned.start : turned.start + turned.dims] = new
        return y

    def _kept(self, port: object, size: str) -> np.ndarray | None:
        """[batch, past, heads, size] that the model is given; None when it is given none."""
        past = getattr(port, "past", None)
        if past is None:
            return None
        array, axes = self._value(past), list(port.past_axes)  # type: ignore[attr-defined]
        for index in port.index:  # type: ignore[attr-defined]
            array = array.take(index, axes.index("packed"))
            axes.remove("packed")
        wanted = ("batch", "total" if "total" in axes else "past", "heads", size)
        return array.transpose([axes.index(one) for one in wanted])

    def _masked(self, scores: np.ndarray) -> Iterator[np.ndarray]:
        """The scores with the masks, in each layout that the masks may have."""
        b, h, s, t = scores.shape
        layouts = ((b, h, s, t), (h, b, s, t), (b, 1, h, s, t), (b * h, s, t), (h * b, s, t), self.scores.shape)
        for shape in dict.fromkeys(layouts):
            swap = shape[:2] in ((h, b), (h * b, s)) and shape != (b, h, s, t)
            for swapped in {swap, False}:
                found = (scores.swapaxes(0, 1) if swapped else scores).reshape(shape)
                try:
                    found = self._with_masks(found)
                except ValueError:
                    continue
                yield found.reshape(h, b, s, t).swapaxes(0, 1) if swapped else found.reshape(b, h, s, t)

    def _with_masks(self, scores: np.ndarray) -> np.ndarray:
        for mask in self.layer.mask:
            for value in mask.values:
                table = self._value(value)
                if table.ndim > scores.ndim and scores.ndim == 4:
                    windows = table.shape[1]
                    shape = scores.shape
                    scores = (scores.reshape(-1, windows, *shape[1:]) + table).reshape(shape)
                    continue
                if np.broadcast_shapes(scores.shape, table.shape) != scores.shape:
                    raise ValueError
                scores = np.float32(scores) + np.float32(table)
            if mask.keep is not None:
                keep = self.values[mask.keep.name]  # type: ignore[index]
                if np.broadcast_shapes(scores.shape, keep.shape) != scores.shape:
                    raise ValueError
                scores = np.where(keep ^ mask.inverted, scores, max(mask.fill, -1e30))
        return scores


def attention_complaints(model: oir.Model, feeds: Mapping[str, np.ndarray]) -> tuple[int, list[str]]:
    """(attention layers that were checked, what is wrong of what the views claim of them)."""
    layers = [one for one in attention_layers(model) if isinstance(one, AttentionLayer)]
    layers = [one for one in layers if one.spelling == "arithmetic" and one.anchor.graph is model.graph]
    if not layers:
        return 0, []
    values = inner(model, feeds)
    wrong = [f"{one.anchor.name}: {found}" for one in layers for found in Layer(one, values).complaints()]
    before = text(model)
    for one in layers:
        one.write(model, one.read())
        one.write_scale(model, one.scale)
    if text(model) != before:
        wrong.append("writing what was read changes the model")
    return len(layers), wrong


def block_complaints(model: oir.Model, feeds: Mapping[str, np.ndarray], most: int = 2) -> tuple[int, list[str]]:
    """(sets of blocks dropped, what is wrong of a model in its normal form that is without them)."""
    found = stacks(model)
    free = [block for block in found.blocks if block.droppable and block.adders == (None, None)]
    wrong, count = [], 0
    for size in range(1, most + 1):
        for chosen in itertools.islice(itertools.combinations([one.index for one in free], size), 12):
            one = model.clone()
            structure = stacks(one)
            blocks = [block for block in structure.blocks if block.index in chosen]
            wanted = bypassed(model, set(chosen), feeds)
            if wanted is None or obstacle(structure, blocks) is not None:
                continue
            drop(one, structure, blocks if sum(chosen) % 2 else reversed(blocks))
            count += 1
            try:
                outputs = run(oir.to_proto(one), feeds)
            except NotRun as error:
                wrong.append(f"without {chosen}: {str(error)[:200]}")
                continue
            kept = {value.name for block in blocks for value in block.outputs}
            names = [value.name for value in model.graph.outputs if value.name not in kept]
            if list(outputs) != names:
                wrong.append(f"without {chosen}: the outputs are {list(outputs)}, not {names}")
            for name, array in outputs.items():
                if name in wanted and (array.dtype != wanted[name].dtype or not close(array, wanted[name])):
                    wrong.append(f"without {chosen}: {name} is not what the model without the block computes")
    nodes = [node for block in found.blocks for node in block.nodes]
    if len(set(nodes)) != len(nodes):
        wrong.append("blocks share nodes")
    return count, wrong


def bypassed(model: oir.Model, chosen: set[int], feeds: Mapping[str, np.ndarray]) -> Arrays | None:
    """What the model computes when the stream behind the blocks is replaced by that before them, first block first."""
    copy = model.clone()
    blocks = [block for block in stacks(copy).blocks if block.index in chosen]
    for block in blocks:
        if block.entry.name is None or block.exit.name is None or block.entry_shape != block.exit_shape:
            return None
    replaced: dict[str, str] = {}
    proto = oir.to_proto(copy)
    for block in blocks:
        entry, exit = str(block.entry.name), str(block.exit.name)
        replaced[exit] = replaced.get(entry, entry)
    for node in proto.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = replaced.get(name, name)
    outputs = {one.name for one in proto.graph.output}
    given = {}
    for exit, entry in replaced.items():
        if exit in outputs:
            given[exit] = entry
            if entry not in outputs:
                proto.graph.output.add().name = entry
                outputs.add(entry)
    found = run(proto, feeds)
    return {name: found[given.get(name, name)] for name in found}


def stream_complaints(model: oir.Model, feeds: Mapping[str, np.ndarray]) -> tuple[int, list[str]]:
    """(residual sums checked, those that are not a multiple of the entry, a constant and the results)."""
    found = stacks(model)
    values = inner(model, feeds)
    wrong, count = [], 0
    for block in found.blocks:
        for part in block.parts:
            names = [part.entry.name, part.exit.name, *(one.name for one in part.results)]
            if not is_op(part.exit.producer(), "Add") or any(name not in values for name in names):
                continue
            entry, exit, *results = (values[name].astype(np.float64) for name in names if name is not None)
            if {exit.shape} != {one.shape for one in (entry, *results)} or block.refusal is not None:
                continue
            count += 1
            added = sum(results) + np.zeros(exit.shape)
            rest, axes = exit - added, tuple(range(exit.ndim - 1))
            rest, entry = (one - one.mean(axes, keepdims=True) for one in (rest, entry))
            scale = (rest * entry).sum() / max((entry * entry).sum(), 1e-30)
            if np.abs(rest - scale * entry).max() > 1e-3 * np.abs(exit).max():
                wrong.append(f"block {block.index}: entry and results do not add up to the exit")
    return count, wrong
