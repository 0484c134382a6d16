"""What the tests of the torch bridge share."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import cache

import numpy as np
import onnx_ir as oir
from golden import parse_graph

from burnish.backends.fx.runner import FxRunner, executor
from burnish.backends.ort.session import executor as ort_executor
from burnish.frontends import onnx_file
from burnish.ir.text import text
from burnish.tools.research import fx_cases, node_tests


def model_of(source: str) -> oir.Model:
    """A model from ONNX text, its weights made from their names; two underscores stand for a dot, which text lacks."""
    model = onnx_file.read_bytes(parse_graph(source).SerializeToString())
    for name in [name for name in model.graph.initializers if "__" in name]:
        value = model.graph.initializers.pop(name)
        value.name = name.replace("__", ".")
        model.graph.initializers[value.name] = value
    return model


@cache
def node_cases() -> list[tuple[str, node_tests.Case]]:
    """The onnx package's cases that have expected outputs, with their operators."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [(name, case) for name, case in fx_cases.grouped(node_tests.cases()) if case.group != "light"]


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    """Normal float32 values."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def check(model: oir.Model, feeds: Mapping[str, np.ndarray], *, tolerance: float = 2e-6) -> FxRunner:
    """The outputs are ONNX Runtime's, in dtype, shape and value."""
    reference = ort_executor(level="off")(model)
    runner = executor()(model)
    wanted, found = reference.run(feeds), runner.run(feeds)
    assert list(wanted) == list(found)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape, name
        if array.dtype.kind == "f":
            scale = max(float(np.abs(array).max(initial=0.0)), 1e-6)
            np.testing.assert_allclose(found[name] / scale, array / scale, atol=tolerance, rtol=0)
        else:
            np.testing.assert_array_equal(found[name], array)
    return runner


def saved(model: oir.Model) -> bytes:
    """The bytes of the file."""
    return oir.serde.serialize_model(model).SerializeToString(deterministic=True)


def bytes_of(model: oir.Model) -> dict[str, bytes]:
    """What the initializers hold."""
    return {name: value.const_value.numpy().tobytes() for name, value in model.graph.initializers.items()}


def structure(model: oir.Model) -> str:
    """The text of a model without what its weights hold."""
    return "\n".join(line for line in text(model).splitlines() if " = weight " not in line)
