"""Healing: what is trained changes, the rest keeps its bytes; it is never worse; bad options are refused."""

from __future__ import annotations

from dataclasses import replace

import decoding
import numpy as np
import onnx_ir as oir
import pytest
import torch
from fx_checks import bytes_of, floats, model_of
from healing_checks import QUICK, TIED, VALUES, check, divergence, without

from burnish.backends.fx import healing_factors
from burnish.backends.fx.builder import to_graph_module
from burnish.backends.fx.healing import Progress, heal
from burnish.backends.fx.healing_weights import trainable
from burnish.backends.ort.session import executor
from burnish.ir.errors import InputError
from burnish.ir.samples import Sample
from burnish.ir.views import blocks
from burnish.passes.pipeline import Pipeline
from burnish.passes.recipes import NORMAL_FORM


def test_all_weights_learn_and_the_student_stays(vit: oir.Model, short: oir.Model, samples: list[Sample]) -> None:
    before, told = bytes_of(short), list[Progress]()
    unlabelled = [replace(sample, labels=None) for sample in samples]
    healed = heal(short, vit, unlabelled, QUICK, told.append)
    check(short, healed)
    assert bytes_of(short) == before
    assert divergence(healed.model, vit, samples) < 0.5 * divergence(short, vit, samples)
    assert [one.step for one in told] == list(range(1, 21)) and told[-1].share == 1
    assert told[-1].held_out <= told[0].held_out
    assert [step for step, _, _ in healed.history] == list(range(2, 21, 2)) and healed.steps == 20


def test_the_last_blocks_learn_and_what_is_frozen_keeps_its_bytes(vit: oir.Model, samples: list[Sample]) -> None:
    four = Pipeline(NORMAL_FORM).rewrite(vit).model
    found = blocks.stacks(four).blocks
    student = without(four, 2)
    first = {str(v.name) for node in found[0].nodes for v in node.inputs if v is not None and v.const_value is not None}
    options = replace(QUICK, train="blocks", blocks=1)
    changed = check(student, heal(student, four, samples, options))
    kept = [
        {str(v.name) for node in b.nodes for v in node.inputs if v is not None} for b in blocks.stacks(student).blocks
    ]
    assert sum(bool(changed & names) for names in kept) == 1 and changed <= set.union(*kept)
    last = check(student, heal(student, four, samples, replace(QUICK, train="last")))
    assert first & last and not any("patches" in name or "positions" in name for name in last)


@pytest.mark.parametrize("loss", ["task", "both"])
def test_labels_teach(vit: oir.Model, short: oir.Model, samples: list[Sample], loss: str) -> None:
    healed = heal(short, vit, samples, replace(QUICK, loss=loss))  # type: ignore[arg-type]
    check(short, healed)
    with pytest.raises(InputError, match="labels"):
        heal(short, vit, [replace(one, labels=None) for one in samples], replace(QUICK, loss=loss))  # type: ignore[arg-type]


def test_a_low_rank_change_is_merged(vit: oir.Model, short: oir.Model, samples: list[Sample]) -> None:
    healed = heal(short, vit, samples, replace(QUICK, train="lora", rank=2, rate=1e-2))
    for name in check(short, healed):
        old, new = (model.graph.initializers[name].const_value.numpy() for model in (short, healed.model))
        assert np.linalg.matrix_rank((new - old).astype(np.float64), tol=1e-4) <= 2
    assert divergence(healed.model, vit, samples) < divergence(short, vit, samples)
    assert healed.trained < 10_000


def test_it_is_never_worse(vit: oir.Model, short: oir.Model, samples: list[Sample]) -> None:
    healed = heal(short, vit, samples, replace(QUICK, rate=1e4, patience=2, clip=1e6))
    assert not healed.improved and healed.model is short and healed.after == healed.before
    assert healed.ended == "2 evaluations without improvement" or "finite" in healed.ended
    same = heal(vit, vit, samples, replace(QUICK, steps=2))
    assert not same.improved and same.before == 0


def test_other_outputs_are_compared_by_value(samples: list[Sample]) -> None:
    teacher = model_of(VALUES)
    student = teacher.clone()
    for name in ("v", "u"):
        value = student.graph.initializers[name]
        value.const_value = oir.tensor(value.const_value.numpy() * 0.5, name=name)
    given = [Sample("s", {"x": floats(64, 4)})]
    healed = heal(student, teacher, given, replace(QUICK, steps=60, rate=5e-2))
    assert {"v", "u"} <= check(student, healed) and healed.after < 0.1 * healed.before


