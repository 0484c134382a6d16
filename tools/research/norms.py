"""Models without norms, healed from their ONNX files: `python -m burnish.tools.research.norms [page]`.

Two models, three seeds, every norm replaced by `optimize -p replace-norm --heal`. Each number goes to
`docs/results/norms.json` when it is there and is not made again; `page` only writes `docs/results/norms.md`.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as oir

from burnish.tools.research.norms_beds import Bed, text, vision
from burnish.tools.research.norms_page import BUDGET, FOLDER, NUMBERS, SEEDS, VARIANTS, write

BEDS: dict[str, Callable[[Path, int], Bed]] = {"vision": vision, "text": text}
_BATCHES = (1, 32)


def _accuracy(model: oir.Model, bed: Bed) -> float:
    from burnish.backends.ort.session import executor

    runner = executor(threads=1)(model)
    scores = runner.run(bed.feeds)[bed.output]
    runner.close()
    return float((scores.argmax(1) == bed.answers).mean())


def _run(bed: Bed, seed: int, spec: str, fade: float, steps: int) -> dict[str, Any]:
    """One run of `optimize`, healed or not."""
    import burnish
    from burnish.backends.fx.healing import HealOptions
    from burnish.frontends import onnx_file
    from burnish.ir.views.norm import norms

    options = HealOptions(steps=steps, seed=seed, fade=fade, **BUDGET) if steps else None
    start = time.process_time()
    result = burnish.optimize(
        bed.file, passes=[spec], data=bed.data, heal=options, target="ort-cpu", verify="off", guard=[]
    )
    assert result.lossy is not None
    row: dict[str, Any] = {
        "original": _accuracy(onnx_file.read(bed.file), bed),
        "replaced": len(result.lossy.edits),
        "accuracy": _accuracy(result.model, bed),
        "norms": len([norm for norm in norms(result.model)]),
        "seconds": time.process_time() - start,
    }
    if steps and spec == VARIANTS["progressive"][0] and fade == VARIANTS["progressive"][1]:
        row |= _merged(result.lossy.model, result.model, bed)
        if seed == SEEDS[0]:
            row["times"] = _times(bed, result.lossy.model)
    return row


def _merged(unmerged: oir.Model, merged: oir.Model, bed: Bed) -> dict[str, Any]:
    """How far the two are apart, relative to the largest score, and how many nodes they have."""
    from burnish.backends.ort.session import executor
    from burnish.backends.reference.runner import ReferenceRunner

    feeds = {name: array[:32] for name, array in bed.feeds.items()}
    found = {}
    for name, make in (("float32", executor(threads=1)), ("float64", ReferenceRunner)):
        one, other = (make(model).run(feeds)[bed.output] for model in (unmerged, merged))
        found[name] = float(np.abs(one - other).max() / np.abs(one).max())
    return {"apart": found, "nodes": [len(list(unmerged.graph)), len(list(merged.graph))]}


def _times(bed: Bed, healed: oir.Model) -> dict[str, Any]:
    """Microseconds of the original and of the healed model, and the ratio of each round, by runtime and rows."""
    from burnish.frontends import onnx_file
    from burnish.passes import plan
    from burnish.tools.research.tvm_latency import code, in_turns, session

    original = onnx_file.read(bed.file)
    found = {}
    for where, make, target in (("ONNX Runtime", session, "ort-cpu"), ("TVM", code, "llvm")):
        todo = plan.resolve(target=target)
        for rows in _BATCHES if where == "ONNX Runtime" else _BATCHES[:1]:
            feeds = {name: array[:rows] for name, array in bed.feeds.items()}
            made = in_turns([make(model, todo, feeds) for model in (original, healed)])
            ratios = made[:, 1] / made[:, 0]
            picks = np.random.default_rng(0).integers(0, ratios.size, (1000, ratios.size))
            low, high = np.percentile(np.median(ratios[picks], axis=1), (2.5, 97.5))
            found[f"{where}, {rows} row{'s' * (rows > 1)}"] = [
                *(1e6 * np.median(made, axis=0)).tolist(), float(np.median(ratios)), float(low), float(high)
            ]  # fmt: skip
    return found


def main(words: list[str]) -> int:
    """Measure what is missing, then write the page."""
    import torch

    torch.set_num_threads(1)
    folder = Path(tempfile.gettempdir()) / "burnish-norms"
    folder.mkdir(exist_ok=True)
    for name, (spec, fade, steps) in VARIANTS.items() if words != ["page"] else ():
        for seed in SEEDS:
            for key, make in BEDS.items():
                known = json.loads(NUMBERS.read_text()) if NUMBERS.exists() else {}
                place = f"{key} | {name} | {seed}"
                if place in known or (not steps and key == "vision" and seed):
                    continue
                bed = make(folder, seed)
                row = _run(bed, seed, spec, fade, steps)
                print(place, row, flush=True)
                known = json.loads(NUMBERS.read_text()) if NUMBERS.exists() else {}
                NUMBERS.write_text(json.dumps(known | {place: row | {"bed": bed.name}}, indent=1) + "\n")
    write()
    return 0


if __name__ == "__main__":
    assert FOLDER.is_dir()
    sys.exit(main(sys.argv[1:]))
