"""Small graphs in which names and order could be taken for meaning, and changes of them that mean something."""

from __future__ import annotations

import onnx
import onnx_ir as oir
from golden import parse_graph

from burnish.frontends import onnx_file

GRAPHS = {
    "captured": """
g (float[N,4] x, bool c) => (float[N,4] y) <float[4] k = {1,2,3,4}, float[4] m = {1,2,3,5}> {
  a = Mul (x, k)
  b = Add (x, m)
  s = Sigmoid (b)
  y = If (c) <
    then_branch = g1 () => (float[N,4] z) <float[4] w = {1,2,3,4}> {
      p = Sub (a, w)  q = Exp (s)  r = Max (p, q)  z = Div (r, b)
    },
    else_branch = g2 () => (float[N,4] z2) { t = Neg (b)  z2 = Sub (t, a) }
  >
}""",
    "loops": """
g (float[N,4] x, int64 n, bool c) => (float[N,4] y, float[K,N,4] trace) <float[4] k = {1,2,3,4}> {
  d = Mul (x, k)
  y, trace = Loop (n, c, x) <body = outer (int64 i, bool go, float[N,4] h) => (bool go2, float[N,4] h3, float[N,4] o) {
    f = Cast <to = 1> (i)
    h1 = Add (h, f)
    h2 = Loop (i, go, h1) <body = inner (int64 j, bool on, float[N,4] v) => (bool on2, float[N,4] v3) {
      e = Cast <to = 1> (j)  v1 = Sub (v, e)  v2 = Add (v1, d)  v3 = Sub (v2, f)  on2 = Identity (on)
    }>
    h3 = Mul (h2, h1)
    o = Sub (h2, h1)
    go2 = Identity (go)
  }>
}""",
    "functions": """
<ir_version: 10, opset_import: ["": 20, "local": 1]>
g (float[2] x, float[2] u) => (float[2] y, float[2] z) {
  a = local.leaky <slope: float = 0.25> (x, u)
  b = local.twice (a)
  y = local.leaky (b, x)
  z = Sub (b, a)
}
<domain: "local", opset_import: ["": 20]>
leaky <slope: float = 0.5> (a, b) => (c) {
  d = Sub (a, b)  e = Exp (b)  f = LeakyRelu <alpha: float = @slope> (d)  c = Add (f, e)
}
<domain: "local", opset_import: ["": 20, "local": 1]>
twice (a) => (b) { h = Constant <value = float[2] {2.0, 3.0}> ()  k = Neg (a)  m = local.leaky (k, a)  b = Mul (m, h) }
""",
    "sharing": """
g (float[N,4] x) => (float[N,4] y, float[N,4] z)
   <float[4] k = {1,2,3,4}, float[4] k2 = {1,2,3,4}, float[4] other = {4,3,2,1}, float[3] spare = {1,2,3}> {
  a = Mul (x, k)
  b = Mul (x, k2)
  s = Relu (a)
  t = Relu (a)
  u = Sub (s, t)
  v = Sub (b, other)
  dead = Exp (u)
  gone = Neg (dead)
  lost = Log (v)
  y = Add (u, v)
  z = Sum (v, a, s)
}""",
    "constants": """
g (float[N,4] x, float[N,2] w) => (float[N,6] y, int64[2] n)
   <int64[1] ax = {1}, int64[12] long = {1,2,3,4,5,6,7,8,9,10,11,12}> {
  one = Constant <value = float {0.5}> ()
  two = Constant <value_ints = [2, 3]> ()
  v = Mul (x, one)
  r = ReduceSum <keepdims = 0> (v, ax)
  c = Concat <axis = 1> (v, w)
  e = Clip (c, , one)
  l, p = TopK <axis = 0> (long, ax)
  n = Add (two, p)
  q = Unsqueeze (r, ax)
  y = Sub (e, q)
}""",
    "attention": """
g (float[B,T,8] x, bool[T,T] mask) => (float[B,T,8] y)
   <float[8,8] wq, float[8,8] wk, float[8,8] wv, float[8,8] wo, float[8] s, float[8] b, float[1] low = {-10000.0}> {
  n = LayerNormalization <epsilon = 1e-6> (x, s, b)
  q = MatMul (n, wq)
  k = MatMul (n, wk)
  v = MatMul (n, wv)
  kt = Transpose <perm = [0, 2, 1]> (k)
  l = MatMul (q, kt)
  m = Where (mask, l, low)
  p = Softmax (m)
  c = MatMul (p, v)
  o = MatMul (c, wo)
  y = Add (x, o)
}""",
    "norm": """
g (float[N,4,8] x) => (float[N,4,8] y) <float[4] scale, float[4] b, float[4] mean, float[4] var> {
  n = BatchNormalization (x, scale, b, mean, var)
  a = Conv <kernel_shape = [3], pads = [1, 1]> (n, w)
  r = Relu (a)
  h = Add (r, x)
  t = Conv <kernel_shape = [3], pads = [1, 1]> (n, w2)
  s = Sigmoid (t)
  y = Mul (h, s)
}""".replace("float[4] var>", "float[4] var, float[4,4,3] w, float[4,4,3] w2>"),
}

