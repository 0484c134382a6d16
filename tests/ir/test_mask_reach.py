"""What masks prove of the keys a query sees, checked against the masks themselves at several sizes."""

from __future__ import annotations

import numpy as np
import onnx_ir as oir
import pytest
from golden import parse_graph

from burnish.backends.reference.runner import ReferenceRunner
from burnish.ir import dims
from burnish.ir.inference import Inference
from burnish.ir.views.bands import HIDDEN
from burnish.ir.views.reach import reach
from burnish.ir.views.scores import Mask

COUNTS = """
  one = Constant <value_int = 1> ()  zero = Constant <value_int = 0> ()
  first = Constant <value_ints = [0]> ()  second = Constant <value_ints = [1]> ()
  new = Shape <start = 1, end = 2> (x)  s = Squeeze (new)
  old = Shape <start = 1, end = 2> (past)  p = Squeeze (old)  t = Add (s, p)
  late = Range (p, t, one)  i = Unsqueeze (late, second)
  all = Range (zero, t, one)  j = Unsqueeze (all, first)
  off = Constant <value_float = -1e9> ()  on = Constant <value_float = 0.0> ()
"""
"""Positions of the queries as i [s, 1], those of the keys as j [1, t]; the queries are the last ones."""

TRIANGLE = ", ".join(str(int(one)) for one in np.tri(8).reshape(-1))

MASKS: dict[str, tuple[str, bool | None, int | None]] = {
    "no later key": ("keep = LessOrEqual (j, i)  mask = Where (keep, on, off)", True, None),
    "no later key, the other way round": ("keep = Greater (j, i)  mask = Where (keep, off, on)", True, None),
    "a window": (
        "d = Sub (i, j)  three = Constant <value_int = 3> ()  near = Less (d, three)  before = LessOrEqual (j, i)"
        "  keep = And (near, before)  mask = Where (keep, on, off)",
        True,
        3,
    ),
    "a window and padding": (
        "three = Constant <value_int = 3> ()  k = Add (j, three)  near = Greater (k, i)  before = LessOrEqual (j, i)"
        "  both = And (near, before)  pad = Cast <to = 9> (ids)  keep = And (both, pad)  mask = Where (keep, on, off)",
        True,
        3,
    ),
    "one key too far": (
        "k = Sub (j, one)  keep = LessOrEqual (k, i)  mask = Where (keep, on, off)",
        None,
        None,
    ),
    "not before": ("keep = Less (j, i)  out = Not (keep)  mask = Where (out, on, off)", None, None),
    "a triangle": (
        "ends = Concat <axis = 0> (new, new)  ones = ConstantOfShape <value = float[1] {-inf}> (ends)"
        "  mask = Trilu <upper = 1> (ones, one)",
        True,
        None,
    ),
    "a triangle of ones": (
        "ends = Concat <axis = 0> (new, new)  ones = ConstantOfShape <value = float[1] {1.0}> (ends)"
        "  low = Trilu <upper = 0> (ones, zero)  u = Constant <value_float = 1.0> ()  high = Sub (u, low)"
        "  mask = Mul (high, off)",
        True,
        None,
    ),
    "padding only": (
        "pad = Cast <to = 9> (ids)  shown = Where (pad, on, off)  size = Concat <axis = 0> (new, size1)"
        "  size1 = Shape <start = 1, end = 2> (ids)  mask = Expand (shown, size)",
        False,
        None,
    ),
    "learnt and finite": (
        "d = Sub (j, i)  far = Abs (d)  most = Constant <value_int = 7> ()  near = Min (far, most)"
        "  picked = Gather (table, near)  mask = Squeeze (picked, last)"
        "  last = Constant <value_ints = [-1]> ()",
        False,
        None,
    ),
    "learnt, and no later key": (
        "d = Sub (j, i)  far = Abs (d)  most = Constant <value_int = 7> ()  near = Min (far, most)"
        "  picked = Gather (table, near)  last = Constant <value_ints = [-1]> ()  bias = Squeeze (picked, last)"
        "  keep = LessOrEqual (j, i)  hide = Where (keep, on, off)  mask = Add (hide, bias)",
        True,
        None,
    ),
    "cut from a constant": (
        "last = Add (t, zero)  begin = Reshape (p, second)  end = Reshape (t, second)"
        "  axes = Constant <value_ints = [0]> ()  rows = Slice (tril, begin, end, axes)"
        "  keep = Slice (rows, first, end, second)  mask = Where (keep, on, off)",
        True,
        None,
    ),
    "anything": ("mask = Mul (free, off)", None, None),
    "weak": (
        "keep = LessOrEqual (j, i)  some = Constant <value_float = -5.0> ()  mask = Where (keep, on, some)",
        False,
        None,
    ),  # noqa: E501
}


def model_of(name: str) -> oir.Model:
    lines = COUNTS + MASKS[name][0]
    body = "\n  ".join(part.strip() for part in lines.replace("  ", "\n").splitlines() if part.strip())
    ordered = _sorted(body.splitlines())
    text = (
        "g (float[B, S] x, float[B, P] past, int64[1, T] ids, float[S, T] free) => (float[S, T] mask) "
        f"<float[8, 1] table, bool[8, 8] tril = {{{TRIANGLE}}}> {{\n" + "\n".join(ordered) + "\n}"
    )
    return oir.from_proto(parse_graph(text))


def _sorted(lines: list[str]) -> list[str]:
    """The nodes in an order in which they can run."""
    made, left, found = {"x", "past", "ids", "free", "table", "tril", ""}, list(lines), list[str]()
    while left:
        for line in left:
            read = line[line.rindex("(") + 1 : line.rindex(")")]
            if all(name.strip() in made for name in read.split(",")):
                found.append(line)
                made.add(line.split("=")[0].strip())
                left.remove(line)
                break
    return found


@pytest.mark.parametrize("name", MASKS)
def test_what_a_mask_proves_is_so(name: str) -> None:
    model = model_of(name)
    facts = Inference(model)
    value = model.graph.outputs[0]
    shape = facts.shape(value)
    assert shape is not None
    square = "triangle" in name
    keys = shape[1] if square else dims.add(dims.symbol("P"), dims.symbol("S"))
    causal, window = reach((Mask((value,)),), dims.symbol("S"), keys, facts)
    assert (causal, window) == MASKS[name][1:]
    for queries, before in ((4, 0), (1, 0), (3, 0 if square else 2), (1, 0 if square else 5)):
        total = queries + before
        random = np.random.default_rng(queries)
        feeds = {
            "x": np.zeros((1, queries), np.float32),
            "past": np.zeros((1, before), np.float32),
            "ids": random.integers(0, 2, (1, total)),
            "free": random.standard_normal((queries, total)).astype(np.float32),
        }
        found = ReferenceRunner(model).run(feeds)["mask"]
        seen = np.broadcast_to(found, (queries, total)) > HIDDEN
        ahead = np.arange(total)[None] - (np.arange(queries)[:, None] + before)
        if causal:
            assert not seen[ahead > 0].any()
        if window is not None:
            assert not seen[ahead <= -window].any()
