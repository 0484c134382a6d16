"""How much of what a model says hangs on the training of each layer: layer criticality by re-randomisation.

All weights stay as they are but those of one layer, which are drawn anew as training would start with them (Zhang,
Bengio and Singer, arXiv:1902.01996). What the outputs lose is the layer's criticality, by the metric of Gavrikov et al.
(arXiv:2410.14470):

    100 · (1 - mean cos(p, q))

with p and q the probabilities that the model gives before and after. Nothing is retrained and no label is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as oir

from burnish.ir import match
from burnish.ir.errors import InputError
from burnish.ir.samples import Sample
from burnish.ir.views.linear import find_linear
from burnish.ir.walk import bodies, is_op
from burnish.passes.metrics import cosine_distances
from burnish.passes.pipeline import Pipeline
from burnish.passes.protocols import Runner
from burnish.passes.recipes import NORMAL_FORM
from burnish.passes.reducers import rows_of
from burnish.passes.resets import Resettable
from burnish.passes.sites import Keep

Kind = Literal["probabilities", "logits", "chances", "values"]

_PASSED = ("Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten")


@dataclass(frozen=True)
class Reading:
    """Which output is looked at, and as what.

    Attributes:
        output: its name.
        kind: `probabilities` of classes along the last axis; `logits`, which a softmax makes into such; `chances`, each
            of which is that of yes against no; or `values`, of which each row of the batch is compared as it is (each
            sample, where a row is one number).
        reason: why it is taken as that, in plain words.
    """

    output: str
    kind: Kind
    reason: str


@dataclass(frozen=True)
class Change:
    """What one reset did to the outputs, over all rows of all samples.

    Attributes:
        criticality: 100 · (1 - mean cosine), 0 to 100 for probabilities; a row that is no longer finite counts as 100.
        l1: mean over the rows of the sum of absolute differences.
        l2: mean over the rows of the Euclidean distance.
        top1: share of the rows whose largest entry is another, 0 to 1; None for values.
        lost: rows that are no longer finite; `l1` and `l2` leave them out.
    """

    criticality: float
    l1: float
    l2: float
    top1: float | None
    lost: int


def reading(model: oir.Model, output: str | None = None, kind: Kind | None = None) -> Reading:
    """How a model's outputs are read: the first that ends in a softmax, else in a linear layer, else in a sigmoid.

    Where there is none of these, the first output is read as plain values.

    Args:
        model: the model; its normal form is looked at, it is left untouched.
        output: look at this one.
        kind: take it as that.

    Raises:
        InputError: there is no such output, or none of floating point.
    """
    normal = Pipeline(NORMAL_FORM).rewrite(model).model
    found = {str(value.name): value for value in normal.graph.outputs if _is_float(value)}
    if not found:
        raise InputError(
            "the model has no output of floating point: there is nothing to compare",
            hint="let it also return the scores from which its answer is chosen",
        )
    if output is not None and output not in found:
        listed = ", ".join(f"`{name}`" for name in found)
        raise InputError(f"there is no output `{output}` of floating point", hint=f"the outputs are {listed}")
    names = list(found) if output is None else [output]
    if kind is not None:
        return Reading(names[0], kind, "asked for")
    read = [Reading(name, *_kind(found[name])) for name in names]
    order: tuple[Kind, ...] = ("probabilities", "logits", "chances")
    return next((one for wanted in order for one in read if one.kind == wanted), read[0])


def _is_float(value: oir.Value) -> bool:
    dtype = match.tensor_dtype(value)
    return dtype is not None and dtype.is_floating_point()


def _kind(value: oir.Value) -> tuple[Kind, str]:
    node = _behind(value)
    if is_op(node, "If") and node is not None:
        index = next(i for i, out in enumerate(node.outputs) if out is _moved(value))
        found = {_kind(body.outputs[index]) for body in bodies(node)}
        if len(found) == 1:
            return found.pop()
    if _is_softmax(node):
        return "probabilities", "it ends in a softmax over the last axis"
    layer = find_linear(node)
    if layer is not None and (match.rank(layer.output) or 2) >= 2:
        return "logits", "it ends in a linear layer"
    if is_op(node, "Sigmoid"):
        return "chances", "it ends in a sigmoid"
    return "values", "it ends in no softmax, linear layer or sigmoid: no classification"


def _moved(value: oir.Value) -> oir.Value:
    """What `value` is a copy of, in another shape or dtype."""
    while (node := match.producer(value, *_PASSED)) is not None and node.inputs[0] is not None:
        value = node.inputs[0]
    return value


def _behind(value: oir.Value | None) -> oir.Node | None:
    return None if value is None else _moved(value).producer()


def _is_softmax(node: oir.Node | None) -> bool:
    """Whether `node` is a softmax over the last axis, or the division of the spelled out one."""
    if node is None:
        return False
    if is_op(node, "Softmax"):
        axis, rank = match.attribute(node, "axis", -1), match.rank(node.outputs[0])
        return bool(axis == -1 or (rank is not None and axis == rank - 1))
    powers, total = (_behind(node.inputs[0]), _behind(node.inputs[1])) if is_op(node, "Div") else (None, None)
    if not is_op(powers, "Exp") or not is_op(total, "ReduceSum") or powers is None or total is None:
        return False
    axes, rank = match.axes_of(total), match.rank(total.inputs[0])
    return total.inputs[0] is powers.outputs[0] and axes in ([-1], [] if rank == 1 else None, [(rank or 0) - 1])


class Criticality:
    """Measures what resets do to the outputs of a model.

    The outputs of the model as it is are computed once and kept.

    Args:
        subject: the model with weights that can be exchanged.
        runner: of `subject.model`.
        samples: what the outputs are compared on.
        look: which output, and as what.
        keep: the rows of the output that count, all of them when absent; the others are those of padding.

    Raises:
        InputError: the model refuses a sample, or its output has no rows or is not finite.
    """

    def __init__(
        self,
        subject: Resettable,
        runner: Runner,
        samples: Iterable[Sample],
        look: Reading,
        keep: Keep | None = None,
    ) -> None:
        self.subject, self.look, self._runner, self._keep = subject, look, runner, keep
        self._samples = list(samples)
        self._before = [self._rows(sample, {}) for sample in self._samples]
        self.rows = sum(len(rows) for rows in self._before)
        if not self.rows:
            raise InputError(f"output `{look.output}` has no rows on these samples: there is nothing to compare")
        if not all(np.isfinite(rows).all() for rows in self._before):
            raise InputError(f"output `{look.output}` holds NaN or infinity with the model's own weights")
        self.classes = self._before[0].shape[1]
        if look.kind == "values" and max(rows.shape[1] for rows in self._before) == 1:
            raise InputError(f"output `{look.output}` is one number for each sample: there is no angle to compare")

    def change(self, tensors: Mapping[str, np.ndarray]) -> Change:
        """What becomes of the outputs when these tensors, by name, take the place of the model's."""
        distances, ones, twos, moved = [], [], [], []
        for sample, before in zip(self._samples, self._before, strict=True):
            after = self._rows(sample, tensors)
            if after.shape != before.shape:
                raise InputError(
                    f"output `{self.look.output}` changes its shape with the weights",
                    place=f"sample `{sample.name}`",
                )
            finite = np.isfinite(after).all(1)
            distance = cosine_distances(before, np.where(finite[:, None], after, 0.0))
            distances.append(np.where(finite, distance, 1.0))
            ones.append(np.abs(after - before).sum(1)[finite])
            twos.append(np.linalg.norm(after - before, axis=1)[finite])
            moved.append((after.argmax(1) != before.argmax(1)) | ~finite)
        lost = self.rows - sum(len(one) for one in ones)
        return Change(
            criticality=float(100 * np.concatenate(distances).mean()),
            l1=_mean(ones),
            l2=_mean(twos),
            top1=None if self.look.kind == "values" else _mean(moved),
            lost=lost,
        )

    def _rows(self, sample: Sample, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """The output as float64 [rows, classes], probabilities unless it is read as values."""
        try:
            array = self._runner.run({**sample.feeds, **tensors})[self.look.output]
        except InputError as error:
            raise InputError(error.cause, place=f"sample `{sample.name}`", hint=error.hint) from error
        wide = array.astype(np.float64)
        keep = None if self._keep is None else self._keep.of(sample.feeds, array)
        if self.look.kind == "values":
            wide = wide if keep is None else np.where(keep, wide, 0.0)
            apart = wide.ndim > 1 and wide.size > len(wide)
            return wide.reshape(len(wide) if apart else 1, -1)
        rows = rows_of(wide, None if self.look.kind == "chances" or not wide.ndim else -1, keep)
        if self.look.kind == "chances":
            return np.concatenate([rows, 1 - rows], axis=1)
        return _softmax(rows) if self.look.kind == "logits" else rows


def _mean(parts: list[np.ndarray]) -> float:
    found = np.concatenate(parts)
    return float(found.mean()) if len(found) else 0.0


def _softmax(rows: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", over="ignore"):
        powers = np.exp(rows - rows.max(1, keepdims=True))
        return np.asarray(powers / powers.sum(1, keepdims=True))
