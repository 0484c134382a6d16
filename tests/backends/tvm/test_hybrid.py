"""Models that run in part as compiled code and in part in ONNX Runtime: what is chosen, why, and what it computes."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as oir
import pytest
from golden import parse_graph

import burnish
from burnish.ir.errors import InputError

tvm = pytest.importorskip("tvm")

from burnish.backends.ort import session  # noqa: E402
from burnish.backends.tvm import beside, choose, compiling, load  # noqa: E402
from burnish.backends.tvm.choose import Chooser  # noqa: E402
from burnish.backends.tvm.steps import OrtPart, array, ort_value  # noqa: E402
from burnish.backends.tvm.target import parse  # noqa: E402
from burnish.ir.samples import Sample  # noqa: E402
from burnish.passes.protocols import Verdict  # noqa: E402
from burnish.tools.api import ort_judge  # noqa: E402

MIXED = """g (float[n, 4] x) => (float[k, 4] z, float[2, k] places, float[n, 4] x, float[4, 4] w)
    <float[4, 4] w, float[1, 4] v, int64[1] one = {1}> {
    m = MatMul(x, w)  i = NonZero(m)  places = Cast<to=1>(i)  t = Transpose(i)  r = GatherND(m, t)
    u = Unsqueeze(r, one)  b = MatMul(u, v)  z = Tanh(b) }"""
SIMPLE = """g (float[n, 4] x) => (float[n, 4] y) <float[4, 4] w> { a = MatMul(x, w)  y = Tanh(a) }"""


def graph(text: str) -> oir.Model:
    """A model from ONNX text at opset 20, weights with values."""
    return oir.from_proto(parse_graph(f'<ir_version: 9, opset_import: ["": 20]> {text}'))


def feeds(rows: int = 3) -> dict[str, np.ndarray]:
    """Inputs of the models."""
    return {"x": np.random.default_rng(rows).standard_normal((rows, 4)).astype(np.float32)}


def chooser(model: oir.Model, **options: Any) -> Chooser:
    """What chooses the regions of a model for this machine."""
    target, judge = parse("llvm"), ort_judge("onnx")
    options = {"schedule": lambda fused: (compiling.scheduled(fused, target), 0)} | options
    return Chooser(model, target, [Sample("three rows", feeds()), Sample("five", feeds(5))], judge, **options)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of both kinds of regions, as an artefact."""
    folder = tmp_path_factory.mktemp("made") / "out"
    burnish.optimize(graph(MIXED), folder, target="llvm", regions="all", guard=["size"])
    return folder


def test_a_model_of_both_kinds_computes_what_it_does_in_onnx_runtime(mixed: Path) -> None:
    runner = load(mixed)
    assert [step.kind for step in runner.manifest.steps] == ["tvm", "ort", "tvm"] and runner.manifest.verified
    original = session.executor(level="off")(graph(MIXED))
    for rows in (1, 3, 6):
        found, expected = runner.run(feeds(rows)), original.run(feeds(rows))
        assert list(found) == list(expected)
        for name, wanted in expected.items():
            np.testing.assert_allclose(found[name], wanted, rtol=1e-5, atol=1e-5, err_msg=name)
    assert {one.name for one in mixed.iterdir()} == {"manifest.json", "code.so", "region_1.onnx"}


def test_nothing_at_all_is_handed_over_too(mixed: Path) -> None:
    found = load(mixed).run({"x": np.zeros((2, 4), np.float32)})
    assert found["places"].shape == (2, 0) and found["z"].shape == (0, 4)


def test_each_compiled_region_says_what_it_was_measured_to_be(mixed: Path) -> None:
    first, stays, last = load(mixed).manifest.steps
    for step in (first, last):
        assert step.evidence.error is not None and step.evidence.error < 1e-5 and step.evidence.ratio
    assert "NonZero" in stays.evidence.note and stays.nodes + first.nodes + last.nodes >= 8


def test_threads_share_a_runner(mixed: Path) -> None:
    runner = load(mixed)
    expected = {rows: runner.run(feeds(rows))["z"] for rows in range(1, 7)}
    wrong: list[int] = []

    def work(rows: int) -> None:
        for _ in range(20):
            if not np.array_equal(runner.run(feeds(rows))["z"], expected[rows]):
                wrong.append(rows)

    threads = [threading.Thread(target=work, args=(rows,)) for rows in expected]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert wrong == []


