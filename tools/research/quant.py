"""Recipes that quantize, beside other tools that quantize ONNX files: bytes, errors and time of what each writes.

    python -m burnish.tools.research.quant a1 --rivals rivals/bin/python
    python -m burnish.tools.research.quant page

Every tool gets the same file and the same samples, in a process of its own; what it writes is judged on samples that
none saw. `--rivals` is the Python of an environment that `quant_rivals.py` describes. Each row is written to
docs/results/quant.json as soon as it is there; `page` makes docs/results/quant.md.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as oir

import burnish
from burnish.backends.ort import timing
from burnish.backends.ort.session import from_path
from burnish.ir.samples import Sample
from burnish.tools.research import quant_static
from burnish.tools.research.quant_static import Bed, Outputs, compared

PAGE = Path(__file__).resolve().parents[2] / "docs" / "results" / "quant.md"
_DATA = PAGE.with_suffix(".json")
RIVALS = Path(__file__).with_name("quant_rivals.py")
_ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(burnish.__file__).absolute().parents[1])}
_COMMAND = "import sys; from burnish.tools.cli import optimize_main; sys.exit(optimize_main())"

OURS: dict[str, tuple[str, ...]] = {
    "burnish int8": ("--recipe", "int8"),
    "burnish int4": ("--recipe", "int4"),
    "burnish, 4 bits in blocks of 128": ("--passes", "quantize-weights{bits=4,rounding=gptq,block=128}"),
    "burnish, weights alone in 8 bits": ("--passes", "quantize-weights{bits=8}"),
    "burnish, weights alone in 8 bits, activations in float": (
        "--passes",
        "quantize-weights{bits=8,activations=float}",
    ),
    "burnish, weights alone in 8 bits, convolutions too": (
        "--passes",
        "quantize-weights{bits=8,rounding=gptq,convolutions=true}",
    ),
    "burnish mixed, size within 1 %": ("--recipe", "mixed", "--max-drop", "1%"),
    "burnish mixed, latency within 1 %": ("--recipe", "mixed", "--max-drop", "1%", "--objective", "latency"),
}
OURS_TIMED = OURS | {"burnish int8 for ONNX Runtime's CPU": ("--recipe", "int8", "--target", "ort-cpu")}
"""With what is written for the time alone."""

THEIRS = (
    "onnxruntime dynamic",
    "onnxruntime static",
    "onnxruntime 4 bits, rtn",
    "onnxruntime 4 bits, hqq",
    "onnxruntime 4 bits, k-quant",
    "nncf",
    "onnxsim static",
    "olive 4 bits, rtn",
    "olive 4 bits, hqq",
)


def _smollm(folder: Path, fit: int) -> Bed:
    """The beginnings of texts of Python's help, 256 tokens each: eight to judge by, others to fit to."""
    from burnish.tools.research.zoo_data import topic_texts

    held = quant_static.zoo("a3-smollm2-nocache", folder, 0, 8)
    texts, _ = topic_texts(folder, cached=False, count=8 + fit)
    return replace(held, fit=[Sample(f"text {index}", dict(feeds)) for index, feeds in enumerate(texts[8:], 8)])


def _photographs(folder: Path) -> Bed:
    """A hundred photographs to fit to, two parts of each of 93 others to judge by; most have no label."""
    from burnish.tools.research.mixed_beds import BEDS as searched

    bed = searched["a1"](folder)
    fit = [Sample(one.name, one.feeds) for one in bed.search[:800:8]]
    return Bed(burnish.load(bed.path), fit, [Sample(one.name, one.feeds) for one in bed.unseen[::4]], None)


BEDS: dict[str, Callable[[Path], Bed]] = quant_static.BEDS | {
    "a1-photographs": _photographs,
    "a3": lambda folder: _smollm(folder, 16),
    "a4": lambda folder: quant_static.zoo("a4-silero-op18-ifless", folder, 16, 40, classes=False),
    "a4-if": lambda folder: quant_static.zoo("a4-silero", folder, 16, 40, classes=False),
}


_THREADS = 1
"""Other work on the machine makes one thread wait for the other; the clock of one thread alone does not count that."""

MINUTES = {"nncf": 15}
"""Of a processor, that a tool is given, half an hour where it is not named: NNCF tries layer after layer in float32."""

GIGABYTES = 14
"""Of memory, that a tool is given."""


def _limit(minutes: int) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (60 * minutes, 60 * minutes + 60))
    resource.setrlimit(resource.RLIMIT_DATA, (GIGABYTES << 30, GIGABYTES << 30))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _options(tool: str, source: Path) -> tuple[str, ...]:
    """What the command gets; an older opset is raised to where a scale may be one of an output, as for the others."""
    chosen = OURS_TIMED[tool]
    imports = onnx.load(source, load_external_data=False).opset_import
    old = any(not one.domain and one.version < 13 for one in imports)
    return (*chosen, "--opset", "13") if old and "--passes" in chosen else chosen


def made(tool: str, source: Path, target: Path, data: Path, rivals: str | None) -> dict[str, Any]:
    """Run a tool as its users do: its seconds, and the last line it said when it failed."""
    if tool in OURS_TIMED:
        command = [
            sys.executable,
            "-c",
            _COMMAND,
            str(source),
            "-o",
            str(target),
            "--data",
            str(data.with_suffix("")),
            *_options(tool, source),
        ]
    else:
        assert rivals is not None
        python, samples = str(Path(rivals).absolute()), data.with_suffix(".rivals.npz")
        command = [python, str(RIVALS), tool, str(source), str(target), str(samples)]
    start, minutes = time.monotonic(), MINUTES.get(tool, 30)
    ended = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=source.parent,
        env=_ENVIRONMENT,
        preexec_fn=partial(_limit, minutes),
    )
    if ended.returncode == -signal.SIGXCPU:
        return {"failed": f"not done within {minutes} minutes of a processor"}
    found: dict[str, Any] = {"seconds": time.monotonic() - start}
    if ended.returncode or not target.exists():
        said = [line.strip() for line in (ended.stderr + ended.stdout).splitlines() if line.strip()]
        places = (source.parent, Path(rivals or "").absolute().parent)
        found["failed"] = f"exit code {ended.returncode}: {_last(said, places)}"
    return found


