"""What drafts do for SmolLM2-135M: whether greedy answers stay, how many tokens are taken, and the time of an answer.

`python -m burnish.tools.research.speculative [PROMPTS] [FOLDER]` takes the model from FOLDER (.zoo), keeps the numbers
in `docs/results/speculative.json` after each of PROMPTS (20, at most 24) prompts, and writes
`docs/results/speculative.md`. Prompts whose numbers are there are not measured again.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from burnish.backends.decoding import loop, speculating
from burnish.backends.decoding.decoder import Decoder
from burnish.frontends import onnx_file
from burnish.passes import catalog
from burnish.passes.pipeline import Pipeline
from burnish.passes.recipes import NORMAL_FORM
from burnish.tools.decoders import open_decoder
from burnish.tools.research import zoo_tasks

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
NUMBERS = RESULTS / "speculative.json"
NAME = "a3-smollm2-kv"
TOKENS = 64
REMOVED = "4+5+13+14+17+25+26"
"""What `depth.py` found to be the best seven blocks to lack."""
PAIRS = "3:5+5:7+7:9+9:11+12:14+14:16+16:18+18:20+20:22+22:24+24:26+26:28"
"""The pairs of blocks by hand of `early_exit.md`."""
DRAFTS: dict[str, tuple[str, bool]] = {
    "4 bits": ("quantize-weights{bits=4,block=64}", False),
    "4 bits, calibrated": ("quantize-weights{bits=4,block=64}", True),
    "without 7 blocks": (f"remove-blocks{{blocks={REMOVED}}}", False),
    "parallel pairs": (f"parallel-blocks{{groups={PAIRS}}}", False),
    "parallel pairs, calibrated": (f"parallel-blocks{{groups={PAIRS}}}", True),
}
STARTS = (0, 128, 64)
"""Tokens of a text before its first prompt, its second and its third."""
SAID = 4
"""Tokens that a draft says at once."""

_PAGE = """# Drafts, measured

Made by `python -m burnish.tools.research.speculative`; numbers in [speculative.json](speculative.json).
SmolLM2-135M-Instruct (A3, float32) with [drafts](../commands/generate.md#drafts) made of itself: greedy, one row,
{said} tokens said at once, {tokens} tokens behind each of {prompts} prompts of {shortest} to {longest} tokens from the
Python manual.

- *same*: answers that are those without a draft, token for token.
- *taken*: of the tokens that the draft said.
- *tokens a step*: of an answer behind its first, for each step of the model; without a draft it is 1.
- *faster by*: time without the draft over time with it, prompt and answer together and the draft's work counted: the
  median over the prompts, and the second smallest and second largest. By the clock of one thread of a processor that
  had much other work, with and without the draft in turns on each prompt.

| draft | same | taken | tokens a step | faster by | from, to |
| --- | ---: | ---: | ---: | ---: | ---: |
"""


def _drafts(path: Path) -> dict[str, Decoder]:
    made: dict[str, Decoder] = {}
    for spec, _ in DRAFTS.values():
        if spec not in made:
            model = Pipeline((*NORMAL_FORM, *catalog.parse(spec))).rewrite(onnx_file.read(path)).model
            made[spec] = open_decoder(model, name=spec)
            print("made", spec, flush=True)
    return made


def _measure(prompts: list[tuple[int, ...]], path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(NUMBERS.read_text()) if NUMBERS.exists() else []
    if len(rows) >= len(prompts):
        return rows
    decoder, drafts = open_decoder(path), _drafts(path)
    for spec in drafts:
        speculating.check(decoder, drafts[spec])
    for ids in prompts[len(rows) :]:
        ask = loop.Ask(ids, TOKENS)
        begun = time.thread_time()
        plain, _ = loop.generate(decoder, [ask])
        row: dict[str, Any] = {"prompt": len(ids), "plain": time.thread_time() - begun, "drafts": {}}
        for name, (spec, calibrate) in DRAFTS.items():
            begun = time.thread_time()
            answers, took = speculating.generate(decoder, [ask], draft=drafts[spec], tokens=SAID, calibrate=calibrate)
            row["drafts"][name] = {
                "seconds": time.thread_time() - begun,
                "same": answers == plain,
                "drafted": took.drafted,
                "accepted": took.accepted,
                "tokens": took.decode_tokens,
                "steps": took.steps,
            }
        rows.append(row)
        NUMBERS.write_text(json.dumps(rows, indent=1) + "\n")
        print(len(rows), row, flush=True)
    return rows


def _page(rows: list[dict[str, Any]]) -> str:
    lengths = [row["prompt"] for row in rows]
    text = _PAGE.format(said=SAID, tokens=TOKENS, prompts=len(rows), shortest=min(lengths), longest=max(lengths))
    for name in DRAFTS:
        each = [row["drafts"][name] for row in rows]
        total = {key: sum(one[key] for one in each) for key in ("same", "drafted", "accepted", "tokens", "steps")}
        ratios = sorted(row["plain"] / one["seconds"] for row, one in zip(rows, each, strict=True))
        inner = ratios[1:-1] or ratios
        text += (
            f"| {name} | {total['same']} of {len(rows)} | {100 * total['accepted'] / total['drafted']:.0f} % "
            f"| {total['tokens'] / total['steps']:.2f} | {np.median(ratios):.2f}x "
            f"| {inner[0]:.2f} to {inner[-1]:.2f} |\n"
        )
    specs = [f"- {name}: `{spec}`\n" for name, (spec, _) in DRAFTS.items() if not name.endswith("calibrated")]
    return text + "\nThe drafts:\n\n" + "".join(specs)


def main(count: int, folder: Path) -> None:
    """Measure what is missing, and write the page."""
    labels = zoo_tasks.load(NAME, folder).labels
    texts = [labels[row % len(labels)][STARTS[row // len(labels)] :] for row in range(count)]
    prompts = [tuple(map(int, text[: 16 + row])) for row, text in enumerate(texts)]
    (RESULTS / "speculative.md").write_text(_page(_measure(prompts, folder / f"{NAME}.onnx")))


if __name__ == "__main__":
    given = sys.argv[1:]
    main(int(given[0]) if given else 20, Path(given[1]) if len(given) > 1 else Path(".zoo"))
