"""The laws of the repository's layout."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from burnish.passes import catalog
from burnish.tools.terminal import SWITCHES

ROOT = Path(__file__).parent.parent
FOLDERS = ("backends", "frontends", "ir", "passes", "tools")
LARGEST_MODULE = 400
LARGEST_PASS = 200
WORDS = ("anthropic", "chatgpt", "claude", "openai", "/work/", "shared/")
ALLOWED = {"openai": ("openai/clip", "openai/whisper")}
"""Words that no tracked file holds, and where they are names of published models."""


def modules() -> list[Path]:
    """Every Python file of the package."""
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def tracked() -> list[Path]:
    """Every file that git tracks; the test is skipped where there is no git checkout."""
    found = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip("not a git checkout")
    return [path for name in found.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_every_pass_has_a_golden_file_and_every_golden_file_a_pass() -> None:
    golden = {path.stem.replace("_", "-") for path in (ROOT / "tests" / "passes").glob("*.md")}
    assert golden == set(catalog.names())


@pytest.mark.parametrize("name", catalog.names())
def test_a_pass_says_in_one_line_what_it_does(name: str) -> None:
    first, *rest = (catalog.load(name).__doc__ or "").strip().splitlines() or [""]
    assert first.endswith(".") and (not rest or not rest[0].strip()), "the first docstring line is the help text"


def test_no_module_and_no_pass_is_too_long() -> None:
    passes = {catalog.load(name).__module__.replace("burnish.", "", 1) for name in catalog.names()}
    lengths = {}
    for path in [*modules(), *sorted((ROOT / "tests").rglob("*.py"))]:
        place = path.relative_to(ROOT)
        largest = LARGEST_PASS if ".".join(place.with_suffix("").parts) in passes else LARGEST_MODULE
        count = len(path.read_text().splitlines())
        if count > largest:
            lengths[str(place)] = f"{count} lines, allowed are {largest}"
    assert not lengths


@pytest.mark.parametrize("statement", ["import burnish", "import burnish.tools.cli"])
def test_importing_burnish_loads_nothing_heavy(statement: str) -> None:
    heavy = ("torch", "tvm", "onnxruntime", "onnx", "onnx_ir", "onnxscript", "numpy", "scipy", "networkx")
    code = f"{statement}; import sys; print(*[name for name in {heavy!r} if name in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT / ".src")}, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == ""


def test_the_import_package_links_to_the_visible_folders() -> None:
    for folder in FOLDERS:
        link = ROOT / ".src" / "burnish" / folder
        assert link.is_symlink() and link.resolve() == (ROOT / folder).resolve()


def test_every_folder_with_python_files_is_a_package() -> None:
    assert not [str(path.parent) for path in modules() if not (path.parent / "__init__.py").is_file()]


def test_the_table_of_switches_is_what_the_code_reads() -> None:
    read = re.compile(r"environ(?:\.get\(|\[)\s*[\"'](BURNISH_[A-Z_]+)[\"']")
    found = {name for path in modules() for name in read.findall(path.read_text())}
    assert found == set(SWITCHES)


def test_no_tracked_file_names_private_places_or_advertises() -> None:
    found = []
    for path in tracked():
        if path == Path(__file__) or path.suffix in (".onnx", ".npz", ".png", ".svg"):
            continue
        source = path.read_text(errors="replace").lower()
        for word in WORDS:
            legit = sum(source.count(name) for name in ALLOWED.get(word, ()))
            if source.count(word) > legit:
                found.append(f"{path.relative_to(ROOT)}: `{word}`")
    assert not found
