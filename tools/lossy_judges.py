"""What judges the plans of a search: the scorer on the fitting samples, and healing before the held-out ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from burnish.passes.judging import Judged
from burnish.passes.lossy import Edit
from burnish.passes.protocols import Measure
from burnish.passes.scoring import OnStep, Score, Scorer
from burnish.passes.search import Judgement

if TYPE_CHECKING:
    from burnish.backends.fx.healing import Healed


class AfterHealing:
    """Measures plans on held-out samples once they are healed."""

    def __init__(self, judged: Judged, heal: Callable[[Sequence[Edit]], Healed]) -> None:
        self.original, self._judged, self._heal = judged.original, judged, heal

    def __call__(self, edits: Sequence[Edit]) -> Judgement:
        return self._judged.of(self._heal(edits).model) if edits else self._judged(edits)


class Fitting:
    """Measures plans on the fitting samples; what was scored once is known."""

    def __init__(self, scorer: Scorer, measure: Measure) -> None:
        self._scorer, self._measure, self.name = scorer, measure, measure.name
        self.original = scorer.original().values[measure.name]

    def drop(self, value: float) -> float:
        """How much worse a value is than the original's."""
        return self.original - value if self._measure.higher_is_better else value - self.original

    def alone(self, edits: Sequence[Edit], on_step: OnStep) -> list[Score]:
        """The score of each edit alone."""
        return self._scorer.scores(edits, on_step)

    def __call__(self, edits: Sequence[Edit]) -> Judgement:
        if not edits:
            return Judgement(self.original, 0.0, 0.0)
        (score,) = self._scorer.scores([tuple(edits)])
        value = score.values[self._measure.name]
        return Judgement(value, self.drop(value), 0.0)
