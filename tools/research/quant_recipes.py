"""Recipes that quantize, by the command line: `OMP_NUM_THREADS=1 python -m burnish.tools.research.quant_recipes BED`.

BED is `vit`, `a3` or `a3-kv`, or `page`; recipes may follow, else all are run. Each is `optimize` in a process of its
own behind a terminal, as a person sees it: what it says, how long it says nothing new, its time, its largest resident
set. What it wrote is judged on samples that it never saw. Writes docs/results/quant-recipes.json after each row and
quant-recipes.md.
"""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import burnish
from burnish.backends.ort import timing
from burnish.backends.ort.session import from_path
from burnish.passes.recipes import QUANTIZED
from burnish.tools.research import zoo, zoo_tasks

PAGE = Path(__file__).resolve().parents[2] / "docs" / "results" / "quant-recipes.md"
NUMBERS = PAGE.with_suffix(".json")
RECIPES = tuple(one for one in QUANTIZED if one != "mixed")
_ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(Path(burnish.__file__).absolute().parents[1]),
    "COLUMNS": "200",
    "OMP_NUM_THREADS": "1",
}
_COMMAND = "import sys; from burnish.tools.cli import optimize_main; sys.exit(optimize_main())"
_CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_CLOCK = re.compile(r"\d+:\d\d:\d\d")
_CALIBRATED = 32

Array = np.ndarray[Any, Any]
Feeds = dict[str, Array]


@dataclass(frozen=True)
class Bed:
    """A model file, samples to calibrate on, samples to judge on, the metric of the outputs for these, what is timed.

    Attributes:
        held: samples that nothing was fitted to.
        timed: what a run is timed on, by what the table calls it.
    """

    model: Path
    data: Callable[[Path], None]
    held: list[Feeds]
    metric: Callable[[list[Feeds]], float]
    timed: Mapping[str, Feeds]


def language(cached: bool) -> Bed:
    """SmolLM2: 32 texts of Python's help to calibrate on, 8 others to judge on, 256 tokens each."""
    from burnish.tools.research.zoo_data import topic_texts

    name = "a3-smollm2-kv" if cached else "a3-smollm2-nocache"
    every, labels = topic_texts(zoo.ROOT, cached=cached, count=8 + _CALIBRATED)

    def data(place: Path) -> None:
        place.mkdir()
        for index, one in enumerate(every[8:]):
            np.savez(place / f"{index:02}.npz", allow_pickle=False, **one)

    metric = zoo_tasks.metric_of("a3-smollm2-nocache", labels[:8])
    timed = {"a token behind 256": _behind(every[0])} if cached else {"256 tokens": every[0]}
    return Bed(zoo.path(name), data, every[:8], metric, timed)


def _behind(text: Feeds) -> Feeds:
    """One token behind as many as the text has; what the cache holds does not matter for the time."""
    length = text["input_ids"].shape[1]
    found: Feeds = {"input_ids": text["input_ids"][:, -1:], "attention_mask": np.ones((1, length + 1), np.int64)}
    found["position_ids"] = np.array([[length]])
    random = np.random.default_rng(0)
    for name, array in text.items():
        if name.startswith("past"):
            heads, size = array.shape[1], array.shape[3]
            found[name] = random.standard_normal((1, heads, length, size)).astype(np.float32)
    return found


def digits() -> Bed:
    """The digits ViT: 250 held-out digits to calibrate on and 250 others to judge on."""
    demo = Path(__file__).resolve().parents[1] / "demo"
    with np.load(demo / "digits.npz") as kept:
        arrays = {name: kept[name] for name in kept.files}
    half = len(next(iter(arrays.values()))) // 2
    (labels,) = (array for array in arrays.values() if array.ndim == 1)
    held = {name: array[half:] for name, array in arrays.items() if array.ndim > 1}

    def data(place: Path) -> None:
        np.savez(place, allow_pickle=False, **{name: array[:half] for name, array in arrays.items()})

    def accuracy(outputs: list[Feeds]) -> float:
        return float((next(iter(outputs[0].values())).argmax(-1) == labels[half:]).mean())

    timed = {"one digit": {name: array[:1] for name, array in held.items()}}
    return Bed(demo / "digits_vit.onnx", data, [held], accuracy, timed)


