"""Dividing the channels of a value so that they reach equally far, and multiplying the weights that read it.

Logarithmic activation equalization (Li et al. 2023, arXiv:2308.15987, section 3.3) divides channel j, whose largest
magnitude is m_j, by s_j = m_j / log2(2 + m_j); afterwards it reaches log2(2 + m_j). Nothing but the weights of the
layers that read the value undoes it, so it is exact. Where all readers are such layers, what computes the value takes
the division in: the gain and bias of a norm, the weight and bias of a layer. Else a product with 1 / s is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from burnish.ir import match
from burnish.ir.inference import Inference
from burnish.ir.views.linear import Linear, find_linear
from burnish.ir.views.norm import Norm, norms
from burnish.ir.views.parameter import fits, write_input
from burnish.ir.walk import is_op
from burnish.passes import dynamic_integers, scaling, weight_sites
from burnish.passes.layers import STATISTICS, Layer, layers, portions
from burnish.passes.lossy import Context, Edit, Savings
from burnish.passes.reducers import Range
from burnish.passes.reservoirs import Reservoir, Several
from burnish.passes.scaling import Gated
from burnish.passes.sites import Site, refusal
from burnish.passes.weight_sites import Matrix

FOLDED, KEPT = "folded ", "kept "
"""Before the name of a node in the payload of an edit: what is divided by stands in what computes the value, or in a
product before the layers."""

_LEAST = 2.0**-10
"""Channels are divided by no less than this share of what the widest is divided by: some are dead on all samples."""

_ROWS = 256
"""Rows of a value that are kept to measure errors on."""

Source = Norm | Gated | Linear
"""What takes in the division of what it computes."""


@dataclass(frozen=True, eq=False)
class Group:
    """The layers that read one value, which are equalized together.

    Attributes:
        value: what they read; its last axis holds the features.
        layers: by name, in order.
    """

    value: oir.Value
    layers: dict[str, Linear]

    @property
    def features(self) -> int:
        """How many channels the value has."""
        return next(iter(self.layers.values())).in_features


@dataclass(frozen=True, eq=False)
class Seen:
    """What samples show of a value.

    Attributes:
        largest: the largest magnitude of each channel, float64 [channels].
        rows: some rows, [rows, channels].
    """

    largest: np.ndarray
    rows: np.ndarray


@dataclass(frozen=True, eq=False)
class Plan:
    """What is to be done with a group.

    Attributes:
        group: the layers.
        scale: what channels are divided by, float64 [channels]; None to leave them.
        source: what takes the division in, or why a product is kept.
    """

    group: Group
    scale: np.ndarray | None
    source: Source | str

    @property
    def folded(self) -> Source | None:
        """What takes in a division that is made."""
        return None if self.scale is None or isinstance(self.source, str) else self.source

    @property
    def words(self) -> str:
        """What is done."""
        if self.scale is None:
            return "inputs as they are"
        return "inputs equalized" if self.folded is not None else "inputs equalized by a product"


def logarithmic(largest: np.ndarray) -> np.ndarray:
    """What channels are divided by, float64 [channels], from their largest magnitudes; ones where all are 0.

    Of a channel that was 0 on all samples, as behind a Relu, nothing is known: it is divided as half of the others are.
    Divided by almost nothing, it would set the scale of all where it is not 0.
    """
    scale = largest / np.log2(2 + largest)
    if not scale.any():
        return np.ones(len(largest))
    usual = np.median(scale[scale > 0])
    return np.asarray(np.where(scale > 0, np.maximum(scale, _LEAST * scale.max()), usual))


def groups(model: oir.Model) -> tuple[list[Group], list[tuple[Layer, str]]]:
    """The layers whose weights can be multiplied, by what they read; and the others, with the reason."""
    found: dict[str, Linear] = {}
    facts, left = Inference(model), list[tuple[Layer, str]]()
    for name, layer in layers(model).items():
        if not isinstance(layer, Linear):
            left.append((layer, "it is a convolution"))
            continue
        reason = "its weight is held otherwise already" if layer.parameter is None else None
        reason = reason or weight_sites.refusal(Matrix((layer,)), facts) or refusal(model, layer.input)
        if reason is None and layer.dtype != oir.DataType.FLOAT:
            reason = "it does not compute in float32"
        if reason is None:
            found[name] = layer
        else:
            left.append((layer, reason))
    return grouped(found), left


def grouped(members: Mapping[str, Linear]) -> list[Group]:
    """Layers by what they read, in order."""
    found: dict[oir.Value, dict[str, Linear]] = {}
    for name, layer in members.items():
        found.setdefault(layer.input, {})[name] = layer
    return [Group(value, group) for value, group in found.items()]


def observed(
    model: oir.Model, found: Sequence[Group], context: Context, limit: int = STATISTICS
) -> Iterator[tuple[Group, Seen | str]]:
    """What samples show of what groups read, padding left out; or why it cannot be told, in plain words.

    No more than `limit` bytes of statistics are held at once, and of activations.
    """
    named = {str(group.value.name): group for group in found}
    keeps = context.keeps(model, {name: (group.value, -1) for name, group in named.items()})
    wanted: dict[str, Several] = {}
    for name, group in named.items():
        if isinstance(keep := keeps[name], str):
            yield group, f"padding cannot be left out: {keep}"
        else:
            wanted[name] = Several((Range(axis=-1), Reservoir(count=_ROWS)))
    members: dict[str, Layer] = {name: next(iter(group.layers.values())) for name, group in named.items()}
    if not wanted:
        return
    observer = context.observe(model)
    for part in portions(members, wanted, limit):
        sites = {name: Site(named[name].value, None if isinstance(keep := keeps[name], str) else keep) for name in part}
        for name, one in observer.observe(sites, part, context.samples, limit=limit).items():
            assert isinstance(one, Several)
            span, rows = one.parts
            assert isinstance(span, Range) and isinstance(rows, Reservoir)
            if span.absmax is None or rows.sample is None or not len(rows.sample):
                yield named[name], "no row was seen: all are padding, or the samples have none"
            elif not np.isfinite(span.absmax).all():
                yield named[name], "what it reads holds NaN or infinity"
            else:
                yield named[name], Seen(span.absmax, rows.sample)
    observer.close()


def joined(plans: Sequence[Plan]) -> list[list[Plan]]:
    """Plans that have to be made together: where a layer takes in the division of what it computes."""
    owner = {layer.node: index for index, plan in enumerate(plans) for layer in plan.group.layers.values()}
    root = list(range(len(plans)))
    for index, plan in enumerate(plans):
        source = plan.folded
        node = source.node if isinstance(source, Linear) else source.up.node if isinstance(source, Gated) else None
        if node in owner:
            first, second = sorted((root[owner[node]], root[index]))
            root = [first if one == second else one for one in root]
    return [[plan for plan, one in zip(plans, root, strict=True) if one == index] for index in dict.fromkeys(root)]


def fitting(group: Group, scale: np.ndarray) -> bool:
    """Whether the weights of a group, multiplied with what channels are divided by, fit float32."""
    return all(fits(layer.weight() * scale, oir.DataType.FLOAT) for layer in group.layers.values())


class Sources:
    """What computes the values of a model, as far as it takes in a division of its channels."""

    def __init__(self, model: oir.Model) -> None:
        self._norms = {norm.output: norm for norm in norms(model)}
        self._gated: dict[oir.Node, Gated] = {}
        for one in scaling.find_gated(model, Inference(model)):
            if isinstance(one, Gated):
                self._gated |= {down.node: one for down in one.downs}

    def of(self, group: Group) -> Source | str:
        """What takes the division of a group's value in, or in plain words why a product has to be kept."""
        own = {layer.node for layer in group.layers.values()}
        if group.value.is_graph_output():
            return "what it reads is an output of the graph"
        for use in group.value.uses():
            if not is_op(use.node, "Shape", "Size") and (use.node not in own or use.idx != 0):
                return f"{use.node.op_type} reads the same value, and is not rescaled"
        norm = self._norms.get(group.value)
        if norm is not None:
            return norm if (reason := _stays(norm)) is None else reason
        gated = self._gated.get(next(iter(own)))
        if gated is not None and {down.node for down in gated.downs} == own:
            return _rewritable(gated.up) or gated
        return _layer_before(group)


