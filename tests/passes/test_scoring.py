"""Scores are those of the edited models run whole, each is measured once, and a kill loses none."""

from __future__ import annotations

import math
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as oir
import pytest
from remove_one import RemoveOne
from scale_one import Error, Scale

from burnish.backends.ort.session import OrtRunner, executor
from burnish.frontends import load
from burnish.ir.errors import InputError
from burnish.ir.samples import Sample
from burnish.passes import lossy
from burnish.passes.lossy import Edit
from burnish.passes.pipeline import Pipeline
from burnish.passes.recipes import NORMAL_FORM
from burnish.passes.score_store import Store
from burnish.passes.scoring import Bench, Edits, Job, Score, Scorer

ROOT = Path(__file__).resolve().parents[2]
PASSES = [RemoveOne(), Scale()]


@cache
def digits() -> tuple[oir.Model, list[Sample], list[Edit]]:
    """The digits ViT in normal form, three samples of ten digits, and an edit of each kind for every site."""
    model = Pipeline(NORMAL_FORM).rewrite(load(ROOT / "tools" / "demo" / "digits_vit.onnx")).model
    with np.load(ROOT / "tools" / "demo" / "digits.npz") as data:
        image, label = data["image"], data["label"]
    samples = [Sample(f"digits {n}", {"image": image[n : n + 10]}, label[n : n + 10]) for n in (0, 10, 20)]
    edits = [edit for one in PASSES for edit in one.propose(model, None, None)]
    return model, samples, edits


@dataclass
class Accuracy:
    name: str = "accuracy"
    key: str = "accuracy"
    higher_is_better: bool = True

    def partial(self, outputs, reference, sample):
        if sample.labels is None:
            raise InputError("there are no labels")
        return outputs["logits"].argmax(-1) == sample.labels

    def value(self, partials):
        return float(np.concatenate(partials).mean())


def scorer(store: Store | None = None, execute=None, **options) -> Scorer:
    model, samples, _ = digits()
    return Scorer(model, samples, execute or executor(), [Error(), Accuracy()], PASSES, store, **options)


def refuse(model: oir.Model) -> OrtRunner:
    raise AssertionError("nothing may be executed")


def test_a_score_is_what_the_whole_edited_model_does() -> None:
    model, samples, edits = digits()
    assert len(edits) > 10
    steps: list[tuple[int, int]] = []
    with scorer() as one:
        found = one.scores(edits, lambda number, total: steps.append((number, total)))
        original = one.original()
    assert steps == [(number, len(edits)) for number in range(len(edits) + 1)]
    assert original.values["error"] == 0.0 and original.values["accuracy"] > 0.9
    whole = executor()(model)
    for edit, score in zip(edits, found, strict=True):
        runner = executor()(lossy.apply(model, [edit], PASSES)[0])
        errors, right = [], []
        for sample in samples:
            outputs, reference = runner.run(sample.feeds), whole.run(sample.feeds)
            errors.append(Error().partial(outputs, reference, sample))
            right.append(Accuracy().partial(outputs, reference, sample))
        assert score.reason is None
        assert score.values["error"] == pytest.approx(Error().value(errors), rel=1e-4, abs=1e-9)
        assert score.values["accuracy"] == Accuracy().value(right)


def test_edits_are_scored_together_too_and_none_changes_nothing() -> None:
    _, _, edits = digits()
    with scorer() as one:
        alone = one.scores(edits[:2])
        both, nothing, again = one.scores([(edits[0], edits[1]), (), (edits[1], edits[0])])
    assert both == again
    assert both.values["error"] not in (alone[0].values["error"], alone[1].values["error"])
    assert nothing.values["error"] == 0.0


def test_memory_bounds_what_is_kept_and_changes_no_score() -> None:
    _, _, edits = digits()
    with scorer() as one, scorer(memory=0) as other:
        assert one.scores(edits[::3]) == other.scores(edits[::3])


def test_a_second_run_executes_nothing(tmp_path: Path) -> None:
    _, _, edits = digits()
    path = tmp_path / "scores.sqlite"
    with scorer(Store(path)) as one:
        found, original = one.scores(edits[:4]), one.original()
    with scorer(Store(path), refuse) as other:
        assert other.scores(edits[:4]) == found
        assert other.original() == original
        with pytest.raises(AssertionError):
            other.scores(edits[:5])


