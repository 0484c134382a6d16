"""What each ONNX operator is in Relax: importing this package fills the table of `burnish.backends.tvm.registry`."""

from burnish.backends.tvm.operators import attention, elementwise, indexing, movement, network, norm, reduce

__all__ = ["attention", "elementwise", "indexing", "movement", "network", "norm", "reduce"]
