"""Quantized models before and after healing: `OMP_NUM_THREADS=1 python -m burnish.tools.research.quant_healing BED`.

BED is `vit`, `resnet`, `a6-cls`, `a3`, `choices` for other ways to train, or `page`. A model is quantized, and trained
with rounding in the way against the original, without labels; integers and scales are put back, and ONNX Runtime runs
them on data that nothing was fitted to. Every run goes to `docs/results/quant-healing.json` when it is done and is not
made again; `page` only writes `docs/results/quant-healing.md`.
"""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx_ir as oir

from burnish.backends.fx import healing_integers, healing_sites
from burnish.backends.fx.healing import HealOptions, heal
from burnish.backends.ort.assigned import assigned
from burnish.backends.ort.session import executor
from burnish.frontends import onnx_file
from burnish.ir.edit import name_nodes
from burnish.ir.samples import Sample
from burnish.passes import catalog, lossy
from burnish.passes.base import Outcome
from burnish.passes.lossy import LossyPass
from burnish.passes.pipeline import Pipeline
from burnish.passes.recipes import NORMAL_FORM
from burnish.tools.lossy_context import context_for
from burnish.tools.research.depth import Numbers

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
NUMBERS = Numbers(RESULTS / "quant-healing.json")
SEEDS = (0, 1, 2)
MOVED = 2
"""How often each training digit is seen turned and shifted, besides as it is."""

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Bed:
    """A model, samples that it is quantized on, samples that it is healed on, and a judge of what it computes.

    Attributes:
        model: the original.
        calibration: samples.
        training: samples for a seed.
        judged: samples that nothing has seen.
        metric: of the outputs for these.
        options: of healing, by the bits of the weights.
        rows: passes by what the table calls them, with the bits of the weights.
        seeds: how often each is healed.
    """

    model: oir.Model
    calibration: list[Sample]
    training: Callable[[int], list[Sample]]
    judged: list[Sample]
    metric: Callable[[list[dict[str, Array]]], float]
    options: dict[int, dict[str, Any]]
    rows: dict[str, tuple[str, int]]
    seeds: Sequence[int] = SEEDS


def _read(file: Path, *more: str) -> oir.Model:
    model = Pipeline((*NORMAL_FORM, *more)).rewrite(onnx_file.read(file)).model
    name_nodes(model)
    return model


def digits(name: str) -> Bed:
    """The digits models: calibrated on the training digits, judged on the 500 held-out ones."""
    import torch

    from burnish.tools.research import train_digits

    images, held_out, _, answers = train_digits.digits()

    def training(seed: int) -> list[Sample]:
        torch.manual_seed(seed)
        more = [train_digits.moved(torch.from_numpy(images)).numpy() for _ in range(MOVED)]
        return [Sample("digits", {"image": np.concatenate([images, *more])})]

    def accuracy(outputs: list[dict[str, Array]]) -> float:
        return float((outputs[0]["logits"].argmax(-1) == answers).mean())

    more = ",convolutions=true" if name == "resnet" else ""
    rows = {"8 bits, activations too": ("quantize-static", 8)}
    for bits in (4,) if more else (4, 2):
        for rounding in ("nearest", "gptq"):
            rows[f"{bits} bits, {rounding}"] = (f"quantize-weights{{bits={bits},rounding={rounding}{more}}}", bits)
    common = {"steps": 200, "batch": 64, "patience": 10}
    return Bed(
        _read(train_digits.DEMO / f"digits_{name}.onnx", "raise-opset{to=21}", "fold-batchnorm"),
        [Sample(str(number), {"image": part}) for number, part in enumerate(np.array_split(images, 10))],
        training,
        [Sample("held-out digits", {"image": held_out})],
        accuracy,
        {8: {**common, "rate": 1e-5}, 4: {**common, "rate": 1e-4}, 2: {**common, "rate": 1e-3}},
        rows,
    )


def direction() -> Bed:
    """PP-OCR's direction of a line of text: healed on the 20 lines of the calibration, moved sidewards."""
    from burnish.tools.research import quant_static, zoo

    bed = quant_static.BEDS["a6-cls"](zoo.ROOT)
    assert bed.metric is not None

    def training(seed: int) -> list[Sample]:
        random = np.random.default_rng(seed)
        moved = [np.roll(one.feeds["x"], int(random.integers(-24, 25)), 3) for one in bed.fit for _ in range(8)]
        return [*bed.fit, *(Sample(f"moved {number}", {"x": array}) for number, array in enumerate(moved))]

    return Bed(
        quant_static.prepared(bed.model),
        bed.fit,
        training,
        bed.held,
        bed.metric,
        {8: {"steps": 40, "batch": 8, "rate": 2e-5, "patience": 10}},
        {"8 bits, activations too": ("quantize-static", 8)},
        (0,),
    )


