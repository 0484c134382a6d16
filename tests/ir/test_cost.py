"""Costs follow the definitions of the operators, whatever their spelling, and never guess."""

from __future__ import annotations

import warnings
from math import prod

import numpy as np
import onnx
import onnx_ir as oir
import pytest

from burnish.ir import concrete, cost
from burnish.ir.element_operations import ELEMENT_OPERATIONS
from burnish.ir.multiply_adds import MULTIPLY_ADDS

NO_CLOSED_FORM = {
    "Col2Im",
    "ImageDecoder",
    "LinearAttention",
    "MaxRoiPool",
    "NegativeLogLikelihoodLoss",
    "NonMaxSuppression",
    "RegexFullMatch",
    "RoiAlign",
    "SoftmaxCrossEntropyLoss",
    "StringConcat",
    "StringNormalizer",
    "StringSplit",
    "TfIdfVectorizer",
    "TopK",
    "Unique",
}


def model(text: str, opset: str = '"": 20') -> oir.Model:
    return oir.from_onnx_text(f"<ir_version: 10, opset_import: [{opset}]>\n{text}")


def single(
    op: str, shapes: dict[str, tuple[str, list[int]]], out: list[int], *, domain: str = "", **attributes: object
) -> cost.Cost:
    """The cost of one node with inputs of the given dtypes and shapes; an empty name is an absent input."""
    values = [
        oir.Value(name=name, type=oir.TensorType(oir.DataType[dtype]), shape=oir.Shape(shape)) if dtype else None
        for name, (dtype, shape) in shapes.items()
    ]
    node = oir.node(op, values, attributes, domain=domain)
    node.outputs[0].name = "out"
    node.outputs[0].dtype, node.outputs[0].shape = oir.DataType.FLOAT, oir.Shape(out)
    return cost.node_cost(node)


def floats(**shapes: list[int]) -> dict[str, tuple[str, list[int]]]:
    return {name: ("FLOAT", shape) for name, shape in shapes.items()}


def test_every_standard_operator_has_a_formula_or_is_known_to_have_none() -> None:
    schemas = onnx.defs.get_all_schemas_with_history()
    names = {schema.name for schema in schemas if schema.domain == "" and not schema.deprecated}
    assert {name for name in names if ("", name) not in ELEMENT_OPERATIONS} == NO_CLOSED_FORM
    assert set(MULTIPLY_ADDS) <= set(ELEMENT_OPERATIONS)


def test_sorting_has_no_closed_form_but_multiplies_nothing() -> None:
    found = single("TopK", {"x": ("FLOAT", [9]), "k": ("INT64", [1])}, [3])
    assert (found.macs, found.operations) == (0, None)


@pytest.mark.parametrize("turned_a", [0, 1])
@pytest.mark.parametrize("turned_b", [0, 1])
def test_gemm_costs_the_same_in_every_transpose(turned_a: int, turned_b: int) -> None:
    a, b = [2, 3], [3, 5]
    found = single(
        "Gemm",
        floats(a=a[::-1] if turned_a else a, b=b[::-1] if turned_b else b, c=[5]),
        [2, 5],
        transA=turned_a,
        transB=turned_b,
    )
    assert (found.macs, found.operations) == (30, 10)
    assert (found.bytes_read, found.bytes_written) == (4 * (6 + 15 + 5), 40)


@pytest.mark.parametrize(
    ("a", "b", "equation"),
    [
        ([4, 6], [6, 5], "ij,jk->ik"),
        ([2, 4, 6], [6, 5], "bij,jk->bik"),
        ([2, 4, 6], [2, 6, 5], "...ij,...jk->...ik"),
        ([3, 1, 4, 6], [2, 6, 5], "abij,bjk->abik"),
        ([6], [6], "i,i"),
    ],
)
def test_matmul_costs_what_its_einsum_costs(a: list[int], b: list[int], equation: str) -> None:
    out = np.matmul(np.zeros(a), np.zeros(b))
    found = single("MatMul", floats(a=a, b=b), list(out.shape))
    assert found.macs == out.size * a[-1]
    assert single("Einsum", floats(a=a, b=b), list(out.shape), equation=equation).macs == found.macs


