"""Inputs that can falsify a rewrite, made from what the model's graph says its inputs mean.

All-ones masks, one shape and random identifiers pass nearly any mistake. What is made here is legal for the model and
unkind to a wrong rewrite: masks padded on either side and with holes, rows of a batch that differ, an empty and a
non-empty past, one row and several, one position and many, zeros and large values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import onnx_ir as oir

from burnish.frontends import fill
from burnish.frontends.dims import Axes, Setting, axes_of
from burnish.frontends.roles import Role, required_inputs, roles
from burnish.ir.errors import InputError
from burnish.ir.samples import Sample

ENOUGH = 3
_GIVE_DATA = "give real samples with `--data`"


class Runs(Protocol):
    """What executes a model: raises `InputError` when it refuses the inputs."""

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs by name."""
        ...


@dataclass(frozen=True)
class _Plan:
    setting: Setting
    pattern: str = "all ones"
    content: str = "normal"


def synthesise(
    model: oir.Model, *, seed: int = 0, settings: int = 3, meanings: Mapping[str, Role] | None = None
) -> list[Sample]:
    """Samples made from the model's own meaning, cheap ones first; the same seed gives the same values.

    Args:
        model: the model as read; it is not run, so some samples may not fit it (see `usable`).
        seed: of every random value.
        settings: at least so many different sizes of the dynamic dimensions, where there are any.
        meanings: of inputs by name, where they are known; those of the others are read from the graph.

    Returns:
        Samples with an array for every input without a default value; at most 3 rows and 32 positions each, images up
        to 64 pixels and, last, 224 pixels for models that take no smaller ones.

    Raises:
        InputError: an input is no tensor, or has no declared dtype or rank.
    """
    values = required_inputs(model)
    for value in values:
        _check_declared(value)
    names = [str(value.name) for value in values]
    given = meanings or {}
    read = {} if all(name in given for name in names) else roles(model)
    meanings = {name: given.get(name) or read[name] for name in names}
    axes = axes_of(values, meanings)
    made = [
        _sample(values, meanings, axes, plan, turn, np.random.default_rng((seed, turn)))
        for turn, plan in enumerate(_plans(axes, meanings, settings))
    ]
    samples: dict[str, Sample] = {}
    for sample in made:
        samples.setdefault(sample.name, sample)
    # Without dynamic dimensions and masks only the drawn values differ; a few draws are still worth having.
    for draw, sample in enumerate(made[1:ENOUGH], 2):
        if len(samples) < ENOUGH and not _equal(sample, made[0]):
            samples[f"{sample.name}, draw {draw}"] = replace(sample, name=f"{sample.name}, draw {draw}")
    return list(samples.values())


def usable(samples: Sequence[Sample], runner: Runs) -> tuple[list[Sample], list[tuple[Sample, str]]]:
    """Run the model once on each sample and separate those that it refuses itself, before any rewrite.

    A sample more than four times the size of all kept so far is left out, and in neither list, once three were kept.

    Args:
        samples: in the order of `synthesise`.
        runner: of the unchanged model.

    Returns:
        The samples that the model takes, and the others with the first line of the model's reason.

    Raises:
        InputError: the model refuses them all.
    """
    kept: list[Sample] = []
    refused: list[tuple[Sample, str]] = []
    largest = 0
    for sample in samples:
        size = sum(array.size for array in sample.feeds.values())
        if len(kept) >= ENOUGH and size > 4 * largest:
            continue
        try:
            runner.run(sample.feeds)
        except InputError as error:
            refused.append((sample, (error.cause.splitlines() or [""])[0]))
        else:
            kept.append(sample)
            largest = max(largest, size)
    if samples and not kept:
        sample, reason = refused[0]
        raise InputError(f"the model refuses every input made for it; first ({sample.name}): {reason}", hint=_GIVE_DATA)
    return kept, refused


