"""`burnish inspect`: what a model consists of and what it costs.

A section of the report is a module `tools/inspect_NAME.py` that `--NAME` asks for. It has `report(subject, ...)`, which
gives its part of the JSON document, `show(found)`, which prints that as tables, and, where there is a picture of it,
`plot(found)`, which gives a matplotlib figure.
"""

from __future__ import annotations

import importlib
import json
from typing import Any

import click

from burnish.tools import terminal

SECTIONS: dict[str, tuple[str, ...]] = {
    "blocks": (),
    "utilization": ("data", "threads", "batch"),
    "memory": ("data", "threads"),
    "energy": ("data", "threads", "uses", "make_energy", "against", "watts", "seconds", "target"),
    "rank": ("data", "threads"),
    "criticality": ("data", "threads", "trials", "seed"),
}
"""The sections in the order in which they are printed, each with the options that only some of them take.

`data` and `threads` belong to the `Subject`; all others are arguments of `report`, as the user wrote them.
"""


@click.command("inspect")
@click.argument("model", type=click.Path())
@click.option("--blocks", is_flag=True, help="Residual blocks: what they do, which are alike, which can be dropped.")
@click.option("--utilization", is_flag=True, help="Each node's time, and how much of the machine it uses.")
@click.option("--memory", is_flag=True, help="What is alive when: the peak of the activations, and its parts.")
@click.option("--energy", is_flag=True, help="Joules per inference, and how many uses pay for the making.")
@click.option("--rank", is_flag=True, help="How many directions each layer's weight and, with --data, its input use.")
@click.option("--criticality", is_flag=True, help="What the outputs lose when a layer's weights are drawn anew.")
@click.option("--dims", default="", metavar="NAME=N,...", help="Numbers for dynamic dimensions, by name or INPUT.AXIS.")
@click.option("--data", metavar="D", help="Samples, as `optimize` reads them.  [default: made]")
@click.option("--threads", type=click.IntRange(1, 1024), help="Threads inside an operator.  [default: 1]")
@click.option("--batch", metavar="N,...", help="Batch sizes for --utilization.  [default: that of the sample]")
@click.option("--uses", metavar="N,...", help="Numbers of uses for --energy.  [default: 1e4,1e6,1e9]")
@click.option("--make-energy", type=float, metavar="J", help="Joules that went into making MODEL.  [default: 0]")
@click.option("--against", metavar="B", help="A model with the same inputs to hold MODEL's energy against.")
@click.option("--watts", type=float, metavar="W", help="Assume this power above idle, and read no meter.")
@click.option("--seconds", type=click.FloatRange(min=0.1), help="For how long --energy runs a model.  [default: 10]")
@click.option("--target", type=click.Choice(["ort-cpu", "ort-cuda"]), help="What --energy runs on.  [default: ort-cpu]")
@click.option("--trials", type=click.IntRange(min=1), help="Draws of each layer for --criticality.  [default: 3]")
@click.option("--seed", type=click.IntRange(min=0), help="Of the draws for --criticality.  [default: 0]")
@click.option("--top", type=click.IntRange(min=0), help="Length of lists.  [default: 10; --rank, --criticality: all]")
@click.option("--plot", metavar="FILE", help="Draw the one section asked for into FILE.svg or FILE.png.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of tables.")
def inspect_command(model: str, dims: str, top: int | None, plot: str | None, as_json: bool, **given: Any) -> None:
    """Show what MODEL consists of and what it costs: operators, parameters, multiply-adds, tensors, memory.

    With sections, show only these.
    """
    sections = [name for name in SECTIONS if given[name]]
    _check(sections, given, plot)

    from burnish.frontends import onnx_file
    from burnish.tools.subject import Subject

    shared: dict[str, Any] = {name: given[name] for name in ("data", "threads") if given.get(name) is not None}
    with terminal.progress("inspect") as on_step:
        if top is not None:
            shared |= {"top": top, "whole": False}
        subject = Subject(onnx_file.read(model), model, dims, on_step=on_step, **shared)
        found: dict[str, Any] = {}
        for name in sections or ["summary"]:
            options = {key: given[key] for key in SECTIONS.get(name, ()) if key not in ("data", "threads")}
            found[name] = _module(name).report(subject, **options)
    if plot is not None:
        _draw(sections[0], found[sections[0]], plot)
    if as_json:
        document = {"file": model, **found} if sections else found["summary"]
        click.echo(json.dumps(document, indent=2, allow_nan=False))
    else:
        for name, one in found.items():
            _module(name).show(one)


def _module(section: str) -> Any:
    return importlib.import_module(f"burnish.tools.inspect_{section}")


def _check(sections: list[str], given: dict[str, Any], plot: str | None) -> None:
    """Refuse options that none of the sections takes, before any work is done."""
    for option in {option: None for taken in SECTIONS.values() for option in taken}:
        takers = [name for name, taken in SECTIONS.items() if option in taken]
        if given[option] is not None and not set(takers) & set(sections):
            flags = " or ".join(f"`--{name}`" for name in takers)
            raise click.UsageError(f"`--{option.replace('_', '-')}` goes with {flags}")
    if plot is None:
        return
    drawn = [name for name in SECTIONS if hasattr(_module(name), "plot")]
    if len(sections) != 1 or sections[0] not in drawn:
        raise click.UsageError("`--plot` draws one section: " + ", ".join(f"`--{name}`" for name in drawn))

    from burnish.tools import plots

    plots.check(plot)


def _draw(section: str, found: dict[str, Any], path: str) -> None:
    from burnish.tools import plots

    with plots.style():
        plots.save(_module(section).plot(found), path)
    terminal.talk().print(f"drawn: {path}")
