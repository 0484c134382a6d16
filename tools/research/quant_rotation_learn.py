"""Learn rotations for `quant_rotation`: `python -m burnish.tools.research.quant_rotation_learn SEED [NAME=VALUE...]`.

Writes `.zoo/rotations/learned-SEED.npz`: what was learned, and how. Options are those of `LearnOptions`, `batch` (texts
of a sample) and `count` (samples); a step of 8 texts takes a second on an H100 and a minute on one core, so the default
is `device=cuda`. The rows on the page were learned by `SEED device=cpu batch=2 count=80 steps=60 apart=3 every=10`.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from burnish.backends.fx.rotation import LearnOptions, learn
from burnish.frontends import onnx_file
from burnish.ir.samples import Sample
from burnish.passes.learned import Learned
from burnish.passes.pipeline import Pipeline
from burnish.passes.recipes import NORMAL_FORM
from burnish.passes.simulated import Bits
from burnish.tools.research import zoo, zoo_data, zoo_real

MODEL = "a3-smollm2-nocache"
FOLDER = zoo.ROOT / "rotations"

LEARNED = LearnOptions(bits=Bits(activation_range=0.85, cache_range=0.95), steps=300, apart=4, every=20, device="cuda")
SEEDS = (0, 1, 2)
"""How rotations are learned, and from which random matrices on."""

TOKENS, BATCH, TESTED = 256, 8, 8
"""Tokens of a text, texts of a sample by default, and how many of the topics the perplexity is measured on."""

_LISTS = ("values", "norm_logs", "value_logs", "score_logs", "gated_logs")


def samples(batch: int = BATCH, count: int | None = None) -> list[Sample]:
    """Batches of texts: Python's help without the topics that are measured on, and docstrings of its library."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(zoo_real.smollm2_folder(zoo.ROOT) / "tokenizer.json"))
    topics = (tokenizer.encode(text, add_special_tokens=False).ids for text in zoo_data.topics()[TESTED:])
    rows = [ids[start : start + TOKENS] for ids in topics for start in range(0, len(ids) - TOKENS + 1, TOKENS)]
    strings = (tokenizer.encode(text + "\n\n", add_special_tokens=False).ids for text in zoo_data.docstrings())
    ids = [one for text in strings for one in text]
    rows += [ids[start : start + TOKENS] for start in range(0, len(ids) - TOKENS + 1, TOKENS)]
    mixed = np.array(rows, np.int64)[np.random.default_rng(0).permutation(len(rows))]
    batches = [mixed[start : start + batch] for start in range(0, len(mixed) - batch + 1, batch)][:count]
    return [
        Sample(f"texts {i}", {"input_ids": one, "attention_mask": np.ones_like(one)}) for i, one in enumerate(batches)
    ]


def file_of(seed: int) -> Path:
    """What was learned from a seed on."""
    return FOLDER / f"learned-{seed}.npz"


def save(file: Path, found: Learned, record: dict[str, Any]) -> None:
    """Keep what was learned, and how."""
    arrays = {"turn": found.turn}
    for name in _LISTS:
        arrays |= {f"{name} {i}": one for i, one in enumerate(getattr(found, name))}
    file.parent.mkdir(parents=True, exist_ok=True)
    arrays["record"] = np.array(json.dumps(record))
    np.savez(file, **arrays)  # type: ignore[arg-type]


def load(file: Path) -> tuple[Learned, dict[str, Any]]:
    """What `save` kept."""
    with np.load(file) as kept:
        lists: dict[str, list[Any]] = {}
        for name in _LISTS:
            count = sum(key.startswith(f"{name} ") for key in kept)
            lists[name] = [kept[f"{name} {i}"] for i in range(count)]
        return Learned(kept["turn"], **lists), json.loads(str(kept["record"]))


def teach(options: LearnOptions, batch: int = BATCH, count: int | None = None) -> tuple[Learned, dict[str, Any]]:
    """What is learned, and with what options, in what time and memory, with what losses."""
    import torch

    model = Pipeline(NORMAL_FORM).rewrite(onnx_file.read(zoo.path(MODEL))).model
    texts = samples(batch, count)
    least: list[float] = []
    losses: list[float] = []
    started = time.perf_counter()

    def told(step: int, loss: float, so_far: float) -> None:
        losses.append(loss)
        least.append(so_far)
        if step % options.every == 0:
            print(f"step {step}: {loss:.4f}, {so_far:.4f}, {time.perf_counter() - started:.0f} s", flush=True)

    found = learn(model, texts, options, told)
    cuda = options.device.startswith("cuda")
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return found, {
        "options": asdict(options),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "samples": len(texts),
        "batch": batch,
        "least": least,
        "losses": losses,
        "seconds": time.perf_counter() - started,
        "peak": peak,
    }


def main() -> None:
    """Learn from one seed on."""
    seed, *rest = sys.argv[1:]
    given = dict(one.split("=", 1) for one in rest)
    batch = int(given.pop("batch", BATCH))
    count = int(given.pop("count")) if "count" in given else None
    kinds = {name: type(getattr(LEARNED, name)) for name in given}
    options = replace(LEARNED, seed=int(seed), **{name: kinds[name](value) for name, value in given.items()})
    save(file_of(int(seed)), *teach(options, batch, count))


if __name__ == "__main__":
    main()
