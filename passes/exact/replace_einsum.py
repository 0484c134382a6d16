"""Write products with constants as MatMul, whatever their letters are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, match, weights
from burnish.ir.inference import Inference
from burnish.ir.views.parameter import Parameter, find_parameter
from burnish.ir.walk import is_op, walk
from burnish.passes.base import ExactPass, Outcome


@dataclass(frozen=True)
class _Constant:
    """A constant, or the part of one that a Gather takes with a constant number."""

    value: oir.Value
    whole: Parameter
    gather: oir.Node | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.whole.shape if self.gather is None else tuple(np.delete(self.whole.shape, self._axis).tolist())

    @property
    def _axis(self) -> int:
        assert self.gather is not None
        return int(match.attribute(self.gather, "axis", 0)) % len(self.whole.shape)

    def read(self) -> np.ndarray:
        """Its numbers, float64."""
        if self.gather is None:
            return self.whole.read()
        index = weights.scalar(self.gather.inputs[1])
        assert index is not None
        return np.asarray(self.whole.read().take(int(index), self._axis))

    def other(self, node: oir.Node, facts: Inference) -> oir.Node | None:
        """A node that goes on reading the numbers as they are when all products with parts of them have others."""
        if self.gather is None:
            return next(iter(self.whole.others(node)), None)
        for user in match.consumers(self.whole.source):
            reader = match.sole_consumer(user.outputs[0], "Einsum") if is_op(user, "Gather") else None
            if reader is None or not isinstance(_product(reader, facts, alone=False), _Product):
                return user
        return None


def _constant(value: oir.Value | None) -> _Constant | None:
    found = find_parameter(value)
    if found is not None and value is not None:
        return _Constant(value, found)
    gather = match.producer(value, "Gather")
    whole = find_parameter(gather.inputs[0]) if gather is not None else None
    if whole is None or gather is None or value is None or whole.steps or match.rank(gather.inputs[1]) != 0:
        return None
    return _Constant(value, whole, gather) if weights.scalar(gather.inputs[1]) is not None else None


@dataclass(frozen=True)
class _Product:
    """[batch..., rows, inner] times [batch..., inner, columns].

    Attributes:
        value: what the constant is multiplied with.
        constant: the constant.
        order: of the axes of `value` as the product needs them.
        stored: of the axes of the constant.
        result: of the axes of the product, as the Einsum gives them.
    """

    value: oir.Value
    constant: _Constant
    order: tuple[int, ...]
    stored: tuple[int, ...]
    result: tuple[int, ...]


@dataclass(frozen=True)
class ReplaceEinsum(ExactPass):
    """Write an Einsum of a value and a constant as MatMul, with the constant turned once and for all.

    ONNX Runtime turns the constant in every run, which takes longer than the product where few rows are multiplied.
    """

    needs: ClassVar[tuple[str, ...]] = ("inlined",)

    def rewrite(self, model: oir.Model, outcome: Outcome) -> None:
        """See the class."""
        facts = Inference(model)
        for node in walk(model, "Einsum"):
            found = _product(node, facts) if node.graph is not None else None
            if found is None:
                continue
            if isinstance(found, str):
                outcome.skip(node, found)
            elif not outcome.take(node):
                return
            else:
                _write(model, node, found, facts)


def _product(node: oir.Node, facts: Inference, *, alone: bool = True) -> _Product | str | None:
    """How a node multiplies with a constant, or why that is no MatMul; None when it does not.

    `alone`: nobody else may need the constant as it is.
    """
    parameters = [_constant(value) for value in node.inputs]
    if len(parameters) != 2 or (parameters[0] is None) == (parameters[1] is None):
        return None
    read, arrow, out = str(match.attribute(node, "equation", "")).replace(" ", "").partition("->")
    terms = read.split(",")
    side = 0 if parameters[1] is not None else 1
    letters, fixed = terms[side], terms[1 - side]
    value, constant = node.inputs[side], parameters[1 - side]
    if not arrow or "." in read or any(len(set(term)) != len(term) for term in (letters, fixed, out)):
        return "letters are left out or stand twice"
    both = [letter for letter in letters if letter in fixed]
    batch, inner = [a for a in both if a in out], [a for a in both if a not in out]
    rows = [letter for letter in letters if letter not in fixed]
    columns = [letter for letter in fixed if letter not in letters]
    if set(out) != {*batch, *rows, *columns}:
        return "it sums up a letter that only one factor has"
    if len(inner) != 1 or len(columns) != 1 or (batch and len(rows) != 1):
        return "it is a product over several axes, or none"
    assert value is not None and constant is not None
    if constant.whole.quantized or constant.whole.dtype is None:
        return "its constant is quantized"
    shape = facts.shape(value)
    if shape is None or shape[letters.index(inner[0])] != constant.shape[fixed.index(inner[0])]:
        return "the axis that is summed up is not known to be as long in both factors"
    stored = tuple(fixed.index(letter) for letter in (*batch, *inner, *columns))
    turns = stored != tuple(range(len(fixed)))
    if alone and (turns or constant.gather is not None) and (other := constant.other(node, facts)) is not None:
        return f"{other.op_type} reads the constant, too, and both would be stored"
    made = [*batch, *rows, *columns]
    order = tuple(letters.index(letter) for letter in (*batch, *rows, *inner))
    return _Product(value, constant, order, stored, tuple(made.index(letter) for letter in out))


def _write(model: oir.Model, node: oir.Node, found: _Product, facts: Inference) -> None:
    new: list[oir.Node] = []

    def turned(value: oir.Value, order: tuple[int, ...]) -> oir.Value:
        if order == tuple(range(len(order))):
            return value
        new.append(edit.make("Transpose", [value], {"perm": order}, like=node))
        return new[-1].outputs[0]

    constant, whole = found.constant.value, found.constant.whole
    if found.stored != tuple(range(len(found.stored))) or found.constant.gather is not None:
        array = np.ascontiguousarray(found.constant.read().transpose(found.stored))
        constant = edit.add_rounded(model, whole.source.name or "factor", array, whole.dtype)  # type: ignore[arg-type]
    product = edit.make("MatMul", [turned(found.value, found.order), constant], like=node)
    new.append(product)
    result = turned(product.outputs[0], found.result)
    edit.insert_before(node, new)
    for one in new:
        facts.follow(one)
    edit.replace_value(node.outputs[0], result)
    edit.remove_unused([node])
