"""Which layers read the keys and values of which: KVSharer's search, and pairs chosen by what the outputs lose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np
import onnx_ir as oir

from burnish.ir.errors import InputError
from burnish.ir.samples import Sample
from burnish.ir.views.embedding import Head, heads
from burnish.passes import measure_choice
from burnish.passes.kv_layers import KeyLayers
from burnish.passes.kv_sharing import roots, share
from burnish.passes.lossy import Context
from burnish.passes.rerun import Rerun
from burnish.passes.scoring import MEMORY
from burnish.passes.sites import Keep

Order = Literal["loss", "dissimilar", "similar", "random"]
Pairs = dict[int, int]


@dataclass(frozen=True)
class Search:
    """How pairs of a taker and a donor are looked for.

    Attributes:
        order: `dissimilar`, `similar` and `random` are the order in which KVSharer (arXiv:2410.18517) tries pairs;
            `loss` takes the pairs whose outputs differ least.
        context: samples and what runs models.
        threshold: KVSharer takes a pair when the cosine of the last hidden states is above it.
        tries: how many pairs are measured anew for each layer, together with those chosen before, by `loss`.
        seed: of `random`.
    """

    order: Order
    context: Context
    threshold: float
    tries: int
    seed: int

    def choose(self, model: oir.Model, found: KeyLayers, pairs: Sequence[tuple[int, int]], count: int) -> Pairs:
        """`count` pairs in the order in which they were chosen; no donor is a taker.

        Args:
            model: in normal form; not changed.
            found: its layers.
            pairs: those that can share.
            count: how many layers lose their keys and values.

        Raises:
            InputError: fewer can share, or what is compared cannot be seen.
        """
        nothing: Pairs = {}
        plan = [nothing, *islice(self.plans(model, found, pairs), count)][-1]
        if len(plan) < count:
            hint = "ask for fewer" + ("" if self.order == "loss" else ", or lower `threshold`")
            raise InputError(f"{count} layers cannot share, {len(plan)} can", hint=hint)
        return plan

    def plans(self, model: oir.Model, found: KeyLayers, pairs: Sequence[tuple[int, int]]) -> Iterator[Pairs]:
        """What is chosen for one layer, for two, and so on up to all that can; arguments as for `choose`."""
        return self._by_loss(model, pairs) if self.order == "loss" else self._tried(model, found, pairs)

    def _tried(self, model: oir.Model, found: KeyLayers, pairs: Sequence[tuple[int, int]]) -> Iterator[Pairs]:
        """KVSharer's search: in a fixed order, each pair that keeps the last hidden states alike."""
        if self.order == "random":
            ranks = np.random.default_rng(self.seed).permutation(len(pairs))
        else:
            far = distances(model, found, pairs, self.context)
            ranks = np.argsort(-far if self.order == "dissimilar" else far, kind="stable")
        chosen: Pairs = {}
        with _Judge(_until_head(model), self.context) as judge:
            for taker, donor in (pairs[rank] for rank in ranks):
                if taker in chosen:
                    continue
                tried = roots({**chosen, taker: donor})
                if judge.cosine(tried) > self.threshold:
                    chosen = tried
                    yield chosen

    def _by_loss(self, model: oir.Model, pairs: Sequence[tuple[int, int]]) -> Iterator[Pairs]:
        """Greedily: of the pairs that do least alone, the one that does least together with those chosen before."""
        with _Judge(model, self.context) as judge:
            alone = {pair: judge.divergence({pair[0]: pair[1]}) for pair in pairs}
            order = sorted((pair for pair in pairs if np.isfinite(alone[pair])), key=lambda pair: (alone[pair], pair))
            chosen: Pairs = {}
            while left := [pair for pair in order if pair[0] not in chosen]:
                plans = [roots({**chosen, taker: donor}) for taker, donor in left[: self.tries if chosen else 1]]
                losses = [judge.divergence(plan) for plan in plans] if chosen else [0.0]
                chosen = plans[int(np.argmin(losses))]
                yield chosen


def distances(model: oir.Model, found: KeyLayers, pairs: Sequence[tuple[int, int]], context: Context) -> np.ndarray:
    """How far the keys and values of two layers are apart: ½ (mean ‖K_i - K_j‖ + mean ‖V_i - V_j‖), [pairs].

    The norm is that over the elements of a head; keys and values of the samples' own tokens are averaged over all rows
    that have the position, rows of padding left out, whatever their lengths are.

    Raises:
        InputError: it cannot be told which rows are padding, or keys are laid out in an unknown way.
    """
    wanted = sorted({layer for pair in pairs for layer in pair})
    if not wanted:
        return np.zeros(0)
    layers = {layer: found.layers[layer].layer for layer in wanted}
    kept = {(layer, at): one.kept[1 + at] for layer, one in layers.items() for at in (0, 1)}
    rows = layers[wanted[0]].memory
    assert rows is not None
    names = {key: str(one.value.name) for key, one in kept.items() if one.value is not None}
    copy = model.clone()
    made = {str(out.name): out for node in copy.graph for out in node.outputs}
    new = (made[name] for name in [*names.values(), str(rows.name)] if name in made)
    copy.graph.outputs.extend(value for value in new if not value.is_graph_output())
    keep = context.keeps(model, {str(rows.name): (rows, -1)})[str(rows.name)]
    means = {key: _Mean() for key in names}
    runner = context.execute(copy)
    try:
        for sample in context.samples:
            outputs = {**sample.feeds, **runner.run(sample.feeds)}
            counted = np.broadcast_to(_counted(keep, sample, outputs[str(rows.name)]), outputs[str(rows.name)].shape)
            for key, name in names.items():
                array = _by_position(outputs[name], kept[key].axes, layers[key[0]].kv_heads)
                means[key].add(array[:, -counted.shape[1] :], counted[..., :1, None])
    finally:
        runner.close()
    return np.array([np.mean([_apart(means[i, at], means[j, at]) for at in (0, 1)]) for i, j in pairs])


