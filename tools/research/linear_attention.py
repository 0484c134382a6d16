"""Attention in linear time: `python -m burnish.tools.research.linear_attention` writes its page.

Accuracy is that of the digits ViT of `burnish demo` (17 tokens, and more where its patches overlap), healed on half of
the training digits; time is that of vision transformers of the same width with random weights and more tokens.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as oir
import torch
import torch.nn.functional as F

import burnish
from burnish.backends.fx.healing import HealOptions
from burnish.backends.ort.session import executor
from burnish.frontends import onnx_file
from burnish.ir import weights
from burnish.ir.edit import name_nodes
from burnish.ir.samples import Sample
from burnish.passes import catalog, lossy, plan
from burnish.passes.base import Outcome
from burnish.passes.lossy import LossyPass
from burnish.passes.pipeline import Pipeline
from burnish.passes.recipes import NORMAL_FORM
from burnish.tools.lossy_context import context_for
from burnish.tools.research.norms_beds import Bed, vision
from burnish.tools.research.norms_page import BUDGET, FOLDER, SEEDS, STEPS
from burnish.tools.research.train_digits import DEMO, DigitsVit, digits, train, write_model
from burnish.tools.research.tvm_latency import in_turns, session

PAGE, NUMBERS = FOLDER / "linear-attention.md", FOLDER / "linear-attention.json"
SIDES = (7, 14, 24, 32)
"""Patches along a side of the image."""

UNHEALED, HEALED = "not healed", "healed, it fades out"
ROWS = {UNHEALED: (0.0, 0), HEALED: (0.5, STEPS), "healed, softmax gone at once": (0.0, STEPS)}
"""How long the softmax fades out, and steps of healing."""

FINER = (7, 14)
"""Overlapping patches along a side of the image."""

EPOCHS = 8
"""In which the demo's transformer learns to read overlapping patches."""

_HEAD = """# Attention in linear time

`python -m burnish.tools.research.linear_attention` makes this page ([how](../ideas/linear-attention.md)).

## Accuracy

All three attentions of the digits ViT of `burnish demo` (17 tokens) are replaced by `optimize -p linear-attention
--heal`: {steps} steps of {batch} rows, at most {rate:g}, on half of the training digits, without labels. In percent, on
500 digits that neither training nor healing has seen.

| | by seed | mean |
| --- | --- | --- |
"""
_TIMES = """
## Time

Vision transformers of three blocks, 48 wide, with four heads of 12 numbers and random weights; patches and a class
token; one image, one thread, ONNX Runtime, as `optimize --target ort-cpu` writes them, in turns on the clock of the
thread of a busy machine. Ratios are those to the softmax, medians of the rounds with their 95 % intervals. The last
column is the largest difference of the scores of the two orders, over the largest score.

| tokens | softmax, µs | `first=kv`, µs | ratio | `first=qk`, µs | ratio | apart |
| --- | --- | --- | --- | --- | --- | --- |
"""


def _folder() -> Path:
    folder = Path(tempfile.gettempdir()) / "burnish-norms"
    folder.mkdir(exist_ok=True)
    return folder


def finer(side: int) -> Bed:
    """The vision transformer of `burnish demo` with `side` x `side` patches that overlap, on images enlarged for it."""
    images, held_out, labels, answers = digits()
    images, held_out = _enlarged(images, side + 1), _enlarged(held_out, side + 1)
    file, data = _folder() / f"vit-{1 + side * side}.onnx", _folder() / f"digits-train-{side}.npz"
    np.savez(data, image=images, label=labels)
    if not file.exists():
        module = train(partial(_overlapping, side), torch.from_numpy(images), torch.from_numpy(labels), EPOCHS, 1e-3)
        write_model(module, torch.from_numpy(held_out[:2]), file)
    return Bed("digits ViT", file, data, {"image": held_out}, answers)


def _enlarged(images: np.ndarray, size: int) -> np.ndarray:
    """Images [n, 1, 8, 8] with so many pixels along a side."""
    made = F.interpolate(torch.from_numpy(images), (size, size), mode="bilinear", align_corners=True)
    return np.asarray(made.numpy())


def _overlapping(side: int) -> DigitsVit:
    """With the weights of the demo; patches are one pixel apart, their places between those of the demo."""
    initializers = onnx_file.read(DEMO / "digits_vit.onnx").graph.initializers
    module = _vit(side)
    state = {name: torch.tensor(weights.constant(initializers[name])) for name in module.state_dict()}
    first, grid = state["positions"][:, :1], state["positions"][:, 1:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (side, side), mode="bilinear", align_corners=True)
    state["positions"] = torch.cat([first, grid.flatten(2).transpose(1, 2)], 1)
    module.patches.stride = (1, 1)
    module.load_state_dict(state)
    return module


def _vit(side: int) -> DigitsVit:
    """For `side` x `side` patches, with random weights."""
    module = DigitsVit()
    module.positions = torch.nn.Parameter(torch.randn(1, 1 + side * side, 48) * 0.02)
    return module


def _healed(make: Callable[[], Bed], seed: int, fade: float, steps: int) -> tuple[float, float]:
    """Accuracy of the original and of the result."""
    bed = make()
    options = HealOptions(steps=steps, seed=seed, fade=fade, **BUDGET) if steps else None
    made = burnish.optimize(bed.file, passes=["linear-attention"], data=bed.data, heal=options, verify="off", guard=[])
    found = []
    for model in (onnx_file.read(bed.file), made.model):
        runner = executor(threads=1)(model)
        found.append(float((runner.run(bed.feeds)["logits"].argmax(1) == bed.answers).mean()))
        runner.close()
    return found[0], found[1]