def test_blocks_of_a_model_without_classes_are_chosen_by_the_same_error() -> None:
    teacher = model_of("""
        g (float[N, 4] x) => (float[N, 4] y) <float[4, 8] a, float[8, 4] b, float[4, 8] c, float[8, 4] d> {
            h = MatMul (x, a)  i = Relu (h)  j = MatMul (i, b)  k = Add (x, j)
            l = MatMul (k, c)  m = Relu (l)  n = MatMul (m, d)  o = Add (k, n)  y = Tanh (o)
        }""")
    student = teacher.clone()
    value = student.graph.initializers["d"]
    value.const_value = oir.tensor(value.const_value.numpy() * 0, name="d")
    given = [Sample("s", {"x": floats(64, 4)})]
    options = replace(QUICK, train="blocks", blocks=1, rate=1e-2)
    assert check(student, heal(student, teacher, given, options)) in ({"a", "b"}, {"c", "d"}, {"d"})


def test_narrow_weights_learn_in_float32_and_stay_narrow() -> None:
    teacher = model_of(VALUES.replace("float[", "float16["))
    student = teacher.clone()
    value = student.graph.initializers["v"]
    value.const_value = oir.tensor(value.const_value.numpy() * np.float16(0.5), name="v")
    given = [Sample("s", {"x": floats(64, 4).astype(np.float16)})]
    healed = heal(student, teacher, given, replace(QUICK, rate=2e-2))
    assert "v" in check(student, healed)
    assert {one.const_value.dtype for one in healed.model.graph.initializers.values()} == {oir.DataType.FLOAT16}


def test_frequencies_of_positions_are_not_learnt() -> None:
    model = model_of(
        """
        g (float[N, S, 4] x, int64[N, S] places) => (float[N, S, 4] y) <float[1, 4] frequencies, float[4, 4] w> {
            p = Cast <to = 1> (places)  u = Unsqueeze (p, last)  a = MatMul (u, frequencies)  c = Cos (a)
            h = MatMul (x, w)  y = Mul (h, c)
        }""".replace("float[4, 4] w>", "float[4, 4] w, int64[1] last = {-1}>")
    )
    assert set(trainable(model, to_graph_module(model))) == {"w"}


PAIRS = """
g (float[N, 6] x, float[N, 4, 5, 5] i) => (float[N, 3] y, float[N, 8, 5, 5] z)
    <float[6, 2] v, float[2, 8] p, float[7, 2] q, float[2] c, float[15, 3] w,
     float[3, 4, 3, 3] k, float[8, 3, 1, 1] l> {
    h = MatMul (x, v)  a = MatMul (h, p)  d = Gemm <transB = 1> (h, q)  t = Concat <axis = 1> (a, d)  r = Tanh (t)
    y = MatMul (r, w)  m = Conv <pads = [1, 1, 1, 1]> (i, k)  z = Conv (m, l)
}
"""


def test_factors_are_found_split_and_decayed() -> None:
    model = model_of(PAIRS)
    module = to_graph_module(model)
    pairs = healing_factors.pairs(model, trainable(model, module))
    assert [(p.inner.path, [o.path for o in p.outer]) for p in pairs] == [("v", ["p", "q"]), ("k", ["l"])]
    feeds = (torch.from_numpy(floats(3, 6)), torch.from_numpy(floats(3, 4, 5, 5)))
    before = [one.detach() for one in module(*feeds)]
    penalty = healing_factors.frobenius(module, pairs)
    u, v = module.p.T, module.v.T
    products = [u @ v, module.q @ v, module.l.flatten(1) @ module.k.flatten(1)]
    assert penalty.item() == pytest.approx(sum((one**2).sum().item() / 2 for one in products), rel=1e-5)
    penalty.backward()
    torch.testing.assert_close(module.p.grad.T, u @ v @ v.T)
    torch.testing.assert_close(module.v.grad.T, u.T @ u @ v + module.q.T @ module.q @ v)
    healing_factors.split_anew(module, pairs)
    for old, new in zip(before, module(*feeds), strict=True):
        torch.testing.assert_close(new, old)
    outer = torch.cat([module.p.T, module.q])
    values = [torch.linalg.svdvals(one.detach()) for one in (outer, module.v.T)]
    torch.testing.assert_close(values[0], values[1])


def test_only_factors_learn() -> None:
    teacher = model_of(PAIRS)
    student = teacher.clone()
    for value in student.graph.initializers.values():
        value.const_value = oir.tensor((value.const_value.numpy() * 0.7).astype(np.float32), name=value.name)
    given = [Sample("s", {"x": floats(64, 6), "i": floats(64, 4, 5, 5)})]
    options = replace(QUICK, train="factors", rate=1e-2, frobenius=1e-6, spectral=True, noise=0.01)
    assert check(student, heal(student, teacher, given, options)) <= {"v", "p", "q", "k", "l"}


