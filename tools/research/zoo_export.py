"""Writes a network to ONNX the way each exporter of torch spells it."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from burnish.tools.research.zoo_random import Network

FLAVOURS = {
    "ts": "TorchScript exporter, nothing folded, BatchNorm kept, fused attention operator, opset 17",
    "eager": "TorchScript exporter, nothing folded, attention spelt out, opset 17",
    "dyn": "dynamo exporter, unoptimized, fused attention operator, opset 20",
    "dynp": "dynamo exporter with its optimizer, fused attention operator, opset 20",
    "eager-dynp": "dynamo exporter with its optimizer, attention spelt out, opset 20",
    "dyn23": "dynamo exporter with its optimizer, opset 23: Attention, RMSNormalization and RotaryEmbedding operators",
}


def attention_of(flavour: str) -> str:
    """The attention implementation, "sdpa" or "eager", that a flavour of `FLAVOURS` asks the network for."""
    return "eager" if flavour.startswith("eager") else "sdpa"


def write(network: Network, flavour: str, target: Path) -> None:
    """Export `network` in a flavour of `FLAVOURS` to `target`, one file with the weights inside."""
    if flavour in ("ts", "eager"):
        torchscript(network, target, opset=17)
    else:
        dynamo(network, target, opset=23 if flavour == "dyn23" else 20, optimize=flavour != "dyn")


def torchscript(network: Network, target: Path, opset: int) -> None:
    """Export through TorchScript; `training=PRESERVE` on a module in evaluation mode keeps its BatchNormalization."""
    import torch

    with quiet(), torch.no_grad():
        torch.onnx.export(
            network.module,
            network.inputs,
            str(target),
            input_names=list(network.input_names),
            output_names=list(network.output_names),
            dynamic_axes=network.axes,
            opset_version=opset,
            dynamo=False,
            training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=False,
        )


def dynamo(network: Network, target: Path, opset: int, optimize: bool = True, external_data: bool = False) -> None:
    """Export through torch.export; axes of one name share one `Dim`."""
    import torch

    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            network.module,
            network.inputs,
            input_names=list(network.input_names),
            output_names=list(network.output_names),
            dynamic_shapes=_dynamic_shapes(network),
            opset_version=opset,
            dynamo=True,
            optimize=optimize,
            verbose=False,
        )
        program.save(str(target), external_data=external_data)


def _dynamic_shapes(network: Network) -> tuple[Any, ...]:
    """Axes per parameter of `forward`, the starred ones in a tuple of their own, as torch.export wants them."""
    import inspect

    import torch

    dims: dict[str, Any] = {}
    for name in (axis for axes in network.axes.values() for axis in axes.values()):
        dims.setdefault(name, torch.export.Dim(name, max=4096))
    shapes = [{axis: dims[name] for axis, name in network.axes[key].items()} for key in network.input_names]
    parameters = list(inspect.signature(network.module.forward).parameters.values())
    starred = [parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters]
    if not any(starred):
        return tuple(shapes)
    plain = len(parameters) - 1
    return (*shapes[:plain], tuple(shapes[plain:]))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporters' progress, deprecations and talk of packages that are not needed."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
