"""Models and samples whose values are observed, and a reducer that keeps every array."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as oir

from burnish.frontends import load, onnx_file, samples
from burnish.ir.samples import Sample
from burnish.passes import observing
from burnish.passes.reducers import Reducer

DEMO = Path(__file__).parents[1] / "tools" / "demo"


def parsed(source: str) -> oir.Model:
    return load(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> {source}'))


def digits(name: str, count: int = 24, batch: int = 8) -> tuple[oir.Model, list[Sample]]:
    """A demo model and batches of its data."""
    model = onnx_file.read(DEMO / f"{name}.onnx")
    everything = samples.read_samples(DEMO / "digits.npz", model)
    stacked = {key: np.concatenate([one.feeds[key] for one in everything])[:count] for key in everything[0].feeds}
    cuts = range(0, count, batch)
    return model, [Sample(f"rows {i}", {key: array[i : i + batch] for key, array in stacked.items()}) for i in cuts]


class Rows(Reducer):
    """Keeps all it sees, for comparing."""

    def __init__(self) -> None:
        self.seen: list[np.ndarray] = []

    def fresh(self) -> Rows:
        return Rows()

    @property
    def options(self) -> str:
        return "Rows"

    def add(self, array: np.ndarray, keep: np.ndarray | None = None) -> None:
        self.seen.append(array if keep is None else array[np.broadcast_to(keep, array.shape)])

    def nbytes(self, shape: Any) -> int:
        raise NotImplementedError

    def _join(self, other: Reducer) -> None:
        raise NotImplementedError


def seen(found: dict[str, Reducer], name: str) -> list[np.ndarray]:
    reducer = found[name]
    assert isinstance(reducer, Rows)
    return reducer.seen


MASKED = """g (int64[batch, seq] ids, int64[batch, seq] mask) => (float[batch, seq, 3] y, float[n, 3] z)
  <float[5, 4] table = {TABLE}, float[4, 3] w = {WEIGHT}, int64[2] flat = {-1, 4}>
  { x = Gather (table, ids)  y = MatMul (x, w)  r = Reshape (x, flat)  z = MatMul (r, w)
    t = Transpose <perm = [1, 0, 2]> (x)
    s = Reshape (t, flat)  u = Relu (s) }"""


def masked() -> tuple[oir.Model, list[Sample]]:
    rng = np.random.default_rng(0)
    source = MASKED
    for name, size in (("TABLE", 20), ("WEIGHT", 12)):
        source = source.replace(name, ", ".join(f"{number:.6f}" for number in rng.standard_normal(size)))
    data = []
    for index, shape in enumerate([(2, 5), (1, 3), (3, 3)]):
        mask = (rng.random(shape) < 0.6).astype(np.int64)
        data.append(Sample(str(index), {"ids": rng.integers(0, 5, shape), "mask": mask}))
    return parsed(source), data


def named(model: oir.Model, name: str) -> oir.Value:
    return observing.value_named(model, name)
