"""Operators at every opset that changed them, and in forms that the onnx package's tests leave out, as ONNX Runtime."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as oir
import pytest

from burnish.backends.reference.runner import ReferenceRunner
from burnish.ir.errors import InputError
from burnish.passes import verify
from burnish.tools.research import fx_cases, node_tests

FORMS = Path(__file__).parent / "operator_forms.txt"


def forms() -> Iterator[tuple[int, str, str, str]]:
    """Opset, inputs, weights and nodes of every model."""
    for line in FORMS.read_text().splitlines():
        if not line.startswith("#"):
            opsets, *parts = (part.strip() for part in line.split("|"))
            for opset in opsets.split():
                yield int(opset), *parts


def model_of(opset: int, inputs: str, weights: str, nodes: str) -> onnx.ModelProto:
    """The model whose outputs are all values that no node reads."""
    made = re.findall(r"(?:^|  )([\w, ]+?) = ", nodes)
    read = {name.strip() for group in re.findall(r"\(([^)]*)\)", nodes) for name in group.split(",")}
    outputs = [name for group in made for name in group.split(", ") if name not in read]
    blank = re.findall(r"float\[([1-9][\d,]*)\] (\w+) = \{\}", weights)
    each = re.split(r", (?=(?:u?int|float|bool|double))", weights)
    held = ", ".join(one for one in each if not re.search(r"\[[1-9].*\{\}", one))
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": {opset}]> g ({inputs}) => ({", ".join(f"float[] {o}" for o in outputs)})'
        f" {f'<{held}>' if held else ''} {{ {nodes} }}"
    )
    for dims, name in blank:
        array = np.random.default_rng(7).standard_normal([int(d) for d in dims.split(",")]).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    for value in model.graph.output:
        value.ClearField("type")
    return onnx.shape_inference.infer_shapes(model)


def feeds_of(model: onnx.ModelProto) -> list[np.ndarray]:
    """Made inputs: normal floats, small integers."""
    random, made = np.random.default_rng(3), []
    for value in model.graph.input:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))
        array: Any = random.standard_normal(shape) if dtype.kind == "f" else random.integers(-4, 4, shape)
        if dtype.kind in "ub":
            array = random.integers(0, 2 if dtype.kind == "b" else 9, shape)
        made.append(np.asarray(array).astype(dtype))
    return made


def fed(model: onnx.ModelProto, feeds: list[np.ndarray]) -> tuple[onnx.ModelProto, list[np.ndarray]]:
    """The model with its weights as inputs."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    arrays = [onnx.numpy_helper.to_array(held) for held in copy.graph.initializer]
    for held in copy.graph.initializer:
        copy.graph.input.append(onnx.helper.make_tensor_value_info(held.name, held.data_type, list(held.dims)))
    del copy.graph.initializer[:]
    return copy, [*feeds, *arrays]


def test_every_form_is_as_onnx_runtime() -> None:
    wrong: list[tuple[Any, ...]] = []
    compared = 0
    for opset, *parts in forms():
        model = model_of(opset, *parts)
        feeds = feeds_of(model)
        for i, (one, inputs) in enumerate(((model, feeds), fed(model, feeds))):
            try:
                expected = node_tests.run(one, inputs, "ORT_DISABLE_ALL")
            except Exception:
                if not i:
                    wrong.append((opset, parts[-1], "ONNX Runtime refuses it"))
                continue
            compared += 1
            verdict = fx_cases.judge(node_tests.Case(parts[-1], "forms", one, inputs), expected)
            if verdict.word != fx_cases.RIGHT:
                wrong.append((opset, parts[-1], "fed" if i else "held", verdict))
    assert wrong == []
    assert compared > 800


def test_the_float64_interpreter_gives_the_same_or_refuses() -> None:
    wrong, refused = [], set()
    for opset, *parts in forms():
        model = model_of(opset, *parts)
        feeds = feeds_of(model)
        expected = node_tests.run(model, feeds, "ORT_DISABLE_ALL")
        try:
            named = dict(zip((value.name for value in model.graph.input), feeds, strict=True))
            found = ReferenceRunner(oir.from_proto(model)).run(named)
        except InputError:
            refused.add(model.graph.node[0].op_type)
            continue
        for name, wanted in zip(found, expected, strict=True):
            wide = wanted.astype(np.float64) if wanted.dtype.kind == "f" else wanted
            room = {"float16": 4e-3}.get(wanted.dtype.name, 1e-5)
            if found[name].shape != wide.shape or verify.relative_error(found[name], wide) > room:
                wrong.append((opset, parts[-1], name))
    assert wrong == []
    assert refused <= {"GlobalLpPool", "GridSample", "LpPool", "NonMaxSuppression", "RoiAlign"}


@pytest.mark.parametrize("opset", [9, 13, 21])
def test_forms_are_read_as_they_are_written(opset: int) -> None:
    model = model_of(opset, "float[1,4,5] x", "float[2,4,3] w = {}, float[2] b = {1,2}", "y = Conv (x, w, b)")
    assert [held.name for held in model.graph.initializer] == ["b", "w"]
    assert [value.name for value in model.graph.output] == ["y"]
