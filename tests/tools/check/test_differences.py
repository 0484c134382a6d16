"""What `check` says of real changes: each is named at the right place, and what changes nothing is not mentioned."""

from __future__ import annotations

import onnx
import onnx_ir as oir
import pytest

from burnish.ir.errors import InputError
from burnish.tools.check.check import check
from burnish.tools.check.difference import Field, Report, Verdict
from burnish.tools.check.differences import differences
from burnish.tools.check.take import Request, take
from burnish.tools.check.tolerances import Tolerances, Word

BODY = """
<ir_version: 10, opset_import: ["": 20]>
g (float[N,4] x, float[N,4] y) => (float[N,4] z)
<float[4,4] w = {1,2,3,4, 0,1,0,1, 2,0,2,0, 1,1,1,2}, float[4] b = {0.5,0.25,-1,2}, float[4] g = {1,2,1,2}>
{
  [linear] a = MatMul (x, w)
  [bias] c = Add (a, b)
  [norm] d = LayerNormalization <axis = -1, epsilon = 0.00001> (c, g, b)
  [act] e = Relu (d)
  [gate] f = Mul (e, y)
  [sum] z = Add (f, x)
}
"""


def model(text: str) -> oir.Model:
    """A model of ONNX text."""
    proto = onnx.parser.parse_model(text)
    onnx.checker.check_model(proto)
    return oir.serde.deserialize_model(proto)


def report(
    old: str, new: str, tolerances: Tolerances | None = None, *, run: bool = True, at_hand: bool = False
) -> Report:
    """What check finds in the second of two models."""
    before = model(old)
    request = Request(run=run)
    return check(model(new), take(before, request), request, tolerances, before if at_hand else None)


def said(found: Report, verdict: Verdict = Verdict.REGRESSION) -> list[str]:
    """The sentences of one verdict."""
    return [one.message for one in found.differences if one.verdict is verdict]


@pytest.mark.parametrize(
    ("old", "new", "sentences"),
    [
        ("epsilon = 0.00001", "epsilon = 0.000001", [
            "`epsilon` of LayerNormalization `norm` (block 0) is now 1e-06, was 1e-05"]),
        ("Relu (d)", "Gelu (d)", ["block 0: Relu is now Gelu"]),
        ("Relu (d)", "LeakyRelu <alpha = 0.5> (d)", ["block 0: Relu is now LeakyRelu alpha=0.5"]),
        ("b = {0.5,0.25,-1,2}", "b = {0.5,0.25,-1,2.001}", [
            "the weights of Add `bias` (block 0) moved by about 4e-4 of their norm",
            "the weights of LayerNormalization `norm` (block 0) moved by about 3e-4 of their norm",
        ]),
        ("float[N,4] x", "float[2,4] x", ["input `x`: dimension `N` is now fixed at 2"]),
        ("Mul (e, y)", "Mul (e, e)", ["Mul `gate` (block 0) now reads Relu where it read `y`"]),
    ],
)  # fmt: skip
def test_says(old: str, new: str, sentences: list[str]) -> None:
    assert said(report(BODY, BODY.replace(old, new))) == sentences


def test_the_first_node_that_differs_is_named_with_the_old_model_at_hand() -> None:
    found = report(BODY, BODY.replace("b = {0.5,0.25,-1,2}", "b = {0.5,0.25,-1,3}"), at_hand=True)
    (moved,) = [one for one in found.differences if one.field is Field.VALUES]
    assert moved.verdict is Verdict.NOTE, "the weights are the cause"
    assert "of its size on" in moved.message and moved.message.endswith("; first at Add `bias`")


def test_another_old_model_is_refused() -> None:
    other = model(BODY.replace("Relu (d)", "Gelu (d)"))
    with pytest.raises(InputError, match="not the one that was locked"):
        check(model(BODY), take(model(BODY)), old=other)


def test_nan_is_a_regression_of_its_own() -> None:
    found = said(report(BODY, BODY.replace("Relu (d)", "Log (d)")))
    assert found[0] == "block 0: Relu is now Log"
    assert found[1].startswith("output `z` has NaN or infinity in ")


