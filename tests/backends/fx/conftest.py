"""The transformer of the digits and its samples, which most tests of healing train on."""

from __future__ import annotations

import onnx_ir as oir
import pytest
from healing_checks import digits, digits_vit, without

from burnish.ir.samples import Sample


@pytest.fixture(scope="module")
def vit() -> oir.Model:
    """The vision transformer of the digits, with a name for every node."""
    return digits_vit()


@pytest.fixture(scope="module")
def short(vit: oir.Model) -> oir.Model:
    """The transformer without its second block."""
    return without(vit, 1)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    """One sample of 160 labelled digits."""
    return digits()
