"""ONNX files rewritten by the tools that people run after an export: onnxslim, onnxsim, ONNX Runtime's fusions of
transformers, and those of onnxscript.

No tool is in burnish's environment for continuous integration: `pip install onnxslim onnxsim` first.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable
from pathlib import Path

import onnx

KINDS = {"bert-s": "bert", "vit-timm": "vit", "swin": "swin", "unet": "unet", "t5": "t5"}
"""ONNX Runtime's name for a family; the decoders are all "gpt2" to it."""


def slim(model: onnx.ModelProto, family: str) -> onnx.ModelProto:
    """As onnxslim leaves it."""
    import onnxslim

    result: onnx.ModelProto = onnxslim.slim(model)
    return result


def simplify(model: onnx.ModelProto, family: str) -> onnx.ModelProto:
    """As onnxsim leaves it. AssertionError when it finds its own result to differ."""
    import onnxsim

    result: onnx.ModelProto
    result, same = onnxsim.simplify(model)
    assert same, "onnxsim's own check finds another result"
    return result


def fuse_runtime(model: onnx.ModelProto, family: str) -> onnx.ModelProto:
    """As `onnxruntime.transformers.optimizer` leaves it, told the number of heads and the width.

    Only its own fusions run, not those of a session, and none to operators that only run on a GPU.
    """
    import tempfile

    from onnxruntime.transformers import optimizer
    from onnxruntime.transformers.fusion_options import FusionOptions

    from burnish.tools.research import zoo_truth

    truth = zoo_truth.FAMILIES[family]
    kind = KINDS.get(family, "gpt2")
    heads, width = 0, 0
    if kind in ("bert", "gpt2", "vit", "t5"):
        heads = truth.attention[0].heads
        width = truth.embedding[1] if truth.embedding else heads * truth.attention[0].head_size
    options = FusionOptions(kind)
    if kind == "unet":
        options.enable_nhwc_conv = options.enable_group_norm = options.enable_skip_group_norm = False
        options.enable_bias_splitgelu = options.enable_bias_add = False
        options.enable_packed_kv = options.enable_packed_qkv = False
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model.onnx"
        onnx.save(model, source)
        fused = optimizer.optimize_model(str(source), kind, heads, width, options, opt_level=0)
        result: onnx.ModelProto = fused.model
    return result


def fuse_onnxscript(model: onnx.ModelProto, family: str) -> onnx.ModelProto:
    """As `onnxscript.rewriter.ort_fusions.optimize_for_ort` leaves it."""
    import onnx_ir as oir
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    fused, _ = optimize_for_ort(oir.from_proto(model))
    result: onnx.ModelProto = oir.to_proto(fused)
    return result


def four_bits(model: onnx.ModelProto, family: str) -> onnx.ModelProto:
    """Every MatMul as MatMulNBits with blocks of 16 weights, as onnxruntime-genai's builder makes a model int4."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(model, block_size=16, is_symmetric=True, accuracy_level=4)
    quantizer.process()
    result: onnx.ModelProto = quantizer.model.model
    return result


TOOLS: dict[str, Callable[[onnx.ModelProto, str], onnx.ModelProto]] = {
    "slim": slim,
    "sim": simplify,
    "ort": fuse_runtime,
    "fuse": fuse_onnxscript,
    "int4": four_bits,
}


def derive(source: Path, tool: str, target: Path, family: str) -> None:
    """Write what a tool of `TOOLS` makes of `source`, a model of `family`, to `target`."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            result = TOOLS[tool](onnx.load(str(source)), family)
    finally:
        logging.disable(logging.NOTSET)
    onnx.save(result, str(target))