def _linear(model: oir.Model, samples: list[Sample], first: str) -> oir.Model:
    one = catalog.make("linear-attention", {"first": first})
    assert isinstance(one, LossyPass)
    return lossy.apply(model, one.propose(model, context_for(model, samples), Outcome("")), [one])[0]


def _ratio(ratios: np.ndarray) -> str:
    picks = np.random.default_rng(0).integers(0, ratios.size, (1000, ratios.size))
    low, high = np.percentile(np.median(ratios[picks], axis=1), (2.5, 97.5))
    return f"{np.median(ratios):.3f} ({low:.3f} to {high:.3f})"


def _timed(side: int, folder: Path) -> str:
    torch.manual_seed(0)
    module = _vit(side)
    image = torch.rand(2, 1, 2 * side, 2 * side)
    file = folder / f"{side}.onnx"
    write_model(module.eval(), image, file)
    model = Pipeline(NORMAL_FORM).rewrite(onnx_file.read(file)).model
    name_nodes(model)
    feeds = {"image": image[:1].numpy()}
    models = [model, *(_linear(model, [Sample("image", feeds)], first) for first in ("kv", "qk"))]
    scores = []
    for one in models[1:]:
        runner = executor(threads=1)(one)
        scores.append(runner.run(feeds)["logits"])
        runner.close()
    apart = float(np.abs(scores[0] - scores[1]).max() / np.abs(scores[0]).max())
    made = in_turns([session(one, plan.resolve(target="ort-cpu"), feeds) for one in models])
    times = 1e6 * np.median(made, axis=0)
    return (
        f"| {1 + side * side} | {times[0]:.4g} | {times[1]:.4g} | {_ratio(made[:, 1] / made[:, 0])}"
        f" | {times[2]:.4g} | {_ratio(made[:, 2] / made[:, 0])} | {apart:.1e} |\n"
    )


def _known() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(NUMBERS.read_text()) if NUMBERS.exists() else {}
    return found


def _keep(key: str, make: Callable[[], Any]) -> None:
    """A number or a line under its name, made when it is not known."""
    if key not in _known():
        found = make()
        print(key, found, flush=True)
        NUMBERS.write_text(json.dumps(_known() | {key: found}, indent=1) + "\n")


def main() -> int:
    """Measure what is missing, and write the page after each number."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for side in SIDES:
            _keep(f"time {side}", partial(_timed, side, Path(folder)))
    for title, (fade, steps) in ROWS.items():
        for seed in SEEDS if steps else SEEDS[:1]:
            _keep(f"{title} | {seed}", partial(_healed, lambda: vision(_folder(), 0), seed, fade, steps))
            _write()
    for side in FINER:
        for title in (UNHEALED, HEALED):
            fade, steps = ROWS[title]
            for seed in SEEDS if steps else SEEDS[:1]:
                name = f"{1 + side * side} tokens | {title} | {seed}"
                _keep(name, partial(_healed, partial(finer, side), seed, fade, steps))
                _write()
    return 0


def _write() -> None:
    known = _known()
    found = {title: [known[key] for seed in SEEDS if (key := f"{title} | {seed}") in known] for title in ROWS}
    lines = [_HEAD.format(steps=STEPS, batch=BUDGET["batch"], rate=BUDGET["rate"])]
    original = next(pair[0] for pairs in found.values() for pair in pairs)
    lines.append(f"| original | {100 * original:.1f} | {100 * original:.1f} |\n")
    for title, pairs in found.items():
        if pairs:
            shown = ", ".join(f"{100 * after:.1f}" for _, after in pairs)
            lines.append(f"| {title} | {shown} | {100 * sum(after for _, after in pairs) / len(pairs):.1f} |\n")
    lines += _finer(known)
    lines += [_TIMES, *(known[f"time {side}"] for side in SIDES)]
    PAGE.write_text("".join(lines), encoding="utf-8")


def _finer(known: dict[str, Any]) -> list[str]:
    """The table of accuracy by tokens."""
    lines = [
        f"""
The same transformer reads more tokens when its patches overlap: 49 that are one pixel apart, and 196 on images of 15
by 15 pixels, to which it is trained for {EPOCHS} epochs. It is healed as above, the softmax fading out. Longer
sequences are not measured.

| tokens | softmax | linear, not healed | linear, healed, by seed | change |
| --- | --- | --- | --- | --- |
"""
    ]
    starts = {17: "", **{1 + side * side: f"{1 + side * side} tokens | " for side in FINER}}
    for tokens, start in starts.items():
        unhealed, healed = (
            [known[key] for seed in SEEDS if (key := f"{start}{title} | {seed}") in known]
            for title in (UNHEALED, HEALED)
        )
        if unhealed and healed:
            before, after = (100 * one for one in unhealed[0])
            scores = [100 * one[1] for one in healed]
            shown, change = ", ".join(f"{one:.1f}" for one in scores), sum(scores) / len(scores) - before
            lines.append(f"| {tokens} | {before:.1f} | {after:.1f} | {shown} | {change:+.1f} |\n")
    return lines


if __name__ == "__main__":
    sys.exit(main())
