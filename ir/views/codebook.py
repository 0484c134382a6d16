"""The view of a codebook: constant codes, the search for the one nearest to each query, and where it is looked up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from burnish.ir import edit, match, weights
from burnish.ir.views.affine import LAYOUT
from burnish.ir.views.parameter import Parameter, find_parameter, write_input
from burnish.ir.walk import is_op, walk


@dataclass(frozen=True)
class Search:
    """The index of the smallest of `factor * query codes + offset`, up to terms that are the same for every code.

    Attributes:
        query: [..., features].
        codes: the constant codes, [features, codes] when `codes_last`, else [codes, features].
        codes_last: how `codes` is stored.
        factor: negative.
        offset: float64 [codes].
        nodes: the nodes that compute the distances, the product of queries and codes last.
        is_plain: there is nothing to simplify: one product, at most one constant added.
        added: the values whose numbers, one a code, make up `offset`, each with its factor.
    """

    query: oir.Value
    codes: Parameter
    codes_last: bool
    factor: float
    offset: np.ndarray
    nodes: tuple[oir.Node, ...]
    is_plain: bool
    added: tuple[tuple[oir.Value, float], ...] = ()

    @property
    def dtype(self) -> oir.DataType:
        """The dtype of the codes."""
        return self.codes.dtype or oir.DataType.FLOAT

    def bias(self) -> np.ndarray:
        """What to add to `query codes` so that the largest is the nearest: float64 [codes]."""
        count = self.codes.shape[-1] if self.codes_last else self.codes.shape[0]
        return np.broadcast_to(self.offset / self.factor, (count,)).copy()


@dataclass(frozen=True)
class Codebook:
    """Constant codes of which the one nearest to each query is found.

    Attributes:
        anchor: the ArgMin or ArgMax that finds it.
        search: what that minimizes.
        lookups: the Gathers that look the found code up in a table of the same codes.
    """

    anchor: oir.Node
    search: Search
    lookups: tuple[oir.Node, ...]

    @property
    def indices(self) -> oir.Value:
        """The number of the nearest code of each query."""
        return self.anchor.outputs[0]

    @property
    def by_distance(self) -> bool:
        """Whether what is added to the products are the norms of the codes, so that the nearest code is found."""
        norms = (self.codes() ** 2).sum(1) * (-self.search.factor / 2)
        return bool(self.search.added) and np.allclose(self.search.offset, norms, rtol=1e-4, atol=1e-6)

    @property
    def read_only(self) -> str | None:
        """Why the codes cannot be written, in plain words; None when they can."""
        if len(self.search.added) > 1:
            return "the norms of its codes are added in several places"
        if self.search.added and not self.by_distance:
            return "what is added to its products are not the norms of the codes"
        return None

    def codes(self) -> np.ndarray:
        """The codes, float64 [codes, features]."""
        array = self.search.codes.read()
        return array.T if self.search.codes_last else array

    def write(self, model: oir.Model, codes: np.ndarray) -> None:
        """Search for the nearest of other codes, and look these up. The view is out of date afterwards.

        Args:
            model: the model the codebook is in.
            codes: float64, of the shape that `codes` has.

        Raises:
            ValueError: `read_only`, or codes of another shape.
        """
        if self.read_only is not None:
            raise ValueError(self.read_only)
        if codes.shape != self.codes().shape:
            raise ValueError(f"the codes are {list(self.codes().shape)}")
        search, stem = self.search, self.search.codes.source.name or "codebook"
        for value, factor in search.added:
            norms = (codes**2).sum(1) * (-search.factor / 2) / factor
            shape = match.static_shape(value) or norms.shape
            new = edit.add_rounded(model, f"{stem}_norms", norms.reshape(shape), search.dtype)
            for node in search.nodes:
                for index, read in enumerate(node.inputs):
                    if read is value:
                        edit.set_input(node, index, new)
        stored = codes.T if search.codes_last else codes
        write_input(model, search.nodes[-1], 1, stored, search.dtype, stem)
        for node in self.lookups:
            write_input(model, node, 0, codes, search.dtype, stem)


def codebooks(model: oir.Model) -> Iterator[Codebook]:
    """The codebooks of all graphs of the model, in order.

    The largest product is that of a code only when it is looked up or belongs to the nearest: else it may be the class
    that a linear layer finds.
    """
    for node in walk(model, "ArgMin", "ArgMax"):
        search = find_search(node)
        if search is not None:
            found = Codebook(node, search, tuple(lookups(node, search)))
            if found.lookups or found.by_distance:
                yield found


def lookups(anchor: oir.Node, search: Search) -> list[oir.Node]:
    """The Gathers that look up what `anchor` found in an initializer [codes, features] with the codes of the search."""
    pending, seen, found = [anchor.outputs[0]], set[int](), list[oir.Node]()
    codes = search.codes.read().T if search.codes_last else search.codes.read()
    while pending:
        value = pending.pop()
        for user in match.consumers(value):
            if id(user) in seen:
                continue
            seen.add(id(user))
            if user.op_type == "Gather" and user.inputs[1] is value:
                exact = weights.exact(user.inputs[0]) if user.inputs[0] is not None else None
                if exact is not None and exact.shape == codes.shape and np.array_equal(exact, codes):
                    found.append(user)
            elif user.op_type in LAYOUT:
                pending.append(user.outputs[0])
    return found


def find_search(node: oir.Node) -> Search | None:
    """The search that an ArgMin (or an ArgMax of negated distances) over the last axis makes; None when it is none."""
    rank = match.rank(node.inputs[0])
    axis = int(match.attribute(node, "axis", 0))
    if rank is None or axis % rank != rank - 1 or node.inputs[0] is None:
        return None
    nodes: list[oir.Node] = []
    terms: list[tuple[float, oir.Value]] = []
    _terms(node.inputs[0], 1.0 if is_op(node, "ArgMin") else -1.0, terms, nodes, grows=True)
    product: tuple[float, oir.Node] | None = None
    offset = np.zeros(1)
    added: list[tuple[oir.Value, float]] = []
    for factor, value in terms:
        if match.dim(value, -1) == 1 or (match.rank(value) == 0):
            continue
        constant = _code_norms(value)
        if constant is not None:
            offset = offset + factor * constant
            added.append((value, factor))
        elif product is None and is_op(value.producer(), "MatMul", "Gemm", "Einsum"):
            product = factor, value.producer()  # type: ignore[assignment]
        else:
            return None
    if product is None:
        return None
    factor, inner = product
    query, codes = inner.inputs[0], find_parameter(inner.inputs[1])
    codes_last = _codes_last(inner)
    if query is None or codes is None or len(codes.shape) != 2 or codes.quantized or codes_last is None:
        return None
    if is_op(inner, "Gemm"):
        extra = match.input_of(inner, 2)
        bias = find_parameter(extra)
        if extra is not None and (bias is None or len(bias.shape) > 1 and bias.shape[0] != 1):
            return None
        if bias is not None and extra is not None:
            times = factor * float(match.attribute(inner, "beta", 1.0))
            offset = offset + times * bias.read().reshape(-1)
            added.append((extra, times))
        factor *= float(match.attribute(inner, "alpha", 1.0))
    scaled = match.with_scalar(query.producer()) if is_op(query.producer(), "Mul") else None  # type: ignore[arg-type]
    if scaled is not None and scaled[1] != 0 and match.rank(scaled[0]) == match.rank(query):
        nodes.append(query.producer())  # type: ignore[arg-type]
        query, factor = scaled[0], factor * scaled[1]
    if factor >= 0:
        return None
    count = codes.shape[-1] if codes_last else codes.shape[0]
    if offset.size not in (1, count):
        return None
    if any(is_op(one, "Sqrt") for one in nodes) and not _are_distances(terms, query, codes, codes_last, factor, offset):
        return None
    plain = not any(is_op(one, "Pow", "Sqrt", "Sub", "Mul", "Div", "Neg") for one in nodes) and len(terms) <= 2
    return Search(query, codes, codes_last, factor, offset, (*nodes, inner), plain, tuple(added))


def _are_distances(
    terms: list[tuple[float, oir.Value]],
    query: oir.Value,
    codes: Parameter,
    codes_last: bool,
    factor: float,
    offset: np.ndarray,
) -> bool:
    """Whether the sum is a multiple of squared distances, so that no square root is taken of a negative number."""
    norms = (codes.read() ** 2).sum(axis=0 if codes_last else 1) * (-factor / 2)
    if not np.allclose(offset, norms, rtol=1e-4):
        return False
    return any(np.isclose(times, -factor / 2) and _squares(value) is query for times, value in terms)


def _squares(value: oir.Value | None) -> oir.Value | None:
    """What a ReduceSum over the last axis sums the squares of."""
    node = match.producer(value, "ReduceSum")
    square = match.producer(node.inputs[0], "Pow", "Mul") if node is not None else None
    rank = match.rank(node.inputs[0]) if node is not None else None
    if node is None or square is None or rank is None or match.axes_of(node) not in ([-1], [rank - 1]):
        return None
    squared = square.inputs[1] is square.inputs[0] if is_op(square, "Mul") else weights.scalar(square.inputs[1]) == 2.0
    return square.inputs[0] if squared else None


def _terms(
    value: oir.Value, factor: float, terms: list[tuple[float, oir.Value]], nodes: list[oir.Node], *, grows: bool
) -> None:
    """Split a sum into terms and their factors; `grows`: a function that keeps order may be dropped from the whole."""
    node = value.producer()
    if node is None or match.input_of(node, 0) is None:
        terms.append((factor, value))
        return
    left = node.inputs[0]
    assert left is not None
    scaled = match.with_scalar(node) if is_op(node, "Mul", "Div") else None
    if grows and is_op(node, "Sqrt", "Identity"):
        nodes.append(node)
        _terms(left, factor, terms, nodes, grows=True)
    elif is_op(node, "Add", "Sub") and node.inputs[1] is not None:
        nodes.append(node)
        _terms(left, factor, terms, nodes, grows=False)
        _terms(node.inputs[1], factor if is_op(node, "Add") else -factor, terms, nodes, grows=False)
    elif is_op(node, "Neg"):
        nodes.append(node)
        _terms(left, -factor, terms, nodes, grows=grows and factor < 0)
    elif scaled is not None and scaled[1] != 0 and (is_op(node, "Mul") or scaled[0] is left):
        nodes.append(node)
        number = scaled[1] if is_op(node, "Mul") else 1.0 / scaled[1]
        _terms(scaled[0], factor * number, terms, nodes, grows=False)
    else:
        terms.append((factor, value))


def _code_norms(value: oir.Value) -> np.ndarray | None:
    """A constant number for each code: a constant [codes] or [1, codes], or the summed squares of constant codes."""
    found = find_parameter(value)
    if found is not None:
        return found.read().reshape(-1) if all(size == 1 for size in found.shape[:-1]) else None
    node = match.producer(value, "ReduceSum")
    square = match.producer(node.inputs[0], "Pow", "Mul") if node is not None else None
    codes = find_parameter(square.inputs[0]) if square is not None else None
    if node is None or square is None or codes is None or match.attribute(node, "keepdims", 1) or len(codes.shape) != 2:
        return None
    squared = square.inputs[1] is square.inputs[0] if is_op(square, "Mul") else weights.scalar(square.inputs[1]) == 2.0
    axes = match.axes_of(node)
    return (codes.read() ** 2).sum(axis=axes[0]) if squared and axes is not None and len(axes) == 1 else None


def _codes_last(node: oir.Node) -> bool | None:
    if is_op(node, "Einsum"):
        text = str(match.attribute(node, "equation", "")).replace(" ", "")
        left, _, out = text.partition("->")
        first, _, second = left.partition(",")
        if len(second) != 2 or not out or first[:-1] != out[:-1] or len(set(first + out[-1:])) != len(first) + 1:
            return None
        return {first[-1:] + out[-1:]: True, out[-1:] + first[-1:]: False}.get(second)
    if is_op(node, "Gemm"):
        return None if match.attribute(node, "transA", 0) else not match.attribute(node, "transB", 0)
    return True
