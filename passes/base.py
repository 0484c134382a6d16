"""What a pass is: a frozen dataclass in a file of its own, whose fields are its options."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import onnx_ir as oir

from burnish.ir import match, weights


@dataclass(frozen=True)
class Skip:
    """A site that a pass left alone, and why.

    `op` and `node` name the site's node, `bytes` are the parameters it reads, `matched` says that the pattern was
    there and only a condition failed.
    """

    op: str
    node: str
    reason: str
    bytes: int
    matched: bool


@dataclass
class Outcome:
    """What one run of a pass did, kept honest by the pipeline: no change of the model without a `take`, none in vain.

    Attributes:
        name: the pass.
        limit: how many more rewrites may be made; None for no limit. Used to find a wrong rewrite by bisection.
        rewritten: sites that were changed.
        skipped: sites that were looked at and left alone.
        errors: by the key of an edit that rounds numbers, the relative error that this makes, as the pass knows it: of
            what its layers compute on samples, or of their weights where none were looked at.
        notes: what was made otherwise than the options say, in plain words, with how often.
    """

    name: str
    limit: int | None = None
    rewritten: int = 0
    changed_ops: Counter[str] = field(default_factory=Counter)
    changed_bytes: int = 0
    changed_nodes: list[str] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)

    def take(self, node: oir.Node) -> bool:
        """Whether the site of `node` may be rewritten now; call it once per rewrite, after all conditions."""
        if self.limit is not None and self.rewritten >= self.limit:
            return False
        self.rewritten += 1
        self.changed_ops[node.op_type] += 1
        self.changed_bytes += weights.parameter_bytes(node)
        self.changed_nodes.append(node.name or "?")
        return True

    def skip(self, node: oir.Node, reason: str, *, matched: bool = True) -> None:
        """Say why the site of `node` stays as it is. `matched=False`: it only resembles what the pass looks for."""
        self.skipped.append(Skip(node.op_type, match.describe(node), reason, weights.parameter_bytes(node), matched))

    def take_model(self, ops: Iterable[str] = ()) -> bool:
        """`take` for a pass that changes the model as a whole in one step (a library's clean-up)."""
        if self.limit is not None and self.rewritten >= self.limit:
            return False
        self.rewritten += 1
        self.changed_ops.update(ops)
        return True

    @property
    def eligible(self) -> int:
        """Sites that were looked at."""
        return self.rewritten + len(self.skipped)

    @property
    def matched(self) -> int:
        """Sites where the whole pattern was there, rewritten or refused by a condition."""
        return self.rewritten + sum(skip.matched for skip in self.skipped)


@dataclass(frozen=True)
class Pass(ABC):
    """A rewrite of a model. Subclasses are frozen dataclasses, one to a file; the first docstring line is the help.

    Class attributes:
        needs: facts (`burnish.ir.facts`) that must hold before; checked.
        breaks: facts that may stop holding.
        gives: facts that hold afterwards; checked.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    breaks: ClassVar[tuple[str, ...]] = ()
    gives: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def pass_name(cls) -> str:
        """The name on the command line, in recipes and reports: the file's name with hyphens."""
        return cls.__module__.rsplit(".", 1)[-1].replace("_", "-")

    @abstractmethod
    def rewrite(self, model: oir.Model, outcome: Outcome) -> None:
        """Rewrite `model` in place, and say in `outcome` what was changed and what was left alone, and why."""


@dataclass(frozen=True)
class ExactPass(Pass):
    """A pass that preserves the function: equal to the dtype's rounding, and to 1e-9 when judged in float64."""
