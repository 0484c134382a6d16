"""What a run of a model takes in joules, and after how many uses a model has paid for its making."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from burnish.tools import terminal

if TYPE_CHECKING:
    from burnish.backends.energy import Use
    from burnish.tools.subject import Subject

_WATTS = 10.0
"""Watts that a busy thread is assumed to draw above idle where there is no meter: about what a server's core does."""

_USES = (1e4, 1e6, 1e9)


def report(
    subject: Subject,
    uses: str | None = None,
    make_energy: float | None = None,
    against: str | None = None,
    watts: float | None = None,
    seconds: float | None = None,
    target: str | None = None,
) -> dict[str, Any]:
    """Joules per inference, and E(N) = make + N * joules for N uses.

    Args:
        subject: the model; it is run with its first sample.
        uses: numbers of uses, `1e4,1e6,1e9`, which is the default.
        make_energy: joules that went into making the model, beyond those that went into the one it is held against.
        against: the file of another model with the same inputs.
        watts: assume this power instead of reading a meter.
        seconds: for which each model runs, 10 by default.
        target: `ort-cpu`, the default, or `ort-cuda`.

    Raises:
        InputError: the numbers cannot be read, a model refuses the sample, or there is neither a meter nor a power.
        MissingPackageError: ONNX Runtime, or its CUDA, is not installed.
    """
    from burnish.backends import energy
    from burnish.backends.ort.machine import disturbance
    from burnish.backends.ort.session import from_path
    from burnish.ir.errors import InputError

    disturbed = disturbance(subject.threads)
    counts = parse_uses(uses)
    made = _joules(make_energy)
    where = target or "ort-cpu"
    files = [subject.file, *([against] if against is not None else [])]
    for path in files:
        if not Path(path).is_file():
            raise InputError("there is no such file", place=path, hint="check the path")
    meter, power, why = _meter(where, watts, subject.threads)
    runners = [from_path(path, threads=subject.threads, target=where) for path in files]
    sample = subject.sample(runners[0])
    try:
        runners[-1].run(sample.feeds)
    except InputError as error:
        error.place, error.hint = against, "the two models must take the same inputs"
        raise
    actions = [partial(runner.run, sample.feeds) for runner in runners]
    lasting = 10.0 if seconds is None else seconds
    subject.on_step("run", 0, 1)
    if meter is None:
        found, idle = energy.estimated(actions, power, seconds=min(lasting, 2.0 * len(actions))), None
    else:
        found, idle = energy.measured(actions, meter, seconds=lasting)
        if min(use.joules for use in found) <= 0:
            hint = "run longer with `--seconds`, while nothing else runs, or assume a power with `--watts`"
            raise InputError("the meter counts no more than while the machine idles", place=meter.name, hint=hint)
    for runner in runners:
        runner.close()
    number, reason = energy.break_even(made, found[1], found[0]) if against is not None else (None, "")
    making = [made, 0.0]
    return {
        "sample": sample.name,
        "shapes": {name: list(array.shape) for name, array in sample.feeds.items()},
        "threads": subject.threads,
        "target": where,
        "meter": f"assumed: {power:g} W more while it runs" if meter is None else meter.name,
        "estimated": meter is None,
        "no_meter": why,
        "idle_watts": idle,
        "disturbed": disturbed,
        "models": [
            _model(path, use, joules, estimated=meter is None)
            for path, use, joules in zip(files, found, making, strict=False)
        ],
        "uses": [
            {
                "uses": count,
                "estimated": meter is None,
                "joules": [joules + count * use.joules for use, joules in zip(found, making, strict=False)],
            }
            for count in counts
        ],
        "break_even_uses": number,
        "no_break_even": reason,
    }


def _model(path: str, use: Use, made: float, *, estimated: bool) -> dict[str, Any]:
    return {
        "file": path,
        "estimated": estimated,
        "joules_per_inference": use.joules,
        "joules_lowest": use.low,
        "joules_highest": use.high,
        "seconds_per_inference": use.seconds,
        "measurements": use.count,
        "make_joules": made,
    }


def parse_uses(text: str | None) -> list[float]:
    """The numbers in `1e4,1e6,1e9`.

    Raises:
        InputError: it is no list of positive numbers.
    """
    from burnish.ir.errors import InputError

    if text is None:
        return list(_USES)
    found = []
    for part in text.split(","):
        try:
            number = float(part)
        except ValueError:
            number = math.nan
        if not (0 < number < math.inf):
            raise InputError(f"`{part}` is no number of uses", place="--uses", hint="write `--uses 1e4,1e6,1e9`")
        found.append(number)
    return list(dict.fromkeys(found))


def _joules(given: float | None) -> float:
    from burnish.ir.errors import InputError

    if given is not None and not 0 <= given < math.inf:
        raise InputError(f"`{given:g}` is no energy", place="--make-energy", hint="give joules: a kWh has 3.6e6")
    return given or 0.0


