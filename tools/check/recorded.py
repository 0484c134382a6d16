"""What the inputs of a model mean, as a lock records it."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any, cast

import msgspec
import onnx_ir as oir

from burnish.frontends.roles import Role, required_inputs, roles
from burnish.ir import match
from burnish.ir.errors import InputError
from burnish.tools.check import counts
from burnish.tools.check.lock import Lock

KINDS = frozenset(
    "ids positions mask past state image signal choice size lengths ends total text number integer".split()
)
_LARGEST = 1 << 16  # of a kernel, a stride, channels, an axis: samples are made as large as these say
_MOST = 1 << 10


def roles_of(lock: Lock | None, model: oir.Model) -> dict[str, Role]:
    """The roles that a lock recorded of the inputs that have the dtype and the rank now that they had then.

    Raises:
        InputError: what is recorded is no role.
    """
    if lock is None or lock.samples is None:
        return {}
    now = {str(value.name): value for value in required_inputs(model)}
    kinds = counts.types(now.values())
    return {
        name: _role(name, told, match.rank(now[name]) or 0)
        for name, told in lock.samples.roles.items()
        if name in now and _without_sizes(lock.inputs.get(name, "")) == _without_sizes(kinds[name])
    }


def _without_sizes(kind: str) -> tuple[str, int]:
    """Dtype and rank of a type as text: exporters name one dimension differently."""
    dtype, _, sizes = kind.partition("[")
    return dtype, sizes.count(",") + (sizes != "]")


def recorded(model: oir.Model, lock: Lock | None) -> dict[str, dict[str, object]]:
    """The roles of the inputs of a model by name, those of the lock where it has them, without default values."""
    names = [str(value.name) for value in required_inputs(model)]
    known = roles_of(lock, model)
    found = known if all(name in known for name in names) else {**roles(model), **known}
    return {name: _brief(found[name]) for name in names}


def _brief(role: Role) -> dict[str, object]:
    brief: dict[str, object] = {}
    for one in fields(Role):
        value = getattr(role, one.name)
        if one.default is MISSING or value != one.default:
            brief[one.name] = list(value) if isinstance(value, tuple) else value
    return brief


def _role(name: str, told: dict[str, object], rank: int) -> Role:
    place, hint = f"the role of input `{name}` in the lock", "write the lock anew with `burnish check lock`"
    unknown = set(told) - {one.name for one in fields(Role)}
    if unknown:
        raise InputError(f"a role has no `{min(unknown)}`", place=place, hint=hint)
    try:
        role = msgspec.convert(cast(Any, told), Role, strict=True)
    except msgspec.ValidationError as error:
        raise InputError(str(error), place=place, hint=hint) from None
    if role.kind not in KINDS:
        raise InputError(f"there is no kind `{role.kind}`", place=place, hint=hint)
    listed = (*role.choices, *role.special)
    small = all(0 < one <= _LARGEST for one in (*role.window, role.channels or 1))
    small &= role.kind != "choice" or bool(role.choices)
    if not small or len(listed) > _MOST or not -rank <= role.axis < max(rank, 1) or role.kept not in (0, 1):
        raise InputError("a number in it is out of range", place=place, hint=hint)
    return role
