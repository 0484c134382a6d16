"""Rewrites that are wrong on purpose, on rare inputs or by very little: what is checked by default finds each."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as oir
import pytest

from burnish.frontends import load
from burnish.ir import edit
from burnish.ir.walk import walk
from burnish.passes.base import ExactPass, Outcome
from burnish.passes.prove import Miscompiled
from burnish.tools import api, report

HEADER = '<ir_version: 10, opset_import: ["": 20]>\n'
ATTENTION = """
g (int64[B, S] ids, int64[B, S] keep) => (float[B, S, 8] y)
<float[30, 8] table, float one = {1.0}, float low = {-3.4028234e38}, int64[1] axis = {1}> {
  h = Gather (table, ids)
  kept = Cast <to = 1> (keep)
  gone = Sub (one, kept)
  scores = Mul (gone, low)
  bias = Unsqueeze (scores, axis)
  turned = Transpose <perm = [0, 2, 1]> (h)
  raw = MatMul (h, turned)
  masked = Add (raw, bias)
  p = Softmax <axis = -1> (masked)
  y = MatMul (p, h)
}"""
BRANCH = """
g (float[N, 4] x, int64 mode) => (float[N, 4] y) <int64 three = {3}, float k = {1.5}> {
  c = Equal (mode, three)
  y = If (c) <then_branch = a () => (float[N, 4] p) { p = Sub (x, k) },
              else_branch = b () => (float[N, 4] q) { q = Neg (x) }>
}"""


def weight(name: str, *shape: int) -> onnx.TensorProto:
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return onnx.numpy_helper.from_array(array, name)


def only(model: oir.Model, op: str) -> oir.Node:
    return next(iter(walk(model, op)))


def set_attribute(op: str, attribute: oir.Attr) -> Callable[[oir.Model], None]:
    return lambda model: only(model, op).attributes.__setitem__(attribute.name, attribute)


def swap_operands(model: oir.Model) -> None:
    node = only(model, "Sub")
    one, other = node.inputs
    node.replace_input_with(0, other)
    node.replace_input_with(1, one)


def drop(op: str) -> Callable[[oir.Model], None]:
    return lambda model: edit.bypass(only(model, op))


def rename(op: str, to: str) -> Callable[[oir.Model], None]:
    def rewrite(model: oir.Model) -> None:
        node = only(model, op)
        edit.replace_node(node, edit.make(to, list(node.inputs), like=node))

    return rewrite


def set_constant(name: str, array: np.ndarray) -> Callable[[oir.Model], None]:
    def rewrite(model: oir.Model) -> None:
        model.graph.initializers[name].const_value = oir.tensor(array, name=name)

    return rewrite


def scale_weight(factor: float) -> Callable[[oir.Model], None]:
    def rewrite(model: oir.Model) -> None:
        value = model.graph.initializers["w"]
        assert value.const_value is not None
        value.const_value = oir.tensor(value.const_value.numpy() * np.float32(factor), name="w")

    return rewrite


def first_row_for_all(model: oir.Model) -> None:
    node = only(model, "Cast")
    zero, one = (edit.add_constant(model, name, np.array([n], np.int64)) for n, name in enumerate(("zero", "first")))
    row = edit.make("Slice", [node.inputs[0], zero, one, zero], like=node)
    edit.replace_node(node, [row, edit.make("Cast", [row.outputs[0]], {"to": 1}, like=node)])


def empty_rows_to_zero(model: oir.Model) -> None:
    node, kept = only(model, "Softmax"), only(model, "Cast").outputs[0]
    axis = edit.add_constant(model, "rows", np.array([1], np.int64))
    some = edit.make("ReduceMax", [kept, axis], {"keepdims": 1}, like=node)
    wide = edit.make("Unsqueeze", [some.outputs[0], axis], like=node)
    soft = edit.make("Softmax", [node.inputs[0]], {"axis": -1}, like=node)
    edit.replace_node(node, [some, wide, soft, edit.make("Mul", [soft.outputs[0], wide.outputs[0]], like=node)])


def floor_division(model: oir.Model) -> None:
    node = only(model, "Div")
    wide = [edit.make("Cast", [value], {"to": 11}, like=node) for value in node.inputs]
    quotient = edit.make("Div", [one.outputs[0] for one in wide], like=node)
    floor = edit.make("Floor", [quotient.outputs[0]], like=node)
    edit.replace_node(node, [*wide, quotient, floor, edit.make("Cast", [floor.outputs[0]], {"to": 7}, like=node)])


def no_overflow_guard(model: oir.Model) -> None:
    node = only(model, "Softmax")
    axis = edit.add_constant(model, "axis", np.array([-1], np.int64))
    power = edit.make("Exp", [node.inputs[0]], like=node)
    total = edit.make("ReduceSum", [power.outputs[0], axis], {"keepdims": 1}, like=node)
    edit.replace_node(node, [power, total, edit.make("Div", [power.outputs[0], total.outputs[0]], like=node)])


def vector(body: str, initializers: str = "") -> str:
    return f"g (float[N, 16] x) => (float[N, 16] y) {f'<{initializers}>' if initializers else ''} {{ {body} }}"


DENSE = "float[16, 16] w"
WRONG: dict[str, tuple[str, Callable[[oir.Model], None]]] = {
    "a mask whose first row holds for all": (ATTENTION, first_row_for_all),
    "a mask left away": (ATTENTION, drop("Add")),
    "zeros where a mask lets nothing through": (ATTENTION, empty_rows_to_zero),
    "swapped operands in a branch": (BRANCH, swap_operands),
    "ten times the epsilon": (
        "g (float[N, 16] x) => (float[N, 16] y) <float[16] w>"
        " { y = LayerNormalization <epsilon = 0.000001> (x, w) }",
        set_attribute("LayerNormalization", oir.AttrFloat32("epsilon", 1e-5)),
    ),
    "a bias of 1e-8 left away": (
        vector("h = MatMul (x, w) y = Add (h, b)", f"{DENSE}, float b = {{1e-8}}"),
        drop("Add"),
    ),
    "an end where there is none": (
        "g (float[N, S] x) => (float[N, S] y) <int64[1] s = {0}, int64[1] e = {9223372036854775807}, int64[1] a = {1}>"
        " { y = Slice (x, s, e, a) }",
        set_constant("e", np.array([31], np.int64)),
    ),
    "a mean over the batch too": (
        vector("m = ReduceMean (x, a) y = Sub (x, m)", "int64[1] a = {1}"),
        set_constant("a", np.array([0, 1], np.int64)),
    ),
    "a limit of 100 left away": (
        vector("y = Clip (x, l, h)", "float l = {-100.0}, float h = {100.0}"),
        drop("Clip"),
    ),
    "a guard against 0/0 left away": (
        vector("n = ReduceL2 (x, a) m = Max (n, e) y = Div (x, m)", "int64[1] a = {1}, float e = {1e-12}"),
        drop("Max"),
    ),
    "a softmax that overflows": (vector("y = Softmax <axis = -1> (x)"), no_overflow_guard),
    "a weight off by 1e-4 before a saturated softmax": (
        vector("h = MatMul (x, w) i = Mul (h, k) y = Softmax (i)", f"{DENSE}, float k = {{1000.0}}"),
        scale_weight(1 + 1e-4),
    ),
    "a weight off by 1e-6": (vector("y = MatMul (x, w)", DENSE), scale_weight(1 + 1e-6)),
    "a slope of 1e-7 left away": (vector("y = LeakyRelu <alpha = 0.0000001> (x)"), rename("LeakyRelu", "Relu")),
    "another rounding of negative integers": (
        "g (int64[N, 4] n) => (int64[N, 4] y) <int64 k = {3}> { y = Div (n, k) }",
        floor_division,
    ),
    "padding counted in a mean": (
        "g (float[N, 3, 32, 32] x) => (float[N, 3, 32, 32] y)"
        " { y = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x) }",
        set_attribute("AveragePool", oir.AttrInt64("count_include_pad", 1)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_it_is_found_by_default(what: str) -> None:
    text, rewrite = WRONG[what]

    @dataclass(frozen=True)
    class Wrong(ExactPass):
        """Makes one mistake."""

        def rewrite(self, model: oir.Model, outcome: Outcome) -> None:
            if "done" not in model.meta and outcome.take_model():
                model.meta["done"] = True
                rewrite(model)

    proto = onnx.parser.parse_model(HEADER + text)
    for info in proto.graph.value_info:
        dims = [dim.dim_value for dim in info.type.tensor_type.shape.dim]
        proto.graph.initializer.append(weight(info.name, *dims))
    model = load(proto)
    with pytest.raises(Miscompiled):
        api.Pipeline([Wrong()]).run(model)


def optimized(proto: onnx.ModelProto, folder: Path) -> tuple[api.Result, onnx.ModelProto]:
    onnx.save(proto, folder / "model.onnx")
    result = api.optimize(folder / "model.onnx", folder / "out.onnx", guard=["size"], crash_folder=folder / "crash")
    return result, onnx.load(folder / "out.onnx")


@pytest.mark.parametrize("op", ["RandomNormalLike", "Bernoulli"])
def test_a_model_that_draws_random_numbers_is_not_accused(op: str, tmp_path: Path) -> None:
    text = f"g (float[N, 64] x) => (float[N, 64] y) {{ i = Sigmoid (x) a = {op} (i) b = {op} (i) y = Sub (a, b) }}"
    result, written = optimized(onnx.parser.parse_model(HEADER + text), tmp_path)
    check = result.proof.verification
    assert "each time it runs" in result.proof.unverified if check is None else check.replay is None
    assert [node.op_type for node in written.graph.node] == ["Sigmoid", op, op, "Sub"]


def test_a_sequence_is_compared(tmp_path: Path) -> None:
    text = "g (float[N, 4] x) => (seq(float[N, 1]) y) { i = Identity (x) y = SplitToSequence <axis = 1> (i) }"
    result, _ = optimized(onnx.parser.parse_model(HEADER + text), tmp_path)
    assert result.proof.verification is not None and result.proof.verification.holds


def test_outputs_that_no_sample_shows_are_named(tmp_path: Path) -> None:
    text = "g (float[N, 4] x) => (float[N, 4] y, float[N, 4] z) { i = Relu (x) y = Identity (i) z = Neg (i) }"
    onnx.save(onnx.parser.parse_model(HEADER + text), tmp_path / "model.onnx")
    data = [{"x": np.zeros((0, 4), np.float32)}, {"x": np.full((2, 4), np.nan, np.float32)}]
    result = api.optimize(tmp_path / "model.onnx", data=data)
    assert result.proof.verification is not None and result.proof.verification.unseen == ["y", "z"]
    assert any(line.startswith("unseen    `y`, `z`") for line in report.proof_lines(result))


def test_the_contract_with_the_caller_is_kept(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(
        HEADER + "g (float[N, 4] x, float[4] s, int64[K] unused) => (float[N, 4] z, float[N, 4] x, float[M, 4] y)"
        " <float[4] s = {1.0, 2.0, 3.0, 4.0}> { i = Identity (x) z = Mul (i, s) r = Relu (z) y = Identity (r) }"
    )
    proto.graph.output.append(onnx.helper.make_tensor_value_info("bare", onnx.TensorProto.FLOAT, None))
    proto.graph.node.append(onnx.helper.make_node("Neg", ["r"], ["bare"]))
    proto.doc_string, proto.graph.input[2].doc_string, proto.model_version = "of the model", "of the input", 7
    proto.graph.input[2].type.denotation = "IMAGE"
    onnx.helper.set_model_props(proto, {"author": "me"})
    _, written = optimized(proto, tmp_path)
    for was, now in ((proto.graph.input, written.graph.input), (proto.graph.output, written.graph.output)):
        assert [one.SerializeToString() for one in now] == [one.SerializeToString() for one in was]
    assert (written.doc_string, written.model_version) == ("of the model", 7)
    assert {"author": "me"}.items() <= {prop.key: prop.value for prop in written.metadata_props}.items()
    assert [one.name for one in written.graph.initializer] == ["s"]


def test_the_bytes_depend_on_neither_hash_seed_nor_folder(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['optimize', *sys.argv[1:], '--verify', 'off']\n"
        "from burnish.tools.cli import optimize_main\noptimize_main()"
    )
    model = Path(api.__file__).parent / "demo" / "digits_vit.onnx"
    written = []
    for seed, folder in (("1", tmp_path / "a"), ("2", tmp_path / "b c")):
        folder.mkdir()
        environment = dict(os.environ, PYTHONPATH=str(Path(api.__file__).parents[2]), PYTHONHASHSEED=seed)
        source = os.path.relpath(model, folder) if seed == "1" else str(model)
        words = [sys.executable, "-c", code, source, "-o", f"out{seed}.onnx", "--target", "ort-cpu"]
        subprocess.run(words, cwd=folder, env=environment, check=True, capture_output=True)
        written.append((folder / f"out{seed}.onnx").read_bytes())
    assert written[0] == written[1]
