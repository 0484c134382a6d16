"""`burnish inspect --energy` reads the meter there is, marks estimates, and refuses what it cannot answer."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx.parser
import pytest
from inspecting import run
from networks import simple_net

from burnish.backends import meters

OTHER = """
<ir_version: 8, opset_import: ["": 17]>
g (float[N, 4] x) => (float[N, 4] y) { y = Softmax (x) }
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A network, and a model with other inputs; no meter."""
    simple_net(tmp_path / "net.onnx")
    onnx.save(onnx.parser.parse_model(OTHER), tmp_path / "other.onnx")
    (tmp_path / "powercap").mkdir()
    monkeypatch.setattr(meters, "POWERCAP", tmp_path / "powercap")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def processor(folder: Path) -> Iterator[Path]:
    """Counters in the layout of Linux, of a processor that draws 20 W, and 40 W more while this process computes."""
    zone = folder / "powercap" / "intel-rapl:0"
    zone.mkdir()
    (zone / "name").write_text("package-0\n")
    (zone / "max_energy_range_uj").write_text("262143328850\n")
    stop = threading.Event()

    def count() -> None:
        start, busy = time.perf_counter(), time.process_time()
        while True:
            joules = 20 * (time.perf_counter() - start) + 40 * (time.process_time() - busy)
            (zone / "next").write_text(f"{joules * 1e6:.0f}\n")
            os.replace(zone / "next", zone / "energy_uj")
            if stop.wait(0.002):
                return

    thread = threading.Thread(target=count)
    thread.start()
    while not (zone / "energy_uj").exists():
        time.sleep(0.001)
    yield zone
    stop.set()
    thread.join()


def test_a_meter_is_read_and_idle_taken_off(processor: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["net.onnx", "--energy", "--dims", "batch=32", "--seconds", "1.5", "--json"]
    code, out, err = run(capsys, *words)
    assert code == 0, err
    found = json.loads(out)["energy"]
    (one,) = found["models"]
    assert found["meter"] == "RAPL: package-0" and found["estimated"] is one["estimated"] is False
    assert 15 < found["idle_watts"] < 35
    assert 0 < one["joules_per_inference"] < 60 * one["seconds_per_inference"]
    assert [row["joules"] for row in found["uses"]] == [
        [pytest.approx(uses * one["joules_per_inference"])] for uses in (1e4, 1e6, 1e9)
    ]


def test_without_a_meter_every_number_is_an_estimate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "net.onnx", "--energy", "--seconds", "0.3", "--plot", "e.svg", "--uses", "100")
    assert code == 0 and err.startswith("drawn: e.svg\n")
    assert "assumed: 10 W more while it runs" in out and "there is no RAPL counter" in out
    body = [line for line in out.splitlines() if " J" in line or "mJ" in line or "µJ" in line]
    assert body and all("estimated" in line for line in body)
    assert b"energy, estimated (J)" in (folder / "e.svg").read_bytes()


def test_two_models_are_held_against_each_other(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["net.onnx", "--energy", "--seconds", "0.5", "--watts", "7", "--against", "net.onnx", "--make-energy", "5"]
    code, out, _ = run(capsys, *words, "--uses", "1,1e3", "--json")
    found = json.loads(out)["energy"]
    assert code == 0 and [one["make_joules"] for one in found["models"]] == [5, 0]
    first, second = (one["joules_per_inference"] for one in found["models"])
    assert [row["joules"] for row in found["uses"]] == [
        [pytest.approx(5 + uses * first), pytest.approx(uses * second)] for uses in (1, 1e3)
    ]
    if found["break_even_uses"] is not None:  # a machine with other work to do may tell two equal models apart
        assert found["break_even_uses"] == pytest.approx(5 / (second - first))
    else:
        assert found["no_break_even"]


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["--uses", "many"], "`many` is no number of uses"),
        (["--uses", "1e4,-1"], "`-1` is no number of uses"),
        (["--uses", ""], "`` is no number of uses"),
        (["--uses", "inf"], "`inf` is no number of uses"),
        (["--make-energy", "-1"], "`-1` is no energy"),
        (["--make-energy", "nan"], "`nan` is no energy"),
        (["--watts", "0"], "`0` is no power"),
        (["--seconds", "0"], "not in the range"),
        (["--against", "none.onnx"], "there is no such file"),
        (["--against", "other.onnx"], "other.onnx: ONNX Runtime refuses the inputs"),
        (["--target", "ort-cuda"], ""),
        (["--plot", "e.gif"], "a picture cannot be written as `.gif`"),
    ],
)
def test_what_cannot_be_answered(
    words: list[str], cause: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in folder.iterdir())
    code, out, err = run(capsys, "net.onnx", "--energy", *words)
    assert (code, out) == (2, "") and err.startswith("error: ") and cause in err, err
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize("option", ["--uses", "--make-energy", "--against", "--watts", "--seconds"])
def test_its_options_go_with_it(option: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "net.onnx", option, "1")
    assert code == 2 and f"`{option}` goes with " in err


def test_a_meter_that_stands_still_is_an_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    zone = folder / "powercap" / "intel-rapl:0"
    zone.mkdir()
    for name, text in (("name", "package-0"), ("max_energy_range_uj", "262143328850"), ("energy_uj", "17")):
        (zone / name).write_text(text)
    code, _, err = run(capsys, "net.onnx", "--energy", "--seconds", "0.2")
    assert code == 2 and "counts no more than while the machine idles" in err
