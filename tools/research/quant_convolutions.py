"""Ways to round the weights of convolutions that are stored in few bits: errors on held-out data.

    python -m burnish.tools.research.quant_convolutions resnet,a6-cls,a6-rec,a1 ['4 adaround' ...]

Convolutions are stored in 8 or 4 bits with a scale for each output; everything else stays. `gptq` and `adaround` round
one after the other, each for what it reads behind those before it. Small models are calibrated several times, each time
without another one of the samples. The rows that are named, or those that are missing, go to
docs/results/quant-weights.json, and the page is written anew.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as oir

from burnish.ir.walk import is_op
from burnish.passes import catalog, lossy, stored_convolutions
from burnish.passes.base import Outcome
from burnish.passes.lossy import Context, Edit
from burnish.passes.pipeline import Pipeline, constant_bytes
from burnish.passes.quant.quantize_weights import QuantizeWeights
from burnish.tools.lossy_context import context_for
from burnish.tools.research import quant_weights_page as page
from burnish.tools.research.quant_static import BEDS, compared, outputs_of, prepared

_MEMORY = 1 << 30


def edits_of(model: oir.Model, bits: int, rounding: str, context: Context) -> tuple[QuantizeWeights, list[Edit]]:
    """The pass, and its edits that store convolutions, but for transposed ones."""
    at_once, steps = rounding == page.AT_ONCE, 0
    options = {"bits": 0 if at_once else bits, "rounding": rounding.split()[0], "convolutions": True}
    one, outcome = catalog.make("quantize-weights", options), Outcome("quantize-weights")
    assert isinstance(one, QuantizeWeights)
    images = {name: layer for name, layer in stored_convolutions.found(model).items() if not layer.transposed}
    if one.decided:
        steps = one.steps if one.rounding == "adaround" else 0
        made = stored_convolutions.edits_in_turn(model, one, (bits, steps), images, [], context, _MEMORY, outcome)
        return one, made
    edits = one.propose(model, context, outcome) if at_once else one.asked(model, outcome)
    return one, [edit for edit in edits if edit.site in images and edit.option == f"int{bits} per channel"]


def measure(name: str, wanted: Sequence[str]) -> None:
    """The rows of a model, those that are named or all."""
    bed = BEDS[name](Path(".zoo"))
    model = Pipeline((catalog.make("raise-opset", {"to": 21}),)).rewrite(prepared(bed.model)).model
    reference = outputs_of(model, bed.held)
    count = min(page.DRAWS.get(name, 1), len(bed.fit))
    draws = [bed.fit] if count == 1 else [[*bed.fit[:one], *bed.fit[one + 1 :]] for one in range(count)]
    for bits in (8, 4):
        for rounding in page.ROUNDINGS:
            row = f"{name}, {bits} bits, {rounding}"
            done = row in page.read().get("convolutions", {})
            if f"{bits} {rounding}" not in wanted if wanted else done:
                continue
            rows = []
            for fit in draws if rounding in page.MEASURED else [bed.fit]:
                context, start = context_for(model, fit), time.process_time()
                one, edits = edits_of(model, bits, rounding, context)
                made = lossy.apply(model, edits, [one])[0]
                seconds = time.process_time() - start
                assert any(is_op(node, "DequantizeLinear") for node in made.graph)
                found = compared(bed, reference, outputs_of(made, bed.held))
                rows.append(found | {"bytes": constant_bytes(made), "seconds": seconds})
            found = {key: float(np.mean([one[key] for one in rows])) for key in rows[0]}
            errors = [one["error"] for one in rows]
            page.note("convolutions", row, found | {"errors": errors})
            print(row, found, errors, flush=True)


if __name__ == "__main__":
    for one in sys.argv[1].split(","):
        measure(one, sys.argv[2:])
    page.write()
