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
    NORM,
    PARTS,
    REPLAYED,
    WAYS,
    WINDOWS,
)
from burnish.tools.research.quant_rotation_learn import SEEDS

REASON = [
    "Rates were not lowered then when the texts kept apart did worse; now they are. The reason was looked for on a "
    "CPU. In the first six layers, of the gradient by the rotation of the stream, 43 % of the energy lies in one plane "
    "of 288, and 70 % of a direction of that plane is channel 507, which has 92 and 98 % of the energy of the first "
    "token before norms 10 and 40 and a quarter of that of others. So a step that turns rows by 0.01 radians in the "
    "mean square turns that plane by a tenth, and a Hadamard matrix no longer writes first tokens as two values that a "
    "grid holds exactly. With 4 bits for activations and cache, a turn by 0.03 radians in the mean square took two "
    "texts from 3.40 to 3.54 nats a token where all of it was in a plane of that channel, and to 3.39 where it was "
    "spread over all planes."
]


def page(known: dict[str, Any]) -> str:
    """The page, from what is known."""
    exact = {label: known[f"exact | {label}"] for label in EXACT if f"exact | {label}" in known}
    if "exact" in (first := known.get(f"learned | {SEEDS[0]}", {})):
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
        f"| learned, seed {seed} | | | {cells(key)} |"
        for seed in SEEDS
        if (key := f"GPTQ | learned, seed {seed}") in known
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
    return [*lines, "", *_conclusion(known)]


def _gaps(known: dict[str, Any], keys: list[str], field: str | None = None) -> list[float]:
    """Gaps to float32 of the numbers that are known, in nats a token."""
    found = [known[key] if field is None else known[key][field] for key in keys if key in known]
    return [math.log(one / known["float32"]) for one in found]


def _mean(gaps: list[float]) -> str:
    return f"{sum(gaps) / len(gaps):.2f} ({min(gaps):.2f} to {max(gaps):.2f})"


def _conclusion(known: dict[str, Any]) -> list[str]:
    """Which part carries the gap behind GPTQ, and what learning does about it."""
    rounded = [f"GPTQ | {way}" for way in GPTQ]
    whole, light, cut = (_gaps(known, rounded, name) for name in ("perplexity", "weights", "clipped"))
    plain = _gaps(known, [f"activations and cache | {way}" for way in GPTQ])
    records = [known[key] for seed in SEEDS if (key := f"learned | {seed}") in known]
    best = _gaps(known, [f"learned | {seed}" for seed in SEEDS], "activations and cache")
    if not whole or not records:
        return ["What learning adds is not measured."]
    change = 100 * (1 - sum(best) * len(plain) / sum(plain) / len(best))
    options, first = records[0]["options"], records[0]
    shown = (0, 1, 5, 10, len(first["losses"]) - 1)
    return [
        f"Over the {len(whole)} seeds, rounding by GPTQ leaves QuaRot a gap of {_mean(whole)}. Its weights alone have "
        f"{_mean(light)}, activations and cache alone {_mean(plain)}: activations carry it, and learning would have to "
        f"make their error smaller. With grids that span 0.9 of the range of activations and 0.95 of the cache's, as "
        f"in QuaRot's paper, the gap is {_mean(cut)}.",
        "",
        "## What learning does about it: nothing yet",
        "",
        f"OSTQuant's paper reports 32 % less. **That is not reached here.** On one H100, from the best of "
        f"{options['starts']} random matrices on and with {options['angle']} radians and a rate of "
        f"{options['scale_rate']} at first, steps of 16 texts of 256 tokens made the loss of what comes next larger:",
        "",
        f"| steps before | {' | '.join(str(10 * one) for one in shown)} |",
        f"| --- | {' | '.join('---:' for _ in shown)} |",
        *(
            f"| seed {seed} | "
            + " | ".join(f"{one['losses'][min(at, len(one['losses']) - 1)]:.2f}" for at in shown)
            + " |"
            for seed, one in zip(SEEDS, records, strict=False)
        ),
        "",
        "What is kept is what does best on 48 texts that nothing is learned from, so the result is the best of the "
        f"random matrices: the gap of activations and cache is {_mean(best)}, {change:.0f} % smaller than without a "
        "choice. With 0.004 radians and a rate of 0.005 it rose as well, from 0.54 to 1.54 in 40 steps.",
        "",
        *REASON,
    ]
