"""How much memory calibration takes: `OMP_NUM_THREADS=1 python -m burnish.tools.research.quant_memory [WAY...]`.

Each way is a pass of which every edit is proposed, on `SAMPLES` texts of `TOKENS` tokens of SmolLM2, in a process of
its own whose largest resident set is compared with that of a process that only brings the model into normal form and
runs it once. Writes docs/results/quant-memory.json after each way, and the page; `page` only writes the page.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from burnish.ir.samples import Sample
from burnish.tools.research import zoo

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "results"
NUMBERS, PAGE = FOLDER / "quant-memory.json", FOLDER / "quant-memory.md"

MODEL = "a3-smollm2-nocache"
SAMPLES, TOKENS = 512, 32
LIMIT = 2 << 30

LOAD = "the model alone"
WAYS: dict[str, tuple[str, int]] = {
    LOAD: ("", 1),
    "static ranges": ("quantize-static", SAMPLES),
    "static ranges, fewer samples": ("quantize-static", SAMPLES // 8),
    "GPTQ": ("quantize-weights{bits=4,rounding=gptq}", SAMPLES),
    "FPTQ": ("quantize-fptq", SAMPLES),
}
"""Passes, and on how many samples they calibrate."""


def texts(count: int) -> list[Sample]:
    """Pieces of Python's help, of `TOKENS` tokens each."""
    from tokenizers import Tokenizer

    from burnish.tools.research import zoo_data, zoo_real

    tokenizer = Tokenizer.from_file(str(zoo_real.smollm2_folder(zoo.ROOT) / "tokenizer.json"))
    found: list[Sample] = []
    for text in zoo_data.topics():
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        for start in range(0, len(ids) - TOKENS + 1, TOKENS):
            row = np.array([ids[start : start + TOKENS]], np.int64)
            found.append(Sample(str(len(found)), {"input_ids": row, "attention_mask": np.ones_like(row)}))
            if len(found) == count:
                return found
    raise ValueError(f"there are {len(found)} pieces of text, not {count}")


def measured(way: str, folder: Path) -> dict[str, float]:
    """The largest resident set of this process after a way, and how long a sample took; run in a process of its own."""
    from burnish.backends.ort.session import executor
    from burnish.frontends import onnx_file
    from burnish.ir.edit import name_nodes
    from burnish.passes import catalog
    from burnish.passes.base import Outcome
    from burnish.passes.book import Book
    from burnish.passes.lossy import LossyPass
    from burnish.passes.pipeline import Pipeline
    from burnish.passes.recipes import NORMAL_FORM
    from burnish.tools.lossy_context import context_for

    spec, count = WAYS[way]
    samples = texts(count)
    one = next(iter(catalog.parse(spec)), None)
    ahead = [name for text in getattr(one, "prepare", ()) for name in catalog.parse(text)]
    model = Pipeline([*NORMAL_FORM, *ahead, *(NORMAL_FORM if ahead else ())]).rewrite(
        onnx_file.read(zoo.path(MODEL))
    ).model  # fmt: skip
    name_nodes(model)
    found: dict[str, float] = {"samples": count}
    start = time.process_time()
    if isinstance(one, LossyPass):
        book = Book(folder)
        context = context_for(model, samples, book=book)
        found["edits"] = len(one.propose(model, context, Outcome(one.pass_name())))
        found |= {"runs": book.samples, "seconds": book.seconds}
        book.forget()
    else:
        runner = executor()(model)
        runner.run(samples[0].feeds)
        runner.close()
    found["cpu"] = time.process_time() - start
    found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return found


def page(known: dict[str, Any]) -> str:
    """The page, from what is known."""
    base = known[LOAD]["peak"]
    lines = [
        "# The memory of calibration",
        "",
        "Made by `python -m burnish.tools.research.quant_memory`. The model is SmolLM2-135M-Instruct without a cache "
        "(538 MB "
        f"of float32 weights), the samples are {SAMPLES} pieces of Python's help, of {TOKENS} tokens each: short "
        "ones, so "
        "that so many take minutes. *Above the model* is the largest resident set of a process that calibrates and "
        "proposes every "
        "edit, less that of one that reads the model, brings it into normal form and runs it once "
        f"({base / 1e9:.2f} GB). *A sample* is how long one was observed, on one thread of a machine that other work "
        "shared; "
        "*CPU* is all of the pass, rounding included.",
        "",
        "| what | samples | above the model | a sample | CPU |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for way, (spec, count) in WAYS.items():
        if way != LOAD and (one := known.get(way)) is not None:
            each = 1e3 * one["seconds"] / one["runs"]
            above = (one["peak"] - base) / 1e9
            lines.append(f"| {way}: `{spec}` | {count} | {above:.2f} GB | {each:.0f} ms | {one['cpu']:.0f} s |")
    return (
        "\n".join(
            [
                *lines,
                "",
                "What bounds it is the option `memory` of each of these passes, in MiB: of activations that are held "
                "at once, "
                "and, for GPTQ and FPTQ, as much again of statistics. With less of it the samples are run more "
                "often: layers "
                "whose statistics do not fit wait for a run of their own. `memory` is 1024 unless another number is "
                "given.",
            ]
        )
        + "\n"
    )


def main() -> None:
    """Measure the ways that are named, or those that are not known, each in a process; write the page."""
    if sys.argv[1:2] == ["--here"]:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measured(sys.argv[2], Path(folder))))
        return
    known: dict[str, Any] = json.loads(NUMBERS.read_text()) if NUMBERS.exists() else {}
    wanted = sys.argv[1:] or [way for way in WAYS if way not in known]
    for way in wanted if wanted != ["page"] else []:
        command = [sys.executable, "-m", "burnish.tools.research.quant_memory", "--here", way]
        ended = subprocess.run(command, capture_output=True, text=True, check=True)
        known[way] = json.loads(ended.stdout.splitlines()[-1])
        print(way, known[way], flush=True)
        NUMBERS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    PAGE.write_text(page(known))


if __name__ == "__main__":
    main()
