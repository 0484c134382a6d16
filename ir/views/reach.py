"""Which keys a query can see, as far as the computation of the masks proves it."""

from __future__ import annotations

import onnx_ir as oir

from burnish.ir import dims
from burnish.ir.dims import Dim
from burnish.ir.inference import Inference
from burnish.ir.views.bands import EVERYWHERE, HIDDEN, Band, Bands, Run, Runs, any_band, fits
from burnish.ir.views.scores import Mask
from burnish.ir.views.varying import varies

_BOUNDED = 1e3


def reach(masks: tuple[Mask, ...], queries: Dim, keys: Dim, facts: Inference) -> tuple[bool | None, int | None]:
    """(whether no query sees a later key, how many keys a query sees at most).

    Args:
        masks: what is added to the scores, or chosen instead of them.
        queries, keys: how many there are; the last query stands at the last key.
        facts: what is proven of the model.

    Returns:
        True, False, or None where nothing is proven; the number of keys, None where there is no limit or none known.
    """
    bands = Bands(facts)
    seen, plain = EVERYWHERE, True
    for mask in masks:
        if mask.keep is not None and mask.fill > HIDDEN:
            seen = EVERYWHERE
        for value, runs, low in _parts(mask, bands):
            hides = any(run.low <= HIDDEN for run in runs) if low == HIDDEN else True
            plain = plain and (not hides or not varies(value, 2, bands))
            if hides and fits(facts.shape(value), (queries, keys)):
                seen = seen.meet(any_band(runs, low, float("inf")))
    if sum(max([0.0, *(run.high for run in bands.of(value))]) for mask in masks for value in mask.values) > _BOUNDED:
        seen = EVERYWHERE
    if plain:
        return False, None
    ahead = dims.subtract(queries, keys)
    # Where a query may not even see its own key, it may see none, and a softmax over nothing but -1e9 sees all.
    causal = seen.low is not None and dims.compare(seen.low, ahead) == 0
    return (True if causal else None), _window(seen)


def _parts(mask: Mask, bands: Bands) -> list[tuple[oir.Value, Runs, float]]:
    """The values of a mask with their runs, and from which number on a score stays visible."""
    found = [(value, bands.of(value), HIDDEN) for value in mask.values]
    if mask.keep is not None and mask.fill <= HIDDEN:
        runs = bands.of(mask.keep)
        if mask.inverted:
            runs = tuple(Run(1 - run.high, 1 - run.low, run.band) for run in runs)
        found.append((mask.keep, runs, 0.5))
    return found


def _window(seen: Band) -> int | None:
    """How many keys lie in the band."""
    if seen.high is None or seen.low is None:
        return None
    size = dims.add(dims.subtract(seen.high, seen.low), 1)
    return size if isinstance(size, int) and size > 0 else None
