"""A decoder without a cache gets inputs and outputs for the keys and values of past tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as oir

from burnish.ir.errors import InputError
from burnish.passes import catalog, kv_ports, lossy
from burnish.passes.base import Outcome
from burnish.passes.kv_layers import KeyLayers
from burnish.passes.lossy import Context, Edit, LossyPass


@dataclass(frozen=True)
class AddKvCache(LossyPass):
    """Give a decoder without a cache the inputs and outputs of one, so that tokens can be computed one after the other.

    With an empty past the model computes what it did. Masks and counted positions are computed for past and new tokens
    together and cut to the new ones; an input with a mask has to cover the past then, one with positions tells those
    of the new tokens. What the model is given changes, so it is made without `--data`.
    """

    order: ClassVar[int] = -10
    needs: ClassVar[tuple[str, ...]] = ("named", "lifted")
    breaks: ClassVar[tuple[str, ...]] = ("typed",)
    ports: ClassVar[bool] = True

    def propose(self, model: oir.Model, context: Context, outcome: Outcome) -> list[Edit]:
        raise InputError(
            "the samples have no caches", place=f"`{self.pass_name()}`", hint="add them first, without `--data`"
        )

    def asked(self, model: oir.Model, outcome: Outcome) -> list[Edit]:
        found = KeyLayers(model)
        if found.layers and all(one.layer.cache for one in found.layers):
            outcome.skip(found.layers[0].layer.anchor, "it has a cache already", matched=False)
            return []
        reason = kv_ports.obstacle(found)
        if reason is not None:
            raise InputError(reason, place=f"`{self.pass_name()}`")
        copy = model.clone()
        kv_ports.add(KeyLayers(copy))
        site, option = "model", "add caches"
        savings = lossy.saved(model, copy, {})
        anchors = (str(found.layers[0].layer.anchor.name),)
        return [
            Edit(catalog.spec(self), site, option, frozenset({"the inputs of the model"}), savings, anchors=anchors)
        ]

    def apply(self, model: oir.Model, edits: Sequence[Edit], outcome: Outcome) -> None:
        for _ in edits:
            found = KeyLayers(model)
            reason = kv_ports.obstacle(found)
            if reason is not None:
                raise InputError(reason, place=f"`{self.pass_name()}`")
            if outcome.take(found.layers[0].layer.anchor):
                kv_ports.add(found)
