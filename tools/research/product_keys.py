"""Product-key lookups in ONNX Runtime: `OMP_NUM_THREADS=1 python -m burnish.tools.research.product_keys [page]`.

The parts of a lookup in the forms that they can be written in, and whole memory layers as torch exports them and as the
default recipe leaves them, on one thread, timed in turns. Every row goes to `docs/results/product-keys.json` when it is
known and is not measured again; `page` only writes the page.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as oir
import torch

from burnish.backends.ort.session import executor
from burnish.backends.ort.timing import Timing, paired
from burnish.frontends import onnx_file
from burnish.ir.edit import name_nodes
from burnish.ir.views.product_keys import best_pairs
from burnish.passes import catalog, lossy, recipes
from burnish.passes.base import Outcome
from burnish.passes.pipeline import Pipeline, constant_bytes
from burnish.tools.research import zoo_export
from burnish.tools.research.depth import Numbers
from burnish.tools.research.zoo_memory import Memory, network

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
NUMBERS = Numbers(RESULTS / "product-keys.json")
HEADS, HALF, VALUES = 4, 64, 256
SIZES = ((128, 8), (256, 32))
"""Keys of each half, and pairs that are chosen."""
TOKENS = (1, 32, 256)
SESSIONS = 5

Array = np.ndarray[Any, Any]


def scores(keys: int, best: int, tokens: int) -> dict[str, tuple[str, dict[str, Array]]]:
    """The products of both halves of queries with their keys."""
    k = np.random.default_rng(0).standard_normal((2, HEADS, keys, HALF)).astype(np.float32)
    turned = np.ascontiguousarray(k.transpose(0, 1, 3, 2))
    head = f"g (float[N,{HEADS},{2 * HALF}] q) => (float[N,{HEADS},{keys}] a, float[N,{HEADS},{keys}] b)"
    parts = {"p": np.array([HALF, HALF])}
    einsum = 'Einsum <equation = "blh,lkh->blk">'
    both = {"s": np.array([0, HEADS, 2, HALF]), "k": turned, "z": np.array(0), "o": np.array(1)}
    return {
        "two Einsum": (
            f"{head} {{ x, y = Split <axis = 2> (q, p) a = {einsum} (x, k) b = {einsum} (y, l) }}",
            parts | {"k": k[0], "l": k[1]},
        ),
        "two MatMul": (
            f"{head} {{ t = Transpose <perm = [1, 0, 2]> (q) x, y = Split <axis = 2> (t, p) u = MatMul (x, k)"
            " v = MatMul (y, l) a = Transpose <perm = [1, 0, 2]> (u) b = Transpose <perm = [1, 0, 2]> (v) }",
            parts | {"k": turned[0], "l": turned[1]},
        ),
        "one MatMul": (
            f"{head} {{ r = Reshape (q, s) t = Transpose <perm = [2, 1, 0, 3]> (r) u = MatMul (t, k)"
            " w = Transpose <perm = [0, 2, 1, 3]> (u) a = Gather (w, z) b = Gather (w, o) }",
            both,
        ),
    }


def pairs(keys: int, best: int, tokens: int) -> dict[str, tuple[str, dict[str, Array]]]:
    """The best sums of two lists of scores, and the rows that they stand for."""
    shape = f"[N,{HEADS},{best}]"
    head = f"g (float{shape} v, float{shape} w, int64{shape} i, int64{shape} j) => (float{shape} b, int64{shape} x)"
    chosen = best_pairs(best, best, best)
    choice = np.zeros((2 * best, len(chosen)), np.float32)
    choice[chosen[:, 0], np.arange(len(chosen))] = choice[best + chosen[:, 1], np.arange(len(chosen))] = 1
    base = {"k": np.array([best]), "n": np.array(keys)}
    flat = base | {"e": np.array([3]), "f": np.array([2]), "s": np.array([0, HEADS, best**2])}
    cut = base | {"o": chosen[:, 0].copy(), "p": chosen[:, 1].copy()}
    every = "v1 = Unsqueeze (v, e) w1 = Unsqueeze (w, f) d = Add (v1, w1) r = Reshape (d, s) b, t = TopK (r, k) "
    late = "y = GatherElements <axis = -1> (i, c) z = GatherElements <axis = -1> (j, a) m = Mul (y, n) x = Add (m, z) }"
    found = f"c = Gather (o, t) a = Gather (p, t) {late}"
    return {
        "all pairs": (
            f"{head} {{ {every} i1 = Unsqueeze (i, e) j1 = Unsqueeze (j, f) m = Mul (i1, n) l = Add (m, j1)"
            " u = Reshape (l, s) x = GatherElements <axis = -1> (u, t) }",
            flat,
        ),
        "all pairs, rows late": (
            f"{head} {{ {every} c = Div (t, q) a = Mod (t, q) {late}",
            flat | {"q": np.array(best)},
        ),
        "best pairs by Gather": (
            f"{head} {{ v1 = Gather <axis = -1> (v, o) w1 = Gather <axis = -1> (w, p) d = Add (v1, w1)"
            f" b, t = TopK (d, k) {found}",
            cut,
        ),
        "best pairs by a product": (
            f"{head} {{ q = Concat <axis = -1> (v, w) d = MatMul (q, g) b, t = TopK (d, k) {found}",
            cut | {"g": choice},
        ),
    }


def sums(keys: int, best: int, tokens: int) -> dict[str, tuple[str, dict[str, Array]]]:
    """The weighted sum of the rows of all heads."""
    table = np.random.default_rng(0).standard_normal((keys**2, VALUES)).astype(np.float32)
    count = HEADS * best
    head = f"g (int64[N,{HEADS},{best}] i, float[N,{HEADS},{best}] w) => (float[N,{VALUES}] y)"
    target = {"s": np.array([0, count]), "t": np.array([0, 1, count]), "a": np.array([1])}
    return {
        "Mul and ReduceSum": (
            f"{head} {{ r = Gather (v, i) u = Unsqueeze (w, e) m = Mul (r, u) y = ReduceSum <keepdims = 0> (m, b) }}",
            {"v": table, "e": np.array([3]), "b": np.array([1, 2])},
        ),
        "Einsum": (
            f'{head} {{ r = Gather (v, i) y = Einsum <equation = "bhk,bhkd->bd"> (w, r) }}',
            {"v": table},
        ),
        "MatMul": (
            f"{head} {{ j = Reshape (i, s) r = Gather (v, j) u = Reshape (w, t) m = MatMul (u, r)"
            " y = Squeeze (m, a) }",
            {"v": table, **target},
        ),
    }


PARTS = {"scores": scores, "pairs": pairs, "sums": sums}


def _model(text: str, constants: Mapping[str, Array]) -> oir.Model:
    proto = onnx.parser.parse_model('<ir_version: 9, opset_import: ["": 20]>\n' + text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in constants.items())
    return oir.from_proto(proto)


def _feeds(model: oir.Model, keys: int, tokens: int) -> dict[str, Array]:
    random, found = np.random.default_rng(1), dict[str, Array]()
    for value in model.graph.inputs:
        shape = (tokens, *(size for size in value.shape or () if isinstance(size, int)))
        scores = np.sort(random.standard_normal(shape).astype(np.float32))[..., ::-1].copy()
        found[str(value.name)] = random.integers(0, keys, shape) if value.dtype == oir.DataType.INT64 else scores
    return found


def _compared(old: oir.Model, new: oir.Model, feeds: dict[str, Array]) -> dict[str, float]:
    """Microseconds of both, their ratio, and how far their results are apart, relative to the largest.

    The middle of `SESSIONS` pairs of sessions, with the ends of the ratio: some sessions are slow in all their runs.
    """
    found: list[Timing] = []
    apart = 0.0
    for _ in range(SESSIONS):
        before, after = executor()(old), executor()(new)
        one, other = (list(runner.run(feeds).values()) for runner in (before, after))
        apart = max(float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-30)) for a, b in zip(one, other, strict=True))
        found.append(paired(partial(before.run, feeds), partial(after.run, feeds), rounds=12, seconds=0.5, alone=True))
        before.close()
        after.close()
    low, *_, high = ratios = sorted(one.ratio for one in found)
    times = [1e6 * float(np.median([getattr(one, name) for one in found])) for name in ("median_a", "median_b")]
    return {"old": times[0], "new": times[1], "ratio": ratios[SESSIONS // 2], "low": low, "high": high, "apart": apart}


def part(name: str, form: str, keys: int, best: int, tokens: int) -> dict[str, float]:
    """A form of a part against the first."""
    forms = PARTS[name](keys, best, tokens)
    old = _model(*next(iter(forms.values())))
    return _compared(old, _model(*forms[form]), _feeds(old, keys, tokens))


def layer(style: str, keys: int, best: int, tokens: int, bits: int) -> dict[str, float]:
    """A whole layer as it is exported, against what the default recipe makes of it, its table in so many bits."""
    torch.manual_seed(0)
    module = Memory(style, width=VALUES, heads=HEADS, keys=keys, half=HALF, best=best, values=VALUES)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "layer.onnx"
        zoo_export.torchscript(network(module, VALUES), file, opset=17)
        old = onnx_file.read(file)
        oir.external_data.load_to_model(old)
    normal = Pipeline(recipes.NORMAL_FORM).rewrite(old).model
    if bits:
        name_nodes(normal)
        (weights,) = catalog.parse(f"quantize-weights{{bits={bits},rounding=nearest}}")
        assert isinstance(weights, lossy.LossyPass)
        normal, _ = lossy.apply(normal, weights.asked(normal, Outcome("weights")), [weights])
    new = Pipeline(recipes.named("default", "ort-cpu", None)).rewrite(normal).model
    x = np.random.default_rng(0).standard_normal((1, tokens, VALUES)).astype(np.float32)
    found = _compared(old, new, {"x": x})
    return found | {"bytes": float(constant_bytes(old)), "left": float(constant_bytes(new))}


def measure() -> None:
    """Measure what is not known yet."""
    for keys, best in SIZES:
        for tokens in TOKENS:
            for name, forms in PARTS.items():
                for form in list(forms(keys, best, tokens))[1:]:
                    key = f"{name} | {form} | {keys} | {best} | {tokens}"
                    NUMBERS.get(key, partial(part, name, form, keys, best, tokens))
            for style, bits in (("expanded", 0), ("divided", 0), ("bag", 0), ("expanded", 8), ("expanded", 4)):
                key = f"layer | {style} | {bits} | {keys} | {best} | {tokens}"
                NUMBERS.get(key, partial(layer, style, keys, best, tokens, bits))


_HEAD = """# Product-key lookups

