"""Budgets as users write them."""

from __future__ import annotations

import pytest

from burnish.ir.errors import InputError
from burnish.passes.budget import Amount, amount, budget


@pytest.mark.parametrize(
    ("text", "found", "of_forty"),
    [
        ("1%", Amount(0.01, True), 0.4),
        ("0.01", Amount(0.01, False), 0.01),
        (" .5 % ", Amount(0.005, True), 0.2),
        (3, Amount(3, False), 3),
        (1e-5, Amount(1e-5, False), 1e-5),
        ("150%", Amount(1.5, True), 60),
    ],
)
def test_an_amount_is_a_share_of_the_original_or_a_number_in_its_unit(
    text: str, found: Amount, of_forty: float
) -> None:
    read = amount(text, "--max-drop")
    assert read is not None and read.relative == found.relative
    assert read.of(40.0) == pytest.approx(of_forty) and read.of(-40.0) == pytest.approx(of_forty)


@pytest.mark.parametrize("text", ["", "one", "1 percent", "-1%", "nan", "inf", "1e999"])
def test_what_is_no_amount_is_refused_with_the_option(text: str) -> None:
    with pytest.raises(InputError) as error:
        budget(max_drop=text)
    assert error.value.place == "--max-drop" and error.value.hint


def test_a_time_is_a_share_and_makes_latency_the_objective() -> None:
    assert budget(max_latency="80%").objective == "latency"
    assert budget(max_drop="1%").objective == "size"
    with pytest.raises(InputError, match="no share"):
        budget(max_latency="0.8")
    with pytest.raises(InputError, match="no objective"):
        budget(max_drop="1%", objective="speed")


@pytest.mark.parametrize(
    ("option", "given"),
    [
        ("--max-size", {"max_size": "60%", "objective": "latency"}),
        ("--max-size", {"max_size": "60%", "max_latency": "80%"}),
        ("--max-latency", {"max_latency": "80%", "objective": "size", "max_drop": "1%"}),
    ],
)
def test_a_bound_on_what_is_not_the_objective_is_refused_not_ignored(option: str, given: dict[str, str]) -> None:
    with pytest.raises(InputError, match="only what is its objective") as error:
        budget(**given)
    assert error.value.place == option


def test_a_drop_of_more_than_the_whole_is_one_of_a_perplexity_and_a_size_is_none() -> None:
    assert budget(max_drop="150%").drop == Amount(1.5, True)
    with pytest.raises(InputError, match="more than the whole"):
        budget(max_size="101%")
    with pytest.raises(InputError, match="less than a byte") as error:
        budget(max_size=0.5)
    assert "50%" in str(error.value.hint)


def test_a_budget_that_says_nothing_is_false() -> None:
    assert not budget() and budget(max_drop=0)
