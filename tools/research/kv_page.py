"""The page `docs/results/kv.md`: what sharing keys and values costs, and which decoders of the zoo can."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as oir

from burnish.ir.views.attention_layer import AttentionLayer, attention_layers
from burnish.passes.kv_layers import KeyLayers
from burnish.passes.pipeline import Pipeline
from burnish.passes.recipes import NORMAL_FORM
from burnish.tools.research import structures

FAMILIES = ("llama-kv", "llama-nocache", "gemma-kv", "gemma", "qwen", "phi", "gpt2", "genai", "a3")

HEAD = """# Layers that share keys and values, measured

`python -m burnish.tools.research.kv` makes this page. [The idea](../ideas/kv.md) says what is done.

"""


def page(numbers: Mapping[str, Any], counts: Sequence[int], healed: int, seeds: Sequence[int]) -> str:
    """The page of what is known."""
    return HEAD + _language(numbers, counts, healed, seeds) + _zoo()


def _language(numbers: Mapping[str, Any], counts: Sequence[int], healed: int, seeds: Sequence[int]) -> str:
    text = f"""## SmolLM2-135M, without any training

Perplexity on 33 windows of 256 tokens of the Python manual (8,415 predictions). The model itself has
{numbers["dense"]:.2f}. C of its 30 layers read the keys and values of an earlier one, so the cache is smaller by C/30.
Searches look at text of other topics: `loss` at 2 windows of 128 tokens, KVSharer's at 30 of 32 tokens. All try the
435 pairs of layers; `loss` measures the 12 best anew for each layer, KVSharer has its threshold of 0.5.

| C | by loss | similar first | dissimilar first (KVSharer) | random order |
| --- | --- | --- | --- | --- |
"""
    for count in counts:
        cells = [_number(numbers, f"{order} {count}") for order in ("loss", "similar", "dissimilar")]
        found = [numbers[f"random {seed} {count}"] for seed in seeds if f"random {seed} {count}" in numbers]
        cells.append(", ".join(f"{one:.2f}" for one in found) or "not measured")
        text += f"| {count} | {' | '.join(cells)} |\n"
    text += _verdict(numbers, counts)
    text += "\nWho reads whom, in the order of choice:\n\n| search | C | pairs |\n| --- | --- | --- |\n"
    for order in ("loss", "similar", "dissimilar", *(f"random {seed}" for seed in seeds)):
        count = max(counts)
        pairs = numbers.get(f"{order} {count} pairs")
        if pairs is not None:
            text += f"| {order} | {count} | {' '.join(f'{taker}→{donor}' for taker, donor in pairs)} |\n"
    trained = numbers.get("healed")
    if trained is not None:
        before = numbers[f"loss {healed}"]
        text += f"""
Healed by distillation for {trained["minutes"]:.1f} minutes on one thread, {healed} of 30 layers sharing: {before:.2f}
becomes {trained["perplexity"]:.2f}, so {before - numbers["dense"]:.2f} above the model itself become
{trained["perplexity"] - numbers["dense"]:.2f}.
"""
    return text


def _verdict(numbers: Mapping[str, Any], counts: Sequence[int]) -> str:
    """Where the search by loss is not the best, and which of KVSharer's orders is the better one."""
    rivals = {count: [name for name in numbers if name.endswith(f" {count}")] for count in counts}
    worse = [n for n in counts if any(numbers[one] < numbers[f"loss {n}"] for one in rivals[n])]
    text = "\nThe search by loss does best at every C that was measured.\n"
    if worse:
        where = " and ".join(map(str, worse))
        text = f"""
The search by loss does best at every C that was measured but {where}.
"""
    both = [n for n in counts if f"similar {n}" in numbers and f"dissimilar {n}" in numbers]
    if both and all(numbers[f"similar {n}"] < numbers[f"dissimilar {n}"] for n in both):
        text += (
            "\nThe farthest first, which is KVSharer's own order, does worse than the nearest first wherever both were"
        )
        text += " measured.\n"
    return text


def _number(numbers: Mapping[str, Any], name: str) -> str:
    return f"{numbers[name]:.2f}" if name in numbers else "not measured"


def _zoo() -> str:
    text = """
## Which decoders can

Random-weight exports of each family in the spellings of several exporters, in normal form. A pair is a layer and one
before it.

| models | attention | cache | layers | pairs that can share | why the others cannot |
| --- | --- | --- | --- | --- | --- |
"""
    rows: dict[tuple[str, ...], list[str]] = {}
    for name in structures.names():
        if name.rsplit("-", 1)[0].startswith(FAMILIES) or name.startswith(FAMILIES):
            rows.setdefault(_row(name), []).append(name)
    return text + "".join(f"| {', '.join(names)} | {' | '.join(row)} |\n" for row, names in rows.items())


def _row(name: str) -> tuple[str, ...]:
    model = Pipeline(NORMAL_FORM).rewrite(oir.from_proto(structures.load(name))).model
    views = [one for one in attention_layers(model) if isinstance(one, AttentionLayer)]
    found = KeyLayers(model)
    pairs = [(taker, donor) for taker in range(len(found.layers)) for donor in range(taker)]
    reasons = [found.obstacle(taker, donor) for taker, donor in pairs]
    kinds = sorted({one.split(", layer")[0].split(" layer ")[0] for one in reasons if one is not None})
    return (
        ", ".join(sorted({one.spelling for one in views})),
        ", ".join(sorted({one.cache.kind for one in views})),
        str(len(found.layers)),
        f"{reasons.count(None)} of {len(pairs)}",
        "; ".join(kinds),
    )
