"""The page of what `burnish.tools.research.quant` measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_NAMES = {
    "a1": "EfficientNet-lite0 (A1)",
    "a1-photographs": "EfficientNet-lite0 (A1) on 93 photographs",
    "a2": "MiniLM (A2)",
    "a3": "SmolLM2 (A3)",
    "a4": "Silero VAD (A4, opset 18)",
    "a4-if": "Silero VAD (A4, opset 16, with If)",
    "a5": "Magika (A5)",
    "a6-cls": "PP-OCR, direction (A6)",
    "a6-rec": "PP-OCR, reading (A6)",
    "resnet": "digits ResNet",
    "vit": "digits ViT",
}
_TOP = """# Quantization, measured

What each encoding does alone is on its own page: [weights](quant-weights.md), [static int8](quant-static.md),
[dynamic int8 and halves](quant-dynamic.md), [rotations](quant-rotation.md). This page puts the recipes beside the tools
that quantize ONNX files, each run on the same file with the same samples in a process of its own, as its users do:
ONNX Runtime 1.32's quantizers (behind its own pre-processing, per channel, 4 bits in blocks of 32), NNCF 3.4
(`quantize_with_accuracy_control`, 1 %), onnxsim 0.8.1 (`quantize_static` of the simplified file), Olive 0.13. Files of
an opset before 13 are raised for those that need it. Each gets half an hour of a processor, NNCF fifteen minutes unless
the row says less, and 14 GB. Everything is judged on samples that none saw.

*size* is the share of the bytes of the file, its data included; *error* the relative error of the first output;
*agreement* the share of rows whose first class is that of the float32 model; *metric* that of the task, by labels, on
SmolLM2 (A3) the perplexity, where less is better; *time* a run in ONNX Runtime against the original, in turns, on a
processor with AVX512-VNNI that other work shared, with its 95 % interval: of one thread, by the time that it had a
processor; of a model that takes less than 3 ms the quickest of eight sessions of each file, since one may take 1.5
times as long as another, by where ONNX Runtime puts its arrays.

Quantizers to 4 bits change products of two matrices only: where a file keeps its size they did nothing and ended
without an error. None of the others finds the LSTM and the weights of Silero (A4) where they stand in its files, in
branches and nodes of constants: what they write computes the same, and is 0.77 to 1.43 times as large. onnxsim leaves
the float32 weights in its files beside the integers.

