"""Writes `docs/results/fx.md` from the results of `fx_models` and `fx_training`."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from burnish.tools.research import fx_models, fx_training, zoo_families

PAGE = fx_models.RESULTS.with_suffix(".md")
CLOSE = fx_models.CLOSE
Row = dict[str, Any]


def family(name: str) -> str:
    """The family of a model, or its own first word."""
    found = [f for f in zoo_families.FLAVOURS if name.startswith(f"{f}-")]
    return max(found, key=len) if found else name.split("-")[0]


_FAMILY_HEAD = (
    "family", "models", "near", "as near", "other", "error", "parameters", "no gradient", "error after writing back",
    "onnx2torch: near of run", "its error", "its parameters",
)  # fmt: skip


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def number(x: float | None) -> str:
    """A short spelling of an error."""
    return "" if x is None else "0" if x == 0 else f"{x:.0e}".replace("e-0", "e-")


def _families(rows: list[Row]) -> Iterable[Sequence[Any]]:
    for name in sorted({family(row["model"]) for row in rows}):
        mine = [row for row in rows if family(row["model"]) == name]
        ran = [row for row in mine if "failed" not in row and "unreadable" not in row]
        close = [row for row in ran if row["error"] <= CLOSE]
        other = [row.get("onnx2torch") or {} for row in mine]
        converted = [o for o in other if o.get("error") is not None]
        fine = [o for o in converted if o["error"] <= CLOSE]
        yield (
            name, len(mine), len(close), len([r for r in ran if r["right"]]) - len(close),
            len(mine) - len([r for r in ran if r["right"]]), number(max((r["error"] for r in close), default=None)),
            _span(r["parameters"] for r in ran), sum(len(r["silent"]) for r in ran),
            number(max((r["written_error"] for r in close), default=None)),
            f"{len(fine)} of {len(converted)}" if converted else "0",
            number(max((o["error"] for o in fine), default=None)), _span(o["parameters"] for o in fine),
        )  # fmt: skip


def _span(values: Iterable[int]) -> str:
    found = sorted(set(values))
    return "" if not found else str(found[0]) if len(found) == 1 else f"{found[0]}-{found[-1]}"


def _judged(rows: list[Row]) -> Iterable[Sequence[Any]]:
    for row in rows:
        for case in row.get("judged", []):
            yield row["model"], case["sample"], number(case["torch"]), number(case["onnxruntime"])


def _reasons(rows: list[Row]) -> Iterable[Sequence[Any]]:
    found: Counter[str] = Counter()
    for row in rows:
        other = row.get("onnx2torch") or {}
        if "failed" in other:
            text = other["failed"].replace("OperationDescription(domain='', operation_type=", "").replace("|", "/")
            found[text.split(" but ")[0]] += 1
        elif other.get("error") is not None and other["error"] > CLOSE:
            found["converts, and computes something else"] += 1
    return [(count, f"`{text}`" if ":" in text else text) for text, count in found.most_common(12)]


def write() -> str:
    """The page."""
    import onnxruntime
    import torch

    rows: list[Row] = json.loads(fx_models.RESULTS.read_text())
    trained: dict[str, list[Row]] = json.loads(fx_training.RESULTS.read_text())
    ran = [row for row in rows if "failed" not in row and "unreadable" not in row]
    right = [row for row in ran if row["right"]]
    close = [row for row in right if row["error"] <= CLOSE]
    reached = sum(row["parameters"] - len(row["silent"]) for row in ran)
    silent = [(row["model"], name) for row in ran for name in row["silent"]]
    missed = sum(len(row["missed"]) for row in ran)
    other = [row["onnx2torch"] for row in rows if (row.get("onnx2torch") or {}).get("error") is not None]
    fine = [o for o in other if o["error"] <= CLOSE]
    versions = f"torch {torch.__version__}, ONNX Runtime {onnxruntime.__version__} and onnx2torch 1.5.15"
    judged, wrong = len(right) - len(close), len(rows) - len(right)
    total, alone = sum(row["parameters"] for row in ran), sum(not r["opaque"] for r in ran)
    same, again = sum(r["identity"] for r in ran), sum(r["written_right"] for r in ran)
    rest = f"\n  Of the other {len(silent)}, {missed} should have one (below)." if silent else ""
    families = table(_FAMILY_HEAD, _families(rows))
    cases = table(("model", "sample", "torch", "ONNX Runtime"), _judged(rows))
    text = f"""# The torch bridge on whole models

