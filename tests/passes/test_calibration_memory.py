"""Calibration holds no more with more samples: `memory` bounds activations, and as much again of statistics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as oir
import pytest
from golden import parse_graph

from burnish.frontends import load
from burnish.ir.edit import name_nodes
from burnish.ir.samples import Sample
from burnish.passes import catalog
from burnish.passes.base import Outcome
from burnish.passes.lossy import LossyPass
from burnish.passes.pipeline import Pipeline
from burnish.passes.recipes import NORMAL_FORM
from burnish.tools.lossy_context import context_for

WIDTH, LAYERS, ROWS, SAMPLES = 512, 16, 256, 24
MEMORY = 16
"""MiB; the statistics of all layers would take 65, their activations on all samples 400."""

SLACK = 32
"""MiB for what else runs: one sample's own activations, the runtime, the rounding of one layer."""


def _model() -> oir.Model:
    weights = ", ".join(f"float[{WIDTH}, {WIDTH}] w{index}" for index in range(LAYERS))
    layer = "a{0} = MatMul (r{0}, w{0}) r{1} = Relu (a{0})"
    nodes = " ".join(layer.format(index, index + 1) for index in range(LAYERS))
    graph = parse_graph(f"g (float[N, {WIDTH}] r0) => (float[N, {WIDTH}] r{LAYERS}) <{weights}> {{ {nodes} }}")
    model = Pipeline(NORMAL_FORM).rewrite(load(graph)).model
    name_nodes(model)
    return model


def _resident(what: str) -> float:
    """MiB of this process; `VmHWM` at most since `_forget`."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{what}:")[2].split()[0]) / 1024


def _forget() -> None:
    """Let the largest resident set be the present one."""
    Path("/proc/self/clear_refs").write_text("5")


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec",
    [
        f"quantize-weights{{bits=4,rounding=gptq,memory={MEMORY}}}",
        f"quantize-fptq{{memory={MEMORY}}}",
        f"quantize-static{{calibration=mse,memory={MEMORY}}}",
    ],
)
def test_memory_is_bounded_whatever_the_number_of_samples(spec: str) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the largest resident set is only known on Linux")
    model, random = _model(), np.random.default_rng(0)
    array = random.standard_normal((ROWS, WIDTH)).astype(np.float32)
    (one,) = catalog.parse(spec)
    assert isinstance(one, LossyPass)

    def propose(count: int) -> None:
        samples = [Sample(str(index), {"r0": array}) for index in range(count)]
        assert one.propose(model, context_for(model, samples), Outcome(one.pass_name()))

    propose(1)
    before = _resident("VmRSS")
    _forget()
    propose(SAMPLES)
    assert _resident("VmHWM") - before <= 2 * MEMORY + SLACK
