"""The loss of a model's task in torch: what labels say, or the next token."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as oir
import torch
import torch.nn.functional as F
from torch import fx

from burnish.backends.fx import bridge
from burnish.backends.fx.builder import to_graph_module
from burnish.ir.errors import BurnishError, InputError
from burnish.ir.samples import Sample
from burnish.ir.views.embedding import token_embedding
from burnish.passes import criticality
from burnish.passes.lossy import Keeps
from burnish.passes.sites import Keep

_TINY = 1e-12
"""The smallest probability whose logarithm is taken."""

_NARROW = (torch.float16, torch.bfloat16)
_WIDENED = "burnish.widened"


def module_of(model: oir.Model) -> fx.GraphModule:
    """The model in torch with parameters of at least float32; nothing can be learnt in fewer bits.

    Raises:
        InputError: it cannot be expressed.
    """
    module = to_graph_module(model)
    if any(one.dtype in _NARROW for one in module.parameters()):
        module.float().meta[_WIDENED] = True
    return module


def tensors(module: fx.GraphModule, feeds: Mapping[str, np.ndarray]) -> list[torch.Tensor]:
    """The arrays of a sample as tensors on the module's device, in the order of its inputs; others are left out.

    Raises:
        InputError: an input is missing, or torch has no such dtype.
    """
    found = []
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    for name in bridge.bridge_of(module).inputs:
        if name not in feeds:
            raise InputError(f"input `{name}` is missing", hint="give samples with an array for every input")
        array = np.asarray(feeds[name])
        made = bridge.to_torch(array, oir.DataType.from_numpy(array.dtype)) if array.dtype.kind not in "OSU" else None
        if made is None:
            raise InputError(f"torch cannot train on input `{name}` of {array.dtype}")
        wide = module.meta.get(_WIDENED) and made.dtype in _NARROW
        found.append(made.to(device, torch.float32 if wide else made.dtype))
    return found


def call(module: fx.GraphModule, feeds: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The outputs by name, with gradients where they are wanted.

    Raises:
        InputError: the module refuses these inputs.
    """
    arguments = tensors(module, feeds)
    try:
        found = module(*arguments)
    except BurnishError:
        raise
    except Exception as error:
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"torch refuses the inputs: {text}") from error
    return dict(zip(bridge.bridge_of(module).outputs, found, strict=True))


def scores(output: torch.Tensor, kind: criticality.Kind) -> torch.Tensor:
    """An output as unnormalized logarithms of probabilities, [..., classes]; a chance has the classes no and yes.

    Raises:
        ValueError: `kind` is `values`.
    """
    output = output.float() if output.dtype != torch.float64 else output
    if kind == "logits":
        return output
    if kind == "probabilities":
        return output.clamp_min(_TINY).log()
    if kind == "chances":
        return torch.stack([(1 - output).clamp_min(_TINY), output.clamp_min(_TINY)], -1).log()
    raise ValueError("values are no scores")


