"""`burnish check`: lock what a model is, say what changed since, for one model or for folders of them."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from burnish.tools import terminal

if TYPE_CHECKING:
    from burnish.tools.check.difference import Report
    from burnish.tools.check.lock import Lock
    from burnish.tools.page.parts import Page

_F = TypeVar("_F", bound=Callable[..., Any])

_data = click.option(
    "--data", metavar="D", help="Samples: .npz, a folder of them, or package.module:function. [default: made]"
)
_metric = click.option("--metric", metavar="M", help="Measure this on the samples: a name or package.module:function.")
_latency = click.option("--latency", is_flag=True, help="Time the model as a ratio to a matrix product.")
_no_run = click.option("--no-run", is_flag=True, help="Run nothing: compare what can be read from the graph.")
_threads = click.option(
    "--threads", default=1, show_default=True, type=click.IntRange(1, 1024), help="Threads of the runtime."
)
_tolerance = click.option("--tolerance", metavar="FILE", help="What may differ, by field: a YAML file.")


def _reports(command: _F) -> _F:
    for name, what in (("sarif", "SARIF 2.1.0"), ("junit", "JUnit XML"), ("json", "one JSON document")):
        say = f"Write {what} to this file, or with `-` to stdout in place of the text."
        command = click.option(f"--{name}", f"{name}_file", metavar="FILE", help=say)(command)
    say = "Write a page to read to this file."
    return click.option("--report", "page_file", metavar="FILE.html", help=say)(command)


@click.group("check", context_settings={"help_option_names": ["-h", "--help"]})
def check_command() -> None:
    """Keep exported models from changing unnoticed.

    `lock` writes what a model is into a small text file, `run` says what differs from it, `matrix` compares folders.
    """


@check_command.command("lock")
@click.argument("model", type=click.Path())
@click.option("-o", "--output", metavar="FILE", help="The lock file. [default: MODEL's name with .lock.yaml]")
@_data
@_metric
@_latency
@_no_run
@_threads
def lock_command(
    model: str, output: str | None, data: str | None, metric: str | None, latency: bool, no_run: bool, threads: int
) -> int:
    """Write what MODEL is into a lock file, for `check run`."""
    from burnish.tools import check_api
    from burnish.tools.check import files

    path = output or str(check_api.beside(model))
    files.agree({"--output": path}, [model, data])
    made = check_api.lock(model, path, data=data, metric=metric, latency=latency, run=not no_run, threads=threads)
    terminal.out().print(f"wrote `{path}`: {_summary(made)}")
    return 0


def _summary(lock: Lock) -> str:
    count = terminal.count
    parts = [
        count(lock.sizes.nodes, "node"),
        f"{terminal.quantity(lock.sizes.parameters)} parameters",
    ]
    if "blocks" in lock.views:
        parts.append(count(lock.views["blocks"], "block"))
    if lock.samples is not None:
        kind = "given" if lock.samples.given else "made"
        parts.append(f"{count(len(lock.outputs), 'output')} on {count(len(lock.values), f'{kind} sample')}")
    if lock.metric is not None:
        parts.append(f"{lock.metric.name} {lock.metric.value:.4g}")
    if lock.latency is not None:
        parts.append(f"{lock.latency.ratio:.3g} times a {lock.latency.reference}")
    return ", ".join(parts)


@check_command.command("run")
@click.argument("models", metavar="MODEL...", nargs=-1, required=True, type=click.Path())
@click.option("--lock", "lock_path", metavar="FILE", help="The lock file. [default: MODEL's name with .lock.yaml]")
@click.option("--if-locked", is_flag=True, help="Leave models alone that have no lock file.")
@click.option("--old", metavar="OLD.onnx", help="The model that was locked: names the node where the numbers part.")
@_tolerance
@click.option("--update", is_flag=True, help="Accept what changed: write the lock file anew.")
@_data
@_metric
@_latency
@_no_run
@_threads
@_reports
def run_command(
    models: tuple[str, ...],
    lock_path: str | None,
    if_locked: bool,
    old: str | None,
    tolerance: str | None,
    update: bool,
    data: str | None,
    metric: str | None,
    latency: bool,
    no_run: bool,
    threads: int,
    json_file: str | None,
    junit_file: str | None,
    sarif_file: str | None,
    page_file: str | None,
) -> int:
    """Say what differs between each MODEL and its lock file.

    Exit code 0 when nothing regressed, 1 when something did, 2 when a model could not be checked.
    """
    from burnish.ir.errors import BurnishError, InputError
    from burnish.tools import check_api
    from burnish.tools.check import files, lock_file
    from burnish.tools.check import tolerances as allowed

    def renew() -> None:
        for report in reports if update else ():
            lock_file.write(report.new, report.lock)

    for option, given in (("--lock", lock_path), ("--old", old), ("--data", data)):
        if given is not None and len(models) > 1:
            raise InputError("this is for one model", place=f"{option} {given}", hint="check the models one by one")
    locks = {model: lock_path or str(check_api.beside(model)) for model in models}
    targets = {"--json": json_file, "--junit": junit_file, "--sarif": sarif_file, "--report": page_file}
    files.agree(targets, [*locks, *locks.values(), old, tolerance, data])
    _check_page(page_file)
    tolerances = None if tolerance is None else allowed.read(tolerance)
    asked: dict[str, Any] = {"data": data, "metric": metric, "latency": latency, "run": not no_run, "threads": threads}
    reports: list[Report] = []
    failures: dict[str, BurnishError] = {}
    for model, path in locks.items():
        if if_locked and not os.path.exists(path):
            continue
        try:
            if os.path.isfile(model) and not os.path.exists(path):
                raise InputError("there is no such lock file", place=path, hint=_how_to_lock(model, lock_path))
            reports.append(check_api.check(model, path, tolerances=tolerances, old=old, **asked))
        except BurnishError as error:
            failures[model] = error
    failed = {model: f"{one.place}: {one.cause}" if one.place else one.cause for model, one in failures.items()}
    said = (line for report in reports for line in _text(report, update))
    document, page = _documents(locks, reports, failed, old)
    _publish(targets, document, reports, failed, said=said, page=page, before_text=renew)
    if failures:
        *others, last = failures.values()
        for other in others:
            terminal.say_error(str(other))
        raise last
    return 0 if update or all(report.passed for report in reports) else 1


def _how_to_lock(model: str, lock: str | None) -> str:
    options = [*(["-o", lock] if lock else []), *(["--"] if model.startswith("-") else [])]
    return f"write it with `{shlex.join(['burnish', 'check', 'lock', *options, model])}`"


def _documents(
    locks: Mapping[str, str], reports: Sequence[Report], failed: Mapping[str, str], old: str | None
) -> tuple[dict[str, Any], Callable[[], Page]]:
    """The document for `--json` and what makes the page: those of the model, or of several those of `check matrix`."""
    from burnish.tools.check import as_json, matrix_said
    from burnish.tools.check.matrix import Row, State
    from burnish.tools.page.matrix_page import matrix_page

    if len(locks) == 1 and failed:
        ((model, reason),) = failed.items()
        return as_json.failure(model, locks[model], reason), lambda: _failed(model, reason)
    if len(locks) == 1 and reports:
        (report,) = reports
        return as_json.document(report), lambda: _page(report, old)
    found = {one.model: Row(one.model, State.FINE if one.passed else State.REGRESSION, one) for one in reports}
    found |= {model: Row(model, State.FAILED, reason=reason) for model, reason in failed.items()}
    rows = [found[model] for model in locks if model in found]
    return matrix_said.document(rows), lambda: matrix_page(rows)


def _page(report: Report, old: str | None) -> Page:
    from burnish.frontends import load
    from burnish.tools.page.check_page import check_page

    return check_page(report, None if old is None else load(old), load(report.model))


def _failed(model: str, reason: str) -> Page:
    from burnish.tools.page.check_page import failed_page

    return failed_page(model, reason)


def _check_page(path: str | None) -> None:
    """Refuse, before any work is done, a page that would replace something else."""
    if path is not None:
        from burnish.tools.page import render

        render.check_target(path)


def _text(report: Report, update: bool) -> Iterable[str]:
    from burnish.tools.check import said

    if not update:
        return said.lines(report)
    changed = report.new is not report.old
    verdict = f"`{report.lock}` is written anew" if changed else f"`{report.lock}` stays as it is"
    return [verdict, *said.listed(report.differences, accepted=True)]


@check_command.command("matrix")
@click.argument("old", type=click.Path())
@click.argument("new", type=click.Path())
@click.option("--jobs", type=click.IntRange(1, 256), metavar="N", help="Processes. [default: one per core]")
@_tolerance
@click.option(
    "--data", metavar="FOLDER", help="Samples of each model at its path: a/b.npz for a/b.onnx. [default: made]"
)
@_no_run
@_threads
@_reports
def matrix_command(
    old: str,
    new: str,
    jobs: int | None,
    tolerance: str | None,
    data: str | None,
    no_run: bool,
    threads: int,
    json_file: str | None,
    junit_file: str | None,
    sarif_file: str | None,
    page_file: str | None,
) -> int:
    """Compare every model of the folder OLD with its namesake in NEW, in parallel.

    Exit code 0 when none regressed, 1 when one did or is gone, 2 when one could not be checked.
    """
    from burnish.tools.check import files, matrix_said
    from burnish.tools.check.matrix import Options, State, exit_code, matrix
    from burnish.tools.page.matrix_page import matrix_page

    targets = {"--json": json_file, "--junit": junit_file, "--sarif": sarif_file, "--report": page_file}
    files.agree(targets, [tolerance])
    _check_page(page_file)
    options = Options(tolerance=tolerance, data=data, run=not no_run, threads=threads)
    with terminal.progress("check") as on_step:
        rows = matrix(old, new, options, jobs or len(os.sched_getaffinity(0)), on_step)
    reports = [row.report for row in rows if row.report is not None]
    failed = {os.path.join(new, row.name): row.reason for row in rows if row.state is State.FAILED}
    failed |= {os.path.join(old, row.name): "it is gone" for row in rows if row.state is State.REMOVED}
    head = f"{matrix_said.markdown(rows)}\n"
    _publish(targets, matrix_said.document(rows), reports, failed, head=head, page=lambda: matrix_page(rows))
    if files.STDOUT not in targets.values():
        table = terminal.table(matrix_said.sentence(rows), matrix_said.COLUMNS, map(matrix_said.cells, rows))
        terminal.show(table, terminal.out())
    return exit_code(rows)


def _publish(
    targets: Mapping[str, str | None],
    document: Mapping[str, Any],
    reports: Sequence[Report],
    failed: Mapping[str, str],
    said: Iterable[str] = (),
    head: str = "",
    *,
    page: Callable[[], Page],
    before_text: Callable[[], None] = lambda: None,
) -> None:
    """Annotate in GitHub Actions, write the reports that were asked for, and print.

    Args:
        targets: files by option, `-` for stdout.
        document: for `--json`.
        reports, failed: for the others: one report for each model, and reasons for those that could not be checked.
        said: the lines for stdout where no report goes there.
        head: Markdown above the step summary.
        page: makes the page for `--report`.
        before_text: done when all files are written and before anything goes to stdout, which may say that it is done.
    """
    from burnish.tools import whole_file
    from burnish.tools.check import as_github, as_json, as_junit, as_sarif, files
    from burnish.tools.page import render

    as_github.publish(reports, failed, head)
    made = {
        "--json": lambda: as_json.text(document),
        "--junit": lambda: as_junit.text(reports, failed),
        "--sarif": lambda: as_json.text(as_sarif.document(reports, failed)),
        "--report": lambda: render.html(page()),
    }
    for option, target in targets.items():
        if target not in (None, files.STDOUT):
            whole_file.write(target, made[option]())
    before_text()
    for option, target in targets.items():
        if target == files.STDOUT:
            click.echo(made[option](), nl=False)
            said = ()
    out = terminal.out()
    for line in said:
        out.print(line)
