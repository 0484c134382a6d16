"""A model in regions: every node once, none of them in a circle, and together they compute what the model computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

import fuzz
import numpy as np
import onnx_ir as oir
import pytest
from golden import parse_graph

from burnish.backends.ort.session import executor
from burnish.backends.tvm.regions import SMALL, Region, partition, summary
from burnish.frontends import onnx_file
from burnish.ir import weights
from burnish.ir.errors import InputError
from burnish.ir.inference import Inference
from burnish.ir.network import reads

SEEDS = 120
RUN = executor(level="off", lean=True)


def graph(text: str) -> oir.Model:
    """A model from ONNX text at opset 20, weights with values."""
    return oir.from_proto(parse_graph(f'<ir_version: 10, opset_import: ["": 20]> {text}'))


def refusing(*op_types: str) -> Callable[[oir.Node, Inference], str | None]:
    """Refuse these operators."""
    return lambda node, facts: f"{node.op_type} is refused" if node.op_type in op_types else None


def cut(model: oir.Model, *op_types: str) -> list[Region]:
    """The regions of a model where some operators are refused."""
    return partition(model, Inference(model), refusing(*op_types))


def check(model: oir.Model, found: list[Region]) -> None:
    """Hold regions to what `partition` promises."""
    owned = Counter(node for region in found for node in region.nodes if node not in region.copies)
    assert set(owned.values()) <= {1}
    assert all(node in owned or any(node in one.copies for one in found) or _unread(node) for node in model.graph)
    known = set(model.graph.inputs)
    for region in found:
        assert set(region.inputs) <= known, "a region reads what none before it computes"
        inside, made = set(region.nodes), {value for node in region.nodes for value in node.outputs}
        read = {value for node in inside for value in reads(node) if not weights.is_constant(value)}
        assert read - made == set(region.inputs)
        assert all(value.producer() not in region.copies for value in region.outputs)
        known |= set(region.outputs)
        assert region.kind == "ort" or not region.reasons
        if region.kind == "tvm":
            assert all(one.dtype is not None and one.shape is not None for one in region.model.graph.inputs)
    outputs = [value for value in model.graph.outputs if not weights.is_constant(value)]
    assert set(outputs) <= known
    assert all(one.kind != other.kind for one, other in zip(found, found[1:], strict=False))


def _unread(node: oir.Node) -> bool:
    return all(not out.uses() or all(map(_unread, {use.node for use in out.uses()})) for out in node.outputs)


def chained(model: oir.Model, found: list[Region], feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The outputs of a model from its regions, one after the other in ONNX Runtime."""
    values = {value: feeds[str(value.name)] for value in model.graph.inputs}
    for region in found:
        if not region.outputs:
            continue
        runner = RUN(region.model)
        given = {
            str(one.name): values[value] for one, value in zip(region.model.graph.inputs, region.inputs, strict=True)
        }
        results = runner.run(given)
        values.update(zip(region.outputs, results.values(), strict=True))
        runner.close()
    return [values[value] if value in values else weights.constant(value) for value in model.graph.outputs]


