"""`burnish delta` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from commands import Run, runner
from onnx import numpy_helper

DEMO = Path(__file__).parents[2] / "tools" / "demo"


@pytest.fixture
def burnish(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs the command in this process: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    model = onnx.load(DEMO / "digits_vit.onnx")
    onnx.save(model, "base.onnx")
    for number, name in enumerate(("a", "b")):
        some = [one for one in model.graph.initializer if len(one.raw_data) > 4096][number::9]
        for one in some:
            array = numpy_helper.to_array(one)
            one.CopyFrom(numpy_helper.from_array((array * np.float32(1.001)).astype(array.dtype), one.name))
        onnx.save(model, f"{name}.onnx")
    return runner(monkeypatch, capfd, tmp_path, "burnish")


def test_a_pack_is_written_shown_and_applied(burnish: Run, tmp_path: Path) -> None:
    code, out, err = burnish("delta", "base.onnx", "a.onnx", "other=b.onnx", "-o", "pack")
    assert (code, err) == (0, "") and "byte for byte" in out and "written  pack" in out
    code, out, _ = burnish("delta", "--show", "pack", "--top", "1")
    assert code == 0 and "What differs in `other`" in out and "... and " in out
    found = json.loads(burnish("delta", "--show", "pack", "--json")[1])
    first, second = found["variants"]
    assert found["bytes"] == sum(one.stat().st_size for one in (tmp_path / "pack").iterdir()) < found["of"] / 2
    assert 0 < first["changed"] < second["changed"] < second["tensors"]
    assert first["changed"] == len(first["differences"]) and first["stored"] < first["changed_bytes"]
    for words in (("a", "-o", "x.onnx"), ("other", "-o", "out/"), ("base", "-o", "y.onnx")):
        if words[2] == "out/":
            assert burnish("delta", "--apply", "pack", *words)[0] == 2  # there is no such folder
            (tmp_path / "out").mkdir()
        assert burnish("delta", "--apply", "pack", *words)[0] == 0
    for one, other in (("x", "a"), ("out/b", "b"), ("y", "base")):
        assert Path(f"{one}.onnx").read_bytes() == Path(f"{other}.onnx").read_bytes()
    found = json.loads(burnish("delta", "--apply", "pack", "a", "-o", "x.onnx", "--json")[1])
    assert found == {"model": "a", "files": ["x.onnx"]}


def test_a_pack_without_its_base_needs_it(burnish: Run) -> None:
    code, out, _ = burnish("delta", "base.onnx", "a.onnx", "--no-base", "-o", "pack")
    assert code == 0 and "not in the pack" in out and not Path("pack/base.data").exists()
    assert burnish("delta", "--apply", "pack", "a", "-o", "x.onnx", "--base", "base.onnx")[0] == 0
    assert Path("x.onnx").read_bytes() == Path("a.onnx").read_bytes()
    code, _, err = burnish("delta", "--apply", "pack", "a", "-o", "y.onnx", "--base", "b.onnx")
    assert code == 2 and "another base: it has no tensor with the values of `" in err and "SHA-256" in err
    code, _, err = burnish("delta", "--apply", "pack", "a", "-o", "base.onnx", "--base", "base.onnx")
    assert code == 2 and "never touched" in err
    assert not Path("y.onnx").exists()
    onnx.save(onnx.load("base.onnx"), "base2.onnx", save_as_external_data=True, location="w.data", size_threshold=64)
    code, _, err = burnish("delta", "--apply", "pack", "a", "-o", "w.data", "--base", "base2.onnx")
    assert code == 2 and "never touched" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "Missing argument"),
        (("base.onnx", "a.onnx"), "-o"),
        (("base.onnx", "-o", "p"), "no variant"),
        (("base.onnx", "base.onnx", "-o", "p"), "two models would have the name `base`"),
        (("base.onnx", "nothing.onnx", "-o", "p"), "no such file"),
        (("base.onnx", "a.onnx", "-o", "no/p"), "does not exist"),
        (("base.onnx", "a.onnx", "-o", "."), "-o out/"),
        (("base.onnx", "a.onnx", "-o", "p.onnx"), "a pack is a folder"),
        (("base.onnx", "a b=a.onnx", "-o", "p"), "letters, digits"),
        (("base.onnx", "a.onnx", "-o", "p", "--base", "b.onnx"), "--base is for --apply"),
        (("--apply", "--show", "p"), "exclude each other"),
        (("--apply", "p", "--no-base"), "--no-base"),
        (("--show", "p", "q"), "one pack"),
        (("--show", "p", "-o", "x"), "--show takes"),
        (("--show", "base.onnx"), "no such folder"),
        (("--apply", "p", "a", "-o", "x.onnx"), "no such folder"),
    ],
)
def test_what_cannot_be_done_is_said(burnish: Run, words: tuple[str, ...], said: str) -> None:
    code, _, err = burnish("delta", *words)
    assert code == 2 and said in err and "Traceback" not in err and "defect" not in err
    assert not Path("p").exists()


def test_a_name_that_is_not_there_is_answered_with_those_that_are(burnish: Run) -> None:
    assert burnish("delta", "base.onnx", "a.onnx", "b.onnx", "-o", "pack")[0] == 0
    for words in (("pack", "c"), ("pack",)):
        code, _, err = burnish("delta", "--apply", *words, "-o", "x.onnx")
        assert code == 2 and "`a`, `b`" in err