BEDS: dict[str, Callable[[], Bed]] = {
    "a3": lambda: language(False),
    "a3-kv": lambda: language(True),
    "vit": digits,
}
TITLES = {
    "a3": (
        "SmolLM2-135M (A3)",
        "perplexity",
        f"{_CALIBRATED} texts of 256 tokens are given, 8 others judged. `int4` stores layers as they were published,"
        " without loss, and rounds the table. `ostquant-w4a4kv4` ran before the others, and was halted for ten minutes,"
        " which its clock and its silence have in them.",
    ),
    "a3-kv": ("SmolLM2-135M with a cache (A3)", "perplexity", "As many texts, with an empty cache."),
    "vit": ("the digits ViT", "accuracy", "250 labelled digits are given, 250 others judged."),
}


def watched(command: Sequence[str], folder: Path) -> dict[str, Any]:
    """Run a command behind a terminal: what it printed, its time and memory, and the longest time with nothing new."""
    ours, theirs = pty.openpty()
    said = folder / "said.txt"
    start = last = time.monotonic()
    silent, during, shown = 0.0, "", ""
    steps: Counter[str] = Counter()
    with said.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=theirs, cwd=folder, env=_ENVIRONMENT)
    os.close(theirs)
    errors = ""
    while True:
        try:
            piece = os.read(ours, 1 << 16)
        except OSError:  # the other end is closed
            break
        text = _CODES.sub("", piece.decode(errors="replace"))
        errors = (errors + text)[-4000:]
        for line in (_CLOCK.sub("", one).strip() for one in re.split(r"[\r\n]+", text)):
            if line and line != shown:
                now = time.monotonic()
                steps[_name(shown)] += round(1000 * (now - last))
                if now - last > silent:
                    silent, during = now - last, _name(shown)
                shown, last = line, now
    _, status, used = os.wait4(process.pid, 0)
    ended = time.monotonic()
    steps[_name(shown)] += round(1000 * (ended - last))
    if ended - last > silent:
        silent, during = ended - last, _name(shown)
    code = os.waitstatus_to_exitcode(status)
    return {
        "code": code,
        "seconds": ended - start,
        "cpu": used.ru_utime + used.ru_stime,
        "peak": used.ru_maxrss * 1024,
        "silent": silent,
        "during": during,
        "steps": {name: ms / 1000 for name, ms in steps.most_common(8)},
        "said": said.read_text().splitlines(),
        **({"error": errors.replace(f"{folder}/", "").splitlines()[-12:]} if code else {}),
    }


def _name(line: str) -> str:
    """What a progress bar says is done, without bar and numbers."""
    text = re.sub(r"[^\x20-\x7e]+", "", line.removeprefix("optimize")).strip()
    return re.sub(r"(loss )?\d[\d.e+-]*", "", text).strip(" ,")


def measure(name: str, recipes: Sequence[str]) -> None:
    """Run recipes on a model, each noted as soon as it is judged."""
    bed = BEDS[name]()
    original = from_path(bed.model, threads=1)
    metric = bed.metric([dict(original.run(one)) for one in bed.held])
    _note(name, "float32", {"metric": metric, "bytes": _bytes(bed.model)})
    for recipe in recipes:
        with tempfile.TemporaryDirectory() as place:
            folder, report = Path(place), Path(place) / "report.json"
            data = folder / ("data.npz" if name == "vit" else "data")
            bed.data(data)
            target = folder / "out.onnx"
            words = [str(bed.model.absolute()), "-o", target.name, "--recipe", recipe, "--data", data.name]
            row = watched([sys.executable, "-c", _COMMAND, *words, "--report", report.name], folder)
            if report.exists():
                row["errors"] = [edit["layer_error"] for edit in json.loads(report.read_text())["lossy"]["edits"]]
            if target.exists():
                own = from_path(target, threads=1)
                row |= {"metric": bed.metric([dict(own.run(one)) for one in bed.held]), "bytes": _bytes(target)}
                for what, feeds in bed.timed.items():
                    pair = timing.paired(
                        partial(original.run, feeds),
                        partial(own.run, feeds),
                        rounds=20,
                        seconds=20.0,
                        alone=True,
                    )
                    row[f"time of {what}"] = (pair.ratio, pair.low, pair.high)
        print(name, recipe, {key: value for key, value in row.items() if key not in ("said", "errors")}, flush=True)
        _note(name, recipe, row)


