"""How burnish speaks: data to stdout, talk to stderr, errors with place, cause and hint, and the exit codes."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
import traceback
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

SWITCHES = {
    "BURNISH_CACHE": "folder for what was measured; else `$XDG_CACHE_HOME/burnish`, else `~/.cache/burnish`",
    "BURNISH_DUMP": "folder for the model's text after every pass that changed it",
    "BURNISH_LIMIT": "stop after so many rewrites",
}
"""Environment variables that burnish reads, when it needs them."""

EXIT_CODES = {
    0: "done",
    1: "a budget or a check was missed",
    2: "could not run: usage or bad input",
    3: "verification failed",
    4: "nothing changed although required",
}


def out() -> Console:
    """The console for data: stdout."""
    return _console(sys.stdout.isatty())


def show(table: Table, console: Console) -> None:
    """Print a table. In a file or a pipe its rows stay on one line each, without blanks at their ends."""
    if console.is_terminal:
        console.print(table)
        return
    console.width = _WIDTH_OF_FILES
    with console.capture() as capture:
        console.print(table)
    for line in capture.get().splitlines():
        console.print(line.rstrip())


_WIDTH_OF_FILES = 400


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table with a title and a blank line above it; a column whose name starts with `>` is right-aligned."""
    from rich.table import Table

    made = Table(title=f"\n{title}", title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in columns:
        made.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left", overflow="fold")
    for row in rows:
        made.add_row(*map(printable, row))
    return made


def talk() -> Console:
    """The console for everything said to a person: stderr."""
    return _console(sys.stderr.isatty(), stderr=True)


def _console(is_terminal: bool, **settings: Any) -> Console:
    from rich.console import Console

    class Plain(Console):
        """Prints text as it is, save for what would move the cursor or colour the screen: names come from the file."""

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

        def print(self, *objects: Any, **options: Any) -> None:
            super().print(*(inert(printable(one, "\n")) if isinstance(one, str) else one for one in objects), **options)

    return Plain(soft_wrap=not is_terminal, highlight=False, markup=False, emoji=False, **settings)


def printable(text: str, kept: str = "") -> str:
    """`text` with control characters written out, save those `kept`."""
    return text if text.isprintable() else "".join(c if c.isprintable() or c in kept else ascii(c)[1:-1] for c in text)


def prose(text: str) -> str:
    """Text of any language as it is; control characters other than tabs and ends of lines are written out."""
    return "".join(ascii(c)[1:-1] if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)


def run(command: Callable[..., Any], **settings: Any) -> None:
    """Run a click command and end the process with its exit code; errors become one message on stderr."""
    import click

    from burnish.ir.errors import BurnishError

    _open_streams()
    with suppress(ValueError):  # signals belong to the main thread
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = command(standalone_mode=False, **settings)
        sys.stdout.flush()
    except SystemExit as error:  # click ends with 1 when the reader of a pipe is gone
        sys.exit(141 if error.code == 1 else error.code)
    except BurnishError as error:
        say_error(str(error))
        sys.exit(error.exit_code)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr)
        sys.exit(2)
    except click.ClickException as error:
        place = getattr(getattr(error, "ctx", None), "command_path", None)
        say_error(error.format_message() + (f"\n\nhint: `{place} --help` shows the usage" if place else ""))
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        say_error("interrupted; the output is whole or as it was before")
        sys.exit(2)
    except BrokenPipeError:
        _drop_output()
        sys.exit(141)
    except MemoryError:
        say_error("out of memory\n\nhint: give smaller samples; `optimize` needs least with `--verify off`")
        sys.exit(2)
    except OSError as error:
        _drop_output()
        place = f"{error.filename}: " if error.filename is not None else ""
        say_error(f"{place}{error.strerror or error}\n\nhint: check the path, and the disk that is written to")
        sys.exit(2)
    except Exception as error:
        say_error(f"{type(error).__name__}: {error}\n{_where(error)}\n\nhint: this is a defect of burnish; report it")
        sys.exit(2)
    else:
        sys.exit(code if isinstance(code, int) else 0)


