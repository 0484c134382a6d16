"""Operators on elements, indices, windows and reductions, compiled by TVM, are ONNX Runtime's, odd numbers included."""

from __future__ import annotations

import numpy as np
import onnx_ir as oir
import pytest
from compiled_operators import agree, graph, nodes, random

from burnish.ir.errors import InputError
from burnish.ir.inference import Inference

pytest.importorskip("tvm")

NAN, INF = np.nan, np.inf


def test_nan_and_infinities_go_where_onnx_runtime_lets_them() -> None:
    x = np.array([NAN, INF, -INF, 0.0, 1.5, -1.5, 0.5, 2.5, -0.5, 1e30, -1e30, NAN], np.float32)
    y = np.array([1, NAN, NAN, INF, 2, -2, 3, -3, NAN, 2, 2, NAN], np.float32)
    kinds = {
        "Max(x, y)": "", "Min(x, y)": "", "Relu(x)": "", "Clip(x, low, high)": "", "Clip(x, low)": "", "Sign(x)": "",
        "Round(x)": "", "Div(x, y)": "", "HardSigmoid(x)": "", "HardSwish(x)": "", "LeakyRelu(x)": "", "Elu(x)": "",
        "Softplus(x)": "", "Sigmoid(x)": "", "Tanh(x)": "", "Pow(x, y)": "", "Cast<to=9>(x)": "bool", "Celu(x)": "",
        "IsNaN(x)": "bool", "IsInf(x)": "bool", "Equal(x, y)": "bool", "Less(x, y)": "bool", "Shrink(x)": "",
    }  # fmt: skip
    lines = {f"{kind or 'float'}[12] o{at}": line for at, (line, kind) in enumerate(kinds.items())}
    for at, line in enumerate(("ReduceMax", "ReduceMin")):
        lines |= {f"float r{at}": f"{line}<keepdims=0>(x)", f"float e{at}": f"{line}<keepdims=0>(z)"}
    lines["float[3] s"] = "Softmax(z)"
    model = nodes("float[12] x, float[12] y, float[3] z", lines, "float low = {-1.0}, float high = {2.0}", 20)
    agree(model, {"x": x, "y": y, "z": np.full(3, -INF, np.float32)})


def test_integers_divide_towards_zero_and_take_the_sign_that_is_asked_for() -> None:
    model = nodes(
        "int32[n] a, int32[n] b, int64[n] c, uint8[n] u, uint8[n] v",
        {
            "int32[n] d": "Div(a, b)",
            "int32[n] m": "Mod(a, b)",
            "int32[n] f": "Mod<fmod=1>(a, b)",
            "int64[n] p": "Pow(c, two)",
            "uint8[n] q": "Div(u, v)",
            "uint8[n] l": 'BitShift<direction="LEFT">(u, v)',
            "int8[n] w": "Cast<to=3>(c)",
        },
        "int64 two = {3}",
    )
    a = np.array([7, -7, 7, -7, 300], np.int32)
    agree(
        model,
        dict(a=a, b=np.array([2, 2, -2, -2, 7], np.int32), c=a.astype(np.int64),
             u=np.array([200, 7, 1, 255, 9], np.uint8), v=np.array([3, 2, 9, 1, 4], np.uint8)),
    )  # fmt: skip


def test_indices_and_moved_elements() -> None:
    model = nodes(
        "float[n,4] x, int64[k] i, int64[n,2] e, int64[k,2] d, float[2,3,4,5] t",
        {
            "float[k,4] a": "Gather<axis=0>(x, i)",
            "float[n,2] b": "GatherElements<axis=1>(x, e)",
            "float[k] c": "GatherND(x, d)",
            "float[n,4] r": "Slice(x, three, far, one, minus)",
            "float[k,6] h": "OneHot(i, six, values)",
            "float[14,3,16,10] w": "Tile(t, many)",
            "float[24,5] l": "Flatten<axis=-1>(t)",
            "float[n,4] s": "CumSum<exclusive=1, reverse=1>(x, at)",
            "float[n,6] p": "Pad(x, pads, ninth)",
            "int64[2] shape": "Shape(x)",
        },
        "int64[1] three = {-1}, int64[1] far = {-9223372036854775807}, int64[1] one = {1}, int64[1] minus = {-1},"
        " int64 six = {6}, float[2] values = {-1.0, 3.0}, int64[4] many = {7, 1, 4, 2}, int64 at = {1},"
        " int64[4] pads = {0, 1, 0, 1}, float ninth = {9.0}",
    )
    i, e = np.array([0, -1, 2]), np.array([[0, -1], [3, 1], [2, 2], [-4, 0]])
    agree(model, dict(x=random(4, 4), i=i, e=e, d=np.array([[0, 1], [-1, -2], [3, 3]]), t=random(2, 3, 4, 5)))


