"""`burnish generate --requests --prefix-memory` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest

pytest.importorskip("tokenizers")

import small_decoder  # noqa: E402
from commands import Run, runner  # noqa: E402

from burnish.tools.decoders import open_decoder  # noqa: E402
from burnish.tools.generate_prefixes import Bytes, model_work  # noqa: E402

TOKEN = 2 * 4 * 2 * 8 * 4
"""Bytes of the caches for a token: keys and values, layers, heads, their size, float32."""
FIRST, SECOND = "Answer in one word, please: ", "Say in a few words that are plain: "


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_decoder.folder(tmp_path_factory.mktemp("made") / "decoder")


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs the command in this process: (exit code, stdout, stderr)."""
    return runner(monkeypatch, capfd, tmp_path, "burnish", "generate")


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    """Questions behind one of two instructions, some drawn, one on its own, and lines that cannot be answered."""
    given: list[object] = [
        {"id": 1, "prompt": FIRST + "what is it?"},
        {"prompt": SECOND + "who?", "temperature": 0.9, "seed": 4},
        {"id": 7},
        {"id": 3, "prompt": FIRST + "who?", "max_tokens": 3},
        {"prompt": "x"},
        "{nonsense",
        {"prompt": SECOND + "why is that?", "temperature": 0.9},
        {"prompt": FIRST + "who?", "stop": "e"},
        {"prompt": FIRST + "long" * 20},
        {"ids": [9999, 1]},
    ]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(f"{one if isinstance(one, str) else json.dumps(one)}\n" for one in given))
    return path


def figures(out: str) -> dict[str, int]:
    found: dict[str, int] = json.loads(out.splitlines()[-1])["figures"]["prefixes"]
    return found


@pytest.mark.parametrize("more", [(), ("--prefix-eviction", "lru"), ("--prefix-eviction", "auto")])
def test_answers_and_their_order_stay(generate: Run, decoder: Path, requests: Path, more: tuple[str, ...]) -> None:
    plain = generate(decoder, "--requests", requests, "--max-tokens", 6)
    for memory, size in (("1MB", 2), (40 * TOKEN, 3), (TOKEN, 2), (1, 8))[: 2 if "auto" in more else 4]:
        wanted = ("--requests", requests, "--max-tokens", 6, "--batch", size, "--prefix-memory", memory, *more)
        code, out, err = generate(decoder, *wanted)
        assert code == plain[0] == 1 and out == plain[1]
        assert "tokens computed, as predicted" in err and "line 3: " in err
    found = figures(generate(decoder, "--requests", requests, "--prefix-memory", "1MB", *more, "--json")[1])
    assert found["computed"] == found["predicted"] < found["prompt_tokens"] == 190
    assert found["most_bytes"] <= 1_000_000
    assert (found["bytes_at_end"] == 0) == (not more)


def test_a_group_takes_no_more_than_its_bytes(generate: Run, decoder: Path, requests: Path) -> None:
    used = []
    for tokens in (0.5, 10, 20, 30, 1000):
        memory = int(tokens * TOKEN)
        out = generate(decoder, "--requests", requests, "--batch", 1, "--prefix-memory", memory, "--json")[1]
        found = figures(out)
        assert found["most_bytes"] <= memory and found["bytes_at_end"] == found["evicted"] == 0
        used.append(found["computed"])
    assert used == sorted(used, reverse=True) and used[0] == 190
    # Each beginning once, for three prompts and for two; "wh" belongs to both.
    assert used[-1] == 190 - 2 * len(FIRST + "wh") - len(SECOND + "wh")


def test_a_draft_goes_with_it(generate: Run, decoder: Path, requests: Path) -> None:
    plain = generate(decoder, "--requests", requests, "--max-tokens", 6, "--temperature", 0)
    for more in ((), ("--calibrate",)):
        words = ("--requests", requests, "--max-tokens", 6, "--draft", decoder, "--prefix-memory", "1MB", *more)
        code, out, err = generate(decoder, *words)
        lines = [[json.loads(one) for one in text.splitlines()] for text in (plain[1], out)]
        for one, other in zip(*lines, strict=True):
            assert one == other or one["line"] in (2, 7)  # what is drawn takes other random numbers with a draft
        assert code == 1 and "as predicted" in err and "tokens a step of the model" in err


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (("--prompt", "a", "--prefix-memory", "1GB"), "`--prefix-memory` is for `--requests`"),
        (("--check", "--prefix-memory", "1GB"), "`--prefix-memory` is for `--requests`"),
        (("--requests", "in.jsonl", "--prefix-eviction", "lru"), "is for what `--prefix-memory` holds"),
        (("--requests", "in.jsonl", "--prefix-memory", "much"), "`much` is no number of bytes"),
        (("--requests", "in.jsonl", "--prefix-memory", "-3"), "`-3` is no number of bytes"),
        (("--requests", "none.jsonl", "--prefix-memory", "1GB"), "the file cannot be read"),
    ],
)  # fmt: skip
def test_what_is_refused(generate: Run, decoder: Path, requests: Path, words: tuple[str, ...], cause: str) -> None:
    code, out, err = generate(decoder, *words)
    assert (code, out) == (2, "") and cause in err


def test_a_file_of_broken_lines_only(generate: Run, decoder: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text('{"prompt": ""}\n[]\n')
    code, out, _ = generate(decoder, "--requests", "broken.jsonl", "--prefix-memory", "1GB")
    assert code == 1 and [json.loads(one)["line"] for one in out.splitlines()] == [1, 2]


def test_numbers_of_bytes() -> None:
    said = {"0": 0, "12": 12, "3kB": 3000, "1.5 MB": 1_500_000, "2GB": 2_000_000_000, "1GiB": 1 << 30, "4k": 4000}
    assert {text: Bytes().convert(text, None, None) for text in said} == said
    for text in ("", "GB", "1XB", "1e9", "2 GBB", "-1", "nan"):
        with pytest.raises(click.BadParameter):
            Bytes().convert(text, None, None)


def test_the_work_of_a_text_is_read_from_the_graph(decoder: Path) -> None:
    model = decoder / "decoder.onnx"
    work = model_work(open_decoder(model), model)
    layers, heads, size = 4, 6, 8
    assert work.square == pytest.approx(layers * 2 * heads * size)  # scores and their values, n * n each
    weights = layers * (2 * 48 * 48 + 2 * 48 * 16 + 3 * 48 * 112) + 48 * 500
    assert work.linear == pytest.approx(weights, rel=1e-3)
