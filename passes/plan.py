"""What one run is to do: a recipe, the caller's own passes and settings, resolved into a list of passes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from burnish.ir.errors import InputError
from burnish.passes import budget as budgets
from burnish.passes import catalog, recipe_file, recipes
from burnish.passes.base import Pass
from burnish.passes.budget import Budget
from burnish.passes.lossy import LossyPass
from burnish.passes.prove import Verify

NAMED = ("default", "normal-form", "none", *recipes.QUANTIZED)


@dataclass(frozen=True)
class Plan:
    """A run, resolved.

    Attributes:
        passes: exact passes in order; those behind the lossy ones where there are any.
        target: what the model is written or compiled for.
        verify: `off`, `ends` or `each`.
        guard: what no pass may make worse.
        require: passes that must change something.
        opset: the opset that was asked for, None when none was.
        prepare: exact passes before the lossy ones; the normal form closes them.
        lossy: passes that change the function, searched together.
        budget: how much they may lose, and what is wanted of them.
        metric: what the loss is measured by, as `burnish.optimize` takes it; None for what suits the model.
        heal: train what the lossy passes left.
        named: the texts of lossy passes that the caller named, and did not leave to a recipe.
    """

    passes: tuple[Pass, ...]
    target: str
    verify: Verify
    guard: frozenset[str]
    require: tuple[str, ...]
    opset: int | None = None
    prepare: tuple[Pass, ...] = ()
    lossy: tuple[LossyPass, ...] = ()
    budget: Budget = field(default_factory=Budget)
    metric: Any = None
    heal: bool = False
    named: frozenset[str] = frozenset()

    @property
    def compiled(self) -> bool:
        """Whether kernels are compiled for the target."""
        return recipe_file.kind("target", self.target) in recipe_file.COMPILED


def resolve(
    recipe: str | Path | None = None,
    passes: Sequence[Pass | str] | None = None,
    without: Sequence[str] = (),
    *,
    target: str | None = None,
    opset: int | None = None,
    verify: str | None = None,
    guard: Iterable[str] | None = None,
    require: Sequence[str] = (),
    max_drop: str | float | None = None,
    max_size: str | float | None = None,
    max_latency: str | float | None = None,
    objective: str | None = None,
    metric: Any = None,
    heal: bool | None = None,
) -> Plan:
    """Resolve what the caller gave; what is given here wins over what a recipe file says.

    Args:
        recipe: a name of `NAMED` or a YAML file; `default` when absent, or `normal-form` when `passes` are given.
        passes: run after the recipe.
        without: names of passes to leave out.
        target, opset, verify, guard, require: see `Plan`; `opset` raises the model to that opset.
        max_drop, max_size, max_latency, objective: the budget, as `burnish.passes.budget.budget` reads it. With one,
            and no lossy pass among the passes, those of `recipes.LOSSY` are searched.
        metric, heal: see `Plan`.

    Raises:
        InputError: for anything unknown.
    """
    own = [one for item in passes or () for one in ([item] if isinstance(item, Pass) else catalog.parse(item))]
    exact = [one for one in own if not isinstance(one, LossyPass)]
    name = str(recipe) if recipe is not None else ("normal-form" if exact else "default")
    given: recipe_file.RecipeFile | None = None
    if name not in NAMED:
        if not Path(name).exists() and not name.endswith((".yaml", ".yml")):
            raise InputError(f"there is no recipe `{name}`", hint=f"{catalog.nearest(name, NAMED)} or give a YAML file")
        given = recipe_file.read(name)
    settings = given.settings if given is not None else {}
    chosen_target = _choice("target", target or settings.get("target", "onnx"))
    chosen_verify = _choice("verify", verify or settings.get("verify", "ends"))
    chosen_guard = [
        _choice("guard", one) for one in (settings.get("guard", ("latency", "size")) if guard is None else guard)
    ]
    compiled = recipe_file.kind("target", chosen_target) in recipe_file.COMPILED
    to_opset = opset if opset is not None else settings.get("opset")
    if to_opset is not None and not 9 <= to_opset <= recipes.NEWEST_OPSET:
        raise InputError(f"cannot write opset {to_opset}", hint=f"give a number from 9 to {recipes.NEWEST_OPSET}")
    if given is not None:
        raised = [] if to_opset is None else [catalog.make("raise-opset", {"to": to_opset})]
        base = [*given.passes, *raised]
    else:
        base = recipes.named(name, "onnx" if compiled else chosen_target, to_opset)
    own_needs = [one for one in recipes.REQUIRED.get(name, ()) if one not in without]
    allowed = _budget(settings, max_drop, max_size, max_latency, objective)
    for name in (*without, *require):
        catalog.load(name)
    wanted = [one for one in (*base, *own) if isinstance(one, LossyPass)]
    if allowed and not wanted:
        wanted = [one for name in recipes.LOSSY if isinstance(one := catalog.make(name), LossyPass)]
    lossy = list({catalog.spec(one): one for one in wanted if one.pass_name() not in without}.values())
    if wanted and not lossy:
        why = "there is a budget, and no lossy pass is left to spend it" if allowed else "no lossy pass is left"
        raise InputError(why, hint="leave `--without` out")
    ahead = [] if any(isinstance(one, LossyPass) for one in base) else _ahead(own)
    exact = [one for one in exact if not any(one is other for other in ahead)]
    kept = [one for one in (*base, *recipes.after(exact)) if one.pass_name() not in without]
    if compiled:  # what the lowering is told of values is told by their annotations
        kept = [one for one in kept if one.pass_name() not in recipes.LAST]
    prepare, kept = _around(kept, lossy, [one for one in ahead if one.pass_name() not in without])
    required = tuple(dict.fromkeys((*require, *own_needs, *(given.require if given is not None else ()))))
    for name in required:
        if not any(one.pass_name() == name for one in (*prepare, *lossy, *kept)):
            raise InputError(
                f"`{name}` is required to change something but is not among the passes", hint=f"add `-p {name}`"
            )
    return Plan(
        tuple(kept),
        chosen_target,
        cast(Verify, chosen_verify),
        frozenset(chosen_guard),
        required,
        to_opset,
        prepare=tuple(prepare),
        lossy=tuple(lossy),
        budget=allowed,
        metric=metric or settings.get("metric"),
        heal=bool(settings.get("heal", False) if heal is None else heal),
        named=frozenset(catalog.spec(one) for one in own if isinstance(one, LossyPass)),
    )


def _ahead(own: list[Pass]) -> list[Pass]:
    """The caller's exact passes that stand before a lossy one."""
    last = max((index for index, one in enumerate(own) if isinstance(one, LossyPass)), default=0)
    return [one for one in own[:last] if not isinstance(one, LossyPass)]


