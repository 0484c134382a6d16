"""The documentation: its examples run and print what it shows, its links lead somewhere, its tables are complete."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import pytest
import small_decoder
from examples import blocks, headings, matches, run_page

from burnish.backends.ort import timing
from burnish.passes import catalog
from burnish.tools import cli
from burnish.tools.research import pass_pages
from burnish.tools.terminal import EXIT_CODES, SWITCHES

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
EXAMPLES = [page for page in PAGES if {block.kind for block in blocks(page.read_text())} & {"console", "python"}]
MODELS = {"digits_vit.onnx": "model.onnx", "digits_resnet.onnx": "resnet.onnx", "digits.npz": "digits.npz"}
LINK = re.compile(r"(?:\]\(|<img [^>]*src=\")([^)\"\s]+)")


def name(page: Path) -> str:
    """A page's path from the root."""
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize(
    "page",
    [one for one in PAGES if {block.kind for block in blocks(one.read_text())} & {"console", "python"}],
    ids=name,
)
def test_examples_print_what_the_page_shows(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    for source, target in MODELS.items():
        shutil.copy(ROOT / "tools" / "demo" / source, tmp_path / target)
    if "decoder/" in page.read_text(encoding="utf-8"):
        small_decoder.folder(tmp_path / "decoder")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    timed = timing.Clock.__call__
    monkeypatch.setattr(  # on a busy machine no pass is to be undone for its latency
        timing.Clock, "__call__", lambda *given: dataclasses.replace(timed(*given), slower=False)
    )
    run_page(page, monkeypatch, bless=request.config.getoption("bless"))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for block in reversed(blocks(text)):
        text = text[: block.start] + text[block.end :]
    lost = []
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in headings(target.read_text(encoding="utf-8"))):
            lost.append(link)
    assert not lost


def test_the_index_leads_to_every_page() -> None:
    index = DOCS / "index.md"
    linked = {(DOCS / link.partition("#")[0]).resolve() for link in LINK.findall(index.read_text(encoding="utf-8"))}
    lost = [page for page in DOCS.rglob("*.md") if page != index and not linked & {page, page.parent}]
    assert not lost, "link it in docs/index.md"


def test_every_command_has_a_page() -> None:
    assert {page.stem for page in (DOCS / "commands").glob("*.md")} == set(cli.COMMANDS)


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_the_page_of_a_command_names_its_options(command: str) -> None:
    found = cli.burnish.get_command(None, command)  # type: ignore[arg-type]
    assert found is not None
    page = (DOCS / "commands" / f"{command}.md").read_text(encoding="utf-8")
    parts = [found, *getattr(found, "commands", {}).values()]
    options = [option for part in parts for one in part.params for option in one.opts if option.startswith("--")]
    assert not [option for option in options if f"`{option}" not in page and f" {option}`" not in page]


def test_the_page_of_the_passes_is_fresh(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("bless"):
        pass_pages.PAGE.write_text(pass_pages.page(), encoding="utf-8")
    page = pass_pages.PAGE.read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)$", page, re.MULTILINE) == catalog.names()
    assert page == pass_pages.page(), "run `python -m burnish.tools.research.pass_pages`"


def test_the_reference_lists_every_exit_code_and_switch() -> None:
    page = (DOCS / "reference.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `?(\w+)`? \| (.*?) \|", page, re.MULTILINE))
    assert {code: rows.get(str(code)) for code in EXIT_CODES} == EXIT_CODES
    assert {switch: rows.get(switch) for switch in SWITCHES} == SWITCHES


@pytest.mark.parametrize(
    ("shown", "printed", "measured", "same"),
    [
        ("a ... c\n", "a b c   \n", False, True),
        ("a\n...\nd\n", "a\nb\nc\nd\n", False, True),
        ("a\n...\nd\n", "a\nd\n", False, True),
        ("a 1.5 ms\n", "a  27.25 ms\n", True, True),
        ("a 1.5 ms\n", "a 27.25 ms\n", False, False),
        ("error 8.8e-07\n", "error 1.2e-06\n", True, True),
        ("a\n", "a\nb\n", False, False),
        ("", "a\n", False, False),
    ],
)
def test_what_matches(shown: str, printed: str, measured: bool, same: bool) -> None:
    assert matches(shown, printed, measured=measured) is same
