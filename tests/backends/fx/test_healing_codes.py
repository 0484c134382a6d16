"""Healing trains codebooks through the search for the nearest code, and what is written searches as it was trained."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as oir
import pytest
from factor_models import model_of

from burnish.backends.fx.healing import Healed, HealOptions, heal
from burnish.backends.ort.session import executor
from burnish.ir.samples import Sample
from burnish.ir.views.codebook import Codebook, codebooks
from burnish.ir.weights import constant
from burnish.passes.pipeline import Pipeline

_AUTOENCODER = """g (float[N, 6] x) => (float[N, 6] y)
    <float[6, 4] a, float[4] b, float[24, 4] e, float[4, 6] c, float[6] d, float two = {2.0}, int64[1] k = {1}> {
  h = MatMul (x, a)  z = Add (h, b)
  z2 = Pow (z, two)  zz = ReduceSum <keepdims = 1> (z2, k)
  e2 = Pow (e, two)  ee = ReduceSum <keepdims = 0> (e2, k)
  s = Add (zz, ee)  t = Transpose <perm = [1, 0]> (e)  m = MatMul (z, t)  m2 = Mul (m, two)  r = Sub (s, m2)
  i = ArgMin <axis = 1, keepdims = 0> (r)
  q = Gather (e, i)  v = Sub (q, z)  w = Add (z, v)
  u = MatMul (w, c)  y = Add (u, d)
}"""
_IDENTITY = "g (float[N, 6] x) => (float[N, 6] y) { y = Identity (x) }"
_QUICK = HealOptions(steps=60, batch=32, rate=3e-3, evaluations=6, patience=6)


def _folded(source: str) -> oir.Model:
    return Pipeline(("fold-constants",)).rewrite(model_of(source)).model


def _samples() -> list[Sample]:
    random = np.random.default_rng(0)
    mixed = random.standard_normal((256, 2)) @ random.standard_normal((2, 6))
    return [Sample("rows", {"x": mixed.astype(np.float32)})]


def _book(model: oir.Model) -> Codebook:
    (found,) = codebooks(model)
    return found


def _healed(way: str, student: oir.Model, **more: object) -> Healed:
    options = replace(_QUICK, codebooks=way, **more)  # type: ignore[arg-type]
    return heal(student, model_of(_IDENTITY), _samples(), options)


def _loss(model: oir.Model) -> float:
    """The squared error of all rows relative to their size, in ONNX Runtime."""
    x = _samples()[0].feeds["x"]
    y = executor()(model).run({"x": x})["y"]
    return float(((y - x) ** 2).sum() / (x**2).sum())


@pytest.mark.parametrize("way", ["linear", "direct", "frozen"])
@pytest.mark.parametrize("folded", [False, True])
def test_what_is_written_searches_for_the_nearest_and_does_better(way: str, folded: bool) -> None:
    student = _folded(_AUTOENCODER)
    if folded:
        student = Pipeline(("fold-codebook",)).rewrite(student).model
    before = _book(student).codes()
    healed = _healed(way, student)
    assert healed.improved and healed.after < 0.9 * healed.before and not healed.frozen
    assert _loss(healed.model) < 0.95 * _loss(student)
    book = _book(healed.model)
    assert len(book.lookups) == 1 and book.read_only is None
    after = book.codes()
    encoder = [constant(model.graph.initializers["a"]) for model in (student, healed.model)]
    assert not np.array_equal(encoder[0], encoder[1])  # gradients have passed the search
    if way == "frozen":
        assert np.array_equal(after, before)
        return
    assert book.by_distance and not np.array_equal(after, before)
    with_one = np.concatenate([before, np.ones((len(before), 1))], 1)
    left = after - with_one @ np.linalg.lstsq(with_one, after, rcond=None)[0]
    # One matrix moves all codes; alone, a code that is never chosen stays.
    assert (np.abs(left).max() < 1e-6) == (way == "linear")
    assert (after == before).all(1).any() == (way == "direct")


def test_a_search_that_is_not_for_the_nearest_is_left_alone() -> None:
    source = """g (float[N, 6] x) => (float[N, 6] y) <float[6, 4] a, float[4, 24] e, float[24] n, float[24, 6] c> {
      z = MatMul (x, a)  m = MatMul (z, e)  s = Add (m, n)  i = ArgMax <axis = 1, keepdims = 0> (s)
      t = Transpose <perm = [1, 0]> (e)  q = Gather (t, i)  y = MatMul (q, a2) }"""
    source = source.replace("float[24, 6] c", "float[4, 6] a2")
    student = Pipeline(("fold-constants",)).rewrite(model_of(source)).model
    codes = _book(student).codes()
    healed = _healed("direct", student)
    assert healed.improved and np.array_equal(_book(healed.model).codes(), codes)
    assert "its search is not for the smallest distance" in healed.frozen[0]


def test_codes_that_nothing_chooses_become_queries_and_a_student_that_stays_keeps_its_codes() -> None:
    student = _folded(_AUTOENCODER)
    before = _book(student).codes()
    dead = before.copy()
    dead[3:] += 100.0
    _book(student).write(student, dead)
    healed = _healed("direct", student)
    assert np.allclose(_book(healed.model).codes()[3:], _book(student).codes()[3:], rtol=1e-6, atol=0)
    revived = _healed("direct", student, revive=True, steps=150, rate=2e-2)
    assert np.abs(_book(revived.model).codes()).max() < 50 and revived.after < 0.5 * healed.after
    assert revived.before == pytest.approx(healed.before, rel=1e-5)
    still = _healed("direct", student, revive=True, rate=0.0)  # new codes before a decoder that does not know them
    assert not still.improved and still.model is student and still.before == pytest.approx(healed.before, rel=1e-5)


def test_residual_codebooks_are_trained_together() -> None:
    source = """g (float[N, 6] x) => (float[N, 6] y, int64[N] i, int64[N] j)
        <float[6, 4] a, float[4, 24] e, float[24, 4] f, float[4, 6] c, float two = {2.0}, int64[1] k = {1}> {
      z = MatMul (x, a)  m = MatMul (z, e)  m2 = Mul (m, two)  ee = Mul (e, e)  l = Constant <value_ints = [0]> ()
      n = ReduceSum <keepdims = 0> (ee, l)  s = Sub (m2, n)  i = ArgMax <axis = 1, keepdims = 0> (s)
      t = Transpose <perm = [1, 0]> (e)  q = Gather (t, i)  r = Sub (z, q)
      g = Transpose <perm = [1, 0]> (f)  o = MatMul (r, g)  o2 = Mul (o, two)  ff = Mul (f, f)
      p = ReduceSum <keepdims = 0> (ff, k)  v = Sub (o2, p)  j = ArgMax <axis = 1, keepdims = 0> (v)
      w = Gather (f, j)  both = Add (q, w)  y = MatMul (both, c) }"""
    student = _folded(source)
    before = [book.codes() for book in codebooks(student)]
    healed = heal(student, model_of(_IDENTITY), _samples(), replace(_QUICK, codebooks="linear"))
    assert healed.improved and len(before) == 2
    for old, book in zip(before, codebooks(healed.model), strict=True):
        assert book.by_distance and len(book.lookups) == 1 and not np.array_equal(old, book.codes())
    assert _loss(healed.model) < _loss(student)
