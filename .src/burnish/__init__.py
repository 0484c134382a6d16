"""Compile trained models: read, rewrite, prove, write.

>>> import burnish
>>> result = burnish.optimize("model.onnx", "out.onnx")  # doctest: +SKIP

`load`, `optimize`, `observe`, `emit`, `lock`, `check` and `Pipeline` are imported on first use, so that `import burnish`
costs nothing.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from burnish.tools.api import Pipeline, emit, load, observe, optimize
    from burnish.tools.check_api import check, lock

__all__ = ["Pipeline", "__version__", "check", "emit", "load", "lock", "observe", "optimize"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in ("Pipeline", "emit", "load", "observe", "optimize"):
        from burnish.tools import api

        return getattr(api, name)
    if name in ("check", "lock"):
        from burnish.tools import check_api

        return getattr(check_api, name)
    raise AttributeError(f"module `burnish` has no attribute `{name}`")