Made by `python -m burnish.tools.research.fx_models -`, `fx_training` and `fx_page`, with {versions},
one thread on the CPU; nothing was run on a GPU. The models are those of the
[zoo](../../tools/research/zoo.py): small families with random weights in up to twelve spellings, and trained
models. Made samples of several sizes (masks with padding on either side and holes, one row and several, large and
small values) are run by ONNX Runtime and by `to_graph_module(model)`. Files in which ONNX Runtime's optimizer used
its own domain without declaring it are mended first, and MatMulNBits is told not to round activations
(`accuracy_level`), for both sides.

- {len(rows)} models, {len(ran)} of them expressed, {alone} without leaving a node to ONNX Runtime.
- **{len(close)} within 1e-5** of ONNX Runtime, relative to the largest output, on all samples.
  {judged} more are farther on some sample, and as near to the float64 interpreter as ONNX Runtime is (below).
  Wrong or not expressed: {wrong}.
- Gradients of a random projection of all outputs reach {reached} of {total} parameters on some sample.{rest}
- Nothing is written back when nothing was trained: {same} of {len(ran)}. After every parameter was changed by
  2 % and written back, ONNX Runtime and torch agree again: {again} of {len(ran)}.
- onnx2torch converts and runs {len(other)} of the {len(rows)}; {len(fine)} of them within 1e-5.

## Families

*near*: models within 1e-5 on all samples; *as near*: judged in float64; *other*: wrong, or not expressed.
Errors are the largest over the models that are near. *no gradient*: parameters that no gradient reaches, all
models together.

{families}

## Judged in float64

Where torch and ONNX Runtime are more than 1e-5 apart on a sample, both are compared with the float64
interpreter. ONNX Runtime's distance is the largest of: with its optimizations, without them, and how far its own
outputs move when every float input moves by one rounding. ONNX Runtime approximates the logistic function, and
the large values are made to amplify rounding. Right is what is within 1e-5, or within four times that distance.

{cases}
"""
    if silent:
        text += "\n## Parameters without a gradient\n\n"
        text += "Outputs depend on them through the choice of an ArgMin or ArgMax alone, or not at all.\n\n"
        text += table(("model", "parameter"), [(m, f"`{n}`") for m, n in silent]) + "\n"
    bad = [(r["model"], r.get("failed") or r.get("unreadable") or "wrong") for r in rows if r not in right]
    if bad:
        text += "\n## Not right\n\n" + table(("model", "why"), bad) + "\n"
    text += "\n## What onnx2torch says\n\n" + table(("models", "message"), _reasons(rows)) + "\n"
    return text + _training(trained)


def _training(found: dict[str, list[Row]]) -> str:
    train = [
        (r["model"], r["parameters"], r["rate"], f"{r['before']:.4f}", f"{r['torch']:.4f}", f"{r['onnxruntime']:.4f}",
         number(r["error"]), r["cpu_s_per_step"])
        for r in found["train"]
    ]  # fmt: skip
    compiled = [
        (r["model"], r.get("samples", ""), number(r.get("error")), number(r.get("gradient_error")), r["seconds"],
         r.get("failed", ""))
        for r in found["compile"]
    ]  # fmt: skip
    exported = [
        (r["model"], r.get("samples", ""), r.get("ran", ""), number(r.get("error")), r["seconds"], r.get("failed", ""))
        for r in found["export"]
    ]
    head = (
        "model",
        "parameters",
        "rate",
        "loss before",
        "after, torch",
        "after, ONNX Runtime",
        "apart",
        "CPU s a step",
    )
    steps = table(head, train)
    return f"""
## Ten steps of fine-tuning

AdamW on the ONNX files of trained models: photographs with their classes (cross entropy; 4 batches of 5), and
halves of texts that belong together (contrastive; 4 batches of 6 pairs). Losses are means over all batches, on
the data that was trained on: this shows that training works, not that the model got better. The written-back
file is run by ONNX Runtime.

{steps}

## torch.compile

Inductor with `dynamic=True` and `fullgraph=True`, on samples of three sizes; gradients of the compiled module
beside those of the module, relative to the largest.

{table(("model", "samples", "error", "gradient error", "seconds on a busy machine", "failed"), compiled)}

## torch.export

With all dimensions dynamic that the model declares so; *run*: samples that the exported program accepts, the
others have a dimension of 1, which torch specialises.

{table(("model", "samples", "run", "error", "seconds on a busy machine", "failed"), exported)}
"""


def main() -> int:
    """Write the page."""
    PAGE.write_text(write())
    return 0


if __name__ == "__main__":
    sys.exit(main())
