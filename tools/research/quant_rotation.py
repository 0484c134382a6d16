"""What rotations and scales do to a model with few bits: `docs/results/quant-rotation.md`, and its numbers in JSON.

`python -m burnish.tools.research.quant_rotation` measures what the JSON does not have yet and writes the page; every
number is kept as soon as it is known, so a run that was killed goes on where it was. `... page` only writes the page.
Nothing here runs on 4-bit kernels: bits are simulated in floating point (`burnish.passes.simulated`).
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as oir

from burnish.backends.fx.rotation import LearnOptions, learn
from burnish.backends.ort.session import executor
from burnish.backends.reference.runner import ReferenceRunner
from burnish.frontends import onnx_file
from burnish.ir.samples import Sample
from burnish.passes import catalog, learned, rotation, simulated, turning, verify
from burnish.passes.pipeline import Pipeline
from burnish.passes.recipes import NORMAL_FORM
from burnish.passes.simulated import Bits
from burnish.tools.research import zoo, zoo_data, zoo_real, zoo_tasks

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "results"
NUMBERS, PAGE = FOLDER / "quant-rotation.json", FOLDER / "quant-rotation.md"

MODEL = "a3-smollm2-nocache"
WINDOWS = 4
"""Texts of the perplexity task, of 256 tokens each."""

REPLAYED = 12
"""Tokens on which outputs are compared in float64."""

WAYS: dict[str, tuple[str, bool]] = {
    "nothing": ("", False),
    "QuaRot, seed 0": ("rotate-residual", True),
    "axes of the weights first, seed 0": ("rotate-residual{init=klt}", True),
    "QuaRot, seed 1": ("rotate-residual{seed=1}", True),
    "QuaRot, seed 2": ("rotate-residual{seed=2}", True),
    "QuaRot and balanced, seed 0": ("rotate-residual,scale-pairs", True),
    "axes of the weights first, seed 1": ("rotate-residual{init=klt;seed=1}", True),
}
"""Passes, and whether Hadamard matrices are multiplied with when the model runs."""

LEARNED = LearnOptions(steps=24, every=4)
"""How the learned rotations of the table are learned: on as many beginnings of other texts, of `TOKENS` tokens."""

TOKENS = 128

NORM = 40
"""Of 61 norms of the stream, before which its numbers are looked at."""

KINDS = {"nothing": "as it is", "hadamard": "behind the matrix", "klt": "behind the axes and the matrix"}

EXACT = {
    "rotated": "rotate-residual",
    "rotated and balanced": "rotate-residual,scale-pairs",
    "rotated, also when it runs": "rotate-residual{online=true}",
}


@cache
def original() -> oir.Model:
    """The language model in normal form."""
    return Pipeline(NORMAL_FORM).rewrite(onnx_file.read(zoo.path(MODEL))).model


def made(spec: str) -> oir.Model:
    """The model behind exact passes."""
    return Pipeline(catalog.parse(spec)).rewrite(original()).model


def perplexity(model: oir.Model) -> float:
    """On the first windows of the task."""
    task = zoo_tasks.load(MODEL, zoo.ROOT)
    runner = executor(threads=1, lean=True)(model)
    outputs = [runner.run(sample) for sample in task.samples[:WINDOWS]]
    runner.close()
    return zoo_tasks.perplexity_of(task.labels[:WINDOWS])(outputs)


def simulated_perplexity(way: str, bits: Bits) -> float:
    """With few bits behind one of `WAYS`."""
    spec, hadamard = WAYS[way]
    model = made(spec) if spec else original().clone()
    simulated.simulate(model, bits, hadamard=hadamard)
    return perplexity(model)


def difference(model: oir.Model) -> dict[str, float]:
    """The largest difference of logits to the original's, relative to the largest logit, in float32 and in float64."""
    task = zoo_tasks.load(MODEL, zoo.ROOT)
    feeds = {name: array[:, :REPLAYED] for name, array in task.samples[0].items()}
    replay = verify.replay(ReferenceRunner(original()), ReferenceRunner(model), Sample("text", feeds))
    rows = []
    for one in (original(), model):
        runner = executor(threads=1, lean=True)(one)
        rows.append(next(iter(runner.run(task.samples[0]).values())).astype(np.float64))
        runner.close()
    single = float(np.abs(rows[0] - rows[1]).max() / np.abs(rows[0]).max())
    return {"float32": single, "float64": float(replay)}