def _by_position(array: np.ndarray, axes: Sequence[str], count: int) -> np.ndarray:
    """Keys or values as [batch, positions, heads, size]."""
    letters, sizes = "", []
    for size, axis in zip(array.shape, axes, strict=True):
        letters += axis or "."
        sizes += [count, size // count] if len(axis) == 2 else [size]
    plain = letters.translate(str.maketrans("uew", "tdb"))
    plain = plain if "h" in plain else f"{plain}h"
    sizes += [1] * (len(plain) - len(sizes))
    if sorted(plain.replace(".", "")) != sorted("bthd") or len(plain) != len(sizes):
        raise InputError("keys are laid out in a way in which they are not compared", hint="take `search=loss`")
    order = [place for place, letter in enumerate(plain) if letter == "."] + [plain.index(one) for one in "bthd"]
    found = array.reshape(sizes).transpose(order)
    return found.reshape(found.shape[-4:]).astype(np.float64)


def _counted(keep: Keep | str | None, sample: Sample, array: np.ndarray) -> np.ndarray:
    """What of an array is no padding, as booleans that broadcast to it."""
    if isinstance(keep, str):
        raise InputError(f"it cannot be told which rows are padding: {keep}", hint="take `search=loss`")
    return np.ones((1,) * array.ndim, bool) if keep is None else keep.of(sample.feeds, array)


class _Mean:
    """The mean of rows of different lengths, position by position."""

    def __init__(self) -> None:
        self.total: np.ndarray = np.zeros((0, 1, 1))
        self.count: np.ndarray = np.zeros((0, 1, 1))

    def add(self, array: np.ndarray, counted: np.ndarray) -> None:
        total, count = np.where(counted, array, 0).sum(0), counted.sum(0).astype(np.float64)
        self.total, self.count = _sum(self.total, total), _sum(self.count, count)

    def mean(self) -> np.ndarray:
        return np.asarray(self.total / np.maximum(self.count, 1))


def _sum(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    longer, shorter = (one, other) if len(one) > len(other) else (other, one)
    found = longer.copy()
    if len(shorter):
        found[: len(shorter)] += shorter
    return found


def _apart(one: _Mean, other: _Mean) -> float:
    return float(np.linalg.norm(one.mean() - other.mean(), axis=-1).mean())


def _until_head(model: oir.Model) -> oir.Model:
    """A copy whose only output is what the head reads: the last hidden state, behind the last norm.

    Raises:
        InputError: no output of the model is a linear layer's.
    """
    head = next((one for one in heads(model) if isinstance(one, Head)), None)
    if head is None:
        raise InputError("the model has no head, before which its last hidden state is", hint="take `search=loss`")
    copy = model.clone()
    named = {str(out.name): out for node in copy.graph for out in node.outputs}
    states = [value for value in copy.graph.outputs if value.name != head.output.name]
    copy.graph.outputs.clear()
    copy.graph.outputs.extend([named[str(head.linear.input.name)], *states])
    return copy


class _Judge:
    """Runs a model with pairs of layers that share, only what they change, and compares its outputs."""

    def __init__(self, model: oir.Model, context: Context) -> None:
        self.model, self.context = model, context
        self._rerun = Rerun(model, context.samples, context.execute, MEMORY)
        self._measure: measure_choice.Chosen | None = None

    def __enter__(self) -> _Judge:
        self._rerun.prepare()
        return self

    def __exit__(self, *error: object) -> None:
        self._rerun.close()

    def cosine(self, pairs: Mapping[int, int]) -> float:
        """The mean over samples of the cosine of the last hidden states, all tokens as one vector."""
        name = str(self.model.graph.outputs[0].name)
        keep = self.context.keeps(self.model, {name: (self.model.graph.outputs[0], -1)})[name]
        found = []
        for number, outputs in self._runs(pairs):
            sample, before = self.context.samples[number], self._rerun.original(number)[name]
            counted = _counted(keep, sample, before)
            one, other = (np.where(counted, x, 0).astype(np.float64).reshape(-1) for x in (before, outputs[name]))
            found.append(float(one @ other) / max(float(np.linalg.norm(one) * np.linalg.norm(other)), 1e-30))
        return float(np.mean(found))

    def divergence(self, pairs: Mapping[int, int]) -> float:
        """What the outputs lose: `divergence` of the original's; infinite where they are not finite."""
        if self._measure is None:
            self._measure = measure_choice.measure(
                "divergence", self.model, self.context.samples, keeps=self.context.keeps
            )
        measure = self._measure.measure
        parts = []
        for number, outputs in self._runs(pairs):
            parts.append(measure.partial(outputs, self._rerun.original(number), self.context.samples[number]))
        value = measure.value(parts)
        return value if np.isfinite(value) else float("inf")

    def _runs(self, pairs: Mapping[int, int]) -> Iterator[tuple[int, Mapping[str, np.ndarray]]]:
        copy = self.model.clone()
        share(copy, KeyLayers(copy), pairs, renumber=False)
        with self._rerun.running(self._rerun.route(copy)) as run:
            for number in range(len(self.context.samples)):
                yield number, run(number)
