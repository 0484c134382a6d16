"""What prefixes that are computed once save for SmolLM2-135M: tokens, time and bytes, by rule and by memory.

`python -m burnish.tools.research.prefix [FOLDER]` takes the model from FOLDER (.zoo), keeps the numbers in
`docs/results/prefix.json` after each run, and writes `docs/results/prefix.md`. Runs whose numbers are there are not
made again.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from burnish.backends.decoding import grouping, loop, sharing
from burnish.backends.decoding.decoder import Decoder
from burnish.backends.decoding.radix import Tokens, Work
from burnish.backends.decoding.sharing import Schedule
from burnish.tools.decoders import open_decoder
from burnish.tools.generate_prefixes import model_work
from burnish.tools.research import zoo_data
from burnish.tools.research.zoo_real import smollm2_folder

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
NUMBERS = RESULTS / "prefix.json"
NAME = "a3-smollm2-kv"
BATCH, ANSWER = 8, 4
"""Rows of a batch, tokens of an answer."""
RUNS = (
    ("off", 0),
    ("lru", 20),
    ("groups", 20),
    ("lru", 60),
    ("auto", 60),
    ("groups", 60),
    ("lru", 120),
    ("off, again", 0),
)
"""Rules, and megabytes for what is held."""
MANY_MEGABYTES = (60, 180, 540)
RULES = ("lru", "flops, alpha 0.5", "flops, alpha 2", "auto", "groups")
SYSTEM = (
    "You are an assistant for readers of the Python manual. Answer from the text that is given and from nothing else. "
    "Be short: one sentence is enough. If the text does not say it, say that it does not."
)
QUESTIONS = (
    "What is this text about?", "Which statement does it describe?", "Name one exception that it mentions.",
    "Give an example of what it says.", "What changed in a later version?", "What is evaluated first?",
    "Which names does it define?", "What is not allowed?", "Is there a default value?", "Sum it up in five words.",
)  # fmt: skip


def prompts(count: int, documents: int, tokenizer: Any) -> list[Tokens]:
    """Prompts as they may arrive: questions on texts, tasks with examples, and some that share nothing.

    Six of eight are questions: the instruction, the beginning of a text of the manual, a question. One of eight has
    one of four tasks with six examples, cut out of the manual, and a new case. One of eight is a text alone.
    """
    random, texts = np.random.default_rng(0), zoo_data.topics()
    popular = 1 / np.arange(1, documents + 1)
    starts = [texts[one % 40][1500 * (one // 40) :][: int(random.integers(500, 1800))] for one in range(documents)]
    lines = [line.strip() for text in texts[:30] for line in text.splitlines() if 40 < len(line.strip()) < 70]
    tasks = []
    for name in ("Shout", "First word", "Length", "Last word"):
        shown = [lines[int(one)] for one in random.integers(0, len(lines), 6)]
        tasks.append(f"{name} of each line.\n" + "".join(f"Line: {one}\nAnswer: {_done(name, one)}\n" for one in shown))
    made = []
    for index in range(count):
        line = lines[int(random.integers(len(lines)))]
        if index % 8 == 6:
            text = f"{tasks[int(random.integers(4))]}Line: {line}\nAnswer:"
        elif index % 8 == 7:
            text = f"{line} {lines[int(random.integers(len(lines)))]}"
        else:
            document = starts[int(random.choice(documents, p=popular / popular.sum()))]
            text = f"{SYSTEM}\n\n{document}\n\nQuestion: {QUESTIONS[int(random.integers(len(QUESTIONS)))]}\nAnswer:"
        made.append(tuple(tokenizer.encode(text, add_special_tokens=False).ids))
    return [made[int(index)] for index in random.permutation(count)]


def _done(task: str, line: str) -> str:
    done = {"Shout": line.upper(), "First word": line.split()[0], "Length": str(len(line))}
    return done.get(task, line.split()[-1])


def _schedule(decoder: Decoder, given: Sequence[Tokens], rule: str, budget: int, work: Work) -> Schedule:
    if rule == "groups":
        return sharing.grouped(decoder, given, BATCH, budget)
    alphas = {"lru": (0.0,), "auto": sharing.ALPHAS}.get(rule) or (float(rule.split()[-1]),)
    return sharing.in_order(decoder, given, BATCH, budget, alphas, work)


def _run(decoder: Decoder, given: Sequence[Tokens], schedule: Schedule | None) -> dict[str, Any]:
    """Answer all prompts: seconds of the processor, tokens, and the answers."""
    shared = schedule.start(decoder) if schedule is not None else None
    answers: dict[int, list[int]] = {}
    spent = {"prompts": 0.0, "all": 0.0}

    def begin(one: Decoder, some: Sequence[Tokens]) -> Any:
        begun = time.thread_time()
        found = loop.prefill(one, some) if shared is None else shared.prefill(one, some)
        spent["prompts"] += time.thread_time() - begun
        return found

    begun = time.thread_time()
    for batch in loop.batches(decoder, given, BATCH) if schedule is None else schedule.batches:
        asks = [loop.Ask(given[index], ANSWER) for index in batch]
        found, _ = loop.generate(decoder, asks, begin=begin)
        answers |= {index: one.ids for index, one in zip(batch, found, strict=True)}
    spent["all"] = time.thread_time() - begun
    row: dict[str, Any] = {"seconds": spent, "answers": [answers[index] for index in range(len(given))]}
    if shared is None or schedule is None:
        return row | {"computed": sum(map(len, given))}
    counts = shared.counts
    row |= {"computed": counts.computed, "predicted": schedule.predicted.computed, "most": counts.most}
    return row | {"alpha": schedule.alpha, "left": shared.tree.bytes, "evicted": counts.evicted}


def _measure(decoder: Decoder, given: Sequence[Tokens], work: Work) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(NUMBERS.read_text()) if NUMBERS.exists() else {"runs": {}, "counted": {}}
    for rule, size in RUNS:
        name = f"{rule} {size}"
        if name in found["runs"]:
            continue
        schedule = _schedule(decoder, given, rule, size * 10**6, work) if size else None
        row: dict[str, Any] = {"rule": rule, "megabytes": size} | _run(decoder, given, schedule)
        answers = row.pop("answers")
        expected = found.setdefault("answers", answers)
        row["same"] = sum(one == other for one, other in zip(answers, expected, strict=True))
        found["runs"][name] = row
        NUMBERS.write_text(json.dumps(found) + "\n")
        print(name, row, flush=True)
    return found


def _count(decoder: Decoder, found: dict[str, Any], given: Sequence[Tokens], work: Work) -> None:
    """Tokens that would be computed of many prompts; nothing is run."""
    for size in MANY_MEGABYTES:
        for rule in RULES:
            name = f"{rule} {size}"
            if name not in found["counted"]:
                planned = _schedule(decoder, given, rule, size * 10**6, work)
                counts = planned.predicted
                row = {"computed": counts.computed, "work": counts.work, "most": counts.most, "alpha": planned.alpha}
                found["counted"][name] = row
                NUMBERS.write_text(json.dumps(found) + "\n")
                print("counted", name, row, flush=True)
    if "tree" not in found:
        tree = len({one[:k] for one in given for k in range(1, len(one))}) + len(given)
        once = grouping.choose(given, nested=False).tokens
        found |= {"many": len(given), "tokens": sum(map(len, given)), "tree": tree, "one level": once}
        found["chosen"] = grouping.choose(given, price=sharing.PRICE).tokens
        NUMBERS.write_text(json.dumps(found) + "\n")


_PAGE = """# Prefixes, measured

