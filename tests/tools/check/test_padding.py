"""Positions that a mask leaves out do not count, wherever an output has them."""

from __future__ import annotations

import numpy as np

from burnish.tools.check.padding import Padding

MASK = np.array([[1, 1, 0, 0, 0], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]])
ROLES = {"mask": {"kind": "mask"}, "ids": {"kind": "ids"}}
FEEDS = {"mask": MASK, "ids": np.zeros((3, 2), np.int64)}


def counted(shape: tuple[int, ...], **feeds: np.ndarray) -> np.ndarray:
    found = Padding(FEEDS | feeds, ROLES | {"other": {"kind": "mask", "kept": 0}}).counted(shape)
    assert found is not None
    return np.broadcast_to(found, shape)


def test_positions_are_on_the_second_axis_of_three_and_the_third_of_four():
    assert (counted((3, 5, 7))[:, :, 0] == MASK).all()
    assert (counted((3, 5, 5, 7))[:, 0, :, 0] == MASK).all()


def test_behind_a_past_the_last_columns_count():
    assert (counted((3, 2, 7))[:, :, 0] == MASK[:, 3:]).all()


def test_elsewhere_rows_without_any_position_do_not_count():
    for shape in ((3,), (3, 5), (3, 4, 7), (3, 5, 4, 4), (3, 1, 1, 1, 5)):
        found = counted(shape)
        assert found[:2].all() and not found[2].any()


def test_what_has_other_rows_counts_whole():
    for shape in ((), (2, 5, 7), (15, 7)):
        assert Padding(FEEDS, ROLES).counted(shape) is None
    assert Padding({"mask": np.ones((3, 5), np.int64)}, ROLES).counted((3, 5, 7)) is None
    assert Padding(FEEDS, {"mask": {"kind": "mask", "additive": True}}).counted((3, 5, 7)) is None


def test_of_two_masks_that_fit_either_lets_a_position_count():
    other = np.array([[1, 1, 1, 1, 0]] * 3)
    found = counted((3, 5, 7), other=other)[:, :, 0]
    assert (found[:2] == (MASK.astype(bool) | (other == 0))[:2]).all() and not found[2].any()
