"""Rows that come from one thing: told beside the samples, never parted, and counted once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as oir
import pytest
from onnx import parser

from burnish.backends.fx.healing_rows import Batches
from burnish.frontends.samples import read_samples
from burnish.frontends.split import independent, split
from burnish.ir.errors import InputError
from burnish.ir.samples import Sample, halves, interleaved

HEADER = '<ir_version: 10, opset_import: ["": 20]>'
ROWS = "g (float[b, 3] x) => (float[b, 3] y) { y = Relu (x) }"
STEPS = "g (float[2, b, 3] h, float[b, 3] x) => (float[b, 3] y) { y = Relu (x) z = Identity (h) }"
FIXED = "g (float[2, 3] x) => (float[2, 3] y) { y = Relu (x) }"


def model(text: str = ROWS) -> oir.Model:
    return oir.from_proto(parser.parse_model(HEADER + text))


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def told(samples: list[Sample]) -> list[list[object] | None]:
    return [None if one.groups is None else one.groups.tolist() for one in samples]


def names(samples: list[Sample]) -> set[object]:
    return {name for one in samples if one.groups is not None for name in one.groups.tolist()}


@pytest.mark.parametrize(
    ("text", "x", "groups", "expected"),
    [
        (ROWS, drawn(4, 3), [1, 1, 2, 2], [[1, 1, 2, 2]]),
        (ROWS, drawn(4, 3), 7, [[7]]),
        (ROWS, drawn(4, 3), ["a photo"], [["a photo"]]),
        (ROWS, drawn(2, 4, 3), ["a", "b"], [["a"], ["b"]]),
        (ROWS, drawn(2, 4, 3), [[1, 1, 2, 2], [3, 3, 3, 1]], [[1, 1, 2, 2], [3, 3, 3, 1]]),
        (FIXED, drawn(4, 3), [1, 1, 2, 3], [[1, 1], [2, 3]]),
    ],
)
def test_groups_stand_beside_the_inputs(
    tmp_path: Path, text: str, x: np.ndarray, groups: object, expected: list[object]
) -> None:
    np.savez(tmp_path / "data.npz", x=x, groups=np.asarray(groups))
    assert told(read_samples(tmp_path / "data.npz", model(text))) == expected


def test_groups_of_dictionaries_and_samples_and_where_the_batch_is_not_the_first_axis() -> None:
    given = [{"x": drawn(3), "group": "a"}, ({"x": drawn(2, 3), "groups": [1, 2]}, 0), {"x": drawn(3)}]
    read = read_samples(given, model())
    assert told(read) == [["a"], [1, 2], None] and told(read_samples(read, model())) == told(read)
    (one,) = read_samples([{"h": drawn(2, 4, 3), "x": drawn(4, 3), "groups": [1, 1, 2, 2]}], model(STEPS))
    assert told([one]) == [[1, 1, 2, 2]]


@pytest.mark.parametrize(
    ("groups", "cause"),
    [
        ([1, 2, 3], "there are 3 groups for a sample of 4 rows"),
        ([0.5], "found float64, not whole numbers or texts"),
        ([[1, 2], [3]], "this is no array"),
        ({}, "found dict, not numbers"),
    ],
)
def test_groups_that_do_not_fit_are_refused(groups: object, cause: str) -> None:
    with pytest.raises(InputError) as caught:
        read_samples([{"x": drawn(4, 3), "groups": groups}], model())
    assert caught.value.cause.startswith(cause) and "groups" in str(caught.value.place)


@pytest.mark.parametrize("name", ["labels", "groups"])
@pytest.mark.parametrize("count", [0, 2, 6])
def test_stacked_samples_need_as_many_labels_and_groups(tmp_path: Path, name: str, count: int) -> None:
    np.savez(tmp_path / "data.npz", x=drawn(3, 4, 3), **{name: np.arange(count)})  # type: ignore[arg-type]
    with pytest.raises(InputError, match=f"there are {count} {name} for 3 samples"):
        read_samples(tmp_path / "data.npz", model())


@pytest.mark.parametrize("count", [2, 3, 10])
@pytest.mark.parametrize("parts", [1, 4, 24])
def test_no_group_is_in_both_parts_and_each_counts_once(count: int, parts: int) -> None:
    samples = [
        Sample(f"{group} {part}", {"x": drawn(1, 3, seed=group * parts + part)}, None, np.array([group]))
        for group in range(count)
        for part in range(parts)
    ]
    found = split(samples, model())
    one, two = names(found.fit), names(found.held_out)
    assert one and two and not one & two and len(found.fit) + len(found.held_out) == len(samples)
    assert abs(len(one) - len(two)) <= 1 and found.how.endswith(
        f"no group is in both ({len(one)} to fit, {len(two)} held out)"
    )
    assert independent(samples, model()) == count and independent(found.held_out, model()) == len(two)
    first = interleaved(samples)
    assert len(names(first[:count])) == count and {one.name for one in first} == {one.name for one in samples}
    fitted, others = halves(samples)
    assert not names(fitted) & names(others) and len(fitted) + len(others) == len(samples)
    batches = Batches(samples, model(), batch=8, share=0.2, seed=0, rank=0, world=1)
    owner = {one.feeds["x"].tobytes(): group for one in samples for group in one.groups.tolist()}  # type: ignore[union-attr]
    trained, kept = (
        {owner[row.tobytes()] for batch in part for one in batch for row in one.feeds["x"]}
        for part in (batches.training, batches.held_out)
    )
    assert trained | kept == set(range(count)) and not trained & kept


def test_rows_of_one_batch_go_with_their_groups() -> None:
    rows = drawn(12, 3)
    (whole,) = read_samples([{"x": rows, "groups": np.arange(12) // 3, "labels": np.arange(12) % 2}], model())
    found = split([whole], model())
    place = {row.tobytes(): number // 3 for number, row in enumerate(rows)}
    for one in found.fit + found.held_out:
        assert one.groups is not None and [place[row.tobytes()] for row in one.feeds["x"]] == one.groups.tolist()
    assert not names(found.fit) & names(found.held_out) and independent(found.held_out, model()) == 2


def test_groups_that_meet_in_a_sample_stay_together() -> None:
    chain = [Sample(f"{at}", {"x": drawn(2, 3, seed=at)}, None, np.array([at, at + 1])) for at in range(4)]
    with pytest.raises(InputError, match="all of them belong together, by their groups"):
        split([Sample(one.name, one.feeds, np.zeros((1, 2)), one.groups) for one in chain], model())
    assert [len(part) for part in halves(chain)] == [4, 0]
    found = split(chain, model())
    assert not names(found.fit) & names(found.held_out)
    alone = [Sample(f"{at}", {"x": drawn(1, 3, seed=at)}, None, np.array(["all"])) for at in range(30)]
    with pytest.raises(InputError, match="all of them belong together, by their groups"):
        split(alone, model())
