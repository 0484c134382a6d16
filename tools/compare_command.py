"""`burnish compare`: the worst difference of two models, and the first node where they part."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from burnish.tools import terminal

if TYPE_CHECKING:
    import onnx_ir as oir

    from burnish.ir.samples import Sample


@click.command("compare")
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@click.option(
    "--data", metavar="D", help="Samples: .npz, a folder of them, or package.module:function. [default: made]"
)
@click.option("--tolerance", type=click.FloatRange(min=0), metavar="T", help="Relative error. [default: the dtype's]")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1, 1024), help="Threads of the runtime.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of tables.")
def compare_command(a: str, b: str, data: str | None, tolerance: float | None, threads: int, as_json: bool) -> int:
    """Run models A and B on the same samples; show the worst difference per output and where they part.

    Exit code 0 when every output agrees within the tolerance, 1 when not.
    """
    from burnish.frontends import onnx_file

    found = comparison(onnx_file.read(a), onnx_file.read(b), data, tolerance, threads)
    if as_json:
        click.echo(json.dumps(found, indent=2, allow_nan=False))
    else:
        _print_tables(found)
    return 0 if found["agree"] else 1


def comparison(
    a: oir.Model, b: oir.Model, data: Any = None, tolerance: float | None = None, threads: int = 1
) -> dict[str, Any]:
    """All that `burnish compare` shows, as the JSON document that `--json` prints.

    Args:
        a: the model that is taken as right.
        b: the other one, with the same inputs and outputs; outputs with other names are compared by position.
        data: as for `read_samples`; made from the model's own meaning when absent.
        tolerance: relative error up to which an output agrees; by dtype when absent.
        threads: threads of the runtime.

    Raises:
        InputError: a model cannot be loaded, its inputs or outputs do not fit, or `a` refuses every sample.
    """
    from burnish.backends.ort.session import executor
    from burnish.tools.api import samples_for

    names, notes = _ports(a, b)
    load = executor(threads=threads)
    runners = (load(a), load(b))
    outputs: dict[str, dict[str, Any]] = {}
    refused: list[dict[str, str]] = []
    used: list[Sample] = []
    reason = None
    for sample in samples_for(a, data):
        expected, reason = _outputs(runners[0], sample)
        if expected is None:
            refused.append({"sample": sample.name, "reason": str(reason)})
            continue
        used.append(sample)
        found, reason = _outputs(runners[1], sample)
        if found is None:
            notes.append(f'B refuses the sample "{sample.name}": {reason}')
        for name, array in expected.items():
            error = math.inf if found is None else _error(found[names[name]], array)
            _keep_worst(outputs, name, names[name], error, sample.name, _allowed(array, tolerance))
    if not used:
        from burnish.ir.errors import InputError

        raise InputError(f"A refuses every sample: {reason}", hint="give inputs that it takes with `--data`")
    for runner in runners:
        runner.close()
    agree = all(one["agrees"] for one in outputs.values())
    parting = None if agree else _worst_parting(a, b, outputs, used, threads, notes)
    return {
        "agree": agree,
        "samples": [sample.name for sample in used],
        "refused": refused,
        "outputs": [one | {"error": _number(one["error"])} for one in outputs.values()],
        "first_difference": parting,
        "notes": notes,
    }


def _names(values: Sequence[oir.Value]) -> list[str]:
    return [str(value.name) for value in values]


def _ports(a: oir.Model, b: oir.Model) -> tuple[dict[str, str], list[str]]:
    """B's output for each output of A, and what the user should know about that.

    Raises:
        InputError: they cannot be compared.
    """
    from burnish.ir.errors import InputError

    first, second = ({n for n in _names(m.graph.inputs) if n not in m.graph.initializers} for m in (a, b))
    if first != second:
        left, right = (", ".join(f"`{n}`" for n in sorted(names)) or "none" for names in (first, second))
        raise InputError(f"the inputs differ: A has {left}, B has {right}", hint="compare models with the same inputs")
    outputs = _names(a.graph.outputs), _names(b.graph.outputs)
    if len(outputs[0]) != len(outputs[1]):
        raise InputError(f"A has {len(outputs[0])} outputs, B has {len(outputs[1])}")
    if outputs[0] == outputs[1]:
        return dict(zip(*outputs, strict=True)), []
    if set(outputs[0]) == set(outputs[1]):
        return {name: name for name in outputs[0]}, ["the outputs stand in another order"]
    return dict(zip(*outputs, strict=True)), ["the outputs have other names and are compared by position"]


def _outputs(runner: Any, sample: Sample) -> tuple[dict[str, Any] | None, str | None]:
    from burnish.ir.errors import InputError

    try:
        return runner.run(sample.feeds), None
    except InputError as error:
        return None, error.cause.splitlines()[0]


def _error(found: Any, expected: Any) -> float:
    from burnish.passes.verify import relative_error

    if found.dtype != expected.dtype:
        return math.inf
    return relative_error(found, expected)


def _allowed(array: Any, tolerance: float | None) -> float:
    from burnish.passes.verify import ROUNDING

    return ROUNDING.get(array.dtype.name, 0.0) if tolerance is None else tolerance


def _keep_worst(
    outputs: dict[str, dict[str, Any]], name: str, other: str, error: float, sample: str, allowed: float
) -> None:
    before = outputs.get(name)
    if before is None or error > before["error"]:
        outputs[name] = {
            "output": name,
            "output_of_b": other,
            "error": error,
            "sample": sample,
            "tolerance": allowed,
            "agrees": error <= allowed,
        }


def _number(error: float) -> float | str:
    return error if math.isfinite(error) else "infinite"


def _worst_parting(
    a: oir.Model,
    b: oir.Model,
    outputs: dict[str, dict[str, Any]],
    samples: list[Sample],
    threads: int,
    notes: list[str],
) -> dict[str, Any] | None:
    worst = next(one for one in outputs.values() if not one["agrees"])
    sample = next(s for s in samples if s.name == worst["sample"])
    return parting(a, b, sample, worst["output"], worst["tolerance"], threads, notes)


def parting(
    a: oir.Model, b: oir.Model, sample: Sample, output: str, tolerance: float, threads: int, notes: list[str]
) -> dict[str, Any] | None:
    """The first value at which two models part, as `comparison` shows it; None when none is found.

    It is searched without the runtime's optimizations, which hide inner values, then with them.

    Args:
        a: the model that is taken as right.
        b: the other one, with the same inputs.
        sample: on which an output differs.
        output: its name in `a`.
        tolerance: relative error up to which values agree.
        threads: threads of the runtime.
        notes: what the user should know is added here.
    """
    from burnish.backends.ort.divergence import first_difference
    from burnish.backends.ort.session import Level, executor
    from burnish.ir.errors import InputError

    levels: tuple[Level, Level] = ("off", "all")
    for level in levels:
        load = executor(threads=threads, level=level)
        try:
            found = first_difference(a, b, sample.feeds, tolerance, load, output=output)
        except InputError as error:
            notes.append(f"the first difference was not looked for: {error.cause.splitlines()[0]}")
            return None
        if found is not None:
            if level == "all":
                notes.append("the models differ only with the runtime's own optimizations")
            agreeing = None if found.agreeing is None else _place(*found.agreeing)
            return {
                "sample": sample.name,
                **_place(*found.value),
                "error": _number(found.error),
                "last_agreeing": agreeing,
                "values_observed": found.observed,
                "values_in_both": found.matched,
            }
    notes.append("no inner value was found at which the models part")
    return None


def _place(a: oir.Value, b: oir.Value) -> dict[str, str]:
    from burnish.ir.match import describe

    nodes = [value.producer() for value in (a, b)]
    described = ["an input" if node is None else describe(node) for node in nodes]
    return {"value_in_a": str(a.name), "value_in_b": str(b.name), "node_in_a": described[0], "node_in_b": described[1]}


def _print_tables(found: dict[str, Any]) -> None:
    from rich.table import Table

    out, talk = terminal.out(), terminal.talk()
    table = Table("output", "worst relative error", "allowed", "sample", "", box=None, pad_edge=False)
    for one in found["outputs"]:
        error = _spelled(one["error"])
        verdict = "agrees" if one["agrees"] else "DIFFERS"
        table.add_row(one["output"], error, f"{one['tolerance']:.3g}", one["sample"], verdict)
    terminal.show(table, out)
    parting = found["first_difference"]
    if parting is not None:
        out.print(f"\nThe models part at {_both(parting)}: relative error {_spelled(parting['error'])}")
        last = parting["last_agreeing"]
        out.print(f"The last value before it that agrees: {_both(last) if last else 'the inputs'}")
        talk.print(
            f"{parting['values_in_both']} values exist in both models, {parting['values_observed']} were observed"
        )
    kept, refused = len(found["samples"]), len(found["refused"])
    talk.print(f"{kept} sample{'s' * (kept != 1)} compared" + (f", {refused} refused by A itself" if refused else ""))
    for note in found["notes"]:
        talk.print(f"note: {note}")


def _spelled(error: float | str) -> str:
    return error if isinstance(error, str) else f"{error:.3g}"


def _both(place: dict[str, str]) -> str:
    one, other = place["node_in_a"], place["node_in_b"]
    names = f"`{place['value_in_a']}`"
    if place["value_in_b"] != place["value_in_a"]:
        names += f" / `{place['value_in_b']}`"
    return f"{names}, the result of {one}" + (f" in A and of {other} in B" if other != one else "")
