"""What can be counted of a model without running it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import onnx_ir as oir

from burnish.ir.canonical import operator
from burnish.ir.views.attention import Miss
from burnish.ir.views.block import Block
from burnish.ir.walk import walk
from burnish.tools.check.lock import Sized


def types(values: Iterable[oir.Value]) -> dict[str, str]:
    """Types by name, in order."""
    from burnish.ir.text import type_text

    return {str(value.name): type_text(value) for value in values}


def opsets(model: oir.Model) -> dict[str, int]:
    """Versions by domain, sorted; functions' own versions are those of the model."""
    return {domain or "ai.onnx": version for domain, version in sorted(model.opset_imports.items())}


def operators(model: oir.Model) -> dict[str, int]:
    """Nodes of all graphs by operator, sorted by name."""
    return dict(sorted(Counter(operator(node) for node in walk(model)).items()))


def stored(model: oir.Model) -> tuple[int, dict[str, int]]:
    """Elements of all constants, each once, and their bytes by dtype, sorted."""
    from burnish.ir.cost import stored_tensors

    kept = stored_tensors(model)
    sizes: Counter[str] = Counter()
    for one in kept:
        sizes[one.dtype.lower()] += one.bytes
    return sum(one.parameters for one in kept), dict(sorted(sizes.items()))


def sizes(model: oir.Model, at: Mapping[str, int]) -> Sized:
    """Counts of a model whose dynamic dimensions have the numbers in `at`."""
    from burnish.ir import concrete, cost, liveness

    copy = concrete.concrete(model, at)
    parameters, size = stored(model)
    return Sized(
        nodes=len(walk(model)),
        parameters=parameters,
        bytes=size,
        multiply_adds=cost.model_cost(copy, at).macs,
        peak_activation=liveness.activation_peak(copy, at).peak,
        at=dict(at),
    )


def views(model: oir.Model, blocks: Iterable[Block]) -> dict[str, int]:
    """How many there are of what the views read in the model as it is; what there is none of is left out."""
    from burnish.ir.inference import Inference
    from burnish.ir.views.activation import ROOTS, find_activation
    from burnish.ir.views.attention import find_attentions
    from burnish.ir.views.attention_layer import attention_layers
    from burnish.ir.views.convolution import convolutions
    from burnish.ir.views.embedding import embeddings
    from burnish.ir.views.experts import find_experts
    from burnish.ir.views.linear import linears
    from burnish.ir.views.norm import norms
    from burnish.ir.views.rotary import find_rotaries

    facts = Inference(model)
    layers = [one for one in attention_layers(model, facts) if not isinstance(one, Miss)]
    found = {
        "blocks": len(list(blocks)),
        "attentions": _hits(find_attentions(model, facts)),
        "attention layers": len(layers),
        "caches": sum(bool(one.cache) for one in layers),
        "rotary embeddings": _hits(find_rotaries(model, facts)),
        "mixtures of experts": _hits(find_experts(model, facts)),
        "embeddings": _hits(embeddings(model, facts)),
        "linear layers": _hits(linears(model)),
        "convolutions": _hits(convolutions(model)),
        "norms": _hits(norms(model)),
        "activations": sum(find_activation(node) is not None for node in walk(model, *ROOTS)),
    }
    return {name: count for name, count in found.items() if count}


def _hits(found: Iterable[Any]) -> int:
    return sum(not isinstance(one, Miss) for one in found)


def passes(model: oir.Model) -> dict[str, int]:
    """Rewrites by pass of the default recipe, those that fire only; the model is not changed and not run."""
    from burnish.passes.pipeline import Pipeline
    from burnish.passes.recipes import named

    run = Pipeline(named("default", "onnx", None)).rewrite(model)
    fired: Counter[str] = Counter()
    for step in run.steps:
        fired[step.outcome.name] += step.outcome.rewritten
    return {name: count for name, count in sorted(fired.items()) if count}