def _open_streams() -> None:
    """Give closed standard streams to the null device, lest a file that is opened later take their number.

    What a stream's encoding lacks (a file name in Japanese, where the terminal knows ASCII) is printed as an escape.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            with suppress(OSError):
                os.fstat(number)
                continue
            setattr(sys, name, open(os.open(os.devnull, os.O_RDWR), "w" if number else "r"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _drop_output() -> None:
    """Let what could not be written to stdout not be tried again when Python ends."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _where(error: BaseException) -> str:
    """The innermost place in the code, for a report."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"    {frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def say_error(message: str) -> None:
    """Print an error on stderr."""
    print(inert(printable(f"error: {message}", "\n")), file=sys.stderr)


def in_actions() -> bool:
    """Whether this runs in GitHub Actions."""
    return os.environ.get("GITHUB_ACTIONS") == "true"


def inert(text: str) -> str:
    """Text that GitHub Actions reads no command from, when that is where it is printed.

    Its runner takes lines that begin with `::` for commands, and `##[` anywhere in a line; names may hold both.
    """
    return re.sub(r"^(\s*)::", r"\1\\::", text.replace("##[", "## ["), flags=re.MULTILINE) if in_actions() else text


@contextmanager
def progress(title: str) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr, shown once the work has taken two seconds; silent when stderr is no terminal.

    Yields:
        A function to call with (what is done now, its number, how many there are).
    """
    if not sys.stderr.isatty():
        yield lambda what, number, total: None
        return
    import threading

    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn(title), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    bar = Progress(*columns, console=talk(), transient=True)
    task, ended, lock = bar.add_task(""), threading.Event(), threading.Lock()

    def begin() -> None:
        with lock:
            if not ended.is_set():
                bar.start()

    timer = threading.Timer(2, begin)
    timer.daemon = True
    timer.start()
    try:
        yield lambda what, number, total: bar.update(task, description=what, completed=number, total=total)
    finally:
        timer.cancel()
        with lock:
            ended.set()
        bar.stop()


def size(count: float) -> str:
    """Bytes as a person reads them, in powers of 1000."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def count(number: int, thing: str) -> str:
    """A number of things: `1 output`, `3 outputs`."""
    return f"{number} {thing}{'s' * (number != 1)}"


def quantity(number: float | None) -> str:
    """A number in powers of 1000, three digits: 385 M; `?` for an unknown one."""
    if number is None:
        return "?"
    power, rest = 0, float(f"{number:.3g}")
    while abs(rest) >= 1000 and power < 5:
        power, rest = power + 1, rest / 1000
    return f"{rest:.3g} {' kMGTP'[power]}".rstrip()


def shape(sizes: Sequence[int | str | None] | None) -> str:
    """The dimensions of a tensor: `[batch, 3, ?]`; `?` when not even their number is known."""
    return "?" if sizes is None else "[" + ", ".join("?" if one is None else str(one) for one in sizes) + "]"


def shapes(inputs: Mapping[str, Sequence[int]]) -> str:
    """The shapes of a sample: `ids [1, 5], mask [1, 5]`, of the first few inputs of many."""
    some = [f"{name} {shape(sizes)}" for name, sizes in list(inputs.items())[:_INPUTS]]
    more = len(inputs) - len(some)
    return ", ".join([*some, *([f"and {count(more, 'more input')}"] if more else [])])


_INPUTS = 5


def unknown(reasons: Sequence[str], hint: str | None = None) -> None:
    """Say on stderr why numbers are missing, the first three reasons of them."""
    if reasons:
        more = f", and {len(reasons) - 3} more" if len(reasons) > 3 else ""
        talk().print(f"not everything is known: {'; '.join(reasons[:3])}{more}")
        if hint:
            talk().print(f"\nhint: {hint}")


def short(text: str, *, longest: int = 44) -> str:
    """A text of limited length; of a longer one the end stays, where names of nodes differ."""
    return text if len(text) <= longest else "…" + text[1 - longest :]
