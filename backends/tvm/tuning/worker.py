"""What runs in child processes: build one candidate, time one candidate. Sent by value, so imports are inside."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from burnish.backends.tvm.vector_math import enabled


def quick_stack(context: int = 1) -> list[Any]:
    """`inspect.stack` without the lines of source: what registers tensor intrinsics asks for it hundreds of times."""
    import inspect
    import sys

    found: list[Any] = []
    frame: Any = sys._getframe(1)
    while frame:
        code = frame.f_code
        found.append(inspect.FrameInfo(frame, code.co_filename, frame.f_lineno, code.co_name, None, None))
        frame = frame.f_back
    return found


def start(threads: int) -> None:
    """Prepare a child: kernels run on so many threads.

    Without `TVM_NUM_THREADS` the runtime takes half of the cores of an x86 machine.
    """
    import inspect
    import os

    os.environ["TVM_NUM_THREADS"] = str(threads)
    inspect.stack = quick_stack


def built(module: Any, target: Any, path: str) -> str:
    """The path of a library with one scheduled kernel.

    Args:
        module: with the function `main`.
        target: a `tvm.target.Target`.
        path: of the library to write.
    """
    import tvm
    from tvm.s_tir.transform import RemoveWeightLayoutRewriteBlock

    named = tvm.IRModule({"main": module["main"].with_attr("global_symbol", "main")})
    with target, enabled() if str(target.kind) == "llvm" else nullcontext():  # CUDA's compiler asks the scope
        plain = RemoveWeightLayoutRewriteBlock(skip_tensor_rewrite=True)(named)
        tvm.tirx.build(plain, target=target).export_library(path)
    return path


def measured(path: str, given: list[Any], kind: str, limit: float, remote: tuple[str, int, str] | None) -> float:
    """Seconds that a kernel takes: the fastest of three stretches, or of one run where that is slower than the limit.

    Integers are zeros (they may be indices), floats random.

    Args:
        path: of the library.
        given: (dtype, sizes) of every argument.
        kind: the device, `cpu` or `cuda`.
        limit: seconds; a slower kernel is run twice and no more.
        remote: host and port of a tracker, and the key that its servers go by; None measures here.
    """
    import os

    import numpy as np
    import tvm

    if remote is None:
        library, device = tvm.runtime.load_module(path), tvm.runtime.device(kind, 0)
        fill = tvm.get_global_func("tvm.contrib.random.random_fill_for_measure")
    else:
        from tvm import rpc

        session = rpc.connect_tracker(remote[0], remote[1]).request(remote[2], session_timeout=120)
        session.upload(path)
        library, device = session.load_module(os.path.basename(path)), session.device(kind, 0)
        fill = session.get_function("tvm.contrib.random.random_fill_for_measure")
    arguments = []
    for dtype, sizes in given:
        argument = tvm.runtime.empty(tuple(sizes), dtype, device)
        if "float" in dtype:
            fill(argument)
        else:
            argument.copyfrom(np.zeros(tuple(sizes), dtype))
        arguments.append(argument)

    def seconds(repeat: int, shortest: int) -> float:
        timer = library.time_evaluator("main", device, number=1, repeat=repeat, min_repeat_ms=shortest)
        return float(min(timer(*arguments).results))

    try:
        once = seconds(1, 0)
        return once if once > limit else min(once, seconds(3, 10))
    finally:
        if remote is not None:
            session.get_function("tvm.rpc.server.remove")(os.path.basename(path))
