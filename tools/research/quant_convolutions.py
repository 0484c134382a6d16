"""Ways to round the weights of convolutions that are stored in few bits, AdaRound among them: errors on held-out data.

    python -m burnish.tools.research.quant_convolutions resnet a6-cls a1

Convolutions are stored in 8 or 4 bits with a scale for each output; everything else stays. `gptq` and AdaRound round
one after the other, each for what it reads behind those before it. The rows go to docs/results/quant-weights.json, and
the page is written anew.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as oir

from burnish.ir.walk import is_op
from burnish.passes import catalog, lossy, stored_convolutions
from burnish.passes.base import Outcome
from burnish.passes.grids import Grid, fit
from burnish.passes.in_turn import Both, in_turn
from burnish.passes.lossy import Context, Edit, LossyPass
from burnish.passes.pipeline import Pipeline, constant_bytes
from burnish.tools.lossy_context import context_for
from burnish.tools.research import quant_weights_page as page
from burnish.tools.research.quant_static import BEDS, compared, outputs_of, prepared

AT_ONCE, IN_TURN, ADAPTIVE = "gptq at once", "gptq", "AdaRound"
ROUNDINGS = ("nearest", "mse", "hqq", AT_ONCE, IN_TURN, ADAPTIVE)

_MEMORY = 1 << 30

_STEPS, _RATE, _WEIGHT = 2000, 1e-2, 5.0
_LOW, _HIGH = -0.1, 1.1


def adaptive(weight: np.ndarray, moment: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Whether each weight is rounded up or down, learned (AdaRound, Nagel et al. 2020, arXiv:2004.10568).

    The loss is what the layer's outputs change by in the mean square, which depends on the second moment only, as a
    share of what rounding to nearest changes, times the number of weights; and the paper's regularizer, whose exponent
    falls from 20 to 2. The first fifth of the steps is without it. Its weight of 5 was the best of 0.01 to 5.

    Args:
        weight: float64 [out, in].
        moment: float64 [groups, in, in].
        bits: of the integers.

    Returns:
        The integers [out, in], and their scales [out].
    """
    import torch

    torch.set_num_threads(1)
    grid = Grid(bits)
    scales = fit(weight, grid, 0, clip="mse")
    shape = (len(moment), -1, weight.shape[1])
    exact = torch.tensor(weight.reshape(shape), dtype=torch.float32)
    scale = torch.tensor(scales.scale, dtype=torch.float32).reshape(len(moment), -1, 1)
    metric = torch.tensor(moment, dtype=torch.float32)
    below = torch.floor(exact / scale)
    share = (exact / scale - below).clamp(1e-4, 1 - 1e-4)
    free = torch.logit((share - _LOW) / (_HIGH - _LOW)).requires_grad_()
    optimizer = torch.optim.Adam([free], lr=_RATE)
    nearest = exact - torch.round(exact / scale).clamp(grid.low, grid.high) * scale
    whole = torch.einsum("goi,gij,goj->", nearest, metric, nearest) / exact.numel()
    for step in range(_STEPS):
        up = (torch.sigmoid(free) * (_HIGH - _LOW) + _LOW).clamp(0, 1)
        apart = exact - (below + up).clamp(grid.low, grid.high) * scale
        loss = torch.einsum("goi,gij,goj->", apart, metric, apart) / whole
        done = step / _STEPS
        if done > 0.2:
            power = 2 + 9 * (1 + np.cos(np.pi * (done - 0.2) / 0.8))
            loss = loss + _WEIGHT * (1 - (2 * up - 1).abs() ** power).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    levels = (below + (torch.sigmoid(free) * (_HIGH - _LOW) + _LOW > 0.5)).clamp(grid.low, grid.high)
    return levels.detach().numpy().astype(grid.dtype).reshape(weight.shape), scales.scale


def edits_of(model: oir.Model, bits: int, rounding: str, context: Context) -> tuple[LossyPass, list[Edit]]:
    """The pass, and its edits that store convolutions."""
    options = {"bits": bits, "rounding": "gptq" if rounding == IN_TURN else rounding, "convolutions": True}
    if rounding in (AT_ONCE, ADAPTIVE):
        options |= {"bits": 0, "rounding": "gptq"}
    one = catalog.make("quantize-weights", options)
    assert isinstance(one, LossyPass)
    outcome = Outcome("quantize-weights")
    edits = one.asked(model, outcome) if one.everywhere else one.propose(model, context, outcome)
    found = stored_convolutions.found(model)
    edits = [edit for edit in edits if edit.site in found and edit.option == f"int{bits} per channel"]
    if rounding != ADAPTIVE:
        return one, edits
    wanted = {edit.site: edit for edit in edits}
    images = {edit.site: found[edit.site] for edit in edits}
    made: list[Edit] = []
    for name, both in in_turn(model, images, context, _MEMORY, lambda: lossy.apply(model, made, [one])[0]):
        assert isinstance(both, Both)
        weight = both.target(images[name].weight())
        levels, scale = adaptive(weight.reshape(len(weight), -1), both.moment, bits)
        made.append(replace(wanted[name], payload={"levels": levels.reshape(weight.shape), "scale": scale}))
    return one, made


def measure(name: str, wanted: Sequence[str]) -> None:
    """The rows of a model, those that are named or all."""
    bed = BEDS[name](Path(".zoo"))
    model = Pipeline((catalog.make("raise-opset", {"to": 21}),)).rewrite(prepared(bed.model)).model
    reference = outputs_of(model, bed.held)
    context = context_for(model, bed.fit)
    for bits in (8, 4):
        for rounding in ROUNDINGS:
            row = f"{name}, {bits} bits, {rounding}"
            done = row in page.read().get("convolutions", {})
            if f"{bits} {rounding}" not in wanted if wanted else done:
                continue
            start = time.process_time()
            one, edits = edits_of(model, bits, rounding, context)
            made = lossy.apply(model, edits, [one])[0]
            seconds = time.process_time() - start
            assert any(is_op(node, "DequantizeLinear") for node in made.graph)
            found = compared(bed, reference, outputs_of(made, bed.held))
            page.note("convolutions", row, found | {"bytes": constant_bytes(made), "seconds": seconds})
            print(row, found, round(seconds, 1), flush=True)


if __name__ == "__main__":
    for one in sys.argv[1].split(","):
        measure(one, sys.argv[2:])
    page.write()