CHANGES = [
    ("captured", "z = Div (r, b)", "z = Div (b, r)"),
    ("captured", "t = Neg (b)", "t = Neg (s)"),
    ("captured", "w = {1,2,3,4}", "w = {1,2,3,5}"),
    ("captured", "z2 = Sub (t, a)", "z3 = Sub (t, a)  z2 = Identity (z3)"),
    ("captured", "=> (float[N,4] z2) {", "=> (float[N,4] t) {"),
    ("loops", "e = Cast <to = 1> (j)", "e = Cast <to = 1> (i)"),
    ("loops", "v3 = Sub (v2, f)", "v3 = Sub (f, v2)"),
    ("loops", "(bool go2, float[N,4] h3, float[N,4] o)", "(bool go2, float[N,4] o, float[N,4] h3)"),
    ("loops", "=> (float[N,4] y, float[K,N,4] trace)", "=> (float[K,N,4] trace, float[N,4] y)"),
    ("loops", "on2 = Identity (on)", "on2 = Identity (go)"),
    ("functions", "slope: float = 0.5", "slope: float = 0.75"),
    ("functions", "slope: float = 0.25", "slope: float = 0.3"),
    ("functions", "d = Sub (a, b)", "d = Sub (b, a)"),
    ("functions", "e = Exp (b)", "e = Exp (a)"),
    ("functions", "m = local.leaky (k, a)", "m = local.leaky (a, k)"),
    ("functions", "{2.0, 3.0}", "{2.0, 3.5}"),
    ("functions", '"local", opset_import: ["": 20]>\nleaky', '"local", opset_import: ["": 19]>\nleaky'),
    ("sharing", "u = Sub (s, t)", "u = Sub (s, s)"),
    ("sharing", "b = Mul (x, k2)", "b = Mul (x, k)"),
    ("sharing", ", float[3] spare = {1,2,3}", ""),
    ("sharing", "gone = Neg (dead)", ""),
    ("sharing", "lost = Log (v)", "lost = Log (u)"),
    ("sharing", "=> (float[N,4] y, float[N,4] z)", "=> (float[N,4] z, float[N,4] y)"),
    ("sharing", "z = Sum (v, a, s)", "z = Sum (v, a, a)"),
    ("constants", "keepdims = 0", "keepdims = 1"),
    ("constants", "ax = {1}", "ax = {0}"),
    ("constants", "[2, 3]", "[3, 2]"),
    ("constants", "float {0.5}", "float {0.25}"),
    ("constants", "Clip (c, , one)", "Clip (c, one)"),
    ("constants", "Concat <axis = 1> (v, w)", "Concat <axis = 1> (w, v)"),
    ("constants", "n = Add (two, p)", "n = Mul (two, p)"),
    ("constants", "float {0.5}", "float[1] {0.5}"),
    ("attention", "epsilon = 1e-6", "epsilon = 1e-5"),
    ("attention", "MatMul (q, kt)", "MatMul (kt, q)"),
    ("attention", "o = MatMul (c, wo)", "d = MatMul (c, wo)  o = Relu (d)"),
    ("attention", "Where (mask, l, low)", "Where (mask, low, l)"),
    ("attention", "Softmax (m)", "Softmax <axis = 1> (m)"),
    ("attention", "y = Add (x, o)", "y = Add (n, o)"),
    ("attention", "{-10000.0}", "{-9999.0}"),
    ("norm", "BatchNormalization (", "BatchNormalization <training_mode = 1> ("),
    ("norm", "(x, scale, b, mean, var)", "(x, scale, b, var, mean)"),
    ("norm", "Relu (a)", "Gelu (a)"),
    ("norm", "h = Add (r, x)", "h = Add (r, n)"),
]
"""A graph, what is in it, and what that becomes: a model that computes something else or holds something else."""

WEIGHTS_ONLY = [
    ("captured", "k = {1,2,3,4}", "k = {1,2,3,5}"),
    ("captured", "w = {1,2,3,4}", "w = {1,2,3,5}"),
    ("functions", "{2.0, 3.0}", "{2.0, 3.5}"),
    ("sharing", "{4,3,2,1}", "{4,3,2,2}"),
    ("sharing", "{1,2,3}", "{1,2,4}"),
    ("constants", "11,12}", "11,13}"),
    ("attention", "q = MatMul (n, wq)\n  k = MatMul (n, wk)", "q = MatMul (n, wk)\n  k = MatMul (n, wq)"),
    ("norm", "(x, scale, b, mean, var)", "(x, scale, mean, b, var)"),
]
"""Likewise; nothing but the numbers in weights differs."""


def model_of(source: str | onnx.ModelProto) -> oir.Model:
    """A model from ONNX text or a message, read as a file is."""
    proto = parse_graph(source) if isinstance(source, str) else source
    return onnx_file.read_bytes(proto.SerializeToString())
