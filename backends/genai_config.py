"""The file `genai_config.json` beside a model for onnxruntime-genai, after layers or heads of the model went."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as oir

from burnish.ir.errors import InputError
from burnish.passes.depth_blocks import STATES
from burnish.passes.kv_pooling import HEADS

NAME = "genai_config.json"


def updated(path: Path, before: oir.Model, after: oir.Model) -> str | None:
    """The content that the file should have beside `after`: the number of layers, which have a sliding window, heads.

    Everything else stays as it is, in its order. Where layers have different numbers of heads of keys and values, the
    file tells the largest; the shapes of the caches tell that of each.

    Args:
        path: the file beside `before`; only read.
        before: the model that the file describes.
        after: what was made of it, with the notes of the passes that take layers out.

    Returns:
        The text to write; None where layers and heads are the same.

    Raises:
        InputError: the file is no such configuration, or it speaks of other layers than `before` has.
    """
    if all(after.metadata_props.get(key) == before.metadata_props.get(key) for key in (STATES, HEADS)):
        return None
    config = _read(path)
    decoder = config["model"]["decoder"]
    count = decoder["num_hidden_layers"]
    earlier: list[int] = json.loads(before.metadata_props.get(STATES, json.dumps([*range(count)])))
    left: list[int] = json.loads(after.metadata_props.get(STATES, json.dumps(earlier)))
    unnamed = STATES not in before.metadata_props
    layers = [number if unnamed else earlier.index(number) for number in left]
    if count <= max(layers, default=-1):
        raise InputError(f"it speaks of {count} layers, the model has more with a cache", place=str(path))
    decoder["num_hidden_layers"] = len(layers)
    window = decoder.get("sliding_window")
    if isinstance(window, dict) and isinstance(window.get("layers"), list):
        window["layers"] = [new for new, old in enumerate(layers) if old in window["layers"]]
    if HEADS in after.metadata_props and isinstance(decoder.get("num_key_value_heads"), int):
        heads: dict[str, int] = json.loads(after.metadata_props[HEADS])
        decoder["num_key_value_heads"] = max(
            (heads.get(str(number), decoder["num_key_value_heads"]) for number in left), default=0
        )
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


@dataclass(frozen=True)
class Staged:
    """A configuration that is written, but not yet under its name."""

    path: Path
    target: Path

    def commit(self) -> list[Path]:
        """Give the file its name.

        Raises:
            InputError: it cannot be moved.
        """
        try:
            self.path.replace(self.target)
        except OSError as error:
            raise _write_error(error, self.target) from error
        return [self.target]


@contextmanager
def staged(text: str, config: Path, model: Path) -> Iterator[Staged]:
    """Write an updated configuration aside, to be moved beside a model by `commit`; the original is never replaced.

    The file is `genai_config.json`, or with the model's name before it where the original lies in the same folder.

    Args:
        text: what `updated` gave.
        config: the configuration of the original.
        model: the model that is to be written.

    Raises:
        InputError: it cannot be written; nothing is left behind then.
    """
    target = model.parent / NAME
    if target.exists() and config.exists() and target.samefile(config):
        target = model.with_suffix(f".{NAME}")
    if target.is_dir():
        raise InputError("it is a folder", place=str(target), hint="write the model into another folder")
    aside = target.with_name(f".burnish-{target.name}")
    try:
        try:
            aside.write_text(text, encoding="utf-8")
        except OSError as error:
            raise _write_error(error, target) from error
        yield Staged(aside, target)
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def _write_error(error: OSError, target: Path) -> InputError:
    return InputError(f"it cannot be written: {error.strerror}", place=str(target))
