"""Gates around attention against attention that is dropped: `docs/results/gates.md`, its numbers in `gates-*.json`.

`python -m burnish.tools.research.gates [vision|text|unseen|language]` measures what the JSON does not have yet, and
writes the page after each number; `... page` only writes the page.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as oir

from burnish.backends.ort.session import executor
from burnish.frontends import onnx_file
from burnish.ir.edit import name_nodes
from burnish.ir.samples import Sample
from burnish.passes import catalog, lossy
from burnish.passes.base import Outcome
from burnish.passes.depth_blocks import blocks_of
from burnish.passes.lossy import Edit, LossyPass
from burnish.passes.pipeline import Pipeline
from burnish.passes.recipes import NORMAL_FORM
from burnish.passes.routers import Routed, Routing
from burnish.tools.lossy_context import context_for
from burnish.tools.research import gates_page
from burnish.tools.research.depth import LANGUAGE, Numbers, normal, perplexity, windows
from burnish.tools.research.gates_page import FITTED, LANGUAGE_SHARE, SEEDS, SHARES, TEXTS, WINDOWS
from burnish.tools.research.norms_beds import Bed, text, vision

_ROWS, _ROUNDS = 24, 30
"""Rows that are timed one after the other, and rounds of them."""


@dataclass(frozen=True)
class _Task:
    """A classifier in normal form.

    Attributes:
        model: the model.
        fit: what routers are learned on, all rows in one sample.
        feeds, answers: rows that nothing was learned from.
    """

    model: oir.Model
    fit: list[Sample]
    feeds: dict[str, np.ndarray]
    answers: np.ndarray

    def accuracy(self, model: oir.Model) -> float:
        """The share of the held-out rows that are right."""
        runner = executor(threads=1)(model)
        found = runner.run(self.feeds)["logits"].argmax(1)
        runner.close()
        return float((found == self.answers).mean())


def _task(bed: Bed) -> _Task:
    model = Pipeline(NORMAL_FORM).rewrite(onnx_file.read(bed.file)).model
    name_nodes(model)
    with np.load(bed.data) as arrays:
        some = np.random.default_rng(0).permutation(len(arrays["label"]))[:FITTED]
        inputs = {str(value.name): arrays[str(value.name)][some] for value in model.graph.inputs}
    return _Task(model, [Sample("training", inputs)], bed.feeds, bed.answers)


def _proposed(model: oir.Model, samples: Sequence[Sample], spec: str) -> tuple[list[Edit], LossyPass, Routed]:
    """What the pass proposes, and what was learned."""
    (one,) = catalog.parse(spec)
    assert isinstance(one, LossyPass)
    context = context_for(model, samples)
    learned: list[Routed] = []

    def routes(model: oir.Model, wanted: Routing, samples: Sequence[Sample]) -> Routed:
        assert context.routes is not None
        learned.append(context.routes(model, wanted, samples))
        return learned[-1]

    edits = one.propose(model, replace(context, routes=routes), Outcome(""))
    return edits, one, learned[0]


def _skipped(model: oir.Model, feeds: dict[str, np.ndarray]) -> float:
    """The share of the rows that each gate of a model skips, added up over the gates."""
    copy = model.clone()
    copy.graph.outputs.clear()
    for node in list(copy.graph):
        if node.op_type == "If":
            value = node.inputs[0]
            for _ in range(3):  # Less, ReduceMin and Cast are between the rows' decisions and the If
                assert value is not None and (step := value.producer()) is not None
                value = step.inputs[0]
            assert value is not None
            copy.graph.outputs.append(value)
    if not copy.graph.outputs:
        return 0.0
    runner = executor(threads=1)(copy)
    found = runner.run(feeds)
    runner.close()
    return float(sum(one.mean() for one in found.values()))


def _scores(model: oir.Model, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """The scores of the only router of a model."""
    copy = model.clone()
    (gate,) = (node for node in copy.graph if node.op_type == "If")
    value = gate.inputs[0]
    for _ in range(4):  # Less, ReduceMin, Cast and the Less that compares a score with 0
        assert value is not None and (step := value.producer()) is not None
        value = step.inputs[0]
    assert value is not None
    copy.graph.outputs[:] = [value]
    runner = executor(threads=1)(copy)
    found = next(iter(runner.run(feeds).values()))
    runner.close()
    return found


def _dropped(model: oir.Model, blocks: Sequence[int]) -> oir.Model:
    if not blocks:
        return model
    copy = model.clone()
    catalog.make("drop-attention", {"blocks": "+".join(map(str, blocks))}).rewrite(copy, Outcome(""))
    return copy


def _static(task: _Task) -> list[dict[str, Any]]:
    """For each number of attentions the set that is nearest to the original on the training rows, and its accuracy."""
    count = len(blocks_of(task.model).blocks)
    runner = executor(threads=1)(task.model)
    wanted = _log_softmax(runner.run(task.fit[0].feeds)["logits"])
    runner.close()
    rows = []
    for size in range(count + 1):
        found = []
        for blocks in combinations(range(count), size):
            runner = executor(threads=1)(_dropped(task.model, blocks))
            logs = _log_softmax(runner.run(task.fit[0].feeds)["logits"])
            runner.close()
            found.append((float((np.exp(wanted) * (wanted - logs)).sum(1).mean()), blocks))
        best = min(found)[1]
        rows.append({"dropped": list(best), "accuracy": task.accuracy(_dropped(task.model, best))})
    return rows


def _log_softmax(scores: np.ndarray) -> np.ndarray:
    scores = scores.astype(np.float64)
    scores = scores - scores.max(1, keepdims=True)
    found: np.ndarray = scores - np.log(np.exp(scores).sum(1, keepdims=True))
    return found


def _gated(task: _Task, share: float, seed: int, steps: int) -> dict[str, Any]:
    """A model whose routers were learned."""
    start = time.process_time()
    spec = f"gate-attention{{skip={share},steps={steps},seed={seed}}}"
    edits, one, learned = _proposed(task.model, task.fit, spec)
    seconds = time.process_time() - start
    model = lossy.apply(task.model, edits, [one])[0]
    gates = [edit for edit in edits if edit.payload]
    count = len(blocks_of(task.model).blocks)
    row = {
        "how": learned.how,
        "gates": len(gates),
        "dropped": len(edits) - len(gates),
        "skipped": (len(edits) - len(gates) + _skipped(model, task.feeds)) / count,
        "accuracy": task.accuracy(model),
        "seconds": seconds,
        "by lot": [_by_lot(task, edits, one, lot) for lot in SEEDS] if gates else [],
    }
    if seed == SEEDS[0] and not steps:
        row["time"] = _ratio(task, model)
    return row


def _by_lot(task: _Task, edits: Sequence[Edit], one: LossyPass, lot: int) -> dict[str, float]:
    """The same gates with weights that were drawn, each of which skips as many of the training rows as before."""
    random, made = np.random.default_rng(lot), []
    for edit in edits:
        if edit.payload:
            shown = float(edit.option.split()[3].rstrip("%")) / 100
            payload = {
                **edit.payload,
                "weight": random.normal(size=edit.payload["weight"].shape),
                "bias": np.array(0.0),
            }
            scores = _scores(lossy.apply(task.model, [replace(edit, payload=payload)], [one])[0], task.fit[0].feeds)
            made.append(replace(edit, payload={**payload, "bias": np.array(-np.quantile(scores, shown))}))
        else:
            made.append(edit)
    model = lossy.apply(task.model, made, [one])[0]
    gone = sum(not edit.payload for edit in edits)
    skipped = (gone + _skipped(model, task.feeds)) / len(blocks_of(task.model).blocks)
    return {"skipped": skipped, "accuracy": task.accuracy(model)}


def _ratio(task: _Task, model: oir.Model) -> list[float]:
    """Time of a model on rows one after the other, over that of the original: median and 95 % interval."""
    rows = [{name: array[i : i + 1] for name, array in task.feeds.items()} for i in range(_ROWS)]
    lowering = Pipeline(catalog.parse("fuse-norm,drop-identity,fold-constants,share-repeats,drop-unused"))
    return _timed([lowering.rewrite(each.clone()).model for each in (task.model, model)], rows, _ROUNDS)


def _timed(models: Sequence[oir.Model], rows: Sequence[dict[str, np.ndarray]], rounds: int) -> list[float]:
    runners = [executor(threads=1)(model) for model in models]
    ratios = []
    for round_ in range(rounds + 2):
        spent = []
        for runner in runners:
            start = time.thread_time()
            for row in rows:
                runner.run(row)
            spent.append(time.thread_time() - start)
        if round_ >= 2:
            ratios.append(spent[1] / spent[0])
    for runner in runners:
        runner.close()
    picks = np.random.default_rng(0).integers(0, len(ratios), (1000, len(ratios)))
    low, high = np.percentile(np.median(np.array(ratios)[picks], axis=1), (2.5, 97.5))
    return [float(np.median(ratios)), float(low), float(high)]


def _classifier(name: str, make: Callable[[Path, int], Bed], numbers: Numbers) -> Iterator[None]:
    folder = Path(tempfile.gettempdir()) / "burnish-norms"
    folder.mkdir(exist_ok=True)
    for seed in SEEDS:
        task = _task(make(folder, seed))
        if name == "text" or seed == SEEDS[0]:
            numbers.get(f"static | {seed}", partial(_static, task))
        yield
        for share in SHARES:
            for steps in (0, 100) if seed == SEEDS[0] else (0,):
                numbers.get(f"{share} | {steps} | {seed}", partial(_gated, task, share, seed, steps))
                yield


def _unseen(numbers: Numbers) -> Iterator[None]:
    """The classifier of text, with routers learned on half of the rows that it was not trained on."""
    folder = Path(tempfile.gettempdir()) / "burnish-norms"
    folder.mkdir(exist_ok=True)
    whole = _task(text(folder, SEEDS[0]))
    order = np.random.default_rng(0).permutation(len(whole.answers))
    fit, rest = np.split(order, [len(order) // 2])
    feeds = [{name: array[rows] for name, array in whole.feeds.items()} for rows in (fit, rest)]
    task = replace(whole, fit=[Sample("unseen", feeds[0])], feeds=feeds[1], answers=whole.answers[rest])
    numbers.get(f"static | {SEEDS[0]}", partial(_static, task))
    for share in SHARES[:2]:
        numbers.get(f"{share} | 0 | {SEEDS[0]}", partial(_gated, task, share, SEEDS[0], 0))
        yield


def _language(numbers: Numbers) -> Iterator[None]:
    """SmolLM2: routers as they were measured on some short texts, judged on windows of 256 tokens."""
    model = normal(LANGUAGE)
    name_nodes(model)
    held_out, fit = windows("held-out")[:WINDOWS], windows("short")[:TEXTS]
    count = len(blocks_of(model).blocks)

    def gated() -> dict[str, Any]:
        start = time.process_time()
        edits, one, learned = _proposed(model, fit, f"gate-attention{{skip={LANGUAGE_SHARE},rounds=1}}")
        seconds = time.process_time() - start
        made = lossy.apply(model, edits, [one])[0]
        gone = [edit for edit in edits if not edit.payload]
        rates = [_skipped(made, sample.feeds) for sample in held_out]
        return {
            "how": learned.how,
            "distances": dict(learned.distances),
            "alone": learned.alone,
            "edits": [f"{edit.site}: {edit.option}" for edit in edits],
            "gates": len(edits) - len(gone),
            "skipped": (len(gone) + float(np.mean(rates))) / count,
            "perplexity": perplexity(made, held_out),
            "seconds": seconds,
            "time": _timed([model, made], [sample.feeds for sample in held_out[:2]], 5),
        }

    found = numbers.get("gates", gated)
    yield
    numbers.get("original", lambda: perplexity(model, held_out))
    order, size = np.argsort(found["alone"]).tolist(), round(LANGUAGE_SHARE * count)
    sets = {f"static {number}": sorted(order[:number]) for number in (size, size - 1)}
    sets |= {f"by lot {seed}": sorted(np.random.default_rng(seed).permutation(count)[:size].tolist()) for seed in SEEDS}
    for name, gone in sets.items():
        numbers.get(name, partial(_judged, model, gone, held_out))
        yield


def _judged(model: oir.Model, gone: Sequence[int], held_out: Sequence[Sample]) -> dict[str, Any]:
    return {"dropped": gone, "perplexity": perplexity(_dropped(model, gone), held_out)}


def main(arguments: Sequence[str]) -> int:
    """Measure what is missing of the models that are named, all of them by default."""
    import torch

    torch.set_num_threads(1)
    parts: dict[str, Callable[[Numbers], Iterator[None]]] = {
        "vision": partial(_classifier, "vision", vision),
        "text": partial(_classifier, "text", text),
        "unseen": _unseen,
        "language": _language,
    }
    for name in arguments or parts:
        for _ in parts[name](Numbers(gates_page.numbers_of(name))) if name != "page" else ():
            gates_page.write()
    gates_page.write()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
