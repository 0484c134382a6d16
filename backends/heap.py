"""Memory that was freed goes back to the system."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any


def give_back() -> None:
    """Give the system what is free between what is held.

    The C library keeps freed blocks of up to 32 MB for itself. Where large ones of changing sizes come and go in a loop
    they end up spread among small ones that stay, and a process grows without holding more. Only glibc does so, and
    only glibc is asked.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Any:
    try:
        return getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):
        return None
