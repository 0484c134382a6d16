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
    if len(gaps) == 1:
        return f"{gaps[0]:.2f}"
    return f"{sum(gaps) / len(gaps):.2f} ({min(gaps):.2f} to {max(gaps):.2f})"


def _less(gaps: list[float], others: list[float]) -> str:
    return f"{100 * (1 - sum(gaps) / sum(others)):.0f}"


def _how(records: dict[int, dict[str, Any]]) -> str:
    """From which seeds on, in how many steps of how many texts, on what device, and in what times."""
    seeds = ", ".join(str(seed) for seed in records)
    one = next(iter(records.values()))
    minutes = sorted(round(record["seconds"] / 60) for record in records.values())
    device = "one CPU thread" if one["device"] == "cpu" else one["device"]
    return (
        f"seeds {seeds}: {one['options']['steps']} steps of {one['options']['texts'] * one['batch']} texts, "
        f"{minutes[0]} to {minutes[-1]} minutes on {device} of a machine that did other work as well"
    )


def _conclusion(known: dict[str, Any]) -> list[str]:
    """Which part carries the gap behind GPTQ, and what learning does about it."""
    rounded = [f"GPTQ | {way}" for way in GPTQ]
    whole, light, cut, narrow = (_gaps(known, rounded, name) for name in ("perplexity", "weights", "clipped", "narrow"))
    plain = _gaps(known, [f"activations and cache | {way}" for way in GPTQ])
    lines = [
        f"Over the {len(whole)} seeds, rounding by GPTQ leaves QuaRot a gap of {_mean(whole)}. Its weights alone have "
        f"{_mean(light)}, activations and cache alone {_mean(plain)}: activations carry it. With grids that span 0.9 "
        f"of the range of activations and 0.95 of the cache's, as in QuaRot's paper, the gap is {_mean(cut)}; with "
        f"0.85 and 0.95, the defaults here, {_mean(narrow)}.",
    ]
    records = {seed: known[f"learned | {seed}"] for seed in SEEDS if f"learned | {seed}" in known}
    if records:
        best = _gaps(known, [f"GPTQ | learned, seed {seed}" for seed in records], "narrow")
        same = _gaps(known, [f"GPTQ | QuaRot, seed {seed}" for seed in records], "narrow")
        paper = _gaps(known, [f"GPTQ | QuaRot, seed {seed}" for seed in records], "clipped")
        few = _gaps(known, [f"learned | {seed}" for seed in records], "activations and cache")
        before = _gaps(known, [f"narrow activations and cache | QuaRot, seed {seed}" for seed in records])
        lines += [
            "",
            f"Learned by `learn-rotations` from the same matrices on ({_how(records)}), the last of these gaps is "
            f"{_mean(best)}, {_less(best, same)} % smaller than QuaRot's of the same seeds and {_less(best, paper)} % "
            "smaller than QuaRot's with the grids of its paper; that of activations "
            f"and cache alone is {_mean(few)} instead of {_mean(before)}, {_less(few, before)} % smaller. OSTQuant's "
            "paper reports 32 % less than QuaRot's for the whole.",
        ]
    return lines + _elsewhere(known["plain torch"])


def _elsewhere(seen: dict[str, Any]) -> list[str]:
    """What another implementation found out on a GPU."""
    layers = {kind: max(range(len(ones)), key=ones.__getitem__) for kind, ones in seen["layers"].items()}

    def cell(number: float | None) -> str:
        return "not measured" if number is None else f"{number:.2f}"

    return [
        "",
        "## Which inputs carry it, and what helps",
        "",
        "The tables from here on are not made by the script. They were measured once on an H100, by an implementation "
        "of the same arithmetic in plain PyTorch that was not kept, behind QuaRot of seed 0. Where the script measures "
        "the same, it differs by up to 0.04 for activations and cache and by up to 0.06 behind GPTQ: what is rounded "
        "otherwise in one layer is amplified in the next ones.",
        "",
        "Only one kind of inputs has 4 bits, over the whole range, all else none; gaps in nats a token:",
        "",
        "| inputs of | all tokens | the first token alone | all others |",
        "| --- | ---: | ---: | ---: |",
        *(f"| {kind} | {' | '.join(f'{one:.3f}' for one in ones)} |" for kind, ones in seen["inputs"].items()),
        "",
        "(`keys` and `values` are the cache.) Gate and up carry most, and among tokens the first one counts where "
        "queries and keys are made. Layer by layer the largest divergence is that of layer "
        + ", ".join(f"{number} for {kind}" for kind, number in layers.items())
        + f"; for gate and up it is {max(seen['layers']['gate and up']):.3f} there and 0.003 to 0.010 elsewhere.",
        "",
        "A Hadamard matrix over the heads before the output of attention, which QuaRot multiplies with when the model "
        "runs, changes little. `closed forms` give each pair of scales, each head of values (any invertible matrix "
        "instead of a rotation) and the axes of the stream their optimum for errors as large as the row is long: "
        "s^2 = sqrt(F / C), C the moment of rows, each divided by its energy, and F that of gradients. Grids span 0.9 "
        "and 0.95, but where they were learned. `Steps` are of 8 texts (16 in the row of 60) that are not measured on:",
        "",
        "| way | activations and cache | weights | everything, GPTQ |",
        "| --- | ---: | ---: | ---: |",
        *(f"| {way} | {' | '.join(map(cell, gaps))} |" for way, gaps in seen["ways"].items()),
        "",
        "Closed forms alone win little: behind scales that differ much, rows of activations and of weights have longer "
        "tails, and one scale for a row of weights costs three times as much. Nothing of them was kept. Their "
        "counterpart that is multiplied with when the model runs, any matrix before each norm's readers (60 more "
        "products with 576 x 576 numbers), has 0.19 for activations and cache without any learning; OSTQuant has no "
        "such products.",
        "",
        "## What learning does about it",
        "",
        "What this page said before, that learning makes losses larger at every rate, was a mistake of "
        "`learn-rotations`: **rounding had no gradient in it.** Only the ends of the ranges were told anything, and "
        "torch halves gradients between equal numbers, so these were told most by numbers at the ends of grids. The "
        "cosine between that gradient and the other implementation's was 0.03 for the rotation, in three layers of "
        "SmolLM2; it is 0.997 now, and 0.95 to 0.9998 for scales. With the wrong gradient, and channels that are "
        "massive left in place, 80 to 100 steps of 8 texts took the loss from 0.67, 0.62 and 0.61 to 0.67, 0.61 and "
        "0.57. In the first six layers alone, on a CPU, 40 steps of 4 texts of 64 tokens took the loss of texts kept "
        "apart from 0.223 to 0.201; before, none of these steps made it smaller.",
        "",
        "`QuaRot, then 70 steps with rounded weights` is what `learn-rotations` does now, except that ranges were "
        "learned as well, one for each place (0.82 to 0.87 for activations at the end, 0.77 for down), that values "
        "took any invertible matrix, and that all scores were compared. In 70 steps, a minute of a GPU, that gap of "
        "0.39 is 30 % smaller than QuaRot's of the same seed, 41 % smaller than without narrower grids, and 28 % "
        "smaller than QuaRot's in the script with grids of 0.85; on 48 other texts it is 0.40 where QuaRot has 0.58.",
        "",
        "**The 32 % of OSTQuant's paper are not reached over three seeds.** A CPU makes few steps of few texts "
        "(above): each seed gains, and by how much differs more from seed to seed than QuaRot's gaps do. What hundreds "
        "of steps of 8 texts bring on a GPU, `python -m burnish.tools.research.quant_rotation_learn SEED` and then "
        "this script would say.",
    ]
