"""Healing by features: which block of the student answers for which of the original."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as oir
import pytest
from fx_checks import floats, model_of
from healing_checks import QUICK, VALUES, check, without

from burnish.backends.fx.healing import heal
from burnish.backends.fx.healing_features import counterparts, taps
from burnish.ir.errors import InputError
from burnish.ir.samples import Sample
from burnish.ir.views import blocks


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


def test_filters_of_equal_models_find_nothing_to_learn(vit: oir.Model, samples: list[Sample]) -> None:
    """With the identity as filter and the student equal to the original, the features add nothing."""
    same = heal(vit, vit, samples, replace(QUICK, steps=2, features=1.0))
    assert same.before == 0 and not same.improved and same.history[0][1] < 1e-9
