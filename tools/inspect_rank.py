"""How many directions each layer uses: of its weight, and with samples of the data that passes through it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from burnish.tools import terminal

if TYPE_CHECKING:
    from burnish.ir.samples import Sample
    from burnish.passes.gram import Gram
    from burnish.passes.layers import Layer
    from burnish.tools.subject import Subject


def report(subject: Subject) -> dict[str, Any]:
    """The ranks of every linear layer and convolution, and of their inputs where samples are given.

    Made samples are not used: what they span says nothing about real data.

    Args:
        subject: the model; of its samples only given ones count.

    Raises:
        InputError: the samples cannot be read, or the model refuses one.
    """
    from burnish.passes import rank
    from burnish.passes.layers import layers

    found = layers(subject.model)
    rows: dict[str, dict[str, Any]] = {}
    for number, (name, layer) in enumerate(found.items()):
        subject.on_step(name, number, len(found))
        rows[name] = _weight(name, layer)
    samples = subject.samples if subject.data is not None else []
    if samples:
        _add_data(subject, found, samples, rows)
    known = [row["data"] for row in rows.values() if row["data"] is not None]
    shares = [data["utilized_share"] for data in known if not data["few_rows"]]
    return {
        "samples": len(samples),
        "energy": rank.SHARE,
        "mean_utilized_share": sum(shares) / len(shares) if shares else None,
        "layers": list(rows.values()),
        "listed": None if subject.whole else subject.top,
    }


def _weight(name: str, layer: Layer) -> dict[str, Any]:
    from burnish.ir.errors import InputError
    from burnish.passes import rank

    blocks = rank.matrices(layer)
    found, unknown = None, None
    try:
        found = rank.weight_rank(layer)
    except InputError as error:
        unknown = error.cause
    return {
        "name": name,
        "operator": layer.node.op_type,
        "in": blocks.shape[2],
        "out": blocks.shape[1],
        "groups": blocks.shape[0],
        "full_rank": blocks.shape[0] * min(blocks.shape[1:]),
        "stable_rank": found and found.stable,
        "energy_rank_90": found and found.energy_90,
        "energy_rank_99": found and found.energy_99,
        "data": None,
        "unknown": unknown,
    }


def _add_data(
    subject: Subject, found: dict[str, Layer], samples: list[Sample], rows: dict[str, dict[str, Any]]
) -> None:
    """Fill in what the samples show, some layers at a time."""
    from burnish.backends.ort.observe import OrtObserver
    from burnish.passes.layers import portions, unobservable
    from burnish.passes.reservoirs import Several
    from burnish.passes.sites import Site
    from burnish.tools.observe import keeps_of

    wanted: dict[str, Several] = {}
    for name, layer in found.items():
        why = rows[name]["unknown"] or unobservable(subject.model, layer)
        if why is None:
            wanted[name] = _reducer(layer)
        else:
            rows[name]["unknown"] = why
    keeps = keeps_of(subject.model, {name: (found[name].input, one.feature_axis) for name, one in wanted.items()})
    for name in [name for name in wanted if isinstance(keeps[name], str)]:
        rows[name]["unknown"] = f"padding cannot be left out: {keeps[name]}"
        del wanted[name]
    observer = OrtObserver(subject.model, threads=subject.threads)
    done = 0
    for part in portions(found, wanted):
        subject.on_step("observing", done, len(wanted))
        places = {name: Site(found[name].input, keep) for name in part if not isinstance(keep := keeps[name], str)}
        grams = observer.observe(places, part, samples)
        for name, reducer in grams.items():
            subject.on_step(name, done, len(wanted))
            assert isinstance(reducer, Several)
            _fill_in(rows[name], found[name], *reducer.parts)  # type: ignore[arg-type]
            done += 1


def _reducer(layer: Layer) -> Any:
    from burnish.passes.layers import gram_of
    from burnish.passes.reservoirs import Several

    rows, channels = gram_of(layer, exact=True), gram_of(layer, patches=False, exact=True)
    return Several((rows,) if rows.options == channels.options else (rows, channels))


def _fill_in(row: dict[str, Any], layer: Layer, gram: Gram, channels: Gram | None = None) -> None:
    """Fill in what the rows that a layer multiplies show, or why they show nothing."""
    from burnish.ir.errors import InputError
    from burnish.passes import rank

    if not gram.rows:
        raise InputError("no row was seen: all are padding, or the samples have none", place=layer.node.name)
    try:
        ranks = rank.data_rank(layer, gram)
    except InputError as error:
        row["unknown"] = error.cause
        return
    of_channels = gram if channels is None else channels
    fill, width = rank.fill(of_channels), rank.width(of_channels)
    row["data"] = {
        "rows": ranks.rows,
        "feature_rank": ranks.feature,
        "utilized_rank": ranks.utilized,
        "utilized_share": ranks.share,
        "few_rows": ranks.few,
        "channels": width.channels,
        "channels_used": width.used,
        "width": width.kind or None,
        "qsur_root": fill.root,
        "qsur_directions": fill.directions,
        "qsur_root_bound": fill.bound,
        "qsur_unknown": fill.reason or None,
    }


def _listed(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The layers of the table in the order of the graph: all, or those that use the smallest share of their full rank.

    A share is that of the data where it is known and rows were enough, else that of the weight.
    """

    def share(one: dict[str, Any]) -> float:
        data = one["data"]
        if data is not None and not data["few_rows"]:
            return float(data["utilized_share"])
        rank = one["energy_rank_99"]
        return 1.0 if rank is None else float(rank / max(one["full_rank"], 1))

    layers = found["layers"]
    chosen = sorted(range(len(layers)), key=lambda index: share(layers[index]))[: found["listed"]]
    return [layers[index] for index in sorted(chosen)]


