"""`burnish tune`: look for fast schedules of a model's kernels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from burnish.tools import terminal
from burnish.tools.tuned import DEFAULT

if TYPE_CHECKING:
    import onnx_ir as oir

_SHOWN = 12


@click.command("tune")
@click.argument("model", type=click.Path())
@click.option(
    "--target", default="llvm", show_default=True, metavar="T", help="`llvm`, `llvm:CPU`, `cuda`, `cuda:sm_90`."
)
@click.option("--tune", "budget", default="10m", show_default=True, metavar="TRIALS|MINUTES", help="`200`, or `5m`.")
@click.option(
    "--tuning-db", "folder", default=DEFAULT, show_default=True, metavar="DIR", help="Where records are kept."
)
@click.option("--dims", default="", metavar="NAME=N,...", help="Numbers for dynamic dimensions: others are not tuned.")
@click.option("--rpc", default="", metavar="HOST:PORT[/KEY]", help="Time kernels on the servers of a TVM tracker.")
@click.option("--workers", default=2, show_default=True, type=click.IntRange(min=1), help="Kernels compiled at a time.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of a table.")
def tune_command(model: str, as_json: bool, **given: Any) -> None:
    """Look for fast schedules of the kernels of MODEL and keep them in a folder, for all models that have the same.

    What the folder holds counts towards the budget: stopped tuning goes on, and a second time there is nothing to do.
    `optimize --target T --tuning-db DIR` compiles with the fastest. Kernels of a CPU are timed on one thread,
    as they are there.
    """
    found = tune(model, **given)
    if as_json:
        click.echo(json.dumps(found, indent=2, allow_nan=False))
    else:
        _show(found)


def tune(
    model: str,
    *,
    target: str = "llvm",
    budget: str = "10m",
    folder: str = DEFAULT,
    dims: str = "",
    rpc: str = "",
    workers: int = 2,
) -> dict[str, Any]:
    """All that `burnish tune` shows, as the JSON document that `--json` prints; times are in seconds.

    Args:
        model: an `.onnx` file.
        target: what kernels are for.
        budget: `200` trials or `5m`.
        folder: of the records.
        dims: numbers for dynamic dimensions, `batch=1,seq=128`.
        rpc: `HOST:PORT` of a TVM tracker.
        workers: kernels compiled at a time.

    Raises:
        InputError: the model or an option cannot be used.
        MissingPackageError: TVM or a package that tuning needs is absent.
    """
    from burnish.frontends import onnx_file
    from burnish.ir.concrete import concrete
    from burnish.ir.errors import InputError
    from burnish.passes import plan, recipe_file
    from burnish.passes.pipeline import Pipeline
    from burnish.tools import compiled
    from burnish.tools.subject import parse_dims
    from burnish.tools.tuned import Tuning, fused

    if not Path(model).is_file():
        raise InputError("there is no such file", place=model, hint="check the path")
    if recipe_file.kind("target", target) not in recipe_file.COMPILED:
        raise InputError("kernels are tuned for a target", place=f"--target {target}", hint="`llvm`, `cuda:sm_90`")
    machine = compiled.target_of(target)
    tuning = Tuning(budget, folder, rpc, workers)
    tuning.check(machine)
    read = onnx_file.read(model)
    numbers = parse_dims(dims, read)
    if numbers:
        read = concrete(read, numbers)
    rival = _rival(read)
    ready = Pipeline(plan.resolve(target=target).passes).rewrite(read).model
    with terminal.progress("tune") as show:
        done = tuning.run(fused(ready, machine), machine, show, "" if rival is None else f", ONNX Runtime {_ms(rival)}")
    tasks = sorted(done.tasks, key=lambda one: -(one.seconds or 0.0) * one.kernel.calls)
    return {
        "model": model,
        "target": str(machine),
        "budget": budget,
        "database": folder,
        "trials": done.trials,
        "seconds": round(done.wall, 2),
        "kernels_seconds": done.seconds,
        "onnxruntime_seconds": rival,
        "kernels": [
            {
                "name": one.kernel.name,
                "arguments": one.kernel.signature,
                "calls": one.kernel.calls,
                "trials": one.trials,
                "trials_before": one.before,
                "seconds": one.seconds,
                "note": one.reason,
            }
            for one in tasks
        ],
        "notes": list(done.notes),
    }


def _rival(model: oir.Model) -> float | None:
    """Seconds of a run of the whole model in ONNX Runtime; None where it refuses the samples made for the model."""
    from functools import partial

    from burnish.backends.ort import timing
    from burnish.backends.ort.session import executor
    from burnish.ir.errors import InputError
    from burnish.tools.api import samples_for

    try:
        runner = executor()(model)
        feeds = samples_for(model)[0].feeds
        return timing.single(partial(runner.run, feeds), rounds=10, seconds=2).median
    except InputError:
        return None


def _show(found: dict[str, Any]) -> None:
    from rich.table import Table

    out, talk = terminal.out(), terminal.talk()
    table = Table("kernel", "calls", "trials", "all calls", "note", box=None, pad_edge=False)
    for one in found["kernels"][:_SHOWN]:
        taken = "" if one["seconds"] is None else _ms(one["seconds"] * one["calls"])
        trials = str(one["trials_before"] + one["trials"])
        table.add_row(terminal.short(one["name"]), str(one["calls"]), trials, taken, one["note"])
    terminal.show(table, out)
    more = len(found["kernels"]) - _SHOWN
    if more > 0:
        out.print(f"and {terminal.count(more, 'more kernel')}")
    whole = "some kernels have no time" if found["kernels_seconds"] is None else _ms(found["kernels_seconds"])
    rival = found["onnxruntime_seconds"]
    out.print(f"\nkernels   {whole}, one after the other" + ("" if rival is None else f"; ONNX Runtime {_ms(rival)}"))
    out.print(
        f"tuned     {terminal.count(found['trials'], 'trial')} in {found['seconds']:.1f} s, for {found['target']}"
    )
    for note in found["notes"]:
        talk.print(f"skipped: {note}")
    missing = [one for one in found["kernels"] if one["seconds"] is None]
    if missing:
        talk.print(
            f"{terminal.count(len(missing), 'kernel')} without a schedule: {missing[0]['note'] or 'none was fast'}"
        )
    if any("known only when it runs" in one["note"] for one in missing):
        talk.print("\nhint: `--dims batch=1` gives dynamic dimensions a number")


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
