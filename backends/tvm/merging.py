"""Modules of several parts of a model as one, so that they are compiled and written as one library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import ir, relax
from tvm.relax.expr_functor import PyExprMutator, mutator


def merged(modules: Sequence[Any]) -> Any:
    """One module with all functions; those that modules give one name to are renamed, public ones have their own.

    Args:
        modules: as `lower` makes them, each with another name.
    """
    builder = relax.BlockBuilder()
    for module in modules:
        _Moved(module, builder).run()
    return builder.get()


class _Moved:
    """The functions of one module on their way into another, callees before their callers."""

    def __init__(self, module: Any, builder: Any) -> None:
        self.functions = {variable.name_hint: function for variable, function in module.functions_items()}
        self.module, self.builder = module, builder
        self.new: dict[str, Any] = {}

    def run(self) -> None:
        for name in self.functions:
            self.move(name)

    def move(self, name: str) -> None:
        if name in self.new:
            return
        function = self.functions[name]
        if isinstance(function, relax.Function):
            for called in _called(function):
                self.move(called)
            function = _Renamed(self.module, self.new).visit_expr(function)
        self.new[name] = self.builder.add_func(function, name)


def _called(function: Any) -> list[str]:
    found: list[str] = []

    def visit(expression: Any) -> None:
        if isinstance(expression, ir.GlobalVar):
            found.append(expression.name_hint)

    relax.analysis.post_order_visit(function, visit)
    return found


@mutator
class _Renamed(PyExprMutator):  # type: ignore[misc]
    def __init__(self, module: Any, new: dict[str, Any]) -> None:
        super().__init__(module)
        self.new = new

    def visit_global_var_(self, op: Any) -> Any:
        """The function under its new name."""
        return self.new.get(op.name_hint, op)
