"""Indices that are proven to be a box write what a slice would."""

from __future__ import annotations

import numpy as np
import onnx_ir as oir
import pytest
from golden import parse_graph
from laws import OrtRunner

from burnish.frontends import load
from burnish.ir.indices import box
from burnish.ir.inference import Inference

GRAPH = """g (float[N, 5, 4] x, float[N, 2, 4] r) => (int64[A, B, C] w) <int64[1] l = {-1}, int64[2] c = {2, 3},
  int64 zero = {0}, int64 one = {1}, int64 first = {FIRST}, int64 step = {STEP}, int64[2] t = {0, 1}> {
  n = Shape <start = 0, end = 1> (SOURCE)
  m = Squeeze (n)
  far = Add (m, first)
  q = Range (first, far, step)
  u = Reshape (q, t)
  e = Shape <start = 0, end = 2> (r)
  f = Expand (u, e)
  i = Unsqueeze (f, l)
  g = Expand (c, e)
  j = Unsqueeze (g, l)
  w = Concat <axis = -1> (JOINED)
}"""


def model(first: int = 0, step: int = 1, source: str = "x", joined: str = "i, j") -> oir.Model:
    text = GRAPH.replace("FIRST", str(first)).replace("STEP", str(step))
    return load(parse_graph(text.replace("SOURCE", source).replace("JOINED", joined)))


@pytest.mark.parametrize("first", [0, 3])
def test_a_box_is_where_the_indices_are(first: int) -> None:
    found = model(first)
    places = box(Inference(found), found.graph.outputs[0])
    assert places is not None and [start for start, _ in places] == [first, 2] and places[1][1] == 2
    feeds = {"x": np.zeros((7, 5, 4), np.float32), "r": np.zeros((7, 2, 4), np.float32)}
    computed = OrtRunner(found, optimize=False).run(feeds)["w"]
    grid = np.stack(np.meshgrid(first + np.arange(7), 2 + np.arange(2), indexing="ij"), -1)
    np.testing.assert_array_equal(computed, grid)


@pytest.mark.parametrize(
    "changed", [{"step": 2}, {"joined": "j, i"}, {"joined": "i, i"}, {"joined": "i, j, j"}], ids=str
)
def test_what_is_no_box_in_order_is_none(changed: dict[str, object]) -> None:
    found = model(**changed)  # type: ignore[arg-type]
    assert box(Inference(found), found.graph.outputs[0]) is None


@pytest.mark.parametrize("seed", range(40))
def test_constants_are_a_box_exactly_when_they_are_equal_to_one(seed: int) -> None:
    random = np.random.default_rng(seed)
    sizes, starts = random.integers(1, 4, 1 + seed % 3), random.integers(0, 3, 1 + seed % 3)
    ranges = [start + np.arange(size) for start, size in zip(starts, sizes, strict=True)]
    grid = np.stack(np.meshgrid(*ranges, indexing="ij"), -1)
    if seed % 2:
        grid.reshape(-1)[random.integers(grid.size)] += 1
    still = all(
        (grid[..., axis] == grid.reshape(-1, len(sizes))[0][axis] + np.indices(grid.shape[:-1])[axis]).all()
        for axis in range(len(sizes))
    )
    values = ", ".join(map(str, grid.reshape(-1)))
    dims = ", ".join(map(str, grid.shape))
    text = f"g (float[2] x) => (int64[{dims}] y) <int64[{dims}] c = {{{values}}}> {{ y = Identity (c) }}"
    found = load(parse_graph(text))
    places = box(Inference(found), found.graph[0].inputs[0])
    assert (places is not None) == still
    if not seed % 2:
        assert places == list(zip(starts.tolist(), sizes.tolist(), strict=True))
