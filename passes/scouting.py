"""Which edits of a search are run at all: none that what was measured at the same place makes pointless.

A lossy pass may propose many edits for one layer. They are measured from the mildest of a pass to its harshest, and
each is looked at once what is milder is known. Numbers of fewer bits come first: they save much and lose little, so
that most ranks of a layer need not be measured then. Of a pass with many sites, some tell whether others are worth it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from burnish.passes.lossy import Edit

SAME = 0.03
"""Two edits whose savings differ by a smaller part save the same."""

HOPELESS = 3.0
"""Where an edit alone loses so many times what is allowed, harsher ones of its kind are not measured."""

MANY, PILOTS = 32, 12
"""Where a pass has more sites than the first number, so many of them tell whether its edits are of use at all."""

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
        measured: list[Edit] = []
        for order in sorted({self.orders[spec] for spec, _ in kinds}, reverse=True):
            first: list[Sequence[Edit]] = []
            rest: list[Sequence[Edit]] = []
            for spec in dict.fromkeys(spec for spec, _ in kinds if self.orders[spec] == order):
                own = [
                    sorted(some, key=lambda edit: edit.savings.bytes) for (of, _), some in kinds.items() if of == spec
                ]
                pilots = {index * len(own) // PILOTS for index in range(PILOTS)} if len(own) > MANY else set()
                first += [some for index, some in enumerate(own) if index in pilots]
                rest += [some for index, some in enumerate(own) if index not in pilots]
            self._waves(first, measured, measure)
            self._waves(rest, measured, measure, self._useless(first, measured))

    def _waves(
        self,
        kinds: Sequence[Sequence[Edit]],
        measured: list[Edit],
        measure: Callable[[Sequence[Edit]], Errors],
        useless: Collection[tuple[str, int]] = (),
    ) -> None:
        """Measure the mildest edit of a pass at each site, then the next ones.

        Args:
            kinds: the edits of a pass at a site, from the mildest on.
            measured: what was measured before; takes what is.
            measure: see `run`.
            useless: which edits of a pass are not: those of the sites' first, second, ... edits.
        """
        for step in range(max(map(len, kinds), default=0)):
            wave = []
            for own in (own for own in kinds if step < len(own)):
                reason = self._pointless(own[step], own[:step], measured)
                if reason is None and (own[step].spec, step) in useless:
                    reason = f"at {PILOTS} other sites such an edit was of no use"
                if reason is None:
                    wave.append(own[step])
                else:
                    self.reasons[own[step].key] = reason
            self.found.update({edit.key: one for edit, one in zip(wave, measure(wave), strict=True)})
            measured += wave

    def _useless(self, pilots: Sequence[Sequence[Edit]], measured: Sequence[Edit]) -> set[tuple[str, int]]:
        """Of which pass the first, second, ... edits are of no use: all lose too much, or others do better there."""
        found = {(edit.spec, step) for own in pilots for step, edit in enumerate(own)}
        for own in pilots:
            for step, edit in enumerate(own):
                error, drop = self.found.get(edit.key, (math.inf, math.inf))
                if drop <= HOPELESS * self.allowed and self._better(edit, error, measured) is None:
                    found.discard((edit.spec, step))
        return found

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
        better = self._better(edit, max(error for error, _ in known), measured)
        if better is not None:
            return f"`{better.spec}`, {better.option}, saves as much there, and a milder one of its kind loses more"
        return None

    def _better(self, edit: Edit, error: float, measured: Sequence[Edit]) -> Edit | None:
        """An edit of another pass that saves as much where this one is made and loses no more than `error`.

        Of an edit of several layers, one that does so with the like of it at the others.
        """
        like: dict[tuple[str, str], list[Edit]] = {}
        for one in measured:
            if one.spec != edit.spec and one.claims <= edit.claims:
                like.setdefault((one.spec, one.option), []).append(one)
        for some in like.values():
            for group in (some, *([one] for one in some)):
                claims = [claim for one in group for claim in one.claims]
                lost = math.fsum(self.found[one.key][0] for one in group)
                saved = math.fsum(self.saving(one) for one in group)
                if len(claims) == len(set(claims)) and lost <= error and saved >= self.saving(edit):
                    return group[0]
        return None