def _meter(target: str, watts: float | None, threads: int) -> tuple[Any, float, str]:
    """A meter, or None with the watts to assume and the reason."""
    from burnish.backends import meters
    from burnish.ir.errors import InputError

    if watts is not None:
        if not 0 < watts < math.inf:
            raise InputError(f"`{watts:g}` is no power", place="--watts", hint="give the watts above idle")
        return None, watts, ""
    try:
        return meters.meter_of(target), 0.0, ""
    except meters.MeterMissing as missing:
        if target == "ort-cuda":
            hint = "give the watts that the GPU draws above idle with `--watts`"
            raise InputError(f"there is no meter: {missing}", hint=hint) from missing
        return None, _WATTS * threads, str(missing)


def show(found: dict[str, Any]) -> None:
    """Print the report as tables; without a meter every number of joules is marked."""
    out = terminal.out()
    mark = " estimated" if found["estimated"] else ""
    out.print(f"{'meter':20}{found['meter']}")
    if found["no_meter"]:
        out.print(f"{'':20}{found['no_meter']}")
    if found["idle_watts"] is not None:
        out.print(f"{'idle':20}{found['idle_watts']:.3g} W, taken off")
    out.print(f"{'shapes':20}{terminal.shapes(found['shapes'])}")
    rows = [
        (
            one["file"],
            _spell(one["joules_per_inference"]) + mark,
            _range(one["joules_lowest"], one["joules_highest"], mark),
            f"{one['seconds_per_inference'] * 1e3:.3g}",
            _spell(one["make_joules"]),
        )
        for one in found["models"]
    ]
    columns = ["model", ">per inference", ">range", ">ms", ">to make"]
    terminal.show(terminal.table("Energy", columns, rows), out)
    files = [one["file"] for one in found["models"]]
    sums = [
        (terminal.quantity(one["uses"]), *(_spell(joules) + mark for joules in one["joules"])) for one in found["uses"]
    ]
    terminal.show(terminal.table("With its making, for so many uses", [">uses", *(f">{f}" for f in files)], sums), out)
    if len(files) == 2:
        number = found["break_even_uses"]
        if number is None:
            out.print(f"\n{files[0]} does not pay for its making: {found['no_break_even']}")
        else:
            out.print(f"\n{files[0]} has paid for its making after {terminal.quantity(number)} uses{mark}")
    if found["disturbed"]:
        terminal.talk().print(f"disturbed: {found['disturbed']}")


def _range(low: float, high: float, mark: str) -> str:
    return f"{_spell(low)} to {_spell(high)}{mark}" if low < high else ""


def _spell(joules: float) -> str:
    """Joules as a person reads them; large ones as kilowatt-hours."""
    size = abs(joules)
    if not size:
        return "0 J"
    for unit, name in ((3.6e6, "kWh"), (1e3, "kJ"), (1.0, "J"), (1e-3, "mJ")):
        if size >= unit:
            return f"{joules / unit:.3g} {name}"
    return f"{joules * 1e6:.3g} µJ"


def plot(found: dict[str, Any]) -> Any:
    """Joules over the number of uses, each model with its making, and where they meet."""
    from burnish.tools import plots

    figure, axes = plots.figure(7.5, 4.8)
    crossing = found["break_even_uses"]
    counts = [one["uses"] for one in found["uses"]] + ([crossing] if crossing else [])
    low, high = min(counts) / 3, max(counts) * 3
    steps = [low * (high / low) ** (step / 60) for step in range(61)]
    for one, color, line in zip(found["models"], plots.COLORS, ("-", "--"), strict=False):
        heights = [one["make_joules"] + count * one["joules_per_inference"] for count in steps]
        label = f"{Path(one['file']).name}: {_spell(one['joules_per_inference'])} per inference"
        label += f" and {_spell(one['make_joules'])} to make" if one["make_joules"] else ""
        axes.plot(steps, heights, line, color=color, label=label)
    if crossing:
        first = found["models"][0]
        height = first["make_joules"] + crossing * first["joules_per_inference"]
        axes.plot([crossing], [height], plots.MARKS[3], color="black")
        axes.annotate(
            f"break-even at {terminal.quantity(crossing)} uses",
            (crossing, height),
            (8, -12),
            textcoords="offset points",
            va="top",
        )
    kind = "estimated" if found["estimated"] else "measured"
    axes.set(xscale="log", yscale="log", xlabel="number of uses (inferences)", ylabel=f"energy, {kind} (J)")
    axes.set(title=f"Energy with its making; {found['meter']}", xlim=(low, high))
    plots.plain_ticks(axes)
    axes.legend(loc="upper left")
    return figure
