"""How much memory calibration takes: `OMP_NUM_THREADS=1 python -m burnish.tools.research.quant_memory [WAY...]`.

Each way observes what a pass asks for, on `SAMPLES` texts of `TOKENS` tokens of SmolLM2, in a process of its own whose
largest resident set is compared with that of a process that only brings the model into normal form and runs it once.
Writes docs/results/quant-memory.json after each way, and the page; `page` only writes the page.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as oir

from burnish.backends.ort.session import executor
from burnish.frontends import onnx_file
from burnish.ir.edit import name_nodes
from burnish.ir.samples import Sample
from burnish.passes import calibration, equalization, integer_layers
from burnish.passes.book import Book
from burnish.passes.grids import Grid
from burnish.passes.integer_flow import flow
from burnish.passes.layers import layers
from burnish.passes.lossy import Context
from burnish.passes.moments import moments
from burnish.passes.pipeline import Pipeline
from burnish.passes.ranges import Method
from burnish.passes.recipes import NORMAL_FORM
from burnish.passes.weight_sites import Matrix, matrices
from burnish.tools.lossy_context import context_for
from burnish.tools.research import zoo

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "results"
NUMBERS, PAGE = FOLDER / "quant-memory.json", FOLDER / "quant-memory.md"

MODEL = "a3-smollm2-nocache"
SAMPLES, TOKENS = 512, 16

LOAD = "the model alone"


def _static(model: oir.Model, context: Context) -> None:
    found = [one for one in layers(model).values() if integer_layers.refusal(model, one) is None]
    values = flow(model.graph, found).scale_of
    methods: tuple[Method, ...] = ("minmax", "percentile", "mse")
    calibration.observed(model, values, found, context, Grid(8, signed=False, symmetric=False), methods, 99.99, MEMORY)


def _gptq(model: oir.Model, context: Context) -> None:
    found = {name: one.linears for name, one, _ in matrices(model) if isinstance(one, Matrix) and one.linears}
    for _ in moments(model, found, context, MEMORY):
        pass


def _fptq(model: oir.Model, context: Context) -> None:
    found, _ = equalization.groups(model)
    for _ in equalization.observed(model, [one for one in found if one.layers], context, MEMORY):
        pass


MEMORY = 1024 << 20
"""What the option `memory` of the passes is unless it is given."""

WAYS: dict[str, tuple[str, Callable[[oir.Model, Context], None] | None]] = {
    LOAD: ("", None),
    "moments for GPTQ": ("quantize-weights{rounding=gptq}", _gptq),
    "magnitudes and rows for FPTQ": ("quantize-fptq", _fptq),
    "ranges by three rules, and means": ("quantize-static", _static),
}
"""Passes, and what observes as they do."""


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
    samples, observe = texts(SAMPLES), WAYS[way][1]
    model = Pipeline(NORMAL_FORM).rewrite(onnx_file.read(zoo.path(MODEL))).model
    name_nodes(model)
    found: dict[str, float] = {}
    start = time.process_time()
    if observe is not None:
        book = Book(folder)
        observe(model, context_for(model, samples, book=book))
        found |= {"runs": book.samples, "seconds": book.seconds}
        found["kept"] = sum(file.stat().st_size for file in book.files if file.exists())
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
        f"(538 MB of float32 weights), the samples are {SAMPLES} pieces of Python's help, of {TOKENS} tokens each: "
        "short "
        "ones, so that so many take a minute. *Above the model* is the largest resident set of a process that observes "
        "what a pass asks for, less that of one that reads the model, brings it into normal form and runs it once "
        f"({base / 1e9:.2f} GB). *A sample* is how long one took, on a machine that much other work shared, *CPU* what "
        "all of it took on one thread. *Kept* are the files that a run after a kill goes on from; they go when the "
        "model is written.",
        "",
        "| what is observed | for | above the model | a sample | CPU | kept |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for way, (spec, observe) in WAYS.items():
        if observe is not None and (one := known.get(way)) is not None:
            each, above, kept = 1e3 * one["seconds"] / one["runs"], (one["peak"] - base) / 1e9, one["kept"] / 1e6
            lines.append(f"| {way} | `{spec}` | {above:.2f} GB | {each:.0f} ms | {one['cpu']:.0f} s | {kept:.0f} MB |")
    return (
        "\n".join(
            [
                *lines,
                "",
                "What bounds it is the option `memory` of each of these passes, in MiB, 1024 unless another number is "
                "given: of activations that are held at once and, for GPTQ and FPTQ, as much again of statistics. With "
                "less of it the samples are run more often: layers whose statistics do not fit wait for a run of their "
                "own. What rounding takes afterwards is not part of it: it goes layer by layer. What is not listed was "
                "not measured.",
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
