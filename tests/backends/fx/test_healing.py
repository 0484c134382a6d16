"""Healing: what is trained changes, the rest keeps its bytes; never worse; a killed run ends as one that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import decoding
import numpy as np
import onnx_ir as oir
import pytest
import torch
from fx_checks import bytes_of, floats, model_of, structure

from burnish.backends.fx import healing_factors
from burnish.backends.fx.bridge import bridge_of
from burnish.backends.fx.builder import to_graph_module
from burnish.backends.fx.healing import Healed, HealOptions, Progress, forget, heal
from burnish.backends.fx.healing_features import counterparts, taps
from burnish.backends.fx.healing_graph import size_of, storages
from burnish.backends.fx.healing_memory import Stretches
from burnish.backends.fx.healing_rows import Batches, joined, rows
from burnish.backends.fx.healing_runs import Frozen, Trained, outputs_of
from burnish.backends.fx.healing_weights import trainable
from burnish.backends.ort.session import executor
from burnish.frontends import onnx_file
from burnish.ir.errors import InputError
from burnish.ir.samples import Sample
from burnish.ir.views import block_drop, blocks
from burnish.passes.pipeline import Pipeline
from burnish.passes.recipes import NORMAL_FORM

torch.set_num_threads(1)
DEMO = Path(__file__).resolve().parents[3] / "tools" / "demo"
QUICK = HealOptions(steps=20, batch=16, rate=2e-3, patience=10)


@pytest.fixture(scope="module")
def vit() -> oir.Model:
    return Pipeline(NORMAL_FORM).rewrite(onnx_file.read(DEMO / "digits_vit.onnx")).model


@pytest.fixture(scope="module")
def short(vit: oir.Model) -> oir.Model:
    """The transformer without its second block."""
    return without(vit, 1)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    data = np.load(DEMO / "digits.npz")
    return [Sample("digits", {"image": data["image"][:160]}, data["label"][:160])]


def without(model: oir.Model, *indices: int) -> oir.Model:
    copy = model.clone()
    found = blocks.stacks(copy)
    block_drop.drop(copy, found, [found.blocks[i] for i in indices])
    return copy


def check(student: oir.Model, healed: Healed) -> set[str]:
    """It is better, nothing but weights changed, and exactly those that it says."""
    assert healed.improved and healed.after < healed.before
    assert structure(healed.model) == structure(student)
    old, new = bytes_of(student), bytes_of(healed.model)
    changed = {name for name in new if name not in old or old[name] != new[name]}
    assert changed == set(healed.written)
    return changed


def divergence(student: oir.Model, teacher: oir.Model, samples: list[Sample]) -> float:
    found = []
    for model in (teacher, student):
        logits = np.concatenate([next(iter(executor()(model).run(s.feeds).values())) for s in samples]).astype(float)
        found.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    return float((np.exp(found[0]) * (found[0] - found[1])).sum(-1).mean())


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


def test_the_same_seed_gives_the_same_bytes(vit: oir.Model, short: oir.Model, samples: list[Sample]) -> None:
    one, two, other = (
        bytes_of(heal(short, vit, samples, replace(QUICK, steps=4, seed=seed)).model) for seed in (0, 0, 1)
    )
    assert one == two != other


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


VALUES = """
g (float[N, 4] x) => (float[N, 3] y, float[N, 4] z) <float[4, 8] w, float[8, 3] v, float[4, 4] u> {
    h = MatMul (x, w)  a = Tanh (h)  p = MatMul (a, v)  y = Tanh (p)  q = MatMul (x, u)  z = Sin (q)
}
"""


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


TIED = """
g (int64[N, S] ids) => (float[N, S, 9] y) <float[9, 4] table, float[4, 8] w, float[8, 4] v> {
    x = Gather (table, ids)  h = MatMul (x, w)  a = Tanh (h)  b = MatMul (a, v)  s = Add (x, b)
    t = Transpose <perm = [1, 0]> (table)  y = MatMul (s, t)
}
"""


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


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_healing as t
vit = t.Pipeline(t.NORMAL_FORM).rewrite(t.onnx_file.read(t.DEMO / "digits_vit.onnx")).model
data = t.np.load(t.DEMO / "digits.npz")
samples = [t.Sample("digits", {"image": data["image"][:160]}, data["label"][:160])]
def kill(progress):
    if progress.step == 13:
        os.kill(os.getpid(), signal.SIGKILL)
t.heal(t.without(vit, 1), vit, samples, t.QUICK, kill, folder=Path(sys.argv[1]))
"""


