"""TVM's tensor intrinsics, loaded in seconds: it asks for the whole call stack, with source, once per intrinsic."""

from __future__ import annotations

import inspect
import sys
import threading
from typing import Any

_lock = threading.Lock()


def load() -> None:
    """Import the intrinsics that schedules for tensor cores need: 2 s instead of 26 s on a slow machine."""
    with _lock:
        before = inspect.stack
        inspect.stack = _bare_stack
        try:
            from tvm.s_tir import tensor_intrin
        finally:
            inspect.stack = before
    assert tensor_intrin


def _bare_stack(context: int = 1) -> list[Any]:
    """`inspect.stack` without reading source files."""
    frames, frame = [], sys._getframe(1)
    while frame is not None:
        frames.append(
            inspect.FrameInfo(frame, frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name, None, None)
        )
        frame = frame.f_back  # type: ignore[assignment]
    return frames