def _around(kept: list[Pass], lossy: list[LossyPass], ahead: list[Pass]) -> tuple[list[Pass], list[Pass]]:
    """The exact passes before and behind the lossy ones.

    Those stand where the first of them stands in the recipe, else behind the normal form, which follows the raising of
    the opset; they need the normal form, so it closes what is before them: the passes that they ask for, then `ahead`,
    those that the caller wants before them.
    """
    if not lossy:
        return [], kept
    first = next((index for index, one in enumerate(kept) if isinstance(one, LossyPass)), None)
    if first is None:
        names = [one.pass_name() for one in kept]
        raised = max((index for index, name in enumerate(names) if name == "raise-opset"), default=-1)
        normal = (index for index, name in enumerate(names) if name == recipes.NORMAL_FORM[-1] and index > raised)
        first = next(normal, raised) + 1
    before = [one for one in kept[:first] if not isinstance(one, LossyPass)]
    closing = [catalog.make(name) for name in recipes.NORMAL_FORM]
    wanted = [catalog.spec(one) for one in closing]
    texts = dict.fromkeys(text for one in lossy for text in one.prepare)
    more = [*(one for text in texts for one in catalog.parse(text)), *ahead]
    if [catalog.spec(one) for one in before[-len(closing) :]] != wanted:
        before += closing
    if more:
        before += [*more, *closing]
    return before, [one for one in kept[first:] if not isinstance(one, LossyPass)]


def _budget(
    settings: Mapping[str, Any],
    max_drop: str | float | None,
    max_size: str | float | None,
    max_latency: str | float | None,
    objective: str | None,
) -> Budget:
    given = (("max-drop", max_drop), ("max-size", max_size), ("max-latency", max_latency), ("objective", objective))
    drop, size, latency, aim = (value if value is not None else settings.get(name) for name, value in given)
    return budgets.budget(drop, size, latency, None if aim is None else str(aim))


def _choice(setting: str, value: str) -> str:
    known = recipe_file.SETTINGS[setting]
    if recipe_file.kind(setting, value) not in known:
        raise InputError(f"`{setting}` cannot be `{value}`", hint=catalog.nearest(value, known))
    return value
