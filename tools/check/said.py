"""What `check` found as a person would say it: one sentence, then a line for each difference."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from burnish.tools.check.difference import Difference, Field, Report, Verdict
from burnish.tools.terminal import count, printable

_LONGEST = 160
_COLUMNS = (12, 17)
_UNREADABLE = (Field.VALUES, Field.WEIGHTS)


def sentence(report: Report) -> str:
    """The verdict in one sentence without a full stop; control characters of names are written out."""
    model = f"`{report.model}`"
    if not report.passed:
        first, *others = report.regressions
        more = f", and {count(len(others), 'more regression')}" if others else ""
        since = f" from `{report.lock}`" if report.lock else ""
        return printable(f"{model} regressed{since}: {told(first)}{more}")
    kept = sum(one.verdict is Verdict.TOLERATED for one in report.differences)
    notes = sum(one.verdict is Verdict.NOTE for one in report.differences)
    told_of = [f"{count(kept, 'difference')} within tolerance"] * bool(kept) + [count(notes, "note")] * bool(notes)
    says = f"`{report.lock}` says" if report.lock else "it was"
    return printable(f"{model} is what {says}" + (f", with {' and '.join(told_of)}" if told_of else ""))


def told(one: Difference) -> str:
    """A difference as a sentence that says where it is; control characters of names are written out."""
    return printable(one.message if not one.place or one.place in one.message else f"{one.message}, at `{one.place}`")


def change(one: Difference) -> tuple[str, str] | None:
    """The old and the new value, shortened; None where they are hashes or sizes, or where the sentence shows both."""
    said = one.message.replace(",", "")
    told_already = all(value.replace(",", "") in said for value in (one.old, one.new))
    if one.field in _UNREADABLE or told_already:
        return None
    return _shown(one.old), _shown(one.new)


def _shown(value: str) -> str:
    text = printable(value or "none")
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def arrow(one: Difference) -> str:
    """`old -> new` where `change` shows them, else empty."""
    return " -> ".join(change(one) or ())


def lines(report: Report) -> Iterator[str]:
    """The verdict, then what regressed, what is tolerated and what else is worth knowing.

    No line begins with what the model or the caller named.
    """
    yield sentence(report)
    order = list(Verdict)
    yield from listed(sorted(report.differences, key=lambda one: order.index(one.verdict)))


def listed(differences: Iterable[Difference], accepted: bool = False) -> Iterator[str]:
    """A line for each difference: its verdict, its field, what is said of it; below it, the old and the new value.

    Args:
        differences: in the order to be shown.
        accepted: the lock was renewed: what is no longer wrong is called `accepted`, what was tolerated `kept`.
    """
    words = {Verdict.REGRESSION: "accepted", Verdict.NOTE: "accepted", Verdict.TOLERATED: "kept"} if accepted else {}
    for one in differences:
        word = words.get(one.verdict, one.verdict.value)
        yield f"{word:{_COLUMNS[0]}}{one.field:{_COLUMNS[1]}}{told(one)}"
        if shown := arrow(one):
            yield " " * sum(_COLUMNS) + shown
