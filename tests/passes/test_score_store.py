"""The store keeps what it is given, whatever happens to the processes and to the file."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from burnish.ir.samples import Sample
from burnish.passes.score_store import Store, cache_folder, samples_fingerprint

ROOT = Path(__file__).resolve().parents[2]


def process(code: str, path: Path) -> subprocess.Popen[str]:
    start = "from pathlib import Path; from burnish.passes.score_store import Store"
    code = f"{start}; s = Store(Path({str(path)!r}))\n{code}"
    environment = os.environ | {"PYTHONPATH": str(ROOT / ".src")}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)


def test_what_was_written_is_there_for_the_next_run(tmp_path: Path) -> None:
    store = Store(tmp_path / "deep" / "scores.sqlite")
    store.add_scores("m", "s", "e1", {"kl": {"value": 0.1 + 0.2}, "top1": {"value": math.inf, "reason": "it broke"}})
    store.add_scores("m", "s", "e2", {"kl": 1})
    store.add_scores("m", "s", "e2", {"kl": 2})
    store.add_timing("a layer", 1e-6)
    store.close()
    store = Store(tmp_path / "deep" / "scores.sqlite")
    assert store.warning is None
    assert store.scores("m", "s", "kl") == {"e1": {"value": 0.1 + 0.2}, "e2": 2}
    assert store.scores("m", "s", "top1") == {"e1": {"value": math.inf, "reason": "it broke"}}
    assert store.scores("m", "other samples", "kl") == store.scores("other model", "s", "kl") == {}
    assert store.timing("a layer") == 1e-6
    assert store.timing("another") is None


def test_several_processes_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "scores.sqlite"
    code = "for i in range(100): s.add_scores('m', 's', f'{%d}-{i}', {'kl': i})"
    running = [process(code % number, path) for number in range(3)]
    assert [(one.communicate()[0], one.returncode) for one in running] == [("", 0)] * 3
    assert len(Store(path).scores("m", "s", "kl")) == 300


def test_a_killed_process_loses_nothing_that_it_wrote(tmp_path: Path) -> None:
    path = tmp_path / "scores.sqlite"
    writer = process("i = 0\nwhile True: s.add_scores('m', 's', str(i), {'kl': i}); print(i, flush=True); i += 1", path)
    assert writer.stdout is not None
    said = [int(writer.stdout.readline()) for _ in range(50)]
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    found = Store(path)
    assert found.warning is None
    assert set(map(str, said)) <= set(found.scores("m", "s", "kl"))


@pytest.mark.parametrize("damage", ["text", "cut", "page", "foreign"])
def test_a_damaged_file_is_set_aside(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "scores.sqlite"
    store = Store(path)
    for index in range(2000):
        store.add_timing(f"key {index}" * 5, 1.0)
    store.close()
    whole = path.read_bytes()
    if damage == "text":
        path.write_text("this is no database, but it is long enough to be taken for one" * 100)
    elif damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "page":
        path.write_bytes(whole[:8192] + os.urandom(4096) + whole[12288:])
    else:
        path.unlink()
        import sqlite3

        with sqlite3.connect(path) as other:
            other.execute("create table scores (something)")
        other.close()
    store = Store(path)
    assert store.warning is not None and "damaged" in store.warning and str(path) in store.warning
    assert path.with_name("scores.sqlite.damaged-1").exists()
    store.add_timing("key", 2.0)
    store.close()
    again = Store(path)
    assert again.warning is None and again.timing("key") == 2.0


def test_damage_that_comes_while_it_is_open(tmp_path: Path) -> None:
    path = tmp_path / "scores.sqlite"
    Store(path).close()
    store = Store(path)
    other = Store(path)
    other.add_timing("key", 1.0)
    other.close()
    path.write_bytes(b"no database at all, but as long as a page of one" * 500)
    store.add_timing("key", 3.0)
    assert store.timing("key") == 3.0


def test_without_a_place_to_write_scores_last_as_long_as_the_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file" / "scores.sqlite")
    assert store.warning is not None and "BURNISH_CACHE" in store.warning
    store.add_timing("key", 1.0)
    assert store.timing("key") == 1.0


def test_the_folder_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BURNISH_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder() == Path("/home/someone/.cache/burnish")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/burnish")
    monkeypatch.setenv("BURNISH_CACHE", "/own")
    assert cache_folder() == Path("/own")
    assert Store.__init__.__defaults__ == (None,)


def test_the_fingerprint_of_samples_is_of_what_they_hold() -> None:
    x = np.arange(6, dtype=np.float32)

    def of(feeds: dict[str, np.ndarray], labels: np.ndarray | None = None, name: str = "") -> str:
        return samples_fingerprint([Sample(name, feeds, labels)])

    same = {of({"x": x}), of({"x": x.copy()}, name="other"), of({"x": np.stack([x, x], 1)[:, 0]})}
    different = [
        of({"y": x}),
        of({"x": x.reshape(2, 3)}),
        of({"x": x.astype(np.int32)}),
        of({"x": x}, x),
        of({"x": x}, x + 1),
        of({"x": x, "y": x}),
        of({"x": np.array(["a", "b"])}),
        of({"x": np.array(["a", "c"])}),
        samples_fingerprint([]),
        samples_fingerprint([Sample("", {"x": x}), Sample("", {"x": x})]),
    ]
    assert len(same) == 1
    assert len({*same, *different}) == len(different) + 1
