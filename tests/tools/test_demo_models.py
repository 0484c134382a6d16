"""The embedded digit classifiers are what the demo says they are."""

from pathlib import Path

import numpy as np
import onnx
import pytest

DEMO = Path(__file__).resolve().parents[2] / "tools" / "demo"


@pytest.mark.parametrize(("name", "least"), [("digits_resnet", 0.99), ("digits_vit", 0.95)])
def test_reads_the_held_out_digits(name: str, least: float) -> None:
    import onnxruntime

    with np.load(DEMO / "digits.npz") as data:
        image, label = data["image"], data["label"]
    session = onnxruntime.InferenceSession(DEMO / f"{name}.onnx", providers=["CPUExecutionProvider"])
    [logits] = session.run(["logits"], {"image": image})
    assert logits.shape == (500, 10)
    assert (logits.argmax(1) == label).mean() >= least


def test_residual_net_keeps_its_batch_norms() -> None:
    operators = [node.op_type for node in onnx.load(DEMO / "digits_resnet.onnx").graph.node]
    assert operators.count("BatchNormalization") == operators.count("Conv") == 9


def test_fits_in_a_wheel() -> None:
    assert sum(file.stat().st_size for file in DEMO.iterdir()) < 1_000_000
