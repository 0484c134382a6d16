"""The laws catch passes that break them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir
import pytest
from golden import parse_graph, prepare, read_cases
from laws import LawBroken, check_laws, rewrite

from burnish.ir import edit, weights
from burnish.ir.walk import walk
from burnish.passes.base import ExactPass, Outcome

GRAPH = """
g (float[N,4] x) => (float[N,4] y) <float[4] w, float[4] v> {
  a = Identity (x)
  b = Mul (a, w)
  c = Add (b, v)
  y = Relu (c)
}
"""


@dataclass(frozen=True)
class Scripted(ExactPass):
    """A pass that does what a test says."""

    steps: Callable[[oir.Model, Outcome], None]

    def rewrite(self, model: oir.Model, outcome: Outcome) -> None:
        self.steps(model, outcome)


def hold(steps: Callable[[oir.Model, Outcome], None]) -> None:
    """Run the steps as a pass and hold it to the laws."""
    one = Scripted(steps)
    before = prepare(parse_graph(GRAPH), one)
    after, outcome = rewrite(one, before)
    check_laws(one, before, after, outcome)


def drop_identity(model: oir.Model, outcome: Outcome) -> None:
    """An honest rewrite."""
    for node in walk(model, "Identity"):
        if outcome.take(node):
            edit.bypass(node)


def scale_weight(model: oir.Model, outcome: Outcome, by: float) -> None:
    """Multiply the factor of every Mul whose input is an Identity, which then goes."""
    for node in walk(model, "Identity"):
        if not outcome.take(node):
            return
        (mul,) = walk(model, "Mul")
        old = weights.exact(mul.inputs[1])  # type: ignore[arg-type]
        assert old is not None
        edit.set_input(mul, 1, edit.add_rounded(model, "scaled", old * by, oir.DataType.FLOAT))
        edit.bypass(node)


def without_taking(model: oir.Model, outcome: Outcome) -> None:
    """Changes the model and counts nothing."""
    drop_identity(model, Outcome("free"))


def only_taking(model: oir.Model, outcome: Outcome) -> None:
    """Counts and changes nothing."""
    outcome.take(model.graph.node(0))


def without_asking(model: oir.Model, outcome: Outcome) -> None:
    """Rewrites whether it may or not."""
    for node in walk(model, "Identity"):
        outcome.rewritten += 1
        edit.bypass(node)


def without_end(model: oir.Model, outcome: Outcome) -> None:
    """Finds something to do in every run."""
    (mul,) = walk(model, "Mul")
    if outcome.take(mul):
        step = edit.make("Identity", [mul.inputs[0]], like=mul)
        edit.insert_before(mul, [step])
        edit.set_input(mul, 0, step.outputs[0])


def without_reason(model: oir.Model, outcome: Outcome) -> None:
    """Skips and does not say why."""
    outcome.skip(model.graph.node(0), "")


def leaving_a_weight(model: oir.Model, outcome: Outcome) -> None:
    """Leaves an initializer that nobody reads."""
    for node in walk(model, "Identity"):
        if outcome.take(node):
            edit.bypass(node)
            edit.add_constant(model, "left", np.zeros(3, np.float32))


def renaming_an_output(model: oir.Model, outcome: Outcome) -> None:
    """Renames an output."""
    for node in walk(model, "Identity"):
        if outcome.take(node):
            edit.bypass(node)
            model.graph.outputs[0].name = "renamed"


def breaking_the_graph(model: oir.Model, outcome: Outcome) -> None:
    """Makes a node that the operator's schema does not allow."""
    for node in walk(model, "Identity"):
        if outcome.take(node):
            edit.replace_node(node, edit.make("Softmax", [*node.inputs, node.inputs[0]], like=node))


def slightly_wrong(model: oir.Model, outcome: Outcome) -> None:
    """Right to float32's rounding, wrong in float64."""
    scale_weight(model, outcome, 1 + 3e-8)


def wrong(model: oir.Model, outcome: Outcome) -> None:
    """Plainly wrong."""
    scale_weight(model, outcome, 1.01)


def test_an_honest_pass_holds() -> None:
    hold(drop_identity)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (without_taking, "`rewritten` is 0, but the text of the model is changed"),
        (only_taking, "`rewritten` is 1, but the text of the model is unchanged"),
        (without_asking, "ask `outcome.take` before each rewrite"),
        (without_end, "a second run rewrites 1 more: Mul_1"),
        (without_reason, "was skipped without a reason"),
        (leaving_a_weight, "nobody reads `left` any more"),
        (renaming_an_output, "the outputs were y: float[N,4] and are renamed: float[N,4]"),
        (breaking_the_graph, "the ONNX checker refuses the result"),
        (slightly_wrong, "in float64 the outputs differ by"),
        (wrong, "with ONNX Runtime's optimizations disabled, output `y` differs by"),
    ],
)
def test_a_broken_law_is_named(steps: Callable[[oir.Model, Outcome], None], message: str) -> None:
    with pytest.raises(LawBroken) as caught:
        hold(steps)
    assert message in str(caught.value)


CASES = """\
# Title

A thing
goes: really. More.

```onnx
g
```

```options
{a=1}
```

```unchanged
```

```onnx
h
```
"""


def test_cases_are_named_by_their_first_sentence() -> None:
    first, second = read_cases(CASES)
    assert (first.sentence, second.sentence) == ("A thing goes", "case 2")
    assert first.options is not None and first.options.content == "{a=1}\n"
    assert first.expected is not None and first.expected.kind == "unchanged" and second.expected is None
