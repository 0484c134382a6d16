"""Advice on speed that has been tried: the passes run on a copy, and the result is timed beside the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as oir

    from burnish.passes.pipeline import Step
    from burnish.tools.subject import Subject

_SECONDS = 1.5

_NOTES = ("infer-types", "drop-annotations")
"""Passes that change what is known of a model, not what it computes."""


def advise(
    subject: Subject,
    copy: oir.Model,
    feeds: Mapping[str, np.ndarray],
    times: Mapping[tuple[oir.Node, ...], float],
) -> list[dict[str, Any]]:
    """What makes the model faster in ONNX Runtime on the CPU: what `optimize --target ort-cpu` measured, pass by pass.

    Args:
        subject: the model and the threads.
        copy: the same with a name of its own for every node.
        feeds: inputs to time it with.
        times: seconds that groups of nodes of `copy` take.

    Returns:
        One entry: `ratio` (time after over time before, None when no pass changes anything) with its 95 % interval
        `low` to `high`, `passes` with the share of the time spent in the nodes that each rewrites, and the `text`.
    """
    from burnish.backends.ort import timing
    from burnish.backends.ort.session import executor
    from burnish.ir.errors import BurnishError
    from burnish.ir.walk import walk
    from burnish.passes import pipeline, recipes

    touched: dict[str, set[str]] = {}
    present = {node.name for node in walk(copy)}

    def after(model: oir.Model, step: Step) -> None:
        nonlocal present
        now = {node.name for node in walk(model)}
        changed = (present - now) | set(step.outcome.changed_nodes)
        if step.outcome.name not in _NOTES:
            touched.setdefault(step.outcome.name, set()).update(str(name) for name in changed)
        present = now

    try:
        rewritten = pipeline.Pipeline(recipes.named("default", "ort-cpu", None)).rewrite(copy, after=after).model
        if not touched:
            return [_entry("no pass of burnish changes this model", [])]
        before, then = executor(threads=subject.threads)(copy), executor(threads=subject.threads)(rewritten)
        then.run(feeds)
    except BurnishError as error:
        return [_entry(f"the passes could not be tried: {error.cause.splitlines()[0]}", [])]
    found = timing.paired(lambda: before.run(feeds), lambda: then.run(feeds), rounds=40, seconds=_SECONDS)
    before.close()
    then.close()
    total = sum(times.values())
    passes = [
        {"pass": name, "share_of_time": _share(nodes, times, total) if total else 0.0}
        for name, nodes in touched.items()
    ]
    passes.sort(key=lambda one: -float(str(one["share_of_time"])))
    return [_entry(_text(found, passes), passes) | {"ratio": found.ratio, "low": found.low, "high": found.high}]


def _share(names: set[str], times: Mapping[tuple[oir.Node, ...], float], total: float) -> float:
    """The share of the time that is spent in the nodes of these names; a kernel's time is spread over its nodes."""
    spent = (
        seconds * sum(node.name in names for node in nodes) / len(nodes) for nodes, seconds in times.items() if nodes
    )
    return sum(spent) / total


def _entry(text: str, passes: list[dict[str, Any]]) -> dict[str, Any]:
    return {"text": text, "ratio": None, "low": None, "high": None, "passes": passes}


def _text(found: Any, passes: list[dict[str, Any]]) -> str:
    measured = f"{found.ratio:.2f} of the time ({found.low:.2f} to {found.high:.2f}, measured)"
    if found.low <= 1 <= found.high or found.ratio > 0.98:
        return f"no pass of burnish clearly makes it faster here: after `optimize --target ort-cpu` it takes {measured}"
    listed = [one for one in passes[:4] if one["share_of_time"] >= 0.005] or passes[:1]
    named = ", ".join(f"`{one['pass']}` ({100 * one['share_of_time']:.0f} %)" for one in listed)
    return (
        f"`optimize --target ort-cpu`: {measured}; passes by the share of the time spent in nodes they rewrite: {named}"
    )
