"""What a language model loses when layers share keys and values: `docs/results/kv.md`, its numbers in `kv.json`.

`python -m burnish.tools.research.kv` measures what the JSON does not have yet and writes the page; a run that was
killed goes on where it was. `... page` only writes the page, `... heal` measures healing alone and `... speed` the
speed (`kv-speed.json`).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import onnx_ir as oir

from burnish.passes.kv_layers import KeyLayers
from burnish.passes.kv_search import Order, Pairs, Search
from burnish.passes.kv_sharing import share
from burnish.tools.lossy_context import context_for
from burnish.tools.research import kv_heads, kv_page, kv_speed
from burnish.tools.research.depth import FOLDER, LANGUAGE, Numbers, normal, perplexity, windows

NUMBERS, SPEED, PAGE = FOLDER / "kv.json", FOLDER / "kv-speed.json", FOLDER / "kv.md"
COUNTS, HEALED = (2, 4, 8, 12), 9
"""Layers of 30 that lose their keys and values; and how many of the healed model."""

CHOOSE_BY: dict[Order, tuple[str, int]] = {
    "loss": ("check", 2),
    "dissimilar": ("short", 30),
    "similar": ("short", 30),
    "random": ("short", 30),
}
"""What each search looks at: windows of `depth.py`, whose topics are not those that judge."""

TRIES, SEEDS, MINUTES = 12, (0, 1, 2), 12


def searched(order: Order, seed: int = 0) -> Iterator[Pairs]:
    """What a search chooses for one layer, for two, and so on."""
    model = normal(LANGUAGE)
    kind, count = CHOOSE_BY[order]
    found = KeyLayers(model)
    pairs = [(i, j) for i in range(len(found.layers)) for j in range(i)]
    context = context_for(model, windows(kind)[:count])
    return Search(order, context, 0.5, TRIES, seed).plans(model, found, pairs)


def shared(pairs: Mapping[int, int]) -> oir.Model:
    """The model with layers that share."""
    copy = normal(LANGUAGE).clone()
    share(copy, KeyLayers(copy), pairs)
    return copy


def judged(pairs: Mapping[int, int]) -> float:
    """Its perplexity on text that nothing was chosen by."""
    return perplexity(shared(pairs), windows("held-out"))


def kept(numbers: Numbers, order: Order, seed: int = 0) -> dict[int, Pairs]:
    """The plans of a search for each of the counts."""
    name = f"{order} {seed}" if order == "random" else order
    wanted = [*COUNTS, HEALED] if order == "loss" else list(COUNTS)
    known = numbers.known
    if any(f"{name} {count} pairs" not in known for count in wanted):
        for plan in searched(order, seed):
            if len(plan) in wanted:
                numbers.get(f"{name} {len(plan)} pairs", partial(list, plan.items()))
            if len(plan) == max(wanted):
                break
    return {count: dict(map(tuple, numbers.known[f"{name} {count} pairs"])) for count in wanted}


def measure(numbers: Numbers) -> None:
    """Everything but healing."""
    numbers.get("dense", partial(judged, {}))
    searches: list[tuple[Order, int]] = [
        ("loss", 0), ("similar", 0), ("dissimilar", 0), *(("random", seed) for seed in SEEDS)
    ]  # fmt: skip
    found = {(order, seed): kept(numbers, order, seed) for order, seed in searches}
    for count in COUNTS:
        for (order, seed), plans in found.items():
            name = f"{order} {seed}" if order == "random" else order
            numbers.get(f"{name} {count}", partial(judged, plans[count]))


def healed(numbers: Numbers) -> None:
    """The plan for nine layers, trained to do what the original does."""
    from burnish.backends.fx.healing import HealOptions, heal

    pairs = kept(numbers, "loss")[HEALED]
    numbers.get(f"loss {HEALED}", partial(judged, pairs))

    def train() -> dict[str, Any]:
        start = time.perf_counter()
        options = HealOptions(minutes=MINUTES, batch=4, rate=3e-4, train="all")
        found = heal(shared(pairs), normal(LANGUAGE), windows("training"), options)
        seconds = time.perf_counter() - start
        return {
            "perplexity": perplexity(found.model, windows("held-out")),
            "before": found.before,
            "after": found.after,
            "minutes": seconds / 60,
            "ended": found.ended,
        }

    numbers.get("healed", train)


def main(arguments: Sequence[str]) -> int:
    """Measure and write."""
    numbers, speed = Numbers(NUMBERS), Numbers(SPEED)
    if arguments == ["heal"]:
        healed(numbers)
    elif arguments == ["speed"]:
        kv_speed.measure(speed, kept(numbers, "loss")[HEALED])
    elif arguments != ["page"]:
        measure(numbers)
    text = kv_page.page(numbers.known, COUNTS, HEALED, SEEDS) + "".join(kv_speed.page(speed.known, HEALED))
    PAGE.write_text(text + kv_heads.section(Numbers(kv_heads.NUMBERS).known), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
