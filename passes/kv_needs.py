"""How many keys each layer of a decoder needs, by what its last queries look at or by what its result loses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_ir as oir
from numpy.typing import NDArray

from burnish.ir.errors import InputError
from burnish.passes.kv_budget import Queries
from burnish.passes.kv_cuts import Cuts
from burnish.passes.kv_layers import KeyLayers
from burnish.passes.lossy import Context
from burnish.passes.sites import Keep

Array = NDArray[Any]
By = Literal["mass", "cosine"]


@dataclass(frozen=True)
class Seen:
    """What the last queries of one text see in one cache.

    Attributes:
        odds: the attention of each, [heads of keys, queries of all layers and heads, last tokens, tokens].
        values: [heads of values, tokens, size].
    """

    odds: Array
    values: Array

    @property
    def prefix(self) -> int:
        """Tokens before those whose queries look."""
        return int(self.odds.shape[3] - self.odds.shape[2])

    def spread(self, share: float) -> float:
        """The least part of the keys before the window that gets `share` of the attention to these, mean over heads.

        LMBA of ZigZagKV (arXiv:2412.09036). The window, which is kept in any case, does not count: of attention that is
        filled up for it, it would be measured, and not the layer.
        """
        sums = self.odds[..., : self.prefix].sum(2)
        ranked = -np.sort(-sums, -1)
        reached = np.cumsum(ranked, -1) >= share * ranked.sum(-1, keepdims=True)
        return float((reached.argmax(-1) + 1).mean() / self.prefix)

    def enough(self, share: float, pool: int) -> float:
        """The least part of the keys before the window with which the attention's result keeps a cosine of `share`.

        LMBO of ZigZagKV. Keys are kept in the order in which the budget keeps them.
        """
        order = np.argsort(-pooled(self.odds[..., : self.prefix].sum((1, 2)), pool), -1, kind="stable")
        whole = self.odds @ self.values[:, None]
        few, many = 0, self.prefix
        while few < many:
            count = (few + many) // 2
            if self._cosine(whole, order[:, :count]) >= share:
                many = count
            else:
                few = count + 1
        return max(many, 1) / self.prefix

    def _cosine(self, whole: Array, chosen: Array) -> float:
        open_ = np.zeros((len(self.values), self.odds.shape[3]), bool)
        open_[:, self.prefix :] = True
        np.put_along_axis(open_, chosen, True, 1)
        part = np.where(open_[:, None, None], self.odds, 0)
        part = (part / np.maximum(part.sum(-1, keepdims=True), 1e-30)) @ self.values[:, None]
        one, other = (np.moveaxis(x, 2, 0).reshape(x.shape[2], -1) for x in (whole, part))
        norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
        return float(((one * other).sum(1) / np.maximum(norms, 1e-30)).mean())


def pooled(weights: Array, width: int) -> Array:
    """The mean of so many neighbours along the last axis; beyond the ends there are zeros."""
    half = width // 2
    padded = np.pad(weights, [(0, 0)] * (weights.ndim - 1) + [(half, half)])
    found: Array = np.lib.stride_tricks.sliding_window_view(padded, width, axis=-1).mean(-1)
    return found


def attention(queries: Array, keys: Array, scale: float, softcap: float) -> Array:
    """What the last queries see.

    Args:
        queries: [heads, last tokens, size].
        keys: [heads of keys, tokens, size].
        scale, softcap: see `Queries`.

    Returns:
        [heads of keys, queries of each, last tokens, tokens].
    """
    last, total = queries.shape[1], keys.shape[1]
    grouped = queries.reshape(len(keys), -1, last, queries.shape[2])
    scores = scale * (grouped @ keys.transpose(0, 2, 1)[:, None])
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    later = np.arange(total) > (total - last + np.arange(last))[:, None]
    scores = np.where(later, -np.inf, scores)
    odds = np.exp(scores - scores.max(-1, keepdims=True))
    found: Array = odds / odds.sum(-1, keepdims=True)
    return found


def needs(
    model: oir.Model, chosen: Sequence[int], context: Context, *, by: By, share: float, window: int, pool: int
) -> Array:
    """What each cache needs, as a part of the tokens before the window; mean over all texts, [caches].

    Args:
        model: the decoder in normal form; not changed.
        chosen: the layers with the caches, by number.
        context: samples and what runs models.
        by: what is measured.
        share: of the attention, or the cosine.
        window: last tokens whose queries look.
        pool: neighbours that weights are averaged over.

    Raises:
        InputError: no text is longer than the window, or padding cannot be told.
    """
    found = []
    for row in _rows(model, chosen, context, window):
        found.append([one.spread(share) if by == "mass" else one.enough(share, pool) for one in row])
    if not found:
        raise InputError(
            f"no sample has a text of more than {window} tokens that ends without padding",
            hint="give longer texts with `--data`, or a smaller `window`",
        )
    mean: Array = np.mean(found, 0)
    return mean


def _rows(model: oir.Model, chosen: Sequence[int], context: Context, window: int) -> Iterator[list[Seen]]:
    """What is seen in each cache, for each text that is long enough."""
    rows = KeyLayers(model).layers[0].layer.source
    name, copy = str(rows.name), model.clone()
    cuts = Cuts(KeyLayers(copy))
    groups = [group for group in cuts.groups if group.owner.index in chosen]
    source = next(one.layer.source for group in cuts.groups for one in group.readers if one.index == 0)
    hidden, queries = cuts.apply(groups, window)
    if not source.is_graph_output():
        copy.graph.outputs.append(source)
    keep = context.keeps(model, {name: (rows, -1)})[name]
    if isinstance(keep, str):
        raise InputError(f"it cannot be told which tokens are padding: {keep}", hint="give texts without padding")
    presents = [[str(value.name) for value in group.present] for group in groups]
    runner = context.execute(copy)
    try:
        for sample in context.samples:
            batch = len(next(iter(sample.feeds.values())))
            outputs = runner.run({**sample.feeds, hidden: np.zeros((len(groups), batch), np.int64)})
            for row, tokens in _texts(keep, sample.feeds, outputs[name], outputs[presents[0][0]].shape[2]):
                if tokens.sum() > window and tokens[-window:].all():
                    yield [
                        _seen(outputs, names, seen, row, tokens) for names, seen in zip(presents, queries, strict=True)
                    ]
    finally:
        runner.close()


def _texts(keep: Keep | None, feeds: Any, array: Array, total: int) -> Iterator[tuple[int, Array]]:
    """Each row, and which of its past and new tokens count, [tokens]."""
    counted = np.ones(array.shape[:2], bool)
    if keep is not None:
        counted = np.broadcast_to(keep.of(feeds, array), array.shape)[..., 0]
    for row, new in enumerate(counted):
        yield row, np.concatenate([np.ones(total - len(new), bool), new])


def _seen(outputs: Any, names: Sequence[str], queries: Sequence[Queries], row: int, tokens: Array) -> Seen:
    keys, values = (outputs[name][row][:, tokens].astype(np.float64) for name in names)
    odds = [attention(outputs[one.name][row].astype(np.float64), keys, one.scale, one.softcap) for one in queries]
    return Seen(np.concatenate(odds, 1), values)
