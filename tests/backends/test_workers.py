"""Scores that are spread over processes are those of one process, even where workers are lost."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

import numpy as np
import onnx_ir as oir
import pytest
from remove_one import RemoveOne
from scale_and_die import ScaleAndDie
from scale_one import Error, Scale

from burnish.backends.ort.session import executor
from burnish.backends.workers import Workers, _pack, _unpack
from burnish.frontends import load
from burnish.ir import weights
from burnish.ir.errors import InputError
from burnish.ir.samples import Sample
from burnish.ir.text import fingerprint
from burnish.passes.pipeline import Pipeline
from burnish.passes.recipes import NORMAL_FORM
from burnish.passes.scoring import Job, Scorer

DEMO = Path(__file__).resolve().parents[2] / "tools" / "demo"


@cache
def digits() -> tuple[oir.Model, list[Sample]]:
    model = Pipeline(NORMAL_FORM).rewrite(load(DEMO / "digits_resnet.onnx")).model
    with np.load(DEMO / "digits.npz") as data:
        return model, [Sample(f"digits {n}", {"image": data["image"][n : n + 10]}) for n in (0, 10)]


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    pytest.importorskip("ray")
    made = Workers("2", partial(executor, threads=1))
    yield made
    made.close()


def test_a_job_travels_without_a_loss() -> None:
    model, samples = digits()
    model = Pipeline(["fold-batchnorm"]).rewrite(model).model
    found = _unpack(_pack(Job(model, samples, [Error()], [Scale()])))
    assert fingerprint(found.model) == fingerprint(model)
    pairs = list(zip(found.model.graph.initializers.values(), model.graph.initializers.values(), strict=True))
    assert any(weights.unrounded(own) is not None for _, own in pairs)
    for theirs, own in pairs:
        assert (theirs.name, theirs.dtype) == (own.name, own.dtype)
        if own.dtype == oir.DataType.FLOAT:
            np.testing.assert_array_equal(weights.exact(theirs), weights.exact(own))


@pytest.mark.parametrize("where", ["0", "-1", "many", "http://there", ""])
def test_where_nobody_works(where: str) -> None:
    with pytest.raises(InputError, match="neither how many workers"):
        Workers(where, executor)


def test_workers_score_as_one_process_does(workers: Workers) -> None:
    model, samples = digits()
    passes = [RemoveOne(), Scale()]
    edits = [edit for one in passes for edit in one.propose(model, None, None)]
    with Scorer(model, samples, executor(), [Error()], passes) as serial:
        alone = serial.scores(edits)
    steps: list[int] = []
    spread = Scorer(model, samples, executor(), [Error()], passes, spread=workers)
    assert spread.scores(edits[:3]) == alone[:3]
    assert spread.scores(edits, lambda number, total: steps.append(number)) == alone
    assert steps == list(range(3, len(edits) + 1))


def test_what_a_lost_worker_was_at_is_scored_by_another(workers: Workers, tmp_path: Path) -> None:
    model, samples = digits()
    deadly, harmless = ScaleAndDie(marker=str(tmp_path / "died")), Scale()
    edits = deadly.propose(model, None, None)
    with Scorer(model, samples, executor(), [Error()], [harmless]) as serial:
        alone = serial.scores(harmless.propose(model, None, None))
    found = Scorer(model, samples, executor(), [Error()], [deadly], spread=workers).scores(edits)
    assert (tmp_path / "died.0").exists()
    assert found == alone


@pytest.mark.slow
def test_workers_that_are_lost_again_and_again_are_an_error(workers: Workers, tmp_path: Path) -> None:
    model, samples = digits()
    deadly = ScaleAndDie(marker=str(tmp_path / "died"), times=100)
    with pytest.raises(InputError, match="workers ended"):
        Scorer(model, samples, executor(), [Error()], [deadly], spread=workers).scores(
            deadly.propose(model, None, None)
        )


def test_what_is_wrong_with_the_samples_comes_back(workers: Workers) -> None:
    model, _ = digits()
    flat = [Sample("flat", {"image": np.zeros((1, 3), np.float32)})]
    edits = Scale().propose(model, None, None)
    with pytest.raises(InputError, match="flat"):
        Scorer(model, flat, executor(), [Error()], [Scale()], spread=workers).scores(edits)


CLIENT = """
import test_workers as t
from functools import partial
from burnish.backends.workers import Workers
model, samples = t.digits()
edits = t.Scale().propose(model, None, None)[:4]
workers = Workers("ray://127.0.0.1:PORT", partial(t.executor, threads=1))
with t.Scorer(model, samples, t.executor(), [t.Error()], [t.Scale()]) as serial:
    alone = serial.scores(edits)
assert t.Scorer(model, samples, t.executor(), [t.Error()], [t.Scale()], spread=workers).scores(edits) == alone
print("the same from", workers.number)
workers.close()
"""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.mark.slow
def test_a_cluster_scores_as_one_process_does() -> None:
    pytest.importorskip("ray")
    pytest.importorskip("grpc")
    search = os.pathsep.join([*sys.path, str(Path(__file__).parent)])
    shared = {"PYTHONPATH": search, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(24)}
    environment = os.environ | shared | {"RAY_USAGE_STATS_ENABLED": "0"}
    port = free_port()
    folder = tempfile.mkdtemp(dir="/tmp")  # the names of sockets below it may not be long
    start = f"start --head --block --num-cpus=2 --include-dashboard=false --port={free_port()} --temp-dir={folder}"
    words = [sys.executable, "-m", "ray.scripts.scripts", *start.split(), f"--ray-client-server-port={port}"]
    head = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        client = [sys.executable, "-c", CLIENT.replace("PORT", str(port))]
        done = subprocess.run(client, env=environment, capture_output=True, text=True, timeout=300)
        assert "the same from 2" in done.stdout, done.stderr
    finally:
        head.terminate()
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)