def language() -> Bed:
    """SmolLM2 as in the table of weights in few bits, healed on docstrings of the standard library."""
    from burnish.tools.research import healing, quant_weights

    bed = quant_weights.smollm()
    options = {"steps": 30, "batch": 1, "rate": 2e-4, "temperature": 1.0, "evaluations": 3, "cache": 1 << 28}
    return Bed(
        bed.model,
        bed.calibration,
        lambda seed: healing.samples(),
        bed.evaluation,
        bed.metric,
        {4: options},
        {f"4 bits, {one}": (f"quantize-weights{{bits=4,rounding={one}}}", 4) for one in ("nearest", "gptq")},
        (0,),
    )


BEDS: dict[str, Callable[[], Bed]] = {
    "vit": lambda: digits("vit"),
    "resnet": lambda: digits("resnet"),
    "a6-cls": direction,
    "a3": language,
}
TITLES = {
    "vit": "digits ViT",
    "resnet": "digits ResNet",
    "a6-cls": "PP-OCR, direction (A6)",
    "a3": "SmolLM2-135M (A3)",
}


def quantized(bed: Bed, spec: str) -> oir.Model:
    """The model with every layer quantized that a pass quantizes."""
    (one,) = catalog.parse(spec)
    assert isinstance(one, LossyPass)
    context = context_for(bed.model, bed.calibration)
    outcome = Outcome(one.pass_name())
    edits = one.propose(bed.model, context, outcome) if one.decided else one.asked(bed.model, outcome)
    return lossy.apply(bed.model, edits, [one])[0]


def outputs_of(model: oir.Model, samples: Sequence[Sample]) -> list[dict[str, Array]]:
    """What ONNX Runtime computes."""
    runner = executor(threads=1)(model)
    found = [runner.run(sample.feeds) for sample in samples]
    runner.close()
    return found


def judged(bed: Bed, reference: list[dict[str, Array]], model: oir.Model) -> dict[str, float]:
    """The metric, and the error of the outputs relative to their size."""
    found = outputs_of(model, bed.judged)
    apart = size = 0.0
    for was, one in zip(reference, found, strict=True):
        for name, array in was.items():
            apart += float(((one[name].astype(np.float64) - array) ** 2).sum())
            size += float((array.astype(np.float64) ** 2).sum())
    return {"metric": bed.metric(found), "error": (apart / size) ** 0.5}


def kernels(model: oir.Model) -> dict[str, int]:
    """How many products each kernel of ONNX Runtime computes."""
    copy = model.clone()
    name_nodes(copy)
    return dict(Counter(assigned(copy).values()))


def _integers(model: oir.Model) -> dict[str, Array]:
    found = {name: value.const_value for name, value in model.graph.initializers.items()}
    return {name: one.numpy() for name, one in found.items() if one is not None and one.dtype.is_integer()}