@pytest.mark.parametrize("dilation", [1, 2])
def test_grouped_convolution_costs_its_share_of_the_dense_one(dilation: int) -> None:
    def convolution(groups: int) -> int | None:
        weight = [12, 8 // groups, 3, 3]
        return single(
            "Conv", floats(x=[1, 8, 9, 9], w=weight), [1, 12, 7, 7], group=groups, dilations=[dilation] * 2
        ).macs

    assert convolution(1) == 12 * 49 * 8 * 9
    assert [convolution(groups) for groups in (2, 4)] == [convolution(1) // 2, convolution(1) // 4]  # type: ignore[operator]


def test_transposed_convolution_costs_what_the_convolution_it_transposes_costs() -> None:
    forward = single("Conv", floats(x=[1, 6, 8, 8], w=[4, 3, 2, 2]), [1, 4, 4, 4], group=2, strides=[2, 2])
    back = single("ConvTranspose", floats(x=[1, 4, 4, 4], w=[4, 3, 2, 2]), [1, 6, 8, 8], group=2, strides=[2, 2])
    assert forward.macs == back.macs == 4 * 16 * 3 * 4


def test_quantized_and_fused_forms_cost_what_the_plain_ones_cost() -> None:
    plain = single("MatMul", floats(a=[7, 16], b=[16, 5]), [7, 5]).macs
    byte, scalar = "UINT8", ("FLOAT", [])
    contrib = "com.microsoft"
    others = [
        single("MatMulInteger", {"a": (byte, [7, 16]), "b": (byte, [16, 5])}, [7, 5]),
        single(
            "QLinearMatMul",
            {"a": (byte, [7, 16]), "s": scalar, "z": (byte, []), "b": (byte, [16, 5])},
            [7, 5],
        ),
        single("FusedMatMul", floats(a=[16, 7], b=[5, 16]), [7, 5], domain=contrib, transA=1, transB=1),
        single("MatMulNBits", {"a": ("FLOAT", [7, 16]), "b": (byte, [5, 1, 8])}, [7, 5], domain=contrib, K=16, N=5),
        single("FusedGemm", floats(a=[7, 16], b=[16, 5]), [7, 5], domain=contrib),
    ]
    assert [one.macs for one in others] == [plain] * len(others)
    convolution = single("Conv", floats(x=[1, 4, 5, 5], w=[6, 4, 3, 3]), [1, 6, 3, 3]).macs
    integers = {"x": (byte, [1, 4, 5, 5]), "w": (byte, [6, 4, 3, 3])}
    assert single("ConvInteger", integers, [1, 6, 3, 3]).macs == convolution
    assert single("FusedConv", floats(x=[1, 4, 5, 5], w=[6, 4, 3, 3]), [1, 6, 3, 3], domain=contrib).macs == convolution


def test_every_attention_costs_its_two_products() -> None:
    batch, heads, queries, keys, head = 2, 4, 3, 7, 5
    past = keys - queries
    expected = sum(prod(shape) for shape in ((batch, heads, queries, keys, head), (batch, heads, queries, head, keys)))
    wide = [batch, queries, heads * head]
    cache = [batch, heads, past, head]
    split = [batch, heads, queries, head]
    standard = single(
        "Attention",
        floats(q=wide, k=wide, v=wide) | {"m": ("", [])} | floats(pk=cache, pv=cache),
        wide,
        q_num_heads=heads,
        kv_num_heads=heads,
    )
    four = single("Attention", floats(q=split, k=split, v=split) | {"m": ("", [])} | floats(pk=cache, pv=cache), split)
    absent = {name: ("", []) for name in ("bias", "padding", "more")}
    multi = single(
        "MultiHeadAttention",
        floats(q=wide, k=wide, v=wide) | absent | floats(pk=cache, pv=cache),
        wide,
        domain="com.microsoft",
        num_heads=heads,
    )
    narrow = [batch, queries, 2 * head]
    small_cache = [batch, 2, past, head]
    grouped = single(
        "GroupQueryAttention",
        floats(q=wide, k=narrow, v=narrow, pk=small_cache, pv=small_cache),
        wide,
        domain="com.microsoft",
        num_heads=heads,
        kv_num_heads=2,
    )
    assert [one.macs for one in (standard, four, multi, grouped)] == [expected] * 4
    joined = single(
        "Attention",
        floats(x=[batch, queries, 20], w=[20, 3 * heads * head], b=[3 * heads * head]),
        wide,
        domain="com.microsoft",
        num_heads=heads,
    )
    assert joined.macs == batch * queries * (20 * 3 * 20 + 2 * queries * 20)


@pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_recurrent_layers_multiply_every_weight_in_every_step(op: str, gates: int) -> None:
    shapes = floats(x=[10, 2, 6], w=[2, gates * 5, 6], r=[2, gates * 5, 5])
    assert single(op, shapes, [10, 2, 2, 5], hidden_size=5).macs == 10 * 2 * 2 * gates * 5 * (6 + 5)


def test_fourier_transform_has_a_closed_form_for_powers_of_two_only() -> None:
    assert single("DFT", floats(x=[3, 16, 1]), [3, 16, 2]).macs == 3 * 2 * 16 * 4
    odd = single("DFT", floats(x=[3, 15, 1]), [3, 15, 2])
    assert odd.macs is None
    assert "length 15" in odd.unknown[0]


def test_an_unknown_size_is_none_with_a_reason_and_dims_make_it_known() -> None:
    text = "g (float[N, 4] x) => (float[N, 8] y) <float[4, 8] w = {" + ", ".join("0" * 32) + "}> { y = MatMul (x, w) }"
    unsized = cost.model_cost(model(text))
    assert unsized.total.macs is None
    assert unsized.total.bytes_read is None
    assert any("`N`" in reason for reason in unsized.total.unknown)
    assert unsized.at_least.macs == 0
    sized = cost.model_cost(model(text), {"N": 3})
    assert (sized.total.macs, sized.total.unknown) == (96, ())


def test_an_operator_without_a_formula_is_unknown_never_free() -> None:
    found = cost.model_cost(model("g (float[4] x) => (float[4] y) { y = mine.Thing (x) }", '"": 20, "mine": 1'))
    assert found.total.macs is None
    assert found.total.unknown == ("the work of `mine.Thing` has no closed form",)


def shared() -> oir.Model:
    return model("""
      g (float[2, 2] x, bool c) => (float[2, 2] z) <float[2, 2] w = {1, 2, 3, 4}> {
        k = Constant <value = float[2] {1, 2}> ()
        a = MatMul (x, w)
        b = MatMul (a, w)
        d = Add (b, k)
        z = If (c) <
          then_branch = t () => (float[2, 2] p) {
            v = Constant <value = float[2, 2] {1, 1, 1, 1}> ()
            h = MatMul (d, v)
            p = MatMul (h, w)
          },
          else_branch = e () => (float[2, 2] q) { q = Relu (d) }
        >
      }""")


def test_weights_are_counted_once_in_initializers_constants_and_branches() -> None:
    found = cost.model_cost(concrete.concrete(shared(), {}))
    assert found.total.parameters == 4 + 2 + 4
    assert [one.name for one in found.stored] == ["w", "k", "v"]
    assert found.by_dtype["FLOAT"].bytes == 40
    branch = next(part.node for part in found.nodes if part.node.op_type == "If")
    assert cost.node_cost(branch).parameters == 8


def test_an_if_costs_its_larger_branch_and_the_nodes_add_up_to_the_total() -> None:
    found = cost.model_cost(concrete.concrete(shared(), {}))
    assert found.total.macs == 4 * 8
    assert found.total.macs == sum(part.cost.macs or 0 for part in found.nodes)
    assert found.operators["MatMul"][1].macs == found.total.macs
    assert found.operators["MatMul"][0] == 4
    assert "Relu" not in [part.node.op_type for part in found.nodes]


@pytest.mark.parametrize(("trips", "expected", "per_iteration"), [("int64 n = {5}", 40, False), ("", 8, True)])
def test_a_loop_costs_its_body_times_its_trips_where_they_are_known(
    trips: str, expected: int, per_iteration: bool
) -> None:
    given, stored = ("", f"<{trips}>") if trips else (", int64 n", "")
    looped = model(f"""
      g (float[2, 2] x{given}) => (float[2, 2] y) {stored} {{
        y = Loop (n, , x) <body = b (int64 i, bool c, float[2, 2] s) => (bool d, float[2, 2] r) {{
          d = Identity (c)
          r = MatMul (s, s)
        }}>
      }}""")
    found = cost.model_cost(looped).total
    assert (found.macs, found.per_iteration) == (expected, per_iteration)


def test_a_scan_costs_its_body_for_every_slice() -> None:
    scanned = model("""
      g (float[2] s, float[N, 2] x) => (float[2] t, float[N] y) {
        t, y = Scan <num_scan_inputs = 1, body = b (float[2] a, float[2] e) => (float[2] f, float o) {
          f = Add (a, e)
          o = MatMul (a, e)
        }> (s, x)
      }""")
    assert cost.model_cost(scanned, {"N": 6}).total.macs == 12
    assert cost.model_cost(scanned).total.per_iteration


def test_functions_are_followed_and_their_weights_counted_once() -> None:
    called = oir.from_onnx_text("""
      <ir_version: 10, opset_import: ["": 20, "local": 1]>
      g (float[2, 2] x) => (float[2, 2] z) { y = local.twice (x)  z = local.twice (y) }
      <domain: "local", opset_import: ["": 20]>
      twice (a) => (b) { w = Constant <value = float[2, 2] {1, 2, 3, 4}> ()  b = MatMul (a, w) }""")
    open_ended = cost.model_cost(called).total
    assert open_ended.macs is None
    found = cost.model_cost(concrete.concrete(called, {})).total
    assert (found.macs, found.parameters) == (16, 4)
    assert len(called.functions) == 1


def residual_block(channels: int, stride: int, start: int) -> tuple[list[tuple[int, ...]], int, int]:
    """Shapes of two convolutions and of their shortcut, parameters and multiply-adds, on images of side 16/start."""
    wide, size = channels * stride, 16 // start // stride
    shapes: list[tuple[int, ...]] = [(wide, channels, 3, 3), (wide, wide, 3, 3), (wide, channels, 1, 1)]
    return shapes, sum(map(prod, shapes)), sum(prod(shape) * size * size for shape in shapes)


def test_a_residual_network_costs_what_is_computed_by_hand() -> None:
    built, parameters, macs, tensors = [], 0, 0, []
    for index, (channels, stride, start) in enumerate([(4, 1, 1), (4, 2, 1), (8, 2, 2)]):
        shapes, weights, work = residual_block(channels, stride, start)
        parameters, macs = parameters + weights, macs + work
        one, two, three = (f"w{index}{which}" for which in "abc")
        for name, shape in zip((one, two, three), shapes, strict=True):
            tensors.append(onnx.numpy_helper.from_array(np.zeros(shape, np.float32), name))
        x, y = f"x{index}", f"x{index + 1}"
        built += [
            f"a{index} = Conv <strides = [{stride}, {stride}], pads = [1, 1, 1, 1]> ({x}, {one})",
            f"r{index} = Relu (a{index})",
            f"b{index} = Conv <pads = [1, 1, 1, 1]> (r{index}, {two})",
            f"s{index} = Conv <strides = [{stride}, {stride}]> ({x}, {three})",
            f"{y} = Add (b{index}, s{index})",
        ]
    body = "\n".join(built)
    text = (
        f'<ir_version: 10, opset_import: ["": 20]>\ng (float[B, 4, 16, 16] x0) => (float[B, C, H, W] x3) {{\n{body}\n}}'
    )
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(tensors)
    network = oir.from_proto(proto)
    for batch in (1, 3):
        found = cost.model_cost(concrete.concrete(network, {"B": batch})).total
        assert (found.macs, found.parameters, found.unknown) == (batch * macs, parameters, ())


def test_concrete_leaves_the_model_alone_and_takes_dimensions_by_position() -> None:
    original = model("g (float[N, ?, 4] x) => (float[N, M, 4] y) { y = Relu (x) }")
    assert concrete.open_dims(original, {}) == ["N", "x.1"]
    assert concrete.open_dims(original, {"N": 2}) == ["x.1"]
    copy = concrete.concrete(original, {"N": 2, "x.1": 3})
    assert copy.graph.outputs[0].shape == [2, 3, 4]
    assert original.graph.inputs[0].shape == ["N", None, 4]
    assert cost.dims_of(original, {"x": np.zeros((2, 3, 4))}) == {"N": 2, "x.0": 2, "x.1": 3}


def test_shapes_that_the_model_computes_become_numbers() -> None:
    computed = model("""
      g (float[N, 6] x) => (float[K, L] y)
      <int64[1] zero = {0}, int64[1] rest = {-1}, int64[1] two = {2}> {
        all = Shape (x)
        n = Gather (all, zero)
        m = Mul (n, two)
        target = Concat <axis = 0> (m, rest)
        r = Reshape (x, target)
        t = Transpose (r)
        y = MatMul (r, t)
      }""")
    found = cost.model_cost(concrete.concrete(computed, {"N": 4}))
    assert found.total.macs == 8 * 3 * 8


def test_arithmetic_that_overflows_warns_nobody(recwarn: pytest.WarningsRecorder) -> None:
    source = model("""g (float[N] x) => (float[A, B] y) <float[1] zero = {0.0}, float[1] four = {4.0}> {
        l = Log (zero)  m = Max (l, four)  i = Cast <to = 7> (m)
        s = Shape (x)  t = Div (s, i)  u = Concat <axis = 0> (i, t)  y = Reshape (x, u) }""")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        known = concrete.concrete(source, {"N": 8})
    assert known.graph.outputs[0].shape == (4, 2)
    assert not recwarn.list