Made by `python -m burnish.tools.research.product_keys`; numbers in [product-keys.json](product-keys.json). A memory
layer with 4 heads: halves of queries of 64 numbers, rows of 256 numbers, random weights; ONNX Runtime (CPU), one
thread, float32, timed in turns by that thread's clock. Times are microseconds; below a ratio of 1 the form is faster.
Of five pairs of sessions the middle is given and, in brackets, the ends: on this busy machine, some sessions were slow
in all their runs. `keys` are those of each half, so that the table has the square of it in rows, `chosen` the pairs
that a head takes. Results of a part agree with those of its first form to 1e-6 of the largest number, and scores and
rows of `pairs` to the bit.

"""
_NOTES = {
    "scores": """The products with the keys, against two Einsum. An Einsum turns the keys in every run. `replace-einsum`
writes two MatMul. One for both halves gains nothing more, as both have to be joined and parted.""",
    "pairs": """The best pairs and their rows, against all k * k sums and all k * k rows. `fuse-product-keys` looks rows
up late, and for ONNX Runtime on a CPU adds only the pairs that can be best, by a product with zeros and ones. Picking
the scores of these pairs by Gather takes about as long as it saves.""",
    "sums": """The weighted sum of the rows, against Mul and ReduceSum. `fuse-embedding-bag` writes MatMul.""",
}
_LAYERS = """## Whole layers

