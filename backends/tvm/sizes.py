"""Sizes of dimensions as TVM writes them."""

from __future__ import annotations

from functools import reduce
from typing import Any

from tvm import tirx

from burnish.backends.tvm.registry import Unsupported
from burnish.ir.dims import Dim


class Sizes:
    """The symbols of one function: those of the inputs, and those that TVM has found an expression for since."""

    def __init__(self) -> None:
        self._known: dict[str, Any] = {}

    def of(self, size: Dim) -> Any:
        """A size as a number or a `tirx` expression; raises `Unsupported` when it depends on data."""
        if isinstance(size, int):
            return size
        return reduce(lambda sum, term: sum + term, (self._term(atoms, factor) for atoms, factor in size.terms))

    def declare(self, size: Dim) -> Any:
        """The same for a dimension of an input, whose symbol becomes a variable."""
        if not isinstance(size, int):
            for atoms, _ in size.terms:
                for atom in atoms:
                    self._known.setdefault(atom, tirx.Var(_name(atom), "int64"))
        return self.of(size)

    def fresh(self, size: Dim) -> Any:
        """A size as an expression, or a new variable, bound when the function runs, where there is none."""
        try:
            return self.of(size)
        except Unsupported:
            found = tirx.Var(f"d{len(self._known)}", "int64")
            self.learn(size, found)
            return found

    def learn(self, size: Dim, expression: Any) -> None:
        """Remember that a symbol without an expression is what TVM says."""
        if not isinstance(size, int) and len(size.terms) == 1:
            ((atoms, factor),) = size.terms
            if factor == 1 and len(atoms) == 1:
                self._known.setdefault(atoms[0], expression)

    def _term(self, atoms: tuple[str, ...], factor: int) -> Any:
        product: Any = tirx.const(factor, "int64")
        for atom in atoms:
            if atom not in self._known:
                raise Unsupported(f"the size `{atom}` depends on data")
            product = self._known[atom] if factor == 1 and atoms[0] is atom else product * self._known[atom]
        return product


def _name(atom: str) -> str:
    """A name for a variable: TVM's printer and its C code want letters, digits and underscores."""
    kept = "".join(letter if letter.isascii() and letter.isalnum() else "_" for letter in atom)
    return kept if kept[:1].isalpha() else f"d{kept}"