def test_untuned_code_for_a_cpu_stays_on_onnx_runtime_and_says_why(tmp_path: Path) -> None:
    resnet = Path(__file__).parents[3] / "tools" / "demo" / "digits_resnet.onnx"
    result = burnish.optimize(resnet, tmp_path / "out", target="llvm")
    assert result.compiled is not None
    (step,) = result.compiled.manifest.steps
    assert step.kind == "ort" and step.evidence.ratio is not None and step.evidence.ratio > 3
    assert "none of its kernels is tuned" in step.evidence.note and "in one run" in step.evidence.note
    assert {one.name for one in (tmp_path / "out").iterdir()} == {"manifest.json", "region_0.onnx"}
    images = np.zeros((2, 1, 8, 8), np.float32)
    assert load(tmp_path / "out").run({"image": images})["logits"].shape == (2, 10)


def test_a_model_that_is_all_of_onnx_runtimes_refuses_inputs_as_others_do(tmp_path: Path) -> None:
    resnet = Path(__file__).parents[3] / "tools" / "demo" / "digits_resnet.onnx"
    burnish.optimize(resnet, tmp_path / "out", target="llvm", dims="batch=1")
    runner, images = load(tmp_path / "out"), np.zeros((1, 1, 8, 8), np.float32)
    assert runner.run({"image": images})["logits"].shape == (1, 10)
    for feeds, message in (
        ({}, "`image` is missing"),
        ({"image": images, "other": images}, "no input `other`"),
        ({"image": images.astype(np.float64)}, "is float64, and has to be float32"),
        ({"image": np.zeros((2, 1, 8, 8), np.float32)}, r"has shape \[2, 1, 8, 8\]"),
    ):
        with pytest.raises(InputError, match=message):
            runner.run(feeds)
    runner.close()
    with pytest.raises(InputError, match="closed"):
        runner.run({"image": images})


def test_code_that_computes_something_else_is_not_compiled_whatever_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    run = choose.TvmRunner.run
    monkeypatch.setattr(choose.TvmRunner, "run", lambda self, given: {n: a + 1 for n, a in run(self, given).items()})
    found = chooser(graph(MIXED), everything=True).choose()
    assert all(one.region.kind == "ort" for one in found)
    assert "computes something else" in found[0].evidence.note


def test_code_that_tvm_cannot_compile_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: Any) -> Any:
        raise RuntimeError("first line\ncannot schedule this")

    monkeypatch.setattr(choose.compiling, "build", fails)
    (one,) = chooser(graph(SIMPLE)).choose()
    assert one.region.kind == "ort" and "TVM cannot compile it: cannot schedule this" in one.evidence.note


BLOCK = "a{i} = MatMul({x}, w{i})  b{i} = {op}(a{i})  c{i} = Add({x}, b{i})  "
BLOCKS = (
    "g (float[n, 4] x) => (float[n, 4] y) <float[4, 4] w0, float[4, 4] w1, float[4, 4] w2> {"
    + BLOCK.format(i=0, x="x", op="Tanh")
    + BLOCK.format(i=1, x="c0", op="Gelu")
    + BLOCK.format(i=2, x="c1", op="Tanh")
    + "y = Neg(c2) }"
)


