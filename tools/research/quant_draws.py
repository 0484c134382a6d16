"""Static int8 fitted to few samples, drawn several times: how much does it matter which?

    python -m burnish.tools.research.quant_draws a6-rec 10 5 [--folder .zoo]

Five times 10 samples are drawn from one half of the data, convolutions are rounded in several ways, and each result is
judged on the same samples of the other half. Rows go to docs/results/quant-static.json as soon as they are there, and
`quant_static page` makes the page.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as oir

import burnish
from burnish.ir.samples import Sample, families
from burnish.passes import catalog, lossy
from burnish.passes.base import Outcome
from burnish.passes.lossy import LossyPass
from burnish.tools.lossy_context import context_for
from burnish.tools.research import mixed_beds
from burnish.tools.research.quant_static import PAGE, Bed, compared, outputs_of, prepared

ROWS: dict[str, tuple[str, bool]] = {
    "mse": ("{rounding=mse}", False),
    "gptq at once": ("", True),
    "default": ("", False),
}
"""By name the options of the pass, and whether edits are made as for a search, each for itself."""


@dataclass(frozen=True)
class Pool:
    """Groups of samples, of each of which a draw takes at most one, and others to judge by."""

    path: Path
    groups: list[list[Sample]]
    unseen: list[Sample]


def _lines(name: str, most: int) -> Callable[[Path], Pool]:
    def make(folder: Path) -> Pool:
        bed = mixed_beds.BEDS[name](folder)
        return Pool(bed.path, [[one] for one in bed.search], bed.unseen[:most])

    return make


def _photographs(folder: Path) -> Pool:
    """Parts of photographs; all parts of the others."""
    bed = mixed_beds.BEDS["a1"](folder)
    return Pool(bed.path, families(bed.search), bed.unseen)


def _digits(folder: Path) -> Pool:
    """Single digits; batches of ten others."""
    bed = mixed_beds.BEDS["resnet"](folder)
    single = [
        [Sample(f"{one.name} {at}", {"image": one.feeds["image"][at : at + 1]})]
        for one in bed.search
        for at in range(10)
    ]
    return Pool(bed.path, single, bed.unseen)


POOLS: dict[str, Callable[[Path], Pool]] = {
    "a1": _photographs,
    "a5": _lines("a5", 1000),
    "a6-cls": _lines("a6-cls", 1000),
    "a6-rec": _lines("a6-rec", 60),
    "resnet": _digits,
}


def drawn(groups: list[list[Sample]], count: int, seed: int) -> list[Sample]:
    """So many samples of different groups, by a seed."""
    rng = np.random.default_rng([seed, count])
    chosen = rng.permutation(len(groups))[:count]
    return [groups[index][rng.integers(len(groups[index]))] for index in chosen]


def made(model: oir.Model, samples: list[Sample], row: str) -> oir.Model:
    """What the pass makes of all layers at once."""
    options, searched = ROWS[row]
    (one,) = catalog.parse(f"quantize-static{options}")
    assert isinstance(one, LossyPass)
    context = replace(context_for(model, samples), searched=searched)
    edits = one.propose(model, context, Outcome(one.pass_name()))
    return lossy.apply(model, edits, [one])[0]


def measure(name: str, count: int, draws: int, folder: Path, data: Path) -> None:
    """The errors of every row for each draw; those that are there stay."""
    pool = POOLS[name](folder)
    model = prepared(burnish.load(pool.path))
    reference = outputs_of(model, pool.unseen)
    bed = Bed(model, [], pool.unseen, None)
    for seed in range(draws):
        for row in ROWS:
            known = json.loads(data.read_text())
            found = known.setdefault("draws", {}).setdefault(name, {}).setdefault(str(count), {})
            errors = found.setdefault(row, {})
            if str(seed) not in errors:
                outputs = outputs_of(made(model, drawn(pool.groups, count, seed), row), pool.unseen)
                errors[str(seed)] = compared(bed, reference, outputs)["error"]
                print(name, count, seed, row, errors[str(seed)], flush=True)
                data.write_text(json.dumps(known, indent=1) + "\n")


def main() -> None:
    """Measure one model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=[*POOLS])
    parser.add_argument("count", type=int)
    parser.add_argument("draws", type=int)
    parser.add_argument("--folder", type=Path, default=Path(".zoo"))
    parser.add_argument("--data", type=Path, default=PAGE.with_suffix(".json"))
    given = parser.parse_args()
    measure(given.name, given.count, given.draws, given.folder, given.data)


if __name__ == "__main__":
    main()
