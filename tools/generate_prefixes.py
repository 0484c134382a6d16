"""What `burnish generate --requests` holds of prompts to use it again: which rule, and what tokens cost."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from burnish.ir.errors import InputError
from burnish.tools import terminal

if TYPE_CHECKING:
    from burnish.backends.decoding.decoder import Decoder
    from burnish.backends.decoding.radix import Tokens, Work
    from burnish.backends.decoding.sharing import Schedule, Sharing

EVICTIONS = ("lru", "flops", "auto")
_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_LENGTHS = (64, 192)
"""Texts whose operations are counted."""


class Bytes(click.ParamType):  # type: ignore[type-arg]
    """A number of bytes: 500000, 300MB, 2GB, 1.5GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> int:
        """The number."""
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", str(value).strip().lower())
        if found is None or found[2] not in _UNITS:
            self.fail(f"`{value}` is no number of bytes, such as 500MB or 2GB", param, context)
        return int(float(found[1]) * _UNITS[found[2]])


def planner(
    decoder: Decoder, model: Path, size: int, memory: int, eviction: str | None
) -> Callable[[Sequence[Tokens]], Schedule] | None:
    """What says in which batches prompts are computed, and what is held meanwhile; None where nothing is to be held.

    It raises InputError where the model cannot compute a beginning alone.

    Args:
        decoder: what computes.
        model: its file.
        size: rows of a batch at most.
        memory: bytes for what is held.
        eviction: how leaves are chosen that have to go; None groups the prompts by what they have in common.
    """
    from burnish.backends.decoding import sharing
    from burnish.backends.decoding.radix import Work

    def in_order(prompts: Sequence[Tokens]) -> Schedule:
        alphas = sharing.ALPHAS[1:] if eviction == "flops" else sharing.ALPHAS
        found = sharing.in_order(decoder, prompts, size, memory, alphas[:1], Work())
        if eviction == "lru" or not found.predicted.evicted:
            return found
        return sharing.in_order(decoder, prompts, size, memory, alphas, model_work(decoder, model))

    if not memory:
        return None
    if eviction is None:
        return lambda prompts: sharing.grouped(decoder, prompts, size, memory)
    return in_order


def model_work(decoder: Decoder, model: Path) -> Work:
    """Multiply-adds of a text of n tokens, from the graph: of layers n times as many, of attention n * n.

    Raises:
        InputError: the model cannot be read.
    """
    import numpy as np
    import onnx_ir as oir

    from burnish.backends.decoding import feeding
    from burnish.backends.decoding.radix import Work
    from burnish.frontends import onnx_file
    from burnish.ir import cost
    from burnish.ir.concrete import concrete

    read = onnx_file.read(model)
    assert isinstance(read, oir.Model)
    counted = []
    for length in _LENGTHS:
        feeds = feeding.inputs(decoder.ports, np.zeros((1, length), np.int64), np.zeros(1, np.int64), 0)
        feeds |= {port.past: np.zeros(port.sizes(1, 0), port.dtype) for port in decoder.ports.caches}
        dims = cost.dims_of(read, feeds)
        counted.append((cost.model_cost(concrete(read, dims), dims).at_least.macs or 0) / length)
    square = max(0.0, (counted[1] - counted[0]) / (_LENGTHS[1] - _LENGTHS[0]))
    linear = counted[0] - square * _LENGTHS[0]
    return Work(linear, square) if linear > 0 else Work()


def check(memory: int, eviction: str | None, requests: str | None) -> None:
    """Refuse options that would do nothing.

    Raises:
        InputError: with the option.
    """
    if eviction is not None and not memory:
        hint = "give it bytes with `--prefix-memory`, such as 2GB"
        raise InputError("`--prefix-eviction` is for what `--prefix-memory` holds", hint=hint)
    if memory and requests is None:
        raise InputError("`--prefix-memory` is for `--requests`", hint="leave it out: a single prompt shares nothing")


def figures(sharing: Sharing, planned: Schedule) -> dict[str, Any]:
    """What was done with the prompts, as numbers."""
    counts = sharing.counts
    found = {"prompt_tokens": counts.prompts, "computed": counts.computed, "predicted": planned.predicted.computed}
    found |= {"most_bytes": counts.most, "bytes_at_end": sharing.tree.bytes, "evicted": counts.evicted}
    return found | ({} if planned.alpha is None else {"alpha": planned.alpha})


def said(found: dict[str, Any]) -> str:
    """The same in words."""
    computed, tokens = found["computed"], found["prompt_tokens"]
    predicted = "as predicted" if found["predicted"] == computed else f"{found['predicted']} were predicted"
    share = f", {100 * (1 - computed / tokens):.0f} % saved" if tokens else ""
    alpha = f", alpha {found['alpha']:g}" if found.get("alpha") else ""
    return (
        f"prefix  {computed} of {terminal.count(tokens, 'token')} computed, {predicted}{share}; "
        f"{found['most_bytes'] / 1e6:.2f} MB at most, {terminal.count(found['evicted'], 'token')} dropped{alpha}"
    )