def _check_declared(value: oir.Value) -> None:
    if not isinstance(value.type, oir.TensorType) or value.dtype == oir.DataType.UNDEFINED:
        raise InputError(
            "the input is not a tensor of a declared dtype",
            place=f"input `{value.name}`",
            hint="no samples can be made for it: skip the check with `--verify off`",
        )
    if value.shape is None:
        raise InputError("the input has no declared rank", place=f"input `{value.name}`", hint=_GIVE_DATA)


def _plans(axes: Axes, meanings: Mapping[str, Role], settings: int) -> list[_Plan]:
    """What each sample is like, cheapest first, then most telling."""
    kinds = {role.kind for role in meanings.values()}
    masked = "mask" in kinds or any(role.kind == "ids" and role.special for role in meanings.values())
    if masked or kinds & {"ids", "positions", "past"}:
        plans = _sequence_plans(masked, axes.has("past"))
        if kinds & {"image", "signal", "number"}:
            plans += [_Plan(Setting(2, 6), content="large"), _Plan(Setting(2, 6), content="zeros")]
        if list(axes.kinds.values()).count("length") > 1:
            plans += [
                _Plan(Setting(2, 6, past=4, spread=3), pattern) for pattern in fill.PATTERNS[: 5 if masked else 1]
            ]
    elif axes.has("height", "width"):
        plans = _image_plans()
    else:
        plans = _number_plans(max((role.window for role in meanings.values()), default=(1, 1)))
    known = len({(p.setting.batch, p.setting.length, p.setting.past) for p in plans})
    for more in range(known, settings):
        setting = Setting(1 + more % 3, 3 + 2 * more % 29, past=more % 13 if axes.has("past") else 0)
        plans.append(_Plan(setting, fill.PATTERNS[more % 5] if masked else "all ones"))
    return plans


def _sequence_plans(masked: bool, past: bool) -> list[_Plan]:
    ones, left, right, holes, mixed, empty = fill.PATTERNS if masked else ("all ones",) * 6
    if past:
        table = [(ones, 1, 4, 0), (left, 2, 7, 0), (left, 2, 3, 5), (right, 2, 4, 6), (holes, 2, 3, 7),
                 (mixed, 3, 5, 9), (left, 2, 1, 11), (ones, 1, 1, 0), (empty, 2, 2, 3), (mixed, 2, 20, 12)]  # fmt: skip
    else:
        table = [(ones, 1, 5, 0), (left, 2, 8, 0), (right, 2, 8, 0), (holes, 2, 8, 0), (mixed, 3, 12, 0),
                 (ones, 1, 1, 0), (empty, 2, 6, 0), (mixed, 2, 32, 0)]  # fmt: skip
    return [_Plan(Setting(batch, length, behind), pattern) for pattern, batch, length, behind in table]


def _image_plans() -> list[_Plan]:
    table = [(1, 32, 64, "uniform"), (2, 48, 96, "normal"), (1, 48, 64, "zeros"), (2, 32, 64, "large"),
             (1, 64, 64, "constant"), (3, 32, 32, "small"), (1, 48, 48, "uniform"),
             (1, 224, 224, "uniform"), (2, 224, 224, "normal"), (1, 224, 224, "large")]  # fmt: skip
    return [_Plan(Setting(batch, height=h, width=w), content=content) for batch, h, w, content in table]


def _number_plans(window: tuple[int, int]) -> list[_Plan]:
    kernel, stride = window
    table = [(1, 5, kernel, "normal"), (2, 8, kernel + stride, "uniform"), (3, 12, 2 * kernel, "large"),
             (2, 1, kernel, "zeros"), (1, 7, kernel + stride, "constant"),
             (1, 3, kernel, "small"), (2, 32, max(1600, 4 * kernel), "normal")]  # fmt: skip
    return [_Plan(Setting(b, length, signal=signal), content=content) for b, length, signal, content in table]


