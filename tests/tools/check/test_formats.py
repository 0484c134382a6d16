"""Reports as text, JSON, JUnit, SARIF and for GitHub Actions: they are read back whatever models are called."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree as ET

import jsonschema
import pytest

from burnish.tools import terminal
from burnish.tools.check import as_github, as_json, as_junit, as_sarif, said
from burnish.tools.check.difference import Difference, Field, Report, Verdict
from burnish.tools.check.lock import Lock, Sized

SCHEMA = json.loads(Path(__file__).with_name("sarif").joinpath("sarif-2.1.0-rtm.5.json").read_text(encoding="utf-8"))
HOSTILE = [
    "a\n::error::b",
    "##[stop-commands]x",
    "::add-mask::x",
    "a::b,line=9::c%0Ad%",
    "\x1b[31mred\x1b]8;;http://a.example\x07",
    "<img src=x onerror=alert(1)>|</td></table>",
    "a|b\\|c``d`e",
    "[a](http://a.example) ![b](c) www.a.example @all #1 $x$ **b** ~~c~~ :tada:",
    "\ud800\udcff\ufffe\u202e\u2028",
    "]]>&amp;<!--",
    "{0} [x](1)",
    " ",
]


def lock(nodes: int = 3) -> Lock:
    sizes = Sized(nodes=nodes, parameters=4, bytes={"float": 16}, multiply_adds=8, peak_activation=None)
    return Lock(
        lock=1,
        made_with="0.1.0",
        inputs={"x": "float[N,4]"},
        outputs={"y": "float[N,4]"},
        opsets={"ai.onnx": 21},
        structure="a",
        weights="b",
        sizes=sizes,
        operators={"Add": 3},
        views={},
        passes={},
        code={"graph": ["Add(x, x)"]},
        segments=[],
    )


def report(name: str = "mask", model: str = "model.onnx", path: str = "") -> Report:
    differences = (
        Difference(
            Field.INPUTS,
            Verdict.REGRESSION,
            f"input `{name}` became float",
            place=name,
            old=f"bool[{name}]",
            new="float[N,4]",
            key=("inputs", "x"),
        ),
        Difference(Field.STRUCTURE, Verdict.REGRESSION, "LayerNormalization is now 9 nodes", place="block 7"),
        Difference(Field.NODES, Verdict.NOTE, "3 nodes became 11", old="3", new="11", key=("sizes", "nodes")),
        Difference(Field.VALUES, Verdict.TOLERATED, "outputs moved by 3e-06", place=name),
    )
    return Report(model, path, lock(), lock(11), differences)


def fine(*differences: Difference) -> Report:
    return Report("model.onnx", "model.lock.yaml", lock(), lock(), differences)


def test_the_text_says_the_verdict_first() -> None:
    assert "\n".join(said.lines(report())) + "\n" == (
        "`model.onnx` regressed: input `mask` became float, and 1 more regression\n"
        "regression  inputs           input `mask` became float\n"
        "                             bool[mask] -> float[N,4]\n"
        "regression  structure        LayerNormalization is now 9 nodes, at `block 7`\n"
        "tolerated   values           outputs moved by 3e-06, at `mask`\n"
        "note        nodes            3 nodes became 11\n"
    )


def test_the_sentence_says_what_is_left_where_nothing_regressed() -> None:
    kept = Difference(Field.NODES, Verdict.TOLERATED, "3 nodes became 4")
    note = Difference(Field.PASSES, Verdict.NOTE, "`fuse-norm` fires once less")
    assert said.sentence(fine()) == "`model.onnx` is what `model.lock.yaml` says"
    assert said.sentence(fine(kept, note, note)) == (
        "`model.onnx` is what `model.lock.yaml` says, with 1 difference within tolerance and 2 notes"
    )


def test_an_accepted_difference_is_called_so() -> None:
    words = [line.split()[0] for line in said.listed(report().differences, accepted=True) if line[0] != " "]
    assert words == ["accepted", "accepted", "accepted", "kept"]


@pytest.mark.parametrize("name", HOSTILE)
def test_text_holds_names_without_their_control_characters(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    lines = list(said.lines(report(name, name)))
    assert all(line.isprintable() for line in lines)
    assert sum(line.startswith("regression") for line in lines) == 2
    assert not [one for one in map(terminal.inert, lines) if "##[" in one or one.lstrip().startswith("::")]


@pytest.mark.parametrize("name", ["mask", *HOSTILE])
def test_json_holds_everything(name: str) -> None:
    found = json.loads(as_json.text(as_json.document(report(name))))
    assert found["verdict"] == "regression"
    assert found["counts"] == {"regression": 2, "tolerated": 1, "note": 1}
    written = name.encode(errors="backslashreplace").decode()
    assert [one["place"] for one in found["differences"]] == [written, "block 7", "", written]
    assert (found["sizes"]["old"]["nodes"], found["sizes"]["new"]["nodes"]) == (3, 11)


@pytest.mark.parametrize("name", ["mask", *HOSTILE])
def test_junit_is_read_back(name: str) -> None:
    root = ET.fromstring(as_junit.text([report(name, name)], {name: name}).encode())
    assert (root.get("failures"), root.get("errors"), root.get("skipped")) == ("2", "1", "2")
    assert root.get("tests") == str(len(root.findall(".//testcase"))) == str(len(Field) + 1)
    failing = {case.get("name") for case in root.iter("testcase") if case.find("failure") is not None}
    assert failing == {"inputs", "structure"}
    assert "3 nodes became 11" in (root.findtext(".//testcase[@name='nodes']/system-out") or "")


def test_junit_skips_what_the_lock_does_not_hold() -> None:
    root = ET.fromstring(as_junit.text([fine()]).encode())
    assert {one.get("name") for one in root.iter("testcase") if one.find("skipped") is not None} == {
        "values",
        "metric",
        "latency",
    }


@pytest.mark.parametrize("name", ["mask", *HOSTILE])
def test_sarif_follows_its_schema(name: str) -> None:
    found = json.loads(as_json.text(as_sarif.document([report(name, name), fine()], {name: name})))
    jsonschema.Draft4Validator(SCHEMA, format_checker=jsonschema.FormatChecker()).validate(found)
    results = found["runs"][0]["results"]
    assert [(one["ruleId"], one["level"], "suppressions" in one) for one in results] == [
        ("inputs", "error", False),
        ("structure", "error", False),
        ("nodes", "note", False),
        ("values", "note", True),
    ]
    rules = found["runs"][0]["tool"]["driver"]["rules"]
    assert all(rules[one["ruleIndex"]]["id"] == one["ruleId"] for one in results)
    assert not [one for one in results if re.search(r"\]\(|(?<!\{)\{\d+\}(?!\})", one["message"]["text"])]


def test_results_stand_at_the_lines_of_the_lock_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_WORKSPACE", str(tmp_path))
    path = tmp_path / "locks" / "a b.lock.yaml"
    path.parent.mkdir()
    path.write_text("lock: 1\ninputs:\n  y: int64[1]\n  x: float[N,4]\nsizes:\n  nodes: 3\n", encoding="utf-8")
    found = report(model=str(tmp_path / "model.onnx"), path=str(path))
    places = [one["locations"][0]["physicalLocation"] for one in as_sarif.document([found])["runs"][0]["results"]]
    assert [one["region"]["startLine"] for one in places] == [4, 1, 6, 1]
    assert {one["artifactLocation"]["uri"] for one in places} == {"locks/a%20b.lock.yaml"}
    first = next(iter(as_github.commands([found])))
    assert parsed(first)[1] == {
        "file": "locks/a b.lock.yaml",
        "line": "4",
        "title": f"inputs of {tmp_path / 'model.onnx'}",
    }
    assert as_json.document(found)["differences"][0]["line"] == 4


def parsed(line: str) -> tuple[str, dict[str, str], str]:
    """A workflow command as the runner of GitHub Actions reads it: name, properties, message."""
    assert line.isprintable() and line.startswith("::")
    head, message = line[2:].split("::", 1)
    name, _, given = head.partition(" ")
    properties = dict(one.split("=", 1) for one in given.split(","))

    def read(text: str) -> str:
        for code, char in (("%0D", "\r"), ("%0A", "\n"), ("%3A", ":"), ("%2C", ","), ("%25", "%")):
            text = text.replace(code, char)
        return text

    return name, {key: read(value) for key, value in properties.items()}, read(message)


@pytest.mark.parametrize("name", ["mask", *HOSTILE])
def test_an_annotation_is_one_command(name: str) -> None:
    found = [parsed(one) for one in as_github.commands([report(name, f"{name}.onnx")], {name: name})]
    assert [one[0] for one in found] == ["error", "error", "error", "notice", "notice"]
    assert all(set(one[1]) == {"file", "title"} for one in found)
    assert [one[2].count("\n") for one in found] == [0, 1, 0, 0, 0]


class Shown(HTMLParser):
    """Tags and cells of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.rows: list[list[str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip("\n")


@pytest.mark.parametrize("name", ["mask", *HOSTILE])
def test_the_step_summary_shows_names_as_they_are(name: str) -> None:
    from markdown_it import MarkdownIt

    page = as_github.summary([report(name, name)], {name: name})
    shown = Shown(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(page))
    plain = {"h3", "p", "table", "thead", "tbody", "tr", "th", "td", "code", "strong"}
    assert shown.tags <= plain
    assert [len(row) for row in shown.rows] == [5] * 5
    assert shown.rows[1][2].replace("`", "").strip() == said.told(report(name).differences[0]).replace("`", "").strip()


def test_a_long_step_summary_is_cut() -> None:
    many = [Difference(Field.VALUES, Verdict.NOTE, f"note {number}") for number in range(as_github.ROWS + 7)]
    page = as_github.summary([fine(*many)])
    assert page.count("\n| note |") == as_github.ROWS
    assert "and 7 more" in page
