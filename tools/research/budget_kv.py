"""What a language model loses when its caches keep a part of the prompt: `docs/results/budget-kv.md`.

`python -m burnish.tools.research.budget_kv` measures what `budget-kv.json` does not have yet and writes the page; a run
that was killed goes on where it was. `... page` only writes the page.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache, partial
from itertools import chain
from typing import Any

import msgspec
import numpy as np
import onnx_ir as oir

from burnish.backends.decoding.decoder import Decoder
from burnish.backends.decoding.keeping import Array, Keeper
from burnish.backends.decoding.state import State
from burnish.backends.ort.session import executor
from burnish.backends.ort.writing import OrtEngine
from burnish.ir.samples import Sample
from burnish.passes import catalog, kv_budget, kv_compress, kv_needs
from burnish.passes.base import Outcome
from burnish.passes.kv.budget_kv import BudgetKv
from burnish.passes.kv_budget import Budget
from burnish.passes.kv_layers import KeyLayers
from burnish.passes.metrics import negative_log_likelihoods
from burnish.tools.decoders import open_decoder
from burnish.tools.lossy_context import context_for
from burnish.tools.research import budget_kv_page, zoo
from burnish.tools.research.depth import FOLDER, Numbers, normal

NUMBERS, PAGE = FOLDER / "budget-kv.json", FOLDER / "budget-kv.md"
MODEL = "a3-smollm2-kv"
PROMPT, MORE, ASKED = 1024, 65, 64
"""Tokens of a prompt, of the text behind it, and of the passage of the prompt that is begun again at its end."""

TEXTS, FITTED, EACH = 48, 4, 16
"""Prompts that judge, prompts that budgets are fitted to, and prompts of one topic of the manual at most."""

KEEPS = ("20%", "50%")
RULES = ("uniform", "mass", "cosine")
MEASURED: tuple[kv_needs.By, ...] = ("mass", "cosine")
SINKS = 4
ROWS, TURNS = (1, 4), 15


@cache
def texts() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Windows of tokens of the Python manual: those that judge, and those to fit to, of other topics."""
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(zoo.ROOT / "smollm2" / "tokenizer.json"))
    found = [text for _, text in sorted(topics.items())]
    order = np.random.default_rng(0).permutation(len(found))
    encoded = [tokenizer.encode(found[index], add_special_tokens=False).ids for index in order]
    size = PROMPT + MORE
    cut = [[np.array(ids[at : at + size]) for at in range(0, len(ids) - size + 1, size)][:EACH] for ids in encoded]
    long = [one for one in cut if one]
    third = len(long) // 4
    return list(chain(*long[third:]))[:TEXTS], list(chain(*long[:third]))[:FITTED]


def copied(text: np.ndarray, seed: int) -> np.ndarray:
    """A prompt at whose end a passage begins again, and how that goes on: it can be looked up."""
    begun = PROMPT - ASKED
    at = int(np.random.default_rng(seed).integers(32, begun - ASKED - MORE))
    return np.concatenate([text[:begun], text[at : at + ASKED + MORE]])


def sample(ids: np.ndarray) -> Sample:
    """A text with empty caches."""
    feeds: dict[str, np.ndarray] = {}
    for value in normal(MODEL).graph.inputs:
        name, shape = str(value.name), list(value.shape or ())
        if len(shape) == 4:
            feeds[name] = np.zeros([1, shape[1], 0, shape[3]], np.float32)  # type: ignore[list-item]
        else:
            feeds[name] = np.arange(len(ids))[None] if "position" in name else np.ones((1, len(ids)), np.int64)
    return Sample("text", feeds | {"input_ids": ids[None]})


def parsed(keep: str, by: str) -> BudgetKv:
    """The pass."""
    (one,) = catalog.parse(f"budget-kv{{keep={keep};by={by}}}")
    assert isinstance(one, BudgetKv)
    return one


def needed(by: kv_needs.By) -> list[float]:
    """What each layer needs, as a part of the prompt."""
    model, one = normal(MODEL), parsed("20%", by)
    context = context_for(model, [sample(ids[:PROMPT]) for ids in texts()[1]])
    layers = range(len(KeyLayers(model).layers))
    found = kv_needs.needs(model, layers, context, by=by, share=one.share, window=one.window, pool=one.pool)
    return [float(each) for each in found]


class Last(Keeper):
    """Keeps the last tokens of all, and perhaps some first ones, whatever the queries say."""

    def __init__(self, made: Keeper, budget: Budget, first: int) -> None:
        self.budget, self.places, self._first = budget, made.places, first

    def kept(self, caches: list[Array], seen: Mapping[str, Array]) -> list[Array]:
        """See `Keeper`."""
        made = list(caches)
        for places, count in zip(self.places, self.budget.counts(caches[0].shape[2]), strict=True):
            for at in places:
                parts = [caches[at][:, :, : self._first], caches[at][:, :, self._first - count :]]
                made[at] = np.concatenate(parts if self._first else [caches[at][:, :, -count:]], 2)
        return made


