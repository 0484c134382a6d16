"""Residual sums become blocks where they repeat, and layers begin with what mixes tokens."""

from __future__ import annotations

import pytest

from burnish.ir.views.grouping import group

ROLES = {"a": "mixer", "s": "mixer", "x": "cross", "m": "feed", "e": "feed", "c": "conv", "l": "layer"}

CASES = {
    "layers": ("am am am", "am am am"),
    "a decoder": ("axm axm", "axm axm"),
    "one layer": ("am", "am"),
    "mlp and experts in turns": ("am ae am ae", "am ae am ae"),
    "state and attention in turns": ("sm se am ae sm se am ae", "sm se am ae sm se am ae"),
    "an mlp before and behind": ("mam mam mam", "mam mam mam"),
    "conformer": ("macm macm", "macm macm"),
    "two mlps": ("mM mM mM", "mM mM mM"),
    "attention over two axes": ("aAm aAm aAm", "aAm aAm aAm"),
    "convolutions": ("ccc", "c c c"),
    "two kinds of convolutions in turns": ("cC cC", "c C c C"),
    "transformers between convolutions": ("cl cl", "c l c l"),
    "another first layer": ("Am am am", "Am am am"),
    "states only": ("ssss", "s s s s"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_repeats_is_a_block(case: str) -> None:
    letters, expected = CASES[case]
    letters = letters.replace(" ", "")
    found = group(list(letters), [ROLES[one.lower()] for one in letters], [11] * len(letters))
    assert " ".join(letters[begin:end] for begin, end in found) == expected