@pytest.fixture
def decided(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Lets a region win when it has no node of an operator, in place of its time."""

    def decide(loses: str) -> None:
        seen: list[set[str]] = []
        measured = Chooser._measured

        def watched(self: Chooser, region: Any) -> Any:
            seen.append({node.op_type for node in region.nodes})
            return measured(self, region)

        def verdict(a: Any, b: Any, **options: Any) -> Verdict:
            wins = loses not in seen[-1]
            ratio = 0.5 if wins else 2.0
            return Verdict(ratio=ratio, low=0.4, high=2.1, slower=not wins, faster=wins, rounds=9)

        monkeypatch.setattr(Chooser, "_measured", watched)
        monkeypatch.setattr(beside.timing, "slower", verdict)
        monkeypatch.setattr(beside, "once", lambda call: 1.0)

    return decide


def test_blocks_are_tried_alone_where_the_whole_is_not_faster(decided: Callable[[str], None]) -> None:
    decided("Gelu")
    target = parse("llvm")
    one = chooser(graph(BLOCKS), schedule=lambda fused: (compiling.scheduled(fused, target), 1))
    found = one.choose()
    assert [part.region.kind for part in found] == ["tvm", "ort", "tvm"]
    assert "Gelu" in {node.op_type for node in found[1].region.nodes} and "2 times as long" in found[1].evidence.note
    assert [part.evidence.ratio for part in found if part.region.kind == "tvm"] == [0.5, 0.5]
    fewer = one.fewer("the whole is slower")
    assert fewer is not None and sum(part.region.kind == "tvm" for part in fewer) == 1
    last = one.fewer("the whole is slower")
    assert last is not None and [part.region.kind for part in last] == ["ort"] and one.fewer("again") is None


CHAIN = "  ".join(
    f"a{i} = Mul({f'c{i - 1}' if i else 'm'}, s)  b{i} = Sub(a{i}, t)  c{i} = Abs(b{i})" for i in range(9)
)


def test_without_tuning_chains_that_multiply_no_matrices_are_tried_alone(decided: Callable[[str], None]) -> None:
    decided("MatMul")
    text = f"g (float[n, 4] x) => (float[n, 4] y) <float[4, 4] w, float[4] s, float[4] t> {{ m = MatMul(x, w)  {CHAIN}"
    found = chooser(graph(text + "  y = MatMul(c8, w) }")).choose()
    assert [part.region.kind for part in found] == ["ort", "tvm", "ort"] and len(found[1].region.nodes) == 27


@pytest.mark.slow
def test_a_chain_of_many_loops_in_one_is_measured_to_be_faster(tmp_path: Path) -> None:
    text = f"g (float[512, 1024] m) => (float[512, 1024] c8) <float[1024] s, float[1024] t> {{ {CHAIN} }}"
    result = burnish.optimize(graph(text), tmp_path / "out", target="llvm")
    assert result.compiled is not None
    (step,) = result.compiled.manifest.steps
    assert step.kind == "tvm" and step.evidence.ratio is not None and step.evidence.ratio < 0.9


def test_values_are_handed_over_on_the_same_memory_and_live_as_long_as_they_are_read() -> None:
    part = OrtPart(session.executor()(graph("g (float[n] x) => (float[n] y) { y = Neg(x) }")), ["x"], ["y"])
    given = tvm.runtime.tensor(np.arange(1000, dtype=np.float32))
    value = ort_value(given)
    assert value.data_ptr() == np.from_dlpack(given).ctypes.data
    (found,) = part.run_tensors([given])
    taken = tvm.runtime.from_dlpack(found)
    assert np.from_dlpack(taken).ctypes.data == found.data_ptr()
    del found, given, value
    gc.collect()
    for _ in range(5):
        part.run_tensors([np.ones(1000, np.float32)])
    assert np.array_equal(taken.numpy(), -np.arange(1000, dtype=np.float32))


@pytest.mark.parametrize("dtype", ["float16", "float64", "int8", "int64", "uint8", "bool"])
def test_all_dtypes_are_handed_over(dtype: str) -> None:
    for shape in ((2, 3), (), (0, 2)):
        given = np.ones(shape, dtype)
        there = tvm.runtime.from_dlpack(ort_value(tvm.runtime.tensor(given)))
        assert str(there.dtype) == dtype and np.array_equal(array(there), given)
        assert np.array_equal(array(ort_value(given)), given)


def test_text_passes_between_parts_of_onnx_runtime() -> None:
    model = graph("g (string[n] x) => (string[n] y) { y = Identity(x) }")
    part = OrtPart(session.executor()(model), ["x"], ["y"])
    (found,) = part.run_tensors([np.array(["a", "b"], object)])
    assert list(array(found)) == ["a", "b"]


def test_regions_are_for_kernels_only() -> None:
    with pytest.raises(InputError, match="regions are for kernels"):
        burnish.optimize(graph(SIMPLE), regions="all")
    with pytest.raises(InputError, match="cannot be `some`"):
        burnish.optimize(graph(SIMPLE), target="llvm", regions="some")  # type: ignore[arg-type]
