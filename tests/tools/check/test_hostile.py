"""Lock files and models of people one does not know: one clear error, nothing run, nothing written."""

from __future__ import annotations

import copy
import os
import random
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import yaml
from golden import parse_graph
from onnx import TensorProto
from spellings import CHANGES, GRAPHS, model_of

from burnish.ir.errors import BurnishError, InputError
from burnish.tools import cli, terminal
from burnish.tools.check import as_github, as_json, as_junit, as_sarif, lock_file, said
from burnish.tools.check.check import check
from burnish.tools.check.take import take

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and its lock."""
    source = parse_graph(GRAPHS["attention"])
    onnx.save(source, tmp_path / "model.onnx")
    lock_file.write(take(model_of(source)), tmp_path / "model.lock.yaml")
    monkeypatch.chdir(tmp_path)
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `burnish check`: the exit code, stdout and stderr."""

    def call(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            terminal.run(cli.burnish, prog_name="burnish", args=["check", *map(str, words)])
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return call


def content(folder: Path) -> dict[str, bytes | str]:
    """What is in a folder: the bytes of files, where links lead."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path)] = os.readlink(path)
        elif path.is_file() and path.stat().st_mode & stat.S_IRUSR:
            found[str(path)] = path.read_bytes()
    return found


def refused(run: Run, folder: Path, *words: object, place: str = "model.lock.yaml") -> str:
    """What is said of something that cannot be used: always the same, with `--update` too, and nothing is written."""
    before = content(folder)
    errors = []
    for more in ((), ("--update",), ("--json", "report.json", "--no-run")):
        code, out, error = run("run", *words, *more)
        assert code == 2, error
        assert "Traceback" not in error + out
        assert place in error
        assert "hint:" in error
        assert not set(content(folder)) - set(before) - {str(folder / "report.json")}
        (folder / "report.json").unlink(missing_ok=True)
        errors.append(error)
    assert content(folder) == before
    return errors[0]


BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: [*c, *c]\n"
RUNS = "!!python/object/apply:os.system ['touch executed']"

MISTAKES: dict[str, Callable[[bytes], bytes]] = {
    "aliases": lambda text: BOMB.encode() + text,
    "merge key": lambda text: text.replace(b"sizes:\n", b"sizes:\n  <<: *a\n"),
    "tag": lambda text: text.replace(b"passes:", b"passes: " + RUNS.encode() + b"\n_:", 1),
    "tag on a key": lambda text: text + RUNS.encode() + b": 1\n",
    "deep sequences": lambda text: text + b"more: " + b"[" * 9000 + b"]" * 9000,
    "deep mappings": lambda text: text + b"more: " + b"{a: " * 9000 + b"}" * 9000,
    "deep blocks": lambda text: text + b"more:\n" + b"".join(b" " * i + b"- \n" for i in range(1, 300)),
    "wrong type": lambda text: text.replace(b"operators:", b"operators: 3\nignored:", 1),
    "not a number": lambda text: text.replace(b"nodes: 1", b"nodes: .nan", 1),
    "infinite": lambda text: text.replace(b"nodes: 1", b"nodes: 1e999", 1),
    "negative": lambda text: text.replace(b"parameters: ", b"parameters: -", 1),
    "huge number": lambda text: text.replace(b"parameters: ", b"parameters: " + b"9" * 5000, 1),
    "unknown key": lambda text: text + b"colour: blue\n",
    "newer": lambda text: text.replace(b"lock: 1", b"lock: 2", 1),
    "older than any": lambda text: text.replace(b"lock: 1", b"lock: 0", 1),
    "cut off": lambda text: text[: len(text) // 2],
    "cut off in a word": lambda text: text[:-7],
    "zeros": lambda text: text[:300] + bytes(300),
    "binary": lambda text: bytes(range(256)),
    "UTF-16": lambda text: text.decode().encode("utf-16"),
    "empty": lambda text: b"",
    "key twice": lambda text: text + b"lock: 1\n",
    "inner key twice": lambda text: text.replace(b"sizes:\n", b"sizes:\n  nodes: 1\n", 1),
    "merge conflict": lambda text: b"<<<<<<< HEAD\n" + text,
    "two documents": lambda text: text + b"---\n" + text,
    "code that is not there": lambda text: text.replace(b"code:\n  ", b"code:\n  x", 1),
    "HTML": lambda text: b"<!DOCTYPE html><html><script>alert(1)</script></html>",
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_hostile_lock_file_is_refused(folder: Path, run: Run, name: str) -> None:
    path = folder / "model.lock.yaml"
    path.write_bytes(MISTAKES[name](path.read_bytes()))
    error = refused(run, folder, "model.onnx")
    assert "\x1b[" not in error.replace("\x1b[0m", "")
    assert not (folder / "executed").exists()
    if name == "newer":
        assert "newer burnish" in error


def test_a_lock_file_of_gigabytes_is_not_read(folder: Path, run: Run) -> None:
    path = folder / "model.lock.yaml"
    with path.open("r+b") as stream:
        stream.truncate(1 << 33)
    code, _, error = run("run", "model.onnx", "--update")
    assert code == 2
    assert "MiB" in error
    path.unlink()


def test_what_is_no_lock_file_is_refused(folder: Path, run: Run) -> None:
    (folder / "inside").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "nowhere").symlink_to("not-there")
    (folder / "loop").symlink_to("loop")
    for name in ("inside", "nowhere", "loop", "missing.yaml", "model.onnx"):
        refused(run, folder, "model.onnx", "--lock", name, place=name)
    code, _, error = run("run", "model.onnx", "--lock", "pipe", "--update")
    assert code == 2 and "pipe" in error


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_lock_file_without_permission_is_refused(folder: Path, run: Run) -> None:
    path = folder / "model.lock.yaml"
    path.chmod(0)
    refused(run, folder, "model.onnx")
    path.chmod(0o600)


def test_line_ends_of_windows_and_a_byte_order_mark_do_no_harm(folder: Path, run: Run) -> None:
    path = folder / "model.lock.yaml"
    plain = path.read_bytes()
    for spelled in (plain.replace(b"\n", b"\r\n"), b"\xef\xbb\xbf" + plain, plain + b"\n\n# checked\n"):
        path.write_bytes(spelled)
        assert run("run", "model.onnx")[0] == 0


def test_a_lock_of_another_model_is_a_regression_and_no_mistake(folder: Path, run: Run) -> None:
    onnx.save(parse_graph(GRAPHS["loops"]), folder / "other.onnx")
    before = content(folder)
    code, out, error = run("run", "other.onnx", "--lock", "model.lock.yaml")
    assert (code, error) == (1, "")
    assert "input" in out
    assert content(folder) == before


def cyclic() -> onnx.ModelProto:
    proto = parse_graph(GRAPHS["attention"])
    (reader,) = (node for node in proto.graph.node if "l" in node.output)
    reader.input[0] = "y"
    return proto


def outside() -> onnx.ModelProto:
    proto = parse_graph(GRAPHS["attention"])
    tensor = proto.graph.initializer[0]
    tensor.ClearField("float_data")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../../../etc/passwd")
    return proto


MODELS: dict[str, Callable[[], bytes]] = {
    "cut off": lambda: parse_graph(GRAPHS["attention"]).SerializeToString()[:-100],
    "cyclic": lambda: cyclic().SerializeToString(),
    "weights outside": lambda: outside().SerializeToString(),
    "empty": lambda: b"",
    "pickle": lambda: b"\x80\x04cos\nsystem\n(S'touch executed'\ntR.",
    "archive": lambda: b"PK\x03\x04" + bytes(100),
    "text": lambda: b"lock: 1\n",
    "noise": lambda: random.Random(1).randbytes(5000),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_hostile_model_is_refused(folder: Path, run: Run, name: str) -> None:
    (folder / "model.onnx").write_bytes(MODELS[name]())
    refused(run, folder, "model.onnx", place="model.onnx")
    before = content(folder)
    code, _, error = run("lock", "model.onnx", "-o", "new.lock.yaml")
    assert code == 2 and "hint:" in error
    assert content(folder) == before
    assert not (folder / "executed").exists()


NAMES = [
    "::error file=a.py::stolen",
    "\n::set-output name=x::y",
    "##[group]x",
    "<script>alert(1)</script>",
    "[click](javascript:alert(1))",
    "| a | b |",
    "`code`",
    "\x1b[31mred\x1b[0m\x07",
    "\u202eright to left",
    "]]> <!--",
    "a: {b: [c, *d]} # e",
    "../../etc/passwd",
    "%0A::warning::x",
]


def named(name: str, eps: float) -> onnx.ModelProto:
    """A model whose nodes, inner values, inputs and outputs have an odd name."""
    proto = parse_graph(GRAPHS["attention"].replace("1e-6", str(eps)))
    for index, node in enumerate(proto.graph.node):
        node.name = f"{name} {index}"
    renames = {"x": f"{name} in", "y": f"{name} out", "p": f"{name} p"}
    for value in [*proto.graph.input, *proto.graph.output]:
        value.name = renames.get(value.name, value.name)
    for node in proto.graph.node:
        node.input[:] = [renames.get(one, one) for one in node.input]
        node.output[:] = [renames.get(one, one) for one in node.output]
    return proto


def commands(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.lstrip().startswith(("::", "##["))]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_names_are_shown_and_are_no_commands(
    folder: Path, run: Run, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx.save(named(name, 1e-6), folder / "odd.onnx")
    assert run("lock", "odd.onnx")[0] in (0, 2)
    if not (folder / "odd.lock.yaml").exists():
        return  # the reader of models refused the name, which is as well
    onnx.save(named(name, 1e-2), folder / "odd.onnx")
    summary = folder / "summary.md"
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    code, out, error = run("run", "odd.onnx", "--sarif", "r.sarif", "--junit", "r.xml", "--json", "r.json")
    assert code == 1, error
    printed = out + error
    assert "\x1b[31m" not in printed and "\x07" not in printed and "\u202e" not in printed
    assert all(line.startswith(("::error ", "::warning ", "::notice ")) for line in commands(printed))
    assert "file=a.py" not in "".join(line.split("::")[1] for line in commands(printed))
    text = summary.read_text()
    assert "<script>" not in text and "](javascript" not in text.replace("\\]", "")
    assert "<script>" not in (folder / "r.xml").read_text()


BAD: list[Any] = [
    *(None, -1, 0, 1, 2, 10**17, -(10**17), 1e300, -1e300, 1e-320, 1.5, True, "", "x" * 3000, [], {}, [1], {"a": 1}),
    *("\x1b[31m", "::error::boom\n::x", "float[batch,3]", "a`b", "[]", "%s{}", "block 0", "graph", "Add(", "(((", [""]),
    *("Add(float[4], x) a=", "  Relu(x)", ["\t Relu"], "0" * 16, [0.5] * 3, [0.5] * 8, "\u202e", "<b>"),
]


def paths(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if place:
        yield place
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from paths(part, (*place, key))


def part_of(tree: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        tree = tree[key]
    return tree


def damage(tree: Any, chance: random.Random) -> None:
    """Change something anywhere in a lock."""
    listed = list(paths(tree))
    place = chance.choice(listed)
    parent, key, how = part_of(tree, place[:-1]), place[-1], chance.random()
    if how < 0.6:
        parent[key] = copy.deepcopy(chance.choice(BAD))
    elif how < 0.75:
        del parent[key]
    elif how < 0.9:
        parent[key] = copy.deepcopy(part_of(tree, chance.choice(listed)))
    elif isinstance(parent[key], list):
        parent[key] = chance.sample(parent[key] * 2, 2 * len(parent[key]))
    elif isinstance(parent[key], int | float):
        parent[key] = -parent[key]


class Plain(yaml.SafeDumper):
    """Writes no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


@pytest.mark.parametrize("name", ["attention", "loops", "functions", "constants"])
def test_a_damaged_lock_is_refused_or_compared(tmp_path: Path, name: str) -> None:
    """Whatever is wrong in a lock: an error with place and hint, or a report that every format can show."""
    models = [model_of(GRAPHS[name])]
    models += [
        model_of(GRAPHS[name].replace(old, new)) for one, old, new in CHANGES if one == name and "opset" not in old
    ]
    path, chance = tmp_path / "m.lock.yaml", random.Random(name)
    text = lock_file.text(take(models[0]))
    compared = 0
    for _ in range(100):
        tree = yaml.safe_load(text)
        for _ in range(chance.choice([1, 1, 2, 4])):
            damage(tree, chance)
        path.write_text(yaml.dump(tree, Dumper=Plain, sort_keys=False, allow_unicode=True))
        try:
            report = check(chance.choice(models), lock_file.read(path))
        except BurnishError as error:
            assert isinstance(error, InputError) and (error.hint or "ONNX Runtime" in error.cause)
            continue
        compared += 1
        assert "\x1b" not in "\n".join(said.lines(report))
        as_json.text(as_json.document(report))
        as_junit.text([report], {})
        as_sarif.document([report], {})
        assert not any("\n" in line for line in as_github.commands([report]))
        as_github.summary([report])
        lock_file.text(report.new)
    assert compared
