"""`optimize` with the recipes that rotate: what they write, what they say of it, and what they refuse."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx_ir as oir
import pytest
from small_llama import WORDS, decoder

import burnish
from burnish.ir.errors import UnchangedError
from burnish.tools import cli, report

pytest.importorskip("torch")
DEMO = Path(__file__).resolve().parents[2] / "tools" / "demo"
QUICK = "learn-rotations{steps=4;starts=2}"

pytestmark = pytest.mark.usefixtures("own_cache")


def texts(tmp_path: Path, count: int = 12) -> Path:
    np.savez(tmp_path / "texts.npz", ids=np.random.default_rng(0).integers(0, WORDS, (count, 1, 16)))
    return tmp_path / "texts.npz"


def saved(tmp_path: Path) -> Path:
    oir.save(decoder(), tmp_path / "decoder.onnx")
    return tmp_path / "decoder.onnx"


def post_norm(tmp_path: Path) -> Path:
    """A stream whose sums are normed, as in BERT."""
    import onnx
    from golden import parse_graph

    source = """g (int64[N, S] ids) => (float[N, S, 61] y)
        <float[61, 32] table, float[32] g1, float[32, 48] up, float[48, 32] down, float[32, 61] head> {
          x = Gather (table, ids)  a = MatMul (x, up)  h = Relu (a)  d = MatMul (h, down)  r = Add (x, d)
          n = LayerNormalization (r, g1)  b = MatMul (n, up)  i = Relu (b)  e = MatMul (i, down)  s = Add (n, e)
          m = LayerNormalization (s, g1)  y = MatMul (m, head) }"""
    onnx.save(parse_graph(source), tmp_path / "post.onnx")
    return tmp_path / "post.onnx"


def test_four_bits_behind_a_rotation_are_written_and_lose_little(tmp_path: Path) -> None:
    given = {"recipe": "ostquant-w4", "data": texts(tmp_path), "guard": ["size"]}
    result = burnish.optimize(saved(tmp_path), tmp_path / "out.onnx", **given)  # type: ignore[arg-type]
    steps = {step.outcome.name: step.outcome.rewritten for step in result.steps}
    assert steps["rotate-residual"] and steps["quantize-weights"]
    assert "MatMulNBits" in {node.op_type for node in result.model.graph}
    assert result.model.metadata_props["burnish.rotated"]
    told = report.as_dict(result)["lossy"]
    assert {edit["kernel"] for edit in told["edits"]} >= {"MatMulNBits"}
    assert told["samples"]["observed"] and told["samples"]["seconds_each"] > 0


def test_few_bits_everywhere_are_simulated_and_said_to_be(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.onnx"
    words = ["optimize", saved(tmp_path), "-o", out, "--recipe", "ostquant-w4a4kv4", "--data", texts(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*map(str, words), "--report", str(tmp_path / "out.json")])
    with pytest.raises(SystemExit) as stopped:
        cli.optimize_main()
    said = capsys.readouterr().out
    assert not stopped.value.code and "simulated: W4A4KV4" in said
    written = oir.load(out)
    assert written.metadata_props["burnish.simulated"].startswith("W4A4KV4")
    assert written.metadata_props["burnish.rotated"].startswith("learned")
    edits = json.loads((tmp_path / "out.json").read_text())["lossy"]["edits"]
    assert [edit["option"] for edit in edits] == ["W4A4KV4, simulated in floating point"]
    assert not list(own_cache.glob("rotations/*/*")), "checkpoints go when the model is written"


def test_a_vision_transformer_takes_few_bits(tmp_path: Path) -> None:
    with np.load(DEMO / "digits.npz") as held:
        np.savez(tmp_path / "digits.npz", image=held["image"][:120], labels=held["label"][:120])
    for passes in (["rotate-residual", "quantize-weights{bits=4;rounding=gptq}"], [QUICK, "simulate-bits"]):
        result = burnish.optimize(
            DEMO / "digits_vit.onnx", tmp_path / "out.onnx", passes=passes, data=tmp_path / "digits.npz", guard=["size"]
        )
        assert report.as_dict(result)["lossy"]["result"]["metric"] > 0.9
        assert result.model.metadata_props["burnish.rotated"]


def test_learned_rotations_alone_change_nothing_that_is_computed(tmp_path: Path) -> None:
    result = burnish.optimize(saved(tmp_path), tmp_path / "out.onnx", passes=[QUICK], data=texts(tmp_path))
    assert sum(step.outcome.rewritten for step in result.steps if step.outcome.name == "learn-rotations") == 1
    assert result.proof.verification is not None and result.model.metadata_props["burnish.rotated"] == "learned, seed 0"


@pytest.mark.parametrize(
    ("recipe", "needed"), [("ostquant-w4", "rotate-residual"), ("ostquant-w4a4kv4", "learn-rotations")]
)
def test_what_cannot_be_rotated_is_refused_with_the_reason(tmp_path: Path, recipe: str, needed: str) -> None:
    data, out = texts(tmp_path), tmp_path / "out.onnx"
    with pytest.raises(UnchangedError, match=rf"`{needed}` was required .*norm") as refused:
        burnish.optimize(post_norm(tmp_path), out, recipe=recipe, data=data)
    assert refused.value.exit_code == 4 and not out.exists()
