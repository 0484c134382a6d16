"""The losses of the standard."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from burnish.backends.fx.registry import operator
from burnish.backends.fx.values import Tensor, Value, on_device, tensor

_NOTHING = -100
"""A class that no target names."""


@operator("NegativeLogLikelihoodLoss", fixed=(2,))
def negative_log_likelihood(
    x: Tensor, target: Value, weight: Value = None, reduction: str = "mean", ignore_index: int | None = None
) -> Tensor:
    """The weighted loss of log-probabilities x [N, C, *d] at the classes `target` [N, *d]."""
    target = on_device(tensor(target), x).long()
    ignored = _NOTHING if ignore_index is None else ignore_index
    shape = target.shape
    if x.dim() not in (2, 4):
        x, target = x.reshape(*x.shape[:2], 1, -1), target.reshape(shape[0], 1, -1)
    y = F.nll_loss(x, target, weight, ignore_index=ignored, reduction=reduction)
    return y.reshape(shape) if reduction == "none" else y


@operator("SoftmaxCrossEntropyLoss", fixed=(2,), several=True)
def softmax_cross_entropy(
    x: Tensor, target: Value, weight: Value = None, reduction: str = "mean", ignore_index: int | None = None
) -> tuple[Tensor, Tensor]:
    """The loss of logits x [N, C, *d] at the classes `target` [N, *d], and the log-probabilities."""
    logs = torch.log_softmax(x, 1)
    return negative_log_likelihood(logs, target, weight, reduction, ignore_index), logs