Among files of about one size ours have the smallest error on all models ([below](#at-equal-size)). The weights of
SmolLM2 (A3) were published in few bits: each block of 32 with a step and an offset of its own (GGUF's Q4_1), the table
of tokens in 8 bits (Q8_0). `quantize-weights`
[finds these](../ideas/quantization.md#weights-that-were-in-few-bits-before) and stores them without loss: with
activations in float32 the outputs are those of the original to float rounding, in 22 % of the bytes. ONNX Runtime's HQQ
comes near by zero points in floating point, and leaves table and head in float32.
Both take a quarter longer than float32 for 256 tokens at once; [one token](quant-weights.md#one-token-of-smollm2) is
1.5 times as fast by ours. `int4` stores what lies in 4 bits as it is, and rounds the table.
Convolutions whose weights alone are integers are smaller, and slower where they are unpacked at each run.

What an error comes to shows on photographs that are no samples of ImageNet, where EfficientNet-lite0 is less sure: of
two parts each of 93, fitted to 100 others, `int8` leaves 98.4 % of its choices among 1000 classes as they were, ONNX
Runtime's static quantizer 94.1 % and its dynamic one 69.9 %.

With 16 texts to fit to SmolLM2's perplexity of 19.5 becomes 20.1 by `int8` and 20.3, 1.04 times as much, by `int4`;
with all weights rounded as if they had not been in 4 bits before it was 21.5, [rotated first](quant-recipes.md), by
`ostquant-w4`, 21.0. Convolutions along one axis, as Magika's (A5), are products
of integers since their ranges differ from file to file: with fixed ones its error was 0.018. On PP-OCR's classifier no
products of integers are quicker than float32; nearly all its lines are certain, so that few make the error: it is
judged on 400.

Made by `python -m burnish.tools.research.quant NAME... --rivals PYTHON` and `... page`.
"""

_ABOUT = 1.1
"""How many times as many bytes are still about as many."""

_SAME = 1e-5
"""The error of a file that computes the same."""

_SIZES = """## At equal size

The files of the other tools, without those that take fewer bytes by nothing or compute the same and those that another
one undercuts in both bytes and error; and of our files of at most 1.1 times their bytes the one with the least error.
"""

_FAST = """## How fast

The files that `optimize --recipe int8` and `--recipe int4` write, timed in turns with the float32 files that they were
made of, on one thread, by its own clock, on a processor with AVX512-VNNI; with the 95 % interval. For ONNX Runtime's
CPU means with `--target ort-cpu`, which writes Attention as well. The tables above have the other models: PP-OCR's
reader and Silero are about twice as fast, small convolutional models gain less, and weights in 4 bits gain where one
token is computed at a time, next to nothing where 256 are.

Made by `python -m burnish.tools.research.quant_speed`.
"""


def page(known: Mapping[str, Any], tools: Sequence[str]) -> str:
    """The page as Markdown; which of the tools were not run on a model is said."""
    lines = [_TOP, *_equal(known)]
    for name in (one for one in _NAMES if one in known):
        found = known[name]
        metric = "" if found["metric"] is None else f", metric {found['metric']:.3f}"
        lines += [f"## {_NAMES[name]}", "", f"The original: {found['bytes']:,} bytes{metric}.", ""]
        lines += ["| tool | size | error | agreement | metric | time |", "| --- | --- | --- | --- | --- | --- |"]
        lines += [_row(tool, row, found["bytes"]) for tool, row in found["rows"].items()]
        missing = ", ".join(tool for tool in tools if tool not in found["rows"])
        lines += ["", *([f"Not run: {missing}.", ""] if missing else [])]
    return "\n".join([*lines, *_speed(known.get("speed", {}))])


def _equal(known: Mapping[str, Any]) -> list[str]:
    """The files of the others that none of them undercuts in bytes and error, each beside ours of about its size."""
    lines = [_SIZES, "| model | other tool | size | error | ours | size | error |", "| --- " * 7 + "|"]
    for name in (one for one in _NAMES if one in known):
        whole = known[name]["bytes"]
        rows = {k: row for k, row in known[name]["rows"].items() if "failed" not in row and row["bytes"] < whole}
        others = {k: row for k, row in rows.items() if not k.startswith("burnish") and row["error"] > _SAME}
        for tool, row in others.items():
            if any(one["bytes"] <= row["bytes"] and one["error"] < row["error"] for one in others.values()):
                continue
            fits = [k for k in rows if k.startswith("burnish") and rows[k]["bytes"] <= _ABOUT * row["bytes"]]
            best = min(fits, key=lambda one: rows[one]["error"], default=None)
            ours = "none so small | |"
            if best is not None:
                mark = " **more**" if rows[best]["error"] > row["error"] else ""
                ours = f"{best} | {100 * rows[best]['bytes'] / whole:.1f} % | {rows[best]['error']:.3g}{mark}"
            lines.append(
                f"| {_NAMES[name]} | {tool} | {100 * row['bytes'] / whole:.1f} % | {row['error']:.3g} | {ours} |"
            )
    return [*lines, ""]


def _speed(known: Mapping[str, Any]) -> list[str]:
    """How many times as fast as the float32 files what the recipes write is."""
    if not known:
        return []
    lines = [_FAST, "| file | written by | bytes | run | float32, ms | faster by |", "| --- " * 6 + "|"]
    for found in (known[name] for name in sorted(known)):
        before, after = found["bytes"]
        for run, (milliseconds, ratio, low, high) in found["runs"].items():
            first = f"| {found['file']} | {found['tool']} | {100 * after / before:.1f} % | {run} "
            lines.append(f"{first}| {milliseconds:.1f} | {ratio:.2f} ({low:.2f} to {high:.2f}) |")
    return [*lines, ""]


def _row(tool: str, row: Mapping[str, Any], whole: int) -> str:
    if "failed" in row:
        return f"| {tool} | failed: {row['failed'].replace('|', '/')} | | | | |"
    cells = (f"{100 * row['bytes'] / whole:.1f} %", *(_number(row[key]) for key in ("error", "agreement", "metric")))
    return f"| {tool} | {' | '.join(cells)} | {_time(row)} |"


def _time(row: Mapping[str, Any]) -> str:
    if "time" not in row:
        return "not measured"
    ratio, low, high = row["time"]
    return f"{ratio:.2f} ({low:.2f} to {high:.2f})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
