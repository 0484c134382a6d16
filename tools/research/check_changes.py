"""Real changes of exported models that `check` must name: `check_cases` runs them.

The models are exported by torch as they stand here, before and after the change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from burnish.tools.check.tolerances import Tolerances
from burnish.tools.research import zoo_export
from burnish.tools.research.check_models import network
from burnish.tools.research.zoo_random import Network

Writer = Callable[[Path], object]


@dataclass(frozen=True)
class Case:
    """A change of a model.

    Attributes:
        title: what was changed, as a person would say it.
        old, new: write the model before and after to a file.
        says: words that must all be in one regression; none when there must be no regression.
        slow: not part of the quick run.
        tolerances: what may differ.
        with_old: give the old model to `check` as well.
    """

    title: str
    old: Writer
    new: Writer
    says: tuple[str, ...] = ()
    slow: bool = False
    tolerances: Tolerances = field(default_factory=Tolerances)
    with_old: bool = False


def exported(build: Callable[[], Network], opset: int = 17, dynamo: bool = False, **options: Any) -> Writer:
    """What writes a network with an exporter of torch; `options` are those of `zoo_export`."""
    return partial(_export, build, opset, dynamo, options)


def _export(build: Callable[[], Network], opset: int, dynamo: bool, options: dict[str, Any], target: Path) -> None:
    if dynamo:
        zoo_export.dynamo(build(), target, opset, **options)
    else:
        zoo_export.torchscript(build(), target, opset)


def trained(build: Callable[[], Network]) -> Writer:
    """What writes a network that was left in training mode."""

    def write(target: Path) -> None:
        import torch

        one = build()
        one.module.train()
        with zoo_export.quiet():
            torch.onnx.export(
                one.module,
                one.inputs,
                str(target),
                input_names=list(one.input_names),
                output_names=list(one.output_names),
                dynamic_axes=one.axes,
                opset_version=17,
                dynamo=False,
                training=torch.onnx.TrainingMode.TRAINING,
                do_constant_folding=False,
            )

    return write


def edited(source: Writer, edit: Callable[[onnx.ModelProto], object]) -> Writer:
    """What writes a model with an edit of its message."""

    def write(target: Path) -> None:
        source(target)
        proto = onnx.load(target)
        edit(proto)
        onnx.save(proto, target)

    return write


def text() -> Network:
    """The BERT-like network as it is."""
    return network("text")


def image() -> Network:
    """The vision transformer as it is."""
    return network("image")


def resnet() -> Network:
    """The residual convolutional network as it is."""
    return network("resnet")


def changed(kind: str, edit: Callable[[Any], object]) -> Callable[[], Network]:
    """A network with an edit of its module."""
    return partial(network, kind, edit)


def _nudge(parameter: Any) -> None:
    """Change a weight by 1e-3 of its norm."""
    import torch

    noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        parameter += noise * (1e-3 * parameter.norm() / noise.norm())


def _swap(module: Any) -> None:
    one = module.layers[1].attention
    one.q, one.k = one.k, one.q


def _float_mask() -> Network:
    import torch

    one = text()
    ids, mask = one.inputs
    return Network(one.module, (ids, mask.to(torch.float32)), one.input_names, one.output_names, one.axes)


def _without(build: Callable[[], Network], name: str, axis: int) -> Callable[[], Network]:
    """A network without a dynamic axis of an input and of the outputs."""

    def found() -> Network:
        one = build()
        kept = {key: {at: label for at, label in axes.items() if at != axis} for key, axes in one.axes.items()}
        return Network(one.module, one.inputs, one.input_names, one.output_names, kept)

    return found


def _two_outputs() -> Network:
    one = text()
    one.module.hidden = True
    return Network(one.module, one.inputs, one.input_names, ("logits", "states"), one.axes)


def _renamed() -> Network:
    one = image()
    return Network(one.module, one.inputs, ("pixels",), one.output_names, {**one.axes, "pixels": {0: "batch"}})


def _dropout(dropout: float = 0.1) -> Network:
    return network("text", dropout=dropout)


def _set(path: str, **values: object) -> Callable[[Any], None]:
    """An edit that sets attributes of the part of a module at `path`."""

    def edit(module: Any) -> None:
        part = module.get_submodule(path)
        for name, value in values.items():
            setattr(part, name, value)

    return edit


def _activation(name: str) -> Any:
    import torch

    return getattr(torch.nn.functional, name)


def _tie(proto: onnx.ModelProto) -> None:
    """Store the weights of the first linear layer a second time, unread."""
    largest = max(proto.graph.initializer, key=lambda one: len(one.raw_data))
    copy = proto.graph.initializer.add()
    copy.CopyFrom(largest)
    copy.name = "kept_by_mistake"


def _no_change(proto: onnx.ModelProto) -> None:
    from burnish.tools.research.respelling import respelled

    proto.CopyFrom(respelled(proto, 11, swap=True))


def _scale(proto: onnx.ModelProto) -> None:
    """Set the scale of the attention scores of the second layer to half."""
    scaled = [node for node in proto.graph.node if node.op_type == "Mul" and "layers.1/attention" in node.name]
    made = {name: node for node in proto.graph.node for name in node.output}
    (constant,) = [made[name] for name in scaled[0].input if name in made and made[name].op_type == "Constant"]
    tensor = constant.attribute[0].t
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) / np.float32(2)))


def cases() -> dict[str, list[Case]]:
    """The cases by part of the page."""
    return {
        "The same network, exported in another way": _exporters(),
        "One thing changed": [*_changes(), *_contract()],
        "Nothing changed": _same(),
    }


def _exporters() -> list[Case]:
    ways = {
        "TorchScript at opset 14 instead of 17": partial(exported, opset=14),
        "TorchScript at opset 18 instead of 17": partial(exported, opset=18),
        "dynamo at opset 18 instead of TorchScript at 17": partial(exported, opset=18, dynamo=True),
        "dynamo, not optimized, instead of TorchScript": partial(exported, opset=18, dynamo=True, optimize=False),
    }
    found = []
    for name, build in (("text encoder", text), ("image encoder", image), ("ResNet", resnet)):
        for way, write in ways.items():
            says = ("opset",)
            found.append(Case(f"{name}: {way}", exported(build), write(build), says, slow="dynamo" in way))
    return found


def _changes() -> list[Case]:
    old, picture, cnn = exported(text), exported(image), exported(resnet)
    gelu = _activation("relu")
    return [
        Case("text: a layer more", old, exported(partial(network, "text", layers=5)), ("block 4", "new")),
        Case("text: a layer less", old, exported(partial(network, "text", layers=3)), ("block 3",)),
        Case(
            "image: a layer more, dynamo",
            exported(image, 18, True),
            exported(partial(network, "image", layers=4), 18, True),
            ("block 3",),
            slow=True,
        ),
        Case(
            "text: Relu instead of Gelu in layer 1",
            old,
            exported(changed("text", _set("layers.1", activation=gelu))),
            ("block 1", "Relu"),
        ),
        Case(
            "image: Silu instead of Gelu in layer 2",
            picture,
            exported(changed("image", _set("layers.2", activation=_activation("silu")))),
            ("block 2", "Gelu"),
        ),
        Case(
            "text: the epsilon of a norm of layer 2 is 1e-6",
            old,
            exported(changed("text", _set("layers.2.norm2", eps=1e-6))),
            ("block 2", "epsilon", "1e-06"),
        ),
        Case(
            "text, opset 14: the epsilon of a norm of layer 2 is 1e-6",
            exported(text, 14),
            exported(changed("text", _set("layers.2.norm2", eps=1e-6)), 14),
            ("block 2", "epsilon", "1e-06"),
        ),
        Case(
            "ResNet: the epsilon of a BatchNorm is 1e-6",
            cnn,
            exported(changed("resnet", _set("blocks.1.second.1", eps=1e-6))),
            ("block 1", "epsilon", "1e-06"),
        ),
        Case(
            "text: a weight of layer 1 moved by 1e-3",
            old,
            exported(changed("text", lambda one: _nudge(one.layers[1].up.weight))),
            ("block 1", "/up/"),
        ),
        Case(
            "text: the same with the old model at hand",
            old,
            exported(changed("text", lambda one: _nudge(one.layers[1].up.weight))),
            ("block 1", "/up/"),
            with_old=True,
        ),
        Case(
            "ResNet: a weight of block 2 moved by 1e-3",
            cnn,
            exported(changed("resnet", lambda one: _nudge(one.blocks[2].first[0].weight))),
            ("block 2", "Conv"),
        ),
        Case("text: queries and keys of layer 1 exchanged", old, exported(changed("text", _swap)), ("block 1",)),
        Case("text: half the scale of the scores in layer 1", old, edited(old, _scale), ("block 1",)),
        Case(
            "text: layer 3 hides later tokens",
            old,
            exported(changed("text", _set("layers.3.attention", causal=True))),
            ("block 3",),
        ),
        Case(
            "text: layer 0 takes the softmax over the queries",
            old,
            exported(changed("text", _set("layers.0.attention", axis=-2))),
            ("block 0", "axis"),
        ),
        Case("text: left in training mode", exported(_dropout), trained(_dropout), ("Dropout", "training")),
        Case("ResNet: BatchNorm left in training mode", cnn, trained(resnet), ("BatchNormalization", "training")),
    ]


def _contract() -> list[Case]:
    old, picture = exported(text), exported(image)
    return [
        Case("text: the mask is float", old, exported(_float_mask), ("mask", "float")),
        Case("image: the batch is fixed", picture, exported(_without(image, "image", 0)), ("image", "batch")),
        Case("text: the length is fixed", old, exported(_without(text, "ids", 1)), ("length",)),
        Case("text: one output more", old, exported(_two_outputs), ("states",)),
        Case("text: one output less", exported(_two_outputs), old, ("states",)),
        Case("image: the input has another name", picture, exported(_renamed), ("pixels",)),
        Case("text: three classes instead of five", old, exported(partial(network, "text", labels=3)), ("logits", "3")),
        Case("text: weights stored twice", old, edited(old, _tie), ("parameters", "more")),
    ]


def _same() -> list[Case]:
    return [
        Case(f"{name}: exported again, other names and order", exported(build), edited(exported(build), _no_change))
        for name, build in (("text", text), ("image", image), ("ResNet", resnet))
    ]
