"""Lock files are read with distrust and written in a form that people review."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

import msgspec
import pytest
import yaml

from burnish.frontends import onnx_file
from burnish.ir.errors import InputError
from burnish.tools.check import lock_file, yaml_tree
from burnish.tools.check.lock import LayerLock, Lock, OutputLock, SampleLock, SampleSet, SegmentLock, Sized
from burnish.tools.check.take import take

DEMO = Path(__file__).resolve().parents[3] / "tools" / "demo"

TEXT = """\
# What the model was when it was locked, for `burnish check run`. Review it as you review code.
lock: 1
made-with: "1.2"
inputs:
  x: float[N,3]
outputs:
  "y: #1": float[N,3]
opsets: {ai.onnx: 21}
structure: "00000000000000000000000000000000"
weights: abc
sizes:
  nodes: 2
  parameters: 9
  bytes: {float: 36}
  multiply-adds: 18
  peak-activation: null
  at: {"N": 2}
operators:
  MatMul: 1
  Relu: 1
views:
  linear layers: 1
passes: {}
code:
  part 0123abcd:
    - MatMul(x, float[3,3])
    - "  Relu(MatMul)"
segments:
  - name: graph
    code: part 0123abcd
    structure: s
    weights: w
    layers:
      - {line: 0, name: "no", weights: h, norm: 1.5, sketch: [1.0e-07, -2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]}
samples:
  given: false
  fingerprint: f
  roles:
    x: {kind: number}
values:
  - sample: ones, batch 2
    outputs:
      "y: #1": {type: "float[2,3]", mean: 0.5, finite: 6}
