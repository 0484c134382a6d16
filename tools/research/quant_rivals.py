"""Other tools that quantize ONNX files, each run as its users do, in a Python environment that has them.

    rivals/bin/pip install onnxruntime==1.32.0 nncf==3.4.0 onnxsim==0.8.1 olive-ai==0.13.0 requests torch
    rivals/bin/python tools/research/quant_rivals.py TOOL IN.onnx OUT.onnx SAMPLES.npz

The file imports nothing of burnish. SAMPLES holds an array `number/input` for each input of each sample.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Feeds = list[dict[str, np.ndarray]]


def main(tool: str, source: str, target: str, samples: str) -> None:
    """Let one tool write `target`; whatever it raises ends the process."""
    TOOLS[tool](source, target, _read(samples))


def _read(path: str) -> Feeds:
    found: dict[int, dict[str, np.ndarray]] = {}
    with np.load(path, allow_pickle=False) as arrays:
        for key in arrays.files:
            number, _, name = key.partition("/")
            found.setdefault(int(number), {})[name] = arrays[key]
    return [found[number] for number in sorted(found)]


class _Reader:
    """What ONNX Runtime's calibration reads samples from."""

    def __init__(self, feeds: Feeds) -> None:
        self._rest: Iterator[dict[str, np.ndarray]] = iter(feeds)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._rest, None)


def _prepared(source: str, folder: str) -> str:
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = Path(folder) / "prepared.onnx"
    beside = {"save_as_external_data": True, "all_tensors_to_one_file": True, "external_data_location": "prepared.data"}
    kept = beside if Path(f"{source}.data").exists() else {}
    quant_pre_process(source, str(prepared), skip_symbolic_shape=True, **kept)
    return str(prepared)


def _raised(source: str) -> str:
    """The file, in the first opset in which a scale may be one of a channel."""
    import onnx

    model = onnx.load(source)
    if next(one.version for one in model.opset_import if not one.domain) < 13:
        onnx.save(onnx.version_converter.convert_version(model, 13), source)
    return source


def _ort_dynamic(source: str, target: str, feeds: Feeds) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        quantize_dynamic(_prepared(source, folder), target, per_channel=True, weight_type=QuantType.QInt8)


def _ort_static(source: str, target: str, feeds: Feeds) -> None:
    """One scale a channel; where that ends in an error over a bias, once more without what looks at biases."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    with tempfile.TemporaryDirectory() as folder:
        prepared = _raised(_prepared(source, folder))
        for options in ({}, {"QDQDisableWeightAdjustForInt32Bias": True}):
            try:
                quantize_static(
                    prepared,
                    target,
                    _Reader(feeds),
                    quant_format=QuantFormat.QDQ,
                    per_channel=True,
                    activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8,
                    extra_options=options,
                )
                return
            except ValueError:
                if options:
                    raise


def _ort_blocks(algorithm: str) -> Callable[[str, str, Feeds], None]:
    def run(source: str, target: str, feeds: Feeds) -> None:
        import onnx
        from onnxruntime.quantization import matmul_nbits_quantizer as nbits

        chosen: dict[str, Callable[[], Any]] = {
            "rtn": lambda: nbits.DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=True, accuracy_level=4),
            "hqq": lambda: nbits.HQQWeightOnlyQuantConfig(block_size=32),
            "k-quant": lambda: nbits.KQuantWeightOnlyQuantConfig(),
        }
        model = onnx.load(source)
        made = nbits.MatMulNBitsQuantizer(model, block_size=32, accuracy_level=4, algo_config=chosen[algorithm]())
        made.process()
        made.model.save_model_to_file(target, False)

    return run


def _nncf(source: str, target: str, feeds: Feeds) -> None:
    """NNCF with its control of accuracy: the agreement with the original's outputs may drop by a hundredth."""
    import nncf  # type: ignore[import-not-found]
    import onnx
    import onnxruntime

    original = onnx.load(source)
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    wanted = [session.run(None, one)[0] for one in feeds]

    def agreement(model: Any, data: Any) -> float:
        own = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        pairs = [(own.run(None, one)[0], expected) for one, expected in zip(feeds, wanted, strict=True)]
        return float(np.mean([np.mean(a.argmax(-1) == b.argmax(-1)) for a, b in pairs]))

    data = nncf.Dataset(feeds)
    made = nncf.quantize_with_accuracy_control(original, data, data, agreement, max_drop=0.01)
    onnx.save(made, target)


def _onnxsim(source: str, target: str, feeds: Feeds) -> None:
    """By its functions: its command takes data from the Hugging Face hub only."""
    import onnx
    import onnxsim

    simplified, _ = onnxsim.simplify(source)
    with tempfile.TemporaryDirectory() as folder:
        prepared = str(Path(folder) / "prepared.onnx")
        onnx.save(simplified, prepared)
        onnx.save(onnxsim.quantize_static(_raised(prepared), calibration_data=feeds), target)


def _olive(algorithm: str) -> Callable[[str, str, Feeds], None]:
    def run(source: str, target: str, feeds: Feeds) -> None:
        with tempfile.TemporaryDirectory() as folder:
            command = [str(Path(sys.executable).with_name("olive")), "quantize", "-m", source, "-o", folder]
            subprocess.run([*command, "--algorithm", algorithm, "--precision", "int4"], check=True)
            found = sorted(Path(folder).rglob("*.onnx"))
            if not found:
                raise RuntimeError("olive ended without an error and wrote no model")
            shutil.copy(found[0], target)
            for data in found[0].parent.glob("*.data"):
                shutil.copy(data, Path(target).parent)

    return run


TOOLS: dict[str, Callable[[str, str, Feeds], None]] = {
    "onnxruntime dynamic": _ort_dynamic,
    "onnxruntime static": _ort_static,
    "onnxruntime 4 bits, rtn": _ort_blocks("rtn"),
    "onnxruntime 4 bits, hqq": _ort_blocks("hqq"),
    "onnxruntime 4 bits, k-quant": _ort_blocks("k-quant"),
    "nncf": _nncf,
    "onnxsim static": _onnxsim,
    "olive 4 bits, rtn": _olive("rtn"),
    "olive 4 bits, hqq": _olive("hqq"),
}

if __name__ == "__main__":
    main(*sys.argv[1:])
