"""The lock of a model holds what the model is, and nothing of its names and its order."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnx.parser
import onnx_ir as oir
import pytest

from burnish.backends.ort import session
from burnish.frontends import onnx_file
from burnish.ir.errors import InputError
from burnish.tools.check import lock_file
from burnish.tools.check import take as take_module
from burnish.tools.check.lock import Lock
from burnish.tools.check.sketch import distance
from burnish.tools.check.take import Request, take

DEMO = Path(__file__).resolve().parents[3] / "tools" / "demo"
RESNET, VIT = DEMO / "digits_resnet.onnx", DEMO / "digits_vit.onnx"
HEAD = '<ir_version: 10, opset_import: ["": 21, "my.own": 1]>'

LAYERS = """g (float[N,4] x) => (float[N,4] y)
    <float[4,4] w = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7}, float[4] b = {1,2,3,4}>
    { p = MatMul (x, w)  q = Add (p, b)  y = Relu (q) }"""

ODD = {
    "strings": "g (string[N] x) => (string[N] y) { y = Identity (x) }",
    "a sequence": "g (float[N] x) => (seq(float[N]) y) { y = SequenceConstruct (x, x) }",
    "an optional": "g (float[N] x) => (optional(float[N]) y) { y = Optional (x) }",
    "no inputs": "g () => (float[2] y) <float[2] w = {1, 2}> { y = Relu (w) }",
    "a weight as output": "g () => (float[2] w) <float[2] w = {1, 2}> { }",
    "nan": "g (float[N] x) => (float[N] y) { q = Sub (x, x)  y = Div (q, q) }",
    "an empty weight": """g (float[N] x) => (float[M] y)
        { w = Constant <value: tensor = float[0] {}> ()  y = Concat <axis: int = 0> (x, w) }""",
    "branches": """g (float[N] x, bool c) => (float[N] y) { y = If (c) <
        then_branch: graph = t () => (float[N] a) { a = Relu (x) },
        else_branch: graph = e () => (float[N] b) { b = Neg (x) }> }""",
    "a loop": """g (float[2] x) => (float[2] y, float[T,2] s) {
        n = Constant <value: tensor = int64 {3}> ()  c = Constant <value: tensor = bool {1}> ()
        y, s = Loop (n, c, x) <body: graph = b (int64 i, bool k, float[2] p) => (bool kk, float[2] q, float[2] r)
        { kk = Identity (k)  q = Add (p, p)  r = Neg (q) }> }""",
    "bfloat16": "g (bfloat16[N,2] x) => (bfloat16[N,2] y) <bfloat16[2] w = {16256, 1}> { y = Cast <to: int = 16> (x) }",
    "float8": """g (float[N,2] x) => (float[N,2] y) <float8e4m3fn[2] w = {56, 48}, float s = {1.0}>
        { d = DequantizeLinear (w, s)  y = Add (x, d) }""",
    "huge numbers": """g (double[N,2] x) => (double[N,2] y)
        { w = Constant <value: tensor = double[2] {1e300, -1e308}> ()  y = Mul (x, w) }""",
    "infinities": """g (float[N,2] x) => (float[N,2] y)
        { w = Constant <value: tensor = float[2] {3e38, -3e38}> ()  v = Mul (w, w)  y = Mul (x, v) }""",
    "names that YAML minds": 'g (float[N] x) => (float[N] "y: #1") { "y: #1" = Relu (x) }',
}


def parsed(source: str) -> oir.Model:
    """The model of ONNX text, read as a file is."""
    return onnx_file.read_bytes(onnx.parser.parse_model(HEAD + source).SerializeToString())


def respelled(path: Path, seed: int) -> oir.Model:
    """The model with other names inside and its nodes in another order that can run."""
    draw = random.Random(seed)
    proto = onnx.load(path)
    graph = proto.graph
    kept = {one.name for one in (*graph.input, *graph.output)}
    names = {}
    for name in [one.name for one in graph.initializer] + [name for node in graph.node for name in node.output]:
        names[name] = name if name in kept or not name else f"v{draw.randrange(1 << 40)}"
    for one in (*graph.initializer, *graph.value_info):
        one.name = names.get(one.name, one.name)
    known = {one.name for one in (*graph.input, *graph.initializer)} | {""}
    waiting = list(graph.node)
    for node in waiting:
        node.name = f"n{draw.randrange(1 << 40)}"
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    ordered = []
    while waiting:
        node = draw.choice([one for one in waiting if known.issuperset(one.input)])
        waiting.remove(node)
        ordered.append(node)
        known |= set(node.output)
    del graph.node[:]
    graph.node.extend(ordered)
    return onnx_file.read_bytes(proto.SerializeToString())


def without_labels(lock: Lock) -> Lock:
    """The lock with empty labels."""
    segments = [
        msgspec.structs.replace(one, layers=[msgspec.structs.replace(layer, name="") for layer in one.layers])
        for one in lock.segments
    ]
    return msgspec.structs.replace(lock, segments=segments)


@pytest.mark.parametrize("path", [RESNET, VIT], ids=lambda path: path.stem)
def test_a_lock_taken_again_is_the_same_and_so_is_its_file(path, tmp_path):
    first = take(onnx_file.read(path))
    assert take(onnx_file.read(path), known=first) == first
    lock_file.write(first, tmp_path / "a.lock.yaml")
    assert lock_file.read(tmp_path / "a.lock.yaml") == first


@pytest.mark.parametrize("path", [RESNET, VIT], ids=lambda path: path.stem)
def test_names_and_order_change_labels_only(path):
    first = without_labels(take(onnx_file.read(path)))
    for seed in range(2):
        assert without_labels(take(respelled(path, seed))) == first


def test_neither_process_nor_hash_seed_nor_threads_change_the_text():
    script = (
        "import sys; from burnish.frontends import onnx_file; from burnish.tools.check import lock_file, take;"
        f"lock = take.take(onnx_file.read({str(RESNET)!r}), take.Request(threads=int(sys.argv[1])));"
        "sys.stdout.write(lock_file.text(lock))"
    )
    texts = {
        subprocess.run(
            [sys.executable, "-c", script, threads],
            env=os.environ | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed, threads in (("1", "1"), ("2", "2"))
    }
    assert len(texts) == 1 and "lock: 1" in texts.pop()


def test_what_the_lock_holds_of_a_small_model():
    lock = take(parsed(LAYERS))
    assert (lock.inputs, lock.outputs) == ({"x": "float[N,4]"}, {"y": "float[N,4]"})
    assert lock.opsets == {"ai.onnx": 21, "my.own": 1}
    assert lock.operators == {"Add": 1, "MatMul": 1, "Relu": 1}
    assert lock.views == {"linear layers": 1}
    assert (lock.sizes.nodes, lock.sizes.parameters, lock.sizes.bytes) == (3, 20, {"float": 80})
    rows = lock.sizes.at["N"]
    assert lock.sizes.multiply_adds == 16 * rows
    assert list(lock.code.values()) == [["MatMul(x, float[4,4])", "Add(MatMul, float[4])", "Relu(Add)"]]
    matrix, bias = lock.segments[0].layers
    assert (matrix.line, bias.line) == (0, 1)
    assert bias.norm == pytest.approx(30**0.5, rel=1e-5)
    assert lock.samples is not None and lock.samples.roles == {"x": {"kind": "number"}}
    assert len(lock.values) >= 3


def test_a_weight_that_moves_shows_in_its_layer_alone():
    first = take(onnx_file.read(RESNET))
    model = onnx_file.read(RESNET)
    name, value = next((n, v) for n, v in model.graph.initializers.items() if len(v.shape or ()) == 4)
    array = value.const_value.numpy()
    moved = array + 1e-3 * np.random.default_rng(0).standard_normal(array.shape) * array.std()
    value.const_value = oir.tensor(moved.astype(array.dtype), name=name)
    second = take(model, known=first)
    assert (second.structure, second.code, second.views) == (first.structure, first.code, first.views)
    assert second.weights != first.weights
    pairs = zip(first.segments, second.segments, strict=True)
    layers = [both for one, two in pairs for both in zip(one.layers, two.layers, strict=True)]
    differing = [(a, b) for a, b in layers if a.weights != b.weights]
    assert len(differing) == 1
    (old, new) = differing[0]
    relative = np.linalg.norm(moved - array) / np.linalg.norm(array)
    assert 0.3 * relative < distance(old.sketch, new.sketch, old.norm) < 3 * relative


def test_nothing_is_derived_again_from_a_structure_that_is_known(monkeypatch):
    first = take(onnx_file.read(RESNET))
    monkeypatch.delattr(take_module, "_derived")
    assert take(onnx_file.read(RESNET), known=first) == first


def test_samples_are_made_from_the_roles_in_the_lock():
    """A comparison with a padding token is a part of the spelling that another exporter leaves out."""
    ids = (
        "g (int64[N,S] ids) => (float[N,S,2] y) <float[7,2] t = {1,2,3,4,5,6,7,8,9,1,2,3,4,5}> { y = Gather (t, ids) }"
    )
    first = take(parsed(ids))
    assert first.samples is not None and first.samples.roles == {"ids": {"kind": "ids", "rows": 7}}
    clamped = ids.replace("{ y = Gather (t, ids)", "{ c = Clip (ids)  m = Mul (c, c)  y = Gather (t, m)").replace(
        "7,2", "37,2"
    )
    clamped = clamped.replace("4,5}", "4,5" + ",0" * 60 + "}")
    alone, with_lock = take(parsed(clamped)), take(parsed(clamped), known=first)
    assert with_lock.samples == first.samples
    assert alone.samples is not None and alone.samples.roles != first.samples.roles


@pytest.mark.parametrize(
    "role",
    [
        {"kind": "nonsense"},
        {"kind": "ids", "rows": "many"},
        {"kind": "signal", "window": [1 << 40, 1]},
        {"kind": "image", "channels": -1},
        {"kind": "past", "axis": 7},
        {"kind": "ids", "path": "x"},
        {"kind": "choice", "choices": list(range(5000))},
    ],
    ids=str,
)
def test_a_hostile_role_is_an_error(role):
    first = take(parsed(LAYERS))
    assert first.samples is not None
    samples = msgspec.structs.replace(first.samples, roles={"x": role})
    with pytest.raises(InputError, match="role of input `x`"):
        take(parsed(LAYERS), known=msgspec.structs.replace(first, samples=samples))


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("run", [True, False], ids=["run", "no run"])
def test_any_model_has_a_lock(name, run, tmp_path):
    request = Request(run=run)
    first = take(parsed(ODD[name]), request)
    assert take(parsed(ODD[name]), request) == first == take(parsed(ODD[name]), request, first)
    lock_file.write(first, tmp_path / "lock.yaml")
    assert lock_file.read(tmp_path / "lock.yaml") == first
    assert bool(first.values) == run


def test_packed_weights_have_a_sketch():
    tensor = onnx.helper.make_tensor("w", onnx.TensorProto.INT4, [40], list(range(-8, 8)) + [1] * 24)
    model = onnx.parser.parse_model(
        HEAD + "g (float[N,40] x) => (float[N,40] y) <float s = {0.5}> { d = DequantizeLinear (w, s)  y = Add (x, d) }"
    )
    model.graph.initializer.append(tensor)
    lock = take(onnx_file.read_bytes(model.SerializeToString()))
    (layer,) = [one for segment in lock.segments for one in segment.layers]
    assert layer.norm == pytest.approx(np.sqrt(sum(n * n for n in range(-8, 8)) + 24), rel=1e-5)
    assert lock.sizes.bytes["int4"] == 20


def test_weights_beside_the_file_are_read(tmp_path):
    proto = onnx.load(RESNET)
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    assert take(onnx_file.read(tmp_path / "m.onnx")) == take(onnx_file.read(RESNET))


def test_of_an_output_that_is_drawn_only_the_type_is_kept():
    source = "g (float[N] x) => (float[N] y, float[N] z) { r = RandomNormalLike (x)  y = Add (x, r)  z = Neg (x) }"
    outputs = take(parsed(source)).values[0].outputs
    assert (outputs["y"].type, outputs["y"].sketch, outputs["y"].finite) == ("float[5]", (), 0)
    assert outputs["z"].finite == 5


@pytest.mark.parametrize(
    "source",
    [
        "g (float[N] x) => (float[N] y) { y = my.own.Thing (x) }",
        "g (seq(float[N]) x) => (float[N] y) { i = Constant <value: tensor = int64 {0}> ()  y = SequenceAt (x, i) }",
    ],
)
def test_what_cannot_be_run_is_an_error_that_names_the_way_out(source):
    with pytest.raises(InputError) as caught:
        take(parsed(source))
    assert "--no-run" in str(caught.value.hint)
    lock = take(parsed(source), Request(run=False))
    assert lock.values == [] and lock.samples is None and lock.code


def test_given_samples_with_labels_give_a_metric(tmp_path):
    data = str(DEMO / "digits.npz")
    lock = take(onnx_file.read(RESNET), Request(data=data))
    assert lock.metric is not None and lock.metric.name == "accuracy" and 0.9 < lock.metric.value <= 1
    assert lock.samples is not None and lock.samples.given and lock.samples.refused == 0


def test_what_is_computed_at_padding_does_not_count():
    """One exporter lets a padded position see nothing, which is NaN, another lets it see all."""
    source = """g (float[N,S,4] x, int64[N,S] mask) => (float[N,S,4] y, float[N,4] pooled) {{
        b = Cast <to: int = 9> (mask)  a = Constant <value: tensor = int64[1] {{2}}> ()  k = Unsqueeze (b, a)
        o = Constant <value: tensor = float {{{other}}}> ()  y = Where (k, x, o)
        f = Cast <to: int = 1> (k)  z = Mul (x, f)  one = Constant <value: tensor = int64[1] {{1}}> ()
        t = ReduceSum <keepdims: int = 0> (z, one)  n = ReduceSum <keepdims: int = 0> (f, one)  p = Div (t, n)
        pooled = Identity (p) }}"""
    first = take(parsed(source.format(other="0.0")))
    second = take(parsed(source.format(other="7.0")), known=first)
    assert first.samples is not None and first.samples.roles["mask"] == {"kind": "mask"}
    assert second.values == first.values
    assert any(one.outputs["y"].finite < np.prod(sizes(one.outputs["y"].type)) for one in first.values)


def sizes(kind: str) -> list[int]:
    return [int(size) for size in kind.partition("[")[2].rstrip("]").split(",")]


def test_samples_beyond_the_first_count_together(tmp_path):
    x = np.random.default_rng(0).standard_normal((20, 3, 4), np.float32)
    np.savez(tmp_path / "d.npz", x=x)
    first = take(parsed(LAYERS), Request(data=tmp_path / "d.npz"))
    assert [one.sample for one in first.values][-1] == "12 further samples"
    assert first.values[-1].outputs["y"].type == "float[3,4]" and first.values[-1].outputs["y"].finite == 144
    x[19, 2, 3] += 1
    np.savez(tmp_path / "d.npz", x=x)
    second = take(parsed(LAYERS), Request(data=tmp_path / "d.npz"))
    assert second.values[:-1] == first.values[:-1] and second.values[-1] != first.values[-1]
    assert second.samples != first.samples


def test_samples_that_the_model_refuses_are_counted(tmp_path):
    source = LAYERS.replace("p = MatMul (x, w)", "f = Reshape (x, s)  p = MatMul (f, w)").replace(
        "float[4] b", "int64[2] s = {2, 4}, float[4] b"
    )
    for name, rows in (("a", 2), ("b", 3), ("c", 2)):
        np.savez(tmp_path / f"{name}.npz", x=np.ones((rows, 4), np.float32))
    lock = take(parsed(source), Request(data=tmp_path))
    assert lock.samples is not None and lock.samples.refused == 1 and len(lock.values) == 2
    (tmp_path / "a.npz").unlink()
    (tmp_path / "c.npz").unlink()
    with pytest.raises(InputError, match="refuses every sample"):
        take(parsed(source), Request(data=tmp_path))


def test_a_metric_that_compares_with_an_original_is_refused():
    with pytest.raises(InputError, match="compares with an original"):
        take(onnx_file.read(RESNET), Request(metric="divergence"))


def test_a_users_metric_is_asked_about_all_samples():
    def rows(outputs, labels):
        return sum(len(one["y"]) for one in outputs)

    lock = take(parsed(LAYERS), Request(metric=rows))
    assert lock.metric is not None and lock.metric.name == "rows"
    assert lock.metric.value == sum(sizes(one.outputs["y"].type)[0] for one in lock.values)


def test_latency_is_a_ratio_with_an_interval():
    lock = take(parsed(LAYERS), Request(latency=True))
    assert lock.latency is not None
    assert 0 < lock.latency.low <= lock.latency.ratio <= lock.latency.high
    assert lock.latency.reference == "MatMul float[512,512] by a constant float[512,512], 1 thread"


def test_one_session_is_made(monkeypatch):
    made = []
    start = session._start
    monkeypatch.setattr(session, "_start", lambda *args, **more: made.append(1) or start(*args, **more))
    take(onnx_file.read(RESNET), Request(data=str(DEMO / "digits.npz")))
    assert len(made) == 1


def test_given_samples_go_by_names_without_their_folder(tmp_path, monkeypatch):
    (tmp_path / "deep" / "more").mkdir(parents=True)
    np.savez(tmp_path / "deep" / "more" / "one.npz", image=np.zeros((2, 1, 8, 8), np.float32))
    monkeypatch.chdir(tmp_path)
    model = onnx_file.read(DEMO / "digits_resnet.onnx")
    for data in (
        "deep/more/one.npz",
        "deep/more",
        tmp_path / "deep" / "more" / "one.npz",
        str(tmp_path / "deep" / "more"),
    ):
        assert [one.sample for one in take(model, Request(data=data)).values] == ["one.npz"]


def test_weights_in_attributes_are_told_apart():
    """Constants of lists have no tensor that lives on: another one may come to lie where it lay."""
    lines = "\n".join(
        f"k{i} = Constant <value_floats = [{i}.0, 2.0, 3.0, 4.0]> ()  a{i + 1} = Mul (a{i}, k{i})" for i in range(40)
    )
    source = f'<ir_version: 10, opset_import: ["": 20]> g (float[4] a0) => (float[4] a40) {{ {lines} }}'
    lock = take(onnx_file.read_bytes(onnx.parser.parse_model(source).SerializeToString()), Request(run=False))
    (segment,) = lock.segments
    expected = [(i * i + 4 + 9 + 16) ** 0.5 for i in range(40)]
    assert [one.norm for one in segment.layers] == pytest.approx(expected, rel=1e-4)


def test_functions_of_another_opset_are_an_error_of_the_model() -> None:
    source = """<ir_version: 10, opset_import: ["": 20, "local": 1]>
    g (float[2] x) => (float[2] y) { y = local.f (x) }
    <domain: "local", opset_import: ["": 19]> f (a) => (b) { b = Relu (a) }"""
    with pytest.raises(InputError, match="cannot be inlined: Opset mismatch"):
        take(onnx_file.read_bytes(onnx.parser.parse_model(source).SerializeToString()), Request(run=False))