def _stays(norm: Norm) -> str | None:
    if norm.read_only:
        return norm.read_only
    if norm.kind not in ("layer", "rms") or norm.axes != (-1,):
        return "it is no normalization of the last axis"
    if norm.scale is None:
        return "the norm before it has no gain"
    if norm.outside_reader is not None or norm.inner_output is not None:
        return "something reads the norm before it halfway"
    return None


def _layer_before(group: Group) -> Linear | str:
    """The layer that computes the value, or a Relu of it, for which f(x / s) = f(x) / s."""
    value = group.value
    node = value.producer()
    if node is None:
        return "what it reads is an input of the graph"
    if is_op(node, "Relu") and node.inputs[0] is not None and match.used_once(node.inputs[0]):
        value = node.inputs[0]
        node = value.producer()
    layer = find_linear(node)
    if layer is None or layer.output is not value or layer.out_features != group.features:
        return f"{group.value.producer().op_type} before it lets no scale pass"  # type: ignore[union-attr]
    return _rewritable(layer) or layer


def _rewritable(layer: Linear) -> str | None:
    """Why what a layer computes cannot be divided without holding more numbers than before."""
    bias = layer.bias_parameter
    if layer.read_only or layer.shared:
        return "the layer before it cannot be rewritten"
    if bias is not None and (bias.others(layer.nodes[-1]) or bias.shape != (layer.out_features,)):
        return "the bias of the layer before it is not its own"
    return "the layer before it has a factor on its bias" if match.attribute(layer.node, "beta", 1.0) != 1.0 else None


