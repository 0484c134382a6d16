"""Real changes of torch modules, exported by both exporters: `check` names each where it is."""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Callable

import onnx
import onnx_ir as oir
import pytest
from block_networks import WIDTH, Encoder, built, exported, torch

from burnish.tools.check.check import check
from burnish.tools.check.difference import Verdict
from burnish.tools.check.lock import Lock
from burnish.tools.check.take import take
from burnish.tools.research.respelling import respelled

nn = torch.nn
NAMES = ("ids", "mask")
AXES = {name: {0: "batch", 1: "seq"} for name in (*NAMES, "logits")}
Change = Callable[[Encoder], None]


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Word ids and a mask, int64[2,6]."""
    return torch.zeros(2, 6, dtype=torch.int64), torch.ones(2, 6, dtype=torch.int64)


def encoder(change: Change | None = None) -> Encoder:
    """An encoder of three layers with the parameters of a seed, then changed."""
    made: Encoder = built(Encoder("pre", 3))
    if change is not None:
        change(made)
    return made.eval()


def scripted(change: Change | None = None) -> oir.Model:
    """What the TorchScript exporter makes of it."""
    return exported(encoder(change), inputs(), NAMES, ("logits",), AXES)


def traced(change: Change | None = None) -> oir.Model:
    """What the exporter of torch.export makes of it."""
    batch, seq = torch.export.Dim("batch"), torch.export.Dim("seq")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            encoder(change), inputs(), dynamo=True, opset_version=18, input_names=list(NAMES),
            output_names=["logits"], dynamic_shapes={name: {0: batch, 1: seq} for name in NAMES}, verbose=False,
        )  # fmt: skip
    return oir.serde.deserialize_model(program.model_proto)


def said(new: oir.Model, lock: Lock, verdict: Verdict = Verdict.REGRESSION) -> list[str]:
    """What check says."""
    return [one.message for one in check(new, lock).differences if one.verdict is verdict]


def swap_activation(module: Encoder) -> None:
    """Gelu becomes Relu in all layers."""
    for block in module.blocks:
        block.mlp[1] = nn.ReLU()


def swap_one(module: Encoder) -> None:
    """Gelu becomes its approximation in one layer."""
    module.blocks[1].mlp[1] = nn.GELU(approximate="tanh")


def change_eps(module: Encoder) -> None:
    """The epsilon of one norm of the last layer."""
    module.blocks[2].norms[0].eps = 1e-6


def perturb(module: Encoder) -> None:
    """The weights of one layer move by a thousandth."""
    weight = module.blocks[1].attention.q.weight
    with torch.no_grad():
        torch.manual_seed(3)
        weight.add_(torch.randn_like(weight) * 1e-3 * weight.norm() / weight.numel() ** 0.5)


def retrain(module: Encoder) -> None:
    """All weights move."""
    torch.manual_seed(4)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(torch.randn_like(weight) * 0.1 * weight.norm() / weight.numel() ** 0.5)


def add_linear(module: Encoder) -> None:
    """One more layer in the head."""
    first = built(nn.Linear(WIDTH, WIDTH))
    module.head = nn.Sequential(first, module.head)


def add_block(module: Encoder) -> None:
    """The last layer comes a second time, with weights of its own."""
    last = built(Encoder("pre", 1)).blocks[0]
    with torch.no_grad():
        for weight in last.parameters():
            weight.mul_(1.1)
    module.blocks.append(last)


def drop_block(module: Encoder) -> None:
    """The layer in the middle goes."""
    del module.blocks[1]


CHANGES = {
    swap_activation: ["in blocks 0 to 2, Gelu (5 nodes: Div, Erf, Add, Mul, Mul) is now one Relu"],
    change_eps: ["`epsilon` of LayerNormalization `NAME` (block 2) is now 1e-06, was 1e-05"],
    perturb: ["the weights of MatMul `NAME` (block 1) moved by about 7e-4 of their norm"],
    add_linear: ["one Linear layer added in `after block 2`: MatMul(float[16,16]), Add(float[16])"],
    add_block: ["block 3 is new, like block 2"],
    drop_block: ["block 1 is gone"],
}


@pytest.fixture(scope="module")
def lock() -> Lock:
    """Of the model as TorchScript exports it."""
    return take(scripted())


def nameless(sentences: list[str]) -> list[str]:
    """Sentences with `NAME` for names of nodes, which are the exporter's affair."""
    return [re.sub(r"`(/|node_)[^`]*`", "`NAME`", one) for one in sentences]


@pytest.mark.parametrize("change", CHANGES, ids=lambda one: str(one.__name__))
def test_changes_are_named(change: Change, lock: Lock) -> None:
    assert nameless(said(scripted(change), lock)) == CHANGES[change]


@pytest.mark.parametrize("change", [change_eps, swap_activation, drop_block], ids=lambda one: str(one.__name__))
def test_names_and_order_do_not_count_beside_a_change(change: Change, lock: Lock) -> None:
    proto = oir.serde.serialize_model(scripted(change))
    for seed in range(3):
        found = said(oir.serde.deserialize_model(respelled(proto, seed, swap=True)), lock)
        assert [re.sub(r"`[^`]*` \(", "`NAME` (", one) for one in found] == CHANGES[change]


def test_the_other_exporter_is_named_as_well() -> None:
    found = said(traced(swap_activation), take(traced()))
    assert found == CHANGES[swap_activation]


def test_many_layers_are_one_sentence(lock: Lock) -> None:
    (sentence,) = said(scripted(retrain), lock)
    assert sentence.startswith("all weights changed (retrained?): 47 of 47 layers, by about 0.1 of their norm in the ")


def test_a_mask_of_another_dtype_is_one_regression(lock: Lock) -> None:
    ids, mask = inputs()
    new = exported(encoder(), (ids, mask.float()), NAMES, ("logits",), AXES)
    assert said(new, lock) == ["input `mask` is now float, was int64"]


def test_a_lost_dimension_is_one_regression(lock: Lock) -> None:
    lost = {name: {1: "seq"} for name in AXES}
    new = exported(encoder(), inputs(), NAMES, ("logits",), lost)
    assert said(new, lock) == ["inputs `ids` and `mask`: dimension `batch` is now fixed at 2"]
    assert "outputs: dimension" not in said(new, lock, Verdict.NOTE)


def test_an_older_opset_spells_norms_out(lock: Lock) -> None:
    new = exported(encoder(), inputs(), NAMES, ("logits",), AXES, opset=16)
    assert said(new, lock) == [
        "opset 17 -> 16",
        "in `before block 0`, blocks 0 to 2 and `after block 2`, LayerNormalization is now 9 decomposed nodes "
        "(ReduceMean, Sub, Pow, ReduceMean, Add, Sqrt, ...), 8 times",
    ]


def test_training_mode_is_named() -> None:
    class Net(nn.Module):
        """A convolution, a norm, dropout."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.drop = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.drop(torch.relu(self.norm(self.conv(x))))

    def model(*, training: bool) -> oir.Model:
        file, kind = io.BytesIO(), torch.onnx.TrainingMode
        module = built(Net())
        module.train(training)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module, (torch.ones(1, 3, 8, 8),), file, dynamo=False, input_names=["x"], output_names=["y"],
                do_constant_folding=False,
                training=kind.TRAINING if training else kind.EVAL,
            )  # fmt: skip
        return oir.serde.deserialize_model(onnx.load_from_string(file.getvalue()))

    assert nameless(said(model(training=True), take(model(training=False))))[:2] == [
        "BatchNormalization `NAME` (graph) is now in training mode",
        "Dropout `NAME` (graph) is now in training mode",
    ]
