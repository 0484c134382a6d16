"""Which layer reads the keys and values of which, as text.

The names and the explicit form are those of the systematic study of cross-layer sharing (arXiv:2410.14442), which
describes CLA (arXiv:2405.12981), YOCO (arXiv:2405.05254) and LCKV (arXiv:2405.10637) in them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from burnish.ir.errors import InputError

_NAMED = re.compile(r"(pizza|sandwich|lasagna)-(bottom|middle|top)-(\d+)")
_SHORT = re.compile(r"(cla|yoco|lckv)-?(\d*)", re.IGNORECASE)
_ENTRY = re.compile(r"(\d+)(s?)")
_HINT = "write `0_0_2_2`, one number a layer, or a name: `lasagna-bottom-8`, `CLA2`"


def layout(text: str, count: int, windows: Sequence[int | None]) -> list[int]:
    """For each layer the one whose keys and values it reads.

    Args:
        text: `pizza`, `sandwich` or `lasagna`, `bottom`, `middle` or `top`, and how many layers keep keys and values,
            as in `pizza-bottom-8`; `CLA2`; `YOCO`; `LCKV-4`; or a number for each layer, as in `0_0_2_2`, with an `s`
            behind that of a layer with a sliding window.
        count: how many layers there are.
        windows: the sliding window of each, None without one.

    Raises:
        InputError: the text is none of these, it does not fit the model, or a layer would read one above itself.
    """
    entries, sliding = _entries(text, count)
    place = f"`layout={text}`"
    for layer in sliding:
        if windows[layer] is None:
            hint = "a window changes what the layer sees; leave out the `s` to share keys and values alone"
            raise InputError(f"layer {layer} has no sliding window", place=place, hint=hint)
    for layer, source in enumerate(entries):
        if source > layer:
            cause = f"layer {layer} would read the keys and values of layer {source}, which comes after it"
            hint = "only checkpoints that were trained so compute with that, in several passes; take `bottom`"
            raise InputError(cause, place=place, hint=hint)
    return entries


def entries(shape: str, position: str, own: int, count: int) -> list[int]:
    """The study's nine layouts, those included that need several passes.

    pizza: the first `own - 1` layers keep theirs, the others are one group. sandwich: `own - 1` layers at both ends
    keep theirs (of an odd number the first has one more), those between are one group. lasagna: `own` groups of equal
    size, the first ones larger by one where `count` does not divide. A group reads its first, middle or last layer.
    """
    if shape == "lasagna":
        sizes = [count // own + (index < count % own) for index in range(own)]
    else:
        below = own - 1 if shape == "pizza" else own // 2
        sizes = [1] * below + [count - own + 1] + [1] * (own - 1 - below)
    found: list[int] = []
    for size in sizes:
        first, last = len(found), len(found) + size - 1
        found += [{"bottom": first, "middle": (first + last) // 2, "top": last}[position]] * size
    return found


def _entries(text: str, count: int) -> tuple[list[int], list[int]]:
    """What each layer reads, and which have to have a sliding window."""
    named, short, place = _NAMED.fullmatch(text), _SHORT.fullmatch(text), f"`layout={text}`"
    if named is not None:
        own = int(named[3])
        if not 1 <= own <= count:
            raise InputError(f"{own} layers cannot keep keys and values of {count}", place=place)
        return entries(named[1], named[2], own, count), []
    if short is not None:
        return _known(short[1].lower(), int(short[2]) if short[2] else None, count, place)
    found = [_ENTRY.fullmatch(one) for one in text.split("_")]
    if any(one is None for one in found):
        raise InputError("it is no layout", place=place, hint=_HINT)
    read = [int(one[1]) for one in found if one is not None]
    if len(read) != count:
        raise InputError(f"it is for {len(read)} layers, the model has {count}", place=place)
    wrong = next((one for one in read if one >= count), None)
    if wrong is not None:
        raise InputError(f"there is no layer {wrong}: the model has the layers 0 to {count - 1}", place=place)
    return read, [layer for layer, one in enumerate(found) if one is not None and one[2]]


def _known(name: str, number: int | None, count: int, place: str) -> tuple[list[int], list[int]]:
    if name == "cla":
        size = 2 if number is None else number
        if size < 1:
            raise InputError("a group has no layers", place=place, hint=_HINT)
        return [layer - layer % size for layer in range(count)], []
    if name == "lckv":
        own = 3 if number is None else number
        if not 1 <= own <= count:
            raise InputError(f"{own} layers cannot keep keys and values of {count}", place=place)
        return entries("sandwich", "top", own, count), []
    if number is not None:
        raise InputError("YOCO has no number: the first half keeps keys and values", place=place, hint=_HINT)
    return entries("pizza", "bottom", count // 2 + 1, count), list(range(count // 2))
