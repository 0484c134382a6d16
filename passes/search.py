"""Propose, score, select, apply, verify: the best edits of several lossy passes together within a budget.

Errors of single edits nearly add up (as LAPTOP-Diff found for removed blocks), so the choice is a knapsack. That they
do so is never taken for granted. Plans are measured, first on the samples that edits were fitted to, to find how much
error the budget has room for, then on held-out samples. A plan that fails there is tightened, and in the end the best
one that held is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from burnish.ir.errors import BudgetError, InputError
from burnish.passes.budget import Budget
from burnish.passes.lossy import Edit
from burnish.passes.selection import Joint, UnreachableError, select, together

PROBES = 9
"""Plans that are measured on the fitting samples to find the error that the budget has room for."""

ROUNDS = 6
"""Plans that are measured on held-out samples before the best of those that held is taken."""

TRIES = 24
"""Exchanges of one edit for another that are measured to make a plan better."""

_MANY = 10
"""Folds of samples whose standard error is taken as it is."""

UNSURE = 0.32
"""The chance that more rows change than `Judgement.chance` says."""

OnStep = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Judgement:
    """What a plan does to the metric on one set of samples.

    Attributes:
        metric: its value.
        drop: how much worse than the original's it is; negative when better.
        spread: standard error of the drop, from the samples alone.
        folds: of samples that the standard error was taken from; 0 when unknown, and many.
        rows: that are right or wrong as a whole, of a metric that counts such, those of one group counted once; else 0.
    """

    metric: float
    drop: float
    spread: float
    folds: int = 0
    rows: int = 0

    @property
    def sure(self) -> float:
        """The drop that a budget has to allow: with one standard error, and no less than that where rows were won.

        Where rows were lost and others won by chance, the next samples may win none. A standard error of few folds is
        itself unsure: where there are fewer than ten it counts as much more as Student's distribution says.
        """
        return max(self.drop, 0.0) + (_margin(self.folds) * self.spread if self.spread else 0.0)

    @property
    def untouched(self) -> bool:
        """Whether no row changed that is right or wrong: there is no standard error then."""
        return self.rows > 0 and self.drop == 0 and self.spread == 0

    @property
    def chance(self) -> float:
        """The largest share of rows that may change where none of these did, with 68 % certainty."""
        return 1 - float(UNSURE ** (1 / self.rows))


def _margin(folds: int) -> float:
    """How many standard errors, taken from so few folds, one drop in 6.3 lies above; 1 of ten folds and more."""
    from scipy import stats

    return float(stats.t.isf(stats.norm.sf(1.0), folds - 1)) if 1 < folds < _MANY else 1.0


def rows_needed(share: float) -> int:
    """Of how many rows none may change, so that no more than `share` of others do, with 68 % certainty."""
    return math.ceil(math.log(UNSURE) / math.log1p(-share)) if 0 < share < 1 else 0


class Judge(Protocol):
    """Measures plans on one set of samples."""

    original: float
    """The metric of the original there."""

    def __call__(self, edits: Sequence[Edit]) -> Judgement:
        """Apply the edits together and measure; an infinite drop when the model cannot run any more."""
        ...


@dataclass(frozen=True)
class Plan:
    """Edits chosen together.

    Attributes:
        edits: in the order in which they were proposed.
        error: the sum of their errors.
        saving: what they save together by their own account, in bytes or seconds.
        fitted: what was measured on the fitting samples; None when it was not.
        held_out: what was measured on the held-out samples; None when it was not.
        whole: the saving was measured of all of them together; else it is a sum.
    """

    edits: tuple[Edit, ...]
    error: float
    saving: float
    fitted: Judgement | None = None
    held_out: Judgement | None = None
    whole: bool = False

    @property
    def key(self) -> tuple[str, ...]:
        """The same for plans of the same edits."""
        return tuple(edit.key for edit in self.edits)


@dataclass
class Found:
    """The result of a search.

    Attributes:
        plan: the plan to make; without edits when none holds.
        plans: every plan that was measured, in order.
        allowed: the drop that is allowed, in the metric's unit; None when any is.
    """

    plan: Plan
    plans: list[Plan] = field(default_factory=list)
    allowed: float | None = None


@dataclass
class Search:
    """Chooses among scored edits.

    Attributes:
        edits: what was proposed by all passes.
        errors: the error of each alone, by its key; infinite for those that must not be chosen.
        saving: what an edit saves, in bytes or seconds.
        whole: what the original takes in that unit.
        budget: what is allowed and wanted.
        fitting: measures plans on the samples that edits were fitted to.
        held_out: measures plans on the others.
        pairs: errors of pairs of edits beyond the sum of the two, by their keys.
        joint: what sets of edits save beyond the sum of their savings, by their keys.
        beside: what an edit saves where all edits beside it are made; with `timed`, plans are made by that, too.
        timed: measures what plans save as a whole, by which the best of several is taken.
        slack: on the fitting samples the drop may be so many times the allowed one, where `held_out` heals plans first.
        on_step: progress.
    """

    edits: Sequence[Edit]
    errors: Mapping[str, float]
    saving: Callable[[Edit], float]
    whole: float
    budget: Budget
    fitting: Judge
    held_out: Judge
    pairs: Mapping[tuple[str, str], float] = field(default_factory=dict)
    joint: Joint = field(default_factory=dict)
    beside: Callable[[Edit], float] | None = None
    timed: Callable[[Sequence[Sequence[Edit]]], Sequence[float]] | None = None
    slack: float = 1.0
    on_step: OnStep = lambda what, number, total: None
    _measured: dict[tuple[str, ...], Plan] = field(default_factory=dict)

    def run(self) -> Found:
        """The best plan.

        Raises:
            InputError: the drop is a share of a metric that is 0.
            BudgetError: a size or a time is wanted that no plan reaches, or none within the allowed drop, or that runs.
        """
        target = self._target()
        if self.budget.drop is None:
            plan = refined(
                self._fitted(self._plan(target=target)),
                self.edits,
                self.errors,
                self.saving,
                self._fit_judge,
                joint=self.joint,
            )
            self._measured[plan.key] = plan
            plan = self._verified(plan)
            if plan.held_out is None or not math.isfinite(plan.held_out.drop):
                raise BudgetError(
                    f"the {len(plan.edits)} edits that bring it down to {self._share(self.whole - plan.saving)} leave"
                    " a model that does not run, or whose metric is no number",
                    hint="want less",
                )
            return Found(plan, list(self._measured.values()))
        if self.budget.drop.relative and self.budget.drop.number and not self.held_out.original:
            raise InputError(
                f"a drop of {self.budget.drop} of nothing is nothing: the metric of the original is 0",
                place="--max-drop",
                hint="give the drop in the metric's own unit, such as `0.01`",
            )
        allowed = self.budget.drop.of(self.held_out.original)
        fitted = self._fit(self.budget.drop.of(self.fitting.original) * self.slack)
        found = self._tighten(fitted, allowed)
        if target and found.plan.saving < target * (1 - 1e-9):
            reached, wanted = self._share(self.whole - found.plan.saving), self._share(self.whole - target)
            raise BudgetError(
                f"within a drop of {self.budget.drop} the model comes down to {reached}, not to {wanted}",
                hint="allow a larger drop, want less, or heal with `--heal`",
            )
        return found

    def _target(self) -> float:
        if self.budget.size is not None and self.budget.objective == "size":
            return self.whole - self.budget.size.of(self.whole)
        if self.budget.latency is not None and self.budget.objective == "latency":
            return self.whole - self.budget.latency.of(self.whole)
        return 0.0

    def _share(self, left: float) -> str:
        return f"{100 * left / self.whole:.1f} % of its {'size' if self.budget.objective == 'size' else 'time'}"

    def _plan(self, *, budget: float | None = None, target: float | None = None) -> Plan:
        try:
            found = select(
                self.edits, self.errors, self.saving, budget=budget, target=target, pairs=self.pairs, joint=self.joint
            )
        except UnreachableError as error:
            reached = self.whole if error.nearest is None else self.whole - error.nearest.saved
            raise BudgetError(
                f"no edits bring the model down to {self._share(self.whole - (target or 0))}; the nearest is"
                f" {self._share(reached)}",
                hint="add lossy passes with `-p`, or want less",
            ) from None
        return Plan(found.edits, found.error, found.saved)

    def _quickest(self, error: float) -> Plan:
        """The plan within this error that saves most; where some edits need others beside them, by measurement.

        Others are the plan if all had them, and that of the edits which need none. Where none can be timed, sums count.
        """
        plan = self._plan(budget=error)
        if self.timed is None or self.beside is None or not self.joint:
            return plan
        bound = frozenset[str]().union(*self.joint)
        plans = {plan.key: plan}
        for some in (self.edits, [edit for edit in self.edits if edit.key not in bound]):
            found = select(some, self.errors, self.beside, budget=error, pairs=self.pairs)
            other = Plan(found.edits, found.error, found.saved)
            plans.setdefault(other.key, other)
        if len(plans) == 1:
            return plan
        saved = zip(plans.values(), self.timed([one.edits for one in plans.values()]), strict=True)
        known = [replace(one, saving=own, whole=True) for one, own in saved if math.isfinite(own)]
        return max(known, key=_saving) if any(one.edits for one in known) else plan

    def _fit(self, allowed: float) -> float:
        """The largest sum of errors whose plan stays within `allowed` on the fitting samples, by bisection."""
        finite = sorted(error for error in self.errors.values() if error < float("inf"))
        if not finite:
            return 0.0
        everything = self._plan(budget=sum(max(error, 0.0) for error in finite))
        low, high = max(finite[0], everything.error * 1e-9, 1e-300) / 2, max(everything.error, 1e-299)
        best = 0.0
        for number in range(PROBES):
            self.on_step("finding how much error there is room for", number, PROBES)
            middle = high if number == 0 else (low * high) ** 0.5
            plan = self._fitted(self._plan(budget=middle))
            if plan.fitted is not None and plan.fitted.sure <= allowed:
                best, low = middle, middle
                if number == 0:
                    break
            else:
                high = middle
        return best

    def _fitted(self, plan: Plan) -> Plan:
        known = self._measured.get(plan.key)
        if known is None or known.fitted is None:
            known = Plan(plan.edits, plan.error, plan.saving, self.fitting(plan.edits))
            self._measured[plan.key] = known
        return known

    def _fit_judge(self, edits: Sequence[Edit]) -> Judgement:
        self.on_step("exchanging edits", len(self._measured), len(self._measured) + 1)
        return self.fitting(edits)

    def _verified(self, plan: Plan) -> Plan:
        known = replace(self._fitted(plan), saving=plan.saving, whole=plan.whole)
        if known.held_out is None:
            known = replace(known, held_out=self.held_out(plan.edits))
        self._measured[plan.key] = known
        return known

    def _tighten(self, error: float, allowed: float) -> Found:
        """The best plan that holds on held-out samples, from the plan of this error downwards."""
        held = [self._verified(Plan((), 0.0, 0.0))]
        for number in range(ROUNDS):
            self.on_step("measuring on held-out samples", number, ROUNDS)
            plan = self._verified(self._quickest(error))
            assert plan.held_out is not None
            over = plan.held_out.sure
            if over <= allowed:
                held.append(plan)
                break
            error = min(plan.error, error) * min(max(allowed / over if over > 0 else 0.0, 0.1), 0.8)
        best = max(held, key=_saving)
        return Found(best, list(self._measured.values()), allowed)


def _saving(plan: Plan) -> float:
    return plan.saving


def refined(
    plan: Plan,
    edits: Sequence[Edit],
    errors: Mapping[str, float],
    saving: Callable[[Edit], float],
    judge: Callable[[Sequence[Edit]], Judgement],
    tries: int = TRIES,
    joint: Joint | None = None,
) -> Plan:
    """A plan that loses less and saves no less: one edit at a time is exchanged where a measurement says it helps.

    Sums of errors know nothing of what edits do to each other. Exchanges are tried in the order of what they add to the
    sum, the first that helps is made, and it starts over.

    Args:
        plan: what to start from.
        edits, errors, saving: as for `Search`.
        judge: measures plans, on samples that nothing is verified on.
        tries: plans that are measured at most.
        joint: as for `Search`.
    """
    best = replace(plan, fitted=plan.fitted or judge(plan.edits))
    left, tried = tries, {best.key}
    while left > 0:
        better = None
        for chosen in _exchanges(best, edits, errors, saving):
            one = Plan(
                chosen, plan.error + sum(errors[e.key] for e in chosen) - sum(errors[e.key] for e in plan.edits),
                sum(saving(edit) for edit in chosen) + together(chosen, joint or {}),
            )  # fmt: skip
            if one.key in tried or one.saving < plan.saving * (1 - 1e-9):
                continue
            tried.add(one.key)
            left -= 1
            one = replace(one, fitted=judge(chosen))
            if one.fitted is not None and best.fitted is not None and one.fitted.drop < best.fitted.drop:
                better = one
            if better is not None or left <= 0:
                break
        if better is None:
            break
        best = better
    return best


def _exchanges(
    plan: Plan, edits: Sequence[Edit], errors: Mapping[str, float], saving: Callable[[Edit], float]
) -> Iterator[tuple[Edit, ...]]:
    """The plans with one edit exchanged that save no less, those first whose sum of errors is least."""
    found: list[tuple[float, Edit, Edit]] = []
    others = [edit for edit in edits if edit not in plan.edits and errors[edit.key] < float("inf")]
    for out in plan.edits:
        taken = frozenset[str]().union(*(edit.claims for edit in plan.edits if edit is not out))
        for edit in others:
            if saving(edit) >= saving(out) * (1 - 1e-9) and not edit.claims & taken:
                found.append((errors[edit.key] - errors[out.key], out, edit))
    found.sort(key=lambda one: one[0])
    for _, out, instead in found:
        chosen = {edit.key for edit in plan.edits if edit is not out} | {instead.key}
        yield tuple(edit for edit in edits if edit.key in chosen)


def neighbours(edits: Sequence[Edit]) -> list[tuple[Edit, Edit]]:
    """Pairs of edits of one pass at sites that follow each other, where both can be made.

    Args:
        edits: in the order in which passes proposed them: that of the graph.
    """
    found = []
    for spec in dict.fromkeys(edit.spec for edit in edits):
        own = [edit for edit in edits if edit.spec == spec]
        sites = list(dict.fromkeys(edit.site for edit in own))
        for before, behind in zip(sites, sites[1:], strict=False):
            first, second = ([edit for edit in own if edit.site == site] for site in (before, behind))
            found += [(a, b) for a in first for b in second if not a.claims & b.claims]
    return found
