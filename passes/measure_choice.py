"""Which measure a model is judged by: the one that is asked for, else the one that its outputs and labels suggest."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from burnish.ir import match
from burnish.ir.errors import InputError
from burnish.ir.samples import IGNORED, Sample, are_pairs
from burnish.ir.views.attention import Miss
from burnish.ir.views.attention_layer import attention_layers
from burnish.ir.views.embedding import token_embedding
from burnish.passes.criticality import Reading, reading
from burnish.passes.label_measures import Auc, Perplexity, Psnr, Recall
from burnish.passes.lossy import Keeps
from burnish.passes.measures import Accuracy, Agreement, Cosine, Divergence, Fidelity, RelativeError, RowMeasure
from burnish.passes.pipeline import Pipeline
from burnish.passes.protocols import Measure
from burnish.passes.recipes import NORMAL_FORM
from burnish.passes.sites import Keep

_ROWS: dict[str, type[RowMeasure]] = {
    one.name: one for one in (Divergence, Agreement, Accuracy, Cosine, Psnr, Recall, Auc)
}
_WHOLE: dict[str, type[RelativeError]] = {one.name: one for one in (RelativeError, Fidelity)}
NAMES = tuple(sorted([*_ROWS, *_WHOLE, Perplexity.name]))
"""The measures that can be asked for by name."""

_LABELLED = (Accuracy.name, Recall.name, Auc.name)
_OTHER_NAMES = {"r@1": Recall.name, "top-1": Accuracy.name, "kl": Divergence.name}


@dataclass(frozen=True)
class Chosen:
    """A measure, and why it is taken.

    Attributes:
        measure: the measure.
        reason: in plain words.
        look: the output it looks at and what it reads it as; None where it looks at all, or is the caller's own.
        padding: why rows of padding are not left out although there is a mask; None where that is no question.
    """

    measure: Measure
    reason: str
    look: Reading | None = None
    padding: str | None = None


def measure(
    asked: str | Measure | None,
    model: oir.Model,
    samples: Sequence[Sample] = (),
    *,
    output: str | None = None,
    keeps: Keeps | None = None,
) -> Chosen:
    """The measure of a name; without one, what fits the model and the labels.

    Without a name it is: `recall` for vectors whose labels tell queries from documents; `perplexity` for a language
    model that sees no later token and has no labels, or next tokens; `accuracy` for a classifier whose labels are class
    numbers; `agreement` with the original for a classifier without such labels; `fidelity` for everything else.

    Args:
        asked: one of `NAMES`, or a measure of the caller's, which is taken as it is.
        model: the model; its normal form is looked at, it is left untouched.
        samples: where the labels are.
        output: the output to look at; by default the one that `criticality.reading` takes.
        keeps: tells which rows of the output are padding; all rows count when absent.

    Raises:
        InputError: there is no such measure or output, or there are no labels for it.
    """
    if asked is not None and not isinstance(asked, str):
        return Chosen(asked, "asked for")
    name = None if asked is None else _known(asked)
    normal = Pipeline(NORMAL_FORM).rewrite(model).model
    look = reading(normal, output)
    value = next(one for one in normal.graph.outputs if one.name == look.output)
    reason = "asked for"
    if name is None:
        name, reason = _suggested(normal, value, look, samples)
    elif name in _LABELLED:
        missing = next((sample for sample in samples if sample.labels is None), None)
        if missing is not None:
            raise InputError(
                f"there are no labels, which the metric `{name}` needs",
                place=f"sample `{missing.name}`",
                hint="add an array `labels` to the samples, or take `divergence`, `agreement` or `relative-error`",
            )
    if name in _WHOLE:
        rows = {} if keeps is None else keeps(model, {str(one.name): (one, None) for one in model.graph.outputs})
        return Chosen(_WHOLE[name]({output: one for output, one in rows.items() if isinstance(one, Keep)}), reason)
    keep, padding = _keep(model, look, keeps)
    if name != Perplexity.name:
        return Chosen(_ROWS[name](look, keep), reason, look, padding)
    table = token_embedding(normal)
    ids = None if table is None or table.input is None else str(table.input.name)
    if ids is None and any(sample.labels is None for sample in samples):
        raise InputError(
            "there are no labels, and no input holds identifiers of tokens to foretell",
            hint="the metric `perplexity` takes the next tokens as `labels`",
        )
    return Chosen(Perplexity(look, keep, ids), reason, look, padding)


def _known(asked: str) -> str:
    name = asked.strip().lower().replace("_", "-")
    name = _OTHER_NAMES.get(name, name)
    if name in NAMES:
        return name
    near = difflib.get_close_matches(name, NAMES, 1)
    listed = ", ".join(NAMES)
    raise InputError(
        f"there is no metric `{asked}`",
        hint=(f"did you mean `{near[0]}`? " if near else "") + f"there are {listed}, and `package.module:function`",
    )


def _keep(model: oir.Model, look: Reading, keeps: Keeps | None) -> tuple[Keep | None, str | None]:
    """The rows of the output that count, or why that cannot be told."""
    value = next(one for one in model.graph.outputs if one.name == look.output)
    axis = None if look.kind in ("values", "chances") else -1
    found = None if keeps is None else keeps(model, {"output": (value, axis)})["output"]
    return (None, found) if isinstance(found, str) else (found, None)


def _suggested(model: oir.Model, value: oir.Value, look: Reading, samples: Sequence[Sample]) -> tuple[str, str]:
    """A name and the reason for it."""
    labels = [np.asarray(one.labels) for one in samples if one.labels is not None]
    labelled = bool(labels) and len(labels) == len(samples)
    named = f"output `{value.name}`"
    if labelled and look.kind in ("values", "logits") and are_pairs(labels):
        return Recall.name, f"the labels tell queries from documents, whose vectors are {named}"
    sees_ahead = _sees_ahead(model, value)
    each = zip(samples, labels, strict=labelled)
    tokens = all(any(label.shape == array.shape for array in one.feeds.values()) for one, label in each)
    if sees_ahead == "" and tokens and (labelled or not labels):
        return Perplexity.name, f"{named} foretells the next token, and no position sees a later one"
    width = None if value.shape is None or not len(value.shape) else value.shape[-1]
    single = width == 1 and look.kind in ("probabilities", "logits")
    classes = 2 if single or width == 1 else width if isinstance(width, int) else None
    if labelled and look.kind != "values" and _are_classes(labels, classes):
        return Accuracy.name, f"the labels are class numbers of {named}: {look.reason}"
    unused = ", and the labels are no class numbers" if labels else ", and there are no labels"
    if look.kind == "values" or single:
        why = "a row of it is one number" if single else look.reason
        return Fidelity.name, f"{named} is compared as numbers: {why}{unused}"
    ahead = f"; no perplexity, since {sees_ahead}" if sees_ahead else ""
    return Agreement.name, f"{named} tells classes: {look.reason}{unused}{ahead}"


def _are_classes(labels: Sequence[np.ndarray], classes: int | None) -> bool:
    for one in labels:
        if one.dtype.kind not in "iub" or ((one < 0) & (one != IGNORED)).any():
            return False
        if classes is not None and (one >= classes).any():
            return False
    return True


def _sees_ahead(model: oir.Model, value: oir.Value) -> str | None:
    """Why `value`, one row for each token, may know the tokens after it; empty when it does not.

    None when it does not tell as many classes as there are tokens, or not for each token.
    """
    table = token_embedding(model)
    shape, width = value.shape, None if value.shape is None or not len(value.shape) else value.shape[-1]
    if table is None or table.input is None or shape is None or not isinstance(width, int) or 2 * width < table.rows:
        return None
    if len(shape) != (match.rank(table.input) or 0) + 1:
        return None
    layers = list(attention_layers(model))
    if not layers:
        return "the model has no attention that shows what a position sees"
    if any(isinstance(one, Miss) or not one.causal for one in layers):
        return "it is not known that no position sees a later one"
    return ""
