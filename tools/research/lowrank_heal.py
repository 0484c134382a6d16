"""Heal factored digits models: `OMP_NUM_THREADS=1 python -m burnish.tools.research.lowrank_heal NAME [SEED...]`.

A model is factored to a share of all its parameters, with the ranks that the selection of `optimize --max-size` finds,
and trained to give the original's scores on the 1297 training digits, turned and shifted at random, without labels.
Accuracy is that on the 500 held-out digits, which neither the original nor healing has seen. Writes into
`docs/results/lowrank.json`; `lowrank.py` makes the page.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as oir
import torch
from torch import nn

from burnish.backends.fx.healing import HealOptions, heal
from burnish.backends.ort.session import executor
from burnish.frontends import onnx_file
from burnish.ir.samples import Sample
from burnish.passes import catalog, lossy
from burnish.passes.base import Outcome
from burnish.passes.criticality import reading
from burnish.passes.lossy import LossyPass
from burnish.passes.measures import Divergence
from burnish.passes.pipeline import Pipeline
from burnish.passes.recipes import NORMAL_FORM
from burnish.passes.scoring import Scorer
from burnish.passes.selection import select
from burnish.tools.lossy_context import context_for
from burnish.tools.research.lowrank_page import RESULTS
from burnish.tools.research.train_digits import DigitsVit, digits, moved, train, write_model

SEEDS = (0, 1, 2)
MOVED = 4


@dataclass(frozen=True)
class Trial:
    """A model and the share of its parameters to keep.

    Attributes:
        build: makes the module; None for the ResNet of `burnish demo`.
        epochs, rate: of its training.
        share: of all parameters.
        budget: of healing: rows of a step, and steps or minutes.
    """

    title: str
    file: str
    build: Callable[[], nn.Module] | None
    epochs: int
    rate: float
    share: float
    budget: dict[str, Any]


def _wide() -> nn.Module:
    return DigitsVit(64, 4, 4)


def _wider() -> nn.Module:
    return DigitsVit(128, 4, 4)


TRIALS = {
    "resnet-50": Trial("digits ResNet, 78 k", "resnet", None, 0, 0.0, 0.5, {"batch": 64, "steps": 600}),
    "vit-50": Trial("digits ViT, 4 layers, 64 wide", "vit64", _wide, 80, 3e-3, 0.5, {"batch": 128, "steps": 300}),
    "vit-25": Trial("digits ViT, 4 layers, 128 wide", "vit128", _wider, 60, 2e-3, 0.25, {"batch": 128, "steps": 300}),
}


def _original(trial: Trial, folder: Path) -> oir.Model:
    from burnish.tools.research.train_digits import DEMO

    if trial.build is None:
        return onnx_file.read(DEMO / f"digits_{trial.file}.onnx")
    file = folder / f"{trial.file}.onnx"
    if not file.exists():
        images, held_out, labels, _ = digits()
        module = train(trial.build, torch.from_numpy(images), torch.from_numpy(labels), trial.epochs, trial.rate)
        write_model(module, torch.from_numpy(held_out[:2]), file)
    return onnx_file.read(file)


def _factored(model: oir.Model, samples: Sequence[Sample], share: float) -> tuple[oir.Model, float]:
    """The model with the ranks that lose least of all that keep `share` of its parameters, and what it keeps."""
    whole = sum(value.const_value.size for value in model.graph.initializers.values() if value.const_value is not None)
    context = context_for(model, samples)
    one = catalog.make("project-rank", {"ranks": 10, "multiple": 2, "joint": False})
    assert isinstance(one, LossyPass)
    edits = one.propose(model, context, Outcome("project-rank"))
    with Scorer(model, samples, context.execute, [Divergence(reading(model))], [one]) as scorer:
        errors = {edit.key: score.values["divergence"] for edit, score in zip(edits, scorer.scores(edits), strict=True)}
    found = select(edits, errors, lambda edit: float(edit.savings.parameters), target=(1 - share) * whole)
    return lossy.apply(model, found.edits, [one])[0], 1 - found.saved / whole


def measure(trial: Trial, seeds: Sequence[int], folder: Path) -> dict[str, Any]:
    """Accuracy of the original, factored, and healed with each seed."""
    images, held_out, _, answers = digits()

    def accuracy(model: oir.Model) -> float:
        runner = executor(threads=1)(model)
        scores = runner.run({"image": held_out})["logits"]
        runner.close()
        return float((scores.argmax(1) == answers).mean())

    model = Pipeline(NORMAL_FORM).rewrite(_original(trial, folder)).model
    samples = [Sample(str(i), {"image": part}) for i, part in enumerate(np.array_split(images, 10))]
    student, kept = _factored(model, samples, trial.share)
    row: dict[str, Any] = {
        "name": trial.title,
        "parameters": sum(v.const_value.size for v in model.graph.initializers.values() if v.const_value is not None),
        "kept": kept,
        "original": accuracy(model),
        "factored": accuracy(student),
        "batch": trial.budget["batch"],
        "healed": {},
    }
    print(row, flush=True)
    for seed in seeds:
        start = time.perf_counter()
        torch.manual_seed(seed)
        more = [moved(torch.from_numpy(images)).numpy() for _ in range(MOVED)]
        seen = [Sample("digits", {"image": np.concatenate([images, *more])})]
        options = HealOptions(rate=1e-3, seed=seed, patience=10, **trial.budget)
        healed = heal(student, model, seen, options)
        row["healed"][str(seed)] = {"accuracy": accuracy(healed.model), "steps": healed.steps}
        print(trial.title, seed, row["healed"][str(seed)], f"{time.perf_counter() - start:.0f} s", flush=True)
    return row


def main(words: Sequence[str]) -> int:
    """Measure the named trial with the given seeds, or all of them."""
    torch.set_num_threads(1)
    name, *seeds = words
    file = RESULTS / "lowrank.json"
    folder = Path(tempfile.gettempdir()) / "burnish-lowrank"
    folder.mkdir(exist_ok=True)
    row = measure(TRIALS[name], [int(seed) for seed in seeds] or SEEDS, folder)
    kept = json.loads(file.read_text()) if file.exists() else {}
    before = kept.setdefault("healed", {}).get(name, row)
    kept["healed"][name] = row | {"healed": before["healed"] | row["healed"]}
    file.write_text(json.dumps(kept, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
