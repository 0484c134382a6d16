"""The page of what `burnish.tools.research.quant_static` measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

_NAMES = {
    "a1": "EfficientNet-lite0 (A1)",
    "a2": "MiniLM (A2)",
    "a5": "Magika (A5)",
    "a6-cls": "PP-OCR, direction (A6)",
    "a6-rec": "PP-OCR, reading (A6)",
    "resnet": "digits ResNet",
    "vit": "digits ViT",
}
_FLOAT = "float8"
_FLOATS = """
## 8-bit floating point

The same layers with `dtype=float8e4m3fn` and `float8e5m2`, else by default. The file is about as large. ONNX Runtime's
CPU converts the numbers and multiplies in float32, so everything is slower than the original.

A floating-point number keeps its relative error where it is small, so one scale is enough for channels that reach
unlike: MiniLM and Magika lose less by `float8e4m3fn` than by `int8` (which also rounds what lies between layers; with
scales that each run finds, `quantize-dynamic` loses less than both), and PP-OCR's reader less than by `int8` with
`rounding=mse`: what GPTQ takes off is for integers. Where ranges are even, as in the other convolutional networks and
the digits ViT, a mantissa of three bits is less than an integer of eight, and it loses three to four times as much,
PP-OCR's classifier half as much again. `float8e5m2`, with two bits, loses 1.4 to 2.6 times that.
"""
_DRAWS = """
## Which samples, and how few

The error of the first output when convolutions are fitted to few samples, drawn several times from one half of the data
and judged on the same samples of the other half (`python -m burnish.tools.research.quant_draws MODEL COUNT DRAWS`).
`mse` looks at weights alone. `gptq at once` rounds each convolution for what it reads in the original, as in a search.
`default` rounds it for what it reads behind those before it where that pays: fitted to one half of the samples, it
changes the outputs less on the other, by more than the standard error. Means over the draws, with the least and the
most; *change* is by how much the default is more than at once, draw by draw, with its standard error.

Two draws differ by more than two roundings do: most of the error comes from rounding activations, whose ranges the
samples set. So one draw says little about roundings. GPTQ does not fit few samples too well: on all 37 convolutions of
PP-OCR's reader, fitted to ten lines, weights change the outputs of a layer by less than with `mse` on lines that were
not seen, too. What takes a third off is that convolutions make up for rounded activations as well: rounded in turn in
every draw, PP-OCR's reader lost 0.063 ± 0.008 less than at once, and its classifier of ten lines 0.012 ± 0.008 more.
The half of so few lines seldom tells: by default the reader is rounded in turn in one draw of five, and in one of four.
Judged on the samples that both are fitted to, the choice took in turn for EfficientNet-lite0 as well, which then lost
0.062 by the recipe `int8`; judged on the other half it does not, and 0.058 are lost.
"""
_INTEGERS = ("QLinear", "QGemm", "MatMulInteger", "DynamicQuantize")
_TOP = """# Static int8 beside ONNX Runtime's quantizer

`quantize-static` beside `onnxruntime.quantization.quantize_static` (1.32; QDQ, per channel, unsigned activations,
signed weights; min-max, entropy and percentile calibration). Both get the same model, in normal form with its norms
folded, and the same samples; errors are measured on samples that neither saw. `error` is the relative error of the
first output, `agreement` the share of rows whose first class is that of the float32 model, `metric` that of the task,
by labels. Times are of one thread, both models in turns, by the thread's own clock, on a processor with AVX512-VNNI
that other work shared.

By default convolutions are rounded by GPTQ, *weights by mse* is with `rounding=mse`; MiniLM and the digits ViT have
none that is rounded. Of Magika in 7 bits the ranges are those of `mse`, since those of `minmax`, with which 0.0076
are lost, are not better on its samples by more than the standard error.

Made by `python -m burnish.tools.research.quant_static NAME...` and `... page`.

What to know before reading:

- The other quantizer also rounds what stands between the layers, by default every operator that it knows. MiniLM and
  Magika do not survive that.
- It rounds the embeddings of MiniLM too, which `quantize-static` leaves to `quantize-weights`; and it gives each weight
  of a MatMul one scale, so that the digits ViT is 8 % smaller. With `per_channel=false` ours has about that size.
- Its entropy and percentile calibrations failed on samples of several sizes, which lines of text are.
- The classifier of text directions is slower on integers than in float32, whoever quantizes it: kernels on integers are
  slower for its small depthwise convolutions. A search with `--objective latency` took 6 of its 54 layers. Its output
  is a softmax over two classes and nearly always certain, so few lines make all of its error: it is judged on 400.
  Most of it comes from rounding activations (with 16 bits for them it is a third); the inputs of HardSwish have a fifth
  to a third less to cover since what is below -3 has no range.