def show(found: dict[str, Any]) -> None:
    """Print the report as a table."""
    out = terminal.out()
    columns = ["layer", "operator", ">in", ">out", ">full", ">stable", ">90 %", ">99 %"]
    if found["samples"]:
        columns += [">feature", ">utilized", ">share", ">QSUR"]
    rows = []
    for one in _listed(found):
        sizes = [one["in"], one["out"]]
        groups = f" x{one['groups']}" if one["groups"] > 1 else ""
        row = [one["name"], one["operator"] + groups, *map(str, sizes), str(one["full_rank"])]
        if one["stable_rank"] is None:
            row += ["?"] * 3
        else:
            row += [f"{one['stable_rank']:.1f}", str(one["energy_rank_90"]), str(one["energy_rank_99"])]
        data = one["data"]
        if data is not None:
            least = ">=" if data["few_rows"] else ""
            share = f"{least}{100 * data['utilized_share']:.0f} %"
            qsur = "?" if data["qsur_root"] is None else f"{data['qsur_root']:.3f}"
            row += [f"{least}{data['feature_rank']}", f"{least}{data['utilized_rank']}", share, qsur]
        elif found["samples"]:
            row += ["?"] * 4
        rows.append(row)
    title = "Ranks" if len(rows) == len(found["layers"]) else "Ranks of the layers that use the smallest share"
    terminal.show(terminal.table(title, columns, rows), out)
    if found["mean_utilized_share"] is not None:
        out.print(f"\nmean utilized share  {100 * found['mean_utilized_share']:.0f} %")
    _show_widths(found["layers"])
    if not found["samples"]:
        terminal.talk().print("\nhint: `--data` adds what the layers use of real inputs")
    few = sum(one["data"] is not None and one["data"]["few_rows"] for one in found["layers"])
    if few:
        said = f"{terminal.count(few, 'layer')} saw no more rows than features, and more could show higher ranks"
        terminal.talk().print(f"\n{said}; the mean leaves them out\n\nhint: give more samples")
    terminal.unknown([f"{one['name']}: {one['unknown']}" for one in found["layers"] if one["unknown"]])


def _show_widths(layers: list[dict[str, Any]]) -> None:
    """Say which layers read values with too few channels, and which with too many."""
    advice = {"narrow": "channels are all used: more may pay", "wide": "half of the channels are not used"}
    for kind, said in advice.items():
        some = [one for one in layers if one["data"] is not None and one["data"]["width"] == kind]
        if some:
            names = [f"{one['name']} ({one['data']['channels_used']} of {one['data']['channels']})" for one in some]
            more = f", and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            terminal.out().print(f"{kind + ' inputs':<19}  {said}: {', '.join(names[:_NAMED])}{more}")


_NAMED = 4


def _over(rank: float | None, full: int) -> float | None:
    return None if rank is None else rank / max(full, 1)


def plot(found: dict[str, Any]) -> Any:
    """For each layer the share of its full rank that the weight and the data use."""
    from burnish.tools import plots

    layers = found["layers"]
    figure, axes = plots.figure(8.5, 4.6)
    series = [
        ("weight, 99 % of the energy", [_over(one["energy_rank_99"], one["full_rank"]) for one in layers]),
        ("weight, stable rank", [_over(one["stable_rank"], one["full_rank"]) for one in layers]),
    ]
    if found["samples"]:
        data = [one["data"] for one in layers]
        utilized = [None if one is None or one["few_rows"] else one["utilized_share"] for one in data]
        series.append(("utilized on the data", utilized))
    for (label, shares), color, mark in zip(series, plots.COLORS, plots.MARKS, strict=False):
        known = [(index, 100 * share) for index, share in enumerate(shares) if share is not None]
        axes.plot(*(zip(*known, strict=True) if known else ([], [])), mark, color=color, label=label, markersize=4)
    axes.set(xlabel="layer, in the order of the graph", ylabel="rank (% of full rank)", ylim=(0, 105))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(title="Ranks of layers")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0.1)
    return figure
