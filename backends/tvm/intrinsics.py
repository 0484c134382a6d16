"""TVM's tensor intrinsics, loaded in seconds: it asks for the whole call stack, with source, once per intrinsic."""

from __future__ import annotations

import inspect
import threading

from burnish.backends.tvm.tuning.worker import quick_stack

_lock = threading.Lock()


def load() -> None:
    """Import the intrinsics that schedules for tensor cores need: 2 s instead of 26 s on a slow machine."""
    with _lock:
        before, inspect.stack = inspect.stack, quick_stack
        try:
            from tvm.s_tir import tensor_intrin
        finally:
            inspect.stack = before
    assert tensor_intrin
