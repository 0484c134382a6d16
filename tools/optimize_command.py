"""`optimize`: rewrite a model and prove what changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from burnish.tools import terminal

_VERIFY = ("ends", "each", "off")
_GUARD = ("latency", "size", "off")
_REGIONS = ("measured", "all")
_BUDGET = ("max_drop", "max_size", "max_latency", "objective", "metric", "heal", "workers", "pairs")
_TUNING = ("tune", "tuning_db", "rpc", "dims")
_PASSED = ("recipe", "data", "target", "opset", "verify", "regions", "emit", *_TUNING, *_BUDGET)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", metavar="IN")
@click.option("-o", "--output", metavar="OUT", help="The file to write, or the folder of kernels.")
@click.option("--recipe", metavar="FILE|NAME", help="A YAML recipe, or `default`, `normal-form`, `none`.")
@click.option(
    "-p",
    "--passes",
    "passes",
    multiple=True,
    metavar="PASS{opt=val},...",
    help="Passes to run after the recipe; without --recipe, after `normal-form`.",
)
@click.option("--without", multiple=True, metavar="PASS", help="Leave a pass of the recipe out.")
@click.option(
    "--data", metavar="DATA", help="Samples: .npz, a folder, or package.module:function (default: made for the model)."
)
@click.option(
    "--target",
    metavar="T",
    help="`onnx` (default), `ort-cpu`, `ort-cuda`, or kernels: `llvm`, `llvm:CPU`, `cuda`, `cuda:sm_90`.",
)
@click.option("--opset", type=int, metavar="N", help="Raise the model to this opset (ort targets: 23 unless given).")
@click.option(
    "--verify",
    type=click.Choice(_VERIFY),
    help="Compare with the original at the ends (default), after each pass, or not.",
)
@click.option(
    "--guard",
    type=click.Choice(_GUARD),
    multiple=True,
    help="What no pass may make worse; may be repeated (default: latency and size).",
)
@click.option("--max-drop", metavar="AMOUNT", help="Search lossy edits: the metric may drop so far, `1%` or `0.01`.")
@click.option("--max-size", metavar="AMOUNT", help="Bring the weights down to `50%` of their bytes.")
@click.option("--max-latency", metavar="SHARE", help="Bring the time of a run down to `80%` of the original's.")
@click.option("--objective", type=click.Choice(("size", "latency")), help="What is made small (default: size).")
@click.option(
    "--metric", metavar="NAME|FUNCTION", help="What a drop is measured by: a name, or package.module:function."
)
@click.option("--heal", is_flag=True, default=None, help="Train what the lossy passes left, against the original.")
@click.option("--heal-with", metavar="OPTION=VALUE,...", help="As --heal, with `steps=600,rate=1e-3`.")
@click.option("--workers", metavar="N|ray://...", help="Score edits on so many processes, or on a Ray cluster.")
@click.option("--pairs", is_flag=True, default=None, help="Score neighbouring edits together, too.")
@click.option("--dims", metavar="NAME=N,...", help="Give dynamic dimensions a number for good: `batch=1,seq=128`.")
@click.option("--tune", metavar="TRIALS|MINUTES", help="Look for fast schedules of kernels: `200`, or `5m`.")
@click.option("--tuning-db", metavar="DIR", help="Tuning records; without --tune they are used as they are.")
@click.option("--rpc", metavar="HOST:PORT", help="Time kernels on the servers of a TVM tracker.")
@click.option(
    "--emit",
    type=click.Choice(("kernels",)),
    help="One library and its source that other programs call without TVM, in place of code for `burnish run` alone.",
)
@click.option(
    "--regions",
    type=click.Choice(_REGIONS),
    help="Compile what is measured to be faster than ONNX Runtime (default), or all.",
)
@click.option("--plot", metavar="FILE", help="Draw what the measured plans save and lose (.svg or .png).")
@click.option("--dry-run", is_flag=True, help="Rewrite and prove, write nothing.")
@click.option(
    "--why", metavar="PASS|regions", help="List every site that PASS left alone, or where regions run, with the reason."
)
@click.option("--require-change", multiple=True, metavar="PASS", help="Exit with 4 when PASS changes nothing.")
@click.option("--report", metavar="FILE.json|FILE.html", help="Write the full account: as JSON, or as a page to read.")
@click.option("--as-python", is_flag=True, help="Print the Python that does the same, and stop.")
def optimize_command(model: str, **given: Any) -> int:
    """Rewrite the model IN, prove that it computes the same, and write OUT.

    With a budget (--max-drop, --max-size, --max-latency) lossy edits are searched, and measured on held-out samples.

    Exit codes: 0 done, 1 the budget cannot be met, 2 bad usage or input, 3 a rewrite proved wrong, 4 a required pass
    changed nothing.
    """
    arguments = _arguments(given)
    if given["as_python"]:
        click.echo(_as_python(model, given, arguments))
        return 0
    if given["why"] not in (None, "regions"):
        from burnish.passes import catalog

        catalog.load(given["why"])
    if given["output"] is None and not given["dry_run"]:
        raise click.UsageError("name the output with `-o OUT`, or ask for `--dry-run`")
    if given["report"] is not None:
        _check_report(given["report"], given["output"])
    if given["plot"] is not None:
        _check_plot(given)

    from burnish.tools import api, report

    with terminal.progress("optimize") as on_step:
        result = api.optimize(
            _source(model), None if given["dry_run"] else given["output"], **arguments, on_step=on_step
        )
    if given["report"] is not None:
        report.write(result, given["report"])
    if given["plot"] is not None:
        report.draw(result, given["plot"])
    if given["why"] is not None:
        report.why(result, given["why"])
    else:
        report.show(result, plan=given["dry_run"])
    return 0


def _source(model: str) -> str:
    from burnish.ir.errors import InputError

    if not Path(model).exists():
        raise InputError(
            "there is no such file", place=model, hint="check the path; nothing is looked up on the network"
        )
    return model


def _arguments(given: dict[str, Any]) -> dict[str, Any]:
    chosen: dict[str, Any] = {key: given[key] for key in _PASSED if given[key] is not None}
    if given["heal_with"] is not None:
        chosen["heal"] = given["heal_with"] or True
    if given["passes"]:
        chosen["passes"] = list(given["passes"])
    if given["without"]:
        chosen["without"] = list(given["without"])
    if given["guard"]:
        chosen["guard"] = [one for one in given["guard"] if one != "off"]
    if given["require_change"]:
        chosen["require"] = list(given["require_change"])
    return chosen


def _as_python(model: str, given: dict[str, Any], arguments: dict[str, Any]) -> str:
    output = None if given["dry_run"] else given["output"]
    shown = [repr(model), *([repr(output)] if output is not None else [])]
    shown += [f"{key}={value!r}" for key, value in arguments.items()]
    after = [f"report.write(result, {given['report']!r})"] if given["report"] is not None else []
    if given["plot"] is not None:
        after.append(f"report.draw(result, {given['plot']!r})")
    show = "report.show(result, plan=True)" if given["dry_run"] else "report.show(result)"
    after.append(f"report.why(result, {given['why']!r})" if given["why"] is not None else show)
    call = "".join(f"    {one},\n" for one in shown)
    return "\n".join(
        ["import burnish", "from burnish.tools import report", "", f"result = burnish.optimize(\n{call})", *after]
    )


def _check_plot(given: dict[str, Any]) -> None:
    """Check, before any work is done, that there will be something to draw and that it can be written."""
    from burnish.ir.errors import InputError
    from burnish.passes import plan
    from burnish.tools import plots

    plots.check(given["plot"])
    others = [given[key] for key in ("output", "report") if given[key] is not None]
    if Path(given["plot"]).resolve() in [Path(other).resolve() for other in others]:
        raise InputError("the picture has the name of another output", place=given["plot"], hint="give it its own name")
    budget = {key: given[key] for key in ("max_drop", "max_size", "max_latency", "objective")}
    if not plan.resolve(given["recipe"], given["passes"] or None, given["without"], **budget).budget:
        raise InputError("nothing is searched, so there is nothing to draw", place="--plot", hint="add `--max-drop 1%`")


def _check_report(path: str, output: str | None) -> None:
    """Check, before any work is done, that a report can be written and replaces nothing but an older report."""
    import os

    from burnish.ir.errors import InputError
    from burnish.tools.page import render

    file = Path(path)
    if not file.parent.is_dir() or not os.access(file.parent, os.W_OK) or (file.exists() and not file.is_file()):
        raise InputError("the report cannot be written there", place=path, hint="name a file in a folder that exists")
    if output is not None and file.resolve() == Path(output).resolve():
        raise InputError("the report and the model have the same name", place=path, hint="give the report another name")
    if render.is_called_page(file):
        render.check_target(path)
    elif file.exists():
        with file.open("rb") as stream:
            if stream.read(1) not in (b"", b"{"):
                raise InputError("there is a file that is no report", place=path, hint="give the report another name")
