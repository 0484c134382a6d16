"""The matrix of model families and exporters that the views are checked on.

`FILES` maps each name FAMILY-FLAVOUR to its family and its flavour. A flavour is a flavour of `zoo_export.FLAVOURS`
(`op23` for its `dyn23`), then, where a tool has rewritten the exported file, the tool's name of `zoo_derived.TOOLS`.
Families written by hand have no flavour. `FAILS` names the exports that do not work, with what the exporter said.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from burnish.tools.research.zoo_random import Network

EXPORTERS = ("ts", "eager", "dyn", "dynp", "op23")
_PLAIN = ("ts", "dyn", "dynp", "ts-slim", "dynp-slim", "ts-sim", "dynp-sim")
_FUSED = (*_PLAIN, "op23", "ts-ort", "dynp-ort", "dynp-fuse")
_BOTH = ("eager", "eager-ort", *_FUSED)

FLAVOURS: dict[str, tuple[str, ...]] = {
    "resnet": _PLAIN,
    "resnet-basic": _PLAIN,
    "mobilenet": _PLAIN,
    "efficientnet": _PLAIN,
    "mamba": _PLAIN,
    "codec": _PLAIN,
    "bert-s": _BOTH,
    "gpt2": _BOTH,
    "vit-timm": _BOTH,
    "llama-kv": _BOTH,
    "llama-nocache": _FUSED,
    "gemma": _FUSED,
    "gemma-kv": _FUSED,
    "qwen": _FUSED,
    "phi": _FUSED,
    "swin": _FUSED,
    "mixtral": _FUSED,
    "mixtral-loop": ("ts", "ts-slim", "ts-sim"),
    "t5": _FUSED,
    "unet": _FUSED,
}

HANDMADE = ("genai-llama", "genai-window", "genai-qwen", "genai-mha", "genai-moe", "tf-bert")
"""Families of `zoo_handmade`, whose exporters need more than a package; the file is called like the family."""

FILES = {f"{family}-{flavour}": (family, flavour) for family, flavours in FLAVOURS.items() for flavour in flavours}
FILES |= {name: (name, "") for name in HANDMADE} | {"genai-llama-int4": ("genai-llama", "-int4")}

FAILS = {
    "gpt2-dynp-fuse": "ONNX Runtime refuses what onnxscript's optimize_for_ort wrote: `Node (node_addmm_1) Op (Gemm) "
    "[ShapeInferenceError] Input 0 expected to have rank 2 but has rank 3`",
    "mixtral-loop-dynp": "dynamo: `GuardOnDataDependentSymNode: Could not guard on data-dependent expression "
    "Eq(u0, 0)`",
    "mixtral-grouped-dynp (experts_implementation grouped_mm)": "dynamo: `DispatchError: No ONNX function found for "
    "<OpOverload(op='transformers.grouped_mm_fallback', overload='default')>`",
    "mixtral-grouped-ts": "TorchScript: `UnsupportedOperatorError: Exporting the operator 'aten::histc' to ONNX opset "
    "version 17 is not supported`",
    "phi-ts-ort, phi-dynp-ort with model_type phi": "onnxruntime.transformers: `TypeError: 'method' object is not "
    "iterable` (onnx_model_phi.py, `for func in self.model.functions`); the files here are made with model_type gpt2",
    "unet-ts-ort, unet-dynp-ort with NhwcConv and GroupNorm": "ONNX Runtime has them for GPUs only: `NOT_IMPLEMENTED : "
    "Could not find an implementation for NhwcConv(1)`; the files here are made without",
}
FILES = {name: how for name, how in FILES.items() if name not in FAILS}


def build(family: str, attention: str) -> Network:
    """The network of a family of `FLAVOURS` in evaluation mode, its weights drawn anew from seed 0."""
    import torch

    from burnish.tools.research.zoo_random import randomize

    torch.manual_seed(0)
    network = _builders()[family](attention)
    randomize(network.module)
    network.module.eval()
    return network


def export(name: str, target: Path, source: Callable[[str], Path]) -> None:
    """Write the file of a name of `FILES`; `source` gives the path of another one, built first where needed."""
    from burnish.tools.research import zoo_derived, zoo_export, zoo_handmade

    family, flavour = FILES[name]
    exporter, _, tool = flavour.partition("-")
    if tool:
        origin = f"{family}-{exporter}" if exporter else family
        zoo_derived.derive(source(origin), tool, target, family)
    elif not flavour:
        zoo_handmade.WRITERS[family](target)
    else:
        network = build(family, zoo_export.attention_of(exporter))
        zoo_export.write(network, "dyn23" if exporter == "op23" else exporter, target)


def _builders() -> dict[str, Callable[[str], Network]]:
    from burnish.tools.research import (
        zoo_codebook,
        zoo_convolutional,
        zoo_diffusion,
        zoo_language,
        zoo_state,
        zoo_windows,
    )

    return {
        "resnet": lambda attention: zoo_convolutional.resnet(bottleneck=True),
        "resnet-basic": lambda attention: zoo_convolutional.resnet(bottleneck=False),
        "mobilenet": lambda attention: zoo_convolutional.mobilenet(),
        "efficientnet": lambda attention: zoo_convolutional.efficientnet(),
        "vit-timm": zoo_windows.vit,
        "swin": zoo_windows.swin,
        "unet": zoo_diffusion.unet,
        "bert-s": zoo_language.bert,
        "gpt2": zoo_language.gpt2,
        "llama-nocache": lambda attention: zoo_language.llama(attention, cached=False),
        "llama-kv": lambda attention: zoo_language.llama(attention, cached=True),
        "gemma": lambda attention: zoo_language.gemma2("eager"),
        "gemma-kv": zoo_language.gemma3,
        "qwen": zoo_language.qwen3,
        "phi": zoo_language.phi,
        "t5": lambda attention: zoo_language.t5("eager"),
        "mixtral": lambda attention: zoo_language.mixtral(attention, "batched_mm"),
        "mixtral-loop": lambda attention: zoo_language.mixtral(attention, "eager"),
        "mamba": lambda attention: zoo_state.mamba(),
        "codec": lambda attention: zoo_codebook.codec(),
    }