def test_a_killed_run_goes_on_and_ends_as_one_that_was_not(
    vit: oir.Model, short: oir.Model, samples: list[Sample], tmp_path: Path
) -> None:
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests.parents[2] / ".src"), str(tests.parents[1])])}
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(tests)]
    killed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(list(tmp_path.glob("heal-*.pt"))) == 1
    told: list[Progress] = []
    healed = heal(short, vit, samples, QUICK, told.append, folder=tmp_path)
    assert told[0].step == 13 and healed.steps == 20 and len(healed.history) == 10
    assert bytes_of(healed.model) == bytes_of(heal(short, vit, samples, QUICK).model)
    again = heal(short, vit, samples, QUICK, None, folder=tmp_path)
    assert bytes_of(again.model) == bytes_of(healed.model) and again.history == healed.history
    assert healed.checkpoint is not None and list(tmp_path.iterdir()) == [healed.checkpoint]
    healed.checkpoint.with_name(f"{healed.checkpoint.name}.1.partial").touch()
    forget(healed.checkpoint)
    assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_is_as_good_as_none(
    vit: oir.Model, short: oir.Model, samples: list[Sample], tmp_path: Path
) -> None:
    def spoil(progress: Progress) -> None:
        if progress.step == 3:
            raise KeyboardInterrupt

    options = replace(QUICK, steps=4, evaluations=4)
    with pytest.raises(KeyboardInterrupt):
        heal(short, vit, samples, options, spoil, folder=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    assert heal(short, vit, samples, options, folder=tmp_path).steps == 4


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


def test_features_are_matched_and_help(vit: oir.Model, samples: list[Sample]) -> None:
    student = without(vit, 1)
    for options in (replace(QUICK, features=1.0), replace(QUICK, features=1.0, filters=10)):
        healed = heal(student, vit, samples, options)
        check(student, healed)
        assert healed.trained == heal(student, vit, samples, replace(QUICK, steps=1)).trained
    with pytest.raises(InputError, match="filters without features"):
        heal(student, vit, samples, replace(QUICK, filters=10))
    with pytest.raises(InputError, match="no residual blocks"):
        heal(model_of(VALUES), model_of(VALUES), [Sample("s", {"x": floats(4, 4)})], replace(QUICK, features=1.0))


def test_a_block_answers_for_the_removed_ones_behind_it(vit: oir.Model) -> None:
    theirs = blocks.stacks(vit).blocks
    for gone, ends in ((0, [1, 2]), (1, [1, 2]), (2, [0, 2])):
        student = without(vit, gone)
        own = blocks.stacks(student).blocks
        found = taps(own, theirs, counterparts(student, own, vit, theirs))
        assert [tap.teacher for tap in found] == [theirs[end].exit for end in ends]
    moved = without(vit, 0)
    for value in moved.graph.initializers.values():
        if value.const_value is not None and value.const_value.dtype == oir.DataType.FLOAT:
            value.const_value = oir.tensor(value.const_value.numpy() + np.float32(1), name=value.name)
    with pytest.raises(InputError, match="shares no weight"):
        counterparts(moved, blocks.stacks(moved).blocks, vit, theirs)
    moved.metadata_props["burnish.blocks"] = "[1,2]"
    assert counterparts(moved, blocks.stacks(moved).blocks, vit, theirs) == [1, 2]


STAGES = """
g (float[N, 6, 4] x) => (float[N, 6, 3] y)
    <float[4, 8] a1, float[8, 4] b1, float[4, 6] m, float[6, 8] a2, float[8, 6] b2, float[6, 8] a3, float[8, 6] b3,
     float[6, 3] w> {
    h1 = MatMul (x, a1)  r1 = Relu (h1)  p1 = MatMul (r1, b1)  s1 = Add (x, p1)
    t = MatMul (s1, m)  z = Relu (t)
    h2 = MatMul (z, a2)  r2 = Relu (h2)  p2 = MatMul (r2, b2)  s2 = Add (z, p2)
    h3 = MatMul (s2, a3)  r3 = Relu (h3)  p3 = MatMul (r3, b3)  s3 = Add (s2, p3)
    y = MatMul (s3, w)
}
"""


def test_no_block_answers_for_one_of_another_stream() -> None:
    teacher = model_of(STAGES)
    student = without(teacher, 1)
    own, theirs = blocks.stacks(student).blocks, blocks.stacks(teacher).blocks
    found = taps(own, theirs, counterparts(student, own, teacher, theirs))
    assert [str(tap.teacher.name) for tap in found] == ["s1", "s3"]
    given = [Sample("s", {"x": floats(8, 6, 4)})]
    assert heal(student, teacher, given, replace(QUICK, steps=1, features=1.0)).steps == 1
    with pytest.raises(InputError, match="not all on one stream"):
        heal(student, teacher, given, replace(QUICK, features=1.0, filters=1))


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


def test_filters_of_equal_models_find_nothing_to_learn(vit: oir.Model, samples: list[Sample]) -> None:
    """With the identity as filter and the student equal to the original, the features add nothing."""
    same = heal(vit, vit, samples, replace(QUICK, steps=2, features=1.0))
    assert same.before == 0 and not same.improved and same.history[0][1] < 1e-9


def test_activations_within_a_budget_give_the_same_weights(
    vit: oir.Model, short: oir.Model, samples: list[Sample]
) -> None:
    options = replace(QUICK, steps=4)
    free, tight = (
        bytes_of(heal(short, vit, samples, one).model) for one in (options, replace(options, memory=1_500_000))
    )
    assert free == tight
    with pytest.raises(InputError, match="even with every block computed twice"):
        heal(short, vit, samples, replace(options, memory=1000))


def test_stretches_hold_what_they_promise(vit: oir.Model, samples: list[Sample]) -> None:
    module = to_graph_module(vit)
    marks = {bridge_of(module).values[str(block.exit.name)] for block in blocks.stacks(vit).blocks}
    image = torch.from_numpy(samples[0].feeds["image"])
    sizes = []
    for budget in (1 << 40, 14_000_000):
        stretches = Stretches(module, marks)
        expected = stretches.fit([image], budget)
        held: list[torch.Tensor] = []

        def keep(one: torch.Tensor, held: list[torch.Tensor] = held) -> torch.Tensor:
            held.append(one)
            return one

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one):
            (found,) = stretches(image)
        sizes.append(size_of(held, storages(module)))
        torch.testing.assert_close(found, module(image)[0])
        assert sizes[-1] <= expected <= budget
    assert 0 < sizes[1] < 0.6 * sizes[0]


