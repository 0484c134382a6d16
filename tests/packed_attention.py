"""Networks of one or two attention layers whose queries, keys and values are rows of one matrix."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as oir
from golden import parse_graph, prepare
from laws import OrtRunner

from burnish.passes.base import Pass

ATTENTION = """
  {n}q1 = Reshape ({q}, sizes)  {n}k1 = Reshape ({k}, sizes)  {n}v1 = Reshape ({v}, sizes)
  {n}q2 = Transpose <perm = [0, 2, 1, 3]> ({n}q1)  {n}k2 = Transpose <perm = [0, 2, 3, 1]> ({n}k1)
  {n}v2 = Transpose <perm = [0, 2, 1, 3]> ({n}v1)
  {n}s = MatMul ({n}q2, {n}k2)  {n}p = Softmax ({n}s)  {n}w = MatMul ({n}p, {n}v2)
  {n}w1 = Transpose <perm = [0, 2, 1, 3]> ({n}w)  {n}w2 = Reshape ({n}w1, flat)
  {n}m = MatMul ({n}w2, {n}o)  {y} = Add ({x}, {n}m)"""

WIDTH = 96
PLACES = range(0, WIDTH + 1, 8)


def graph(one: Pass, rows: str, second: str = "", apart: bool = False) -> oir.Model:
    """A layer, or two, whose queries, keys and values are rows of one matrix, as in `q=0 k=16 v=32`: from there on 16.

    Args:
        one: the pass that it is prepared for.
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
    model = prepare(parse_graph(source), one)
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