def keepers(numbers: Numbers, decoder: Decoder, model: oir.Model) -> dict[str, Keeper]:
    """All ways to keep a part of a prompt, by name."""
    known = decoder.keeper
    assert known is not None
    found: dict[str, Keeper] = {}
    needs: dict[str, list[float]] = {by: numbers.get(f"{by} needs", partial(needed, by)) for by in MEASURED}
    for keep in KEEPS:
        one = parsed(keep, "uniform")
        for by in RULES:
            shares = kv_budget.shares(needs.get(by, [1.0] * len(known.budget.caches)), one.amount(), one.floor).tolist()
            caches = [
                msgspec.structs.replace(one, keep=share) for one, share in zip(known.budget.caches, shares, strict=True)
            ]
            budget = msgspec.structs.replace(known.budget, caches=tuple(caches))
            engine = OrtEngine(executor(threads=1)(kv_compress.compressor(model, budget)))
            found[f"{by} {keep}"] = Keeper(budget, engine, decoder.ports.caches)
        for name, first in (("last", 0), ("first and last", SINKS)):
            found[f"{name} {keep}"] = Last(known, found[f"uniform {keep}"].budget, first)
    return found


def told(decoder: Decoder, prompt: np.ndarray) -> State:
    """What a decoder remembers of a prompt but its last tokens."""
    state = decoder.start(1)
    for part in np.array_split(prompt[: PROMPT - ASKED], 4):
        state.feed(part[None])
    return state


def judged(begun: State, ways: Mapping[str, Keeper], text: np.ndarray) -> dict[str, Any]:
    """For each way: mean loss of what follows, the part of it that is the likeliest, bytes, seconds.

    Args:
        begun: remembers the prompt but its last tokens.
        ways: what lets go of a part of the caches.
        text: the prompt and what follows.
    """
    whole, decoder = begun.fork(), begun.decoder
    whole.feed(text[None, PROMPT - ASKED : PROMPT])
    behind, found = text[PROMPT:], {}
    for name, keeper in {"everything": None, **ways}.items():
        state, began = whole.fork(), time.perf_counter()
        if keeper is not None:
            decoder.keeper = keeper
            state.release()
        seconds = time.perf_counter() - began
        size = state.cache_bytes
        scores = state.feed(behind[None, :-1])[0]
        found[name] = {
            "loss": float(negative_log_likelihoods(scores, behind[1:]).mean()),
            "right": float((scores.argmax(-1) == behind[1:]).mean()),
            "bytes": size,
            "seconds": seconds,
        }
    return found


def steps(begun: State, ways: Mapping[str, Keeper]) -> dict[str, list[float]]:
    """Milliseconds of a step by the clock of the only thread, medians of turns: with all of a prompt, and with parts.

    Each list is for the numbers of `ROWS`.
    """
    begun.feed(np.ones((1, ASKED), np.int64))
    found: dict[str, list[float]] = {}
    for rows in ROWS:
        states = {}
        for name, keeper in {
            "everything": None,
            **{f"uniform {keep}": ways[f"uniform {keep}"] for keep in KEEPS},
        }.items():
            state = begun.fork()
            if keeper is not None:
                begun.decoder.keeper = keeper
                state.release()
            states[name] = state.select([0] * rows)
        took: dict[str, list[float]] = {name: [] for name in states}
        for _ in range(TURNS):
            for name, state in states.items():
                start = time.thread_time()
                state.feed(np.full((rows, 1), 5))
                took[name].append(1e3 * (time.thread_time() - start))
        for name, each in took.items():
            found.setdefault(name, []).append(float(np.median(each)))
    return found


def measure(numbers: Numbers) -> None:
    """Every prompt, one after the other."""
    model = normal(MODEL).clone()
    parsed("20%", "uniform").rewrite(model, Outcome("budget-kv"))
    assert kv_budget.read(model) is not None
    decoder = open_decoder(model)
    ways = keepers(numbers, decoder, model)
    numbers.get("steps", lambda: steps(told(decoder, texts()[0][0]), ways))
    for number, text in enumerate(texts()[0]):
        if f"copy {number}" not in numbers.known:
            begun = told(decoder, text)
            numbers.get(f"text {number}", partial(judged, begun, ways, text))
            numbers.get(f"copy {number}", partial(judged, begun, ways, copied(text, number)))


def main(arguments: Sequence[str]) -> int:
    """Measure and write."""
    numbers = Numbers(NUMBERS)
    if arguments != ["page"]:
        measure(numbers)
    PAGE.write_text(budget_kv_page.page(numbers.known, KEEPS, MEASURED, ROWS), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
