"""What the tests of healing share: models, quick options, and what holds of everything healed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as oir
import torch
from fx_checks import bytes_of, structure

from burnish.backends.fx.healing import Healed, HealOptions
from burnish.backends.ort.session import executor
from burnish.frontends import onnx_file
from burnish.ir.edit import name_nodes
from burnish.ir.samples import Sample
from burnish.ir.views import block_drop, blocks
from burnish.passes.pipeline import Pipeline
from burnish.passes.recipes import NORMAL_FORM

torch.set_num_threads(1)
DEMO = Path(__file__).resolve().parents[1] / "tools" / "demo"
QUICK = HealOptions(steps=20, batch=16, rate=2e-3, patience=10)


def digits_vit() -> oir.Model:
    """The vision transformer of the digits, in normal form and with a name for every node."""
    model = Pipeline(NORMAL_FORM).rewrite(onnx_file.read(DEMO / "digits_vit.onnx")).model
    name_nodes(model)
    return model


def digits(count: int = 160) -> list[Sample]:
    """One sample of so many labelled digits."""
    data = np.load(DEMO / "digits.npz")
    return [Sample("digits", {"image": data["image"][:count]}, data["label"][:count])]


def without(model: oir.Model, *indices: int) -> oir.Model:
    copy = model.clone()
    found = blocks.stacks(copy)
    block_drop.drop(copy, found, [found.blocks[i] for i in indices])
    return copy


def check(student: oir.Model, healed: Healed) -> set[str]:
    """It is better, nothing but weights changed, and exactly those that it says."""
    assert healed.improved and healed.after < healed.before
    assert structure(healed.model) == structure(student)
    old, new = bytes_of(student), bytes_of(healed.model)
    changed = {name for name in new if name not in old or old[name] != new[name]}
    assert changed == set(healed.written)
    return changed


def divergence(student: oir.Model, teacher: oir.Model, samples: list[Sample]) -> float:
    found = []
    for model in (teacher, student):
        logits = np.concatenate([next(iter(executor()(model).run(s.feeds).values())) for s in samples]).astype(float)
        found.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    return float((np.exp(found[0]) * (found[0] - found[1])).sum(-1).mean())


VALUES = """
g (float[N, 4] x) => (float[N, 3] y, float[N, 4] z) <float[4, 8] w, float[8, 3] v, float[4, 4] u> {
    h = MatMul (x, w)  a = Tanh (h)  p = MatMul (a, v)  y = Tanh (p)  q = MatMul (x, u)  z = Sin (q)
}
"""
TIED = """
g (int64[N, S] ids) => (float[N, S, 9] y) <float[9, 4] table, float[4, 8] w, float[8, 4] v> {
    x = Gather (table, ids)  h = MatMul (x, w)  a = Tanh (h)  b = MatMul (a, v)  s = Add (x, b)
    t = Transpose <perm = [1, 0]> (table)  y = MatMul (s, t)
}
"""
