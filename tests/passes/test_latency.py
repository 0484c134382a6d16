"""What edits save in seconds: which nodes are timed, that equal ones are timed once, and what becomes of refusals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as oir
import pytest
from golden import name_nodes, parse_graph

from burnish.backends.ort.kernel_times import KernelTimes
from burnish.backends.ort.observe import OrtObserver
from burnish.frontends import onnx_file
from burnish.ir.samples import Sample
from burnish.ir.walk import walk
from burnish.passes import latency, lossy
from burnish.passes.base import Outcome
from burnish.passes.depth.remove_blocks import RemoveBlocks
from burnish.passes.difference import Change, change
from burnish.passes.latency import Work
from burnish.passes.likeness import Likeness
from burnish.passes.lossy import Edit, LossyPass, Savings
from burnish.passes.lowrank.project_rank import ProjectRank
from burnish.passes.pipeline import Pipeline
from burnish.passes.recipes import NORMAL_FORM
from burnish.passes.score_store import Store
from burnish.tools.lossy_context import context_for

DEMO = Path(__file__).resolve().parents[2] / "tools" / "demo"
PASSES = (RemoveBlocks(), ProjectRank(ranks=2, joint=False))


@pytest.fixture(scope="module")
def vit() -> tuple[oir.Model, Sample, list[Edit]]:
    model = Pipeline(NORMAL_FORM).rewrite(onnx_file.read(DEMO / "digits_vit.onnx")).model
    sample = Sample("digits", {"image": np.load(DEMO / "digits.npz")["image"][:16]})
    context = context_for(model, [sample])
    return model, sample, [edit for one in PASSES for edit in one.propose(model, context, Outcome(one.pass_name()))]


def parsed(body: str) -> oir.Model:
    model = oir.from_proto(parse_graph(body))
    name_nodes(model)
    return model


def shown(found: Change) -> tuple[list[str], list[str]]:
    """The operators of the two sides."""
    removed, added = (
        [] if one is None else [node.op_type for node in one.model.graph] for one in (found.removed, found.added)
    )
    return removed, added


def edited(edit: Edit, model: oir.Model) -> oir.Model:
    return lossy.apply(model, [edit], PASSES)[0]


class Counted:
    """A timer by number of nodes, which keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, first: Work, others: Sequence[Work]) -> list[float | str]:
        self.asked.append(1 + len(others))
        return [float(len(one.model.graph)) for one in (first, *others)]


def test_a_copy_differs_in_nothing(vit: tuple[oir.Model, Sample, list[Edit]]) -> None:
    assert change(vit[0], vit[0].clone()) == Change(None, None)


def test_a_removed_block_leaves_nothing_and_a_factored_layer_two_products(
    vit: tuple[oir.Model, Sample, list[Edit]],
) -> None:
    model, _, edits = vit
    block, factored = edits[0], next(edit for edit in edits if "qkv" in edit.site)
    removed, added = shown(change(model, edited(block, model)))
    assert removed.count("Softmax") == 1 and removed.count("MatMul") == 6 and added == []
    removed, added = shown(change(model, edited(factored, model)))
    assert (removed.count("MatMul"), added.count("MatMul")) == (1, 2)


def test_other_numbers_in_a_weight_are_no_difference_and_another_shape_or_size_is() -> None:
    model = parsed("g (float[N, 4] x) => (float[N, M] y) <float[4, 4] w> { h = MatMul (x, w)  y = Relu (h) }")
    same, other = model.clone(), model.clone()
    same.graph.initializers["w"].const_value = oir.tensor(np.zeros((4, 4), np.float32), name="w")
    other.graph.initializers["w"].const_value = oir.tensor(np.zeros((4, 9), np.float32), name="w")
    assert change(model, same) == Change(None, None)
    assert shown(change(model, other)) == (["MatMul"], ["MatMul"])
    moved = parsed("g (float[N, 4] x) => (float[M, 2] y) <int64[2] s = {-1, 2}> { y = Reshape (x, s) }")
    wider = parsed("g (float[N, 4] x) => (float[M, 2] y) <int64[2] s = {-1, 8}> { y = Reshape (x, s) }")
    assert shown(change(moved, wider)) == (["Reshape"], ["Reshape"])


def test_what_a_compiler_writes_into_one_loop_with_a_change_is_on_both_sides() -> None:
    before = parsed(
        """g (float[2, 8] x, float[2, 8] z) => (float[2, 8] y, float[2, 8] u) <float[8, 8] v, float[8, 8] w> {
        c = MatMul (x, v)  d = Relu (c)  e = MatMul (d, w)  f = Add (e, z)  t = Tanh (f)  y = MatMul (t, v)
        u = Neg (z) }"""
    )
    after = before.clone()
    _, middle, _ = walk(after, "MatMul")
    factored(after, middle, *(oir.tensor(np.ones(shape, np.float32)) for shape in ((8, 3), (3, 8))))
    assert shown(change(before, after)) == (["MatMul"], ["MatMul", "MatMul"])
    removed, added = shown(change(before, after, fused=True))
    assert removed == ["MatMul", "Relu", "MatMul", "Add", "Tanh"]
    assert added == ["MatMul", "Relu", "MatMul", "MatMul", "Add", "Tanh"]


