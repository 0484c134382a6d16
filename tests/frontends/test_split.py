"""Two parts that share nothing, the same for the same seed, and what cannot be parted."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as oir
import pytest

from burnish.backends.ort.session import executor
from burnish.frontends import load
from burnish.frontends.samples import read_samples
from burnish.frontends.split import Split, few, split
from burnish.ir.errors import InputError
from burnish.ir.samples import Sample

DEMO = Path(__file__).parents[2] / "tools" / "demo"


def model(inputs: str = "float[N, 3] x") -> oir.Model:
    name = inputs.split(",")[0].split("]")[0] + "]"
    return load(onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 20]> g ({inputs}) => ({name} y) {{ y = Identity ({inputs.split()[-1]}) }}'
        if "," not in inputs.replace(name, "") else
        f'<ir_version: 10, opset_import: ["": 20]> g ({inputs}) => (float[M, 3] y) {{ y = Relu (x) }}'
    ))  # fmt: skip


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def batch(rows: int, labels: object = None, seed: int = 0) -> Sample:
    return Sample(f"b{seed}", {"x": drawn(rows, 3, seed=seed)}, None if labels is None else np.asarray(labels))


def rows_of(part: list[Sample]) -> set[bytes]:
    return {row.tobytes() for one in part for row in one.feeds["x"]}


def labels_of(part: list[Sample]) -> Counter[int]:
    return Counter(int(label) for one in part if one.labels is not None for label in one.labels.reshape(-1))


def check(found: Split, samples: list[Sample]) -> None:
    """Every row is in exactly one part, beside its label."""
    whole = {row.tobytes(): index for one in samples for index, row in enumerate(one.feeds["x"])}
    fit, held = rows_of(found.fit), rows_of(found.held_out)
    assert fit and held and not fit & held and fit | held == set(whole)
    assert sum(len(one.feeds["x"]) for one in found.fit + found.held_out) == sum(len(s.feeds["x"]) for s in samples)
    names = [one.name for one in found.fit + found.held_out]
    assert len(set(names)) == len(names)


def test_the_batch_of_the_demo_is_cut_into_halves_with_every_class_in_both() -> None:
    resnet = load(DEMO / "digits_resnet.onnx")
    (whole,) = read_samples(DEMO / "digits.npz", resnet)
    found = split([whole], resnet)
    assert (len(found.fit), len(found.held_out)) == (10, 10)
    one, two = labels_of(found.fit), labels_of(found.held_out)
    assert one.total() == two.total() == 250 and all(abs(one[digit] - two[digit]) <= 2 for digit in range(10))
    pictures = {array.tobytes(): int(label) for array, label in zip(whole.feeds["image"], whole.labels, strict=True)}  # type: ignore[arg-type]
    for sample in found.fit + found.held_out:
        assert sample.labels is not None and sample.feeds["image"].shape == (25, 1, 8, 8)
        assert [pictures[array.tobytes()] for array in sample.feeds["image"]] == sample.labels.tolist()
    assert "250 rows to fit, 250 held out" in found.how


@pytest.mark.parametrize("rows", [2, 3, 7, 19, 20, 21, 101])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.9])
def test_every_row_is_in_one_part_and_the_share_is_kept(rows: int, share: float) -> None:
    samples = [batch(rows, np.arange(rows) % 3)]
    found = split(samples, model(), share=share)
    check(found, samples)
    held = sum(len(one.feeds["x"]) for one in found.held_out)
    assert abs(held - share * rows) <= 2
    assert len(found.held_out) >= min(10, held) and len(found.fit) >= min(10, rows - held)


def test_the_seed_decides_alone() -> None:
    samples = [batch(50, np.arange(50) % 2)]
    one, same, other = (split(samples, model(), seed=seed) for seed in (1, 1, 2))
    assert rows_of(one.fit) == rows_of(same.fit) != rows_of(other.fit)
    assert [sample.name for sample in one.fit] == [sample.name for sample in same.fit]


def test_many_samples_stay_whole_and_few_are_cut() -> None:
    many = [batch(3, seed=seed) for seed in range(24)]
    found = split(many, model())
    check(found, many)
    assert len(found.fit) == len(found.held_out) == 12 and all(one in many for one in found.fit)
    few = many[:6]
    found = split(few, model())
    check(found, few)
    assert sum(len(one.feeds["x"]) for one in found.fit) == 9


def test_the_same_inputs_are_never_in_both_parts() -> None:
    rows = np.repeat(drawn(10, 3), 4, axis=0)
    found = split([Sample("s", {"x": rows}, np.arange(40) % 4)], model())
    assert not rows_of(found.fit) & rows_of(found.held_out)
    assert sum(len(one.feeds["x"]) for one in found.fit) == 20


@pytest.mark.parametrize("size", [4, 1])
def test_queries_stay_with_their_documents(size: int) -> None:
    keys = np.concatenate([np.arange(16), -1 - np.random.default_rng(0).permutation(16), [-90, -91]])
    pieces = [keys[i : i + size] for i in range(0, len(keys), size)]
    samples = [Sample(f"s{i}", {"x": drawn(len(one), 3, seed=i)}, one) for i, one in enumerate(pieces)]
    found = split(samples, model())
    check(found, samples)
    for part in (found.fit, found.held_out):
        labels = labels_of(part)
        queries = {label for label in labels if label >= 0}
        assert len(queries) == 8 and queries == {-1 - label for label in labels if -90 < label < 0}
    assert "documents" in found.how


def test_a_batch_that_is_not_on_the_first_axis_and_inputs_without_one() -> None:
    several = load(onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20]> g (float[N, 3] x, float[2, N, 4] state, float[1] scale) => '
        "(float[N, 3] y, float[2, N, 4] t) { y = Mul (x, scale)  t = Mul (state, scale) }"
    ))  # fmt: skip
    feeds = {"x": drawn(30, 3), "state": drawn(2, 30, 4), "scale": np.ones(1, np.float32)}
    found = split([Sample("s", feeds)], several)
    for one in found.fit + found.held_out:
        for index, row in enumerate(one.feeds["x"]):
            place = int(np.flatnonzero((feeds["x"] == row).all(1))[0])
            assert np.array_equal(one.feeds["state"][:, index], feeds["state"][:, place])
        assert one.feeds["scale"] is feeds["scale"]


@pytest.mark.parametrize(
    "labels",
    [
        np.full((30, 4), 0.5),
        np.full(30, np.nan),
        np.array(["a", "b"] * 15),
        np.arange(60).reshape(30, 2),
        np.ones(30, bool),
    ],
)
def test_labels_of_any_kind_go_with_their_rows(labels: np.ndarray) -> None:
    samples = [batch(30, labels)]
    found = split(samples, model())
    check(found, samples)
    for one in found.fit:
        assert one.labels is not None and len(one.labels) == len(one.feeds["x"]) and one.labels.dtype == labels.dtype


@pytest.mark.parametrize(
    ("samples", "inputs", "cause"),
    [
        ([], "float[N, 3] x", "no samples"),
        ([batch(1)], "float[N, 3] x", "one row"),
        ([batch(8)], "float[8, 3] x", "the batch is fixed"),
        ([batch(8, np.arange(3))], "float[N, 3] x", r"labels \[3\] are not one for each of 8 rows"),
        ([batch(8, 5)], "float[N, 3] x", r"labels \[\] are not one for each of 8 rows"),
        ([Sample(f"s{i}", {"x": np.ones((2, 3), np.float32)}) for i in range(30)], "float[N, 3] x", "the same"),
        ([batch(4, [0, 0, -1, -1])], "float[N, 3] x", "belong together"),
        ([Sample("s", {"x": np.zeros((0, 3), np.float32)})], "float[N, 3] x", "one, of"),
    ],
)
def test_what_cannot_be_parted(samples: list[Sample], inputs: str, cause: str) -> None:
    with pytest.raises(InputError, match=cause) as caught:
        split(samples, model(inputs))
    assert not samples or "give more samples" in str(caught.value.hint)


ALONE = {
    "float[N, 3] y": "y = Softmax (x)",
    "float[3, N] y": "y = Transpose (x)",
    "float[1] y": "a = Constant <value = float[1] {2}> ()  y = Identity (a)",
}
MEET = {
    "float[N, 3] y": "y = CumSum (x, k)",
    "float[1, 3] y": "y = ReduceMean <keepdims = 1> (x, k)",
}


@pytest.mark.parametrize(("output", "body"), [*ALONE.items(), *MEET.items()])
def test_rows_that_meet_in_the_model_are_not_parted(output: str, body: str) -> None:
    one = load(onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 20]> g (float[N, 3] x) => ({output}) <int64[1] k = {{0}}> {{ {body} }}'
    ))  # fmt: skip
    samples = [batch(12, np.arange(12) % 2, seed=1), batch(9, np.arange(9) % 2, seed=2)]
    runner = executor()(one)
    if output in ALONE and ALONE[output] == body:
        check(split(samples, one, runner), samples)
    else:
        found = split(samples, one, runner)
        assert [len(part[0].feeds["x"]) for part in (found.fit, found.held_out)] in ([12, 9], [9, 12])
        with pytest.raises(InputError, match="its rows change each other's outputs"):
            split(samples[:1], one, runner)
    runner.close()


def test_one_batch_of_a_fixed_size_and_another_make_two_parts() -> None:
    samples = [batch(8, seed=1), batch(8, seed=2)]
    found = split(samples, model("float[8, 3] x"))
    assert len(found.fit) == len(found.held_out) == 1 and found.how == "1 samples to fit, 1 held out"


def test_few_samples_are_spread_over_all_and_have_about_as_many_rows_as_wanted() -> None:
    samples = [batch(4, seed=seed) for seed in range(40)]
    found = few(samples, model(), rows=64, least=8)
    assert len(found) == 16
    places = [samples.index(one) for one in found]
    assert places == sorted(places) and set(np.diff(places)) <= {2, 3}
    assert len(few(samples, model(), rows=8, least=8)) == 8
    assert few(samples[:5], model(), rows=64, least=8) == samples[:5]
    assert len(few(samples, model("float[4, 3] x"), rows=10, least=8)) == 10


def test_of_texts_few_samples_hold_as_many_places_as_are_enough() -> None:
    samples = [batch(1, seed=seed) for seed in range(40)]

    def count(places: int) -> int:
        return len(few(samples, model(), rows=64, least=8, places=places, enough=256))

    assert [count(places) for places in (1, 8, 40, 128, 4096)] == [40, 8, 7, 2, 2]
