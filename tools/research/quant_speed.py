"""How fast what the recipes `int8` and `int4` write runs: against the float32 file, in turns, on one thread.

    OMP_NUM_THREADS=1 python -m burnish.tools.research.quant_speed [a1] [a2] [a3]

Each file is written as a user writes it, by the command; a run is one picture, one text, or one token of a decoder
behind a cache. Rows go to docs/results/quant.json, of which `burnish.tools.research.quant page` makes the page.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from burnish.backends.ort import timing
from burnish.backends.ort.session import from_path
from burnish.ir.samples import Sample
from burnish.tools.research import quant

Feeds = Mapping[str, np.ndarray]

_INT8 = ("burnish int8", "burnish int8 for ONNX Runtime's CPU")


@dataclass(frozen=True)
class Case:
    """A file of the zoo, the rows of `quant.OURS` that write it anew, what these are fitted to, and what is timed."""

    file: str
    tools: Sequence[str]
    fit: Sequence[Feeds]
    runs: dict[str, Feeds]


def _a1(folder: Path) -> Case:
    feeds = [sample.feeds for sample in quant.BEDS["a1"](folder).fit]
    return Case("a1-efficientnet", _INT8, feeds, {"one picture of 224 x 224": feeds[0]})


def _a2(folder: Path) -> Case:
    feeds = [sample.feeds for sample in quant.BEDS["a2"](folder).fit]
    first = {key: array[:1] for key, array in feeds[0].items()}
    return Case("a2-minilm", _INT8, feeds, {"one text of 128 tokens": first, "eight texts": feeds[0]})


def _a3(folder: Path) -> Case:
    from burnish.tools.research.zoo_data import topic_texts

    texts, _ = topic_texts(folder, cached=True, count=12)
    runs = {f"one token behind {length}": _token(texts[0], length) for length in (256, 512)}
    return Case("a3-smollm2-kv", ("burnish int4",), texts[8:], runs)


def _token(text: Feeds, length: int) -> Feeds:
    """One token behind `length` others, whose keys and values are random: they do not change the time."""
    rng = np.random.default_rng(0)
    caches = {key: array for key, array in text.items() if key.startswith("past_key_values")}
    return {
        "input_ids": text["input_ids"][:, :1],
        "position_ids": np.full((1, 1), length),
        "attention_mask": np.ones((1, length + 1), np.int64),
        **{
            key: rng.standard_normal((1, array.shape[1], length, array.shape[3])).astype(np.float32)
            for key, array in caches.items()
        },
    }


CASES: dict[str, Callable[[Path], Case]] = {"a1": _a1, "a2": _a2, "a3": _a3}


def measure(name: str, folder: Path) -> None:
    """The rows of one file."""
    case = CASES[name](folder)
    source = (folder / f"{case.file}.onnx").resolve()
    for tool in case.tools:
        with tempfile.TemporaryDirectory() as place:
            target, data = Path(place) / "out.onnx", Path(place) / "data.npz"
            quant.write_samples([Sample(str(index), dict(one)) for index, one in enumerate(case.fit)], data)
            row = quant.made(tool, source, target, data, None)
            if "failed" in row:
                raise RuntimeError(row["failed"])
            both = [from_path(one, threads=1) for one in (source, target)]
            sizes = [sum(one.stat().st_size for one in at.parent.glob(f"{at.name}*")) for at in (source, target)]
            found: dict[str, Any] = {"file": case.file, "tool": tool, "bytes": sizes, "runs": {}}
            for label, feeds in case.runs.items():
                pair = timing.paired(*(partial(one.run, feeds) for one in both), rounds=60, seconds=30.0, alone=True)
                found["runs"][label] = [1000 * pair.median_a, 1 / pair.ratio, 1 / pair.high, 1 / pair.low]
            print(name, found, flush=True)
            quant.note("speed", f"{name}, {tool}", found)


def main() -> None:
    """Measure the models that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--folder", type=Path, default=Path(".zoo"))
    given = parser.parse_args()
    for name in given.names:
        measure(name, given.folder)


if __name__ == "__main__":
    main()
