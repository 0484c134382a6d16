"""Let attention layers read the keys and values of an earlier one; inputs and outputs that they need no more go."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Literal

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, match
from burnish.ir.errors import InputError
from burnish.ir.views import projection
from burnish.passes import kv_operators, lossy
from burnish.passes.depth_blocks import BLOCKS, States
from burnish.passes.depth_ledger import Ledger
from burnish.passes.kv_layers import KeyLayer, KeyLayers
from burnish.passes.lossy import Savings

SHARED = "burnish.keys"
"""Key of the model's metadata: a JSON object that gives, for each block without keys and values of its own, the block
whose it reads, both by the numbers that they had in the original model, from 0."""


def roots(pairs: Mapping[int, int]) -> dict[int, int]:
    """Pairs of a taker and a donor, in which a donor that takes itself is replaced by the one it takes from.

    Raises:
        InputError: layers take from each other in a circle.
    """
    found = {}
    for taker, donor in pairs.items():
        seen = {taker}
        while donor in pairs and pairs[donor] != donor:
            if donor in seen:
                raise InputError(f"layer {donor} would read its own keys and values through others")
            seen.add(donor)
            donor = pairs[donor]
        if taker != donor:
            found[taker] = donor
    return found


Average = Literal["none", "uniform", "sequential"]


def averaged(found: KeyLayers, pairs: Mapping[int, int], how: Average) -> None:
    """Let layers whose keys and values others will read make the averages of these and their own.

    Args:
        found: the layers of a model, whose weights are changed in place.
        pairs: taker and donor, by number; no donor is a taker.
        how: `uniform` is the mean, as for LCKV (arXiv:2405.10637); `sequential` the mean of each layer and what those
            before it came to, as for MLKV (arXiv:2406.09297), so that the last counts one half.

    Raises:
        InputError: the weights of a layer cannot be changed, or only some of the layers have biases.
    """
    for donor in dict.fromkeys(pairs.values()) if how != "none" else ():
        group = [found.layers[donor], *(found.layers[taker] for taker in sorted(pairs) if pairs[taker] == donor)]
        shares = np.full(len(group), 1 / len(group))
        if how == "sequential":
            shares = 0.5 ** np.array([len(group) - 1, *range(len(group) - 1, 0, -1)])
        changes = []
        for part in (1, 2):
            own = [one.layer.projections[part] for one in group]
            known = [one for one in own if one is not None]
            reason = next((one.read_only for one in known if one.read_only is not None), None)
            biases = [bias for one in known if (bias := one.bias()) is not None]
            if reason is None and 0 < len(biases) < len(group):
                reason = "only some of the layers have biases"
            if reason is not None:
                raise InputError(f"its keys and values cannot become an average: {reason}", place=f"layer {donor}")
            weight = np.tensordot(shares, [one.weight() for one in known], 1)
            changes.append((known[0], weight, np.tensordot(shares, biases, 1) if biases else None))
        projection.write(found.model, changes)


def share(model: oir.Model, found: KeyLayers, pairs: Mapping[int, int], *, renumber: bool = True) -> None:
    """Let layers read the keys and values of others; the names of the caches that stay are numbered anew.

    What a layer alone needed to make its own goes: projections, rotary embedding, norm and concatenation of keys and
    values, and the inputs and outputs of the model that were its cache. Where the size of such a cache is read
    elsewhere, it is read from that of the other layer.

    Args:
        model: changed in place.
        found: its layers; out of date afterwards.
        pairs: taker and donor, by number; no donor is a taker, and `found.obstacle` has a reason for no pair.
        renumber: close the gaps in the names of the caches.
    """
    states, layers = States(model, found.structure), found.layers
    for taker, donor in pairs.items():
        _release(model, layers[taker], layers[donor])
    for taker, donor in pairs.items():
        _read(model, layers[taker], layers[donor])
    for taker in pairs:
        for value in layers[taker].layer.cache.past:
            model.graph.inputs.remove(value)
    _sort(model)
    gone = [layers[taker].block for taker in pairs if layers[taker].ports]
    if gone:
        kept = [block for block in found.structure.blocks if block not in gone]
        if renumber:
            states.renumber(kept)
        states.note(found.structure.blocks, kept)
    _note(model, {layers[taker].block.index: layers[donor].block.index for taker, donor in pairs.items()})


def savings(model: oir.Model, found: KeyLayers, taker: int, donor: int, ledger: Ledger) -> Savings:
    """What goes with the keys and values of a layer.

    Args:
        model: the model; not changed.
        found: its layers.
        taker, donor: a pair that can share.
        ledger: of the model.
    """
    one = found.layers[taker]
    if not one.keys.inside and not kv_operators.shares_matrix(one.layer):
        return ledger.without(_only(model, one))
    copy = model.clone()
    share(copy, KeyLayers(copy), {taker: donor})
    return lossy.saved(model, copy, ledger.dims)


def _only(model: oir.Model, one: KeyLayer) -> list[oir.Node]:
    """The nodes that nothing but the keys and values of a layer, and its cache, needs."""
    kept, ports = {one.keys.value, one.values.value}, set(one.layer.cache.present)
    gone: dict[oir.Node, None] = {}
    for node in reversed(model.graph):
        given = [out for out in node.outputs if out.is_graph_output() and out not in ports]
        used = [user for out in node.outputs if out not in kept for user in match.consumers(out)]
        made = any(out in kept or out in ports for out in node.outputs)
        unused = all(user in gone or user.op_type == "Shape" and made for user in used)
        if not given and (made or used) and unused:
            gone[node] = None
    return list(gone)


def _release(model: oir.Model, taker: KeyLayer, donor: KeyLayer) -> None:
    """Let what reads the sizes of a cache read those of the other layer, and take its outputs off the model."""
    for (_, mine), (_, theirs) in zip(taker.ports, donor.ports, strict=True):
        if mine.past is not None and theirs.past is not None:
            for node in match.consumers(mine.past):
                if node.op_type == "Shape":
                    node.replace_input_with(0, theirs.past)
        if mine.present is not None and theirs.present is not None:
            for node in match.consumers(mine.present):
                if node.op_type == "Shape":
                    node.replace_input_with(0, theirs.present)
    for value in taker.layer.cache.present:
        if value.is_graph_output():
            model.graph.outputs.remove(value)
        edit.remove_unused([node for node in (value.producer(),) if node is not None])


def _read(model: oir.Model, taker: KeyLayer, donor: KeyLayer) -> None:
    keys, values = donor.keys.value, donor.values.value
    assert keys is not None and values is not None
    if kv_operators.shares_matrix(taker.layer):
        kv_operators.narrowed(model, taker.layer)
    if taker.keys.inside:
        kv_operators.read(model, taker.layer, keys, values)
        return
    for old, new in ((taker.keys.value, keys), (taker.values.value, values)):
        assert old is not None
        old.replace_all_uses_with(new)
        edit.remove_unused([node for node in (old.producer(),) if node is not None])


def _sort(model: oir.Model) -> None:
    """Put the nodes in order, where one reads keys that an exporter made later."""
    order = {node: index for index, node in enumerate(model.graph)}
    for node, index in order.items():
        made = (value.producer() for value in node.inputs if value is not None)
        if any(order.get(one, -1) > index for one in made if one is not None):
            model.graph.sort()
            return


def _note(model: oir.Model, pairs: Mapping[int, int]) -> None:
    blocks = json.loads(model.metadata_props.get(BLOCKS, "null"))
    known: dict[str, int] = json.loads(model.metadata_props.get(SHARED, "{}"))
    for taker, donor in pairs.items():
        old, new = (blocks[taker], blocks[donor]) if blocks else (taker, donor)
        known = {key: new if value == old else value for key, value in known.items()} | {str(old): new}
    ordered = {key: known[key] for key in sorted(known, key=int)}
    model.metadata_props[SHARED] = json.dumps(ordered, separators=(",", ":"))