def test_what_changes_in_a_branch_is_timed_as_the_whole_if() -> None:
    source = """g (float[N, 4] x, bool c) => (float[N, 4] y) {
      y = If (c) <
        then_branch = t () => (float[N, 4] a) { a = Relu (x) },
        else_branch = e () => (float[N, 4] b) { b = OPERATOR (x) }
      >
    }"""
    found = change(parsed(source.replace("OPERATOR", "Neg")), parsed(source.replace("OPERATOR", "Exp")))
    assert shown(found) == (["If"], ["If"])
    assert found.removed is not None and set(found.removed.sources) == {"x", "c"}


def test_equal_blocks_and_equal_layers_are_asked_for_once(vit: tuple[oir.Model, Sample, list[Edit]]) -> None:
    model, sample, edits = vit
    timer = Counted()
    found = latency.timed(model, edits, PASSES, timer, OrtObserver(model), sample.feeds)
    assert found.reasons == {} and [edit.key for edit in found.edits] == [edit.key for edit in edits]
    assert len({edit.savings.seconds for edit in found.edits if edit.spec == "remove-blocks"}) == 1
    blocks = [edit for edit in edits if edit.spec == "remove-blocks"]
    assert len(blocks) == 3 and timer.asked.count(1) == 1
    assert sum(timer.asked) < len(edits)
    assert {edit.key for edit in latency.faster(found)} == {edit.key for edit in blocks}


