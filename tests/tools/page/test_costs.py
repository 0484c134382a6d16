"""What the parts of a model cost adds up to what the model costs."""

from pathlib import Path

import pytest

import burnish
from burnish.tools.page.costs import costs

DEMO = Path(burnish.tools.__file__).parent / "demo"


@pytest.mark.parametrize("file", ["digits_vit.onnx", "digits_resnet.onnx"])
@pytest.mark.parametrize("rewritten", [False, True])
def test_parts_add_up_to_the_whole(file, rewritten):
    model = burnish.load(DEMO / file)
    if rewritten:
        model = burnish.optimize(model, verify="off").model
    found = costs(model, {"batch": 3})
    assert found.macs is not None and found.blocks == 3
    assert sum(part.macs or 0 for part in found.parts) == found.macs
    assert sum(part.nodes for part in found.parts) == found.nodes - found.operators.get("Constant", 0)
    assert sum(part.bytes for part in found.parts) == found.bytes
    assert [part.name for part in found.parts] == [segment.name for segment in found.segments]


def test_what_cannot_be_counted_is_unknown():
    found = costs(burnish.load(DEMO / "digits_vit.onnx"), {})
    assert found.macs is None and None in [part.macs for part in found.parts]
    assert found.bytes > 0
