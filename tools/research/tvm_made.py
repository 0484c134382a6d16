"""Models in halves and quantized, made of those that are there, for `tvm_models`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from burnish.frontends import onnx_file
from burnish.tools.api import samples_for

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "tools" / "demo"


def _halves(source: Path) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        from onnxruntime.transformers.float16 import convert_float_to_float16

        model = convert_float_to_float16(onnx.load(source), keep_io_types=False, disable_shape_infer=False)
        onnx.save(model, folder / "half.onnx")
        return folder / "half.onnx"

    return make


class _Reader:
    """Calibration data: the samples of the model."""

    def __init__(self, path: Path) -> None:
        self._feeds = iter([dict(one.feeds) for one in samples_for(onnx_file.read(path))][:4])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


def _integers(source: Path, **options: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

        form = QuantFormat.QOperator if options.get("operators") else QuantFormat.QDQ
        quantize_static(
            str(source), str(folder / "int8.onnx"), _Reader(source), quant_format=form,
            per_channel=bool(options.get("per_channel")), weight_type=QuantType.QInt8,
            activation_type=QuantType.QUInt8,
        )  # fmt: skip
        return folder / "int8.onnx"

    return make


def _dynamic(source: Path) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(str(source), str(folder / "dynamic.onnx"), weight_type=QuantType.QInt8)
        return folder / "dynamic.onnx"

    return make


def _bits(source: Path, bits: int, form: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer, QuantFormat

        quantizer = MatMulNBitsQuantizer(
            onnx.load(source), bits=bits, block_size=32, is_symmetric=False, quant_format=getattr(QuantFormat, form)
        )
        quantizer.process()
        quantizer.model.save_model_to_file(str(folder / "bits.onnx"))
        return folder / "bits.onnx"

    return make


ZOO = ROOT / ".zoo"
MADE: dict[str, Callable[[Path], Path]] = {
    "digits_resnet, float16": _halves(DEMO / "digits_resnet.onnx"),
    "digits_vit, float16": _halves(DEMO / "digits_vit.onnx"),
    "bert-s-ts, float16": _halves(ZOO / "bert-s-ts.onnx"),
    "llama-kv-ts, float16": _halves(ZOO / "llama-kv-ts.onnx"),
    "digits_resnet, int8 QDQ": _integers(DEMO / "digits_resnet.onnx"),
    "digits_resnet, int8 QDQ per channel": _integers(DEMO / "digits_resnet.onnx", per_channel=True),
    "digits_resnet, QOperator": _integers(DEMO / "digits_resnet.onnx", operators=True),
    "digits_vit, dynamically int8": _dynamic(DEMO / "digits_vit.onnx"),
    "llama-kv-dynp, MatMulNBits 4": _bits(ZOO / "llama-kv-dynp.onnx", 4, "QOperator"),
    "llama-kv-dynp, MatMulNBits 8": _bits(ZOO / "llama-kv-dynp.onnx", 8, "QOperator"),
    "llama-kv-dynp, int4 QDQ": _bits(ZOO / "llama-kv-dynp.onnx", 4, "QDQ"),
}
"""How each is made: a function of the folder to write into that gives the file."""
