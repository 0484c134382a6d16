"""Random small graphs that are valid by construction: what the passes must leave correct whatever they meet."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from fuzz_graph import Graph, Value
from onnx import helper

SIZE = 3
"""What the dynamic dim `N` of the inputs is fed with."""
OPSETS = (13, 14, 17, 18, 20, 22, 23, 24)
_LARGEST = 1500


def _unary(g: Graph) -> None:
    x = g.value()
    op = g.one_of(("Relu", "Sigmoid", "Tanh", "Neg", "Abs", "Identity", "Softplus", "Erf", "LeakyRelu", "HardSigmoid"))
    if x is not None:
        g.add(op, [x.name], x.shape)


def _root(g: Graph) -> None:
    x = g.value()
    if x is not None:
        square = g.add("Mul", [x.name, x.name], x.shape)
        more = g.add("Add", [square.name, g.positive()], x.shape)
        g.add(g.one_of(("Sqrt", "Log", "Reciprocal")), [more.name], x.shape)


def _with_constant(g: Graph) -> None:
    x = g.value()
    if x is None:
        return
    shape = list(x.shape[int(g.random.integers(x.rank + 1)) :])
    shape = [size if g.chance(0.8) else 1 for size in shape]
    op = g.one_of(("Add", "Sub", "Mul", "Div", "Max", "Min"))
    divides = op == "Div"
    pair = [x.name, g.positive(*shape) if divides else g.floats(*shape)]
    g.add(op, pair if divides or g.chance(0.7) else pair[::-1], x.shape)


def _pair(g: Graph) -> None:
    x = g.value()
    same = [v for v in g.values if x is not None and v.shape == x.shape]
    if x is not None:
        g.add(g.one_of(("Add", "Sub", "Mul", "Max", "Sum", "Mean")), [x.name, g.one_of(same).name], x.shape)


def _matmul(g: Graph) -> None:
    x = g.value(least=2)
    if x is None:
        return
    size = int(g.random.integers(1, 6))
    if x.rank == 2 and g.chance(0.5):
        flip, turn = g.chance(0.3), g.chance(0.5)
        rows, depth = x.shape[::-1] if flip else x.shape
        inputs = [x.name, g.floats(*((size, depth) if turn else (depth, size)))]
        if g.chance(0.7):
            inputs.append(g.floats(*g.one_of(((size,), (1, size), ()))))
        scale = {"alpha": 0.5} if g.chance(0.2) else {"beta": 2.0} if g.chance(0.2) else {}
        g.add("Gemm", inputs, (rows, size), transA=int(flip), transB=int(turn), **scale)
        return
    y = g.add("MatMul", [x.name, g.floats(x.shape[-1], size)], (*x.shape[:-1], size))
    if g.chance(0.5):
        g.add("Add", [y.name, g.floats(size)], y.shape)


def _attention(g: Graph) -> None:
    x = g.value(3)
    if x is None:
        return
    parts = []
    for _ in range(3):
        y = g.add("MatMul", [x.name, g.floats(x.shape[2], 4)], (*x.shape[:2], 4))
        y = g.add("Reshape", [y.name, g.integers(0, 0, 2, 2)], (*y.shape[:2], 2, 2))
        parts.append(g.add("Transpose", [y.name], (y.shape[0], 2, y.shape[1], 2), perm=[0, 2, 1, 3]))
    q, k, v = parts
    k = g.add("Transpose", [k.name], (k.shape[0], 2, 2, k.shape[2]), perm=[0, 1, 3, 2])
    scores = g.add("MatMul", [q.name, k.name], (*q.shape[:3], q.shape[2]))
    scores = g.add("Mul", [scores.name, g.constant(np.float32(0.70710677))], scores.shape)
    if g.chance(0.5):
        scores = g.add("Add", [scores.name, g.floats(scores.shape[2], scores.shape[3])], scores.shape)
    y = g.add("MatMul", [g.add("Softmax", [scores.name], scores.shape, axis=-1).name, v.name], q.shape)
    y = g.add("Transpose", [y.name], (y.shape[0], y.shape[2], 2, 2), perm=[0, 2, 1, 3])
    g.add("Reshape", [y.name, g.integers(0, 0, 4)], (*y.shape[:2], 4))


def _conv(g: Graph) -> None:
    x = g.value(4)
    if x is None or min(x.shape) < 1:
        return
    _, channels, height, width = x.shape
    if g.chance(0.3):
        out = int(g.random.integers(1, 4))
        inputs = [x.name, g.floats(channels, out, 2, 2), *([g.floats(out)] if g.chance(0.5) else [])]
        g.add("ConvTranspose", inputs, (x.shape[0], out, height + 1, width + 1))
        return
    kernel = (min(3, height), min(3, width))
    pad = int(g.chance(0.5))
    groups = channels if g.chance(0.3) else 1
    out = groups if groups > 1 else int(g.random.integers(1, 5))
    inputs = [x.name, g.floats(out, channels // groups, *kernel), *([g.floats(out)] if g.chance(0.5) else [])]
    shape = (x.shape[0], out, height + 2 * pad - kernel[0] + 1, width + 2 * pad - kernel[1] + 1)
    g.add("Conv", inputs, shape, kernel_shape=kernel, pads=[pad] * 4, group=groups)


def _batch_norm(g: Graph) -> None:
    x = g.value(least=2)
    if x is not None:
        c = x.shape[1]
        inputs = [x.name, g.positive(c), g.floats(c), g.floats(c), g.positive(c)]
        g.add("BatchNormalization", inputs, x.shape, epsilon=1e-3)


def _norm(g: Graph) -> None:
    x = g.value(least=2)
    if x is None or x.shape[-1] < 2:
        return
    c = x.shape[-1]
    if g.opset >= 17 and g.chance(0.3):
        g.add("LayerNormalization", [x.name, g.positive(c), g.floats(c)], x.shape, axis=-1)
        return
    mean = _reduced(g, "ReduceMean", x, x.rank - 1, True)
    centred = g.add("Sub", [x.name, mean.name], x.shape)
    square = g.add("Mul", [centred.name, centred.name], x.shape)
    variance = g.add(
        "Add", [_reduced(g, "ReduceMean", square, x.rank - 1, True).name, g.constant(np.float32(1e-3))], mean.shape
    )
    y = g.add("Div", [centred.name, g.add("Sqrt", [variance.name], mean.shape).name], x.shape)
    if g.chance(0.7):
        y = g.add("Mul", [y.name, g.positive(c)], x.shape)
        g.add("Add", [y.name, g.floats(c)], x.shape)


def _reduced(g: Graph, op: str, x: Value, axis: int, keep: bool) -> Value:
    shape = [size for at, size in enumerate(x.shape) if at != axis or keep]
    if keep:
        shape[axis] = 1
    given = g.chance(0.5)
    axis -= x.rank if given else 0
    if g.opset >= 18 or op == "ReduceSum":
        return g.add(op, [x.name, g.integers(axis)], shape, keepdims=int(keep))
    return g.add(op, [x.name], shape, axes=[axis], keepdims=int(keep))


def _reduce(g: Graph) -> None:
    x = g.value(least=1)
    if x is not None:
        op = g.one_of(("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin"))
        _reduced(g, op, x, int(g.random.integers(x.rank)), g.chance(0.6))


def _softmax(g: Graph) -> None:
    x = g.value(least=1)
    if x is not None:
        g.add(g.one_of(("Softmax", "LogSoftmax")), [x.name], x.shape, axis=int(g.random.integers(-x.rank, x.rank)))


def _transpose(g: Graph) -> None:
    x = g.value(least=1)
    if x is not None:
        perm = [int(axis) for axis in g.random.permutation(x.rank)]
        y = g.add("Transpose", [x.name], [x.shape[axis] for axis in perm], perm=perm)
        if g.chance(0.3):
            op = g.one_of(("Relu", "Tanh", "Neg"))
            y = g.add(op, [y.name], y.shape)
            g.add("Transpose", [y.name], x.shape, perm=[int(axis) for axis in np.argsort(perm)])


def _reshape(g: Graph) -> None:
    x = g.value(least=1)
    if x is None:
        return
    way = int(g.random.integers(6))
    if way == 0:
        axis = int(g.random.integers(x.rank + 1))
        shape = (int(np.prod(x.shape[:axis], dtype=np.int64)), int(np.prod(x.shape[axis:], dtype=np.int64)))
        g.add("Flatten", [x.name], shape, axis=axis)
    elif way == 1 and x.rank < 5:
        axis = int(g.random.integers(x.rank + 1))
        g.add("Unsqueeze", [x.name, g.integers(axis)], (*x.shape[:axis], 1, *x.shape[axis:]))
    elif way == 2 and 1 in x.shape:
        axis = x.shape.index(1)
        g.add("Squeeze", [x.name, g.integers(axis)], x.shape[:axis] + x.shape[axis + 1 :])
    elif way == 3 and x.rank >= 2:
        target = (*[0] * (x.rank - 2), -1)
        g.add("Reshape", [x.name, g.integers(*target)], (*x.shape[:-2], x.shape[-2] * x.shape[-1]))
    elif way == 4 and x.rank >= 2:
        size = g.raw("Shape", [x.name])
        first = g.raw("Gather", [size, g.integers(0)])
        target = g.raw("Concat", [first, g.integers(-1)], axis=0)
        g.add("Reshape", [x.name, target], (x.shape[0], int(np.prod(x.shape[1:], dtype=np.int64))))
    else:
        g.add("Reshape", [x.name, g.raw("Shape", [x.name])], x.shape)


def _cut(g: Graph) -> None:
    x = g.value(least=1)
    if x is None:
        return
    axis = int(g.random.integers(x.rank))
    size = x.shape[axis]
    way = int(g.random.integers(3))
    if way == 0 and size >= 1:
        start = int(g.random.integers(size))
        step = int(g.one_of((1, 1, 2, -1)))
        ends = [-(2**31)] if step < 0 else [int(g.one_of((size, 2**31 - 1, start + 1)))]
        kept = len(range(size)[start : None if step < 0 else ends[0] : step])
        inputs = [x.name, g.integers(start), g.integers(*ends), g.integers(axis), g.integers(step)]
        g.add("Slice", inputs, (*x.shape[:axis], kept, *x.shape[axis + 1 :]))
    elif way == 1 and size >= 2:
        first = int(g.random.integers(1, size))
        names = [g.name(), g.name()]
        g.nodes.append(helper.make_node("Split", [x.name, g.integers(first, size - first)], names, axis=axis))
        for name, part in zip(names, (first, size - first), strict=True):
            g.made.append(Value(name, (*x.shape[:axis], part, *x.shape[axis + 1 :])))
            g.values.append(g.made[-1])
    elif size >= 1:
        shape = g.one_of(((), (1,), (2,), (2, 2)))
        if x.rank - 1 + len(shape) <= 5:
            indices = g.constant(np.asarray(g.random.integers(-size, size, shape), np.int64))
            g.add("Gather", [x.name, indices], (*x.shape[:axis], *shape, *x.shape[axis + 1 :]), axis=axis)


def _join(g: Graph) -> None:
    x = g.value(least=1)
    if x is None:
        return
    axis = int(g.random.integers(x.rank))
    fit = [v for v in g.values if v.rank == x.rank and v.shape[:axis] == x.shape[:axis]]
    fit = [v for v in fit if v.shape[axis + 1 :] == x.shape[axis + 1 :]]
    parts = [g.one_of(fit) for _ in range(int(g.random.integers(1, 4)))]
    total = sum(part.shape[axis] for part in parts)
    g.add("Concat", [v.name for v in parts], (*x.shape[:axis], total, *x.shape[axis + 1 :]), axis=axis)


def _grow(g: Graph) -> None:
    x = g.value(least=1)
    if x is None:
        return
    way = int(g.random.integers(3))
    if way == 0:
        pads = [int(g.random.integers(0, 2)) for _ in range(2 * x.rank)]
        shape = [size + pads[i] + pads[i + x.rank] for i, size in enumerate(x.shape)]
        fill = [g.constant(np.float32(1.5))] if g.chance(0.3) else []
        g.add("Pad", [x.name, g.integers(*pads), *fill], shape)
    elif way == 1:
        repeats = [int(g.random.integers(1, 3)) for _ in x.shape]
        g.add("Tile", [x.name, g.integers(*repeats)], [a * b for a, b in zip(x.shape, repeats, strict=True)])
    else:
        shape = [int(g.random.integers(1, 4)) if size == 1 else size for size in x.shape]
        g.add("Expand", [x.name, g.integers(*shape)], shape)


def _choose(g: Graph) -> None:
    x = g.value()
    if x is None:
        return
    same = [v for v in g.values if v.shape == x.shape]
    way = int(g.random.integers(4))
    if way == 0:
        condition = g.constant(g.random.random(x.shape[-1:]) < 0.5)
        g.add("Where", [condition, x.name, g.one_of(same).name], x.shape)
    elif way == 1:
        low, high = g.constant(np.float32(-0.5)), g.constant(np.float32(g.one_of((0.5, 6.0))))
        inputs = [x.name, low if g.chance(0.7) else "", high]
        g.add("Clip", inputs, x.shape)
    elif way == 2:
        wide = g.raw("Cast", [x.name], to=onnx.TensorProto.DOUBLE)
        back = g.raw("Neg", [wide]) if g.chance(0.5) else wide
        g.add("Cast", [back], x.shape, to=onnx.TensorProto.FLOAT)
    else:
        g.add("Dropout", [x.name, *([g.constant(np.float32(0.5))] if g.chance(0.5) else [])], x.shape)


def _activation(g: Graph) -> None:
    x = g.value()
    if x is None:
        return
    if g.chance(0.5):
        gate = g.add("Sigmoid", [x.name], x.shape)
        g.add("Mul", [x.name, gate.name], x.shape)
        return
    y = g.add("Div", [x.name, g.constant(np.float32(np.sqrt(2.0)))], x.shape)
    y = g.add("Add", [g.add("Erf", [y.name], x.shape).name, g.constant(np.float32(1.0))], x.shape)
    y = g.add("Mul", [x.name, y.name], x.shape)
    g.add("Mul", [y.name, g.constant(np.float32(0.5))], x.shape)


def _pool(g: Graph) -> None:
    x = g.value(4)
    if x is None or min(x.shape[2:]) < 2:
        return
    shape = (*x.shape[:2], x.shape[2] // 2, x.shape[3] // 2)
    if g.chance(0.4):
        g.add("GlobalAveragePool", [x.name], (*x.shape[:2], 1, 1))
    else:
        g.add(g.one_of(("MaxPool", "AveragePool")), [x.name], shape, kernel_shape=[2, 2], strides=[2, 2])


def _only_constants(g: Graph) -> None:
    shape = (int(g.random.integers(1, 4)), int(g.random.integers(1, 4)))
    if g.chance(0.3):
        filled = onnx.numpy_helper.from_array(np.array([0.5], np.float32))
        g.add("ConstantOfShape", [g.integers(*shape)], shape, value=filled)
    else:
        op = g.one_of(("Add", "Mul", "Sub", "Max"))
        g.add(op, [g.floats(*shape), g.floats(shape[-1])], shape)


def _branch(g: Graph) -> None:
    """An If with branches that read the values around them, nested at most twice."""
    x = g.value()
    if x is None or g.prefix.count("b") >= 2:
        return
    bodies = []
    for which in ("t", "e"):
        body = Graph(g.random, g.opset, f"{g.prefix}b{g.count}{which}", g.values)
        _fill(body, int(g.random.integers(1, 4)))
        end = body.add(g.one_of(("Relu", "Neg", "Identity", "Tanh")), [x.name], x.shape)
        same = [v for v in body.made if v.shape == x.shape]
        end = body.add("Add", [g.one_of(same).name, end.name], x.shape)
        out = helper.make_tensor_value_info(end.name, onnx.TensorProto.FLOAT, None)
        bodies.append(helper.make_graph(body.nodes, "body", [], [out], initializer=body.weights))
    condition = g.constant(np.asarray(g.chance(0.5))) if g.chance(0.4) else "flag"
    g.add("If", [condition], x.shape, then_branch=bodies[0], else_branch=bodies[1])


_STEPS: tuple[tuple[Callable[[Graph], None], int], ...] = (
    (_unary, 4),
    (_root, 1),
    (_with_constant, 5),
    (_pair, 2),
    (_matmul, 4),
    (_attention, 1),
    (_conv, 3),
    (_batch_norm, 3),
    (_norm, 1),
    (_reduce, 1),
    (_softmax, 1),
    (_transpose, 2),
    (_reshape, 3),
    (_cut, 2),
    (_join, 2),
    (_grow, 2),
    (_choose, 2),
    (_activation, 1),
    (_pool, 1),
    (_only_constants, 1),
    (_branch, 1),
)


def _fill(g: Graph, steps: int) -> None:
    chances = np.array([weight for _, weight in _STEPS], float)
    for _ in range(steps):
        before = len(g.values)
        _STEPS[int(g.random.choice(len(_STEPS), p=chances / chances.sum()))][0](g)
        g.values[before:] = [v for v in g.values[before:] if np.prod(v.shape) <= _LARGEST]


def model(seed: int) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A random model of 3 to 16 steps, with inputs it accepts.

    Its last value and some in the middle are outputs, declared without dims or with those they have.
    """
    random = np.random.default_rng([7, seed])
    g = Graph(random, OPSETS[int(random.integers(len(OPSETS)))])
    shapes = [(SIZE, 4), (SIZE, 5, 4), (SIZE, 2, 5, 6), (4,)]
    inputs, feeds = [], {}
    for index in range(int(random.integers(1, 4))):
        shape = shapes[int(random.integers(len(shapes)))]
        dims = ["N" if size == SIZE and at == 0 and g.chance(0.5) else size for at, size in enumerate(shape)]
        inputs.append(helper.make_tensor_value_info(f"x{index}", onnx.TensorProto.FLOAT, dims))
        feeds[f"x{index}"] = random.standard_normal(shape).astype(np.float32)
        g.values.append(Value(f"x{index}", shape))
    inputs.append(helper.make_tensor_value_info("flag", onnx.TensorProto.BOOL, []))
    feeds["flag"] = np.asarray(g.chance(0.5))
    while not g.made:
        _fill(g, int(random.integers(3, 17)))
    read = {name for node in g.nodes for name in node.input}
    chosen = {v.name: v for v in g.made if g.chance(0.1 if v.name in read else 0.7)} | {g.made[-1].name: g.made[-1]}
    outputs = [
        helper.make_tensor_value_info(v.name, onnx.TensorProto.FLOAT, v.shape if g.chance(0.3) else [None] * v.rank)
        for v in chosen.values()
    ]
    graph = helper.make_graph(g.nodes, f"random {seed}", inputs, outputs, initializer=g.weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", g.opset)], ir_version=10), feeds
