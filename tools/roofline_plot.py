"""The picture of `inspect --utilization`: the roofline of the machine, and every node under it."""

from __future__ import annotations

import math
from typing import Any

from burnish.tools import plots, terminal

_LOOKS = {
    "compute": (plots.COLORS[0], plots.MARKS[0]),
    "memory": (plots.COLORS[1], plots.MARKS[1]),
    "kernel": (plots.COLORS[2], plots.MARKS[2]),
    "overhead": (plots.COLORS[3], plots.MARKS[3]),
}
_NAMED = 4


def draw(found: dict[str, Any]) -> Any:
    """The nodes of the first batch under the roofline; with several batches, utilization and latency of each beside it.

    Nodes are drawn by operations per byte and operations a second, with areas as large as their shares of the time.
    Those without operations, and those whose sizes are not known, are not drawn.

    Args:
        found: the document of the section.
    """
    machine, run = found["machine"], found["batches"][0]
    nodes = [row for row in run["nodes"] if row["operations_per_byte"] and row["operations_per_second"]]
    used = [one for one in found["batches"] if one["utilization"] is not None]
    if len(used) > 1:
        figure, (axes, beside) = plots.figure(12.0, 5.6, ncols=2, width_ratios=(2.6, 1))
        _batches(beside, sorted(used, key=lambda one: one["batch"]))
    else:
        figure, axes = plots.figure(8.5, 5.6)
    xs = [row["operations_per_byte"] for row in nodes] or [1.0]
    bandwidth, peaks = machine["bandwidth_bytes_per_second"], machine["peak_operations_per_second"]
    ridges = [peak / bandwidth for peak in peaks.values()] or [1.0]
    left, right = min(*xs, *ridges) / 2, max(*xs, *ridges) * 4
    top = max([*peaks.values(), *(row["operations_per_second"] for row in nodes)], default=bandwidth)
    for name, peak in peaks.items():
        axes.plot([left, peak / bandwidth, right], [left * bandwidth, peak, peak], color="black", linewidth=1.4)
        label = f"peak in {name}: {terminal.quantity(peak)}op/s"
        axes.annotate(label, (right, peak), (-4, 4), textcoords="offset points", ha="right")
    axes.set(xscale="log", yscale="log", xlim=(left, right))
    axes.annotate(
        f"copying: {terminal.quantity(bandwidth)}B/s",
        (left, left * bandwidth),
        (14, 6),
        textcoords="offset points",
        va="top",
    )
    for limit, (color, mark) in _LOOKS.items():
        some = [row for row in nodes if row["limit"] == limit]
        if some:
            share = sum(row["share_of_time"] for row in some)
            axes.scatter(
                [row["operations_per_byte"] for row in some],
                [row["operations_per_second"] for row in some],
                [12 + 900 * row["share_of_time"] for row in some],
                color=color,
                marker=mark,
                alpha=0.65,
                edgecolor="white",
                linewidth=0.5,
                label=f"{limit}: {terminal.count(len(some), 'node')}, {100 * share:.0f} % of the time",
            )
    for place, numbers in _numbered(nodes[:_NAMED]).items():
        axes.annotate(", ".join(map(str, numbers)), place, (0, -14), textcoords="offset points", ha="center")
    named = [
        f"{number}  {terminal.short(row['node'] or '', longest=40)}, {100 * row['share_of_time']:.0f} % of the time"
        for number, row in enumerate(nodes[:_NAMED], 1)
    ]
    axes.text(0.015, 0.985, "\n".join(named), transform=axes.transAxes, va="top", fontsize=8)
    axes.set(
        xlabel="operations per byte moved (op/B)",
        ylabel="operations a second (op/s)",
        title=_title(found, run),
        ylim=(None, top * 3),
    )
    plots.plain_ticks(axes)
    if nodes:
        legend = axes.legend(loc="lower right", title="limited by", markerscale=1, alignment="left")
        for handle in legend.legend_handles:
            handle.set_sizes([36])
    return figure


def _batches(axes: Any, runs: list[dict[str, Any]]) -> None:
    """Utilization over the batch, with the latency at each point."""
    sizes = [one["batch"] for one in runs]
    shares = [100 * one["utilization"] for one in runs]
    axes.plot(sizes, shares, "-" + plots.MARKS[0], color=plots.COLORS[0])
    for one, share in zip(runs, shares, strict=True):
        label = f"{1e3 * one['latency_seconds']:.3g} ms"
        axes.annotate(label, (one["batch"], share), (0, -16), textcoords="offset points", ha="center")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="batch (rows)", ylabel="utilization (% of the peak)", title="Utilization and latency")
    axes.set(xlim=(min(sizes) / 1.6, max(sizes) * 1.6), ylim=(0, max(*shares, 100) * 1.12))
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()


def _numbered(nodes: list[dict[str, Any]]) -> dict[tuple[float, float], list[int]]:
    """Where the numbers of nodes stand; those of nodes in nearly one place stand together."""
    found: dict[tuple[float, float], list[int]] = {}
    for number, row in enumerate(nodes, 1):
        x, y = row["operations_per_byte"], row["operations_per_second"]
        near = [place for place in found if abs(math.log(place[0] / x)) < 0.1 and abs(math.log(place[1] / y)) < 0.2]
        found.setdefault(near[0] if near else (x, y), []).append(number)
    return found


def _title(found: dict[str, Any], run: dict[str, Any]) -> str:
    used = "" if run["utilization"] is None else f", {100 * run['utilization']:.0f} % of the peak used"
    batch = "" if run["batch"] is None else f"batch {run['batch']}, "
    threads = terminal.count(found["threads"], "thread")
    return f"Roofline: {batch}{threads}, {1e3 * run['latency_seconds']:.3g} ms{used}"
