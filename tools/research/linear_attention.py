"""Attention in linear time: `python -m burnish.tools.research.linear_attention` writes its page.

Accuracy is that of the digits ViT of `burnish demo` (17 tokens), and of such trained on larger images of the same
digits (65 and 257 tokens), healed on half of the training digits; time is that of vision transformers of the same width
with random weights and more tokens.
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
from burnish.tools.research.train_digits import DigitsVit, digits, train, write_model
from burnish.tools.research.tvm_latency import in_turns, session

PAGE, NUMBERS = FOLDER / "linear-attention.md", FOLDER / "linear-attention.json"
SIDES = (7, 14, 24, 32)
"""Patches along a side of the image."""

UNHEALED, HEALED = "not healed", "healed, it fades out"
ROWS = {UNHEALED: (0.0, 0), HEALED: (0.5, STEPS), "healed, softmax gone at once": (0.0, STEPS)}
"""How long the softmax fades out, and steps of healing."""

FINER = {16: 30, 32: 6}
"""Pixels along a side of the enlarged digits, and epochs of training; the larger model goes on from the smaller one."""
FINER_SEEDS = {16: SEEDS, 32: SEEDS[:1]}

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


def _enlarged(images: np.ndarray, side: int) -> torch.Tensor:
    return F.interpolate(torch.from_numpy(images), (side, side), mode="bilinear", align_corners=False)


def finer(side: int) -> Bed:
    """A vision transformer for digits of `side` pixels, of which each patch has 2 x 2."""
    images, held_out, labels, answers = digits()
    folder = _folder()
    file, weights, data = (folder / f"vit-{side}px{end}" for end in (".onnx", ".pt", ".npz"))
    if not file.exists():
        module = train(
            lambda: _begun(side, folder), _enlarged(images, side), torch.from_numpy(labels), FINER[side], 2e-3
        )
        torch.save(module.state_dict(), weights)
        np.savez(data, image=_enlarged(images, side).numpy(), label=labels)
        write_model(module, _enlarged(held_out[:2], side), file)
    return Bed("digits ViT", file, data, {"image": _enlarged(held_out, side).numpy()}, answers)


def _begun(side: int, folder: Path) -> DigitsVit:
    """With the weights of the model of half as many pixels, if that is one of `FINER`, its positions interpolated."""
    module = DigitsVit()
    patches = side // 2
    module.positions = torch.nn.Parameter(torch.randn(1, 1 + patches * patches, 48) * 0.02)
    if side // 2 in FINER:
        finer(side // 2)
        state = torch.load(folder / f"vit-{side // 2}px.pt", weights_only=True)
        first, rest = state["positions"][:, :1], state["positions"][:, 1:]
        grid = rest.reshape(1, patches // 2, patches // 2, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, (patches, patches), mode="bilinear", align_corners=False)
        state["positions"] = torch.cat([first, grid.flatten(2).transpose(1, 2)], 1)
        module.load_state_dict(state)
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
    module = DigitsVit()
    module.positions = torch.nn.Parameter(torch.randn(1, 1 + side * side, 48) * 0.02)
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
    for side, seeds in FINER_SEEDS.items():
        for title in (UNHEALED, HEALED):
            fade, steps = ROWS[title]
            for seed in seeds if steps else seeds[:1]:
                _keep(f"{side} pixels | {title} | {seed}", partial(_healed, partial(finer, side), seed, fade, steps))
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
The same digits, enlarged and cut into patches of 2 x 2, are more tokens. A transformer of the same width is trained for
each size ({FINER[16]} epochs; the one of 257 tokens begins with the weights of the one of 65, {FINER[32]} epochs) and
healed as above, its softmax fading out.

| tokens | softmax | linear, not healed | linear, healed, by seed | change |
| --- | --- | --- | --- | --- |
"""
    ]
    for side in (8, *FINER):
        start = "" if side == 8 else f"{side} pixels | "
        unhealed, healed = (
            [known[key] for seed in SEEDS if (key := f"{start}{title} | {seed}") in known]
            for title in (UNHEALED, HEALED)
        )
        if unhealed and healed:
            before, after = (100 * one for one in unhealed[0])
            scores = [100 * one[1] for one in healed]
            shown, change = ", ".join(f"{one:.1f}" for one in scores), sum(scores) / len(scores) - before
            lines.append(f"| {1 + side * side // 4} | {before:.1f} | {after:.1f} | {shown} | {change:+.1f} |\n")
    return lines


if __name__ == "__main__":
    sys.exit(main())
