"""Which keys a query can see, as far as the computation of the masks proves it."""

from __future__ import annotations

from burnish.ir.dims import Dim
from burnish.ir.inference import Inference
from burnish.ir.views.scores import Mask


def reach(masks: tuple[Mask, ...], queries: Dim, keys: Dim, facts: Inference) -> tuple[bool | None, int | None]:
    """(whether no query sees a later key, how many keys a query sees at most)."""
    if not masks:
        return False, None
    return None, None