def _last(said: list[str], places: Sequence[Path]) -> str:
    """The last line that names an error, without the folders that are here only."""
    line = ([one for one in said if "Error" in one or one.startswith("error")] or said or ["it said nothing"])[-1]
    for place in places:
        line = line.replace(f"{place}/", "")
    return line[:160]


_SESSIONS = 8
"""Of a fast model: where ONNX Runtime puts its arrays makes one session of a file 1.5 times as slow as another."""

_FAST = 0.003
"""Seconds of a run, below which a model is fast."""


def session(path: Path, feeds: Mapping[str, np.ndarray]) -> Any:
    """A session of one thread, for a fast model the quickest of several."""
    first = from_path(path, threads=_THREADS)

    def seconds(one: Any) -> float:
        run = partial(one.run, feeds)
        return timing.paired(run, run, rounds=5, seconds=1.0, alone=True).median_b

    if seconds(first) > _FAST:
        return first
    return min((first, *(from_path(path, threads=_THREADS) for _ in range(_SESSIONS - 1))), key=seconds)


def judged(bed: Bed, target: Path, reference: Outputs, original: Any) -> dict[str, Any]:
    """What a file takes, how far its outputs are from the original's, and its time against the original's, paired."""
    feeds = [sample.feeds for sample in bed.held]
    own = session(target, feeds[0])
    outputs = [dict(own.run(one)) for one in feeds]
    pair = timing.paired(lambda: original.run(feeds[0]), lambda: own.run(feeds[0]), rounds=30, seconds=10.0, alone=True)
    files = (target, *target.parent.glob("*.data"))
    return {
        "bytes": sum(one.stat().st_size for one in files),
        **compared(bed, reference, outputs),
        "time": (pair.ratio, pair.low, pair.high),
        "threads": _THREADS,
    }


def measure(name: str, folder: Path, rivals: str | None, only: str | None) -> None:
    """All rows of one model, each written as soon as it is there."""
    bed = BEDS[name](folder)
    with tempfile.TemporaryDirectory() as place:
        source, data = Path(place) / "model.onnx", Path(place) / "data.npz"
        oir.save(bed.model, source, external_data="model.onnx.data" if name == "a3" else None)
        write_samples(bed.fit, data)
        original = session(source, bed.held[0].feeds)
        reference = [dict(original.run(sample.feeds)) for sample in bed.held]
        size = source.stat().st_size + sum(one.stat().st_size for one in source.parent.glob("model.onnx.data"))
        own = {"bytes": size, "metric": None if bed.metric is None else bed.metric(reference)}
        for number, tool in enumerate((*OURS, *(THEIRS if rivals is not None else ()))):
            if only is not None and not any(one in tool for one in only.split(";")):
                continue
            target = Path(place) / str(number) / "out.onnx"
            target.parent.mkdir()
            row = made(tool, source, target, data, rivals)
            if "failed" not in row:
                try:
                    row |= judged(bed, target, reference, original)
                except Exception as error:
                    said = str(error).strip().splitlines()[0].replace(f"{place}/", "")
                    row["failed"] = f"its file does not run: {said[:160]}"
            print(name, tool, row, flush=True)
            known = _known()
            rows = known.get(name, {}).get("rows", {}) | {tool: row}
            known[name] = own | {"rows": {one: rows[one] for one in (*OURS, *THEIRS) if one in rows}}
            _DATA.write_text(json.dumps(known, indent=1) + "\n")


def _known() -> dict[str, Any]:
    return json.loads(_DATA.read_text()) if _DATA.exists() else {}


def note(part: str, name: str, found: Any) -> None:
    """Keep what another script measured for the page, which has a part for it."""
    known = _known()
    known[part] = known.get(part, {}) | {name: found}
    _DATA.write_text(json.dumps(known, indent=1) + "\n")


def write_samples(samples: Sequence[Sample], data: Path) -> None:
    """The samples of the calibration as a folder for burnish, and in one file, `.rivals.npz`, for the others."""
    feeds = [dict(sample.feeds) for sample in samples]
    np.savez(
        data.with_suffix(".rivals.npz"),
        allow_pickle=False,
        **{f"{i}/{key}": one[key] for i, one in enumerate(feeds) for key in one},
    )
    folder = data.with_suffix("")
    folder.mkdir()
    for index, one in enumerate(feeds):
        np.savez(folder / f"{index:04}.npz", allow_pickle=False, **one)


def main() -> None:
    """Measure the models that are named, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", choices=[*BEDS, "page"])
    parser.add_argument("--folder", type=Path, default=Path(".zoo"))
    parser.add_argument("--rivals", help="the Python of the other tools; without it they are left out")
    parser.add_argument("--only", help="tools whose names hold one of these, with semicolons between")
    given = parser.parse_args()
    for name in given.names:
        if name == "page":
            from burnish.tools.research.quant_page import page

            PAGE.write_text(page(_known(), ["burnish int8", "burnish int4", *THEIRS]))
        else:
            measure(name, given.folder, given.rivals, given.only)


if __name__ == "__main__":
    main()