def test_a_model_that_takes_no_sample_any_more_regressed() -> None:
    new = BODY.replace("Relu (d)", "Gather <axis = 1> (d, i)").replace(
        "<float[4,4]", "<int64[4] i = {7,7,7,7}, float[4,4]"
    )
    found = said(report(BODY, new))
    assert found[0].startswith("the model takes none of the samples: ")
    assert found[1] == "block 0: Relu is now Gather axis=1"


TWO = """
<ir_version: 10, opset_import: ["": 20]>
g (float[N,4] x, float[N,4] y) => (float[N,4] p, float[N,4] q)
{ a = Relu (x)  b = Relu (y)  p = Sub (a, b)  q = Neg (p) }
"""


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("Sub (a, b)", "Sub (b, a)", "values are wired differently in `graph`: the same nodes read other values"),
        ("p = Sub (a, b)  q = Neg (p)", "q = Sub (a, b)  p = Neg (q)", "the segments are wired to each other or to"),
        ("Neg (p)", "Neg (a)", "Neg (graph) now reads Relu where it read Sub"),
    ],
)
def test_other_wiring_is_always_named(old: str, new: str, sentence: str) -> None:
    found = report(TWO, TWO.replace(old, new), run=False)
    assert len(found.regressions) == 1 and found.regressions[0].message.startswith(sentence)
    assert found.regressions[0].field is Field.STRUCTURE


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("[linear]", "w = Constant <value = float[4,4] {1,2,3,4, 0,1,0,1, 2,0,2,0, 1,1,1,2}> ()\n  [linear]"),
        ("MatMul (x, w)", "MatMul (x, v)\n  v = Identity (w)"),
    ],
)
def test_constants_that_are_stored_otherwise_are_a_note(old: str, new: str) -> None:
    text = BODY.replace(old, new)
    if "Constant" in new:
        text = text.replace("<float[4,4] w = {1,2,3,4, 0,1,0,1, 2,0,2,0, 1,1,1,2}, ", "<")
    else:
        text = text.replace(
            "[linear] a = MatMul (x, v)\n  v = Identity (w)", "v = Identity (w)\n  [linear] a = MatMul (x, v)"
        )
    found = report(BODY, text)
    assert found.passed
    assert any("constants stored otherwise" in one for one in said(found, Verdict.NOTE))


@pytest.mark.parametrize(
    ("old", "new", "sentences"),
    [
        ("float[N,4] x,", "double[N,4] x,", ["input `x` is now double, was float"]),
        ("float[N,4] x,", "float[N,M,4] x,", ["input `x` has 3 dimensions now, had 2: [N,M,4], was [N,4]"]),
        ("float[N,4] x,", "float[K,4] x,", ["input `x`: dimension `N` is now called `K`"]),
        ("float[N,4] x,", "float[3,4] x,", ["input `x`: dimension `N` is now fixed at 3"]),
        ("float[N,4] x, float[N,4] y", "float[N,4] y, float[N,4] x", ["the inputs stand in another order: `y`, `x`"]),
        ("float[N,4] y", "float[N,4] other", ["input `y` is now called `other`"]),
        (", float[N,4] q)", ")", ["output `q` is gone"]),
        (" p, float[N,4] q)", " p, float[N,4] q, float[N,4] a)", ["output `a` is new: float[N,4]"]),
        ('"": 20]', '"": 20, "my.ops": 1]', ["opset of `my.ops` 1 is new"]),
    ],
)
def test_the_contract(old: str, new: str, sentences: list[str]) -> None:
    fields = (Field.INPUTS, Field.OUTPUTS, Field.OPSETS)
    text = TWO.replace(old, new).replace("Relu (y)", "Relu (other)" if "other" in new else "Relu (y)")
    lock = take(model(TWO), Request(run=False))
    changed = oir.serde.deserialize_model(onnx.parser.parse_model(text))
    found = differences(lock, take(changed, Request(run=False), lock))
    assert [one.message for one in found if one.field in fields and one.verdict is Verdict.REGRESSION] == sentences