def same(model: oir.Model, found: list[Region], feeds: Mapping[str, np.ndarray]) -> None:
    """The regions compute what the model computes."""
    expected = RUN(model).run(feeds)
    for array, (name, wanted) in zip(chained(model, found, feeds), expected.items(), strict=True):
        np.testing.assert_allclose(array, wanted, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("start", range(0, SEEDS, 12))
def test_random_models_are_cut_whatever_is_refused(start: int) -> None:
    for seed in range(start, start + 12):
        proto, feeds = fuzz.model(seed)
        model = onnx_file.read_bytes(proto.SerializeToString())
        random = np.random.default_rng(seed)
        refused = {node for node in model.graph if random.random() < (0.1, 0.3, 0.6)[seed % 3]}

        def refuses(node: oir.Node, facts: Inference, refused: set[oir.Node] = refused) -> str | None:
            return "at random" if node in refused or node.op_type == "If" else None

        found = partition(model, Inference(model), refuses)
        check(model, found)
        same(model, found, feeds)


def test_a_model_of_which_nothing_is_refused_is_one_region() -> None:
    (region,) = cut(graph("g (float[n, 4] x) => (float[n, 4] y) { a = Relu(x)  y = Tanh(a) }"))
    assert (region.kind, len(region.nodes)) == ("tvm", 2)


WIDE = """g (float[n, 4] x) => (float[n, 4] y) <float[4, 4] w> {
    a = MatMul(x, w)  b = Gelu(a)  c = MatMul(b, w)  d = Gelu(c)  e = MatMul(x, w)  f = Add(d, e)  y = Relu(f) }"""


def test_there_are_no_more_regions_than_a_path_changes_sides() -> None:
    model = graph(WIDE)
    found = cut(model, "Gelu")
    check(model, found)
    assert [one.kind for one in found] == ["tvm", "ort", "tvm", "ort", "tvm"]


def test_a_branch_stands_with_its_reader_where_fewer_values_then_cross() -> None:
    found = cut(graph(WIDE), "Gelu")
    assert [node.op_type for node in found[-1].nodes] == ["MatMul", "Add", "Relu"]
    assert [value.name for value in found[-1].inputs] == ["x", "d"]


def test_a_few_cheap_nodes_between_refused_ones_stay_with_them() -> None:
    model = graph("""g (float[n, 4] x) => (float[n, 4] y) {
        a = Gelu(x)  b = Relu(a)  c = Neg(b)  y = Gelu(c) }""")
    (region,) = cut(model, "Gelu")
    assert region.kind == "ort" and SMALL in region.reasons.values()
    assert summary(region).startswith("Gelu `a` and 1 more: Gelu is refused; Relu `b` and 1 more: too little")


def test_vectors_of_sizes_are_computed_where_they_are_read() -> None:
    model = graph("""g (float[batch, seq, 4] x) => (float[batch, m] y)
        <int64[1] minus = {-1}, float[4, 4] w> {
        a = MatMul(x, w)  b = Gelu(a)  s = Shape<end=1>(x)  t = Concat<axis=0>(s, minus)
        c = Reshape(b, t)  d = Exp(c)  e = Add(d, c)  f = Mul(e, c)  g = Sub(f, c)  h = Neg(g)  y = Tanh(h) }""")
    found = cut(model, "Gelu")
    check(model, found)
    assert [sorted(node.op_type for node in one.copies) for one in found] == [[], [], ["Concat", "Shape"]]
    assert [[str(one) for one in value.shape] for value in found[2].model.graph.inputs] == [["batch", "seq", "4"]] * 2


def test_sizes_that_hang_on_data_get_names_of_their_own() -> None:
    model = graph("""g (float[n, 4] x) => (float[k, 4] y) <int64[1] one = {1}, float[4, 4] w> {
        f = ReduceSum<keepdims=0>(x, one)  i = NonZero(f)  j = Transpose(i)  r = GatherND(x, j)
        m = MatMul(r, w)  y = MatMul(m, w) }""")
    found = cut(model, "NonZero", "GatherND")
    check(model, found)
    assert found[-1].kind == "tvm"
    (given,) = found[-1].model.graph.inputs
    assert given.shape[1] == 4 and not str(given.shape[0]).startswith("?") and str(given.shape[0]) != "n"


def test_values_without_dtype_or_rank_keep_their_nodes_on_one_side() -> None:
    model = graph("""g (float[n, 4] x) => (float[n, 4] y, float[n, 4] z) <int64 zero = {0}, float[4, 4] w> {
        s = SequenceConstruct(x, x)  m = MatMul(x, w)  q = SequenceInsert(s, m)
        y = SequenceAt(q, zero)  z = MatMul(m, w) }""")
    found = cut(model, "SequenceConstruct")
    check(model, found)
    assert [[node.op_type for node in one.nodes] for one in found] == [
        ["MatMul", "MatMul"],
        ["SequenceConstruct", "SequenceInsert", "SequenceAt"],
    ]
    same(model, found, {"x": np.ones((2, 4), np.float32)})


def test_nodes_between_two_that_belong_together_stay_with_them() -> None:
    model = graph("""g (float[n, 4] x) => (float[n, 4] y) <int64 zero = {0}, float[4, 4] w> {
        s = SequenceConstruct(x, x)  a = SequenceAt(s, zero)  m = MatMul(a, w)  q = SequenceInsert(s, m)
        y = SequenceAt(q, zero) }""")
    (region,) = cut(model, "SequenceConstruct")
    assert region.kind == "ort" and len(region.nodes) == 5


def test_what_is_not_handed_over_keeps_its_readers_on_onnx_runtime() -> None:
    model = graph("""g (bfloat16[n, 4] x, bfloat16[4, 4] w) => (bfloat16[n, 4] y) { y = MatMul(x, w) }""")
    (region,) = cut(model)
    assert region.kind == "ort" and "of dtype bfloat16 is not handed over" in summary(region)


def test_a_node_that_is_refused_in_its_region_alone_stays_on_onnx_runtime() -> None:
    model = graph(WIDE)

    def refuses(node: oir.Node, facts: Inference) -> str | None:
        if node.op_type == "Gelu":
            return "always"
        return "not alone" if node.op_type == "Add" and len(facts.model.graph) < 7 else None

    found = partition(model, Inference(model), refuses)
    check(model, found)
    assert [node.op_type for one in found for node, why in one.reasons.items() if why == "not alone"] == ["Add"]


def test_outputs_that_are_inputs_weights_or_sizes() -> None:
    model = graph("""g (float[n, 4] x) => (float[n, 4] x, float[4, 4] w, int64[2] s, float[n, 4] y) <float[4, 4] w> {
        s = Shape(x)  y = MatMul(x, w) }""")
    found = cut(model)
    check(model, found)
    assert [value.name for one in found for value in one.outputs] == ["s", "y"]


def test_an_input_with_a_value_of_its_own_is_an_error() -> None:
    model = graph("g (float[n, 4] x, float[4] b) => (float[n, 4] y) { y = Add(x, b) }")
    value = model.graph.inputs[1]
    value.const_value = oir.tensor(np.ones(4, np.float32), name="b")
    model.graph.register_initializer(value)
    with pytest.raises(InputError, match="value of its own"):
        cut(model)
