"""Sizes that are not numbers yet: polynomials with integer coefficients over the symbols of a model's inputs.

A size is a Python int or an `Expr`. Two sizes are proven equal when they are `==`. Every symbol stands for a number of
elements, so it is at least zero; nothing else is assumed of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

Dim: TypeAlias = "int | Expr"

UNKNOWN = "?"
"""Begins the name of a symbol that no input declares: the size of a result that depends on data."""


class Expr:
    """A polynomial with at least one symbol. Immutable; equal polynomials are equal and hash alike."""

    __slots__ = ("terms", "_hash")

    def __init__(self, terms: tuple[tuple[tuple[str, ...], int], ...]) -> None:
        self.terms = terms
        self._hash = hash(terms)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Expr) and self._hash == other._hash and self.terms == other.terms

    def __repr__(self) -> str:
        parts = []
        for atoms, factor in self.terms:
            text = "*".join(atoms)
            parts.append(text if factor == 1 and atoms else f"{factor}*{text}" if atoms else str(factor))
        return " + ".join(parts).replace("+ -", "- ")


def symbol(name: str) -> Expr:
    """The size called `name`."""
    return Expr((((name,), 1),))


def is_named(size: Dim) -> bool:
    """Whether `size` is a number or made of the inputs' symbols only, so that it may be written into a file."""
    return isinstance(size, int) or not any(UNKNOWN in atom for atoms, _ in size.terms for atom in atoms)


def _terms(size: Dim) -> dict[tuple[str, ...], int]:
    return {(): size} if isinstance(size, int) else dict(size.terms)


def _expr(terms: Mapping[tuple[str, ...], int]) -> Dim:
    kept = {atoms: factor for atoms, factor in terms.items() if factor}
    if not kept:
        return 0
    if len(kept) == 1 and () in kept:
        return kept[()]
    return Expr(tuple(sorted(kept.items(), key=lambda term: (not term[0], term[0]))))


def add(left: Dim, right: Dim) -> Dim:
    """left + right."""
    if isinstance(left, int) and isinstance(right, int):
        return left + right
    terms = _terms(left)
    for atoms, factor in _terms(right).items():
        terms[atoms] = terms.get(atoms, 0) + factor
    return _expr(terms)


def negate(size: Dim) -> Dim:
    """-size."""
    return -size if isinstance(size, int) else Expr(tuple((atoms, -factor) for atoms, factor in size.terms))


def subtract(left: Dim, right: Dim) -> Dim:
    """left - right."""
    return add(left, negate(right))


def multiply(left: Dim, right: Dim) -> Dim:
    """left * right."""
    if isinstance(left, int) and isinstance(right, int):
        return left * right
    terms: dict[tuple[str, ...], int] = {}
    for one, factor in _terms(left).items():
        for other, by in _terms(right).items():
            atoms = tuple(sorted(one + other))
            terms[atoms] = terms.get(atoms, 0) + factor * by
    return _expr(terms)


def divide_exactly(left: Dim, right: Dim) -> Dim | None:
    """The polynomial q with q * right == left where `right` is a number or one term; None when there is none."""
    divisor = _terms(right)
    if len(divisor) != 1 or left == 0:
        return 1 if left == right and left != 0 else None
    ((atoms, factor),) = divisor.items()
    if factor == 0:
        return None
    terms: dict[tuple[str, ...], int] = {}
    for mine, by in _terms(left).items():
        rest = list(mine)
        for atom in atoms:
            if atom not in rest:
                return None
            rest.remove(atom)
        if by % factor:
            return None
        terms[tuple(rest)] = by // factor
    return _expr(terms)


def divide(left: Dim, right: Dim) -> Dim | None:
    """Integer division where both are known not to be negative; None when the result cannot be named."""
    if isinstance(right, int) and right > 0 and at_least(left, 0):
        if isinstance(left, int):
            return left // right
        exact = divide_exactly(left, right)
        return exact if exact is not None else symbol(f"floor(({left})/{right})")
    return None


def at_least(size: Dim, number: int) -> bool:
    """Whether `size >= number` is proven."""
    if isinstance(size, int):
        return size >= number
    constant = 0
    for atoms, factor in size.terms:
        if not atoms:
            constant = factor
        elif factor < 0:
            return False
    return constant >= number


def compare(left: Dim, right: Dim) -> int | None:
    """-1, 0 or 1 when left < right, left == right or left > right is proven, else None."""
    if left == right:
        return 0
    difference = subtract(left, right)
    if at_least(difference, 1):
        return 1
    return -1 if at_least(negate(difference), 1) else None


def product(sizes: tuple[Dim, ...] | list[Dim]) -> Dim:
    """The product of all sizes; 1 when there are none."""
    total: Dim = 1
    for size in sizes:
        total = multiply(total, size)
    return total


def least(number: int, size: Dim) -> Dim:
    """The smaller of `number` and `size`."""
    if isinstance(size, int):
        return min(number, size)
    return number if at_least(size, number) else symbol(f"min({number}, {size})")


def _is_cut(size: Expr, whole: Expr) -> bool:
    """Whether `size` is `least(n, whole)` with n > 1: the two only broadcast when they are equal."""
    atoms, factor = size.terms[0]
    text = atoms[0] if len(size.terms) == 1 and factor == 1 and len(atoms) == 1 else ""
    return text.startswith("min(") and text.endswith(f", {whole})") and not text.startswith("min(1,")


def broadcast(left: Dim, right: Dim) -> Dim:
    """The size of an axis after broadcasting two sizes that the model broadcasts successfully."""
    if left == right or right == 1:
        return left
    if left == 1:
        return right
    if isinstance(left, int):
        return left
    if isinstance(right, int):
        return right
    if at_least(left, 2) or _is_cut(right, left):
        return left
    if at_least(right, 2) or _is_cut(left, right):
        return right
    parts = sorted({part for size in (left, right) for part in _parts(repr(size))})
    return symbol(f"broadcast({' | '.join(parts)})")


def _parts(text: str) -> list[str]:
    """The sizes that a `broadcast(...)` without nested calls was made from; `text` itself for anything else."""
    flat = text.startswith("broadcast(") and text.count("(") == 1 and text.endswith(")")
    return text[len("broadcast(") : -1].split(" | ") if flat else [text]


def broadcast_shapes(*shapes: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """The shape after broadcasting."""
    result: tuple[Dim, ...] = ()
    for shape in shapes:
        if shape == result:
            continue
        length = max(len(shape), len(result))
        one = (1,) * (length - len(shape)) + shape
        other = (1,) * (length - len(result)) + result
        result = tuple(broadcast(a, b) for a, b in zip(one, other, strict=True))
    return result
