"""What differs between two locks, as a person would say it: causes first, what follows from them as notes."""

from __future__ import annotations

from burnish.tools.check import differences_contract as contracts
from burnish.tools.check.consequences import Context
from burnish.tools.check.difference import Difference, Field, Verdict
from burnish.tools.check.differences_sizes import latency, metric, sizes, tallies
from burnish.tools.check.differences_structure import Names, structure
from burnish.tools.check.differences_values import Exact, values
from burnish.tools.check.differences_weights import weights
from burnish.tools.check.lock import Lock
from burnish.tools.check.tolerances import Tolerances

_RANK = {Verdict.REGRESSION: 0, Verdict.TOLERATED: 1, Verdict.NOTE: 2}
_CAUSES = (Field.INPUTS, Field.OUTPUTS, Field.STRUCTURE, Field.WEIGHTS)
_SHAPES = (Field.INPUTS, Field.OUTPUTS, Field.STRUCTURE)


def differences(
    old: Lock,
    new: Lock,
    tolerances: Tolerances | None = None,
    names: tuple[Names, Names] = ({}, {}),
    exact: Exact | None = None,
) -> list[Difference]:
    """Compare a model with its lock.

    Args:
        old, new: what it was and what it is.
        tolerances: what may differ; by default nothing but rounding, see `Tolerances`.
        names: the names of nodes by segment and line, old and new, as far as the models are at hand.
        exact: what running both models on the samples gave.

    Returns:
        All differences: regressions, then what is tolerated, then notes, each in the order of the fields.
    """
    allowed = tolerances if tolerances is not None else Tolerances()
    found = contracts.contract(old, new, allowed)
    compared = structure(old, new, allowed.verdict(Field.STRUCTURE), _context(old, new), names)
    found += compared.differences
    found += weights(old, new, compared, allowed)
    causes = [one for one in found if one.verdict is Verdict.REGRESSION and one.field in _CAUSES]
    shapes = any(one.field in _SHAPES for one in causes) or any(one.field is Field.OPSETS for one in found)
    notes = [one for one in found if one.field is Field.STRUCTURE and one.verdict is Verdict.NOTE]
    spelled = shapes or bool(notes)
    follows = shapes or any(one.key != ("structure",) for one in notes)
    found += sizes(old, new, allowed, explained=follows, respelled=spelled)
    found += tallies(old, new, allowed, explained=spelled)
    found += values(old, new, allowed, explained=bool(causes), exact=exact)
    found += metric(old, new, allowed)
    found += latency(old, new, allowed)
    order = {field: index for index, field in enumerate(Field)}
    return sorted(found, key=lambda one: (_RANK[one.verdict], order[one.field]))


def _context(old: Lock, new: Lock) -> Context:
    """What of the contract structure can follow from."""
    return Context(
        retyped=contracts.retyped(old, new),
        reshaped=contracts.changed_dimensions(old, new),
        opset=old.opsets.get("ai.onnx") != new.opsets.get("ai.onnx"),
        outputs=list(old.outputs) != list(new.outputs),
        renamed=contracts.ports(old.inputs, new.inputs).renamed,
        ran=_fingerprint(old) == _fingerprint(new) != "",
    )


def _fingerprint(lock: Lock) -> str:
    """Of the samples that a model was run on; empty for none."""
    return lock.samples.fingerprint if lock.samples is not None else ""