Made by `python -m burnish.tools.research.prefix`; numbers in [prefix.json](prefix.json). What is measured is what
[burnish generate](../commands/generate.md#prefixes) does with `--prefix-memory`.

## SmolLM2-135M (A3, float32)

{count} requests of {shortest} to {longest} tokens, {tokens} in all, in an order drawn at random: questions on
{documents} texts of the Python manual behind one instruction (the first texts are asked about most), tasks with six
examples, texts that share nothing. Greedy, {answer} tokens each, batches of {batch}. The keys and values of a token are
{token} bytes, so that 20 MB are {room} tokens.

- *memory*: bytes that prefixes may take, and the most that they took at any time.
- *computed*: tokens of prompts that the model computed, and those that had been predicted from the prompts alone.
- *reused*: tokens of prompts that were not computed.
- *prompts*, *all*: seconds of one thread's clock for the prompts, and with the answers, on a machine with much other
  work; the run without sharing was made first and last.
- *same*: answers that are those without sharing, token for token.

| rule | memory, MB | held at most, MB | computed | predicted | reused | prompts, s | all, s | same |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
"""
_MANY = """
`lru` and `auto` keep the order of the requests and hold whole prompts, as a server does; `auto` took the weight
{alphas} (with 20 and 120 MB it is least recently used). `groups` computes the requests of one beginning together, holds
nothing else and nothing in the end, and needs a fraction of the memory.

## {many} requests, counted

The same kinds of requests on {documents} texts, {tokens} tokens. Nothing is run: this is what `generate` predicts, and
what it computes is the same. Each token of the tree of all prompts once, and the last of each prompt, would be {tree}:
{bound}. One shared beginning for each request, chosen exactly as in BatchLLM, leaves {once} tokens; beginnings that go
on from others, at a price of {price} tokens for each, leave {chosen}, and a few less where a row goes on from what is
held for others. Below: the part that is not computed.

| rule | {sizes} |
| --- | {lines} |
"""
_END = """
`flops` weighs how recently a prefix was used and the operations that it saves for each byte
([Marconi](https://arxiv.org/abs/2411.19379)); `auto` takes the weight with the fewest operations of 0, 0.1, ..., 2, in
brackets. With the keys and values of attention alone, operations grow with the bytes but for the attention itself, so
that there is less to choose by than in the paper's models, which have states of constant size too; `generate` runs none
of those.
"""


def _page(found: dict[str, Any], given: Sequence[Tokens], documents: tuple[int, int], token: int) -> str:
    lengths, runs = [len(one) for one in given], list(found["runs"].values())
    text = _PAGE.format(
        count=len(given), shortest=min(lengths), longest=max(lengths), tokens=sum(lengths), documents=documents[0],
        answer=ANSWER, batch=BATCH, token=token, room=20 * 10**6 // token,
    )  # fmt: skip
    for row in runs:
        memory, most = (str(row["megabytes"]), f"{row['most'] / 1e6:.1f}") if row["megabytes"] else ("", "")
        text += (
            f"| {row['rule']} | {memory} | {most} | {row['computed']} | {row.get('predicted', '')} "
            f"| {100 * (1 - row['computed'] / sum(lengths)):.0f} % | {row['seconds']['prompts']:.1f} "
            f"| {row['seconds']['all']:.1f} | {row['same']} of {len(given)} |\n"
        )
    took = ", ".join(f"{row['alpha']:g} with {row['megabytes']} MB" for row in runs if row["rule"] == "auto")
    text += _MANY.format(
        alphas=took, many=found["many"], documents=documents[1], tokens=found["tokens"], tree=found["tree"],
        bound=f"{100 * (1 - found['tree'] / found['tokens']):.1f} % less", once=found["one level"],
        price=sharing.PRICE, chosen=found["chosen"], sizes=" | ".join(f"{size} MB" for size in MANY_MEGABYTES),
        lines=" | ".join("---:" for _ in MANY_MEGABYTES),
    )  # fmt: skip
    for rule in RULES:
        cells = []
        for size in MANY_MEGABYTES:
            row = found["counted"][f"{rule} {size}"]
            alpha = f" ({row['alpha']:g})" if rule == "auto" else ""
            cells.append(f"{100 * (1 - row['computed'] / found['tokens']):.1f} %{alpha}")
        text += f"| {rule} | {' | '.join(cells)} |\n"
    return text + _END


def main(folder: Path, count: int = 48, documents: int = 5, many: int = 1000, texts: int = 40) -> None:
    """Measure what is missing, and write the page."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(smollm2_folder(folder) / "tokenizer.json"))
    decoder = open_decoder(folder / f"{NAME}.onnx")
    work = model_work(decoder, folder / f"{NAME}.onnx")
    given = prompts(count, documents, tokenizer)
    found = _measure(decoder, given, work)
    _count(decoder, found, prompts(many, texts, tokenizer), work)
    token = sharing.Caches(decoder).token_bytes
    (RESULTS / "prefix.md").write_text(_page(found, given, (documents, texts), token))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(".zoo"))