def healed(bed: Bed, reference: list[dict[str, Array]], student: oir.Model, bits: int, seed: int) -> dict[str, Any]:
    """One healing and what it did to the integers."""
    wall, cpu = time.monotonic(), time.process_time()
    made = heal(student, bed.model, bed.training(seed), HealOptions(**bed.options[bits], seed=seed))
    cpu, wall = time.process_time() - cpu, time.monotonic() - wall
    before, after = (_integers(model) for model in (student, made.model))
    moved = sum(int((before[name] != after[name]).sum()) for name in before)
    return {
        **judged(bed, reference, made.model),
        "loss": [made.before, made.after],
        "steps": made.steps,
        "ended": made.ended,
        "trained": made.trained,
        "cpu": cpu,
        "wall": wall,
        "bytes of integers changed": moved / max(1, sum(array.size for array in before.values())),
        "kernels": kernels(made.model) == kernels(student),
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def measure(name: str) -> None:
    """Every number of a bed that is not there yet."""
    bed = BEDS[name]()
    reference = outputs_of(bed.model, bed.judged)
    NUMBERS.get(f"{name} | float32", lambda: {"metric": bed.metric(reference)})
    for title, (spec, bits) in bed.rows.items():
        left = [seed for seed in bed.seeds if f"{name} | {title} | {seed}" not in NUMBERS.known]
        if not left and f"{name} | {title}" in NUMBERS.known:
            continue
        student = quantized(bed, spec)
        NUMBERS.get(f"{name} | {title}", partial(judged, bed, reference, student))
        for seed in left:
            NUMBERS.get(f"{name} | {title} | {seed}", partial(healed, bed, reference, student, bits, seed))


def _scales_stay(model: oir.Model) -> healing_sites.Sites:
    found = healing_sites.find(model)
    return replace(found, fixed=found.fixed | {one.scale for one in found.stored})


CHOICES: dict[str, tuple[Any, str, Any]] = {
    "scales stay": (healing_integers, "find", _scales_stay),
    "numbers start at the integers": (healing_integers._Originals, "like", lambda originals, numbers: None),
}
"""Other ways to train, each as what is put in the place of what."""


def choices() -> None:
    """The digits ViT in 2 bits, trained in other ways."""
    bed = BEDS["vit"]()
    reference = outputs_of(bed.model, bed.judged)
    for title in ("2 bits, nearest", "2 bits, gptq"):
        spec, bits = bed.rows[title]
        student = quantized(bed, spec)
        for choice, (place, name, other) in CHOICES.items():
            with patch.object(place, name, other):
                NUMBERS.get(f"vit | {title} | {choice}", partial(healed, bed, reference, student, bits, 0))


_HEAD = """# Quantized models, healed

Made by `python -m burnish.tools.research.quant_healing`; numbers in [quant-healing.json](quant-healing.json). Every
layer of a model is [quantized](../ideas/quantization.md), and its integers and scales are
[trained](../ideas/healing.md#integers) against the original, without labels. All figures are those of what is written,
run by ONNX Runtime (1.32, CPU) on data that nothing was fitted to; `error` is the relative error of all outputs against
the original's. `loss` is that of the rows which healing held out, before and after. Of three seeds the mean is given,
and the ends in brackets. Time is CPU time of one thread, on a busy machine.

"""
_ROWS = [
    "float32", "8 bits, activations too", "4 bits, nearest", "4 bits, gptq", "2 bits, nearest", "2 bits, gptq"
]  # fmt: skip
_NOTES = {
    "vit": "500 held-out digits; 200 steps of 64 rows on the 1297 training digits, as they are and twice moved.",
    "resnet": "The same. `quantize-weights` stores no convolutions in 2 bits.",
    "a6-cls": "400 lines of text; 40 steps of 8 rows on the 20 lines of the calibration, also moved sidewards. In"
    " the integers that training comes to ONNX Runtime measures more loss than before, so they stay as they were.",
    "a3": "Perplexity of 8 texts of 256 tokens of Python's help; 30 steps of one text each, docstrings of the standard"
    " library. The embedding, which is the head as well, has 4 bits too.",
}


def page() -> None:
    """Write the page of what was measured."""
    known = NUMBERS.known
    lines, missing = [_HEAD], list[str]()
    for name, note in _NOTES.items():
        rows = [row for row in _ROWS if any(f"{name} | {row} | {seed}" in known for seed in SEEDS)]
        if not rows:
            missing.append(TITLES[name])
            continue
        if name == "a3" and "4 bits, gptq" not in rows:
            missing.append(f"{TITLES[name]} in 4 bits by gptq")
        rows.insert(0, "float32")
        what = "perplexity" if name == "a3" else "accuracy"
        lines += [f"## {TITLES[name]}\n\n", f"{note}\n\n"]
        lines += [f"| | {what} | error | healed: {what} | error | loss | integers changed | CPU s |\n"]
        lines += ["| --- | --- | --- | --- | --- | --- | --- | --- |\n"]
        for row in rows:
            first = known[f"{name} | {row}"]
            runs = [one for seed in SEEDS if (one := known.get(f"{name} | {row} | {seed}")) is not None]
            lines += [f"| {row} | {first['metric']:.4g} | {first.get('error', 0):.4f} | {_healed_cells(runs)} |\n"]
        lines += ["\n"]
    lines += _choices_table()
    lines += [f"Not measured so far: {', '.join(missing)}.\n"] if missing else []
    (RESULTS / "quant-healing.md").write_text("".join(lines).rstrip() + "\n", encoding="utf-8")


def _healed_cells(runs: Sequence[dict[str, Any]]) -> str:
    if not runs:
        return " | | | | "
    loss = [_span([one["loss"][index] for one in runs], ".3g") for index in (0, 1)]
    moved = _span([100 * one["bytes of integers changed"] for one in runs], ".2g")
    cells = [_span([one["metric"] for one in runs], ".4g"), _span([one["error"] for one in runs], ".4f")]
    return " | ".join([*cells, " -> ".join(loss), f"{moved} %", _span([one["cpu"] for one in runs], ".0f")])


def _span(numbers: Sequence[float], form: str) -> str:
    mean, low, high = (format(one, form) for one in (float(np.mean(numbers)), min(numbers), max(numbers)))
    return mean if low == high else f"{mean} ({low} to {high})"


def _choices_table() -> list[str]:
    known = NUMBERS.known
    found = []
    for title in ("2 bits, nearest", "2 bits, gptq"):
        for label, key in (("as it is", "0"), *((choice, choice) for choice in CHOICES)):
            one = known.get(f"vit | {title} | {key}")
            if one is not None:
                found.append(f"| {title} | {label} | {one['loss'][1]:.3g} | {one['error']:.4f} |\n")
    if len(found) < 4:
        return []
    head = ["## Other ways to train, on the digits ViT\n\n", "Seed 0.\n\n", "| | | loss | error |\n"]
    return [*head, "| --- | --- | --- | --- |\n", *found, "\n"]


def main(words: Sequence[str]) -> int:
    """Measure the named beds, and write the page."""
    import torch

    torch.set_num_threads(1)
    for word in words:
        if word == "choices":
            choices()
        elif word != "page":
            measure(word)
    page()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
