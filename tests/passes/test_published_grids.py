"""What must hold of weights that were published in few bits: found again without loss, and nothing else found."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as oir
import pytest
from factor_models import model_of
from laws import make_samples
from lossy_laws import check_edits

from burnish.backends.ort.session import executor
from burnish.backends.reference.runner import ReferenceRunner
from burnish.ir.errors import InputError
from burnish.ir.views.linear import linears
from burnish.passes import catalog, lossy
from burnish.passes.base import Outcome
from burnish.passes.lossy import LossyPass
from burnish.passes.published_grids import Published, find
from burnish.tools.lossy_context import context_for

Maker = Callable[[np.random.Generator, int, int], np.ndarray]


def half(numbers: np.ndarray) -> np.ndarray:
    return numbers.astype(np.float16).astype(np.float32)


def steps(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return half(rng.uniform(0.01, 0.1, (*shape, 1)))


def q4_0(rng: np.random.Generator, out: int, size: int) -> np.ndarray:
    step = steps(rng, out, size // 32) * rng.choice([-1, 1], (out, size // 32, 1))
    return (rng.integers(-8, 8, (out, size // 32, 32)) * step).astype(np.float32).reshape(out, size)


def q8_0(rng: np.random.Generator, out: int, size: int) -> np.ndarray:
    levels = rng.integers(-127, 128, (out, size // 32, 32))
    return (levels * steps(rng, out, size // 32)).astype(np.float32).reshape(out, size)


def q4_1(rng: np.random.Generator, out: int, size: int) -> np.ndarray:
    step, least = steps(rng, out, size // 32), half(rng.uniform(-0.9, 0.1, (out, size // 32, 1)))
    levels = rng.integers(0, 16, (out, size // 32, 32)).astype(np.float32)
    return (levels * step + least).astype(np.float32).reshape(out, size)


def with_zero_points(rng: np.random.Generator, out: int, size: int) -> np.ndarray:
    levels, zero = rng.integers(0, 16, (out, size // 64, 64)), rng.integers(0, 16, (out, size // 64, 1))
    return ((levels - zero) * steps(rng, out, size // 64)).astype(np.float32).reshape(out, size)


def q4_k(rng: np.random.Generator, out: int, size: int) -> np.ndarray:
    """Blocks of 32 whose steps and offsets are multiples, of 6 bits, of those of 256."""
    shape = (out, size // 256, 8, 1)
    step = (half(rng.uniform(1e-3, 2e-3, (out, size // 256, 1, 1))) * rng.integers(1, 64, shape)).astype(np.float32)
    least = (half(rng.uniform(1e-3, 2e-3, (out, size // 256, 1, 1))) * rng.integers(0, 64, shape)).astype(np.float32)
    levels = rng.integers(0, 16, (out, size // 256, 8, 32)).astype(np.float32)
    return (levels * step - least).astype(np.float32).reshape(out, size)


def q6_k(rng: np.random.Generator, out: int, size: int) -> np.ndarray:
    """Blocks of 16 whose steps are multiples, of 8 bits, of one of 256."""
    step = half(rng.uniform(1e-4, 2e-4, (out, size // 256, 1, 1))) * rng.integers(-128, 128, (out, size // 256, 16, 1))
    levels = rng.integers(-32, 32, (out, size // 256, 16, 16))
    return (levels * step.astype(np.float32)).astype(np.float32).reshape(out, size)


def ternary(rng: np.random.Generator, out: int, size: int) -> np.ndarray:
    return (rng.integers(-1, 2, (out, size)) * np.float32(0.0317)).astype(np.float32)


KINDS: dict[str, tuple[Maker, int, int, bool, bool]] = {
    "Q4_0": (q4_0, 4, 32, True, False),
    "Q4_1": (q4_1, 4, 32, True, True),
    "Q8_0": (q8_0, 8, 32, True, False),
    "Q4_K": (q4_k, 4, 32, True, True),
    "Q6_K": (q6_k, 8, 16, True, False),
    "zero points": (with_zero_points, 4, 64, False, False),
    "ternary": (ternary, 2, 128, True, False),
}
"""How weights are made; their bits, block, whether there are no zero points, and whether there are offsets."""


def found(weight: np.ndarray, **options: bool) -> Published | None:
    return find(weight.astype(np.float64), (2, 4, 8), weight.dtype, **options)  # type: ignore[arg-type]


def slack(weight: np.ndarray, block: int) -> np.ndarray:
    largest = np.abs(weight.astype(np.float64)).reshape(-1, block).max(1).repeat(block).reshape(weight.shape)
    return np.asarray(4 * np.finfo(weight.dtype).eps * largest)


def within(one: Published, weight: np.ndarray) -> bool:
    return bool((np.abs(one.numbers() - weight) <= slack(weight, one.scales.block or 1)).all())


@pytest.mark.parametrize("kind", KINDS)
def test_what_weights_were_published_in_is_found_to_float_rounding(kind: str) -> None:
    make, bits, block, symmetric, shifted = KINDS[kind]
    for seed in range(5):
        weight = make(np.random.default_rng(seed), 48, 256)
        one = found(weight)
        assert one is not None and within(one, weight)
        grid = one.scales.grid
        assert (grid.bits, one.scales.block, grid.symmetric, one.offset is not None) == (
            bits,
            block,
            symmetric,
            shifted,
        )
        assert one.levels.min() >= grid.low and one.levels.max() <= grid.high


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_that_use_few_of_the_numbers_are_found_as_well(kind: str) -> None:
    make, rng = KINDS[kind][0], np.random.default_rng(0)
    weight = make(rng, 48, 256)
    blocks = weight.reshape(48, 8, 32)
    blocks[0] = 0
    blocks[1] = blocks[1, 0, 0]
    two = rng.integers(0, 2, (8, 32))
    blocks[2] = np.where(two, blocks[2, :, :1], blocks[2, :, 1:2])
    blocks[3, 2] = 0
    one = found(weight)
    assert one is not None and within(one, weight)
    assert np.isfinite(one.scales.scale).all() and (one.scales.scale != 0).all()
    if one.offset is not None:
        assert np.array_equal(one.numbers()[:2], weight[:2].astype(np.float64)), "equal numbers are exact"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", [0, 5000, -1])
def test_one_number_a_thousandth_of_a_step_off_is_another_weight(kind: str, place: int) -> None:
    weight = KINDS[kind][0](np.random.default_rng(1), 48, 256)
    one = found(weight)
    assert one is not None
    each = np.abs(one.scales.spread(one.scales.scale, weight.shape))
    off = weight.copy()
    off.flat[place] += 1e-3 * each.flat[place]
    assert found(off) is None


@pytest.mark.parametrize("size", [16, 32, 48, 256])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_nothing_is_found_in_weights_that_never_were_in_few_bits(size: int, dtype: type) -> None:
    rng = np.random.default_rng(size)
    for weight in (
        half(rng.standard_normal((40, size))),
        rng.standard_normal((40, size)),
        rng.uniform(-1, 1, (40, size)),
        1 + 0.01 * rng.random((40, size)),
    ):
        assert found(weight.astype(dtype)) is None


def test_few_bits_in_half_precision_are_found() -> None:
    for make in (q4_0, with_zero_points, ternary):
        weight = make(np.random.default_rng(0), 48, 256).astype(np.float16)
        one = found(weight)
        assert one is not None and within(one, weight) and one.scales.scale.dtype == np.float16


def test_forms_without_offsets_or_signs_get_none() -> None:
    rng = np.random.default_rng(0)
    assert found(q4_1(rng, 48, 256), offsets=False) is None
    assert found(q4_0(rng, 48, 256), signed=True) is None, "scales would have to be negative"
    one = found(q8_0(rng, 48, 256), signed=True)
    assert one is not None and one.scales.grid.signed and (one.scales.scale > 0).all()


MATMUL = "g (float[N, 7, 256] x) => (float[N, 7, 48] y) <float[256, 48] w> { y = MatMul (x, w) }"
GEMM = """g (float[N, 256] x) => (float[N, 48] y) <float[48, 256] w, float[48] b> {
    y = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (x, w, b) }"""
TIED = """g (int64[N, S] ids) => (float[N, S, 48] y) <float[48, 256] w, float[256, 256] u> {
    e = Gather (w, ids)  h = MatMul (e, u)  t = Transpose <perm = [1, 0]> (w)  y = MatMul (h, t) }"""
OLD = '<ir_version: 8, opset_import: ["": 11]>\n' + MATMUL
MODELS = {"MatMul": MATMUL, "Gemm": GEMM, "tied": TIED, "opset 11": OLD}


def published(source: str, make: Maker) -> oir.Model:
    model, rng = model_of(source), np.random.default_rng(0)
    for value in model.graph.initializers.values():
        shape = tuple(value.const_value.shape)  # type: ignore[union-attr]
        if len(shape) == 2:
            turned = shape == (256, 48)
            numbers = make(rng, *(reversed(shape) if turned else shape))  # type: ignore[arg-type]
            value.const_value = oir.tensor(np.ascontiguousarray(numbers.T) if turned else numbers, name=value.name)
    if "u" in model.graph.initializers:
        square = make(rng, 256, 256)
        model.graph.initializers["u"].const_value = oir.tensor(np.ascontiguousarray(square.T), name="u")
    return model


def proposed(model: oir.Model, **options: object) -> tuple[LossyPass, list[lossy.Edit], Outcome]:
    one, outcome = catalog.make("quantize-weights", options), Outcome("quantize-weights")
    assert isinstance(one, LossyPass)
    return one, one.propose(model, context_for(model, list(make_samples(model))), outcome), outcome


@pytest.mark.parametrize(
    ("source", "kind", "activations"),
    [
        *(("MatMul", kind, "float") for kind in KINDS if kind not in ("Q4_K", "Q6_K")),
        *((source, kind, "float") for source in ("Gemm", "tied") for kind in ("Q4_1", "Q8_0", "zero points")),
        *((source, kind, "int8") for source in ("MatMul", "tied") for kind in ("Q4_1", "Q8_0")),
        ("opset 11", "Q4_1", "float"),
    ],
)
def test_a_model_of_published_weights_computes_what_it_did(source: str, kind: str, activations: str) -> None:
    model = published(MODELS[source], KINDS[kind][0])
    options = {"bits": 8, "activations": activations}
    one, edits, outcome = proposed(model, **options)
    without = source in ("tied", "opset 11") and KINDS[kind][4]
    assert sum(edit.option.endswith("exact") for edit in edits) == len(edits) - without
    check_edits(one, model, edits, outcome)
    after, made = lossy.apply(model, edits, [one])
    assert sum(made[catalog.spec(one)].notes.values()) == len(edits) - without
    assert all(outcome.errors[edit.key] < 1e-6 for edit in edits if edit.option.endswith("exact"))
    bound = 0.03 if activations == "int8" or without else 2e-6
    for sample in make_samples(model):
        wanted = ReferenceRunner(model).run(sample.feeds)["y"]
        got = executor()(after).run(sample.feeds)["y"]
        assert np.linalg.norm(got - wanted) <= bound * np.linalg.norm(wanted)
    _, again, told = proposed(after, **options)
    assert not again, "what is stored stays"
    if KINDS[kind][4] and source != "opset 11":
        assert any("adds the offsets" in skip.reason for skip in told.skipped)


def test_no_rounding_touches_them_and_a_search_gets_fewer_bits_too() -> None:
    model = published(MATMUL, q4_1)
    for options in ({"bits": 4, "rounding": "gptq"}, {"bits": 4, "block": 128}, {"bits": 8, "rounding": "nearest"}):
        _, edits, _ = proposed(model, **options)
        assert [edit.option for edit in edits] == ["int4 block 32 exact"]
    one, edits, _ = proposed(model)
    assert [edit.option for edit in edits] == ["int4 block 32 exact", "int2 block 32"]
    told = [lossy.apply(model, [edit], [one])[1][catalog.spec(one)].notes for edit in edits]
    assert [sum(notes.values()) for notes in told] == [1, 0], "what is chosen counts, not what could be"
    _, edits, _ = proposed(model, bits=4, published=False)
    assert [edit.option for edit in edits] == ["int4 block 32"]
    _, edits, _ = proposed(model, bits=2)
    assert [edit.option for edit in edits] == ["int2 block 32"]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("source", ["MatMul", "Gemm", "tied"])
def test_activations_that_stay_as_they_are_add_no_error(source: str, symmetric: bool, bits: int) -> None:
    model = model_of(MODELS[source])
    made = {}
    for activations in ("int8", "float"):
        one, edits, _ = proposed(model, bits=bits, symmetric=symmetric, activations=activations)
        check_edits(one, model, edits)
        made[activations] = lossy.apply(model, edits, [one])[0]
    for sample in make_samples(model):
        wanted = ReferenceRunner(made["int8"]).run(sample.feeds)["y"]
        got = executor()(made["float"]).run(sample.feeds)["y"]
        assert np.linalg.norm(got - wanted) <= 2e-6 * np.linalg.norm(wanted)


def test_what_has_no_kernel_for_activations_that_stay_is_refused() -> None:
    model = model_of(MATMUL)
    _, edits, outcome = proposed(model, bits=2, activations="float")
    assert not edits and ["no quick kernel for 2 bits" in skip.reason for skip in outcome.skipped] == [True]
    _, edits, _ = proposed(published(MATMUL, ternary), bits=4, activations="float")
    assert [edit.option for edit in edits] == ["int4 block 128 exact"]
    with pytest.raises(InputError, match="is for `form=matmul-nbits`"):
        catalog.make("quantize-weights", {"form": "dequantize", "activations": "float"})


def test_standard_blocks_hold_what_goes_through_zero() -> None:
    source = '<ir_version: 10, opset_import: ["": 21]>\n' + MATMUL
    model = published(source, q8_0)
    one, edits, _ = proposed(model, bits=8, form="dequantize")
    assert [edit.option for edit in edits] == ["int8 block 32 exact"]
    (old,), (new,) = (list(linears(which)) for which in (model, lossy.apply(model, edits, [one])[0]))
    assert (np.abs(new.weight() - old.weight()) <= slack(old.weight().astype(np.float32), 32)).all()
    _, edits, _ = proposed(published(source, q4_1), bits=8, form="dequantize")
    assert [edit.option for edit in edits] == ["int8 block 32"]
