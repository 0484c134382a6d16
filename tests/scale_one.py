"""A lossy pass and a measure for tests of the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, weights
from burnish.passes import catalog
from burnish.passes.base import Outcome
from burnish.passes.lossy import Context, Edit, LossyPass, Savings


@dataclass(frozen=True)
class Scale(LossyPass):
    """Multiply one matrix by a number, by its name: `w times 0.5`; `nan` makes a model whose outputs are not finite."""

    order: ClassVar[int] = 30

    def propose(self, model: oir.Model, context: Context | None, outcome: Outcome | None) -> list[Edit]:
        found = [value for value in model.graph.initializers.values() if value.const_value.size > 64]
        return [self.edit(str(value.name), 0.5) for value in found if value.dtype == oir.DataType.FLOAT]

    def edit(self, name: str, factor: float) -> Edit:
        return Edit(catalog.spec(self), name, f"times {factor}", frozenset(), Savings())

    def apply(self, model: oir.Model, edits: Sequence[Edit], outcome: Outcome) -> None:
        for one in edits:
            value = model.graph.initializers[one.site]
            outcome.take(value.consumers()[0])
            factor = np.float32(one.option.split()[1])
            new = edit.add_constant(model, f"{one.site}.scaled", weights.constant(value) * factor)
            edit.replace_value(value, new)
            edit.drop_if_unused(value)


@dataclass
class Error:
    """The mean squared difference of all outputs that both models have."""

    name: str = "error"
    higher_is_better: bool = False

    @property
    def key(self):
        return self.name

    def partial(self, outputs, reference, sample):
        return [float(np.square(np.float64(outputs[name]) - reference[name]).mean()) for name in outputs]

    def value(self, partials):
        return float(np.mean(np.concatenate(partials)))
