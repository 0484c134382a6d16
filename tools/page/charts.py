"""Charts that several reports have."""

from __future__ import annotations

from collections.abc import Sequence

from burnish.tools import terminal
from burnish.tools.page.alignment import Pair
from burnish.tools.page.costs import Costs, PartCost
from burnish.tools.page.parts import Chart, Point, Series, Table, name

MOST_BARS = 200
"""Parts that are drawn; a table has them all."""


def by_part(
    title: str,
    unit: str,
    labels: Sequence[str],
    old: Sequence[float | None],
    new: Sequence[float | None],
    table: Table,
    note: str = "",
) -> Chart:
    """Bars of before and after for each part; None where there is no such part or no such number.

    Args:
        title, note: of the chart.
        unit: of the numbers.
        labels: of the parts.
        old, new: as many numbers.
        table: the same and more.
    """
    if len(labels) > MOST_BARS:
        note = f"{note} The first {MOST_BARS} of {len(labels)} parts are drawn.".strip()
    drawn = [
        Series(
            called,
            tuple(Point(float(at), float(y)) for at, y in enumerate(numbers[:MOST_BARS]) if y is not None),
            color=color,
        )
        for called, numbers, color in (("before", old, 1), ("after", new, 0))
    ]
    return Chart(title, "", unit, tuple(drawn), table, tuple(labels[:MOST_BARS]), note=note)


def cost_charts(pairs: Sequence[Pair], before: Costs, after: Costs, note: str) -> list[Chart]:
    """Multiply-adds and bytes of weights by part, before and after.

    Args:
        pairs: which part answers to which, by name.
        before, after: of the two models.
        note: for which sizes multiply-adds are counted.
    """
    old, new = {one.name: one for one in before.parts}, {one.name: one for one in after.parts}
    rows: list[tuple[str, PartCost | None, PartCost | None]] = []
    for was, now in pairs:
        if was is not None and was.name in old or now is not None and now.name in new:
            label = short(was.name if was is not None else now.name if now is not None else "")
            rows.append((label, old.get(was.name) if was else None, new.get(now.name) if now else None))
    if len(rows) < 2:
        return []
    columns = ("part", ">nodes before", ">after", ">multiply-adds before", ">after", ">bytes before", ">after")
    table = Table(
        "Cost by part",
        columns,
        tuple(
            (
                label,
                *(str(one.nodes) if one else "" for one in both),
                *(terminal.quantity(one.macs) if one else "" for one in both),
                *(terminal.size(one.bytes) if one else "" for one in both),
            )
            for label, *both in rows
        ),
    )
    labels = [label for label, _, _ in rows]
    found = []
    if any(one.macs for _, *both in rows for one in both if one is not None):
        macs = [[one.macs if one else None for one in side] for side in zip(*(both for _, *both in rows), strict=True)]
        found.append(by_part("Multiply-adds by part", "multiply-adds", labels, macs[0], macs[1], table, note))
    held = [[one.bytes if one else None for one in side] for side in zip(*(both for _, *both in rows), strict=True)]
    if any(one for side in held for one in side):
        said = "A weight that several parts read counts where it is read first."
        found.append(by_part("Bytes of weights by part", "bytes", labels, held[0], held[1], table, said))
    return found


def short(part: str) -> str:
    """The name of a part as the label of a bar: `block 7` is 7."""
    return name(part).removeprefix("block ")


def change(before: float | None, after: float | None) -> str:
    """What became of a number: `-65 %`; empty where it stayed or is unknown."""
    if not before or after is None or before == after:
        return ""
    share = 100 * (after / before - 1)
    number = f"{abs(share):.0f}" if abs(share) >= 9.5 else f"{abs(share):.1f}" if abs(share) >= 0.05 else "< 0.1"
    return f"{'−' if share < 0 else '+'}{number} %"
