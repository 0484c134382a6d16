"""The folder of a small decoder with random weights: a model with caches, a tokenizer of bytes, and what says more."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from burnish.tools.research import structures

END = 256


def tokenizer(size: int = END + 1) -> tokenizers.Tokenizer:
    """One token for each byte, and `<end>`; more tokens that nothing uses up to `size`."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    extra = [f"<unused-{index}>" for index in range(END + 1, size)]
    vocabulary = {word: index for index, word in enumerate([*letters, "<end>", *extra])}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<end>"])
    return made


def folder(path: Path, name: str = "llama-kv-dynp", context: int | None = 64) -> Path:
    """Write `decoder.onnx`, `tokenizer.json`, `tokenizer_config.json` and, with a context, `genai_config.json`."""
    path.mkdir()
    onnx.save(structures.load(name), path / "decoder.onnx")
    tokenizer().save(str(path / "tokenizer.json"))
    template = "{% for one in messages %}<{{ one.role }}>{{ one.content }}{{ eos_token }}{% endfor %}"
    words = {"eos_token": {"content": "<end>"}, "chat_template": template}
    (path / "tokenizer_config.json").write_text(json.dumps(words))
    if context is not None:
        said = {"model": {"context_length": context, "eos_token_id": [END], "decoder": {"filename": "decoder.onnx"}}}
        (path / "genai_config.json").write_text(json.dumps(said))
    return path
