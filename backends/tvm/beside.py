"""A region as compiled code timed beside the same region in ONNX Runtime."""

from __future__ import annotations

import time
from functools import partial

import msgspec
import tvm

from burnish.backends.ort import timing
from burnish.backends.tvm.artifact import Evidence
from burnish.backends.tvm.regions import Region
from burnish.backends.tvm.runner import TvmRunner, host_array
from burnish.ir.samples import Sample
from burnish.passes.protocols import Runner, Verdict

_SECONDS = 1.0
"""Time for one paired comparison, about."""

_GAIN = 0.02
"""How much faster than ONNX Runtime a region has to be, beyond the noise."""

_LEAST = 6
"""Rounds of a comparison at least."""


def calls(region: Region, sample: Sample, code: TvmRunner, original: Runner) -> tuple[timing.Action, timing.Action]:
    """A run of a region as compiled code, within its model, and in ONNX Runtime, as whoever uses that alone runs it.

    What comes from outside the model and what leaves it are arrays; other regions hand tensors of the host over.
    """
    arrays = [(value, sample.feeds[str(value.name)]) for value in region.inputs]
    given = [array if value.is_graph_input() else tvm.runtime.tensor(array) for value, array in arrays]
    leave = [value.is_graph_output() for value in region.outputs]

    def own() -> object:
        found = zip(code.run_tensors(given), leave, strict=True)
        return [host_array(one) if leaves or one.device != tvm.cpu() else one for one, leaves in found]

    return own, partial(original.run, sample.feeds)


def once(call: timing.Action) -> float:
    """Seconds of a run: the best of three where it is short."""
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
        if best > 0.05:
            break
    return best


def compare(own: timing.Action, other: timing.Action) -> Verdict:
    """Whether compiled code is clearly faster; ONNX Runtime's is the code to take where that is not decided.

    What seems to be faster is measured again, and the worse answer counts: of many regions some seem so by chance.
    """
    found = timing.slower(other, own, budget=_SECONDS, margin=_GAIN, least=_LEAST)
    if not found.faster:
        return found
    return max(found, timing.slower(other, own, budget=_SECONDS, margin=_GAIN, least=_LEAST), key=lambda one: one.high)


def timed(evidence: Evidence, verdict: Verdict, sample: str, tuned: str) -> Evidence:
    """The evidence with what was timed on a sample, and with `tuned` behind why the region stays, if it does."""
    unclear = "" if verdict.slower else f" ({verdict.low:.3g} to {verdict.high:.3g}), which is not clearly less"
    note = "" if verdict.faster else f"{verdict.ratio:.3g} times as long as in ONNX Runtime{unclear}; {tuned}"
    return msgspec.structs.replace(
        evidence,
        ratio=verdict.ratio,
        low=verdict.low,
        high=verdict.high,
        rounds=verdict.rounds,
        timed=sample,
        note=note,
    )


def words(tuned: int, kernels: int) -> str:
    """How many kernels are tuned."""
    return f"{tuned} of its {kernels} kernels are tuned" if tuned else "none of its kernels is tuned"
