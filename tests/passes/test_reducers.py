"""The laws of reducers: parts merge to the whole, order does not matter, a mask is the same as leaving rows out."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from burnish.ir.errors import InputError
from burnish.passes import gram
from burnish.passes.gram import ConvolutionGram, Gram
from burnish.passes.reducers import Histogram, Moments, Range, Reducer
from burnish.passes.reservoirs import Reservoir, Several, TopK

Make = Callable[[], Reducer]

REDUCERS: dict[str, Make] = {
    "moments": Moments,
    "moments of the tensor": lambda: Moments(axis=None),
    "range of the tensor": Range,
    "range per channel": lambda: Range(axis=-1),
    "range per token": lambda: Range(axis=1),
    "histogram": lambda: Histogram(bins=64),
    "top": lambda: TopK(5),
    "gram": Gram,
    "exact gram": lambda: Gram(exact=True),
    "several": lambda: Several((Moments(), Histogram(), Gram())),
}


def stream(count: int = 6, seed: int = 0) -> list[np.ndarray]:
    """Arrays [batch, positions, 7] of different batches and lengths, with ties and large elements."""
    rng = np.random.default_rng(seed)
    arrays = []
    for index in range(count):
        shape = (int(rng.integers(1, 4)), int(rng.integers(1, 9)), 7)
        array = rng.standard_normal(shape) * 10.0 ** rng.integers(-2, 3)
        arrays.append(np.clip(array, -50, 50).astype(np.float64 if index % 2 else np.float32))
    return arrays


def reduced(make: Make, arrays: list[np.ndarray], keeps: list[np.ndarray] | None = None) -> Reducer:
    reducer = make()
    for index, array in enumerate(arrays):
        reducer.add(array, None if keeps is None else keeps[index])
    return reducer


def numbers(reducer: Reducer) -> dict[str, Any]:
    """What a reducer found, by name."""
    if isinstance(reducer, Several):
        return {f"{i}.{name}": value for i, part in enumerate(reducer.parts) for name, value in numbers(part).items()}
    if isinstance(reducer, Gram):
        return {"rows": reducer.rows, "matrix": reducer.matrix.copy(), "mean": reducer.mean}
    return {name: value for name, value in reducer.state().items() if name != "options"}


def same(one: Reducer, other: Reducer, tolerance: float = 1e-6) -> None:
    first, second = numbers(one), numbers(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        scale = np.abs(np.asarray(value, np.float64)).max(initial=0.0)
        np.testing.assert_allclose(second[name], value, rtol=tolerance, atol=tolerance * scale, err_msg=name)


@pytest.mark.parametrize("name", REDUCERS)
def test_parts_that_are_merged_give_the_whole(name: str) -> None:
    arrays = stream()
    first, second = reduced(REDUCERS[name], arrays[:2]), reduced(REDUCERS[name], arrays[2:])
    first.merge(second)
    same(first, reduced(REDUCERS[name], arrays))
    same(second, reduced(REDUCERS[name], arrays[2:]))


@pytest.mark.parametrize("name", REDUCERS)
def test_an_empty_part_changes_nothing(name: str) -> None:
    found, empty = reduced(REDUCERS[name], stream()), REDUCERS[name]()
    found.merge(empty)
    same(found, reduced(REDUCERS[name], stream()))
    empty.merge(found)
    same(empty, found)
    assert found.fresh().options == found.options
    with pytest.raises(AssertionError):
        np.testing.assert_equal(found.fresh().state(), found.state())


@pytest.mark.parametrize("name", REDUCERS)
def test_twins_go_their_own_way(name: str) -> None:
    arrays = stream()
    one = reduced(REDUCERS[name], arrays[:3])
    other = one.twin()
    third = other.twin()
    same(other, one)
    for array in arrays[3:]:
        one.add(array)
    other.merge(reduced(REDUCERS[name], arrays[3:5]))
    same(one, reduced(REDUCERS[name], arrays))
    same(other, reduced(REDUCERS[name], arrays[:5]))
    same(third, reduced(REDUCERS[name], arrays[:3]))


@pytest.mark.parametrize("name", REDUCERS)
def test_the_order_of_the_arrays_does_not_matter(name: str) -> None:
    arrays = stream()
    same(reduced(REDUCERS[name], arrays[::-1]), reduced(REDUCERS[name], arrays))


@pytest.mark.parametrize("name", [name for name in REDUCERS if name != "range per token"])
def test_a_mask_is_the_same_as_leaving_its_rows_out(name: str) -> None:
    rng = np.random.default_rng(1)
    arrays = stream()
    keeps = [rng.random((*array.shape[:2], 1)) < 0.6 for array in arrays]
    left = [array[keep[..., 0]][None] for array, keep in zip(arrays, keeps, strict=True)]
    same(reduced(REDUCERS[name], arrays, keeps), reduced(REDUCERS[name], left))
    everything = [np.ones((1, array.shape[1], 1), bool) for array in arrays]
    same(reduced(REDUCERS[name], arrays, everything), reduced(REDUCERS[name], arrays))


def test_a_mask_leaves_tokens_out_of_their_range() -> None:
    array = np.arange(12.0).reshape(2, 3, 2)
    keep = np.array([[True, True, False], [True, False, False]])[..., None]
    found = Range(axis=1)
    found.add(array, keep)
    assert found.absmax is not None and found.absmax.tolist() == [7, 3, 0]
    found.add(np.full((1, 4, 2), -9.0))
    assert found.absmax.tolist() == [9, 9, 9, 9]


@pytest.mark.parametrize("name", REDUCERS)
def test_a_state_goes_through_a_file_and_on(name: str) -> None:
    arrays = stream()
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **reduced(REDUCERS[name], arrays[:3]).state())
    file.seek(0)
    with np.load(file, allow_pickle=False) as state:
        resumed = REDUCERS[name]().restored(state)
    for array in arrays[3:]:
        resumed.add(array)
    same(resumed, reduced(REDUCERS[name], arrays))


@pytest.mark.parametrize("name", [*REDUCERS, "reservoir", "convolution"])
def test_no_more_is_held_than_was_declared(name: str) -> None:
    more: dict[str, Make] = {
        "reservoir": lambda: Reservoir(100),
        "convolution": lambda: ConvolutionGram(kernel=(3,), groups=5),
    }
    make = {**REDUCERS, **more}[name]
    array = np.random.default_rng(0).standard_normal((3, 40, 7)).astype(np.float32)
    found = make()
    for _ in range(50):
        found.add(array)
        held = sum(
            a.nbytes for part in getattr(found, "parts", (found,)) for a in vars(part).values() if hasattr(a, "nbytes")
        )
        assert held <= found.nbytes(array.shape)


def test_moments_are_those_of_numpy_even_far_from_zero() -> None:
    arrays = [array + 1e6 for array in stream() if array.dtype == np.float64]
    rows = np.concatenate([array.reshape(-1, 7) for array in arrays])
    found = Moments()
    for array in arrays:
        found.add(array)
    assert found.rows == len(rows) and found.mean is not None and found.variance is not None
    np.testing.assert_allclose(found.mean, rows.mean(0), rtol=1e-13)
    np.testing.assert_allclose(found.variance, rows.var(0), rtol=1e-9)


def test_a_histogram_counts_every_element_in_the_bin_where_it_lies() -> None:
    arrays = [*stream(), np.zeros((1, 1, 7)), np.array([[[np.nan, np.inf, -np.inf, 0, 1, -1, 2]]])]
    found = Histogram(bins=128)
    for array in arrays:
        found.add(array)
    everything = np.concatenate([array.reshape(-1) for array in arrays]).astype(np.float64)
    finite = everything[np.isfinite(everything)]
    assert found.counts is not None and (found.nan, found.infinite) == (1, 2)
    np.testing.assert_array_equal(found.counts, np.histogram(finite, found.edges)[0])
    assert found.edges[-1] / 2 <= np.abs(finite).max() < found.edges[-1]
    width = found.edges[1] - found.edges[0]
    for share in (0.01, 0.5, 0.99, 1.0):
        assert abs(found.quantile(share) - np.quantile(finite, share, method="inverted_cdf")) <= width
    assert np.isnan(Histogram().quantile(0.5))


def test_the_largest_elements_are_found_with_their_features() -> None:
    arrays = stream()
    found = TopK(5)
    for array in arrays:
        found.add(array)
    rows = np.concatenate([array.reshape(-1, 7).astype(np.float64) for array in arrays])
    flat = sorted(((-abs(v), f, -v) for row in rows for f, v in enumerate(row)))[:5]
    assert found.values is not None and found.features is not None
    assert [(-abs(v), f, -v) for v, f in zip(found.values, found.features, strict=True)] == flat
    found.add(np.full((1, 1, 7), np.nan))
    assert np.isfinite(found.values).all()


def test_a_reservoir_is_the_same_however_the_stream_is_cut_and_uniform() -> None:
    rows = np.arange(5000.0).reshape(-1, 1)
    whole, cut = Reservoir(100, seed=3), Reservoir(100, seed=3)
    whole.add(rows)
    for start in range(0, 2000, 37):
        cut.add(rows[start : min(start + 37, 2000)])
    rest = Reservoir(100, seed=3, first=2000)
    rest.add(rows[2000:])
    cut.merge(rest)
    assert whole.sample is not None and cut.seen == 5000
    np.testing.assert_array_equal(cut.sample, whole.sample)
    assert len(np.unique(whole.sample)) == 100
    counts = np.zeros(50)
    for seed in range(200):
        drawn = Reservoir(10, seed=seed)
        drawn.add(rows[:50])
        counts[np.asarray(drawn.sample, int).reshape(-1)] += 1
    assert np.square(counts - 40).sum() / 40 < 80  # chi squared, 49 degrees of freedom: 99.7 % are below


@pytest.mark.parametrize("rows", [3, 1023, 1024, 1500, 9000, 20000])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_gram_matrix_is_the_direct_one(rows: int, dtype: Any) -> None:
    x = (np.random.default_rng(rows).standard_normal((rows, 5)) + 1).astype(dtype)
    exact, found = Gram(exact=True), Gram()
    for part in np.array_split(x, 3):
        exact.add(part)
        found.add(part)
    wide = x.astype(np.float64)
    direct = wide.T @ wide
    np.testing.assert_allclose(exact.matrix, direct, rtol=1e-12)
    np.testing.assert_allclose(found.matrix, direct, rtol=1e-12 if dtype is np.float64 else 1e-6, atol=1e-7 * rows)
    np.testing.assert_allclose(exact.mean, wide.mean(0), rtol=1e-12)
    np.testing.assert_allclose(exact.covariance, np.cov(wide.T, bias=True), rtol=1e-9, atol=1e-12)
    assert found.rows == rows


def test_float32_products_are_within_float32_rounding_of_the_largest_eigenvalue() -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((8192, 300)) * np.geomspace(1, 1e-3, 300) @ rng.standard_normal((300, 300)) + 2).astype(
        np.float32
    )
    exact, found = Gram(exact=True), Gram()
    exact.add(x)
    found.add(x)
    assert np.linalg.norm(found.matrix - exact.matrix, 2) < 1.2e-7 * np.linalg.norm(exact.matrix, 2)


@pytest.mark.parametrize("size", [3, 40])
def test_the_gram_matrix_of_channels_reads_axis_1(size: int) -> None:
    images = np.random.default_rng(0).standard_normal((3, 6, size, size)).astype(np.float32)
    found = Gram(axis=1)
    found.add(images)
    rows = np.moveaxis(images, 1, -1).reshape(-1, 6).astype(np.float64)
    np.testing.assert_allclose(found.matrix, rows.T @ rows, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(found.mean, rows.mean(0), atol=1e-6)


def test_products_that_overflow_float32_are_made_in_float64() -> None:
    x = np.full((2000, 2), -3e38, np.float32)
    found = Gram()
    found.add(x)
    np.testing.assert_allclose(found.matrix, 2000 * 9e76, rtol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel": (3, 3), "pads": (1, 1, 1, 1)},
        {"kernel": (3, 2), "strides": (2, 1), "dilations": (1, 2), "pads": (1, 0, 1, 0)},
        {"kernel": (3, 3), "strides": (2, 2), "pads": (1, 1, 1, 1), "groups": 6},
        {"kernel": (5, 5), "dilations": (2, 2), "pads": (4, 4, 4, 4), "groups": 2},
        {"kernel": (1, 1)},
        {"kernel": (1, 1), "exact": True},
    ],
    ids=str,
)
def test_the_gram_matrix_of_a_convolution_is_that_of_unfolded_patches(options: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    images = np.random.default_rng(0).standard_normal((3, 6, 40, 38)).astype(np.float32)
    found = ConvolutionGram(**options)
    found.add(images[:1])
    found.add(images[1:])
    rest = (options.get("dilations", 1), options.get("pads", (0, 0))[:2], options.get("strides", 1))
    unfolded = torch.nn.functional.unfold(torch.from_numpy(images).double(), options["kernel"], *rest)
    groups = options.get("groups", 1)
    rows = unfolded.permute(0, 2, 1).reshape(-1, groups, unfolded.shape[1] // groups).numpy()
    direct = np.einsum("ngi,ngj->gij", rows, rows)
    assert found.rows == len(rows)
    np.testing.assert_allclose(found.matrix.reshape(direct.shape), direct, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("same", ["upper", "lower"])
def test_automatic_padding_is_that_of_onnx(same: str) -> None:
    import onnx

    from burnish.backends.ort.session import executor
    from burnish.frontends import load
    from burnish.ir.views.convolution import convolutions

    text = f"""<ir_version: 10, opset_import: ["": 20]> g (float[1, 2, 9] x) => (float[1, 3, m] y)
      <float[3, 2, 4] w> {{ y = Conv <auto_pad = "SAME_{same.upper()}", strides = [2], kernel_shape = [4]> (x, w) }}"""
    proto = onnx.parser.parse_model(text)
    weight = np.random.default_rng(0).standard_normal((3, 2, 4)).astype(np.float32)
    proto.graph.initializer.add().CopyFrom(onnx.numpy_helper.from_array(weight, "w"))
    model = load(proto)
    (layer,) = convolutions(model)
    x = np.random.default_rng(1).standard_normal((1, 2, 9)).astype(np.float32)
    y = executor()(model).run({"x": x})["y"]
    found = ConvolutionGram(kernel=layer.kernel, strides=layer.strides, same=same)
    found.add(x)
    flat = weight.reshape(3, -1).astype(np.float64)
    np.testing.assert_allclose(np.diag(flat @ found.matrix @ flat.T), np.square(y).sum((0, 2)), rtol=1e-5)


def test_patches_are_unrolled_some_at_a_time() -> None:
    reducer = ConvolutionGram(kernel=(3, 3), pads=(1, 1, 1, 1))
    tiles = list(reducer._tiles(np.ones((4, 100, 100), np.float32)))
    counts = [tile.shape[1] for tile in tiles]
    assert {len(tile) for tile in tiles} == {4 * 9} and sum(counts) == 100 * 100
    assert max(counts) < gram.LEAST_ROWS + 100


@pytest.mark.parametrize(
    ("reducer", "array", "keep", "message"),
    [
        (Moments(axis=3), np.ones((2, 2)), None, "has no axis 3"),
        (Moments(), np.array(["a"]), None, "a statistic of <U1 is not possible"),
        (Moments(), np.ones((2, 3)), np.ones((2, 3), bool), "does not say which rows"),
        (Gram(), np.ones((2, 3)), np.ones((5, 1), bool), "does not say which rows"),
        (Range(), np.ones((2, 3)), np.ones(2, bool), "does not say which rows"),
        (ConvolutionGram(kernel=(3, 3)), np.ones((1, 2, 5)), None, "is no input of a convolution"),
        (ConvolutionGram(kernel=(3,)), np.ones((1, 2, 5)), np.zeros((1, 1, 5), bool), "mix positions"),
    ],
)
def test_what_cannot_be_reduced_is_refused(
    reducer: Reducer, array: np.ndarray, keep: np.ndarray | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        reducer.add(array, keep)


@pytest.mark.parametrize("make", [Moments, Gram, lambda: Reservoir(5)])
def test_features_may_not_change_in_number(make: Make) -> None:
    reducer = make()
    reducer.add(np.ones((2, 3)))
    with pytest.raises(InputError, match="4 features came after 3"):
        reducer.add(np.ones((2, 4)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Histogram(bins=100), "give a power of two"),
        (lambda: TopK(0), "positive number"),
        (lambda: Reservoir(0), "positive number"),
        (lambda: ConvolutionGram(kernel=(3, 3), strides=(1,)), "do not fit a kernel"),
        (lambda: Gram().merge(Gram(axis=1)), "cannot be merged"),
        (lambda: Gram().restored(Gram(axis=1).state()), "the state is that of"),
        (lambda: Gram().restored({}), "the state is that of nothing"),
        (lambda: Gram().matrix, "no row was seen"),
        (lambda: Gram().mean, "no row was seen"),
    ],
)
def test_options_and_states_that_cannot_be_used_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
