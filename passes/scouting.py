"""Which edits of a search are run at all: none that what was measured at the same place makes pointless.

A lossy pass may propose many edits for one layer. They are measured from the mildest of a pass to its harshest, and
each is looked at once what is milder is known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from burnish.passes.lossy import Edit

SAME = 0.03
"""Two edits whose savings differ by a smaller part save the same."""

HOPELESS = 3.0
"""Where an edit alone loses so many times what is allowed, harsher ones of its kind are not measured."""

Errors = Sequence[tuple[float, float]]
"""Of each edit its error, and the drop of the metric."""


@dataclass
class Scout:
    """Measures the edits that are worth it.

    Attributes:
        saving: what an edit saves, in bytes or seconds.
        orders: of each pass, by its text: passes of one number do the same to a layer, in other ways.
        allowed: the drop that is allowed; infinite when any is.
        found: by key of what was measured: error and drop.
        reasons: by key of what was not: why.
    """

    saving: Callable[[Edit], float]
    orders: Mapping[str, int]
    allowed: float
    found: dict[str, tuple[float, float]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def run(self, edits: Sequence[Edit], measure: Callable[[Sequence[Edit]], Errors]) -> None:
        """Fill `found` and `reasons`: each edit has an entry in one of them.

        Args:
            edits: in the order of the passes.
            measure: errors and drops of edits, each made alone.
        """
        kinds: dict[tuple[str, str], list[Edit]] = {}
        for edit in self._unlike(edits):
            kinds.setdefault((edit.spec, edit.site), []).append(edit)
        for own in kinds.values():
            own.sort(key=lambda edit: edit.savings.bytes)
        measured: list[Edit] = []
        for step in range(max(map(len, kinds.values()), default=0)):
            wave = []
            for own in (own for own in kinds.values() if step < len(own)):
                reason = self._pointless(own[step], own[:step], measured)
                if reason is None:
                    wave.append(own[step])
                else:
                    self.reasons[own[step].key] = reason
            self.found.update({edit.key: one for edit, one in zip(wave, measure(wave), strict=True)})
            measured += wave

    def _unlike(self, edits: Sequence[Edit]) -> list[Edit]:
        """Those edits that do not save what another one of their order does at the same place; of such the first."""
        kept: dict[tuple[str, int], list[Edit]] = {}
        for edit in edits:
            there = kept.setdefault((edit.site, self.orders[edit.spec]), [])
            same = next((one for one in there if one.spec != edit.spec and self._same(one, edit)), None)
            if same is None:
                there.append(edit)
            else:
                self.reasons[edit.key] = f"`{same.spec}` saves the same there"
        return [edit for edit in edits if edit.key not in self.reasons]

    def _same(self, one: Edit, other: Edit) -> bool:
        first, second = self.saving(one), self.saving(other)
        return one.claims <= other.claims and abs(first - second) <= SAME * max(abs(first), abs(second))

    def _pointless(self, edit: Edit, milder: Sequence[Edit], measured: Sequence[Edit]) -> str | None:
        """Why nobody would choose an edit, given what milder ones of its kind lose; None where somebody may."""
        known = [self.found[one.key] for one in milder if one.key in self.found]
        if any(drop > HOPELESS * self.allowed for _, drop in known):
            return f"a milder one of its kind alone loses more than {HOPELESS:g} times what is allowed"
        if not known:
            return None
        least = max(error for error, _ in known)
        for one in measured:
            better = one.spec != edit.spec and one.claims <= edit.claims and self.found[one.key][0] <= least
            if better and self.saving(one) >= self.saving(edit):
                return f"`{one.spec}`, {one.option}, saves as much there, and a milder one of its kind loses more"
        return None
