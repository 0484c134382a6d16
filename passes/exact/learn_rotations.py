"""Rotate the residual stream, and balance channels, by what is learned on samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_ir as oir

from burnish.ir.errors import InputError
from burnish.passes import learned
from burnish.passes.base import ExactPass, Outcome
from burnish.passes.learned import Learned
from burnish.passes.rotation import ROTATED

_PLACE = "learn-rotations"
_NOTHING = "rotations are learned from samples, and there are none: give some with `--data`"


@dataclass(frozen=True)
class LearnRotations(ExactPass):
    """Rotate the residual stream and balance channels so that few bits lose least on samples; torch learns how.

    The model computes what it did: rotations and scales are merged into the weights, in float64 (OSTQuant, Hu et al.
    2025, arXiv:2501.13987). What is learned is what bears `weights`, `activations` and `cache` of so few bits best,
    judged by scores on samples that nothing is learned from. It is made once, before lossy passes that are named
    behind it. A run that is killed goes on from a checkpoint in the cache folder.

    Attributes:
        steps: how many; 0 only chooses among the beginnings.
        texts: samples of a step.
        starts: random Hadamard matrices that are tried; learning begins with the best.
        angle: by which the rows of a rotation turn in a step at most, in radians.
        scale_rate: how fast the logarithms of scales are learned.
        weights: bits of weights while learning: they move by a third of the way to the nearest numbers of the grid,
            which is about what GPTQ leaves of the error; 0 for all.
        activations: bits of what linear layers read.
        cache: bits of keys and values.
        clip: the share of the range of a token that its grid spans.
        cache_clip: likewise for a head of keys and values.
        hadamard: whether Hadamard matrices will be multiplied with when the model runs, as `simulate-bits` does.
        seed: of the matrices and of the order of the samples.
        device: what learns: `cuda` is some hundred times as fast as a core.
    """

    steps: int = 40
    texts: int = 2
    starts: int = 4
    angle: float = 0.002
    scale_rate: float = 0.005
    weights: int = 4
    activations: int = 4
    cache: int = 4
    clip: float = 0.85
    cache_clip: float = 0.95
    hadamard: bool = True
    seed: int = 0
    device: Literal["cpu", "cuda"] = "cpu"
    needs: ClassVar[tuple[str, ...]] = ("inlined",)

    def __post_init__(self) -> None:
        for name, least in (("steps", 0), ("texts", 1), ("starts", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise InputError(f"`{name}` is {getattr(self, name)}", place=_PLACE, hint=f"give {least} or more")
        for name in ("weights", "activations", "cache"):
            if getattr(self, name) != 0 and not 2 <= getattr(self, name) <= 8:
                raise InputError(f"`{name}` is {getattr(self, name)}", place=_PLACE, hint="give 2 to 8, or 0 for all")
        if not (self.angle > 0 and self.scale_rate > 0 and 0 < self.clip <= 1 and 0 < self.cache_clip <= 1):
            raise InputError(
                "a rate, `clip` or `cache_clip` is not above 0, or one of the latter above 1",
                place=_PLACE,
                hint="see the defaults",
            )

    def rewrite(self, model: oir.Model, outcome: Outcome) -> None:
        """See the class."""
        node = next(iter(model.graph), None)
        if node is None:
            return
        if ROTATED in model.metadata_props:
            outcome.skip(node, f"the model is rotated already: {model.metadata_props[ROTATED]}", matched=False)
            return
        try:
            stream = learned.stream_of(model)
        except InputError as error:
            outcome.skip(node, error.cause)
            return
        if (found := self.learned(model)) is None:
            outcome.skip(node, _NOTHING)
        elif outcome.take(stream.readers[0].linear.node):
            learned.merge(model, found)
            model.metadata_props[ROTATED] = f"learned, seed {self.seed}"

    def learned(self, model: oir.Model) -> Learned | None:
        """What was learned for a model; None where there are no samples, as in the pass itself: a run brings them."""
        return None
