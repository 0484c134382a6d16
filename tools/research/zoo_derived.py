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


def slim(model: onnx.ModelProto, kind: str) -> onnx.ModelProto:
    """As onnxslim leaves it."""
    import onnxslim

    result: onnx.ModelProto = onnxslim.slim(model)
    return result


def simplify(model: onnx.ModelProto, kind: str) -> onnx.ModelProto:
    """As onnxsim leaves it. AssertionError when it finds its own result to differ."""
    import onnxsim

    result: onnx.ModelProto
    result, same = onnxsim.simplify(model)
    assert same, "onnxsim's own check finds another result"
    return result


def fuse_runtime(model: onnx.ModelProto, kind: str) -> onnx.ModelProto:
    """As `onnxruntime.transformers.optimizer` leaves it for a `model_type` of its own.

    It deduces heads and width. Only its own fusions run, not those of a session.
    """
    import tempfile

    from onnxruntime.transformers import optimizer
    from onnxruntime.transformers.fusion_options import FusionOptions

    options = FusionOptions(kind)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model.onnx"
        onnx.save(model, source)
        fused = optimizer.optimize_model(str(source), kind, opt_level=0, optimization_options=options)
    result: onnx.ModelProto = fused.model
    return result


def fuse_onnxscript(model: onnx.ModelProto, kind: str) -> onnx.ModelProto:
    """As `onnxscript.rewriter.ort_fusions.optimize_for_ort` leaves it."""
    import onnx_ir as oir
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    fused, _ = optimize_for_ort(oir.from_proto(model))
    result: onnx.ModelProto = oir.to_proto(fused)
    return result


def four_bits(model: onnx.ModelProto, kind: str) -> onnx.ModelProto:
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


def derive(source: Path, tool: str, target: Path, kind: str) -> None:
    """Write what a tool of `TOOLS` makes of `source` to `target`; `kind` is ONNX Runtime's name of the architecture."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            result = TOOLS[tool](onnx.load(str(source)), kind)
    finally:
        logging.disable(logging.NOTSET)
    onnx.save(result, str(target))