"""

LOCK = Lock(
    lock=1,
    made_with="1.2",
    inputs={"x": "float[N,3]"},
    outputs={"y: #1": "float[N,3]"},
    opsets={"ai.onnx": 21},
    structure="0" * 32,
    weights="abc",
    sizes=Sized(nodes=2, parameters=9, bytes={"float": 36}, multiply_adds=18, peak_activation=None, at={"N": 2}),
    operators={"MatMul": 1, "Relu": 1},
    views={"linear layers": 1},
    passes={},
    code={"part 0123abcd": ["MatMul(x, float[3,3])", "  Relu(MatMul)"]},
    segments=[
        SegmentLock(
            name="graph",
            code="part 0123abcd",
            structure="s",
            weights="w",
            layers=[LayerLock(line=0, name="no", weights="h", norm=1.5, sketch=(1e-7, -2.0, *map(float, range(3, 9))))],
        )
    ],
    samples=SampleSet(given=False, fingerprint="f", roles={"x": {"kind": "number"}}),
    values=[SampleLock(sample="ones, batch 2", outputs={"y: #1": OutputLock(type="float[2,3]", mean=0.5, finite=6)})],
)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "m.lock.yaml"
    path.write_text(TEXT)
    return path


def test_the_form_of_a_lock_file(file):
    assert lock_file.text(LOCK) == TEXT
    assert lock_file.read(file) == LOCK


def test_other_readers_of_yaml_understand_it():
    lock = take(onnx_file.read(DEMO / "digits_vit.onnx"))
    assert yaml.safe_load(lock_file.text(lock)) == msgspec.json.decode(msgspec.json.encode(lock))


@pytest.mark.parametrize(
    "name",
    [
        *("a", "yes", "No", "null", "~", "1", "1e5", ".inf", "12345678", "deadbeef", "1234e567", "0x1f", "2001-01-01"),
        *(
            "a: b",
            "a #b",
            "- a",
            "{a}",
            "[a]",
            "a,b",
            "'",
            '"',
            "\\",
            "*a",
            "&a",
            "!a",
            "%a",
            "@a",
            "`a",
            "?",
            "=",
            "<<",
        ),
        *(
            "",
            " ",
            " a",
            "a ",
            "a:",
            "1:30",
            "a\tb",
            "\n",
            "\x00",
            "\x7f",
            "\u2028",
            "\ufeff",
            "ä",
            "日本",
            "\U0001f600",
        ),
        *("x" * 3000, "ä" * 3000, "x " * 600 + "x"),
    ],
    ids=lambda name: ascii(name[:20]),
)
def test_any_name_is_kept(name, tmp_path):
    part = msgspec.structs.replace(LOCK.segments[0], code=name, name=name)
    code, inputs = {name: [name]}, {name: name, "z": "float[]"}
    lock = msgspec.structs.replace(LOCK, inputs=inputs, code=code, segments=[part], made_with=name)
    lock_file.write(lock, tmp_path / "lock")
    assert lock_file.read(tmp_path / "lock") == lock


def test_halves_of_surrogate_pairs_do_not_reach_the_file(tmp_path):
    lock_file.write(msgspec.structs.replace(LOCK, made_with="a\ud800"), tmp_path / "lock")
    assert lock_file.read(tmp_path / "lock").made_with == "a\ufffd"


def test_one_changed_layer_changes_two_lines():
    lock = take(onnx_file.read(DEMO / "digits_resnet.onnx"))
    number, segment = next((n, s) for n, s in enumerate(lock.segments) if s.layers)
    layers = [msgspec.structs.replace(segment.layers[0], weights="00000000", norm=7.5), *segment.layers[1:]]
    changed = list(lock.segments)
    changed[number] = msgspec.structs.replace(segment, weights="11111111", layers=layers)
    texts = [lock_file.text(one).splitlines() for one in (lock, msgspec.structs.replace(lock, segments=changed))]
    moved = [line for line in difflib.ndiff(*texts) if line[0] == "+"]
    assert len(moved) == 2


def test_lines_are_told_by_key(file):
    lines = TEXT.splitlines()
    for key, start in [
        (("inputs", "x"), "  x: float"),
        (("sizes", "bytes", "float"), "  bytes:"),
        (("code", "part 0123abcd", 1), '    - "  Relu'),
        (("segments", 0), "  - name: graph"),
        (("segments", 0, "layers", 0, "norm"), "      - {line: 0"),
        (("values", 0, "outputs", "y: #1"), '      "y: #1": {type'),
        (("inputs", "no", "such"), "inputs:"),
    ]:
        assert lines[lock_file.line_of(file, key) - 1].startswith(start)
    assert lock_file.line_of(file, ("nothing",)) == 1


@pytest.mark.parametrize(
    ("old", "new", "line", "cause"),
    [
        ("nodes: 2", "nodes: two", 12, "expected `int`, got `str` (`sizes.nodes`)"),
        ("nodes: 2", "nodes: 2.5", 12, "expected `int`, got `float`"),
        ("nodes: 2", "nodes: .inf", 12, "expected `int`"),
        ("nodes: 2", "nodes: 1e999", 12, "not finite"),
        ("norm: 1.5", "norm: -1e400", 34, "not finite"),
        ("nodes: 2", "nodes: -2", 12, "expected `int` >= 0 (`sizes.nodes`)"),
        ("norm: 1.5", "norm: -1.5", 34, ">= 0"),
        ("[1.0e-07, -2.0, ", "[1.0e-07, ", 34, "a sketch has 8 numbers or none, not 7"),
        ("line: 0", "line: 2", 34, "its code has no line 2"),
        ("code: part 0123abcd", "code: part 4", 30, "there is no code `part 4`"),
        ("norm: 1.5", "norm: true", 34, "expected `float`, got `bool`"),
        ("norm: 1.5", "norm: .nan", 34, "expected `float`, got `str`"),
        ("  nodes: 2\n", "", 11, "missing required field `nodes`"),
        ("  nodes: 2", "  knots: 1\n  nodes: 2", 11, "unknown field `knots`"),
        ("lock: 1", "lock: 99", 2, "newer burnish"),
        ("lock: 1", "lock: 0", 2, "whole number from 1"),
        ("lock: 1", "lock: true", 2, "whole number from 1"),
        ("weights: abc", "weights: &a abc", 10, "anchors"),
        ("weights: abc", "weights: *a", 10, "YAML|anchors"),
        ("weights: abc", "weights: !!python/object/apply:os.system [date]", 10, "tags"),
        ("weights: abc", "weights: !!str abc", 10, "tags"),
        ("weights: abc", "weights: abc\nweights: abc", 11, "given twice"),
        ("weights: abc", "? [a]\n: b", 10, "key must be text"),
        ("weights: abc", "weights: " + "[" * 50 + "]" * 50, 10, "nested too deeply"),
        ("weights: abc", "weights: [abc", None, "not YAML"),
        ("weights: abc", "weights: abc\n---\nlock: 1", 11, "second document"),
        ("weights: abc", "<<<<<<< HEAD\nweights: abc", None, "not YAML"),
        ("  x: float[N,3]", "  - x", 4, "expected `object`, got `array`"),
    ],
)
def test_a_mistake_is_an_error_with_its_line(file, old, new, line, cause):
    text = TEXT.replace(old, new, 1)
    assert text != TEXT
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        lock_file.read(file)
    assert any(part in caught.value.cause for part in cause.split("|")), caught.value.cause
    assert caught.value.hint
    if line is not None:
        assert caught.value.place == f"{file}:{line}"


@pytest.mark.parametrize(
    "data",
    [b"", b"\n", b"[]", b"lock", b"a: 1", b"\xff\xfe", b"\x00", b"lock: 1\n\x00", b"lock: 1\t: 2", b"{" * 100_000,
     b"- " * 100_000, b"a: " * 50, b"\x89PNG", b"lock: 1", b'"\\ud800": 1', b"%YAML 9.9\n---\nlock: 1"],
    ids=lambda data: ascii(data[:12]),
)  # fmt: skip
def test_anything_else_is_an_error(file, data):
    file.write_bytes(data)
    with pytest.raises(InputError):
        lock_file.read(file)


def test_a_file_that_is_too_large_is_not_read(file, monkeypatch):
    monkeypatch.setattr(yaml_tree, "LARGEST", 100)
    with pytest.raises(InputError, match="more than"):
        lock_file.read(file)


def test_a_file_of_too_many_values_is_not_read_to_its_end(file, monkeypatch):
    monkeypatch.setattr(yaml_tree, "MOST", 20)
    with pytest.raises(InputError, match="more than 20 values"):
        lock_file.read(file)


def test_what_is_no_file_is_an_error(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "none", tmp_path / "pipe", "/dev/zero", "a\0b", "x" * 5000):
        with pytest.raises(InputError):
            lock_file.read(path)


def test_only_lock_files_are_replaced(file, tmp_path):
    lock_file.write(LOCK, file)
    assert file.read_text() == TEXT
    file.write_text("<<<<<<< HEAD\n" + TEXT)
    lock_file.write(LOCK, file)
    assert file.read_text() == TEXT
    (tmp_path / "empty").touch()
    lock_file.write(LOCK, tmp_path / "empty")
    other = tmp_path / "model.onnx"
    other.write_bytes(b"\x08\x0a precious")
    for path in (other, tmp_path, tmp_path / "no" / "lock.yaml", "/dev/null"):
        with pytest.raises(InputError):
            lock_file.write(LOCK, path)
    assert other.read_bytes() == b"\x08\x0a precious"
    assert sorted(os.listdir(tmp_path)) == ["empty", "m.lock.yaml", "model.onnx"]


def test_a_link_stays_a_link(file, tmp_path):
    (tmp_path / "link.yaml").symlink_to(file)
    lock_file.write(msgspec.structs.replace(LOCK, made_with="2"), tmp_path / "link.yaml")
    assert (tmp_path / "link.yaml").is_symlink() and lock_file.read(file).made_with == "2"


def test_nothing_is_left_of_a_file_that_could_not_be_written(file, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(InputError, match="No space left"):
        lock_file.write(msgspec.structs.replace(LOCK, made_with="2"), file)
    assert os.listdir(tmp_path) == ["m.lock.yaml"] and file.read_text() == TEXT