With the linear layers around the lookup, as exported (TorchScript) and by the default recipe for `ort-cpu`. `expanded`
writes the pairs as Meta's reference does and sums up by Mul and ReduceSum; `divided` looks rows up late and sums up by
MatMul as it is; `bag` is `expanded` with an EmbeddingBag, which torch exports as a loop over tokens. With bits, all
matrices are stored in so many (`quantize-weights`), the table as GatherBlockQuantized: a few times smaller, as fast at
one token, and with 4 bits a tenth slower than the exported file at many. `error` is relative to the largest number.

| | bits | keys | chosen | tokens | exported | default | ratio | error | MB | left |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
"""


def page() -> None:
    """Write the page of what was measured."""
    lines = [_HEAD]
    for name, note in _NOTES.items():
        lines += [f"## {name.capitalize()}\n\n{note}\n\n| | keys | chosen | tokens | first form | this | ratio |\n"]
        lines += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"]
        for key, found in NUMBERS.known.items():
            kind, form, *sizes = key.split(" | ")
            if kind == name:
                lines += [f"| {form} | {' | '.join(sizes)} | {_times(found)} |\n"]
        lines += ["\n"]
    lines += [_LAYERS]
    for key, found in NUMBERS.known.items():
        kind, style, bits, *sizes = key.split(" | ")
        if kind == "layer":
            size = " | ".join(f"{found[what] / 1e6:.1f}" for what in ("bytes", "left"))
            lines += [
                f"| {style} | {bits if bits != '0' else 'float'} | {' | '.join(sizes)} | {_times(found)} |"
                f" {found['apart']:.1e} | {size} |\n"
            ]
    (RESULTS / "product-keys.md").write_text("".join(lines).rstrip() + "\n", encoding="utf-8")


def _times(found: dict[str, float]) -> str:
    ratio = f"{found['ratio']:.2f} ({found['low']:.2f} to {found['high']:.2f})"
    return f"{found['old']:,.0f} | {found['new']:,.0f} | {ratio}"


if __name__ == "__main__":
    if sys.argv[1:] != ["page"]:
        torch.set_num_threads(1)
        measure()
    page()
