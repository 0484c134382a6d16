"""Samples for the passes that learn rotations from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx_ir as oir

from burnish import __version__
from burnish.ir.errors import MissingPackageError
from burnish.ir.samples import Sample
from burnish.passes.base import Pass
from burnish.passes.exact.learn_rotations import LearnRotations
from burnish.passes.learned import Learned
from burnish.passes.score_store import folder_in_cache
from burnish.passes.search import OnStep


def with_samples(
    passes: Sequence[Pass], samples: Sequence[Sample] | None, on_step: OnStep, files: list[Path]
) -> list[Pass]:
    """Passes, with samples for those among them that learn rotations.

    Args:
        passes: the passes.
        samples: what they learn from; None where there are none, and then they change nothing.
        on_step: progress.
        files: takes the checkpoints of what is learned, as soon as it is begun.

    Raises:
        MissingPackageError: there is such a pass, and torch is not installed.
    """
    if samples is None or not any(isinstance(one, LearnRotations) for one in passes):
        return list(passes)
    if find_spec("torch") is None:
        raise MissingPackageError(
            "learning rotations needs PyTorch, which is not installed", hint="pip install 'burnish[torch]'"
        )
    return [_taught(one, samples, on_step, files) if isinstance(one, LearnRotations) else one for one in passes]


def _taught(one: LearnRotations, samples: Sequence[Sample], on_step: OnStep, files: list[Path]) -> Pass:
    class Taught(LearnRotations):
        """The pass with samples; it is called like it, and has its options."""

        @classmethod
        def pass_name(cls) -> str:
            return LearnRotations.pass_name()

        def learned(self, model: oir.Model) -> Learned | None:
            from burnish.backends.fx.rotation import LearnOptions, checkpoint, learn
            from burnish.passes.simulated import Bits

            given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
            bits = {name: given.pop(name) for name in ("weights", "activations", "cache")}
            ranges = {"activation_range": given.pop("clip"), "cache_range": given.pop("cache_clip")}
            options = LearnOptions(bits=Bits(**bits, **ranges), **given)
            folder = folder_in_cache(f"rotations/{__version__}")
            if folder is not None:
                files.append(checkpoint(folder, model, samples, options))

            def told(step: int, loss: float, least: float) -> None:
                on_step(f"learning rotations, loss {least:.4g}", step, options.steps)

            return learn(model, samples, options, told, folder=folder)

    values: dict[str, Any] = {field.name: getattr(one, field.name) for field in dataclasses.fields(one)}
    return Taught(**values)
