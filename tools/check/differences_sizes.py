"""Differences of counts, views, fired passes, metric and latency as sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from burnish.tools.check.difference import Difference, Field, Verdict
from burnish.tools.check.lock import Lock, MetricLock
from burnish.tools.check.tolerances import Tolerances

_SHOWN = 6
_LEAST = 0.01
_STORED = (Field.PARAMETERS, Field.BYTES)
_WORDS = {
    Field.NODES: "nodes",
    Field.PARAMETERS: "parameters",
    Field.BYTES: "bytes of constants",
    Field.MULTIPLY_ADDS: "multiply-adds",
    Field.PEAK_ACTIVATION: "bytes of activations at the peak",
}


def sizes(old: Lock, new: Lock, tolerances: Tolerances, *, explained: bool, respelled: bool) -> Iterator[Difference]:
    """The counts that differ.

    Args:
        old, new: the locks.
        tolerances: what may differ.
        explained: whether a difference of structure is the cause; then counts are notes unless a tolerance names them.
        respelled: whether the same computation is written otherwise, which is a cause of all but more constants.
    """
    for field, was, now in _counts(old, new):
        if was is None or now is None:
            if was != now:
                known = "is not known any more" if now is None else "is known now"
                message = f"the number of {_WORDS[field]} {known}"
                yield Difference(field, Verdict.NOTE, message, "", _number(was), _number(now), ("sizes", field.value))
            continue
        if was == now:
            continue
        verdict = tolerances.grows(field, was, now) if now > was else Verdict.NOTE
        cause = explained or (respelled and field not in _STORED)
        if cause and verdict is Verdict.REGRESSION and not tolerances.is_given(field):
            verdict = Verdict.NOTE
        word = "more" if now > was else "fewer"
        share = 100 * abs(now / was - 1) if was else 0.0
        change = f", {share:.3g} % {word}" if share > _LEAST else f", {abs(now - was):,} {word}"
        message = f"{now:,} {_WORDS[field]}{change}, was {was:,}"
        if old.structure == new.structure and field in _STORED:
            message += f": equal constants are stored {'more' if now > was else 'less'} often"
        yield Difference(field, verdict, message, "", str(was), str(now), ("sizes", field.value))
    if old.sizes.at != new.sizes.at and old.sizes.multiply_adds != new.sizes.multiply_adds:
        message = "multiply-adds and peak are counted for other numbers of the dynamic dimensions than before"
        yield Difference(Field.MULTIPLY_ADDS, Verdict.NOTE, message, key=("sizes", "at"))


def _counts(old: Lock, new: Lock) -> Iterator[tuple[Field, int | None, int | None]]:
    one, other = old.sizes, new.sizes
    yield Field.NODES, one.nodes, other.nodes
    yield Field.PARAMETERS, one.parameters, other.parameters
    yield Field.BYTES, sum(one.bytes.values()), sum(other.bytes.values())
    yield Field.MULTIPLY_ADDS, one.multiply_adds, other.multiply_adds
    yield Field.PEAK_ACTIVATION, one.peak_activation, other.peak_activation


def tallies(old: Lock, new: Lock, tolerances: Tolerances, *, explained: bool) -> Iterator[Difference]:
    """Nodes by operator, views and fired passes, one sentence each; notes unless a tolerance names them."""
    for field, was, now, head in (
        (Field.OPERATORS, old.operators, new.operators, "nodes by operator"),
        (Field.VIEWS, old.views, new.views, "recognised parts"),
        (Field.PASSES, old.passes, new.passes, "rewrites by the default recipe"),
    ):
        if was == now:
            continue
        verdict = tolerances.verdict(field)
        alone = field is not Field.PASSES and not explained and old.structure != new.structure
        if verdict is Verdict.REGRESSION and not (alone or tolerances.is_given(field)):
            verdict = Verdict.NOTE
        yield Difference(field, verdict, f"{head}: {_tally(was, now)}", key=(field.value,))


def _tally(old: Mapping[str, int], new: Mapping[str, int]) -> str:
    """`Add 31 (+12), LayerNormalization 0 (-13)`, the largest changes first."""
    changed = {name: new.get(name, 0) - old.get(name, 0) for name in old.keys() | new.keys()}
    names = sorted((name for name, by in changed.items() if by), key=lambda name: (-abs(changed[name]), name))
    shown = [f"{name} {new.get(name, 0):,} ({changed[name]:+,})" for name in names[:_SHOWN]]
    return ", ".join(shown) + (f" and {len(names) - _SHOWN} others" if len(names) > _SHOWN else "")


def metric(old: Lock, new: Lock, tolerances: Tolerances) -> Iterator[Difference]:
    """The metric got worse, better, or cannot be compared."""
    was, now = old.metric, new.metric
    if was is None or now is None:
        if was is not None:
            yield _not_measured(Field.METRIC, f"the metric `{was.name}` was not measured now", "metric")
        return
    if was.name != now.name or was.higher_is_better != now.higher_is_better:
        yield _not_measured(Field.METRIC, f"the metric is `{now.name}` now, was `{was.name}`: not compared", "metric")
        return
    drop = _drop(was, now)
    if drop:
        verdict = tolerances.drops(drop, was.value) if drop > 0 else Verdict.NOTE
        word = "worse" if drop > 0 else "better"
        message = f"{now.name} is {word} by {abs(drop):.3g}: {now.value:.6g}, was {was.value:.6g}"
        yield Difference(Field.METRIC, verdict, message, "", f"{was.value:g}", f"{now.value:g}", ("metric", "value"))


def _drop(old: MetricLock, new: MetricLock) -> float:
    return old.value - new.value if old.higher_is_better else new.value - old.value


def latency(old: Lock, new: Lock, tolerances: Tolerances) -> Iterator[Difference]:
    """The time of a run grew by more than chance."""
    was, now = old.latency, new.latency
    if was is None or now is None:
        return
    if (was.sample, was.reference) != (now.sample, now.reference):
        yield _not_measured(Field.LATENCY, "the latency was measured on something else: not compared", "latency")
        return
    apart = now.low > was.high or now.high < was.low
    if not apart or not was.ratio:
        return
    faster = now.ratio < was.ratio
    change = f"{100 * abs(now.ratio / was.ratio - 1):.3g} % {'faster' if faster else 'slower'}"
    message = f"a run is {change}: {now.ratio:.4g} times the reference product, was {was.ratio:.4g}"
    verdict = Verdict.NOTE if faster else tolerances.grows(Field.LATENCY, was.ratio, now.ratio)
    first, second = (f"{one.ratio:.4g} ({one.low:.4g} to {one.high:.4g})" for one in (was, now))
    yield Difference(Field.LATENCY, verdict, message, "", first, second, ("latency", "ratio"))


def _not_measured(field: Field, message: str, key: str) -> Difference:
    return Difference(field, Verdict.NOTE, message, key=(key,))


def _number(count: int | None) -> str:
    return "unknown" if count is None else str(count)
