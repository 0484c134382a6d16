"""The numbers and the page of `quant_weights.py`."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import stdev
from typing import Any

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
NUMBERS = RESULTS / "quant-weights.json"
Row = dict[str, Any]

_NAMES = {
    "a3": ("SmolLM2-135M (A3)", "perplexity", "lower is better; 8 texts of 256 tokens, calibrated on 32 others"),
    "a2": ("all-MiniLM-L6 (A2)", "R@1", "60 texts, calibrated on 96 others"),
    "a5": ("Magika (A5)", "accuracy", "every other file, calibrated on the rest"),
}

_BEDS = {
    "resnet": "digits ResNet",
    "a6-cls": "PP-OCR, direction (A6)",
    "a6-rec": "PP-OCR, reader (A6)",
    "a1": "EfficientNet-lite0 (A1)",
}
AT_ONCE = "gptq at once"
ROUNDINGS = ("nearest", "mse", "hqq", AT_ONCE, "gptq", "adaround")
"""Of convolutions."""
MEASURED = ROUNDINGS[3:]
"""Those that look at samples."""
DRAWS = {"resnet": 8, "a6-cls": 8}
"""How many times a model is calibrated, each time without another one of its samples; else once, with all."""

_HEAD = """# Weights in few bits, measured

Made by `python -m burnish.tools.research.quant_weights`; numbers in [quant-weights.json](quant-weights.json).
[quantize-weights](../ideas/quantization.md) beside `onnxruntime.quantization.matmul_nbits_quantizer` of ONNX Runtime
1.32, on the same layers of the same normal form, run by the same kernels (MatMulNBits, `accuracy_level` 4: activations
are rounded to 8 bits in blocks). `error` is the relative Frobenius error of all outputs against float32. `MB` is what
all constants take. Rows of one block and one kind of zero points take the same bytes, save for HQQ of ONNX Runtime,
whose zero points are floating-point numbers. `whole` rows store tables of embeddings, and a head that is tied to one,
in few bits as well; the quantizers of ONNX Runtime leave the head of SmolLM2 and the tables as they are. Weights that
were published in few bits, as all of SmolLM2's, are rounded like others here (`published=false`), save in rows `as
published`, which store them in those bits, without loss. CPU seconds are those of rounding on one core, with what it
observes. Rows that are not listed were not measured.
"""

_AWQ = """## Scales of the inputs

By how much what a layer computes is changed, as a share of it: the geometric mean over the {layers} layers of
all-MiniLM-L6, 4 bits, symmetric, blocks of 32, on the data that it is calibrated on. `scaled` is AWQ (Lin et al. 2023,
arXiv:2306.00978): inputs divided by a power of their root mean square, the best of 20 for the layer. GPTQ gains next to
nothing by it, so `quantize-weights` does not offer it.

| rounding | error |
| --- | --- |
"""

_CONVOLUTIONS = """## Convolutions

Stored in 8 or 4 bits with a scale for each output (`convolutions=true`), everything else in float32. `gptq at once`
takes each convolution for the only one that is rounded; `gptq`, as `quantize-weights` does it, goes from the first to
the last and lets each make up for what was lost before it. `adaround` learns besides for each weight whether it is
rounded up or down, in 1000 steps (AdaRound, Nagel et al. 2020, arXiv:2004.10568), which takes {times} times as long.
Where an error has a standard deviation, what looks at samples was calibrated {draws} times, each time without another
one of the samples, and all numbers are means: what one convolution is rounded to changes what all behind it are rounded
for, and errors in 4 bits come out differently after the smallest change. By `adaround` EfficientNet-lite0 and the
ResNet gain a twentieth over `gptq`; the classifier gains nothing that stands out of this, and the reader loses a
twentieth. Rows that are not listed were not measured.
Made by `python -m burnish.tools.research.quant_convolutions`.

| model | bits | rounding | error | agreement | metric | MB | CPU s |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""


def read() -> dict[str, dict[str, Row]]:
    """All numbers, by model and row."""
    return json.loads(NUMBERS.read_text()) if NUMBERS.exists() else {}


def note(model: str, row: str, found: Row) -> None:
    """Keep the numbers of a row."""
    numbers = read()
    numbers.setdefault(model, {})[row] = found
    NUMBERS.write_text(json.dumps(numbers, indent=1) + "\n")


def write() -> None:
    """Write the page."""
    numbers = read()
    parts = [_HEAD]
    for key, (name, metric, of) in _NAMES.items():
        if key in numbers:
            parts.append(f"## {name}\n\n{metric}: {of}.\n\n{_table(numbers[key], metric)}")
    if "awq" in numbers:
        lines = [f"| {row} | {one['error']:.4f} |" for row, one in numbers["awq"].items()]
        layers = max(one["layers"] for one in numbers["awq"].values())
        parts.append(_AWQ.format(layers=layers) + "\n".join(lines) + "\n")
    if "convolutions" in numbers:
        parts.append(_convolutions(numbers["convolutions"]))
    if "decode" in numbers:
        lines = []
        for row, one in numbers["decode"].items():
            faster, low, high = (1 / one[key] for key in ("ratio", "high", "low"))
            lines.append(f"| {row} | {one['bytes'] / 1e6:.0f} | {faster:.2f}x | {low:.2f} to {high:.2f} |")
        parts.append(
            "## One token of SmolLM2\n\nA step of one token behind 256 in the cache, timed in turns with float32 on one"
            " thread of a\nprocessor with AVX-512 VNNI that had other work too. With tables and head, but where it says"
            " `layers only`.\n\n"
            "| weights | MB | faster by | 95 % interval |\n| --- | --- | --- | --- |\n" + "\n".join(lines) + "\n"
        )
    (RESULTS / "quant-weights.md").write_text("\n".join(parts))


def _convolutions(rows: dict[str, Row]) -> str:
    pairs = [
        one["seconds"] / rows[plain]["seconds"]
        for row, one in rows.items()
        if row.endswith("adaround") and (plain := row.replace("adaround", "gptq")) in rows
    ]
    found = {(*row.split(", "),): one for row, one in rows.items()}
    lines = []
    for (name, bits, rounding), one in sorted(found.items(), key=lambda pair: _convolution_place(*pair[0])):
        lines.append(
            f"| {_BEDS[name]} | {bits.split()[0]} | {rounding} | {_spread(one)} | {one['agreement']:.3f} |"
            f" {one['metric']:.3f} | {one['bytes'] / 1e6:.2f} | {one['seconds']:.1f} |"
        )
    return (
        _CONVOLUTIONS.format(
            times=f"{min(pairs, default=0):.1f} to {max(pairs, default=0):.1f}", draws=max(DRAWS.values())
        )
        + "\n".join(lines)
        + "\n"
    )


def _spread(one: Row) -> str:
    """The mean error, and where there are several their standard deviation."""
    digits = 5 if one["error"] < 0.01 else 4
    spread = f" ± {stdev(one['errors']):.{digits}f}" if len(one["errors"]) > 1 else ""
    return f"{one['error']:.{digits}f}{spread}"


def _convolution_place(name: str, bits: str, rounding: str) -> tuple[int, int, int]:
    return list(_BEDS).index(name), -int(bits.split()[0]), ROUNDINGS.index(rounding)


def _place(name: str) -> tuple[int, int, int, int]:
    """Where a row stands: float32, then by block and zero points, ours before theirs, whole models last."""
    if ", " not in name:
        return 0, 0, 0, 0
    *head, kind, block = name.split(", ")
    kinds = ("symmetric", "zero points", "float zero points")
    return 1 + (head[0] == "whole"), int(block), kinds.index(kind), int(head[0].startswith("ORT"))


def _table(rows: dict[str, Row], metric: str) -> str:
    lines = [f"| rounding | {metric} | error | MB | CPU s |", "| --- | --- | --- | --- | --- |"]
    for name, one in sorted(rows.items(), key=lambda row: _place(row[0])):
        if "failed" in one:
            lines.append(f"| {name} | failed: {one['failed']} | | | |")
        else:
            digits = 2 if metric == "perplexity" else 3
            lines.append(
                f"| {name} | {one['metric']:.{digits}f} | {one['error']:.4f} | {one['bytes'] / 1e6:.1f} |"
                f" {one['seconds']:.0f} |"
            )
    return "\n".join(lines) + "\n"
