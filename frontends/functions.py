"""Functions of the user's, by name: `package.module:function`."""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Callable
from typing import Any

from burnish.ir.errors import InputError

_SPEC = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def is_function(spec: str) -> bool:
    """Whether text has the form `package.module:function`."""
    return _SPEC.fullmatch(spec) is not None


def function_named(spec: str) -> Callable[..., Any]:
    """The function, its module imported from the current path.

    Raises:
        InputError: the module cannot be imported, or has no such function.
    """
    module_name, _, function_name = spec.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise InputError(
            f"`{module_name}` cannot be imported: {type(error).__name__}: {error}",
            place=spec,
            hint="is its folder on PYTHONPATH?",
        ) from error
    function: Callable[..., Any] | None = getattr(module, function_name, None)
    if not callable(function):
        functions = [name for name, thing in vars(module).items() if callable(thing)]
        near = difflib.get_close_matches(function_name, functions, 1)
        raise InputError(
            f"`{module_name}` has no function `{function_name}`",
            place=spec,
            hint=f"did you mean `{near[0]}`?" if near else None,
        )
    return function