def test_other_samples_weights_or_measures_are_other_scores(tmp_path: Path) -> None:
    model, samples, edits = digits()
    store = Store(tmp_path / "scores.sqlite")
    with scorer(store) as one:
        one.scores(edits[:1])
    changed = model.clone()
    weight = changed.graph.initializers[edits[-1].site]
    weight.const_value = oir.tensor(weight.const_value.numpy() * np.float32(1.5), name=weight.name)
    for other_model, other_samples, measures in (
        (changed, samples, [Error()]),
        (model, samples[:2], [Error()]),
        (model, samples, [Error("squares")]),
    ):
        with pytest.raises(AssertionError):
            Scorer(other_model, other_samples, refuse, measures, PASSES, store).scores(edits[:1])
    assert Scorer(model, samples, refuse, [Error()], PASSES, store).scores(edits[:1])
    with pytest.raises(AssertionError):
        Scorer(model, samples, refuse, [Error()], PASSES, store, fitted="others").scores(edits[:1])
    with pytest.raises(AssertionError):
        Scorer(model, samples, refuse, [Error()], PASSES, store, maker="burnish 0.2").scores(edits[:1])


@pytest.mark.parametrize("garbage", ["nonsense", "null", "[1]", "{}", '{"value": "x"}', '{"value": NaN}', b"\xff"])
def test_rows_of_a_store_that_are_no_scores_are_scored_anew(tmp_path: Path, garbage: str | bytes) -> None:
    _, _, edits = digits()
    path = tmp_path / "scores.sqlite"
    with scorer(Store(path)) as one:
        found = one.scores(edits[:2])
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("update scores set found = ?", (garbage,))
    with scorer(Store(path)) as other:
        assert other.scores(edits[:2]) == found


def test_an_edit_that_breaks_the_model_has_the_worst_score_and_a_reason(tmp_path: Path) -> None:
    _, _, edits = digits()
    broken = Scale().edit(edits[-1].site, math.nan)
    impossible = RemoveOne().edit_out("block 0")
    path = tmp_path / "scores.sqlite"
    for execute in (executor(), refuse):
        with scorer(Store(path), execute) as one:
            for score in one.scores([broken, impossible]):
                assert score.values == {"error": math.inf, "accuracy": -math.inf}
                assert score.reason is not None
            assert "not finite on the sample `digits 0`" in str(one.scores([broken])[0].reason)


def test_what_is_wrong_with_the_samples_is_an_error() -> None:
    model, samples, edits = digits()
    with pytest.raises(InputError, match="no samples"):
        Scorer(model, [], executor(), [Error()], PASSES).scores(edits[:1])
    unlabelled = [Sample(one.name, one.feeds) for one in samples]
    with pytest.raises(InputError, match="no labels"):
        Scorer(model, unlabelled, executor(), [Accuracy()], PASSES).scores(edits[:1])
    misshapen = [samples[0], Sample("flat", {"image": np.zeros((1, 3), np.float32)})]
    with pytest.raises(InputError, match="flat"):
        Scorer(model, misshapen, executor(), [Error()], PASSES).scores(edits[:1])
    with pytest.raises(InputError, match="image"):
        Scorer(model, [Sample("empty", {})], executor(), [Error()], PASSES).scores(edits[:1])


def test_scores_that_others_make_are_kept_as_they_come(tmp_path: Path) -> None:
    _, _, edits = digits()
    store = Store(tmp_path / "scores.sqlite")

    def elsewhere(job: Job, plans: Sequence[Edits]) -> Iterator[tuple[int, Score]]:
        bench = Bench(job, executor())
        for number in reversed(range(len(plans))):
            yield number, next(bench.scores([plans[number]]))
        bench.close()

    with scorer(store, refuse, spread=elsewhere) as one, scorer() as serial:
        assert one.scores(edits[:4]) == serial.scores(edits[:4])
    with scorer(store, refuse) as again:
        again.scores(edits[:4])


CODE = """
import sys; from pathlib import Path; import test_scoring as t; from burnish.passes.score_store import Store
say = lambda number, total: print(number, flush=True)
with t.scorer(Store(Path(sys.argv[1]))) as one: print([s.values for s in one.scores(t.digits()[2], say)])
"""


def test_a_killed_run_is_gone_on_with(tmp_path: Path) -> None:
    edits = digits()[2]
    path = tmp_path / "scores.sqlite"
    search = [str(ROOT / ".src"), str(ROOT / "tests"), str(ROOT / "tests" / "passes")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(search)}
    running = subprocess.Popen([sys.executable, "-c", CODE, path], env=environment, stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    while int(running.stdout.readline()) < 3:
        pass
    running.send_signal(signal.SIGKILL)
    running.communicate()
    steps: list[int] = []
    with scorer(Store(path)) as one, scorer() as fresh:
        resumed = one.scores(edits, lambda number, total: steps.append(number))
        assert 3 <= steps[0] < len(edits)
        assert resumed == fresh.scores(edits)
