"""`burnish bench`: time models in one backend or several, in turns."""

from __future__ import annotations

import json
from typing import Any

import click

from burnish.tools import terminal
from burnish.tools.subject import parse_counts


@click.command("bench")
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path(), required=False, metavar="[B]")
@click.option(
    "--backend",
    "backends",
    default="ort-cpu",
    show_default=True,
    metavar="NAME,...",
    help="Of ort-cpu, ort-cuda, torch, torch-compile, torch-cuda, torch-compile-cuda, tvm.",
)
@click.option("--threads", default="1", show_default=True, metavar="N,...", help="Threads inside an operator.")
@click.option("--rounds", default=30, show_default=True, type=click.IntRange(min=3), help="Rounds of A B B A at most.")
@click.option(
    "--seconds", default=20.0, show_default=True, type=click.FloatRange(min=0), help="Time limit for each of --threads."
)
@click.option(
    "--data", metavar="D", help="Samples: .npz, a folder of them, or package.module:function. [default: made]"
)
@click.option("--dims", default="", metavar="NAME=N,...", help="Numbers for dynamic dimensions, by name or INPUT.AXIS.")
@click.option("--tuning-db", metavar="DIR", help="Tuning records that tvm compiles with.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of tables.")
def bench_command(
    a: str,
    b: str | None,
    backends: str,
    threads: str,
    rounds: int,
    seconds: float,
    data: str | None,
    dims: str,
    tuning_db: str | None,
    as_json: bool,
) -> None:
    """Time models in turns: A, or A and B, in each of the backends.

    A and B are .onnx files, or folders that `optimize --target llvm` wrote. What each computes is compared with ONNX
    Runtime on the CPU first; what computes something else is not timed.
    """
    from burnish.ir.errors import VerificationError
    from burnish.tools import bench_backends, benchmark

    found = benchmark.benchmark(
        a,
        b,
        backends=bench_backends.parse(backends),
        threads=parse_counts(threads, "--threads", "thread counts"),
        rounds=rounds,
        seconds=seconds,
        data=data,
        dims=dims,
        tuning_db=tuning_db,
    )
    if as_json:
        click.echo(json.dumps(found, indent=2, allow_nan=False))
    else:
        _print_tables(found)
    wrong = [row for row in found["latency"] if row["status"] == "wrong"]
    if wrong:
        row = wrong[0]
        cause = f"{row['backend']} computes something else: {row['reason']}"
        raise VerificationError(cause, place=found[row["model"]], hint="it was not timed")


def _print_tables(found: dict[str, Any]) -> None:
    from rich.table import Table

    out, talk = terminal.out(), terminal.talk()
    rows = found["latency"]
    many = any("ratio" in row for row in rows)
    columns = ["threads", "model", "backend", "error", "ready s", "ms", "10 to 90 %"]
    columns += ["ratio", "95 % interval"] if many else []
    table = Table(*columns, "rounds", "", title="Latency", title_justify="left", box=None, pad_edge=False)
    for row in rows:
        table.add_row(*map(terminal.printable, _cells(row, many)))
    terminal.show(table, out)
    if found["session_creation"]:
        creation = Table(
            "model", "ms", "10 to 90 %", title="Session creation", title_justify="left", box=None, pad_edge=False
        )
        for name, spread in found["session_creation"].items():
            creation.add_row(terminal.printable(found[name]), _ms(spread["median"]), _span(spread))
        out.print()
        terminal.show(creation, out)
    shapes = ", ".join(f"{name} {'x'.join(map(str, shape)) or 'scalar'}" for name, shape in found["shapes"].items())
    for name in ("a", "b"):
        if found[name] is not None:
            talk.print(f"{name.upper()}: {found[name]}")
    talk.print(f"sample: {found['sample']} ({shapes})")
    for line in dict.fromkeys(f"{row['model'].upper()} {row['backend']}: {row['runtime']}" for row in _ran(rows)):
        talk.print(line)


def _cells(row: dict[str, Any], many: bool) -> list[str]:
    cells = [str(row["threads"]), row["model"].upper(), row["backend"]]
    error = row.get("error")
    cells.append("" if error is None else "0" if error == 0 else f"{error:.1e}")
    cells.append(f"{row['ready']:.3g}" if "ready" in row else "")
    spread, ratio = row.get("seconds"), row.get("ratio")
    cells += ["", ""] if spread is None else [_ms(spread["median"]), _span(spread)]
    if many:
        cells += ["", ""] if ratio is None else [f"{ratio['median']:.3f}", f"{ratio['low']:.3f} to {ratio['high']:.3f}"]
    cells.append(str(row.get("rounds", "")))
    status = "" if row["status"] == "timed" else f"{row['status']}: "
    return [*cells, status + row["reason"]]


def _ran(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if "runtime" in row]


def _span(spread: dict[str, float]) -> str:
    return f"{_ms(spread['low'])} to {_ms(spread['high'])}"


def _ms(seconds: float) -> str:
    number = seconds * 1000
    return f"{number:.3f}" if number < 10 else f"{number:.1f}"
