"""A check of a pair of models whose process ends when the model is called so."""

from __future__ import annotations

import os

from burnish.tools.check.matrix import Options, Row, State


def work(name: str, old: str, new: str, options: Options) -> Row:
    """A fine row; the process ends for `dies.onnx`."""
    if name == "dies.onnx":
        os._exit(1)
    return Row(name, State.FINE)