def test_of_like_edits_one_is_looked_at_and_all_save_what_each_would(
    vit: tuple[oir.Model, Sample, list[Edit]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sample, edits = vit
    found = latency.timed(model, edits, PASSES, Counted(), OrtObserver(model), sample.feeds)
    monkeypatch.setattr(Likeness, "of", lambda self, edit: edit.key)
    each = latency.timed(model, edits, PASSES, Counted(), OrtObserver(model), sample.feeds)
    assert found == replace(each, edits=found.edits)
    assert [edit.savings for edit in found.edits] == [edit.savings for edit in each.edits]


def test_an_edit_with_cases_saves_what_its_cases_save_by_their_shares(
    vit: tuple[oir.Model, Sample, list[Edit]],
) -> None:
    model, sample, edits = vit
    wide = next(edit for edit in edits if edit.payload)
    alone = latency.timed(model, [wide], PASSES, Counted(), OrtObserver(model), sample.feeds)
    both = replace(wide, cases=((0.25, wide.payload), (0.75, wide.payload)))
    found = latency.timed(model, [both], PASSES, Counted(), OrtObserver(model), sample.feeds)
    assert list(found.parts) == [wide.key] and found.parts[wide.key] == alone.parts[wide.key]

    def refuse(first: Work, others: Sequence[Work]) -> list[float | str]:
        return ["no such kernel"] * (1 + len(others))

    refusing = latency.timed(model, [both], PASSES, refuse, OrtObserver(model), sample.feeds)
    assert refusing.reasons == {wide.key: "no such kernel"} and refusing.edits[0].savings.seconds is None


def test_cases_are_looked_at_one_by_one_whose_numbers_differ(
    vit: tuple[oir.Model, Sample, list[Edit]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sample, edits = vit
    wide = next(edit for edit in edits if edit.payload)
    some = [wide, replace(wide, site=f"{wide.site}, again")]
    assert Likeness(model).of(some[0]) == Likeness(model).of(some[1])
    shares = [(one, {name: factor * array for name, array in one.payload.items()}) for one in some for factor in (0, 1)]
    both = [replace(one, cases=tuple((0.5, made) for owner, made in shares if owner is one)) for one in some]
    made: list[str] = []
    apply = lossy.apply

    def counted(model: oir.Model, edits: Sequence[Edit], passes: Sequence[LossyPass]) -> tuple[oir.Model, object]:
        made.extend(edit.key for edit in edits)
        return apply(model, edits, passes)

    monkeypatch.setattr(lossy, "apply", counted)
    latency.timed(model, both, PASSES, Counted(), OrtObserver(model), sample.feeds)
    assert len(set(made)) == 4


def test_differences_within_the_noise_count_as_none() -> None:
    model = parsed("g (float[N, 4] x) => (float[N, 4] y) { h = Neg (x)  y = Relu (h) }")
    after = parsed("g (float[N, 4] x) => (float[N, 4] y) { h = Abs (x)  y = Relu (h) }")
    assert change(model, after).removed is not None
    for times, saved in (((1.0, 0.98), 0.0), ((1.0, 0.9), pytest.approx(0.1)), ((1.0, 1.2), pytest.approx(-0.2))):
        found = seconds_of(model, after, lambda first, others, times=times: list(times))
        assert found.edits[0].savings.seconds == saved


def seconds_of(
    model: oir.Model, after: oir.Model, timer: latency.Timer, feeds: dict[str, np.ndarray] | None = None
) -> latency.Timed:
    """What replacing one model by another saves."""

    class Replaces(RemoveBlocks):
        @classmethod
        def pass_name(cls) -> str:
            return "remove-blocks"

        def apply(self, model: oir.Model, edits: Sequence[Edit], outcome: Outcome) -> None:
            model.graph = after.clone().graph

    edit = Edit("remove-blocks", "block 0", "drop", frozenset(), Savings())
    given = {"x": np.ones((2, 4), np.float32)} if feeds is None else feeds
    return latency.timed(model, [edit], [Replaces()], timer, OrtObserver(model), given)


def test_what_cannot_be_timed_has_no_seconds_and_a_reason(vit: tuple[oir.Model, Sample, list[Edit]]) -> None:
    model, sample, edits = vit
    refusing = latency.timed(model, edits[:2], PASSES, lambda *_: ["no such kernel"], OrtObserver(model), sample.feeds)
    assert set(refusing.reasons.values()) == {"no such kernel"}
    assert [edit.savings.seconds for edit in refusing.edits] == [None, None] and latency.faster(refusing) == []
    before = parsed("g (float[N, 4] x) => (float[N, 4] y) { h = Neg (x)  y = Relu (h) }")
    beside = parsed("g (float[N, 4] x, float[N, 4] z) => (float[N, 4] y) { h = Add (x, z)  y = Relu (h) }")
    found = seconds_of(before, beside, KernelTimes(seconds=0.01))
    assert list(found.reasons.values()) == ["it cannot be timed: `z`, which it reads, is not in the model before"]
    short = seconds_of(
        before, parsed("g (float[N, 4] x) => (float[N, 4] y) { h = Abs (x)  y = Relu (h) }"), Counted(), {}
    )
    assert list(short.reasons.values()) == ["it cannot be timed: the model's input `x`, which it reads, is not given"]


def test_integers_are_fed_as_they_were_seen() -> None:
    """The rows that are gathered must be there; the part reads them from a node that stays."""
    source = """g (float[N, 2] x) => (float[N, 4] y) <float[3, 4] w> {
      i = ArgMax <axis = 1, keepdims = 0> (x)  h = Gather (w, i)  y = OPERATOR (h)
    }"""
    before, after = (
        parsed(source.replace("OPERATOR", "Neg")),
        parsed(source.replace("Gather", "Gather <axis = 0>").replace("OPERATOR", "Abs")),
    )
    rows = np.asarray([[0, 1], [1, 0], [0, 1]], np.float32)
    seen: list[dict[str, np.ndarray]] = []

    def timer(first: Work, others: Sequence[Work]) -> list[float | str]:
        seen.extend(dict(one.feeds) for one in (first, *others))
        return [1.0] * (1 + len(others))

    seconds_of(before, after, timer, {"x": rows})
    assert [feeds["in0"].tolist() for feeds in seen] == [[1, 0, 1], [1, 0, 1]]
    assert seconds_of(before, after, KernelTimes(seconds=0.01), {"x": rows}).reasons == {}


def test_real_times_are_kept_and_thin_factors_pay_where_wide_ones_do_not(tmp_path: Path) -> None:
    store = Store(tmp_path / "scores.sqlite")
    model = parsed("g (float[N, 256] x) => (float[N, 256] y) <float[256, 256] w> { h = MatMul (x, w)  y = Relu (h) }")
    feeds = {"x": np.ones((512, 256), np.float32)}
    found = {}
    for rank in (16, 256):
        after = model.clone()
        (node,) = walk(after, "MatMul")
        first, second = (oir.tensor(np.ones(shape, np.float32)) for shape in ((256, rank), (rank, 256)))
        factored(after, node, first, second)
        timer = KernelTimes(store, seconds=0.2)
        (edit,) = seconds_of(model, after, timer, feeds).edits
        found[rank] = edit.savings.seconds
        again = KernelTimes(store, seconds=0.2)
        assert seconds_of(model, after, again, feeds).edits[0].savings.seconds == edit.savings.seconds
        assert (timer.measured, again.measured) == (2, 0)
    assert found[16] is not None and found[256] is not None and found[16] > 0 > found[256]


def factored(model: oir.Model, node: oir.Node, first: oir.Tensor, second: oir.Tensor) -> None:
    from burnish.ir import edit

    values = [edit.add_constant(model, name, tensor.numpy()) for name, tensor in (("a", first), ("b", second))]
    inner = edit.make("MatMul", [node.inputs[0], values[0]], like=node)
    edit.replace_node(node, [inner, edit.make("MatMul", [inner.outputs[0], values[1]], like=node)])