def _sample(
    values: list[oir.Value], meanings: Mapping[str, Role], axes: Axes, plan: _Plan, turn: int, rng: np.random.Generator
) -> Sample:
    """The sample of one plan, masks first because ids and positions follow them."""
    shapes = axes.shapes(plan.setting)
    sizes = {"length": plan.setting.length, "past": plan.setting.past}
    feeds: dict[str, np.ndarray] = {}
    kept = _kept(values, meanings, shapes, plan, rng, feeds)
    for value in values:
        name = str(value.name)
        role, shape, dtype = meanings[name], shapes[name], fill.numpy_dtype(value)
        if role.kind == "mask":
            continue
        if role.kind in ("ids", "image") and dtype.kind in "iu":
            feeds[name] = fill.ids(role, shape, dtype, kept, rng)
        elif role.kind == "positions":
            feeds[name] = fill.positions(role, shape, dtype, plan.setting.past if axes.has("past") else 0, kept)
        elif role.kind == "past":
            feeds[name] = fill.numbers(role, shape, dtype, "normal", rng)
        elif role.kind in ("number", "image", "signal"):
            feeds[name] = fill.numbers(role, shape, dtype, plan.content, rng)
        elif role.kind == "state":
            feeds[name] = fill.state(shape, dtype, turn, rng)
        elif role.kind == "text":
            feeds[name] = fill.text(shape, turn)
        else:
            feeds[name] = fill.small(role, shape, dtype, turn, sizes, rng)
    return Sample(_name(axes, meanings, plan, feeds), {str(v.name): feeds[str(v.name)] for v in values})


def _kept(
    values: list[oir.Value],
    meanings: Mapping[str, Role],
    shapes: Mapping[str, tuple[int, ...]],
    plan: _Plan,
    rng: np.random.Generator,
    feeds: dict[str, np.ndarray],
) -> np.ndarray | None:
    """Fill the masks; bool [batch, positions] of the first that is a matrix, or of ids with a padding token."""
    kept: np.ndarray | None = None
    for value in values:
        name = str(value.name)
        role, shape = meanings[name], shapes[name]
        if role.kind == "mask":
            feeds[name] = fill.mask(role, shape, fill.numpy_dtype(value), plan.pattern, rng)
            if kept is None and len(shape) == 2 and not role.additive:
                kept = feeds[name].astype(np.int64) == role.kept
    for name, role in meanings.items():
        if kept is None and role.kind == "ids" and role.special and len(shapes[name]) == 2:
            kept = fill.kept_positions(plan.pattern, shapes[name][0], shapes[name][1], rng)
    return kept


def _name(axes: Axes, meanings: Mapping[str, Role], plan: _Plan, feeds: Mapping[str, np.ndarray]) -> str:
    """What is special about a sample, in the order a reader looks for it."""
    kinds = {role.kind for role in meanings.values()}
    setting, parts = plan.setting, []
    if "mask" in kinds:
        parts.append(
            {
                "all ones": "mask of ones",
                "holes": "mask with holes",
                "rows differ": "mask rows differ",
                "empty row": "mask with an empty row",
            }.get(plan.pattern, f"{plan.pattern} mask")
        )
    elif any(role.special for role in meanings.values()):
        parts.append(
            {"all ones": "no padding", "holes": "padding between tokens", "rows differ": "padding differs"}.get(
                plan.pattern, plan.pattern
            )
        )
    if kinds & {"image", "signal", "number"}:
        parts.append("all zeros" if plan.content == "zeros" else f"{plan.content} values")
    parts += [f"{name} {feeds[name].reshape(-1)[0]}" for name, role in meanings.items() if role.kind == "choice"]
    if any(role.kind == "integer" and (feeds[name] < 0).any() for name, role in meanings.items()):
        parts.append("negative integers")
    if axes.has("batch"):
        parts.append(f"batch {setting.batch}")
    if axes.has("length", "total"):
        parts.append(f"length {setting.length}")
    if axes.has("past"):
        parts.append(f"past {setting.past}" if setting.past else "empty past")
    if axes.has("height", "width"):
        parts.append(f"{setting.height}x{setting.width}")
    if axes.has("signal"):
        parts.append(f"signal {setting.signal}")
    if setting.spread:
        parts.append("lengths differ")
    return ", ".join(parts) or "random values"


def _equal(one: Sample, other: Sample) -> bool:
    return all(np.array_equal(array, other.feeds[name]) for name, array in one.feeds.items())
