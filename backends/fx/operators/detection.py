"""Boxes that are kept."""

from __future__ import annotations

import torch

from burnish.backends.fx.registry import operator
from burnish.backends.fx.values import Tensor, Value, flat, host, integer


def _corners(boxes: Tensor, centre: int) -> Tensor:
    """Boxes [n, 4] as (low y, low x, high y, high x); of (x, y, width, height) when they are given by `centre`."""
    if centre:
        half = boxes[:, 2:] / 2
        return torch.cat((boxes[:, :2] - half, boxes[:, :2] + half), 1)
    first, second = boxes[:, :2], boxes[:, 2:]
    return torch.cat((torch.minimum(first, second), torch.maximum(first, second)), 1)


def _overlap(box: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of one box with others, 0 where either has no area."""
    sides = (torch.minimum(box[2:], others[:, 2:]) - torch.maximum(box[:2], others[:, :2])).clamp(min=0)
    shared = sides.prod(1)
    own, theirs = (box[2:] - box[:2]).prod(), (others[:, 2:] - others[:, :2]).prod(1)
    union = own + theirs - shared
    return torch.where((own > 0) & (theirs > 0) & (union > 0), shared / union, torch.zeros_like(union))


@operator("NonMaxSuppression", static=(2, 3, 4), fixed=(3, 4))
def non_max_suppression(
    boxes: Tensor, scores: Tensor, most: Value = None, overlap: Value = None, least: Value = None,
    center_point_box: int = 0,
) -> Tensor:  # fmt: skip
    """(batch, class, box) of the best boxes of every class, without those that overlap a better one too much."""
    count = 0 if most is None else integer(most)
    (limit,) = flat(host(overlap)) if overlap is not None else (0.0,)
    kept: list[Tensor] = []
    for batch in range(boxes.shape[0] if count > 0 else 0):
        corners = _corners(boxes[batch], center_point_box)
        for kind in range(scores.shape[1]):
            order = torch.sort(scores[batch, kind], descending=True, stable=True).indices
            if least is not None:
                order = order[scores[batch, kind][order] > flat(host(least))[0]]
            taken = 0
            while len(order) and taken < count:
                best, order = order[0], order[1:]
                kept.append(torch.stack((torch.full_like(best, batch), torch.full_like(best, kind), best)))
                order = order[_overlap(corners[best], corners[order]) <= limit]
                taken += 1
    return torch.stack(kept) if kept else torch.zeros((0, 3), dtype=torch.int64, device=boxes.device)