RANKS = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_healing as t
vit = t.Pipeline(t.NORMAL_FORM).rewrite(t.onnx_file.read(t.DEMO / "digits_vit.onnx")).model
data = t.np.load(t.DEMO / "digits.npz")
samples = [t.Sample("digits", {"image": data["image"][:51]}, data["label"][:51])]
options = t.replace(t.QUICK, steps=4, batch=7, loss="both", features=1.0)
healed = t.heal(t.without(vit, 1), vit, samples, options, folder=Path(sys.argv[1]))
if t.os.environ.get("RANK", "0") == "0":
    weights = {name: value.const_value.numpy() for name, value in healed.model.graph.initializers.items()}
    t.np.savez(Path(sys.argv[1]) / f"{t.os.environ.get('WORLD_SIZE', '1')}.npz", **weights)
"""


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    """Batches of seven rows, so that the processes have unequal shares; the last batch has one row for one of them."""
    pytest.importorskip("accelerate")
    tests = Path(__file__).parent
    paths = [str(tests.parents[2] / ".src"), str(tests.parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    (tmp_path / "run.py").write_text(RANKS)
    script = [str(tmp_path / "run.py"), str(tmp_path), str(tests)]
    for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]):
        command = [sys.executable, *launcher, *script]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    one, two = (np.load(tmp_path / f"{world}.npz") for world in (1, 2))
    assert set(one.files) == set(two.files)
    for name in one.files:
        np.testing.assert_allclose(one[name], two[name], atol=2e-5, err_msg=name)


def test_what_is_frozen_before_the_weights_is_computed_once(vit: oir.Model, samples: list[Sample]) -> None:
    module = to_graph_module(vit)
    node = next(node for node in reversed(module.graph.nodes) if node.op == "get_attr")
    wanted = outputs_of(module, ["logits"])
    last = Trained(module, wanted, {str(node.target)}, 1 << 30, {}, {})
    assert len(list(last.behind.graph.nodes)) < 0.2 * len(list(module.graph.nodes))
    (expected,) = module(torch.from_numpy(samples[0].feeds["image"]))
    torch.testing.assert_close(last(samples[0], 0)["logits"], expected)
    other = Sample("other", {"image": samples[0].feeds["image"] * 0})
    torch.testing.assert_close(last(other, 0)["logits"], expected)
    assert not torch.allclose(last(other, 1)["logits"], expected)
    for limit in (0, 1 << 30):
        frozen = Frozen(module, wanted, None, limit, 1)
        torch.testing.assert_close(frozen(samples[0], 0)["logits"], expected)
        assert torch.allclose(frozen(other, 0)["logits"], expected) == bool(limit)


def test_large_outputs_are_computed_again_from_the_last_stream(vit: oir.Model, samples: list[Sample]) -> None:
    module = to_graph_module(vit)
    name = bridge_of(module).values[str(blocks.stacks(vit).blocks[-1].exit.name)]
    end = next(node for node in module.graph.nodes if node.name == name)
    frozen = Frozen(module, outputs_of(module, ["logits"]), end, 1 << 30, 1 << 30)
    (expected,) = module(torch.from_numpy(samples[0].feeds["image"]))
    for _ in range(3):
        torch.testing.assert_close(frozen(samples[0], 0)["logits"], expected)


def test_samples_are_cut_into_rows_and_put_together() -> None:
    model = model_of(TIED)
    texts = [Sample(str(n), {"ids": np.full((2, n), n)}, np.arange(2)) for n in (3, 3, 5)]
    found, joins = rows(texts, model)
    assert joins and [(one.feeds["ids"].shape, one.labels.tolist()) for one in found] == [
        ((1, n), [k]) for n in (3, 3, 5) for k in (0, 1)
    ]
    assert [(one.feeds["ids"].shape, one.labels.tolist()) for one in joined(found)] == [
        ((4, 3), [0, 1, 0, 1]),
        ((2, 5), [0, 1]),
    ]
    whole, joins = rows([replace(texts[0], labels=np.arange(6))], model)
    assert not joins and len(whole) == 1
    fixed = model_of("g (float[2, 4] x) => (float[2, 4] y) { y = Relu (x) }")
    assert not rows([Sample("s", {"x": floats(2, 4)})], fixed)[1]


def test_every_row_is_in_one_batch_and_every_batch_has_its_turn() -> None:
    model = model_of("g (float[N, 1] x) => (float[N, 1] y) { y = Relu (x) }")
    sample = Sample("s", {"x": np.arange(23, dtype=np.float32)[:, None]})
    parts = [Batches([sample], model, 4, 0.2, 7, rank, 3) for rank in range(3)]
    batches = [[one.feeds["x"] for part in parts for batch in (*part.training, *part.held_out) for one in batch]]
    assert sorted(np.concatenate(batches[0])[:, 0]) == list(range(23))
    count = len(parts[0].training)
    assert [sorted(parts[0].at(step) for step in range(start, start + count)) for start in (0, count)] == [
        list(range(count))
    ] * 2
