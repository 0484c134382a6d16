"""Rotate the residual stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as oir

from burnish.ir.errors import InputError
from burnish.ir.inference import Inference
from burnish.ir.views.attention import Miss
from burnish.ir.views.attention_layer import AttentionLayer, attention_layers
from burnish.ir.views.flow import SKIP_NORMS
from burnish.ir.views.stream import Stream, streams
from burnish.ir.walk import is_op, walk
from burnish.passes import online, turning
from burnish.passes.base import ExactPass, Outcome
from burnish.passes.rotation import ROTATED, flattening, keeping_ones, random_hadamard, random_orthogonal
from burnish.passes.skip_norms import not_splittable, split


@dataclass(frozen=True)
class RotateResidual(ExactPass):
    """Rotate the residual stream, and the values of each head, so that no channel stands out and fewer bits suffice.

    The model computes what it did: the rotation is merged into the weights, in float64 (QuaRot, Ashkboos et al. 2024,
    arXiv:2404.00456; OSTQuant, Hu et al. 2025, arXiv:2501.13987). Gains of norms move into the layers behind them; a
    norm that one operator computes together with the sum before it is taken apart. A model is rotated once.

    Attributes:
        init: `hadamard` takes a random Hadamard matrix; `klt` turns the principal axes of the weights that read the
            stream onto its axes first, which gives all channels of the weights the same energy; `random` takes any
            rotation.
        head: of a head that is tied to the table of tokens. `keep` leaves them tied, and puts a matrix of the width of
            the stream before the head; `untie` gives the head a weight of its own, as large as the table; `refuse`
            leaves such a stream alone.
        matrices: how many norms may be given a matrix of the width of the stream behind them, because their result is
            added to the stream, gain and all: one behind the embedding is such a norm, those of sandwiches are.
        values: also rotate the values of each head of an attention.
        online: also multiply by Hadamard matrices when the model runs, which costs time: what the last layer of each
            MLP reads, and queries and keys behind their rotary embedding.
        seed: of the random matrices.
    """

    init: Literal["hadamard", "klt", "random"] = "hadamard"
    head: Literal["keep", "untie", "refuse"] = "keep"
    matrices: int = 1
    values: bool = True
    online: bool = False
    seed: int = 0
    needs: ClassVar[tuple[str, ...]] = ("inlined",)

    def __post_init__(self) -> None:
        for name in ("matrices", "seed"):
            if getattr(self, name) < 0:
                raise InputError(f"`{name}` is {getattr(self, name)}", place="rotate-residual", hint="give 0 or more")

    def rewrite(self, model: oir.Model, outcome: Outcome) -> None:
        """See the class."""
        if ROTATED in model.metadata_props:
            outcome.skip(
                model.graph[0], f"the model is rotated already: {model.metadata_props[ROTATED]}", matched=False
            )
            return
        fused = next(_fused(model), None) is not None
        refused = self._refused_apart(model) if fused else []
        for node, reason in refused:
            outcome.skip(node, reason)
        if refused:
            return
        if fused:
            for node in _fused(model):
                if not outcome.take(node):
                    return
                split(node)
        number = 0
        while (found := next(islice(streams(model), number, None), None)) is not None:
            number += 1
            if not isinstance(found, Stream):
                outcome.skip(*_missed(found))
            elif refusal := self._refusal(found):
                outcome.skip(*refusal)
            elif not outcome.take(found.readers[0].linear.node):
                return
            else:
                turn = self._turn(turning.covariance(found) if self.init == "klt" else np.eye(found.width))
                turn = keeping_ones(turn) if found.keeps_ones else turn
                turning.rotate(model, found, turn, untie=self.head == "untie")
                model.metadata_props[ROTATED] = f"{self.init}, seed {self.seed}"
        if not number and (first := next(iter(model.graph), None)) is not None:
            outcome.skip(first, "no residual stream of a transformer is found", matched=False)
        if ROTATED in model.metadata_props:
            if self.values:
                self._turn_values(model, outcome)
            if self.online:
                self._turn_online(model, outcome)

    def _refused_apart(self, model: oir.Model) -> list[tuple[oir.Node, str]]:
        """Why no stream can be rotated when sums and the norms behind them are operators of their own; empty where one
        can be, or there is none.
        """
        copy = model.clone()
        for node in _fused(copy):
            split(node)
        found = [_missed(one) if not isinstance(one, Stream) else self._refusal(one) for one in streams(copy)]
        refused = [one for one in found if one is not None]
        return refused if len(refused) == len(found) else []

    def _refusal(self, stream: Stream) -> tuple[oir.Node, str] | None:
        if not stream.readers:
            return next(iter(stream.values)).producer() or stream.writers[0].node, "no linear layer reads the stream"
        if self.head == "refuse" and (tied := next(turning.ties(stream), None)) is not None:
            size = tied[1].parameter.source.const_value
            cost = f"{size.nbytes:,} bytes" if size is not None else "as much as the table"
            return tied[0].linear.node, f"the head is tied to the table of the stream, and untying it costs {cost}"
        if len(stream.sources) > self.matrices:
            count = len(stream.sources)
            return stream.sources[0].nodes[-1], (
                f"the results of {count} norms are added to the stream, gain and all, and a matrix would be needed "
                f"behind each; `matrices` allows {self.matrices}"
            )
        return turning.refusal(stream)

    def _turn(self, covariance: np.ndarray) -> np.ndarray:
        if self.init == "klt":
            return flattening(covariance, self.seed)
        return (random_hadamard if self.init == "hadamard" else random_orthogonal)(len(covariance), self.seed)

    def _turn_values(self, model: oir.Model, outcome: Outcome) -> None:
        layers = [one for one in attention_layers(model) if isinstance(one, AttentionLayer)]
        for layer in layers:
            if reason := turning.value_refusal(layer, layers):
                outcome.skip(layer.anchor, reason)
            elif not outcome.take(layer.anchor):
                return
            else:
                turning.turn_values(model, layer, self._turn)

    def _turn_online(self, model: oir.Model, outcome: Outcome) -> None:
        facts = Inference(model)
        turner = online.Turner(model, facts)
        layers = [one for one in attention_layers(model, facts) if isinstance(one, AttentionLayer)]
        inner = [one for stream in streams(model, facts) if isinstance(stream, Stream)
                 for one in online.inner_layers(stream, layers)]  # fmt: skip
        for layer in layers:
            if reason := online.score_refusal(layer, facts):
                outcome.skip(layer.anchor, reason)
            elif not outcome.take(layer.anchor):
                return
            else:
                turner.turn_scores(layer)
        for one in inner:
            if reason := online.input_refusal(one, facts):
                outcome.skip(one.node, reason)
            elif not outcome.take(one.node):
                return
            else:
                turner.turn_input(one)


def _missed(miss: Miss) -> tuple[oir.Node, str]:
    """What a miss says; of a sum and its norm in one operator, why they were not taken apart."""
    node = miss.anchor
    why = not_splittable(node) if is_op(node, *SKIP_NORMS, domain="com.microsoft") else None
    return node, miss.reason if why is None else f"it adds to the stream and normalizes it at once, and {why}"


def _fused(model: oir.Model) -> Iterator[oir.Node]:
    """The operators that add to a stream and normalize it at once, and can be taken apart, each when those before it
    are: what is known of a sum tells of the next one.
    """
    found = [node for node in walk(model) if is_op(node, *SKIP_NORMS, domain="com.microsoft")]
    return (node for node in found if not_splittable(node) is None)
