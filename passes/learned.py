"""Rotations and scales that were learned for a model, and merging them into its weights.

Everything is merged in float64 by the same functions that the passes use, so the model computes what it did before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from burnish.ir.errors import InputError
from burnish.ir.inference import Inference
from burnish.ir.views.attention_layer import AttentionLayer, attention_layers
from burnish.ir.views.norm import Norm, norms
from burnish.ir.views.stream import Stream, streams
from burnish.passes import scaling, simulated, turning
from burnish.passes.rotation import flattening, keeping_ones, random_hadamard
from burnish.passes.scaling import Gated


@dataclass
class Learned:
    """Rotations, float64 and orthogonal, and logarithms of scales of a model with one residual stream.

    Attributes:
        turn: of the stream, [width, width].
        values: of the values of each attention, [key heads, value size, value size].
        norm_logs: of each norm that `scaled_norms` gives, [width].
        value_logs: of each attention, [key heads, value size].
        score_logs: of each attention, [key heads, head size], equal within turned pairs; None where none is possible.
        gated_logs: of each gated MLP, [features].
    """

    turn: np.ndarray
    values: list[np.ndarray]
    norm_logs: list[np.ndarray]
    value_logs: list[np.ndarray]
    score_logs: list[np.ndarray | None]
    gated_logs: list[np.ndarray]


def stream_of(model: oir.Model) -> Stream:
    """The only residual stream of a model.

    Raises:
        InputError: there is none that can be rotated, or there are several, or its norms or its ends do not let it be.
    """
    found = list(streams(model))
    if len(found) != 1 or not isinstance(found[0], Stream):
        why = next((one.reason for one in found if not isinstance(one, Stream)), "it has several, or none")
        raise InputError(f"rotations are learned for models with one residual stream: {why}")
    if (reason := turning.refusal(found[0])) is not None:
        raise InputError(f"the residual stream cannot be rotated: {reason[1]}", place=str(reason[0].name))
    if found[0].sources:
        raise InputError("the result of a norm is added to the residual stream, gain and all")
    return found[0]


def attention_of(model: oir.Model) -> list[AttentionLayer]:
    """The attention layers whose values can be rotated."""
    found = [one for one in attention_layers(model) if isinstance(one, AttentionLayer)]
    return [one for one in found if turning.value_refusal(one, found) is None]


def gated_of(model: oir.Model) -> list[Gated]:
    """The gated MLPs."""
    return [one for one in scaling.find_gated(model, Inference(model)) if isinstance(one, Gated)]


def scaled_norms(model: oir.Model) -> list[Norm]:
    """The norms whose gain only layers with few bits read."""
    few = set(simulated.quantized(model))
    readers = ((norm, scaling.norm_readers(norm)) for norm in norms(model))
    return [norm for norm, own in readers if not isinstance(own, str) and all(one.node in few for one in own)]


def initial(model: oir.Model, seed: int, *, flat: bool = False) -> Learned:
    """Where learning begins: random Hadamard matrices, and scales of one.

    Args:
        model: not changed.
        seed: of the matrices.
        flat: the axes of the weights are turned onto these matrices first.
    """
    stream, attention = stream_of(model), attention_of(model)
    turn = flattening(turning.covariance(stream), seed) if flat else random_hadamard(stream.width, seed)
    values = []
    for layer in attention:
        columns = layer.read().output.reshape(-1, layer.kv_heads, layer.heads // layer.kv_heads, layer.value_size)
        rows = columns.transpose(1, 0, 2, 3).reshape(layer.kv_heads, -1, layer.value_size)
        made = [flattening(one.T @ one, seed) if flat else random_hadamard(layer.value_size, seed) for one in rows]
        values.append(np.stack(made))
    return Learned(
        keeping_ones(turn) if stream.keeps_ones else turn,
        values,
        [np.zeros(stream.width) for _ in scaled_norms(model)],
        [np.zeros((one.kv_heads, one.value_size)) for one in attention],
        [
            None if isinstance(scaling.score_pairs(one), str) else np.zeros((one.kv_heads, one.head_size))
            for one in attention
        ],
        [np.zeros(len(one.rows)) for one in gated_of(model)],
    )


def merge(model: oir.Model, found: Learned) -> None:
    """Write rotations and scales into the weights of the model they were learned for, in place."""
    turning.rotate(model, stream_of(model), found.turn, untie=False)
    for layer, turns in zip(attention_of(model), found.values, strict=True):
        own: Iterator[np.ndarray] = iter(turns)
        turning.turn_values(model, layer, lambda _, own=own: next(own))  # type: ignore[misc]
    for layer, logs in zip(attention_of(model), found.value_logs, strict=True):
        scaling.scale_values(model, layer, logs)
    for layer, scores in zip(attention_of(model), found.score_logs, strict=True):
        if scores is not None:
            scaling.scale_scores(model, layer, scores)
    for one, logs in zip(gated_of(model), found.gated_logs, strict=True):
        scaling.scale_gated(model, one, logs)
    for norm, logs in zip(scaled_norms(model), found.norm_logs, strict=True):
        scaling.scale_norm(model, norm, logs)
