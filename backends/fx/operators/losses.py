"""The losses of the standard."""

from __future__ import annotations

import torch

from burnish.backends.fx.registry import operator
from burnish.backends.fx.values import Tensor, Value, on_device, tensor


@operator("NegativeLogLikelihoodLoss", fixed=(2,))
def negative_log_likelihood(
    x: Tensor, target: Value, weight: Value = None, reduction: str = "mean", ignore_index: int | None = None
) -> Tensor:
    """The weighted loss of log-probabilities x [N, C, *d] at the classes `target` [N, *d]."""
    target = on_device(tensor(target), x).long()
    counted = torch.ones_like(target, dtype=torch.bool) if ignore_index is None else target != ignore_index
    target = torch.where(counted, target, torch.zeros_like(target))
    share = counted.to(x.dtype) if weight is None else weight[target] * counted
    y = -x.gather(1, target.unsqueeze(1)).squeeze(1) * share
    if reduction == "none":
        return y
    return y.sum() / share.sum() if reduction == "mean" else y.sum()


@operator("SoftmaxCrossEntropyLoss", fixed=(2,), several=True)
def softmax_cross_entropy(
    x: Tensor, target: Value, weight: Value = None, reduction: str = "mean", ignore_index: int | None = None
) -> tuple[Tensor, Tensor]:
    """The loss of logits x [N, C, *d] at the classes `target` [N, *d], and the log-probabilities."""
    logs = torch.log_softmax(x, 1)
    return negative_log_likelihood(logs, target, weight, reduction, ignore_index), logs