def test_windows_that_round_up_and_count_their_padding() -> None:
    lines = {
        "float[1,2,5,5] a": "AveragePool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1], ceil_mode=1>(x)",
        "float[1,2,5,5] c": "AveragePool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1], ceil_mode=1,"
        " count_include_pad=1>(x)",
        "float[1,2,9,9] d": "AveragePool<kernel_shape=[2,2], pads=[0,0,1,1]>(x)",
        "float[1,2,5,5] m": "MaxPool<kernel_shape=[2,2], strides=[2,2], ceil_mode=1>(x)",
        "float[1,2,7,7] w": "MaxPool<kernel_shape=[2,2], dilations=[2,2]>(x)",
        "float[1,2,1,1] g": "GlobalAveragePool(x)",
        "float[1,2,18,18] r": 'Resize<mode="linear">(x, , scales)',
    }
    agree(nodes("float[1,2,9,9] x", lines, "float[4] scales = {1.0, 1.0, 2.0, 2.0}", 19), {"x": random(1, 2, 9, 9)})


def test_norms_and_reductions() -> None:
    model = nodes(
        "float[n,6,4] x, float[n,6,4,1] image, float[4] s, float[4] b, float[6] c",
        {
            "float[n,6,4] a": "GroupNormalization<num_groups=3>(x, c, c)",
            "float[n,6,4] i": "InstanceNormalization(x, c, c)",
            "float[n,6,4] k": "com.microsoft.SkipLayerNormalization(x, x, s, b)",
            "float[n,6,4,1] l": "LRN<size=3>(image)",
            "float[n,1,4] m": "ReduceMean(x, one)",
            "float[n,6,4] e": "ReduceSum<noop_with_empty_axes=1>(x)",
            "float[n,6] g": "ReduceLogSumExp<keepdims=0>(x, two)",
            "int64[n,6] last": "ArgMax<axis=2, keepdims=0, select_last_index=1>(x)",
            "float[n,6,4] z": "LogSoftmax<axis=1>(x)",
        },
        "int64[1] one = {1}, int64[1] two = {-1}",
        21,
    )
    agree(model, dict(x=random(2, 6, 4), image=random(2, 6, 4, 1), s=random(4), b=random(4), c=random(6)), within=10)


def test_what_cannot_be_right_is_refused_with_the_reason() -> None:
    cases = {
        "y = Relu<alpha=1.0>(x)": "`alpha`",
        "y, i = MaxPool<kernel_shape=[1]>(x)": "indices",
        "y = NonZero(x)": "not in the table",
        "y = Cast<to=8>(x)": "string",
    }
    for line, reason in cases.items():
        model = graph(f"g (float[n,1,4] x) => (float[n,1,4] y) {{ {line} }}")
        with pytest.raises(InputError) as found:
            from burnish.backends.tvm.lowering import lower

            lower(model)
        assert reason in str(found.value), line


def test_a_negative_size_of_an_input_is_any_size() -> None:
    model = graph("g (float[n, m] x) => (float[n, m] y) { y = Relu(x) }")
    model.graph.inputs[0].shape = oir.Shape([-1, "?"])
    shape = Inference(model).shape(model.graph.inputs[0])
    assert shape is not None and not any(isinstance(size, int) for size in shape) and shape[0] != shape[1]