def test_a_tied_head_learns_only_when_it_is_untied() -> None:
    teacher = model_of(TIED)
    student = teacher.clone()
    value = student.graph.initializers["v"]
    value.const_value = oir.tensor(value.const_value.numpy() * -1, name="v")
    given = [Sample("s", {"ids": np.random.default_rng(0).integers(0, 9, (32, 6))})]
    options = replace(QUICK, train="last", rate=1e-2)
    assert check(student, heal(student, teacher, given, options)) <= {"w", "v"}
    healed = heal(student, teacher, given, replace(options, untie=True))
    assert healed.improved and set(healed.written) - {"w", "v"} == {"table_head"}
    assert bytes_of(healed.model)["table"] == bytes_of(student)["table"]
    with pytest.raises(InputError, match="tied"):
        heal(model_of(VALUES), model_of(VALUES), [Sample("s", {"x": floats(4, 4)})], replace(options, untie=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "labels"}, "`loss` is `labels`"),
        ({"train": "heads"}, "`train` is `heads`"),
        ({"rate": float("nan")}, "`rate` is nan"),
        ({"batch": 0}, "`batch` is 0"),
        ({"held_out": 1.0}, "share below 1"),
        ({"train": "factors"}, "it has no low-rank pairs"),
        ({"spectral": True}, "no low-rank pairs are trained"),
        ({"frobenius": 1e-3}, "no low-rank pairs are trained"),
        ({"untie": True}, "no head of the model is tied"),
        ({"device": "cuda:99"}, "torch cannot use the device"),
    ],
)  # fmt: skip
def test_bad_options_are_refused(
    vit: oir.Model, short: oir.Model, samples: list[Sample], changes: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        heal(short, vit, samples, replace(QUICK, **changes))  # type: ignore[arg-type]


def test_bad_samples_are_refused(vit: oir.Model, short: oir.Model) -> None:
    for feeds, message in (
        ({"image": floats(1, 1, 8, 8)}, "two samples at least"),
        ({"image": floats(4, 1, 9, 7)}, "torch refuses"),
        ({"picture": floats(4, 1, 8, 8)}, "input `image` is missing"),
    ):
        with pytest.raises(InputError, match=message):
            heal(short, vit, [Sample("s", feeds), Sample("t", feeds)][: 1 + ("image" not in feeds)], QUICK)
    with pytest.raises(InputError, match="no residual blocks"):
        heal(model_of(VALUES), model_of(VALUES), [Sample("s", {"x": floats(4, 4)})], replace(QUICK, train="last"))
    with pytest.raises(InputError, match="has no input `x`"):
        heal(model_of(VALUES), vit, [Sample("s", {"x": floats(4, 4)})], QUICK)
    renamed, broken = short.clone(), short.clone()
    renamed.graph.outputs[0].name = "others"
    for value in broken.graph.initializers.values():
        if value.const_value is not None and value.const_value.dtype == oir.DataType.FLOAT:
            value.const_value = oir.tensor(value.const_value.numpy() * np.float32(np.nan), name=value.name)
    for student, message in ((renamed, "no output in common"), (broken, "not a finite number")):
        with pytest.raises(InputError, match=message):
            heal(student, vit, [Sample("s", {"image": floats(4, 1, 8, 8)})], QUICK)


def test_states_of_renumbered_blocks_come_from_the_blocks_they_were() -> None:
    """Without its second block, the student's caches have the names of the original's first three."""
    teacher = decoding.normal("llama-kv-dynp")
    student = decoding.removed(teacher, "1")
    random = np.random.default_rng(0)
    feeds = {"input_ids": random.integers(0, 99, (1, 4)), "attention_mask": np.ones((1, 7), np.int64)}
    feeds["position_ids"] = np.arange(3, 7)[None]
    for value in teacher.graph.inputs:
        if str(value.name) not in feeds:
            feeds[str(value.name)] = random.standard_normal((1, 2, 3, 8)).astype(np.float32)
    ports = {str(v.name): str(v.name) for v in student.graph.inputs}
    ports |= {name: name.replace(".2.", ".3.").replace(".1.", ".2.") for name in ports if "past" in name}
    logits = executor()(teacher).run(feeds)["logits"].astype(float)
    mine = executor()(student).run({name: feeds[origin] for name, origin in ports.items()})["logits"].astype(float)
    one, other = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (logits, mine))
    wanted = (np.exp(one) * (one - other)).sum(-1).mean()
    samples = [Sample(str(i), feeds) for i in range(2)]
    healed = heal(student, teacher, samples, replace(QUICK, steps=1, temperature=1.0))
    assert healed.before == pytest.approx(wanted, rel=1e-4)
