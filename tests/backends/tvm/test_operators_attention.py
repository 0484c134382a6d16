"""Attention and rotary embedding, compiled by TVM, are ONNX Runtime's in all their forms, with dynamic lengths."""

from __future__ import annotations

import numpy as np
import pytest
from compiled_operators import agree, graph, random

pytest.importorskip("tvm")


def test_attention_with_caches_masks_and_grouped_heads() -> None:
    model = graph(
        """g (float[b,4,s,8] q, float[b,2,k,8] k, float[b,2,k,6] v, float[b,2,p,8] pk, float[b,2,p,6] pv,
              float[b,1,s,t] m, bool[s,t] seen)
           => (float[b,4,s,6] y, float[b,2,u,8] nk, float[b,2,u,6] nv, float[b,4,s,6] causal, float[b,4,s,6] alone,
               float[b,4,s,6] both, float[b,4,s,6] capped) {
           y, nk, nv = Attention(q, k, v, m, pk, pv)
           causal, k1, v1 = Attention<is_causal=1>(q, k, v, , pk, pv)
           alone = Attention<is_causal=1>(q, k, v)
           both, k2, v2 = Attention<is_causal=1, scale=0.3, softcap=2.0>(q, k, v, seen, pk, pv)
           capped, k3, v3 = Attention<softcap=2.0>(q, k, v, m, pk, pv) }""",
        23,
    )
    many = []
    for batch, queries, keys, past in ((2, 3, 5, 4), (1, 1, 1, 7)):
        mask = random(batch, 1, queries, keys + past)
        mask[0, 0, -1] = -np.inf
        seen = random(queries, keys + past) > 0
        seen[0] = False
        q, k, v = random(batch, 4, queries, 8), random(batch, 2, keys, 8, seed=1), random(batch, 2, keys, 6, seed=2)
        pk, pv = random(batch, 2, past, 8, seed=3), random(batch, 2, past, 6, seed=4)
        many.append({"q": q, "k": k, "v": v, "pk": pk, "pv": pv, "m": mask, "seen": seen})
    agree(model, *many, within=10)


def test_attention_and_rotary_embedding_of_flat_heads() -> None:
    model = graph(
        """g (float[b,s,32] q, float[b,s,16] k, float[b,s,16] v, float[9,4] cos, float[9,4] sin, int64[b,s] at,
              int64[1] first)
           => (float[b,s,32] y, float[b,s,32] r, float[b,s,32] i, float[b,s,32] m, float[b,s,32] h) {
           y = Attention<q_num_heads=4, kv_num_heads=2, is_causal=1>(q, k, v)
           r = RotaryEmbedding<num_heads=4>(q, cos, sin, at)
           i = RotaryEmbedding<num_heads=4, interleaved=1>(q, cos, sin, at)
           m = com.microsoft.RotaryEmbedding<num_heads=4>(q, first, cos, sin)
           h = com.microsoft.RotaryEmbedding<num_heads=4, interleaved=1>(q, at, cos, sin) }""",
        23,
    )
    given = {"q": random(2, 3, 32), "k": random(2, 3, 16, seed=1), "v": random(2, 3, 16, seed=2)}
    angles = {"cos": random(9, 4, seed=3), "sin": random(9, 4, seed=4)}
    agree(model, given | angles | {"at": np.array([[0, 1, 2], [5, 6, 8]]), "first": np.array([2])}, within=10)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_halves_are_summed_in_float32(kind: str) -> None:
    model = graph(
        f"""g (float[2,3,64] x, float[64,64] w, float[64] s) => (float[2,3,64] y, float[2,3,64] n) {{
           a = Cast<to={10 if kind == "float16" else 16}>(x)  b = Cast<to={10 if kind == "float16" else 16}>(w)
           c = MatMul(a, b)  y = Cast<to=1>(c)
           d = LayerNormalization(x, s)  e = Cast<to={10 if kind == "float16" else 16}>(d)  f = Softmax(e)
           n = Cast<to=1>(f) }}""",
    )
    from compiled_operators import compiled

    x, w = random(2, 3, 64), random(64, 64, seed=1)
    found = compiled(model).run({"x": x, "w": w, "s": np.ones(64, np.float32)})
    np.testing.assert_allclose(found["y"], x @ w, atol=3e-3 * 30 if kind == "float16" else 3e-1)
    np.testing.assert_allclose(found["n"].sum(-1), 1, atol=2e-2)


def test_a_branch_is_chosen_when_the_code_runs() -> None:
    model = graph(
        """g (float[n, 4] x, int64 kind) => (float[n, 4] y) <int64 one = {1}> {
           c = Equal(kind, one)
           y = If(c) <then_branch = t () => (float[n, 4] a) { a = Exp(x) },
                      else_branch = e () => (float[n, 4] b) { s = Neg(x)  b = Add(s, x) }> }"""
    )
    x = random(3, 4)
    agree(model, {"x": x, "kind": np.array(1)}, {"x": x, "kind": np.array(7)}, {"x": x[:1], "kind": np.array(1)})


def test_recurrent_layers_of_a_fixed_length_are_written_out() -> None:
    model = graph(
        """g (float[5, n, 3] x, float[2, 16, 3] w, float[2, 16, 4] r, float[2, 32] b, float[1, 12, 3] gw,
              float[1, 12, 4] gr, float[1, 24] gb, float[1, n, 4] h)
           => (float[5, 2, n, 4] y, float[2, n, 4] last, float[2, n, 4] cell, float[5, 1, n, 4] g1,
               float[5, 1, n, 4] g2) {
           y, last, cell = LSTM<hidden_size=4, direction="bidirectional">(x, w, r, b)
           g1 = GRU<hidden_size=4, linear_before_reset=1>(x, gw, gr, gb, , h)
           g2 = GRU<hidden_size=4, direction="reverse">(x, gw, gr, gb) }"""
    )
    weights = {
        "w": random(2, 16, 3), "r": random(2, 16, 4), "b": random(2, 32), "gw": random(1, 12, 3, seed=1),
        "gr": random(1, 12, 4, seed=1), "gb": random(1, 24, seed=1),
    }  # fmt: skip
    agree(model, weights | {"x": random(5, 2, 3), "h": random(1, 2, 4)}, within=10)


def test_two_layers_read_the_keys_and_values_of_one_cache_where_they_lie() -> None:
    """Heads in groups, keys of another layer: nothing as large as the keys is written, and no transpose of them."""
    from burnish.backends.tvm import compiling
    from burnish.backends.tvm.lowering import lower
    from burnish.backends.tvm.target import parse

    text = """g (float[1, 6, 5, 16] q, float[1, 6, 5, 16] p, float[1, 2, 7, 16] k, float[1, 2, 7, 16] v)
        => (float[1, 6, 5, 16] y, float[1, 6, 5, 16] z) { y = Attention(q, k, v)  z = Attention(p, k, v) }"""
    model = graph(text, 23)
    agree(model, {"q": random(1, 6, 5, 16), "p": random(1, 6, 5, 16, seed=1), "k": random(1, 2, 7, 16, seed=2),
                  "v": random(1, 2, 7, 16, seed=3)})  # fmt: skip
    module = compiling.fused(lower(model).module, parse("llvm"))
    main = next(one for variable, one in module.functions_items() if variable.name_hint == "main")
    keys, wide = 2 * 7 * 16, 6 * 7 * 16
    for block in main.body.blocks:
        for binding in block.bindings:
            shape = getattr(binding.var.ty, "shape", None)
            if shape is not None:
                assert int(np.prod([int(size) for size in shape.values])) not in (keys, wide), binding
