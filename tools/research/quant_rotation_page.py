"""The page of `quant_rotation`, from its numbers."""

from __future__ import annotations

import math
from typing import Any

from burnish.tools.research.quant_rotation import (
    BLOCKS,
    EXACT,
    GPTQ,
    KINDS,
    LAYERS,
    LEARNED,
    NORM,
    PARTS,
    REPLAYED,
    SEEDS,
    SHORT,
    TOKENS,
    WAYS,
    WINDOWS,
)


def page(known: dict[str, Any]) -> str:
    """The page, from what is known."""
    exact = {label: known[f"exact | {label}"] for label in EXACT if f"exact | {label}" in known}
    if (first := known.get(f"learned | {SEEDS[0]}")) is not None:
        exact["learned"] = first["exact"]
    lines = [
        "# Rotations, and what they are worth in few bits",
        "",
        "Made by `python -m burnish.tools.research.quant_rotation`. The model is SmolLM2-135M-Instruct without a cache "
        "(30 layers, 576 wide).",
        "",
        "## What a rotation changes: nothing",
        "",
        "The largest difference of the logits to the original's, relative to the largest logit: in float32 in ONNX "
        f"Runtime on 256 tokens, and with the unrounded weights in float64 on {REPLAYED} tokens.",
        "",
        "| | float32 | float64 |",
        "| --- | ---: | ---: |",
        *(f"| {label} | {one['float32']:.1e} | {one['float64']:.1e} |" for label, one in exact.items()),
        "",
        *_weights_section(known),
        "",
        *_everything_section(known),
    ]
    return "\n".join(lines) + "\n"


