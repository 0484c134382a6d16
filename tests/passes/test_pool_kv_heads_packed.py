"""Heads of layers whose queries, keys and values are slices of one matrix, their own or one of two layers."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as oir
import pytest
from golden import parse_graph, prepare
from laws import OrtRunner
from lossy_laws import check_edits, proposals
from pooled_heads import heads_of, parsed

from burnish.passes import lossy
from burnish.passes.base import Outcome

ATTENTION = """
  {n}q1 = Reshape ({q}, sizes)  {n}k1 = Reshape ({k}, sizes)  {n}v1 = Reshape ({v}, sizes)
  {n}q2 = Transpose <perm = [0, 2, 1, 3]> ({n}q1)  {n}k2 = Transpose <perm = [0, 2, 3, 1]> ({n}k1)
  {n}v2 = Transpose <perm = [0, 2, 1, 3]> ({n}v1)
  {n}s = MatMul ({n}q2, {n}k2)  {n}p = Softmax ({n}s)  {n}w = MatMul ({n}p, {n}v2)
  {n}w1 = Transpose <perm = [0, 2, 1, 3]> ({n}w)  {n}w2 = Reshape ({n}w1, flat)
  {n}m = MatMul ({n}w2, {n}o)  {y} = Add ({x}, {n}m)"""

WIDTH = 96
PLACES = range(0, WIDTH + 1, 8)


def graph(rows: str, second: str = "", apart: bool = False) -> oir.Model:
    """A layer, or two, whose queries, keys and values are rows of one matrix, as in `q=0 k=16 v=32`: from there on 16.

    Args:
        rows: of the first layer, or the name of what it is.
        second: of the second layer, or what of the first it reads, as in `q=48 k=k v=v`.
        apart: each name has a matrix and a bias of its own in the place of rows.
    """
    body, held, layers, matrices = [], [], [], {}
    for layer, given in zip("AB", (rows, second) if second else (rows,), strict=False):
        parts = dict(re.findall(r"(\w)=(\w+)", given))
        for letter, start in parts.items():
            if not start.isdigit():
                parts[letter] = f"A{start}"
                continue
            name, begin = f"{layer}{letter}", int(start)
            parts[letter] = name
            if apart:
                matrices[name] = begin
                held += [f"float[16, 16] {name}w", f"float[16] {name}b"]
                body.append(f"{name}h = MatMul (x, {name}w) {name} = Add ({name}h, {name}b)")
            else:
                body.append(f"{name} = Slice (f, i{begin}, i{begin + 16}, two)")
        ends = ("x", "y") if not second else ("x", "z") if layer == "A" else ("z", "y")
        layers.append(ATTENTION.format(n=layer, x=ends[0], y=ends[1], **parts))
        held.append(f"float[16, 16] {layer}o")
    if not apart:
        held += [f"float[16, {WIDTH}] a", f"float[{WIDTH}] b"]
        body.insert(0, "h = MatMul (x, a) f = Add (h, b)")
    held += [f"int64[1] i{place} = {{{place}}}" for place in PLACES]
    source = f"""g (float[N, S, 16] x) => (float[N, S, 16] y) <{", ".join(held)}, int64[1] two = {{2}}> {{
      sizes = Constant <value_ints = [0, 0, 4, 4]> ()  flat = Constant <value_ints = [0, 0, 16]> ()
      {" ".join(body)} {" ".join(layers)}
    }}"""
    model = prepare(parse_graph(source), parsed("groups=2"))
    rng = np.random.default_rng(0)
    numbers = {name: 0.3 * rng.standard_normal(shape) for name, shape in SHAPES.items()}
    for name, start in matrices.items():
        span = slice(start, start + 16)
        numbers |= {f"{name}w": numbers["a"][:, span], f"{name}b": numbers["b"][span]}
    for name, value in model.graph.initializers.items():
        if name in numbers:
            array = np.ascontiguousarray(numbers[name], np.float32)
            value.const_value = oir.tensor(array, name=name)
    return model


SHAPES = {"a": (16, WIDTH), "b": (WIDTH,), "Ao": (16, 16), "Bo": (16, 16)}


def output(model: oir.Model) -> np.ndarray:
    runner = OrtRunner(model, optimize=True)
    found = runner.run({"x": np.random.default_rng(1).standard_normal((2, 5, 16)).astype(np.float32)})["y"]
    runner.close()
    return found


@pytest.mark.parametrize("options", ["groups=2,how=mean", "groups=2", "groups=1"])
@pytest.mark.parametrize(
    ("rows", "second"),
    [
        ("q=0 k=16 v=32", ""),
        ("q=0 k=16 v=32", "q=48 k=64 v=80"),
        ("q=64 k=0 v=80", "q=48 k=16 v=32"),
        ("q=0 k=16 v=32", "q=48 k=k v=v"),
    ],
)
def test_packed_layers_become_what_they_become_apart(rows: str, second: str, options: str) -> None:
    one, found = parsed(options), []
    for apart in (False, True):
        model = graph(rows, second, apart)
        edits = one.asked(model, Outcome(""))
        after, _ = lossy.apply(model, edits, [one])
        assert set(heads_of(after)) == {int(options[7])}
        found.append(output(after))
        for edit in edits:
            check_edits(one, model, [edit])
        check_edits(one, model, *proposals(one, model))
    np.testing.assert_allclose(found[0], found[1], atol=1e-4 * float(np.abs(found[1]).max()))


@pytest.mark.parametrize(
    ("rows", "second"),
    [
        ("q=0 k=8 v=32", ""),
        ("q=0 k=24 v=32", ""),
        ("q=0 k=0 v=32", ""),
        ("q=0 k=16 v=16", ""),
        ("q=0 k=16 v=0", ""),
        ("q=0 k=16 v=32", "q=0 k=48 v=64"),
        ("q=0 k=16 v=32", "q=24 k=48 v=64"),
        ("q=0 k=16 v=32", "q=0 k=k v=v"),
        ("q=0 k=16 v=32", "q=k k=k v=v"),
    ],
)
def test_rows_of_two_kinds_are_told_and_stay(rows: str, second: str) -> None:
    outcome = Outcome("")
    assert not parsed("groups=2").asked(graph(rows, second), outcome)
    assert all("that make others, too" in skip.reason or "as well" in skip.reason for skip in outcome.skipped)
    assert outcome.skipped


def test_a_layer_whose_queries_are_keys_of_the_layer_whose_keys_it_reads_stays() -> None:
    outcome = Outcome("")
    assert not parsed("groups=2").asked(graph("q=0 k=16 v=32", "q=k k=k v=v", apart=True), outcome)
    assert "that make others, too" in outcome.skipped[0].reason
