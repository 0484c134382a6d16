"""The page of `burnish.tools.research.depth`, and how it decodes with caches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as oir

from burnish.backends.ort.session import executor
from burnish.passes.base import Outcome
from burnish.passes.depth.remove_blocks import RemoveBlocks
from burnish.passes.protocols import Runner

_HEAD = """# Models with fewer blocks, measured

Made by `python -m burnish.tools.research.depth`; all numbers are in `depth.json` beside this page.
[Depth](../ideas/depth.md) says what the criteria are.

## SmolLM2 without 7 of its 30 blocks

SmolLM2-135M-Instruct (Q4_1, weights unpacked to float32), nothing trained afterwards. The perplexity is that of
{tokens} tokens of the Python manual (`pydoc_data.topics`) in windows of 256, on topics that no criterion has seen.
Criteria look at other topics: at 4 windows of 256 tokens; `angular` at 64 texts of 32 tokens; `criticality`, which
runs the model hundreds of times, at 96 tokens. `ours` is a joint choice: output loss and perplexity of each removal
alone are the errors of the edits, mixed in five ways, with and without what two neighbours cost together less or more
than alone; an exact knapsack chooses for each, the joint results are measured on 8 texts of other topics, and from the
best one block at a time is exchanged for another where that measures better there (up to 60 are tried)."""

_MODELS = {
    "digits_resnet": "the ResNet of the digits, accuracy on its 500 held-out digits",
    "a6-ppocr-cls": "PP-OCR's classifier of turned lines, accuracy on 60 lines",
    "a2-minilm": "MiniLM-L6, R@1 of 60 queries, halves of texts of the Python manual",
}

_PAST = (1, 5, 12, 23)


def decoding(model: oir.Model, gone: Sequence[int]) -> dict[str, float]:
    """How far the logits computed with caches are from those computed at once, by the length of the past.

    Batch 2, the first row padded on the left. The number is the largest difference over the largest logit.

    Args:
        model: a language model with caches, in normal form.
        gone: blocks that are removed first.
    """
    copy = model.clone()
    RemoveBlocks(blocks="+".join(map(str, gone))).rewrite(copy, Outcome("remove-blocks"))
    runner = executor(threads=1, target="ort-cpu")(copy)
    ids, mask = np.random.default_rng(0).integers(100, 40000, (2, 24)), np.ones((2, 24), np.int64)
    mask[0, :3] = 0
    empty = {
        str(port.name): np.zeros([2, *(size if isinstance(size, int) else 0 for size in port.shape[1:])], np.float32)
        for port in copy.graph.inputs
        if port.dtype == oir.DataType.FLOAT and port.shape is not None
    }
    whole = _step(runner, ids, mask, empty)["logits"]
    found = {}
    for length in _PAST:
        first = _step(runner, ids[:, :length], mask[:, :length], empty)
        past = {name: first[name.replace("past_key_values", "present")] for name in empty}
        rest = _step(runner, ids[:, length:], mask, past)["logits"]
        gaps = np.abs(np.concatenate([first["logits"], rest], 1) - whole)[mask == 1]
        found[str(length)] = float(gaps.max() / np.abs(whole[mask == 1]).max())
    runner.close()
    return found


def _step(runner: Runner, ids: np.ndarray, mask: np.ndarray, past: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
    return runner.run({"input_ids": ids, "attention_mask": mask, "position_ids": positions, **past})


def page(found: Mapping[str, Any]) -> str:
    """The page."""
    lines = [_HEAD.format(tokens=f"{33 * 255:,}"), ""]
    lines += ["| blocks chosen by | removed | perplexity |", "| --- | --- | ---: |"]
    lines.append(f"| nothing removed | | {found['perplexity without none']:.1f} |")
    rows = []
    for key in [key for key in found if key.startswith("chosen by ")]:
        judged = found.get(f"perplexity without {'+'.join(map(str, found[key]))}")
        if judged is not None:
            rows.append((judged, key.removeprefix("chosen by "), found[key]))
    lines += [f"| {name} | {_ranges(gone)} | {_number(judged)} |" for judged, name, gone in sorted(rows)]
    best = min(row for row in rows if row[1] != "ours")
    ours = next(judged for judged, name, _ in rows if name == "ours")
    lines += ["", f"Of the single criteria `{best[1]}` is the best, with {best[0]:.1f}; `ours` has {ours:.1f}."]
    lines += ["", *_joint(found), *_decoded(found)]
    for name, what in _MODELS.items():
        lines += _curve(found, name, what)
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.1e}"


def _ranges(blocks: Sequence[int]) -> str:
    """`3-5, 12`."""
    runs: list[list[int]] = []
    for block in blocks:
        if runs and runs[-1][-1] == block - 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def _joint(found: Mapping[str, Any]) -> list[str]:
    lines = ["What the knapsack chose, and the perplexity of each set on the texts that `ours` is checked on:", ""]
    lines += ["| removed | perplexity |", "| --- | ---: |"]
    rows = zip(found["plans"], found["joint"], strict=True)
    return [*lines, *(f"| {_ranges(gone)} | {_number(value)} |" for gone, value in rows), ""]


def _decoded(found: Mapping[str, Any]) -> list[str]:
    if "decoding" not in found:
        return []
    lines = [
        "## Decoding with caches",
        "",
        "The same model with caches, without the blocks of `ours`, batch 2, the first row padded on the left: the",
        "largest difference of a logit computed with a past from the one computed at once, over the largest logit.",
        "",
        "| tokens in the past | difference |",
        "| ---: | ---: |",
    ]
    return [*lines, *(f"| {length} | {error:.0e} |" for length, error in found["decoding"].items()), ""]


def _curve(found: Mapping[str, Any], name: str, what: str) -> list[str]:
    if f"{name}: blocks" not in found:
        return []
    refusals = found[f"{name}: blocks"]
    lines = [f"## {what[0].upper()}{what[1:]}", ""]
    lines.append("Blocks go by output loss on the first third of the samples, or from the last to the first.")
    stay = [f"block {index}: {reason}" for index, reason in enumerate(refusals) if reason is not None]
    lines += [
        "",
        f"Of {len(refusals)} blocks these stay: {'; '.join(stay)}." if stay else "Every residual block can go.",
        "",
    ]
    lines += ["| blocks removed | by output loss | | from the last | |", "| ---: | --- | ---: | --- | ---: |"]
    ladders = [[[], *found[f"{name}: by {criterion}"]] for criterion in ("output-loss", "reverse")]
    for count, sets in enumerate(zip(*ladders, strict=True)):
        cells = [
            f"{_ranges(gone)} | {found[f'{name} without ' + ('+'.join(map(str, gone)) or 'none')]:.3f}" for gone in sets
        ]
        lines.append(f"| {count} | {' | '.join(cells)} |")
    return [*lines, ""]
