"""The recipes we ship, as plain lists. A pass may stand in a list twice: it runs again only when there is news."""

from __future__ import annotations

from burnish.ir import opsets
from burnish.passes import catalog
from burnish.passes.base import Pass

NEWEST_OPSET = opsets.NEWEST

ORT_OPSET = 23
"""The opset written for ONNX Runtime unless another is asked for: the first with Attention, which it runs faster."""

NORMAL_FORM: tuple[str, ...] = (
    "inline-functions",
    "lift-constants",
    "fold-branches",
    "share-repeats",
    "canonicalize-operators",
    "fold-shapes",
    "fold-constants",
    "split-sequences",
    "drop-identity",
    "fold-shapes",
    "fold-constants",
    "canonicalize-operators",
    "merge-moves",
    "fold-shapes",
    "drop-identity",
    "merge-moves",
    "share-repeats",
    "drop-unused",
    "infer-types",
)
"""One spelling for what every exporter writes."""

RECOGNISE: tuple[str, ...] = (
    "fuse-activation",
    "fuse-norm",
    "fuse-rotary",
    "fuse-attention",
    "fuse-product-keys",
    "fuse-embedding-bag",
)
"""Spelled-out functions written as one operator, if the target has it; before their constants are folded away."""

FOLD: tuple[str, ...] = (
    "fold-codebook",
    "replace-einsum",
    "pad-residual",
    "fold-batchnorm",
    "merge-repbn",
    "merge-linears",
    "fold-affine",
    "cancel-layout",
    "push-affine",
    "fold-affine",
)
"""Constants folded into the weights beside them."""

FUSE: tuple[str, ...] = ("fuse-skip-norm", "split-skip-norm", "fuse-bias-gelu")
"""Operators joined with the additions before them, where the target has one for both."""

CLEAN: tuple[str, ...] = ("drop-identity", "fold-constants", "share-repeats", "drop-unused")
"""What the passes before leave behind."""


LAST: tuple[str, ...] = ("drop-annotations",)
"""What only the passes needed."""

LOSSY: tuple[str, ...] = ("remove-blocks", "drop-attention", "drop-mlp", "project-rank")
"""What is searched for a budget when no lossy pass is named."""

QUANTIZED: dict[str, tuple[str, ...]] = {
    "int8": ("quantize-dynamic{balanced=True}", "quantize-static", "quantize-weights{bits=8}"),
    "int4": ("quantize-weights{bits=4,rounding=gptq}",),
    "fptq": ("quantize-fptq{rounding=gptq}", "quantize-weights{bits=8}"),
    "ostquant-w4": ("rotate-residual", "quantize-weights{bits=4,rounding=gptq}"),
    "ostquant-w4a4kv4": ("learn-rotations", "simulate-bits"),
    "mixed": (
        *LOSSY,
        "quantize-dynamic{balanced=True}",
        "quantize-static",
        "quantize-weights{convolutions=True}",
        "cast-half{stored=True}",
    ),
}
"""Recipes that are `default` with lossy passes behind the normal form. Without a budget a layer goes to the first pass
that can take it; with one all are searched together."""

REQUIRED: dict[str, tuple[str, ...]] = {
    "ostquant-w4": ("rotate-residual",),
    "ostquant-w4a4kv4": ("learn-rotations",),
}
"""What has to change something for a recipe to be what it is called."""

OPTIONS: dict[tuple[str, str], dict[str, object]] = {("fold-affine", "ort-cpu"): {"attention_scale": True}}
"""Options of passes by target. ONNX Runtime's CPU multiplies small matrices slower with a scale than without."""


def named(name: str, target: str, opset: int | None) -> list[Pass]:
    """The passes of `default`, `normal-form`, `none`, or a recipe of `QUANTIZED`.

    Args:
        name: the recipe.
        target: `onnx`, `ort-cpu` or `ort-cuda`; passed to the passes that write fused operators.
        opset: raise the model to it; None to keep the model's, or to write what the target runs best.
    """
    chosen: dict[str, object] | None = None if opset is None else {"to": opset}
    if opset is None and target != "onnx" and name not in ("normal-form", "none"):
        chosen = {"to": ORT_OPSET, "when": "softmax"}
    raised = [] if chosen is None else [catalog.make("infer-types"), catalog.make("raise-opset", chosen)]
    if name == "none":
        return raised[1:]
    first = [catalog.make(one) for one in NORMAL_FORM]
    first[2:2] = raised
    if name == "normal-form":
        return first
    first += [one for spec in QUANTIZED.get(name, ()) for one in catalog.parse(spec)]
    return [*first, *(_for_target(one, target) for one in (*RECOGNISE, *FOLD, *CLEAN, *FUSE, *CLEAN, *LAST))]


def after(own: list[Pass]) -> list[Pass]:
    """The caller's own passes, and the clean-up behind them."""
    return [*own, *(catalog.make(one) for one in (*CLEAN, *LAST))] if own else []


def _for_target(name: str, target: str) -> Pass:
    known = catalog.options(catalog.load(name))
    chosen = {"target": target} if "target" in known else {}
    return catalog.make(name, chosen | OPTIONS.get((name, target), {}))
