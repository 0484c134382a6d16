"""No operator mixes devices: modules run on tensors of a device without a kernel of its own, which only shapes pass."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import onnx_ir as oir
import pytest
import torch
from fx_checks import node_cases
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from burnish.backends.fx.builder import to_graph_module
from burnish.tools.research import fx_cases, node_tests

DEVICE = "lazy"
"""One of torch's device types; any but the CPU's would do, but most need a build of torch that knows them."""
ON_HOST = ("Shape", "Size", "OptionalHasElement", "SequenceInsert", "SequenceMap", "SplitToSequence")
"""What these give in some cases are sizes, integer constants or truths, which move when they meet a tensor."""


def _moved(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_moved(one) for one in value)
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty(value.shape, dtype=value.dtype, device=DEVICE)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, tuple | list):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, torch.Tensor):
        yield value


def _places(case: node_tests.Case) -> set[str] | None:
    """The devices of the outputs; None when they depend on what the inputs hold."""
    module = to_graph_module(oir.from_proto(case.model), fallback=False)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        for part in module.modules():
            for name, weight in list(part.named_parameters(recurse=False)):
                setattr(part, name, torch.nn.Parameter(_moved(weight), requires_grad=False))
            for name, buffer in list(part.named_buffers(recurse=False)):
                setattr(part, name, _moved(buffer))
        given = [_moved(fx_cases.given(array)) for array in case.inputs]
        count = sum(1 for node in module.graph.nodes if node.op == "placeholder")
        try:
            return {one.device.type for one in _tensors(module(*given[:count]))}
        except (DataDependentOutputException, DynamicOutputShapeException):
            return None


def _check(stride: int) -> int:
    """Run every case of a stride, its inputs fed and as constants; how many are on the device entirely."""
    checked, wrong = 0, []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, case in node_cases()[::stride]:
            if fx_cases.judge(case, None).word != fx_cases.RIGHT:
                continue
            for one in (case, node_tests.with_constants(case)):
                try:
                    found = _places(one)
                except Exception as error:
                    wrong.append((case.name, f"{type(error).__name__}: {str(error).splitlines()[0]}"))
                    continue
                reads = any(True for array in one.inputs for _ in _tensors(fx_cases.given(array)))
                if found is not None and found <= {DEVICE}:
                    checked += 1
                elif found is not None and name not in ON_HOST and reads:
                    wrong.append((case.name, f"outputs on {found}"))
    assert wrong == []
    return checked


def test_no_case_of_a_sample_mixes_devices() -> None:
    assert _check(16) > 150


@pytest.mark.slow
def test_no_case_mixes_devices() -> None:
    assert _check(1) > 3000
