"""Rotations of whole models: exact in every spelling, refused where the views prove none."""

from __future__ import annotations

import numpy as np
import onnx_ir as oir
import pytest
from block_networks import Encoder, Translator, built, exported, torch
from golden import parse_graph, prepare
from laws import check_laws, rewrite
from small_llama import decoder

from burnish.ir.errors import InputError
from burnish.ir.views.stream import Stream, streams
from burnish.passes import catalog, recipes
from burnish.passes.exact.rotate_residual import RotateResidual
from burnish.passes.pipeline import Pipeline
from burnish.passes.rotation import standing_out


def normal(module, *args, **options) -> oir.Model:
    return Pipeline(recipes.named("normal-form", "onnx", None)).rewrite(exported(built(module), *args, **options)).model


def words(*shape: int) -> torch.Tensor:
    return torch.arange(int(np.prod(shape))).reshape(shape) % 11


IDS = {"ids": {0: "batch", 1: "words"}}


def encoder(form: str) -> oir.Model:
    axes = IDS | {"mask": {0: "batch", 1: "words"}}
    mask = torch.ones(2, 4, dtype=torch.int64)
    return normal(Encoder(form), (words(2, 4), mask), ["ids", "mask"], ["logits"], axes)


@pytest.mark.parametrize("options", ["", "{init=klt;seed=3}", "{init=random}", "{init=klt;values=false}"])
def test_a_pre_norm_model_is_rotated_exactly(options: str) -> None:
    model = encoder("pre")
    (one,) = catalog.parse(f"rotate-residual{options}")
    after, outcome = rewrite(one, model)
    assert outcome.rewritten == (1 if "values" in options else 4)
    check_laws(one, model, after, outcome)


@pytest.mark.parametrize("kind", [oir.DataType.FLOAT16, oir.DataType.DOUBLE])
def test_a_stream_that_is_rounded_on_its_way_is_refused(kind: oir.DataType) -> None:
    source = """g (int64[N, 5] ids) => (float[N, 5, 7] y)
    <float[20, 24] t, float[24] g0, float[24] g1, float[24] g2, float[24, 48] u0, float[48, 24] d0, float[24, 48] u1,
     float[48, 24] d1, float[24, 7] h> {
      x0 = Gather (t, ids)
      n0 = LayerNormalization (x0, g0)
      a0 = MatMul (n0, u0)
      r0 = Gelu (a0)
      b0 = MatMul (r0, d0)
      s0 = Add (x0, b0)
      c0 = Cast <to = KIND> (s0)
      x1 = Cast <to = 1> (c0)
      n1 = LayerNormalization (x1, g1)
      a1 = MatMul (n1, u1)
      r1 = Gelu (a1)
      b1 = MatMul (r1, d1)
      x2 = Add (x1, b1)
      n2 = LayerNormalization (x2, g2)
      y = MatMul (n2, h)
    }""".replace("KIND", str(int(kind)))
    model = prepare(parse_graph(source), RotateResidual())
    after, outcome = rewrite(RotateResidual(), model)
    if kind == oir.DataType.DOUBLE:
        assert outcome.rewritten
        check_laws(RotateResidual(), model, after, outcome)
    else:
        assert [skip.reason.partition(",")[0] for skip in outcome.skipped] == ["it rounds the stream to float16"]


@pytest.mark.parametrize(("form", "reason"), [("sandwich", "the results of 7 norms"), ("post", "post-norm")])
def test_sums_that_are_joined_with_norms_hide_no_other_reason(form: str, reason: str) -> None:
    joins = catalog.parse("fuse-norm{target=ort-cuda},fuse-skip-norm{target=ort-cuda}")
    fused = Pipeline(joins).rewrite(encoder(form)).model
    assert any(node.op_type.startswith("Skip") for node in fused.graph)
    after, outcome = rewrite(RotateResidual(), fused)
    assert not outcome.rewritten
    assert any(reason in skip.reason for skip in outcome.skipped), outcome.skipped


@pytest.mark.parametrize("form", ["parallel", "sandwich", "post"])
def test_other_forms_are_rotated_where_that_is_proven_and_else_refused_with_a_reason(form: str) -> None:
    model = encoder(form)
    after, outcome = rewrite(RotateResidual(), model)
    if form == "parallel":
        check_laws(RotateResidual(), model, after, outcome)
        return
    assert not outcome.rewritten
    (skip,) = outcome.skipped
    if form == "post":
        assert skip.reason == "its result, gain and all, is added to the stream that it norms (post-norm)"
    else:
        assert "the results of 7 norms are added to the stream" in skip.reason
        wide = RotateResidual(matrices=7)
        after, outcome = rewrite(wide, model)
        check_laws(wide, model, after, outcome)


@pytest.mark.parametrize("option", ["seed", "matrices"])
def test_a_negative_number_is_refused(option: str) -> None:
    with pytest.raises(InputError, match=f"`{option}` is -1"):
        catalog.make("rotate-residual", {option: "-1"})


def test_encoder_and_decoder_have_a_stream_each() -> None:
    model = normal(
        Translator(), (words(2, 4), words(2, 3)), ["ids", "target"], ["y"], IDS | {"target": {0: "batch", 1: "more"}}
    )
    found = list(streams(model))
    assert [isinstance(one, Stream) for one in found] == [True, False], "the last norm of the decoder is an output"
    after, outcome = rewrite(RotateResidual(), model)
    check_laws(RotateResidual(), model, after, outcome)


def test_no_channel_stands_out_behind_a_rotation() -> None:
    model = encoder("pre")
    (stream,) = streams(model)
    assert isinstance(stream, Stream) and stream.width == 16 and stream.keeps_ones
    for reader in stream.readers:
        weight = reader.linear.weight().copy()
        weight[:, 3] *= 50
        reader.linear.write(model, weight, reader.linear.bias())
    rows = [np.vstack([one.linear.weight() for one in next(streams(it)).readers]) for it in (
        model, rewrite(RotateResidual(init="klt", values=False), model)[0]
    )]  # fmt: skip
    assert standing_out(rows[0]) > 3.5 and standing_out(rows[1]) < 2


@pytest.mark.parametrize("options", ["", "{online=true}"])
def test_a_decoder_with_rotary_embedding_is_rotated_exactly(options: str) -> None:
    model = decoder()
    (one,) = catalog.parse(f"rotate-residual{options}")
    after, outcome = rewrite(one, model)
    assert outcome.rewritten == (7 if "online" in options else 3)
    check_laws(one, model, after, outcome)
