"""Graphs compiled by TVM beside the same in ONNX Runtime: one graph of many nodes is one compilation."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import onnx_ir as oir

from burnish.backends.ort.session import executor

_TOLERANCE = {"float64": 1e-7, "float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}


def graph(text: str, opset: int = 18) -> oir.Model:
    """A model from ONNX text, with the operators of ONNX Runtime as `com.microsoft`."""
    return oir.from_onnx_text(f'<ir_version: 10, opset_import: ["": {opset}, "com.microsoft": 1]> {text}')


def compiled(model: oir.Model):
    """The model compiled for this machine, without passes before."""
    import tvm

    from burnish.backends.tvm import compiling
    from burnish.backends.tvm.lowering import lower
    from burnish.backends.tvm.runner import TvmRunner
    from burnish.backends.tvm.target import parse

    target = parse("llvm")
    lowered = lower(model)
    code = compiling.build(compiling.scheduled(compiling.fused(lowered.module, target), target), target)
    return TvmRunner(code, tvm.cpu(), lowered.inputs, lowered.outputs, list(lowered.arrays()))


def agree(model: oir.Model, *many: Mapping[str, np.ndarray], within: float = 1.0) -> None:
    """The compiled model gives what ONNX Runtime gives: dtypes, shapes, values to rounding, NaN at the same places.

    Args:
        many: inputs of several runs of the same code.
        within: how many times the rounding of the dtype is allowed.
    """
    code, original = compiled(model), executor(level="basic")(model)
    for feeds in ({key: np.asarray(one) for key, one in given.items()} for given in many):
        found, expected = code.run(feeds), original.run(feeds)
        for name, array in expected.items():
            assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
            kind = array.dtype.name
            wide = np.float64 if kind in _TOLERANCE else array.dtype
            finite = np.abs(array[np.isfinite(array.astype(wide))].astype(wide)) if wide is np.float64 else np.ones(1)
            limit = within * _TOLERANCE.get(kind, 0.0)
            scale = float(finite.max(initial=0))
            np.testing.assert_allclose(
                found[name].astype(wide), array.astype(wide), rtol=limit, atol=limit * scale, err_msg=name
            )


def held(model: oir.Model, arrays: dict[str, np.ndarray]) -> oir.Model:
    """The model with inputs as initializers."""
    for value in list(model.graph.inputs):
        if value.name in arrays:
            value.const_value = oir.tensor(arrays[str(value.name)], name=value.name)
            value.shape = oir.Shape(arrays[str(value.name)].shape)
            model.graph.inputs.remove(value)
            model.graph.register_initializer(value)
    return model


def nodes(inputs: str, lines: Mapping[str, str], constants: str = "", opset: int = 18) -> oir.Model:
    """A graph of one node an output.

    Args:
        inputs: as in ONNX text, such as `float[n, 4] x`.
        lines: what computes an output, by the output as declared: `float[n, 4] y`.
    """
    body = "\n".join(f"{key.split()[-1]} = {line}" for key, line in lines.items())
    return graph(f"g ({inputs}) => ({', '.join(lines)}) {f'<{constants}>' if constants else ''} {{ {body} }}", opset)


def random(*shape: int, seed: int = 0, dtype: object = np.float32) -> np.ndarray:
    """Normal numbers."""
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)  # type: ignore[arg-type]


def bytes_of(*shape: int, seed: int = 0, dtype: object = np.uint8) -> np.ndarray:
    """Integers over the whole range of a dtype."""
    info = ml_dtypes.iinfo(dtype)
    return np.random.default_rng(seed).integers(int(info.min), int(info.max) + 1, size=shape).astype(dtype)  # type: ignore[arg-type]
