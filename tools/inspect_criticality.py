"""What the outputs of a model lose when the weights of one layer are drawn anew."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from burnish.tools import terminal

if TYPE_CHECKING:
    from burnish.passes.criticality import Change, Criticality
    from burnish.passes.resets import Part, Resettable
    from burnish.tools.subject import Subject

TRIALS = 3


def report(subject: Subject, trials: int | None = None, seed: int | None = None) -> dict[str, Any]:
    """The criticality of every linear layer, convolution and batch norm, the most critical first.

    Args:
        subject: the model and its samples.
        trials: how often each layer is drawn; 3 when absent.
        seed: of the draws; 0 when absent.

    Raises:
        InputError: the samples cannot be read, the model refuses them, or no layer can be reset.
    """
    from burnish.backends.ort.session import executor
    from burnish.frontends import synthesis
    from burnish.ir.errors import InputError
    from burnish.passes import criticality
    from burnish.passes.resets import resettable
    from burnish.tools.observe import keeps_of

    trials, seed = TRIALS if trials is None else trials, 0 if seed is None else seed
    found = resettable(subject.model)
    if not found.parts:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(found.skipped.items())[:3]) or "there is none"
        raise InputError(f"no layer's weights can be drawn anew: {why}", place=subject.file or None)
    look = criticality.reading(subject.model)
    runner = executor(threads=subject.threads)(found.model)
    samples = subject.samples
    if subject.data is None:
        samples, _ = synthesis.usable(samples, runner)
    output = next(value for value in subject.model.graph.outputs if value.name == look.output)
    keep = keeps_of(subject.model, {"output": (output, None if look.kind in ("values", "chances") else -1)})["output"]
    measure = criticality.Criticality(found, runner, samples, look, None if isinstance(keep, str) else keep)
    rows = _rows(subject, found, measure, trials, seed)
    runner.close()
    if not rows:
        name, reason = next(iter(found.skipped.items()))
        raise InputError(f"no layer could be measured; {name}: {reason}", place=subject.file or None)
    return {
        "samples": len(samples),
        "made_samples": subject.data is None,
        "rows": measure.rows,
        "output": look.output,
        "compared_as": look.kind,
        "because": look.reason,
        "padding": f"not left out: {keep}" if isinstance(keep, str) else "left out" if keep is not None else None,
        "classes": measure.classes,
        "trials": trials,
        "seed": seed,
        "mean_criticality": sum(row["criticality"] for row in rows) / len(rows),
        "layers": sorted(rows, key=lambda row: -row["criticality"]),
        "listed": None if subject.whole else subject.top,
        "skipped": [{"name": name, "reason": reason} for name, reason in found.skipped.items()],
    }


def _rows(subject: Subject, found: Resettable, measure: Criticality, trials: int, seed: int) -> list[dict[str, Any]]:
    from burnish.ir.errors import InputError

    rows = []
    for number, part in enumerate(found.parts):
        subject.on_step(part.name, number, len(found.parts))
        try:
            changes = [measure.change(part.drawn(seed, trial)) for trial in range(trials)]
        except InputError as error:
            found.skipped[part.name] = f"the model cannot run with other weights: {error.cause}"
            continue
        rows.append(_row(part, number, changes))
    return rows


def _row(part: Part, number: int, changes: list[Change]) -> dict[str, Any]:
    each = [change.criticality for change in changes]
    tops = [change.top1 for change in changes if change.top1 is not None]
    return {
        "name": part.name,
        "operator": part.operator,
        "position": number,
        "users": part.users,
        "parameters": part.parameters,
        "criticality": statistics.fmean(each),
        "spread": statistics.stdev(each) if len(each) > 1 else None,
        "trials": each,
        "l1": statistics.fmean(change.l1 for change in changes),
        "l2": statistics.fmean(change.l2 for change in changes),
        "top1_changed": statistics.fmean(tops) if tops else None,
        "lost_rows": sum(change.lost for change in changes),
    }


def show(found: dict[str, Any]) -> None:
    """Print the report as tables."""
    out = terminal.out()
    kind = {
        "probabilities": "probabilities",
        "logits": "softmax of logits",
        "chances": "chances of yes and no",
        "values": "plain values",
    }[found["compared_as"]]
    out.print(f"{'output':20}{found['output']}: {kind}, since {found['because']}")
    out.print(
        f"{'compared':20}{found['rows']} rows of {found['classes']}; {terminal.count(found['trials'], 'trial')} a layer"
    )
    if found["padding"] is not None:
        out.print(f"{'padding':20}{found['padding']}")
    out.print(f"{'mean criticality':20}{found['mean_criticality']:.3g}")
    columns = ["layer", "operator", ">users", ">parameters", ">criticality", ">spread", ">L1", ">L2", ">top-1 changed"]
    rows = [
        (
            one["name"],
            one["operator"],
            str(one["users"]),
            f"{one['parameters']:,}",
            f"{one['criticality']:.3f}",
            "" if one["spread"] is None else f"{one['spread']:.3f}",
            f"{one['l1']:.3g}",
            f"{one['l2']:.3g}",
            "" if one["top1_changed"] is None else f"{100 * one['top1_changed']:.1f} %",
        )
        for one in found["layers"][: found["listed"]]
    ]
    terminal.show(terminal.table("Layers, the most critical first", columns, rows), out)
    if found["made_samples"]:
        terminal.talk().print("\nhint: these are made samples; `--data` shows what counts for real inputs")
    lost = sum(one["lost_rows"] for one in found["layers"])
    if lost:
        terminal.talk().print(f"\n{terminal.count(lost, 'row')} became infinite or NaN and count as wholly changed")
    terminal.unknown([f"{one['name']}: {one['reason']}" for one in found["skipped"]])


def plot(found: dict[str, Any]) -> Any:
    """The criticality of each layer in the order of the graph, with every trial."""
    from burnish.tools import plots

    figure, axes = plots.figure(8.5, 4.6)
    layers = sorted(found["layers"], key=lambda one: one["position"])
    for number, operator in enumerate(dict.fromkeys(one["operator"] for one in layers)):
        chosen = [one for one in layers if one["operator"] == operator]
        color, mark = plots.COLORS[number % len(plots.COLORS)], plots.MARKS[number % len(plots.MARKS)]
        for one in chosen:
            axes.plot([one["position"]] * 2, [min(one["trials"]), max(one["trials"])], color=color, linewidth=1)
        axes.plot(
            [one["position"] for one in chosen],
            [one["criticality"] for one in chosen],
            mark,
            color=color,
            label=operator,
            markersize=4,
            clip_on=False,
        )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="layer, in the order of the graph", ylabel="criticality (mean and range of the trials)")
    axes.set(title="What the outputs lose when a layer is drawn anew", ylim=(0, None))
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0.1)
    return figure
