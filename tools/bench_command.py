"""`burnish bench`: time a model, or two in turns."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import click

from burnish.tools import terminal
from burnish.tools.subject import Subject, parse_counts


@click.command("bench")
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path(), required=False, metavar="[B]")
@click.option("--threads", default="1", show_default=True, metavar="N,...", help="Threads inside an operator.")
@click.option("--rounds", default=30, show_default=True, type=click.IntRange(min=3), help="Rounds of A B B A at most.")
@click.option("--seconds", default=20.0, show_default=True, type=click.FloatRange(min=0), help="Time limit of a row.")
@click.option(
    "--data", metavar="D", help="Samples: .npz, a folder of them, or package.module:function. [default: made]"
)
@click.option("--dims", default="", metavar="NAME=N,...", help="Numbers for dynamic dimensions, by name or INPUT.AXIS.")
@click.option("--target", default="ort-cpu", show_default=True, type=click.Choice(["ort-cpu", "ort-cuda"]))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of tables.")
def bench_command(
    a: str,
    b: str | None,
    threads: str,
    rounds: int,
    seconds: float,
    data: str | None,
    dims: str,
    target: str,
    as_json: bool,
) -> None:
    """Time model A, or A and B in turns, in ONNX Runtime with its default optimizations."""
    counts = parse_counts(threads, "--threads", "thread counts")
    found = benchmark(a, b, threads=counts, rounds=rounds, seconds=seconds, data=data, dims=dims, target=target)
    if as_json:
        click.echo(json.dumps(found, indent=2, allow_nan=False))
    else:
        _print_tables(found)


def benchmark(
    a: str,
    b: str | None = None,
    *,
    threads: list[int],
    rounds: int = 30,
    seconds: float = 20.0,
    data: Any = None,
    dims: str = "",
    target: str = "ort-cpu",
) -> dict[str, Any]:
    """All that `burnish bench` shows, as the JSON document that `--json` prints; times are in seconds.

    Args:
        a: a model's file.
        b: another one with the same inputs, timed in turns with the first.
        threads: one row of results for each.
        rounds: how many rounds of A B B A at most (of A, when alone).
        seconds: time limit of a row.
        data: as for `read_samples`; the first sample that the model takes is used.
        dims: numbers for the dynamic dimensions of the made sample, `batch=1,seq=128`.
        target: `ort-cpu` or `ort-cuda`.

    Raises:
        InputError: a model cannot be loaded or refuses the sample.
    """
    from burnish.backends.ort import timing
    from burnish.backends.ort.session import from_path
    from burnish.frontends import onnx_file
    from burnish.ir.errors import InputError

    for path in (a, b):
        if path is not None and not Path(path).is_file():
            raise InputError("there is no such file", place=path, hint="check the path")
    sample = None
    rows: list[dict[str, Any]] = []
    options = ""
    for count in threads:
        first = from_path(a, threads=count, target=target)
        second = None if b is None else from_path(b, threads=count, target=target)
        if sample is None:
            sample = Subject(onnx_file.read(a), a, dims, data).sample(first)
        feeds = sample.feeds
        options = re.sub(r"\d+ threads?, ", "", first.options)
        if second is None:
            alone = timing.single(partial(first.run, feeds), rounds=rounds, seconds=seconds)
            rows.append({"threads": count, "rounds": alone.rounds, "a": _spread(alone)})
        else:
            try:
                second.run(feeds)
            except InputError as error:
                error.place, error.hint = b, "B must take the inputs of A; `--data` or `--dims` choose others"
                raise
            runs = partial(first.run, feeds), partial(second.run, feeds)
            both = timing.paired(*runs, rounds=rounds, seconds=seconds)
            ratio = {"median": both.ratio, "low": both.low, "high": both.high}
            times = {"a": {"median": both.median_a}, "b": {"median": both.median_b}}
            rows.append({"threads": count, "rounds": both.rounds, **times, "b_over_a": ratio})
            second.close()
        first.close()
    assert sample is not None
    creation = {name: _spread(timing.creation_time(path)) for name, path in (("a", a), ("b", b)) if path is not None}
    return {
        "a": a,
        "b": b,
        "sample": sample.name,
        "shapes": {name: list(array.shape) for name, array in sample.feeds.items()},
        "runtime": options,
        "latency": rows,
        "session_creation": creation,
    }


def _spread(found: Any) -> dict[str, float]:
    return {"median": found.median, "low": found.low, "high": found.high}


def _print_tables(found: dict[str, Any]) -> None:
    from rich.table import Table

    out, talk = terminal.out(), terminal.talk()
    pair = found["b"] is not None
    columns = ["threads", "A ms", "B ms", "B / A", "95 % interval"] if pair else ["threads", "ms", "10 to 90 %"]
    table = Table(*columns, "rounds", title="Latency", title_justify="left", box=None, pad_edge=False)
    for row in found["latency"]:
        a = row["a"]
        if pair:
            ratio = row["b_over_a"]
            cells = [_ms(a["median"]), _ms(row["b"]["median"]), f"{ratio['median']:.3f}"]
            cells.append(f"{ratio['low']:.3f} to {ratio['high']:.3f}")
        else:
            cells = [_ms(a["median"]), f"{_ms(a['low'])} to {_ms(a['high'])}"]
        table.add_row(str(row["threads"]), *cells, str(row["rounds"]))
    terminal.show(table, out)
    creation = Table(
        "model", "ms", "10 to 90 %", title="Session creation", title_justify="left", box=None, pad_edge=False
    )
    for name, spread in found["session_creation"].items():
        span = f"{_ms(spread['low'])} to {_ms(spread['high'])}"
        creation.add_row(found[name], _ms(spread["median"]), span)
    out.print()
    terminal.show(creation, out)
    shapes = ", ".join(f"{name} {'x'.join(map(str, shape)) or 'scalar'}" for name, shape in found["shapes"].items())
    talk.print(f"sample: {found['sample']} ({shapes})")
    talk.print(found["runtime"])


def _ms(seconds: float) -> str:
    number = seconds * 1000
    return f"{number:.3f}" if number < 10 else f"{number:.1f}"
