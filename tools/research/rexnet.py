"""Widths of blocks along a line and in steps: `python -m burnish.tools.research.rexnet` writes its page.

Networks of about as many parameters are trained on digits with three seeds; the numbers of channels that their layers
use are those of `burnish inspect --rank`. Every number is kept in `docs/results/rexnet.json` as soon as it is known.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as oir
import torch
from torch import nn

import burnish
from burnish.backends.ort.session import executor
from burnish.frontends import onnx_file
from burnish.passes import plan, rank
from burnish.passes.gram import Gram
from burnish.passes.layers import layers
from burnish.passes.pipeline import Pipeline
from burnish.tools.research import zoo_export
from burnish.tools.research.depth import Numbers
from burnish.tools.research.rexnet_networks import (
    Bottlenecks,
    Design,
    along_a_line,
    in_steps,
    network,
    rexnet,
)
from burnish.tools.research.rexnet_page import FORMS, NAMES, NUMBERS, RATIOS, SEEDS, WIDE, write
from burnish.tools.research.train_digits import digits, train, write_model
from burnish.tools.research.tvm_latency import in_turns

EPOCHS, RATE = 30, 5e-3
STRIDES = (1, 1, 1, 2, 1, 1, 2, 1)
LINE = (4, 14)
"""The width of the first block, and what the widths rise by over all blocks."""
STAGES = ((3, 4), (3, 8), (2, 16))
"""Blocks and their width before it is scaled to as many parameters."""
_ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "none": lambda x: x,
    "ReLU6": lambda x: np.clip(x, 0, 6),
    "SiLU": lambda x: x / (1 + np.exp(-x)),
}


def _design(widths: list[int], partial: bool = True) -> Design:
    """For images [batch, 1, 8, 8] of ten classes."""
    count = len(widths)
    return Design(
        widths[0], widths, STRIDES, [1] + [6] * (count - 1), [False] * count, 64, 10, 1, stem_stride=1, partial=partial
    )


def _size(design: Design) -> int:
    return sum(parameter.numel() for parameter in Bottlenecks(design).parameters())


def designs() -> dict[str, tuple[Design, type[nn.Module]]]:
    """The networks that are compared, with the activation behind wider layers."""
    line = _design(along_a_line(*LINE, len(STRIDES)))
    steps = min(
        (_design(in_steps(STAGES, multiplier / 100)) for multiplier in range(80, 160)),
        key=lambda one: abs(_size(one) - _size(line)),
    )
    alone = _design(along_a_line(*LINE, len(STRIDES)), partial=False)
    found = ((steps, nn.ReLU6), (steps, nn.SiLU), (alone, nn.SiLU), (line, nn.SiLU))
    return dict(zip(NAMES, found, strict=True))


def _trained(design: Design, activation: type[nn.Module], seed: int) -> dict[str, Any]:
    """Accuracy, sizes, and for each block the channels that it reads and has inside, with those that are used."""
    images, held_out, labels, answers = digits()
    module = train(
        lambda: Bottlenecks(design, activation), torch.from_numpy(images), torch.from_numpy(labels), EPOCHS, RATE, seed
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "network.onnx"
        write_model(module, torch.from_numpy(held_out[:2]), file)
        made = burnish.optimize(file, target="onnx", data=[{"image": held_out[:8]}]).model
    runner = executor(threads=1)(made)
    accuracy = float((runner.run({"image": held_out})["logits"].argmax(1) == answers).mean())
    runner.close()
    return {
        "accuracy": accuracy,
        "parameters": _size(design),
        "bytes": len(oir.to_proto(made).SerializeToString()),
        "widths": list(design.widths),
        "used": _used(made, images),
    }


def _used(model: oir.Model, images: np.ndarray) -> list[tuple[int, int]]:
    """Channels and those that are used, of what each pointwise convolution reads, in order."""
    found = [one for one in layers(model).values() if getattr(one, "kernel", ()) == (1, 1)]
    sites = {str(number): one.input for number, one in enumerate(found)}
    grams = burnish.observe(model, sites, Gram(axis=1, exact=True), data=[{"image": images}])
    widths = [rank.width(one) for one in grams.values() if isinstance(one, Gram)]
    return [(one.channels, one.used) for one in widths]


def _random_ranks(name: str) -> list[float]:
    """The mean share of the channels that is used behind a random layer that makes `WIDE` channels more."""
    random, found = np.random.default_rng(0), []
    for ratio in RATIOS:
        shares = []
        for _ in range(20):
            weight = random.standard_normal((WIDE, WIDE * ratio)) / np.sqrt(WIDE)
            rows = _ACTIVATIONS[name](random.standard_normal((8 * WIDE * ratio, WIDE)) @ weight)
            gram = Gram()
            gram.add(rows)
            shares.append(rank.width(gram).used / (WIDE * ratio))
        found.append(float(np.mean(shares)))
    return found


def _forms() -> dict[str, Any]:
    """Milliseconds of ReXNet with its residuals in several spellings, in turns in ONNX Runtime, [forms], and ratios."""
    made = network(rexnet(), 224)
    feeds = {"image": np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)}
    whole = plan.resolve(target="ort-cpu").passes
    as_they_are = [one for one in whole if one.pass_name() != "pad-residual"]
    calls = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (spelling, passes) in enumerate(
            (("scatter", as_they_are), ("concat", as_they_are), ("scatter", whole))
        ):
            file = Path(folder) / f"{number}.onnx"
            for block in made.module.modules():
                if hasattr(block, "spelling"):
                    block.spelling = spelling
            zoo_export.torchscript(made, file, opset=17)
            calls.append(executor(threads=1)(Pipeline(passes).rewrite(onnx_file.read(file)).model).bound(feeds))
        times = in_turns(calls)
    ratios = times / times[:, -1:]
    picks = np.random.default_rng(0).integers(0, len(ratios), (1000, len(ratios)))
    low, high = np.percentile(np.median(ratios[picks], axis=1), (2.5, 97.5), axis=0)
    columns = (1e3 * np.median(times, axis=0), np.median(ratios, axis=0), low, high)
    return dict(zip(FORMS, np.stack(columns, 1).tolist(), strict=True))


def main(words: list[str]) -> int:
    """Measure what is missing, then write the page."""
    torch.set_num_threads(1)
    numbers = Numbers(NUMBERS)
    if words != ["page"]:
        for name in _ACTIVATIONS:
            numbers.get(f"random {name}", partial(_random_ranks, name))
        for seed in SEEDS:
            for name, (design, activation) in designs().items():
                numbers.get(f"{name} | {seed}", partial(_trained, design, activation, seed))
        numbers.get("forms", _forms)
    write(numbers.known)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
