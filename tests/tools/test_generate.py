"""`burnish generate` as a user runs it, with a small decoder of random weights and a tokenizer of bytes."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest

pytest.importorskip("tokenizers")

import small_decoder  # noqa: E402
from commands import Run, runner  # noqa: E402

from burnish.backends.decoding.engine import RunnerEngine  # noqa: E402
from burnish.backends.decoding.speaking import Speech  # noqa: E402
from burnish.tools.research import zoo_handmade  # noqa: E402


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_decoder.folder(tmp_path_factory.mktemp("made") / "decoder")


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs the command in this process: (exit code, stdout, stderr)."""
    return runner(monkeypatch, capfd, tmp_path, "burnish", "generate")


def lines(path: Path, *given: object) -> Path:
    path.write_text("".join(f"{one if isinstance(one, str) else json.dumps(one)}\n" for one in given))
    return path


def test_text_goes_to_stdout_and_figures_to_stderr(generate: Run, decoder: Path) -> None:
    code, out, err = generate(decoder, "--prompt", "Once", "--max-tokens", 9)
    assert code == 0 and "tokens/s" not in out
    assert [line.split()[0] for line in err.splitlines()] == ["prompt", "answer", "caches"]
    code, same, _ = generate(decoder / "decoder.onnx", "--prompt", "Once", "--max-tokens", 9, "--json")
    found = json.loads(same)
    assert code == 0 and len(found["ids"]) == found["tokens"] == 9 and found["ended"] == "length"
    assert found["figures"]["cache_bytes"] == 2 * 4 * 2 * (4 + 8) * 8 * 4
    assert found["prompt_tokens"] == 4


