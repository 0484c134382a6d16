"""What is asked of whoever learns routers for gates, and what comes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import onnx_ir as oir

from burnish.ir.samples import Sample
from burnish.passes.gates import Padding, Router


@dataclass(frozen=True)
class Gated:
    """A branch that a gate is to let through.

    Attributes:
        result: the name of what the branch adds, [batch, tokens, features].
        stream: the name of what the router reads, likewise.
        features: of the stream.
        padding: which tokens the router does not look at; None where all count.
    """

    result: str
    stream: str
    features: int
    padding: Padding | None


@dataclass(frozen=True)
class Routing:
    """What is wanted.

    Attributes:
        places: what is gated.
        share: of all gates of all rows that are to be closed, 0 to 1.
        rounds: of measuring.
        steps: of training.
        rate: the learning rate.
        seed: of the split and the order of the samples.
    """

    places: Sequence[Gated]
    share: float
    rounds: int
    steps: int
    rate: float
    seed: int


@dataclass(frozen=True)
class Routed:
    """What was learned.

    Attributes:
        routers: one for each place.
        closed: for each place the share of the samples' rows for which it is closed, while the others are routed.
        how: which routers were nearest to the original on held-out rows: `measured`, `trained`, or `the same for all
            rows`.
        distances: how far each kind was, by its name.
        alone: for each place how far the samples' outputs move on average when it alone is closed for all rows.
    """

    routers: tuple[Router, ...]
    closed: tuple[float, ...]
    how: str
    distances: Mapping[str, float]
    alone: tuple[float, ...]


class Routes(Protocol):
    """Learns routers."""

    def __call__(self, model: oir.Model, wanted: Routing, samples: Sequence[Sample]) -> Routed:
        """See `burnish.backends.fx.routing.route`."""
        ...
