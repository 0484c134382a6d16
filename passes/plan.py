"""What one run is to do: a recipe, the caller's own passes and settings, resolved into a list of passes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from burnish.ir.errors import InputError
from burnish.passes import catalog, recipe_file, recipes
from burnish.passes.base import Pass
from burnish.passes.prove import Verify

NAMED = ("default", "normal-form", "none")


@dataclass(frozen=True)
class Plan:
    """A run, resolved.

    Attributes:
        passes: in order.
        target: what the model is written for.
        verify: `off`, `ends` or `each`.
        guard: what no pass may make worse.
        require: passes that must change something.
        opset: the opset that was asked for, None when none was.
    """

    passes: tuple[Pass, ...]
    target: str
    verify: Verify
    guard: frozenset[str]
    require: tuple[str, ...]
    opset: int | None = None


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
) -> Plan:
    """Resolve what the caller gave; what is given here wins over what a recipe file says.

    Args:
        recipe: a name of `NAMED` or a YAML file; `default` when absent, or `normal-form` when `passes` are given.
        passes: run after the recipe.
        without: names of passes to leave out.
        target, opset, verify, guard, require: see `Plan`; `opset` raises the model to that opset.

    Raises:
        InputError: for anything unknown.
    """
    name = str(recipe) if recipe is not None else ("normal-form" if passes else "default")
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
    to_opset = opset if opset is not None else settings.get("opset")
    if to_opset is not None and not 9 <= to_opset <= recipes.NEWEST_OPSET:
        raise InputError(f"cannot write opset {to_opset}", hint=f"give a number from 9 to {recipes.NEWEST_OPSET}")
    if given is not None:
        raised = [] if to_opset is None else [catalog.make("raise-opset", {"to": to_opset})]
        base = [*given.passes, *raised]
    else:
        base = recipes.named(name, chosen_target, to_opset)
    own = [one for item in passes or () for one in ([item] if isinstance(item, Pass) else catalog.parse(item))]
    for name in (*without, *require):
        catalog.load(name)
    kept = [one for one in (*base, *recipes.after(own)) if one.pass_name() not in without]
    required = tuple(dict.fromkeys((*require, *(given.require if given is not None else ()))))
    for name in required:
        if not any(one.pass_name() == name for one in kept):
            raise InputError(
                f"`{name}` is required to change something but is not among the passes", hint=f"add `-p {name}`"
            )
    return Plan(tuple(kept), chosen_target, cast(Verify, chosen_verify), frozenset(chosen_guard), required, to_opset)


def _choice(setting: str, value: str) -> str:
    known = recipe_file.SETTINGS[setting]
    if value not in known:
        raise InputError(f"`{setting}` cannot be `{value}`", hint=catalog.nearest(value, known))
    return value