def test_a_text_moves_no_cursor_and_is_no_command(
    generate: Run, decoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = iter(["::er", "ror::x\n", "\x1b[2J", "\N{NO-BREAK SPACE}\N{LATIN SMALL LETTER E WITH ACUTE}"])
    monkeypatch.setattr(Speech, "add", lambda self, token: self._say(next(said), last=False))
    wanted = ("--prompt", "Once", "--max-tokens", 4)
    text = "::error::x\n\\x1b[2J\N{NO-BREAK SPACE}\N{LATIN SMALL LETTER E WITH ACUTE}\n"
    assert generate(decoder, *wanted)[1] == text
    said = iter(["::er", "ror::x\n", "\x1b[2J", "\N{NO-BREAK SPACE}\N{LATIN SMALL LETTER E WITH ACUTE}"])
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    assert generate(decoder, *wanted)[1] == f"\\{text}"


@pytest.mark.parametrize("runtime", ["fx", pytest.param("tvm", marks=pytest.mark.slow)])
def test_other_runtimes_say_the_same(generate: Run, decoder: Path, runtime: str) -> None:
    pytest.importorskip({"fx": "torch", "tvm": "tvm"}[runtime])
    wanted = ("--prompt", "Once upon", "--max-tokens", 6, "--json")
    first, second = (json.loads(generate(decoder, *wanted, *more)[1]) for more in ((), ("--runtime", runtime)))
    assert first["ids"] == second["ids"]


def test_a_batch_of_requests_is_each_alone(generate: Run, decoder: Path, tmp_path: Path) -> None:
    asks = [
        {"id": "a", "prompt": "Once", "max_tokens": 5},
        {"id": 2, "prompt": "A longer prompt", "temperature": 1.0, "top_k": 9, "seed": 3},
        {"prompt": "x", "temperature": 0.8, "top_p": 0.9},
        {"ids": [1, 2, 3], "max_tokens": 4},
    ]
    code, out, err = generate(decoder, "--requests", lines(tmp_path / "in.jsonl", *asks), "--max-tokens", 7)
    found = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [one["id"] for one in found] == ["a", 2, None, None]
    assert [one["tokens"] for one in found] == [5, 7, 7, 4] and [one["line"] for one in found] == [1, 2, 3, 4]
    assert "prompt  23 tokens" in err
    alone = generate(decoder, "--requests", tmp_path / "in.jsonl", "--max-tokens", 7, "--batch", 1)[1]
    assert alone == out


def test_broken_lines_leave_the_others_alone(generate: Run, decoder: Path, tmp_path: Path) -> None:
    good = {"id": "good", "prompt": "Once", "max_tokens": 2}
    path = lines(
        tmp_path / "in.jsonl", good, "{nonsense", "", {"id": 7}, {"prompt": ""}, {"prompt": "a", "colour": 1},
        {"ids": [9999]}, {"prompt": "a" * 65}, {"prompt": "a", "top_p": 3}, {"prompt": 5}, good,
    )  # fmt: skip
    code, out, err = generate(decoder, "--requests", path)
    found = [json.loads(line) for line in out.splitlines()]
    assert code == 1
    assert [one["line"] for one in found] == [1, 2, 4, 5, 6, 7, 8, 9, 10, 11]
    assert found[0]["text"] == found[-1]["text"] and found[0]["id"] == "good"
    causes = [one["error"] for one in found[1:-1]]
    wanted = [
        "JSON is malformed", "either a `prompt` or `ids`", "the prompt is empty", "unknown field `colour`",
        "no token 9999, it has 500", "65 tokens are more than the 64", "`top_p` is 3", "Expected `str",
    ]  # fmt: skip
    for cause, said in zip(wanted, causes, strict=True):
        assert cause in said and said in err
    assert found[2]["id"] == 7
    code, out, _ = generate(decoder, "--requests", lines(tmp_path / "in.jsonl", "[]"))
    assert code == 1 and json.loads(out)["line"] == 1


def test_stop_strings_and_stop_tokens(generate: Run, decoder: Path, tmp_path: Path) -> None:
    whole = json.loads(generate(decoder, "--prompt", "Once", "--max-tokens", 40, "--temperature", 1, "--json")[1])
    assert whole["ended"] == "length"
    stop = whole["text"][5:7]
    cut = json.loads(
        generate(decoder, "--prompt", "Once", "--max-tokens", 40, "--temperature", 1, "--stop", stop, "--json")[1]
    )
    assert cut["ended"] == "stop" and cut["text"] == whole["text"][: whole["text"].find(stop)]
    own = small_decoder.folder(tmp_path / "own")
    genai = json.loads((own / "genai_config.json").read_text())
    genai["model"]["eos_token_id"] = whole["ids"][4]
    (own / "genai_config.json").write_text(json.dumps(genai))
    ended = json.loads(generate(own, "--prompt", "Once", "--temperature", 1, "--json")[1])
    assert ended["ended"] == "stop" and ended["ids"] == whole["ids"][: whole["ids"].index(whole["ids"][4])]


def test_an_answer_ends_where_the_range_of_the_model_does(generate: Run, decoder: Path) -> None:
    found = json.loads(generate(decoder, "--prompt", "a" * 60, "--json")[1])
    assert found["ended"] == "range" and found["tokens"] == 5


def test_a_message_goes_through_the_template(generate: Run, decoder: Path, tmp_path: Path) -> None:
    found = json.loads(generate(decoder, "--chat", "--prompt", "Hi", "--max-tokens", 1, "--json")[1])
    assert found["prompt_tokens"] == len("<user>Hi") + 1
    plain = small_decoder.folder(tmp_path / "plain")
    (plain / "tokenizer_config.json").write_text('{"chat_template": "{{ raise_exception(\'no users\') }}"}')
    code, _, err = generate(plain, "--chat", "--prompt", "Hi")
    assert code == 2 and "cannot be filled in: no users" in err
    (plain / "tokenizer_config.json").unlink()
    assert "no chat template" in generate(plain, "--chat", "--prompt", "Hi")[2]


def test_check_compares_caches_with_computing_at_once(
    generate: Run, decoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = generate(decoder, "--check", "--prompt", "Once upon a time")
    assert code == 0 and "rows of any lengths" in out and "token by token" in out.splitlines()[-1]
    assert generate(decoder, "--check")[0] == 0
    right = RunnerEngine.call

    def forgetful(self: RunnerEngine, feeds, into):  # type: ignore[no-untyped-def]
        found = right(self, feeds, into)
        return {name: one * (0.9 if one.ndim == 4 else 1) for name, one in found.items()}

    monkeypatch.setattr(RunnerEngine, "call", forgetful)
    code, out, _ = generate(decoder, "--check", "--runtime", "fx")
    assert code == 1 and out.startswith("difference")
    code, out, err = generate(decoder, "--prompt", "Once", "--runtime", "fx")
    assert (code, out) == (2, "") and "with its caches the model gives other scores than at once" in err


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        ((), "give either `--prompt` or `--requests`"),
        (("--prompt", "a", "--requests", "b"), "give either `--prompt` or `--requests`"),
        (("--prompt", ""), "the prompt is empty"),
        (("--prompt", "a" * 65), "65 tokens are more than the 64 that the model has positions for"),
        (("--prompt", "a", "--tokenizer", "none.json"), "there is no tokenizer"),
        (("--prompt", "a", "--tokenizer", "broken.json"), "this is no tokenizer"),
        (("--prompt", "a", "--tokenizer", "large.json"), "has ids up to 599, the model's end at 499"),
        (("--prompt", "a", "--temperature", "-1"), "temperature"),
        (("--requests", "none.jsonl"), "the file cannot be read"),
        (("--requests", "empty.jsonl"), "the file holds no request"),
    ],
)
def test_what_is_refused(generate: Run, decoder: Path, tmp_path: Path, words: tuple[str, ...], cause: str) -> None:
    (tmp_path / "broken.json").write_text("{}")
    (tmp_path / "empty.jsonl").write_text("\n")
    small_decoder.tokenizer(600).save(str(tmp_path / "large.json"))
    code, out, err = generate(decoder, *words)
    assert (code, out) == (2, "") and cause in err and "hint: " in err


