"""What the engine does when a pass is wrong, slow or greedy: the culprit is named, the regret undone."""

from dataclasses import dataclass

import numpy as np
import onnx.parser
import onnx_ir as oir
import pytest

from burnish.backends.ort.session import executor
from burnish.backends.reference.runner import ReferenceRunner
from burnish.ir import edit
from burnish.ir.errors import InputError
from burnish.ir.samples import Sample
from burnish.ir.walk import walk
from burnish.passes.base import ExactPass, Outcome
from burnish.passes.pipeline import PassFailure, Pipeline
from burnish.passes.protocols import Judge, Verdict
from burnish.passes.prove import Miscompiled, Prover, compare_code
from burnish.passes.recipes import NORMAL_FORM

CHAIN = """
<ir_version: 8, opset_import: ["": 17]>
g (float[N, 4] x) => (float[N, 4] y) {
  [first] a = Abs (x)
  [second] b = Relu (a)
  [third] c = Neg (b)
  [fourth] d = Relu (c)
  [fifth] e = Add (d, x)
  [sixth] f = Relu (e)
  [seventh] y = Tanh (f)
}
"""
SAMPLES = [Sample("both signs", {"x": np.array([[-1.0, 2.0, -3.0, 0.5]], np.float32)})]


def _model() -> oir.Model:
    return oir.from_proto(onnx.parser.parse_model(CHAIN))


def _verdict(slower: bool) -> Verdict:
    return Verdict(2.0 if slower else 1.0, 0.9, 2.1, slower, False, 5)


def _judge(clock=lambda first, second, feeds: _verdict(False)) -> Judge:
    return Judge(executor(), executor(lean=True), executor(level="off"), ReferenceRunner, clock)


@dataclass(frozen=True)
class DropRelu(ExactPass):
    """Remove every Relu: right where the input is not negative, wrong elsewhere."""

    def rewrite(self, model: oir.Model, outcome: Outcome) -> None:
        for node in walk(model, "Relu"):
            if not outcome.take(node):
                return
            edit.bypass(node)


@dataclass(frozen=True)
class Grow(ExactPass):
    """Add a large constant that changes nothing."""

    def rewrite(self, model: oir.Model, outcome: Outcome) -> None:
        node = walk(model, "Tanh")[0]
        if node.inputs[0].producer().op_type == "Add" or not outcome.take(node):
            return
        zeros = edit.add_constant(model, "zeros", np.zeros((2000, 4), np.float32))
        row = edit.make("ReduceSum", [zeros], {"keepdims": 0, "noop_with_empty_axes": 0}, like=node)
        total = edit.make("Add", [node.inputs[0], row.outputs[0]], like=node)
        edit.insert_before(node, [row, total])
        edit.set_input(node, 0, total.outputs[0])


@dataclass(frozen=True)
class Liar(ExactPass):
    """Say that something was rewritten."""

    def rewrite(self, model: oir.Model, outcome: Outcome) -> None:
        outcome.take(walk(model)[0])


def _prover(passes, mode="ends", clock=None, guard=("size",)):
    judge = _judge(clock) if clock is not None else _judge()
    return Prover(Pipeline(passes), _model(), SAMPLES, judge, mode, frozenset(guard))


@pytest.mark.parametrize("mode", ["ends", "each"])
def test_a_wrong_rewrite_is_named_and_cut_out(mode):
    with pytest.raises(Miscompiled) as caught:
        _prover([DropRelu()], mode).run()
    assert caught.value.exit_code == 3
    assert caught.value.node == "fourth", "the second is harmless, the fourth is the first that is wrong"
    small, sample = caught.value.model, caught.value.sample
    assert len(small.graph) < 6
    before = executor()(small).run(sample.feeds)
    after = executor()(Pipeline([DropRelu()]).rewrite(small, limit=1).model).run(sample.feeds)
    assert any(not np.allclose(before[name], after[name]) for name in before)


def test_the_original_is_untouched():
    prover = _prover([DropRelu()])
    count = len(prover.model.graph)
    with pytest.raises(Miscompiled):
        prover.run()
    assert len(prover.model.graph) == count


def test_a_pass_that_enlarges_the_model_is_undone():
    proof = _prover([Grow()]).run()
    assert proof.run.rewritten == 0
    assert "larger" in proof.run.steps[0].undone


def test_growth_is_kept_when_size_is_not_guarded():
    assert _prover([Grow()], guard=()).run().run.rewritten == 1


def test_a_pass_that_slows_the_model_is_found_and_undone():
    def clock(first, second, feeds):
        return _verdict(slower=len(second.run(feeds)) > 0 and clock.slow(second))

    clock.slow = lambda runner: any("zeros" in str(n) for n in [runner.described])
    judge_execute = executor()

    def described(model):
        runner = judge_execute(model)
        runner.described = [str(v.name) for v in model.graph.initializers.values()]
        return runner

    judge = Judge(described, described, executor(level="off"), ReferenceRunner, clock)
    prover = Prover(Pipeline(["lift-constants", Grow()]), _model(), SAMPLES, judge, "ends", frozenset({"latency"}))
    proof = prover.run()
    assert proof.run.rewritten == 0
    assert list(prover.undone) == [proof.run.steps[-1].spec] and "slower" in proof.run.steps[-1].undone


def test_a_pass_that_lies_is_a_failure_of_its_own():
    with pytest.raises(PassFailure, match="text says otherwise"):
        _prover([Liar()], "each").run()


