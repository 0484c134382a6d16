"""The values that views name, held against those that hooks see in the torch module.

For a file of `zoo_families` whose weights are at hand: the hidden state that each attention reads and the result of its
output layer, and the stream behind each residual block, computed by ONNX Runtime, must be what the module's own layers
take and give. It needs what the zoo is built with.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as oir
from numpy.typing import NDArray

from burnish.backends.ort import session
from burnish.ir.views.attention_layer import AttentionLayer
from burnish.passes import recipes
from burnish.passes.pipeline import Pipeline
from burnish.tools.research import zoo, zoo_export, zoo_families, zoo_truth
from burnish.tools.research.views_check import parts_of, see

Array = NDArray[Any]

ENDS = {"q_proj": ("o_proj", "dense"), "qkv": ("proj",), "to_q": ("to_out",), "c_attn": ("c_proj",), "q": ("o",)}
"""The first module of an attention, and what the last one beside it is called."""

PACKED = ("qkv", "c_attn")
"""Those of `ENDS` that make queries, keys and values at once."""

BLOCKS = frozenset(
    "_Residual _Bottleneck _BasicBlock _InvertedResidual _MBConv _SwinBlock _Block _ResnetBlock _Transformer "
    "BertLayer GPT2Block LlamaDecoderLayer Gemma2DecoderLayer Gemma3DecoderLayer Qwen3DecoderLayer PhiDecoderLayer "
    "MixtralDecoderLayer T5Block".split()
)
"""The classes of residual blocks."""


@dataclass(frozen=True)
class Watched:
    """What a torch model computes, in the order in which it does.

    Attributes:
        attentions: what the first linear layer of each takes, and what the last one gives.
        weights: of the same attentions the matrices of query, key, value and output, each [out, in].
        blocks: what each residual block gives.
    """

    attentions: list[tuple[Array, Array]]
    weights: list[tuple[Array, ...]]
    blocks: list[Array]


FLAVOURS = ("ts", "dynp", "op23", "ts-ort", "dynp-fuse")


def table() -> str:
    """Families with the number of values compared in `FLAVOURS` and the largest error, as Markdown."""
    errors: dict[str, list[float]] = {}
    for name, (family, flavour) in zoo_families.FILES.items():
        if flavour in FLAVOURS and family not in zoo_families.HANDMADE:
            errors.setdefault(family, []).extend(compare(name).values())
    lines = ["| family | values | largest error |", "| --- | --- | --- |"]
    lines += [f"| {family} | {len(found)} | {max(found):.0e} |" for family, found in errors.items()]
    return "\n".join(lines)


def compare(name: str) -> dict[str, float]:
    """The relative error of each value of a file of `zoo_families`, by what it is."""
    family, flavour = zoo_families.FILES[name]
    network = zoo_families.build(family, zoo_export.attention_of(flavour))
    truth = zoo_truth.of(name)
    watched = watch(network.module, network.inputs)
    model = Pipeline(recipes.NORMAL_FORM).rewrite(oir.load(zoo.path(name))).model
    found = see(model)
    # As in `views_check`: an encoder and the decoder's layers that do not read it run in any order.
    order = sorted(range(len(truth.attention)), key=lambda at: (truth.attention[at].cross, truth.attention[at].causal))
    attentions = [watched.attentions[at] for at in order]
    matrices = [watched.weights[at] for at in order]
    layers = sorted(found.layers, key=lambda one: (one.cross, bool(one.causal)))
    runs = [run for run in truth.blocks for _ in range(run.count)]
    ends = [end for _, end in sorted(zip(runs, watched.blocks, strict=True), key=lambda one: len(one[0].parts))]
    blocks = sorted(found.structure.blocks, key=lambda one: len(parts_of(one)))
    wanted: dict[str, tuple[oir.Value, Array]] = {}
    for number, (layer, (source, result)) in enumerate(zip(layers, attentions, strict=True)):
        wanted[f"source of attention {number}"] = layer.source, source
        wanted[f"result of attention {number}"] = layer.result, result
    for number, (block, end) in enumerate(zip(blocks, ends, strict=True)):
        if block.exit.producer() is not None:
            wanted[f"exit of block {number}"] = block.exit, end
    feeds = {key: tensor.numpy() for key, tensor in zip(network.input_names, network.inputs, strict=True)}
    values = _run(model, {value.name or "" for value, _ in wanted.values()}, feeds)
    errors = {what: _error(values[value.name or ""], array) for what, (value, array) in wanted.items()}
    for number, (layer, right) in enumerate(zip(layers, matrices, strict=True)):
        errors[f"weights of attention {number}"] = _weights_error(layer, right)
    return errors


def _weights_error(layer: AttentionLayer, matrices: tuple[Array, ...]) -> float:
    """The largest error of the four matrices of a layer, read head by head."""
    found = layer.read()
    read = [found.query, found.key, found.value]
    flat = [one.reshape(-1, one.shape[-1]) for one in read if one is not None]
    flat.append(found.output.transpose(1, 2, 0).reshape(-1, found.output.shape[0]).T)
    return max(
        float(abs(one - right).max()) if one.shape == right.shape else float("inf")
        for one, right in zip(flat, matrices, strict=True)
    )


def watch(module: Any, inputs: Iterable[Any]) -> Watched:
    """Call `module` with hooks on what `ENDS` and `BLOCKS` name."""
    import torch

    first: dict[str, Array] = {}
    seen = Watched([], [], [])
    modules = dict(module.named_modules())

    def hook(path: str) -> Any:
        parent, _, own = path.rpartition(".")

        def keep(one: Any, given: Any, kwargs: Any, result: Any) -> None:
            result = result[0] if isinstance(result, tuple) else result
            array = result.numpy().copy() if isinstance(result, torch.Tensor) else np.empty(0)
            if own in ENDS or own == "query":
                first[parent] = (given[0] if given else next(iter(kwargs.values()))).numpy().copy()
            elif type(one).__name__ in BLOCKS:
                if getattr(one, "use_res_connect", True):
                    seen.blocks.append(array)
            elif path.endswith("attention.output.dense"):
                inner = parent.replace("output", "self")
                seen.attentions.append((first[inner], array))
                seen.weights.append(_matrices([modules[f"{inner}.{n}"] for n in ("query", "key", "value")], one))
            elif any(f"{parent}.{start}" in modules for start, ends in ENDS.items() if own in ends):
                seen.attentions.append((first[parent], array))
                start = next(start for start, ends in ENDS.items() if own in ends and f"{parent}.{start}" in modules)
                names = [start.replace("q", letter) for letter in "qkv"] if start not in PACKED else [start]
                seen.weights.append(_matrices([modules[f"{parent}.{name}"] for name in names], one))

        return keep

    handles = [one.register_forward_hook(hook(path), with_kwargs=True) for path, one in modules.items() if path]
    try:
        with torch.no_grad():
            module(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _matrices(before: Sequence[Any], last: Any) -> tuple[Array, ...]:
    """The matrices [out, in] of query, key, value and output; a packed one in three parts."""
    found = [_matrix(one) for one in before]
    if len(found) == 1:
        found = list(np.split(found[0], 3))
    return (*found, _matrix(last))


def _matrix(module: Any) -> Array:
    weight: Array = module.weight.detach().numpy()
    return weight.T if type(module).__name__ == "Conv1D" else weight


def _run(model: oir.Model, names: set[str], feeds: dict[str, Array]) -> dict[str, Array]:
    """These values of the model, from ONNX Runtime."""
    copy = model.clone()
    known = {value.name: value for node in copy.graph for value in node.outputs}
    for name in names:
        if not known[name].is_graph_output():
            copy.graph.outputs.append(known[name])
    runner = session.executor(level="off")(copy)
    try:
        return runner.run({value.name or "": feeds[value.name or ""] for value in copy.graph.inputs})
    finally:
        runner.close()


def _error(value: Array, truth: Array) -> float:
    """The largest difference over the size of the values; infinite when they have not as many elements.

    A bias that stands in the operator behind, such as SkipLayerNormalization, is no difference.
    """
    if value.size != truth.size:
        return float("inf")
    differences = value.reshape(truth.shape) - truth
    bias = differences.reshape(-1, truth.shape[-1])
    if np.ptp(bias, axis=0).max() < 1e-5 * abs(truth).max():
        return float(np.ptp(bias, axis=0).max() / abs(truth).max())
    return float(abs(differences).max() / abs(truth).max())