"""


def page(known: Mapping[str, Any]) -> str:
    """The page as Markdown."""
    found = [one for one in _NAMES if one in known]
    lines = [_TOP, "## All layers at once", ""]
    lines += [
        "| model | fitted / judged on | float32 | what | bytes | error | agreement | metric | against float32 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in found:
        lines += _main(name, known[name])
    lines += ["", "## What the options do", "", "Error of the first output, everything else as above.", ""]
    labels = list(dict.fromkeys(one for name in found for one in known[name]["rows"] if one.startswith("burnish")))
    labels = [one for one in labels if _FLOAT not in one]
    heads = ["default" if one == "burnish" else one.removeprefix("burnish, ") for one in labels]
    lines += [f"| model | {' | '.join(heads)} |", "| --- |" + " --- |" * len(heads)]
    for name in found:
        rows = known[name]["rows"]
        lines.append(f"| {_NAMES[name]} | {' | '.join(_number(rows.get(one, {}).get('error')) for one in labels)} |")
    lines += _draws(known.get("draws", {}))
    lines += [_FLOATS, "| model | dtype | bytes | error | agreement | metric | against float32 |"]
    lines += ["| --- |" + " --- |" * 6]
    for name in found:
        lines += _floats(name, known[name]["rows"])
    lines += ["", "## Kernels", "", "Operators that ONNX Runtime is left with, those on integers first.", ""]
    lines += ["| model | float32 | burnish | ONNX Runtime |", "| --- | --- | --- | --- |"]
    for name in found:
        one = known[name]
        sets = (one["kernels"], one["rows"]["burnish"].get("kernels"), _best(one)[1].get("kernels"))
        lines.append(f"| {_NAMES[name]} | {' | '.join(map(_kernels, sets))} |")
    return "\n".join(lines) + "\n"


def _draws(known: Mapping[str, Any]) -> list[str]:
    """A row for each model and number of samples."""
    rows = ("mse", "gptq at once", "default")
    lines = [_DRAWS, f"| model | samples | draws | {' | '.join(rows)} | change |", "| --- |" + " --- |" * 6]
    for name in (one for one in _NAMES if one in known):
        for count, found in sorted(known[name].items(), key=lambda pair: int(pair[0])):
            seeds = [seed for seed in found[rows[0]] if all(seed in found.get(row, {}) for row in rows)]
            errors = np.array([[found[row][seed] for seed in seeds] for row in rows])
            cells = [f"{one.mean():.4g} ({one.min():.4g} to {one.max():.4g})" for one in errors]
            apart = errors[2] - errors[1]
            error = f" ± {apart.std(ddof=1) / len(seeds) ** 0.5:.2g}" if len(seeds) > 1 else ""
            lines.append(
                f"| {_NAMES[name]} | {count} | {len(seeds)} | {' | '.join(cells)} | {apart.mean():+.2g}{error} |"
            )
    return lines


def _floats(name: str, rows: Mapping[str, Any]) -> list[str]:
    """A row for each dtype of 8 bits."""
    head, lines = _NAMES[name], []
    floats = [label for label in rows if _FLOAT in label]
    for label in ["burnish", *floats] if floats else []:
        row = rows[label]
        cells = (f"{row['bytes']:,}", *(_number(row[key]) for key in ("error", "agreement", "metric")), _time(row))
        lines.append(f"| {head} | {'int8' if label == 'burnish' else label.split(', ')[1]} | {' | '.join(cells)} |")
        head = ""
    return lines


def _best(one: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The rival of the least error."""
    rivals = {label: row for label, row in one["rows"].items() if not label.startswith("burnish")}
    return min(rivals.items(), key=lambda pair: pair[1].get("error", float("inf")))


def _main(name: str, one: Mapping[str, Any]) -> list[str]:
    head = f"| {_NAMES[name]} | {one['fit']} / {one['held']} | {_number(one['metric'])} |"
    lines = []
    for label in ["burnish", *(label for label in one["rows"] if not label.startswith("burnish"))]:
        row = one["rows"][label]
        if "failed" in row:
            lines.append(f"{head} {label} | fails: {row['failed']} | | | | |")
        else:
            cells = (f"{row['bytes']:,}", *(_number(row[key]) for key in ("error", "agreement", "metric")), _time(row))
            lines.append(f"{head} {label} | {' | '.join(cells)} |")
        head = "| | | |"
    return lines


def _time(row: Mapping[str, Any]) -> str:
    seconds = row.get("seconds")
    if not seconds or any(isinstance(one, str) for one in seconds):
        return ""
    ratio = seconds[0] / seconds[1]
    said = f"{ratio:.2f}x faster" if ratio >= 1 else f"{1 / ratio:.2f}x slower"
    return f"{said} ({1000 * seconds[0]:.3g} to {1000 * seconds[1]:.3g} ms)"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _kernels(found: Mapping[str, int] | None) -> str:
    if found is None:
        return ""
    order = sorted(found, key=lambda op: (not op.startswith(_INTEGERS), -found[op], op))
    return ", ".join(f"{found[op]} {op}" for op in order[:12])
