"""Between a softmax and the products on both its sides: scale, softcap and masks of the scores of an attention.

    probabilities = softmax(mask(cap * tanh(scale * q @ k^T / cap)))

Reading is generous: whatever has a meaning is read, and `Scores.odd` says in plain words what of it a fused operator
cannot do.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as oir

from burnish.ir import match
from burnish.ir.inference import Inference
from burnish.ir.views import heads
from burnish.ir.walk import is_op

FILL_ABSORBS = 1e30
"""So large that any score vanishes beside it: `where(c, score, -fill)` is `score + where(c, 0, -fill)`."""

NO_VALUES = "its result is not multiplied with values"


@dataclass(frozen=True)
class Mask:
    """What is added to the scores, or chosen instead of them.

    Attributes:
        values: added one after the other, in this order.
        keep: bool: `fill` stands in the scores where it is false (`inverted`: where it is true).
        fill: -inf or a number so low that no score matters beside it.
    """

    values: tuple[oir.Value, ...] = ()
    keep: oir.Value | None = None
    inverted: bool = False
    fill: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.values) or self.keep is not None


@dataclass
class Scores:
    """The way from the product of queries and keys to the softmax.

    Attributes:
        product: the MatMul, or com.microsoft FusedMatMul, of queries and keys.
        scale: what the product is multiplied with.
        masks: in the order in which they are applied.
        cap: of `cap * tanh(scores / cap)`; 0 for none.
        wide: the softmax is computed in float32 of narrower scores.
        odd: what a fused operator cannot do; empty when there is nothing.
        twofold: another product is added, so which is the mask is a matter of opinion.
        stretched: masks are multiplied too, so they are not what is added.
        scales: the Mul and Div nodes of the scale, nearest to the product first.
        nodes: all nodes from the product to the softmax.
    """

    product: oir.Node
    scale: float = 1.0
    masks: tuple[Mask, ...] = ()
    cap: float = 0.0
    wide: bool = False
    odd: str = ""
    twofold: bool = False
    stretched: bool = False
    scales: list[oir.Node] = field(default_factory=list)
    nodes: list[oir.Node] = field(default_factory=list)

    @property
    def mask(self) -> Mask:
        """All masks as one; only where `odd` is empty."""
        if len(self.masks) == 1:
            return self.masks[0]
        return Mask(tuple(value for mask in self.masks for value in mask.values))

    def note(self, odd: str) -> None:
        """Keep the first thing that is odd."""
        self.odd = self.odd or odd


@dataclass(frozen=True)
class Weighted:
    """The way from the softmax to the product with the values.

    Attributes:
        end: the MatMul, or com.microsoft FusedMatMul, with the values.
        guard: rows of NaN are replaced by zeros.
        passed: the nodes between.
        odd: as in `Scores`.
    """

    end: oir.Node
    guard: bool
    passed: tuple[oir.Node, ...]
    odd: str = ""


def is_product(node: oir.Node | None) -> bool:
    """Whether `node` is a MatMul, or a FusedMatMul that transposes at most the last two axes."""
    if is_op(node, "MatMul"):
        return True
    return is_op(node, "FusedMatMul", domain="com.microsoft") and not any(
        match.attribute(node, name, 0)  # type: ignore[arg-type]
        for name in ("transBatchA", "transBatchB")
    )


def weighted(out: oir.Value, facts: Inference) -> Weighted | str:
    """Follow probabilities to the product with the values; in plain words why there is none."""
    guard, odd, passed = False, "", list[oir.Node]()
    while True:
        readers = match.consumers(out)
        kinds = sorted(one.op_type for one in readers)
        if kinds == ["IsNaN", "Where"] and not guard:
            isnan, where = sorted(readers, key=lambda one: one.op_type)
            if where.inputs[0] is isnan.outputs[0] and where.inputs[2] is out and match.used_once(isnan.outputs[0]):
                if heads.number(where.inputs[1], facts) == 0.0 and not out.is_graph_output():
                    guard, out = True, where.outputs[0]
                    passed += [isnan, where]
                    continue
        products = [one for one in readers if is_product(one) and one.inputs[0] is out]
        if len(products) == 1 and products[0].inputs[1] is not out:
            (end,) = products
            if len(readers) > 1 or out.is_graph_output():
                odd = odd or "its probabilities are read elsewhere as well"
            if end.op_type == "FusedMatMul" and match.attribute(end, "transA", 0):
                return "the probabilities are transposed before they meet the values"
            return Weighted(end, guard, tuple(passed), odd)
        if products:
            return "its probabilities are read elsewhere as well"
        onward = [one for one in readers if _passes(one, facts)]
        if len(onward) != 1:
            return NO_VALUES
        if len(readers) > 1 or out.is_graph_output():
            odd = odd or "its probabilities are read elsewhere as well"
        if not (heads.keeps(onward[0], facts) or is_op(onward[0], "Cast")):
            odd = odd or f"its probabilities pass through {onward[0].op_type}"
        passed.append(onward[0])
        out = onward[0].outputs[0]


def _passes(node: oir.Node, facts: Inference) -> bool:
    return heads.keeps(node, facts) or is_op(node, "Cast") or _keeps_rows(node, facts)


def _keeps_rows(node: oir.Node, facts: Inference) -> bool:
    """Whether `node` only groups the axes before the last two in another way."""
    if not is_op(node, "Reshape", "Squeeze", "Unsqueeze"):
        return False
    before, after = facts.shape(node.inputs[0]), facts.shape(node.outputs[0])
    return before is not None and after is not None and len(after) >= 2 and before[-2:] == after[-2:]


def read_scores(value: oir.Value | None, facts: Inference) -> Scores | str:
    """Read scale, cap and masks backwards from the input of the softmax to the product of queries and keys."""
    node = value.producer() if value is not None else None
    if node is None or value is None:
        return "the scores are no product of queries and keys"
    found: Scores | str
    if is_product(node):
        found = Scores(node, float(match.attribute(node, "alpha", 1.0)))
        if node.op_type == "FusedMatMul":
            found.note("the scores pass through FusedMatMul")
    elif heads.keeps(node, facts):
        found = read_scores(node.inputs[0], facts)
    elif is_op(node, "Cast") and facts.dtype(value) == oir.DataType.FLOAT:
        found = read_scores(node.inputs[0], facts)
        if isinstance(found, Scores):
            found.wide = True
    elif is_op(node, "Mul", "Div"):
        found = _rescaled(node, facts)
    elif is_op(node, "Tanh"):
        found = read_scores(node.inputs[0], facts)
        if isinstance(found, Scores):
            if found.cap or found.masks:
                return "the scores pass through Tanh"
            found.cap = 1.0
            found.note("the scores pass through Tanh")
    elif is_op(node, "Add"):
        found = _masked(node, facts)
    elif is_op(node, "Where"):
        found = _chosen(node, facts)
    elif _keeps_rows(node, facts):
        found = read_scores(node.inputs[0], facts)
        if isinstance(found, Scores):
            found.note(f"the scores pass through {node.op_type}")
    else:
        return f"the scores pass through {node.op_type}"
    if isinstance(found, Scores):
        found.nodes.append(node)
        if not match.used_once(value):
            found.note("its scores are read elsewhere as well")
    return found


def _rescaled(node: oir.Node, facts: Inference) -> Scores | str:
    found = heads.scaled_by(node, facts)
    if found is None:
        return "the scores are multiplied by a value that is not one number"
    inner = read_scores(found[0], facts)
    if isinstance(inner, Scores):
        if inner.masks:
            if found[1] <= 0:
                return "the mask is multiplied by a number that is not positive"
            inner.note("the mask is scaled together with the scores")
            inner.stretched = True
        if inner.cap:
            inner.cap *= found[1]
        elif not inner.masks:
            inner.scales.append(node)
        inner.scale *= found[1]
    return inner


def _masked(node: oir.Node, facts: Inference) -> Scores | str:
    reasons, readings = [], []
    for scores, mask in ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])):
        inner = read_scores(scores, facts)
        if isinstance(inner, Scores) and mask is not None:
            readings.append((inner, mask))
        else:
            reasons.append(str(inner))
    if not readings:
        return reasons[0]
    found, mask = readings[0]
    found.twofold = found.twofold or len(readings) > 1
    if any(one.keep is not None for one in found.masks):
        found.note("a mask is added after another was chosen")
    found.masks = (*found.masks, Mask((mask,)))
    return found


def _chosen(node: oir.Node, facts: Inference) -> Scores | str:
    keep, first, second = node.inputs
    fill = heads.number(second, facts)
    inverted = fill is None
    scores = second if inverted else first
    fill = heads.number(first, facts) if inverted else fill
    if fill is None or fill > -1.0:
        return "masked scores are replaced by a number that does not swallow them"
    inner = read_scores(scores, facts)
    if isinstance(inner, Scores):
        if fill > -FILL_ABSORBS:
            inner.note("masked scores are replaced by a number that does not swallow them")
        if inner.masks:
            inner.note("scores are masked twice in different ways")
        inner.masks = (*inner.masks, Mask((), keep, inverted, fill))
    return inner
