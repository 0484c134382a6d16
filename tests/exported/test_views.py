"""Every view of every exported graph against the source of its model.

The page with all results is docs/results/views.md, made by `python -m burnish.tools.research.views`.
"""

import pytest

from burnish.tools.research import structures, views, zoo_families
from burnish.tools.research.views_check import RIGHT, WRONG

FAST = ("ts", "dynp", "op23", "eager-ort", "dynp-fuse", "", "-int4")
"""Flavours that are read in every run; the others are close to one of these."""


def marks(name):
    flavour = zoo_families.FILES[name][1] if name in zoo_families.FILES else ""
    return [] if flavour in FAST and "smollm2" not in name else [pytest.mark.slow]


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in structures.names()])
def test_all_views_are_right(name):
    found = views.cells(name)
    assert {view: (cell.verdict, cell.reason) for view, cell in found.items() if cell.verdict != RIGHT} == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", structures.names())
def test_nothing_is_wrong_in_a_file_as_it_was_exported(name):
    found = views.cells(name, raw=True)
    assert {view: cell.reason for view, cell in found.items() if cell.verdict == WRONG} == {}
