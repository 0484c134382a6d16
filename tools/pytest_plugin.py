"""The pytest plugin: the fixture `graph_regression`, `--graph-update`, and what the run says about its lock files.

It is loaded with every run of pytest where burnish is installed, so nothing heavy is imported before a test checks a
model. `burnish.tools.graph_regression` has the check itself.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from burnish.tools.graph_regression import GraphRegression

SUFFIX = ".lock.yaml"


@dataclass
class Ledger:
    """What happened to lock files in this process, and with xdist in all of its workers.

    Attributes:
        root: what files are shown relative to.
        update: whether locks are written and renewed.
        folder: where all locks lie; None for beside their tests.
        used: the locks that a test checked, wrote or renewed.
        changes: what was written or renewed, in sentences, by lock.
        collected: how many tests a test file has, for files that have a folder of locks.
        partial: test files of which some tests were left out.
        passed: the tests that passed, by test file.
    """

    root: Path
    update: bool = False
    folder: Path | None = None
    used: set[str] = field(default_factory=set)
    changes: dict[str, list[str]] = field(default_factory=dict)
    collected: dict[str, int] = field(default_factory=dict)
    partial: set[str] = field(default_factory=set)
    passed: dict[str, set[str]] = field(default_factory=dict)

    def locks_of(self, test_file: Path) -> Path:
        """The folder of a test file's locks."""
        if self.folder is None:
            return test_file.with_suffix("")
        inside = test_file.relative_to(self.root) if test_file.is_relative_to(self.root) else Path(test_file.name)
        return self.folder / inside.with_suffix("")

    def shown(self, path: Path) -> str:
        """A path as people read it: from the root where it lies below."""
        return (path.relative_to(self.root) if path.is_relative_to(self.root) else path).as_posix()

    def sent(self) -> dict[str, Any]:
        """What a worker tells its controller, as plain data."""
        return {
            "used": sorted(self.used),
            "changes": self.changes,
            "collected": self.collected,
            "partial": sorted(self.partial),
        }

    def received(self, told: dict[str, Any]) -> None:
        """Add what a worker tells."""
        self.used.update(told["used"])
        self.changes.update(told["changes"])
        self.collected.update(told["collected"])
        self.partial.update(told["partial"])

    def unused(self) -> list[str]:
        """The locks beside test files of which every test ran and passed that none of these tests used."""
        whole = [
            file
            for file, count in self.collected.items()
            if file not in self.partial and len(self.passed.get(file, ())) == count
        ]
        found = [self.shown(one) for file in whole for one in self.locks_of(self.root / file).glob(f"*{SUFFIX}")]
        return sorted(set(found) - self.used)


LEDGER = pytest.StashKey[Ledger]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--graph-update` and the ini option `graph_locks`."""
    group = parser.getgroup("burnish", "regression of exported graphs")
    group.addoption(
        "--graph-update",
        action="store_true",
        help="write missing lock files of `graph_regression` and renew those that differ",
    )
    parser.addini(
        "graph_locks", "folder for all lock files of `graph_regression`; by default they lie beside the tests"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Opens the ledger."""
    folder = config.getini("graph_locks")
    config.stash[LEDGER] = Ledger(
        root=config.rootpath,
        update=bool(config.getoption("graph_update")),
        folder=config.rootpath / folder if folder else None,
    )


@pytest.fixture
def graph_regression(request: pytest.FixtureRequest) -> GraphRegression:
    """Compare a model with its lock file: `graph_regression.check(model_or_module, samples)`."""
    from burnish.tools.graph_regression import GraphRegression

    return GraphRegression(request.node, request.config.stash[LEDGER])


def pytest_deselected(items: list[pytest.Item]) -> None:
    """Remembers the files of which tests are left out."""
    for item in items:
        item.config.stash[LEDGER].partial.add(_file(item.nodeid))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Counts the tests of the files that have locks."""
    ledger = session.config.stash[LEDGER]
    counts = Counter(_file(item.nodeid) for item in session.items)
    ledger.collected = {file: n for file, n in counts.items() if ledger.locks_of(ledger.root / file).is_dir()}


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tells a worker's ledger to the controller."""
    told = getattr(session.config, "workeroutput", None)
    if told is not None:
        told["burnish"] = session.config.stash[LEDGER].sent()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Receives the ledger of a worker of xdist; one that crashed has none."""
    told = getattr(node, "workeroutput", {}).get("burnish")
    if told is not None:
        node.config.stash[LEDGER].received(told)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Says which locks were written and renewed, what was accepted, and which no test used."""
    ledger = config.stash[LEDGER]
    for report in terminalreporter.stats.get("passed", []):
        if report.when == "call":
            ledger.passed.setdefault(_file(report.nodeid), set()).add(report.nodeid)
    some = any("::" in argument for argument in config.args) or config.getoption("lf", default=False)
    unused = [] if some else ledger.unused()
    if not ledger.changes and not unused:
        return
    terminalreporter.section("graph locks")
    for lock, sentences in sorted(ledger.changes.items()):
        terminalreporter.line(f"{lock}: {sentences[0]}")
        for sentence in sentences[1:]:
            terminalreporter.line(f"    {sentence}")
    for lock in unused:
        terminalreporter.line(f"{lock}: no test used it; delete it if its test is gone")


def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0]