def _bytes(file: Path) -> int:
    return sum(one.stat().st_size for one in {file, *file.parent.glob(f"{file.name}.data")})


def _known() -> dict[str, Any]:
    return json.loads(NUMBERS.read_text()) if NUMBERS.exists() else {}


def _note(name: str, row: str, found: Mapping[str, Any]) -> None:
    known = _known()
    known.setdefault(name, {})[row] = dict(found)
    NUMBERS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


_HEAD = """# Whole recipes, by the command line

Made by `python -m burnish.tools.research.quant_recipes`; numbers in [quant-recipes.json](quant-recipes.json). Each row
is `optimize model.onnx -o out.onnx --recipe RECIPE --data samples` and nothing else, in a process of its own behind a
terminal. `optimize` splits the samples that it is given: edits are fitted to one half, and what it says of the loss is
of the other. The metric here is that of samples which it never saw.

*time* is that of a run in ONNX Runtime 1.32 against the original's, in turns, of one thread by its own clock. *layers*
is the relative error that rounding makes of a layer, in the middle and at most, as the summary says. *took* is what the
command took in CPU time, and by the clock in brackets, on a machine with two cores that others shared. *memory* is
its largest resident set. *silent* is the longest time in which its bar stood still.
"""


_WHY = {
    ("a3", "int8"): " (in the [table of recipes](quant.md))",
}
"""Why rows are missing."""


def page() -> str:
    """The page, from what is known."""
    known, lines = _known(), [_HEAD]
    for name in (one for one in TITLES if one in known):
        (title, metric, note), rows = TITLES[name], known[name]
        own = rows["float32"]
        lines += [
            f"## {title}",
            "",
            f"{note} In float32: {own['bytes'] / 1e6:.1f} MB, {metric} {own['metric']:.4g}.",
            "",
        ]
        lines += [f"| recipe | MB | {metric} | time | layers | took | memory | silent |"]
        lines += ["| --- | ---: | ---: | --- | --- | ---: | ---: | ---: |"]
        lines += [_line(recipe, rows[recipe]) for recipe in RECIPES if recipe in rows]
        lines += ["", *(line for recipe in RECIPES if recipe in rows for line in _said(recipe, rows[recipe])), ""]
        missing = ", ".join(f"`{one}`{_WHY.get((name, one), '')}" for one in RECIPES if one not in rows)
        lines += [f"Not run: {missing}.", ""] if missing else []
    return "\n".join(lines).rstrip() + "\n"


def _line(recipe: str, row: Mapping[str, Any]) -> str:
    took = f"{row['cpu']:.0f} s ({row['seconds']:.0f} s)"
    last = f"{took} | {row['peak'] / 1e9:.2f} GB | {row['silent']:.0f} s |"
    if row["code"]:
        return f"| `{recipe}` | exit code {row['code']} | | | | {last}"
    paired = {key.removeprefix("time of "): found for key, found in row.items() if key.startswith("time of ")}
    times = [f"{ratio:.2f} ({low:.2f} to {high:.2f}), {what}" for what, (ratio, low, high) in paired.items()]
    errors = [one for one in row.get("errors", []) if one is not None]
    layers = f"{np.median(errors):.2g}, {max(errors):.2g}" if errors else ""
    return f"| `{recipe}` | {row['bytes'] / 1e6:.1f} | {row['metric']:.4g} | {'; '.join(times)} | {layers} | {last}"


def _said(recipe: str, row: Mapping[str, Any]) -> list[str]:
    """What the summary says of layers, kernels and loss, or the error."""
    if row["code"]:
        return [f"- `{recipe}`: {' '.join(one.strip() for one in row['error'] if one.strip())}"]
    wanted = ("note", "kernels", "samples", "loss")
    told = [" ".join(line.split()) for line in row["said"] if line.startswith(wanted)]
    return [f"- `{recipe}`: {'; '.join(told)}"]


def main(words: Sequence[str]) -> None:
    """Measure a model, and write the page."""
    if words[0] != "page":
        measure(words[0], words[1:] or RECIPES)
    PAGE.write_text(page())


if __name__ == "__main__":
    main(sys.argv[1:])
