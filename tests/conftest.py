"""Collects the golden files of passes, `tests/passes/*.md`, each case as a test of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from golden import read_cases, run_case
from laws import LawBroken

from burnish.ir.errors import BurnishError

_GOLDEN = Path(__file__).parent / "passes"


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--bless`: write what the passes do into their golden files; read the difference before committing it."""
    parser.addoption("--bless", action="store_true", help="rewrite the expectations in golden files")


def pytest_collect_file(parent: pytest.Collector, file_path: Path) -> pytest.Collector | None:
    """Golden files are Markdown files in `tests/passes`."""
    if file_path.suffix == ".md" and file_path.parent == _GOLDEN:
        return GoldenFile.from_parent(parent, path=file_path)
    return None


@pytest.fixture(scope="session", autouse=True)
def cache_of_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests measure is kept apart from what the user measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BURNISH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of scores and times for one test."""
    monkeypatch.setenv("BURNISH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class GoldenFile(pytest.File):
    """The golden file of one pass."""

    def collect(self) -> Iterator[pytest.Item]:
        """One item per case, named by its sentence."""
        seen: Counter[str] = Counter()
        for index, case in enumerate(read_cases(self.path.read_text())):
            seen[case.sentence] += 1
            number = f" ({seen[case.sentence]})" if seen[case.sentence] > 1 else ""
            item: GoldenItem = GoldenItem.from_parent(self, name=case.sentence + number)
            item.index = index
            yield item


class GoldenItem(pytest.Item):
    """One case of a golden file."""

    index: int

    def runtest(self) -> None:
        """Run the pass, compare or bless, and check the laws."""
        run_case(self.path, self.index, self.config.getoption("bless"))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: str | None = None) -> object:
        """A broken law or an error of burnish speaks for itself; anything else is shown with its traceback."""
        if isinstance(excinfo.value, LawBroken | BurnishError):
            return str(excinfo.value)
        return super().repr_failure(excinfo)  # type: ignore[arg-type]

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """Where the case is, for reports."""
        return self.path, None, self.name
