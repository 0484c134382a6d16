"""Write a 2.5 GiB model with external data, then measure reading and writing it.

`python -m burnish.tools.research.big_model FOLDER` makes `FOLDER/big.onnx` (40 MatMul of 4096 x 4096 float32, 40 Tanh,
41 Identity), reads it, writes it again and prints CPU seconds and peak memory; `--keep` leaves the files there.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnx_ir as oir

from burnish.backends import onnx_writer
from burnish.frontends import onnx_file

T = TypeVar("T")

LAYERS, WIDTH = 40, 4096


def build(layers: int = LAYERS, width: int = WIDTH) -> oir.Model:
    """The model, its weights made one by one while they are written."""

    def value(name: str) -> oir.Value:
        return oir.Value(name=name, type=oir.TensorType(oir.DataType.FLOAT), shape=oir.Shape(["batch", width]))

    def weight(layer: int) -> oir.Value:
        def make() -> oir.TensorProtocol:
            array = np.random.default_rng(layer).standard_normal((width, width), np.float32)
            return oir.tensor(array / np.float32(np.sqrt(width)))

        shape, name = oir.Shape([width, width]), f"w{layer}"
        tensor = oir.LazyTensor(make, oir.DataType.FLOAT, shape, name=name)
        return oir.Value(name=name, type=oir.TensorType(oir.DataType.FLOAT), shape=shape, const_value=tensor)

    source = x = value("x")
    weights = [weight(layer) for layer in range(layers)]
    nodes: list[oir.Node] = []

    def add(op_type: str, *inputs: oir.Value) -> oir.Value:
        output = value(f"v{len(nodes)}")
        nodes.append(oir.Node("", op_type, inputs, outputs=[output], name=f"{op_type}_{len(nodes)}"))
        return output

    for layer in range(layers):
        x = add("Tanh", add("MatMul", add("Identity", x), weights[layer]))
    output = add("Identity", x)
    graph = oir.Graph([source], [output], nodes=nodes, initializers=weights, opset_imports={"": 20}, name="big")
    return oir.Model(graph, ir_version=10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--keep", action="store_true", help="leave the files in FOLDER")
    options = parser.parse_args()
    source, copy = options.folder / "big.onnx", options.folder / "copy.onnx"
    if not source.exists():
        _measured("build", lambda: onnx_writer.write(build(), source))
    model = _measured("read", lambda: onnx_file.read(source))
    written = _measured("write", lambda: onnx_writer.write(model, copy))
    _measured("fingerprint", lambda: onnx_file.fingerprint(source))
    if not options.keep:
        for file in [*written, source, source.with_name("big.onnx.data")]:
            file.unlink()


def _measured(name: str, work: Callable[[], T]) -> T:
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{name:12} {wall:7.2f} s wall {cpu:7.2f} s CPU {peak:7.0f} MiB peak so far")
    return result


if __name__ == "__main__":
    main()