def test_folders_that_are_refused(generate: Run, tmp_path: Path) -> None:
    made = small_decoder.folder(tmp_path / "made", context=None)
    (made / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    assert "no tokenizer beside the model" in generate(made, "--prompt", "a")[2]
    assert "there is no such file or folder" in generate(made / "other.onnx", "--prompt", "a")[2]
    path = lines(tmp_path / "in.jsonl", {"ids": [1, 2], "max_tokens": 3}, {"prompt": "a"})
    code, out, err = generate(made, "--requests", path)
    assert code == 1 and "no tokenizer beside the model" in err and len(json.loads(out.splitlines()[0])["ids"]) == 3
    (made / "second.onnx").write_bytes((made / "decoder.onnx").read_bytes())
    assert "several models: decoder.onnx, second.onnx" in generate(made, "--prompt", "a")[2]
    (made / "genai_config.json").write_text('{"model": {"decoder": {"filename": "../decoder.onnx"}}}')
    assert "which is not there" in generate(made, "--prompt", "a")[2]
    (made / "genai_config.json").write_text("[]")
    assert "it is no JSON object" in generate(made, "--prompt", "a")[2]
    (tmp_path / "empty").mkdir()
    assert "no `.onnx` file" in generate(tmp_path / "empty", "--prompt", "a")[2]


def test_graphs_may_lie_in_a_folder_of_their_own(generate: Run, tmp_path: Path) -> None:
    made = small_decoder.folder(tmp_path / "made", context=None)
    (made / "onnx").mkdir()
    (made / "onnx" / "model_other.onnx").write_bytes(b"")
    (made / "decoder.onnx").rename(made / "onnx" / "model.onnx")
    wanted = ("--prompt", "a", "--max-tokens", 2, "--json")
    first, second = (json.loads(generate(one, *wanted)[1]) for one in (made, made / "onnx" / "model.onnx"))
    assert first["ids"] == second["ids"]


def test_a_model_without_caches_is_told_how_to_get_some(generate: Run, tmp_path: Path) -> None:
    made = small_decoder.folder(tmp_path / "made", "llama-nocache-dynp")
    code, _, err = generate(made, "--prompt", "a")
    assert code == 2 and "takes no past keys and values" in err and "add-kv-cache" in err


def test_a_draft_changes_no_answer(generate: Run, decoder: Path, tmp_path: Path) -> None:
    path = lines(
        tmp_path / "in.jsonl",
        {"prompt": "Once upon", "max_tokens": 9},
        {"prompt": "A"},
        {"ids": [3, 4], "max_tokens": 1},
        {"prompt": 7},
    )
    other = small_decoder.folder(tmp_path / "other", "llama-kv-op23", context=40)
    plain = generate(decoder, "--requests", path)
    for draft, *more in ((decoder, "--draft-tokens", 2), (decoder, "--calibrate"), (other / "decoder.onnx",)):
        code, out, err = generate(decoder, "--requests", path, "--draft", draft, *more)
        assert (code, out) == plain[:2] and "tokens a step of the model" in err
    wanted = ("--prompt", "Once", "--max-tokens", 11, "--json")
    first, second = (json.loads(generate(decoder, *wanted, *more)[1]) for more in ((), ("--draft", decoder)))
    assert first["ids"] == second["ids"]
    figures = second["figures"]
    assert (figures["drafted"], figures["accepted"], figures["steps"], figures["decode_tokens"]) == (8, 8, 2, 10)
    assert figures["cache_bytes"] > first["figures"]["cache_bytes"]


def test_drafts_that_are_refused(generate: Run, decoder: Path, tmp_path: Path) -> None:
    with mock.patch.dict(vars(zoo_handmade), {"VOCABULARY": 400}):
        zoo_handmade.Builder(layers=1).write(tmp_path / "other.onnx")
    bare = small_decoder.folder(tmp_path / "bare", "llama-nocache-dynp")
    narrow = small_decoder.folder(tmp_path / "narrow", context=63)
    prompt = ("--prompt", "a")
    for words, cause in [
        ((*prompt, "--draft", tmp_path / "other.onnx"), "the draft has 400 tokens, the model 500"),
        ((*prompt, "--draft", bare), "takes no past keys and values"),
        ((*prompt, "--draft", "none.onnx"), "none.onnx"),
        (("--check", "--draft", decoder), "looks at one model"),
        ((*prompt, "--calibrate"), "is for a draft"),
        ((*prompt, "--draft-tokens", 3), "`--draft-tokens` is for a draft"),
        ((*prompt, "--calibrate", "--draft", narrow), "it has positions for 63 tokens only"),
    ]:
        code, out, err = generate(decoder, *words)
        assert (code, out) == (2, "") and cause in err and "hint: " in err


def test_a_model_with_a_budget_says_what_it_kept_of_the_prompt(
    generate: Run, decoder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The folder of the graph for other runtimes does not make it unclear which model is meant."""
    optimize, out = runner(monkeypatch, capfd, tmp_path, "burnish", "optimize"), tmp_path / "kept"
    out.mkdir()
    asked = "budget-kv{keep=50%,by=uniform,window=4}"
    code, _, err = optimize(decoder / "decoder.onnx", "-o", out / "decoder.onnx", "-p", asked)
    assert code == 0, err
    assert sorted(str(one.relative_to(out)) for one in out.rglob("*.onnx")) == ["compress/decoder.onnx", "decoder.onnx"]
    given = ("--tokenizer", decoder, "--prompt", "Once upon a time there was", "--max-tokens", 2)
    code, found, err = generate(out, *given, "--json")
    figures = json.loads(found)["figures"]
    assert code == 0 and figures["prompt_bytes"] == 2 * figures["cache_bytes"] - 2 * 2 * 4 * 2 * 8 * 4, figures
    assert err.splitlines()[-1] == "caches  0.01 MB, of 0.01 MB for the prompt"
    assert json.loads(generate(out, *given, "--json", "--runtime", "fx")[1])["ids"] == json.loads(found)["ids"]
    code, _, err = generate(out, *given, "--draft", out, "--calibrate")
    assert code == 2 and "budgets" in err
    assert generate(out, "--check")[0] == 0


def test_budgets_that_are_measured_need_texts(
    decoder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import numpy as np

    optimize, ids = runner(monkeypatch, capfd, tmp_path, "burnish", "optimize"), np.arange(320).reshape(8, 40) % 90 + 1
    code, _, err = optimize(decoder / "decoder.onnx", "-o", tmp_path / "out.onnx", "-p", "budget-kv")
    assert code == 2 and "--data" in err
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.tile(np.arange(40), (8, 1))}
    empty = np.zeros((8, 2, 0, 8), np.float32)
    feeds |= {f"past_key_values.{layer}.{kind}": empty for layer in range(4) for kind in ("key", "value")}
    np.savez(tmp_path / "texts.npz", **feeds)  # type: ignore[arg-type]
    given = ("-p", "budget-kv{window=8}", "--data", tmp_path / "texts.npz")
    code, out, err = optimize(decoder / "decoder.onnx", "-o", tmp_path / "out.onnx", *given)
    assert code == 0, err
    assert (tmp_path / "compress" / "out.onnx").is_file()


def test_a_file_where_the_folder_of_the_compress_graph_belongs_is_an_error_and_nothing_is_written(
    decoder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    optimize = runner(monkeypatch, capfd, tmp_path, "burnish", "optimize")
    (tmp_path / "compress").write_text("notes")
    given = ("-o", tmp_path / "out.onnx", "-p", "budget-kv{by=uniform;window=8}")
    code, _, err = optimize(decoder / "decoder.onnx", *given)
    assert code == 2 and "compress: the folder" in err
    assert [one.name for one in tmp_path.iterdir()] == ["compress"]
    assert (tmp_path / "compress").read_text() == "notes"
