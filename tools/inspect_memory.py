"""What activations need: what is alive when, the peak, and how far memory can be shared."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from burnish.tools import terminal

if TYPE_CHECKING:
    import onnx_ir as oir

    from burnish.ir.samples import Sample
    from burnish.tools.subject import Subject


def report(subject: Subject) -> dict[str, Any]:
    """Lifetimes of the activations, the peak, and the memory that an arena needs, in bytes.

    Moments count the nodes that run, from 0; the first and the last moment of a tensor are inclusive. Where ONNX
    Runtime is installed, `measured` is what it takes: in its arena, and in a fresh process that loads the file.

    Args:
        subject: the model; its dynamic dimensions have the sizes of the first sample that it takes.

    Raises:
        InputError: no sample can be read or made, or the model takes none.
    """
    from burnish.ir import arena, concrete, cost, liveness

    sample, measured, note = _measured(subject)
    numbers = {**cost.dims_of(subject.model, sample.feeds), **subject.numbers}
    model = concrete.concrete(subject.model, numbers)
    timeline = liveness.timeline(model, numbers)
    peak = liveness.peak_of(timeline)
    plan = arena.plan(timeline)
    nodes = [_node(node) for node in timeline.nodes]
    derived = _from_weights(model)
    lives = sorted(timeline.lifetimes, key=lambda one: (-one.bytes, one.first))
    there = {id(one.value) for one in peak.live}
    return {
        "sample": sample.name,
        "shapes": {name: list(array.shape) for name, array in sample.feeds.items()},
        "weights_bytes": sum(one.bytes for one in cost.stored_tensors(model)),
        "from_weights_bytes": sum(one.bytes for one in timeline.lifetimes if one.value in derived),
        "peak_bytes": peak.peak,
        "peak_bytes_at_least": peak.at_least,
        "peak_at": _node(peak.at),
        "largest_node_bytes": peak.lower_bound,
        "unplanned_bytes": plan.unplanned,
        "in_place_bytes": plan.in_place,
        "arena_bytes": plan.bytes,
        "arena_bound_bytes": plan.bound,
        "measured": measured,
        "not_measured": note,
        "live_at_peak": [_life(one, nodes, derived) for one in lives if id(one.value) in there][: subject.top],
        "largest_tensors": [_life(one, nodes, derived) for one in lives][: subject.top],
        "moments": [node | {"bytes": size} for node, size in zip(nodes, timeline.alive(), strict=True)],
        "tensors": [
            {
                "name": one.value.name,
                "bytes": one.bytes,
                "first_moment": one.first,
                "last_moment": one.last,
                "from_weights": one.value in derived,
            }
            for one in timeline.lifetimes
        ],
        "arena": [
            {
                "tensors": [value.name for value in one.values],
                "offset_bytes": one.offset,
                "bytes": one.bytes,
                "first_moment": one.first,
                "last_moment": one.last,
                "caller_owned": any(value.is_graph_input() or value.is_graph_output() for value in one.values),
            }
            for one in plan.buffers
        ],
        "unknown": list(timeline.unknown),
    }


def _measured(subject: Subject) -> tuple[Sample, dict[str, Any], list[str]]:
    """The sample, what ONNX Runtime takes to run it, in bytes, and why some of that is not known."""
    from burnish.backends.ort import footprint
    from burnish.backends.ort.session import executor
    from burnish.ir.errors import MissingPackageError

    found: dict[str, Any] = dict.fromkeys(_MEASURED)
    try:
        runner = executor(threads=subject.threads, lean=True)(subject.model)
    except MissingPackageError:
        return subject.samples[0], found, ["ONNX Runtime is not installed (pip install 'burnish[cpu]')"]
    sample = subject.sample(runner)
    runner.close()
    notes = []
    use = footprint.arena_use(subject.model, sample.feeds, threads=subject.threads)
    if use is None:
        notes.append("this ONNX Runtime says nothing of its arena")
    else:
        found |= {"arena_peak_bytes": use.peak, "arena_requested_bytes": use.requested, "arena_held_bytes": use.held}
    process = footprint.resident(subject.file, sample.feeds, threads=subject.threads) if subject.file else None
    if process is None:
        notes.append("a process of its own could not be watched here")
    else:
        found |= {"resident_load_bytes": process.load, "resident_run_bytes": process.run}
    return sample, found, notes


_MEASURED = {
    "arena_requested_bytes": "activations and scratch memory, as requested by the kernels",
    "arena_peak_bytes": "the same, as the arena gives it",
    "arena_held_bytes": "all that the arena holds, with weights in it",
    "resident_load_bytes": "growth of a fresh process while it loads the model",
    "resident_run_bytes": "more growth in its first run, at the peak",
}


def _node(node: oir.Node | None) -> dict[str, Any]:
    from burnish.ir.cost import operator_name

    if node is None:
        return {"node": None, "operator": None}
    return {"node": node.name or str(node.outputs[0].name), "operator": operator_name(node)}


def _spelled(at: dict[str, Any]) -> str:
    return f"{at['operator']} {at['node']}" if at["node"] else ""


def _from_weights(model: oir.Model) -> set[oir.Value]:
    """What is computed from weights alone, whatever the inputs are: a runtime may compute it before the run."""
    from burnish.ir.network import reads
    from burnish.ir.sizes import stored
    from burnish.ir.walk import graphs

    found: set[oir.Value] = set()
    for graph in graphs(model):
        for node in graph:
            given = reads(node)
            if given and not node.op_type.startswith("Random") and node.op_type not in ("Bernoulli", "Multinomial"):
                if all(value in found or stored(value) is not None for value in given):
                    found.update(node.outputs)
    return found


def _life(one: Any, nodes: list[dict[str, Any]], derived: set[oir.Value]) -> dict[str, Any]:
    """A tensor with the nodes between which it lives; `written_by` is None for an input, `kept_to` for an output."""
    value = one.value
    return {
        "name": value.name,
        "bytes": one.bytes,
        "written_by": None if value.producer() is None else _node(value.producer())["node"],
        "from_weights": value in derived,
        "kept_to": None if value.is_graph_output() or value.is_graph_input() else nodes[one.last]["node"],
        "moments": one.last - one.first + 1,
    }


def show(found: dict[str, Any]) -> None:
    """Print the report as tables."""
    out = terminal.out()
    place = _spelled(found["peak_at"])
    peak = terminal.size(found["peak_bytes_at_least"])
    rows = {
        "shapes": terminal.shapes(found["shapes"]),
        "weights": terminal.size(found["weights_bytes"]),
        "peak": f"{'' if found['peak_bytes'] is not None else 'at least '}{peak}" + (f" at {place}" if place else ""),
        "largest node": terminal.size(found["largest_node_bytes"]),
    }
    for name, text in rows.items():
        out.print(f"{name:20}{text}")
    plans = [
        ("each tensor on its own", "unplanned_bytes"),
        ("working in place", "in_place_bytes"),
        ("sharing one arena", "arena_bytes"),
        ("lower bound of that", "arena_bound_bytes"),
    ]
    sizes = [(name, terminal.size(found[key])) for name, key in plans]
    terminal.show(terminal.table("Memory for all activations", ["", ">bytes"], sizes), out)
    used = [
        (text, terminal.size(size)) for key, text in _MEASURED.items() if (size := found["measured"][key]) is not None
    ]
    if used:
        terminal.show(terminal.table("ONNX Runtime, measured in the first run", ["", ">bytes"], used), out)
    columns = ["tensor", ">bytes", "written by", "kept to", ">moments"]
    for title, key in (("Alive at the peak", "live_at_peak"), ("Largest tensors", "largest_tensors")):
        lives = [
            (
                one["name"],
                terminal.size(one["bytes"]),
                "(from weights) " * one["from_weights"] + (one["written_by"] or "(input)"),
                one["kept_to"] or "(end)",
                str(one["moments"]),
            )
            for one in found[key]
        ]
        terminal.show(terminal.table(title, columns, lives), out)
    terminal.unknown(found["unknown"])
    for note in found["not_measured"]:
        terminal.talk().print(f"not measured: {note}")


def plot(found: dict[str, Any]) -> Any:
    """Bytes alive at each node, and below it where every tensor lies in the arena."""
    from burnish.tools import plots

    moments = [one["bytes"] for one in found["moments"]]
    unit, name = plots.bytes_unit(max(moments, default=0))
    figure, (above, below) = plots.figure(8.5, 6.2, nrows=2, sharex=True)
    steps = range(len(moments) + 1)
    heights = [size / unit for size in (*moments, moments[-1] if moments else 0)]
    above.fill_between(steps, heights, step="post", color=plots.COLORS[0], alpha=0.25, linewidth=0)
    above.step(steps, heights, where="post", color=plots.COLORS[0], label="alive, each tensor on its own")
    worst = moments.index(max(moments))
    above.plot([worst + 0.5], [moments[worst] / unit], plots.MARKS[3], color=plots.COLORS[1])
    peak = found["peak_at"]
    above.annotate(
        f"peak {terminal.size(moments[worst])}\n{terminal.short(_spelled(peak))}",
        (worst + 0.5, moments[worst] / unit),
        xytext=(8 if worst < len(moments) / 2 else -8, 6),
        textcoords="offset points",
        ha="left" if worst < len(moments) / 2 else "right",
    )
    bound = found["largest_node_bytes"] / unit
    above.axhline(bound, color=plots.GREY, linestyle="--", label="largest node: no order of nodes needs less")
    above.set(ylabel=f"activations alive ({name})", title="Memory over time", ylim=(0, max(heights) * 1.25 or 1))
    above.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.1)
    for one in found["arena"]:
        below.broken_barh(
            [(one["first_moment"], one["last_moment"] - one["first_moment"] + 1)],
            (one["offset_bytes"] / unit, one["bytes"] / unit),
            facecolor=plots.GREY if one["caller_owned"] else plots.COLORS[5],
            edgecolor="white",
            linewidth=0.6,
        )
    size = terminal.size(found["arena_bytes"])
    title = f"Shared arena of {size} (grey: inputs and outputs)"
    below.set(xlabel="node, in the order in which they run", ylabel=f"offset ({name})", title=title)
    below.set(xlim=(0, len(moments)), ylim=(0, max(found["arena_bytes"] / unit, 1e-9)))
    return figure