FOLDED = """
<ir_version: 10, opset_import: ["": 20]>
g (float[1,1,4,4] x) => (float[1,2,2,2] y)
<float[2,1,3,3] w = {1,2,3,4,5,6,7,8,9, 9,8,7,6,5,4,3,2,1}, float[2] b = {1,2}>
{ a = Conv (x, w)  c = BatchNormalization (a, b, b, b, b)  y = Relu (c) }
"""


def test_a_folded_norm_is_one_change() -> None:
    new = FOLDED.replace("a = Conv (x, w)  c = BatchNormalization (a, b, b, b, b)", "c = Conv (x, w, b)")
    assert said(report(FOLDED, new)) == ["Conv and BatchNormalization are now one Conv with a bias"]
    trained = "a, mean, var = BatchNormalization <training_mode = 1> (p, b, b, b, b)  y = Relu (a)"
    text = new.replace("c = Conv (x, w, b)  y = Relu (c)", f"p = Conv (x, w)  {trained}")
    assert said(report(new, text)) == ["BatchNormalization (graph) is now in training mode"]


def test_that_constants_alone_are_stored_otherwise_shows_when_the_model_is_run() -> None:
    graph = "agraph (float[2,4] x) => (float[2,4] y) <float[4] k = {1,2,3,4}> { %s y = Sub (%s) }"
    nodes = "a = Mul (x, k) b = Sigmoid (a) c = Mul (b, %s) d = Sigmoid (c)"
    old = '<ir_version: 10, opset_import: ["": 20]> ' + graph % (nodes % "k", "d, b")
    new = '<ir_version: 10, opset_import: ["": 20]> ' + graph % ("i = Identity (k) " + nodes % "i", "b, d")
    (sentence,) = said(report(old, new, run=False))
    assert sentence.startswith("constants are stored otherwise: 1 more Identity node; only a run of the model shows")
    assert any("moved by about 3" in sentence for sentence in said(report(old, new)))


def test_sizes_that_differ_do_not_follow_from_a_tolerated_dimension() -> None:
    old = """<ir_version: 10, opset_import: ["": 20]>
    g (float[N,8] x) => (float[M,8] y) <int64[3] s = {0,2,4}, int64[2] t = {0,8}>
    { a = Reshape (x, s) b = Transpose <perm = [0,2,1]> (a) y = Reshape (b, t) }"""
    tolerances = Tolerances({Field.INPUTS: Word.IGNORE})
    fixed = old.replace("float[N,8]", "float[2,8]")
    assert report(old, fixed.replace("{0,2,4}", "{-1,2,4}"), tolerances).passed
    (sentence,) = said(report(old, fixed.replace("{0,2,4}", "{0,4,2}"), tolerances))
    assert sentence == "the constant of Reshape (graph) is now int64[3] [0, 4, 2], was int64[3] [0, 2, 4]"


def test_inputs_in_another_order_are_one_regression() -> None:
    old = '<ir_version: 10, opset_import: ["": 20]> g (float[2] x, float[2] y) => (float[2] z) { z = Add (x, y) }'
    new = old.replace("float[2] x, float[2] y", "float[2] y, float[2] x")
    assert said(report(old, new)) == ["the inputs stand in another order: `y`, `x`"]


def test_a_constant_of_another_type_is_told_from_the_same_number() -> None:
    old = """
        <ir_version: 10, opset_import: ["": 20]>
        g (float[N] x) => (float[N] y) <float c = {1.0}> { a = Abs (x)  y = Add (a, c) }
    """
    new = old.replace("float", "double")
    told = [one.message for one in report(old, new).differences if one.field is Field.STRUCTURE]
    assert any("is now double 1.0, was float 1.0" in one for one in told), told


@pytest.mark.parametrize(
    ("was", "now", "place"),
    [("Relu (d)", "Sigmoid (d)", "act"), ("[sum] z = Add (f, b)", "[sum] h = Add (f, b) [new] z = Abs (h)", "new")],
)
def test_a_node_of_a_model_without_blocks_is_named(was: str, now: str, place: str) -> None:
    old = BODY.replace("z = Add (f, x)", "z = Add (f, b)")
    (first,) = (one for one in report(old, old.replace(was, now)).differences if one.field is Field.STRUCTURE)
    assert first.place == place