def equalize(model: oir.Model, group: Group, scale: np.ndarray, source: Source | None) -> None:
    """Divide the channels of a value, and multiply the weights of the layers that read it. Views are out of date then.

    Args:
        model: the model; it computes what it did.
        group: what reads the value.
        scale: what channels are divided by, float64 [channels], positive.
        source: what takes the division in, as `Sources` tells; None for a product before the layers.

    Raises:
        ValueError: the weights do not fit float32, see `fitting`.
    """
    now = [one for layer in group.layers.values() if (one := find_linear(layer.node)) is not None]
    weights = [layer.weight() * scale for layer in now]
    if not fitting(group, scale):
        raise ValueError("the scaled weights do not fit float32")
    if isinstance(source, Norm):
        scaling.divide_gain(model, source, scale)
    elif source is not None:
        rows = source.rows if isinstance(source, Gated) else np.arange(group.features)
        up = find_linear(source.up.node if isinstance(source, Gated) else source.node)
        assert up is not None
        scaling.divide_gated(model, Gated(up, rows, ()), scale)
    for layer, weight in zip(now, weights, strict=True):
        if source is None:
            factor = (1 / scale).astype(np.float32)
            divided = dynamic_integers.multiplied(model, group.value, factor, layer.node)
            layer.node.replace_input_with(0, divided)
        _write_weight(model, layer, weight)


def _write_weight(model: oir.Model, layer: Linear, weight: np.ndarray) -> None:
    assert layer.parameter is not None
    weight = weight / match.attribute(layer.node, "alpha", 1.0)
    stored = (weight if layer.stored_transposed else weight.T).reshape(layer.parameter.shape)
    write_input(model, layer.node, 1, stored, oir.DataType.FLOAT, layer.parameter.source.name or "weight")


def savings(group: Group, source: Source | None) -> Savings:
    """What is held less, or mostly more, when a group is equalized."""
    size = group.features
    if source is None:
        return Savings(-size, -4 * size, 0)
    if not isinstance(source, Norm):
        return Savings(0, 0, 0)
    found = [one for one in (source.scale, source.bias) if one is not None]
    gone = [one for one in found if all(node in source.nodes for node in match.consumers(one.source))]
    width = (found[0].dtype or oir.DataType.FLOAT).numpy()
    return dynamic_integers.saved(gone, [np.empty(size, width)] * len(found))


def claimed(source: Source | None) -> Iterator[str]:
    """The names of the nodes whose numbers change with a division that is taken in."""
    nodes = source.nodes if isinstance(source, Norm | Linear) else source.up.nodes if isinstance(source, Gated) else ()
    for node in nodes:
        yield str(node.name)


def divide(model: oir.Model, edit: Edit, nodes: Mapping[str, oir.Node], sources: Sources) -> None:
    """Divide what the layers of an edit read, as its payload says under `FOLDED` or `KEPT` and a node.

    Args:
        model: the model.
        edit: its anchors are the nodes of linear layers.
        nodes: of the model, by name.
        sources: of the model.
    """
    members = {name: one for name in edit.anchors if (one := find_linear(nodes[name])) is not None}
    for group in grouped(members):
        name = next(iter(group.layers))
        if (scale := edit.payload.get(f"{FOLDED}{name}")) is not None:
            source = sources.of(group)
            equalize(model, group, scale, None if isinstance(source, str) else source)
        elif (scale := edit.payload.get(f"{KEPT}{name}")) is not None:
            equalize(model, group, scale, None)