def _weights_section(known: dict[str, Any]) -> list[str]:
    names = {"": "nothing (`int4`)", "rotate-residual": "`rotate-residual` (`ostquant-w4`)"}
    lines = [
        "## Weights of 4 bits, on real kernels",
        "",
        "Perplexity on 8 texts of 256 tokens of Python's help, in ONNX Runtime (MatMulNBits, which rounds what it "
        "reads to "
        "8 bits as well), calibrated on 32 others; in float32 it is 19.52. Blocks are symmetric; the head and the "
        "table of "
        "tokens keep their bits, and so does the matrix that a rotation puts before a tied head. Sizes in MB, 538 in "
        "float32: "
        "that matrix is 1.3 of them. One scale for all inputs is stored in blocks of 1024 and 2048, padding included.",
        "",
        "| before | inputs with one scale | nearest | GPTQ | MB |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for spec in LAYERS:
        for block, label in BLOCKS.items():
            found = [known.get(f"weights | {spec} | {block} | {rounding}") for rounding in ("nearest", "gptq")]
            shown = ["not measured" if one is None else f"{one['perplexity']:.2f}" for one in found]
            size = next(f"{one['bytes'] / 1e6:.0f}" for one in found if one is not None)
            lines.append(f"| {names.get(spec, f'`{spec}`')} | {label} | {' | '.join(shown)} | {size} |")
    return [
        *lines,
        "",
        "To nearest, blocks with scales of their own take care of what stands out, and a rotation spreads it over "
        "all blocks: "
        "every row is worse behind it. GPTQ makes up for errors by the inputs that go together, and behind a "
        "rotation it "
        "does so better, in blocks of any size. Balancing channels as well takes a part of it away again. So "
        "`ostquant-w4` rotates, and "
        "rounds by GPTQ in blocks of 32.",
    ]


def _everything_section(known: dict[str, Any]) -> list[str]:
    floor = math.log(known["float32"])

    def cells(key: str) -> str:
        one = known.get(key)
        number = one["perplexity"] if isinstance(one, dict) else one
        return " | " if number is None else f"{number:.1f} | {math.log(number) - floor:.2f}"

    lines = [
        "## Four bits for weights, activations and cache",
        "",
        "**Bits are simulated in floating point.** No kernel of ONNX Runtime's CPU takes 4-bit activations, so nothing "
        "here is smaller or faster than the model; the tables say what would be lost.",
        "",
        f"The text is {WINDOWS} times 256 tokens of Python's help. Weights: a symmetric grid for each output, "
        "rounded by the least "
        "squared error of the weights, or by GPTQ on 32 texts of 256 tokens. Activations and cache: a grid with a "
        "zero point "
        "over the whole range of each token, and of each head of keys and values. The head and the table of tokens "
        "keep "
        "their bits. `QuaRot` is a random Hadamard matrix for the stream and one for the values of each head. All "
        "but the "
        "first multiply by Hadamard matrices before the last layer of each MLP and behind the rotary embedding. The "
        "gap is "
        "that of the logarithm of the perplexity (nats a token); in float32 the perplexity is "
        f"{known['float32']:.2f}.",
        "",
        "| way | squared error | gap | GPTQ | gap |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    lines += [f"| {way} | {cells(f'W4A4KV4 | {way}')} | {cells(f'GPTQ | {way}')} |" for way in WAYS]
    lines += [
        f"| learned, seed {seed} | | | {cells(f'learned | {seed}')} |" for seed in SEEDS if f"learned | {seed}" in known
    ]
    parts = [(part, math.log(known[f"part | {part}"]) - floor) for part in PARTS if f"part | {part}" in known]
    lines += [
        "",
        "Behind QuaRot of seed 0 the parts alone, weights by squared error, have these gaps: "
        + ", ".join(f"{gap:.2f} for {part}" for part, gap in parts)
        + ".",
    ]
    if (why := known.get("steps")) is not None:
        lines += [
            "",
            "What stands out in this model's activations lies in single channels: in the stream before norm "
            f"{NORM} the first token of a text has {100 * why['share']:.0f} % of its energy in one. A Hadamard matrix "
            "makes two values of such a number, and the range is short; behind the axes it is spread like noise and "
            "reaches further. The step of the 4-bit grid of that token, relative to its root mean square: "
            + ", ".join(f"{why[kind]:.2f} {label}" for kind, label in KINDS.items())
            + ".",
        ]
    return [*lines, "", *_conclusion(known, floor)]


def _conclusion(known: dict[str, Any], floor: float) -> list[str]:
    """What learning adds to random matrices with the same rounding."""
    theirs = [math.log(known[key]) - floor for way in GPTQ if (key := f"GPTQ | {way}") in known]
    ours = {seed: one for seed in SEEDS if (one := known.get(f"learned | {seed}")) is not None}
    if not theirs or not ours:
        few = known["short"]
        return [
            f"What learning adds to the perplexity is not measured yet. {SHORT.steps} steps of {SHORT.texts} texts of "
            f"{TOKENS} tokens from one random matrix brought the loss on 4 texts that nothing was learned from from "
            f"{few['before']:.3f} to {few['after']:.3f}, in {few['seconds'] / 60:.0f} minutes of CPU on one core. "
            "Steps that divide each element of a gradient by its own size, as Adam does and as was tried first, ended "
            "after 24 of one text each with a gap of 2.34 where they began with 1.58.",
        ]
    gaps = [math.log(one["perplexity"]) - floor for one in ours.values()]
    quarot, learnt = sum(theirs) / len(theirs), sum(gaps) / len(gaps)
    change, word = (1 - learnt / quarot, "smaller") if learnt <= quarot else (learnt / quarot - 1, "larger")
    first = next(iter(ours.values()))
    return [
        f"Learned: the best of {LEARNED.starts} random matrices by the loss on 4 texts, then {LEARNED.steps} steps of "
        f"{LEARNED.texts} texts of {TOKENS} tokens, weights unrounded meanwhile; {first['seconds'] / 60:.0f} minutes "
        "of CPU on one "
        f"core and {first['peak'] / 1e9:.1f} GB at most. The loss on these 4 texts went from {first['least'][0]:.3f} "
        "to "
        f"{first['least'][-1]:.3f}. Over {len(theirs)} seeds QuaRot's gap is {quarot:.2f} ({min(theirs):.2f} to "
        f"{max(theirs):.2f}); the "
        f"learned one's, over {len(gaps)}, is {learnt:.2f}: {100 * change:.0f} % {word}. The paper learns for 100 to "
        "150 steps of 8 to 32 "
        "texts of 2048 tokens, and finds 32 %; that was not tried.",
    ]