def _exactness(spec: str) -> dict[str, float]:
    return difference(made(spec))


def texts() -> list[Sample]:
    """Beginnings of texts that the perplexity is not measured on."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(zoo_real.smollm2_folder(zoo.ROOT) / "tokenizer.json"))
    encoded = (tokenizer.encode(text, add_special_tokens=False).ids[:TOKENS] for text in zoo_data.topics()[8:])
    rows = [np.array([ids], np.int64) for ids in encoded if len(ids) == TOKENS][: LEARNED.steps]
    return [Sample(f"text {i}", {"input_ids": one, "attention_mask": np.ones_like(one)}) for i, one in enumerate(rows)]


def learn_rotations() -> dict[str, Any]:
    """Perplexity with few bits behind learned rotations and scales, and what merging them does to the logits."""
    losses: list[float] = []
    started = time.process_time()

    def told(step: int, loss: float, least: float) -> None:
        losses.append(loss)
        print(f"step {step}: {loss:.4f}, {time.process_time() - started:.0f} s of CPU", flush=True)

    found = learn(original(), texts(), LEARNED, told, folder=zoo.ROOT / "rotations")
    model = original().clone()
    learned.merge(model, found)
    result = {"exact": difference(model), "losses": losses}
    simulated.simulate(model, LEARNED.bits, hadamard=LEARNED.hadamard)
    return result | {"perplexity": perplexity(model)}


def steps() -> dict[str, float]:
    """How large a step the 4-bit grid of the first token has before norm `NORM`, and what one channel has of it."""
    model = original().clone()
    stream = learned.stream_of(model)
    value = stream.norms[NORM].input
    model.graph.outputs.append(value)
    runner = executor(threads=1, lean=True)(model)
    row = runner.run(zoo_tasks.load(MODEL, zoo.ROOT).samples[0])[str(value.name)][0, 0].astype(np.float64)
    runner.close()
    turns = {
        "nothing": np.eye(stream.width),
        "hadamard": rotation.random_hadamard(stream.width, 0),
        "klt": rotation.flattening(turning.covariance(stream), 0),
    }
    made = {kind: row @ turn for kind, turn in turns.items()}
    found = {kind: float((x.max() - min(x.min(), 0)) / 15 / np.sqrt((x**2).mean())) for kind, x in made.items()}
    return found | {"share": float((row**2).max() / (row**2).sum())}


class Numbers:
    """What is known so far, kept in a file."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.known: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """The number called so, measured now if it is not known."""
        if name not in self.known:
            self.known[name] = measure()
            print(name, self.known[name], flush=True)
            unfinished = self.file.with_suffix(".partial")
            unfinished.write_text(json.dumps(self.known, indent=1, sort_keys=True) + "\n")
            os.replace(unfinished, self.file)
        return self.known[name]


def measure(numbers: Numbers) -> None:
    """Everything that the page shows."""
    numbers.get("float32", lambda: perplexity(original()))
    numbers.get("steps", steps)
    for label, spec in EXACT.items():
        numbers.get(f"exact | {label}", partial(_exactness, spec))
    for way in WAYS:
        numbers.get(f"W4A4KV4 | {way}", partial(simulated_perplexity, way, Bits()))
    numbers.get("learned", learn_rotations)


def page(numbers: Numbers) -> str:
    """The page, from what is known."""
    known = numbers.known
    floor = math.log(known["float32"])
    lines = [
        "# Rotations, and what they are worth in few bits",
        "",
        "Made by `python -m burnish.tools.research.quant_rotation`. The model is SmolLM2-135M-Instruct without a cache "
        f"(30 layers, 576 wide), the text {WINDOWS} times 256 tokens of the Python manual.",
        "",
        "**Bits are simulated in floating point.** No kernel of ONNX Runtime's CPU takes 4-bit activations, so nothing "
        "here is smaller or faster than the model; the tables say what would be lost.",
        "",
        "## What a rotation changes: nothing",
        "",
        "The largest difference of the logits to the original's, relative to the largest logit: in float32 in ONNX "
        f"Runtime on 256 tokens, and with the unrounded weights in float64 on {REPLAYED} tokens.",
        "",
        "| | float32 | float64 |",
        "| --- | ---: | ---: |",
    ]
    exact = {label: known[f"exact | {label}"] for label in EXACT if f"exact | {label}" in known}
    if "learned" in known:
        exact["learned"] = known["learned"]["exact"]
    lines += [f"| {label} | {one['float32']:.1e} | {one['float64']:.1e} |" for label, one in exact.items()]
    lines += [
        "",
        "## Four bits for weights, activations and cache",
        "",
        "Weights: a symmetric grid for each output, the least squared error. Activations and cache: a grid with a zero "
        "point for each token, and for each head of keys and values. The head and the table of tokens keep their bits. "
        "`QuaRot` is a random Hadamard matrix for the stream and one for the values of each head; OSTQuant begins with "
        "the axes of the weights turned onto such a matrix. All but the first multiply by Hadamard matrices before the "
        "last layer of each MLP and behind the rotary embedding. The gap is that of the logarithm of the perplexity "
        "(nats a token).",
        "",
        "| way | perplexity | gap |",
        "| --- | ---: | ---: |",
        f"| float32 | {known['float32']:.2f} | |",
    ]
    for way in WAYS:
        if (found := known.get(f"W4A4KV4 | {way}")) is not None:
            lines.append(f"| {way} | {found:.1f} | {math.log(found) - floor:.2f} |")
    if "learned" in known:
        found = known["learned"]["perplexity"]
        way = f"learned from QuaRot's, with scales, {LEARNED.steps} steps"
        lines.append(f"| {way} | {found:.1f} | {math.log(found) - floor:.2f} |")
    return "\n".join([*lines, "", *conclusion(known, floor)]) + "\n"


def conclusion(known: dict[str, Any], floor: float) -> list[str]:
    """What the second table says about the ways, over their seeds."""
    found = {way: math.log(known[key]) - floor for way in WAYS if (key := f"W4A4KV4 | {way}") in known}
    gaps = [gap for way, gap in found.items() if way.startswith("QuaRot, seed")]
    quarot = sum(gaps) / len(gaps)
    lines = [
        f"QuaRot's gap, over {len(gaps)} seeds, is {quarot:.2f} ({min(gaps):.2f} to {max(gaps):.2f}). Beginning with "
        "the axes of the weights is worse before anything is learned."
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
    if "learned" in known:
        gap = math.log(known["learned"]["perplexity"]) - floor
        change, word = (1 - gap / quarot, "smaller") if gap <= quarot else (gap / quarot - 1, "larger")
        lines += [
            "",
            f"Learned for {LEARNED.steps} steps of one text each, the gap is {gap:.2f}: {100 * change:.0f} % {word} "
            "than QuaRot's. The paper learns for 100 to 150 steps of 8 to 32 texts, which was not tried.",
        ]
    else:
        lines += ["", "What learning adds on this model is not measured yet."]
    return lines


def main() -> None:
    """Measure what is missing and write the page."""
    numbers = Numbers(NUMBERS)
    if sys.argv[1:] != ["page"]:
        measure(numbers)
    PAGE.write_text(page(numbers))


if __name__ == "__main__":
    main()
