"""The file `genai_config.json` beside a model for onnxruntime-genai, after layers of the model went."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as oir

from burnish.ir.errors import InputError
from burnish.passes.depth_blocks import STATES

NAME = "genai_config.json"


def updated(path: Path, before: oir.Model, after: oir.Model) -> str | None:
    """The content that the file should have beside `after`: the number of layers, and which have a sliding window.

    Everything else stays as it is, in its order.

    Args:
        path: the file beside `before`; only read.
        before: the model that the file describes.
        after: what was made of it, with the notes of the passes that take layers out.

    Returns:
        The text to write; None where the layers are the same.

    Raises:
        InputError: the file is no such configuration, or it speaks of other layers than `before` has.
    """
    if after.metadata_props.get(STATES) == before.metadata_props.get(STATES):
        return None
    numbers: list[int] = json.loads(after.metadata_props[STATES])
    earlier = json.loads(before.metadata_props.get(STATES, "null"))
    layers = numbers if earlier is None else [earlier.index(number) for number in numbers]
    config = _read(path)
    decoder = config["model"]["decoder"]
    if decoder["num_hidden_layers"] <= max(layers, default=-1):
        raise InputError(
            f"it speaks of {decoder['num_hidden_layers']} layers, the model has more with a cache", place=str(path)
        )
    decoder["num_hidden_layers"] = len(layers)
    window = decoder.get("sliding_window")
    if isinstance(window, dict) and isinstance(window.get("layers"), list):
        window["layers"] = [new for new, old in enumerate(layers) if old in window["layers"]]
    return json.dumps(config, indent=4, ensure_ascii=False) + "\n"


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"it cannot be read: {error}", place=str(path)) from error
    found: Any = config
    for key in ("model", "decoder", "num_hidden_layers"):
        found = found.get(key) if isinstance(found, Mapping) else None
    if not isinstance(found, int):
        raise InputError("it says nothing of `model.decoder.num_hidden_layers`", place=str(path))
    return dict(config)


def write_beside(text: str, config: Path, model: Path) -> Path:
    """Write an updated configuration beside a written model, whole or not at all; the original's is never replaced.

    Args:
        text: what `updated` gave.
        config: the configuration of the original.
        model: the written model.

    Returns:
        The file: `genai_config.json`, or with the model's name before it where the original lies in the same folder.
    """
    target = model.parent / NAME
    if target.exists() and config.exists() and target.samefile(config):
        target = model.with_suffix(f".{NAME}")
    partial = target.with_name(f".burnish-{target.name}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"it cannot be written: {error.strerror}", place=str(target)) from error
    return target
