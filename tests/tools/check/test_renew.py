"""A renewed lock takes over what changed and leaves alone what is within tolerance."""

from __future__ import annotations

import msgspec
import onnx
import onnx_ir as oir

from burnish.passes.budget import Amount
from burnish.tools.check.check import check
from burnish.tools.check.difference import Field
from burnish.tools.check.lock import LatencyLock, Lock, MetricLock
from burnish.tools.check.renew import accepted, renewed
from burnish.tools.check.take import Request, take
from burnish.tools.check.tolerances import Tolerances, Word

BODY = """
<ir_version: 10, opset_import: ["": 20]>
g (float[N,4] x) => (float[N,4] y)
<float[4,4] w = {1,2,3,4, 0,1,0,1, 2,0,2,0, 1,1,1,2}>
{ [linear] a = MatMul (x, w)  [act] y = Relu (a) }
"""


def model(text: str = BODY) -> oir.Model:
    """A model of ONNX text."""
    return oir.serde.deserialize_model(onnx.parser.parse_model(text))


def moved(lock: Lock, by: float) -> Lock:
    """The lock as another machine would write it: what the model computes differs a little, and burnish is newer."""
    replace, values = msgspec.structs.replace, []
    for sample in lock.values:
        outputs = {
            name: replace(one, mean=one.mean * (1 + by), sketch=tuple(number * (1 + by) for number in one.sketch))
            for name, one in sample.outputs.items()
        }
        values.append(replace(sample, outputs=outputs))
    return msgspec.structs.replace(lock, values=values, made_with="99.0")


def test_rounding_leaves_the_lock_as_it_is() -> None:
    lock = take(model())
    assert renewed(lock, moved(lock, 1e-6)) == lock


def test_movement_within_tolerance_leaves_the_figures_and_more_does_not() -> None:
    lock = take(model())
    allowed = Tolerances({Field.VALUES: Amount(1e-2, False)})
    assert renewed(lock, moved(lock, 1e-3), allowed).values == lock.values
    new = moved(lock, 1e-3)
    assert renewed(lock, new) == new


def test_other_models_are_taken_over() -> None:
    lock = take(model())
    report = check(model(BODY.replace("Relu", "Tanh")), lock, lock_name="model.lock.yaml")
    assert report.new == take(model(BODY.replace("Relu", "Tanh")), known=lock)
    assert accepted(report) == ["Relu is now Tanh"]
    again = check(model(BODY.replace("Relu", "Tanh")), report.new)
    assert again.differences == () and again.passed


def test_what_was_not_measured_stays_while_the_model_is_the_same() -> None:
    lock = take(model())
    latency = LatencyLock(ratio=0.1, low=0.09, high=0.11, sample="a", reference="b")
    full = msgspec.structs.replace(
        lock, latency=latency, metric=MetricLock(name="accuracy", value=0.9, higher_is_better=True)
    )
    bare = take(model(), Request(run=False), full)
    assert renewed(full, bare) == full
    other = renewed(full, take(model(BODY.replace("Relu", "Tanh")), Request(run=False), full))
    assert (other.latency, other.metric, other.samples, other.values) == (None, None, None, [])


def test_figures_that_differ_by_chance_stay() -> None:
    lock = msgspec.structs.replace(
        take(model()), latency=LatencyLock(ratio=0.1, low=0.09, high=0.11, sample="a", reference="b")
    )
    near = msgspec.structs.replace(
        lock, latency=LatencyLock(ratio=0.105, low=0.1, high=0.12, sample="a", reference="b")
    )
    far = msgspec.structs.replace(lock, latency=LatencyLock(ratio=0.3, low=0.29, high=0.31, sample="a", reference="b"))
    assert renewed(lock, near) == lock
    assert renewed(lock, far).latency == far.latency


def test_accepted_tells_what_was_tolerated_as_well() -> None:
    lock = take(model())
    new = BODY.replace("{1,2,3,4, 0", "{1.001,2,3,4, 0")
    report = check(model(new), lock, None, Tolerances({Field.WEIGHTS: Word.IGNORE, Field.VALUES: Word.IGNORE}))
    assert report.passed
    first, second = accepted(report)
    assert first.startswith("the weights of MatMul `linear`") and second.startswith("output `y` moved by about")


def test_another_order_of_outputs_is_taken_over() -> None:
    graph = "g (float[2] x) => (float[2] y, float[2] z) { y = Relu (x) z = Relu (x) }"
    text = f'<ir_version: 10, opset_import: ["": 20]> {graph}'
    lock, other = take(model(text)), model(text.replace("float[2] y, float[2] z", "float[2] z, float[2] y"))
    report = check(other, lock)
    assert not report.passed
    assert check(other, report.new).passed