def test_samples_that_the_original_refuses_are_kept_apart():
    wrong = Sample("five columns", {"x": np.zeros((1, 5), np.float32)})
    prover = Prover(Pipeline(["drop-identity"]), _model(), [wrong, *SAMPLES], _judge(), "ends", frozenset())
    assert [name for name, _ in prover.run().verification.refused] == ["five columns"]
    with pytest.raises(InputError, match="refuses all 1 samples"):
        Prover(Pipeline(["drop-identity"]), _model(), [wrong], _judge(), "ends", frozenset()).run()


def test_where_rounding_is_amplified_float64_has_the_last_word():
    """sin(1e6 x) makes noise of rounding: a wrong factor hides in float32's tolerance, and float64 finds it."""

    @dataclass(frozen=True)
    class Nudge(ExactPass):
        """Multiply by slightly more."""

        def rewrite(self, model: oir.Model, outcome: Outcome) -> None:
            node = walk(model, "Mul")[0]
            factor = node.inputs[1]
            if factor.const_value.numpy().item() != 1e6 or not outcome.take(node):
                return
            edit.set_input(node, 1, edit.add_constant(model, "nudged", np.float32(1e6 + 0.0625)[None]))

    text = """
    <ir_version: 8, opset_import: ["": 17]>
    g (float[N, 4] x) => (float[N, 4] y) <float[1] k = {1000000.0}> { a = Mul (x, k)  y = Sin (a) }
    """
    model = oir.from_proto(onnx.parser.parse_model(text))
    exact = executor()
    shaken = {"y": np.full((1, 4), 0.5, np.float32)}

    class Shaken:
        def run(self, feeds):
            return shaken

        def close(self):
            pass

    judge = Judge(exact, exact, lambda model: Shaken(), ReferenceRunner, lambda first, second, feeds: _verdict(False))
    with pytest.raises(Miscompiled, match="float64"):
        Prover(Pipeline([Nudge()]), model, SAMPLES, judge, "ends", frozenset()).run()


def test_steps_that_rounding_decides_are_no_miscompilation_where_only_integers_come_in():
    """Numbers are rounded to the places of 2000, as scores are beside a mask of -10000: another order moves some."""

    @dataclass(frozen=True)
    class Reorder(ExactPass):
        """Add the constants first."""

        def rewrite(self, model: oir.Model, outcome: Outcome) -> None:
            first, second, *_ = walk(model, "Add")
            if first.inputs[1].producer() is not None or not outcome.take(second):
                return
            total = edit.make("Add", [first.inputs[1], second.inputs[1]], like=second)
            edit.insert_before(first, [total])
            edit.set_input(second, 0, first.inputs[0])
            edit.set_input(second, 1, total.outputs[0])
            edit.remove_unused([first])

    text = """
    <ir_version: 8, opset_import: ["": 17]>
    g (int64[N] ids) => (float[N, 256] y)
    <float[1] u = {0.7}, float[1] v = {-0.3}, float[1] low = {-2000.0}, float[1] high = {2000.0},
     float[1, 1] none = {0.0}>
    {
      a = Gather (none, ids)  b = Add (a, u)  c = Add (b, v)  d = Add (c, low)  y = Add (d, high)
    }
    """
    model = oir.from_proto(onnx.parser.parse_model(text))
    table = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
    edit.set_input(walk(model, "Gather")[0], 0, edit.add_constant(model, "table", table))
    samples = [Sample("all rows", {"ids": np.arange(256)})]
    found = Prover(Pipeline([Reorder()]), model, samples, _judge(), "ends", frozenset()).run().verification
    assert found.holds and found.loosened == ["all rows"] and found.replay < 1e-9


def test_parts_in_halves_round_as_halves_whatever_the_dtype_of_the_outputs():
    text = """
    <ir_version: 8, opset_import: ["": 17]>
    g (float[N, 32] x) => (float[N, 16] y) {
      h = Cast <to = 10> (x)  a = MatMul (h, w)  b = Add (a, c)  d = MatMul (b, v)  y = Cast <to = 1> (d)
    }
    """
    model = oir.from_proto(onnx.parser.parse_model(text))
    rng = np.random.default_rng(0)
    for index, name, shape in ((1, "w", (32, 64)), (2, "c", (64,)), (3, "v", (64, 16))):
        weight = edit.add_constant(model, name, rng.standard_normal(shape).astype(np.float16))
        edit.set_input(model.graph[index], 1, weight)
    model = Pipeline(NORMAL_FORM).rewrite(model).model
    samples = [Sample("some", {"x": rng.standard_normal((8, 32)).astype(np.float32)})]
    merged = Prover(Pipeline(["merge-linears"]), model, samples, _judge(), "ends", frozenset()).run()
    assert len(merged.run.model.graph) < len(model.graph)
    assert merged.verification.holds and merged.verification.loosened and merged.verification.replay < 1e-9


def test_another_number_of_elements_after_rounding_allows_no_error_of_elements():
    """Inputs beside a threshold are chosen or not by their last place; those that are chosen have to be right."""
    text = """
    <ir_version: 8, opset_import: ["": 17]>
    g (float[n] x) => (float[m] y) <float[1] one = {1.0}, float[1] two = {TWO}> {
      big = Greater (x, one)  chosen = Compress <axis = 0> (x, big)  y = Mul (chosen, two)
    }
    """
    right, wrong = (oir.from_proto(onnx.parser.parse_model(text.replace("TWO", two))) for two in ("2.0", "2.2"))
    samples = [Sample("two at the threshold", {"x": np.array([1.0, 1.0, 5.0, 7.0], np.float32)})]
    runner = executor()(wrong)
    found, _, _ = compare_code(right, samples, _judge(), runner, timed=False)
    runner.close()
    assert not found.holds