class Task:
    """What a model is for, and how badly it does it.

    With labels it is the cross-entropy of the classes; negative labels do not count. A causal language model without
    labels, or with its own token ids as labels, is asked for the next token.

    Args:
        model: read, not changed.
        module: the model in torch, with which it is seen whether it looks ahead.
        keeps: says which rows are no padding; all rows count without it.
    """

    def __init__(self, model: oir.Model, module: fx.GraphModule, keeps: Keeps | None = None) -> None:
        self._module = module
        self.look = criticality.reading(model)
        embedding = token_embedding(model)
        self._ids = str(embedding.input.name) if embedding is not None and embedding.input is not None else None
        self._rows = embedding.rows if embedding is not None else 0
        value = next(value for value in model.graph.outputs if value.name == self.look.output)
        self.keep: Keep | str | None = None
        if keeps is not None:
            axis = None if self.look.kind == "chances" else -1
            self.keep = keeps(model, {"output": (value, axis)})["output"]
        self._causal: bool | None = None

    def loss(self, output: torch.Tensor, sample: Sample) -> tuple[torch.Tensor, int]:
        """The sum of -log p(label) over all rows that count, and their number.

        Args:
            output: the model's output `look.output` for the sample.
            sample: the inputs and labels.

        Raises:
            InputError: the model is no classifier, labels are missing or do not fit, or there is no next token.
        """
        wanted, found = self._wanted(output, sample)
        return F.cross_entropy(found, wanted, ignore_index=-1, reduction="sum"), int((wanted >= 0).sum())

    def kept(self, sample: Sample, shape: torch.Size) -> np.ndarray | None:
        """Which rows of the scores [..., classes] are no padding, bool [...]; None when all of them count."""
        if not isinstance(self.keep, Keep):
            return None
        whole = tuple(shape[:-1]) if self.look.kind == "chances" else tuple(shape)
        found = np.broadcast_to(self.keep.of(sample.feeds, np.broadcast_to(np.float32(0), whole)), whole)
        return found if self.look.kind == "chances" else found[..., 0]

    def _wanted(self, output: torch.Tensor, sample: Sample) -> tuple[torch.Tensor, torch.Tensor]:
        """Labels [n], -1 where none counts, and scores [n, classes]."""
        place = f"sample `{sample.name}`"
        if self.look.kind == "values":
            hint = "distil from the original instead, which needs no labels" if sample.labels is not None else None
            raise InputError(
                f"output `{self.look.output}` cannot be judged by labels: {self.look.reason}",
                hint=hint or "use a criterion that needs no gradient, or a model that ends in scores of classes",
            )
        found = scores(output, self.look.kind)
        labels = sample.labels
        ids = sample.feeds.get(self._ids) if self._ids is not None else None
        if labels is None or (ids is not None and np.array_equal(np.ravel(labels), np.ravel(ids))):
            labels = self._next(found, sample, ids)
        if np.asarray(labels).dtype.kind not in "biu" or np.size(labels) != found[..., 0].numel():
            raise InputError(
                f"labels of {np.asarray(labels).dtype} {list(np.shape(labels))} do not fit scores {list(found.shape)}",
                place=place,
                hint="give one whole number for each row of scores",
            )
        classes = found.shape[-1]
        target = torch.from_numpy(np.asarray(labels).astype(np.int64).reshape(-1)).to(found.device)
        if target.numel() and int(target.max()) >= classes:
            raise InputError(f"label {int(target.max())} is beyond the {classes} classes", place=place)
        kept = self.kept(sample, found.shape)
        if kept is not None:
            target = target.where(torch.from_numpy(kept.reshape(-1).copy()).to(found.device), -1)
        return target.clamp_min(-1), found.reshape(-1, classes)

    def _next(self, found: torch.Tensor, sample: Sample, ids: np.ndarray | None) -> np.ndarray:
        """The id that follows each position, -1 behind the last one and before padding."""
        place = f"sample `{sample.name}`"
        fits = ids is not None and ids.ndim == 2 and ids.shape == tuple(found.shape[:-1])
        if ids is None or not fits or found.shape[-1] != self._rows:
            raise InputError(
                "there are no labels, and the model does not score each next token of its input",
                place=place,
                hint="give `labels` with the samples",
            )
        if self._looks_ahead(sample, ids):
            raise InputError(
                "there are no labels, and the model sees the tokens that it would be asked for",
                place=place,
                hint="give `labels` with the samples",
            )
        shifted = np.full(ids.shape, -1, np.int64)
        shifted[:, :-1] = ids[:, 1:]
        kept = self.kept(sample, found.shape)
        if isinstance(self.keep, str):
            raise InputError(f"it cannot be told which tokens are padding: {self.keep}", place=place)
        if kept is not None:
            shifted[:, :-1][~kept[:, 1:]] = -1
        return shifted

    def _looks_ahead(self, sample: Sample, ids: np.ndarray) -> bool:
        """Whether the last token changes what is said of the tokens before it; measured once."""
        if self._causal is None and ids.shape[1] > 1:
            other = ids.copy()
            other[:, -1] = (other[:, -1] + 1) % self._rows
            assert self._ids is not None
            with torch.no_grad():
                one, two = (
                    scores(call(self._module, {**sample.feeds, self._ids: given})[self.look.output], self.look.kind)[
                        :, :-1
                    ]
                    for given in (ids, other)
                )
            self._causal = bool((one - two).abs().max() <= 1e-4 * one.abs().max())
        return self._causal is False
