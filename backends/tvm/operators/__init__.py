"""What each ONNX operator is in Relax: importing this package fills the table of `burnish.backends.tvm.registry`."""

from burnish.backends.tvm.operators import (
    activation,
    attention,
    blockwise,
    casting,
    elementwise,
    indexing,
    movement,
    network,
    norm,
    pooling,
    quantized,
    recurrent,
    reduce,
    resize,
    rotary,
)

__all__ = [
    "activation",
    "attention",
    "blockwise",
    "casting",
    "elementwise",
    "indexing",
    "movement",
    "network",
    "norm",
    "pooling",
    "quantized",
    "recurrent",
    "reduce",
    "resize",
    "rotary",
]
