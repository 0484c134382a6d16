"""Gates around attention: what is skipped, that rows and padding change nothing, and that a decision holds."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import onnx
import onnx_ir as oir
import pytest
from block_networks import Encoder, built, exported, torch
from decoding import normal
from golden import parse_graph, prepare
from laws import OrtRunner, check_nothing_unused

from burnish.backends.decoding import loop, speculating
from burnish.backends.decoding.parity import ensure, in_pieces, parity
from burnish.backends.decoding.sharing import Caches
from burnish.ir.edit import name_nodes, separate_names
from burnish.ir.errors import BudgetError, InputError
from burnish.ir.inference import Inference
from burnish.ir.samples import Sample
from burnish.ir.walk import walk
from burnish.passes import catalog, gates, lossy
from burnish.passes.base import Outcome
from burnish.passes.depth_blocks import blocks_of
from burnish.passes.gates import Padding, Place, Router
from burnish.passes.judging import Judged
from burnish.passes.lossy import LossyPass
from burnish.passes.measure_choice import measure
from burnish.passes.pipeline import Pipeline
from burnish.passes.protocols import Runner, Verdict
from burnish.passes.recipes import NORMAL_FORM
from burnish.tools.decoders import open_decoder
from burnish.tools.lossy import Lossy
from burnish.tools.lossy_context import context_for
from burnish.tools.observe import keeps_of

IDS = np.random.default_rng(1).integers(1, 11, (4, 6))
MASK = np.array([[1] * 6, [1] * 4 + [0] * 2, [1] * 5 + [0], [1] * 6])
DECODERS = [
    *("llama-kv-dynp", "llama-kv-op23"),
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("llama-kv-ts", "llama-kv-eager", "qwen-dynp", "gemma-kv-dynp")
    ),
]

Choice = Callable[[Place, int], Router]


def always(place: Place, index: int) -> Router:
    return Router(np.zeros(place.features), 1.0)


def never(place: Place, index: int) -> Router:
    return Router(np.zeros(place.features), -1.0)


def by_lot(seed: int) -> Choice:
    random = np.random.default_rng(seed)
    return lambda place, index: Router(10 * random.normal(size=place.features), 0.0)


def encoder(form: str) -> oir.Model:
    axes = {name: {0: "batch", 1: "seq"} for name in ("ids", "mask", "y")}
    example = torch.from_numpy(IDS), torch.from_numpy(MASK)
    model = exported(built(Encoder(form, layers=3)), example, ["ids", "mask"], ["y"], axes)
    model = Pipeline(NORMAL_FORM).rewrite(model).model
    name_nodes(model)
    return model


def gated(model: oir.Model, choose: Choice) -> oir.Model:
    """A copy with a gate at every attention."""
    after = model.clone()
    name_nodes(after)
    facts = Inference(after)
    places = [gates.place_of(after, block, facts) for block in blocks_of(after).blocks]
    assert all(isinstance(one, Place) for one in places), places
    for index, one in enumerate(one for one in places if isinstance(one, Place)):
        padding = gates.padding_of(keeps_of(after, {"stream": (one.stream, -1)})["stream"])
        assert not isinstance(padding, str)
        gates.write(after, one, facts, choose(one, index), padding)
    separate_names(after)
    onnx.checker.check_model(oir.to_proto(after), full_check=True)
    check_nothing_unused(model, after)
    return after


def dropped(model: oir.Model) -> oir.Model:
    """A copy without any attention."""
    after = model.clone()
    count = len(blocks_of(model).blocks)
    (one,) = catalog.parse(f"drop-attention{{blocks={'+'.join(map(str, range(count)))}}}")
    one.rewrite(after, Outcome("drop-attention"))
    return after


@pytest.mark.parametrize("form", ["pre", "post"])
def test_open_gates_change_nothing_and_closed_ones_are_dropped_attention(form: str) -> None:
    model, feeds = encoder(form), {"ids": IDS, "mask": MASK}
    for choose, wanted in ((always, model), (never, dropped(model))):
        found = OrtRunner(gated(model, choose), optimize=False).run(feeds)["y"]
        assert np.array_equal(found, OrtRunner(wanted, optimize=False).run(feeds)["y"])


@pytest.mark.parametrize("form", ["pre", "post"])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_row_depends_on_others_or_on_padding(form: str, seed: int) -> None:
    model = encoder(form)
    runner, whole = OrtRunner(gated(model, by_lot(seed)), optimize=True), OrtRunner(model, optimize=True)
    together = runner.run({"ids": IDS, "mask": MASK})["y"]
    changed = np.abs(together - whole.run({"ids": IDS, "mask": MASK})["y"]).max((1, 2)) > 1e-3
    other = np.where(MASK == 1, IDS, 3)
    for row, kept in enumerate(MASK.sum(1)):
        alone = runner.run({"ids": IDS[row : row + 1], "mask": MASK[row : row + 1]})["y"]
        assert np.allclose(alone[0], together[row], atol=1e-5)
        short = runner.run({"ids": other[row : row + 1, :kept], "mask": MASK[row : row + 1, :kept]})["y"]
        assert np.allclose(short[0], together[row, :kept], atol=1e-5)
    assert changed.any()


@pytest.mark.parametrize("name", DECODERS)
def test_a_decision_made_with_a_prompt_holds_while_decoding(name: str) -> None:
    model, random = normal(name), np.random.default_rng(0)
    ids, mask = random.integers(1, 60, (2, 9)), np.ones((2, 9), np.int64)
    padded = mask.copy()
    padded[1, :3] = 0
    plain, opened = open_decoder(model), open_decoder(gated(model, always))
    whole = in_pieces(plain, ids, [], padded == 1)
    near = 1e-4 * np.abs(whole).max()
    assert np.array_equal(in_pieces(opened, ids, [], padded == 1), whole)
    assert np.abs(in_pieces(opened, ids, [1, 4, 5], padded == 1) - whole).max() <= near
    one = open_decoder(gated(model, by_lot(0)))
    for cut in (2, 5):
        held = in_pieces(one, ids, [cut])
        assert np.abs(held - in_pieces(one, ids, list(range(cut, 9)))).max() <= near
        for row in range(2):
            assert np.abs(in_pieces(one, ids[row : row + 1], [cut, 7])[0] - held[row]).max() <= near
    assert np.abs(held - whole)[0].max() > near
    for decoder in (plain, opened, one):
        decoder.engine.close()


def test_generate_gives_each_prompt_what_it_gives_alone() -> None:
    model = gated(normal("llama-kv-dynp"), by_lot(3))
    decoder = open_decoder(model)
    assert decoder.ports.decides and decoder.mixes and parity(decoder).relative <= 1e-4
    ensure(decoder)
    random = np.random.default_rng(1)
    asks = [loop.Ask(tuple(random.integers(1, 400, size).tolist()), 6) for size in (9, 2, 5)]
    answers = [one.ids for one in loop.generate(decoder, asks)[0]]
    assert answers == [loop.generate(decoder, [ask])[0][0].ids for ask in asks]
    drafted, figures = speculating.generate(decoder, asks[:1], draft=decoder, tokens=3)
    assert drafted[0].ids == answers[0] and figures.accepted
    with pytest.raises(InputError, match="decides as a whole"):
        Caches(decoder)
    with pytest.raises(InputError, match="decides by the prompt"):
        speculating.check(decoder, decoder, calibrate=True)
    decoder.close()


def test_a_model_without_gates_decides_nothing() -> None:
    assert not gates.decides(normal("llama-kv-dynp")) and not gates.decides(gated(encoder("pre"), always))


def test_skipped_rows_keep_the_sign_that_they_are_skipped_and_no_row_sees_it() -> None:
    model = gated(normal("llama-kv-dynp"), never)
    feeds = {"input_ids": np.full((2, 3), 5), "attention_mask": np.ones((2, 3), np.int64)}
    feeds["position_ids"] = np.arange(3)[None].repeat(2, 0)
    past = {str(v.name): np.zeros((2, 2, 0, 8), np.float32) for v in model.graph.inputs if str(v.name) not in feeds}
    found = OrtRunner(model, optimize=False).run({**feeds, **past})
    for name, array in found.items():
        if name.endswith("key"):
            assert (array == gates.SKIPPED).all() and array.shape == (2, 2, 3, 8)
        elif name.endswith("value"):
            assert not array.any()


def proposed(model: oir.Model, feeds: dict[str, np.ndarray], spec: str) -> tuple[LossyPass, list[lossy.Edit], Outcome]:
    (one,) = catalog.parse(spec)
    assert isinstance(one, LossyPass)
    outcome = Outcome(one.pass_name())
    return one, one.propose(model, context_for(model, [Sample("s", feeds)]), outcome), outcome


def test_learned_routers_meet_the_share_and_come_out_the_same_twice() -> None:
    model, random = encoder("pre"), np.random.default_rng(0)
    feeds = {"ids": random.integers(1, 11, (24, 6)), "mask": np.ones((24, 6), np.int64)}
    one, edits, _ = proposed(model, feeds, "gate-attention{skip=0.5,rounds=2,steps=2}")
    _, again, _ = proposed(model, feeds, "gate-attention{skip=0.5,rounds=2,steps=2}")
    assert [edit.key for edit in edits] == [edit.key for edit in again]
    assert edits
    for first, second in zip(edits, again, strict=True):
        assert all(np.array_equal(array, second.payload[name]) for name, array in first.payload.items())
    after, _ = lossy.apply(model, edits, [one])
    found, whole = (OrtRunner(each, optimize=True).run(feeds)["y"] for each in (after, model))
    assert not np.allclose(found, whole)


def test_the_static_form_drops_and_adds_nothing() -> None:
    model, random = encoder("pre"), np.random.default_rng(0)
    feeds = {"ids": random.integers(1, 11, (32, 6)), "mask": np.ones((32, 6), np.int64)}
    one, edits, outcome = proposed(model, feeds, "gate-attention{skip=0.9,form=static}")
    assert edits and all(edit.option == "drop its attention" and not edit.payload for edit in edits)
    after, _ = lossy.apply(model, edits, [one])
    assert not any(node.op_type == "If" for node in after.graph)
    assert len(edits) + len(outcome.skipped) == 3


def test_caches_that_an_operator_keeps_are_refused() -> None:
    model = normal("genai-llama").clone()
    name_nodes(model)
    reason = gates.place_of(model, blocks_of(model).blocks[0], Inference(model))
    assert isinstance(reason, str) and "its cache is kept by GroupQueryAttention" in reason


def test_a_decoder_whose_layers_share_keys_has_gates_at_neither_of_them() -> None:
    model = normal("llama-kv-dynp").clone()
    (one,) = catalog.parse("share-kv{map=2:1}")
    one.rewrite(model, Outcome("share-kv"))
    reasons = [gates.place_of(model, block, Inference(model)) for block in blocks_of(model).blocks]
    assert isinstance(reasons[0], Place) and isinstance(reasons[3], Place)
    assert "reads its cache" in str(reasons[1])
    assert "not the cache of its attention alone" in str(reasons[2])


def test_a_batch_of_one_is_decided_as_well() -> None:
    source = """<opset_import: ["": 17]>
    g (float[1, S, 4] x) => (float[1, S, 4] y) <float[4, 4] q, float[4, 4] k, float[4, 4] v, float[4, 4] o> {
      query = MatMul (x, q)  key = MatMul (x, k)  value = MatMul (x, v)
      turned = Transpose <perm = [0, 2, 1]> (key)  scores = MatMul (query, turned)  p = Softmax (scores)
      w = MatMul (p, value)  m = MatMul (w, o)  y = Add (x, m)
    }"""
    model = prepare(parse_graph(source), catalog.make("gate-attention"))
    feeds = {"x": np.random.default_rng(0).normal(size=(1, 5, 4)).astype(np.float32)}
    for choose, wanted in ((always, OrtRunner(model, optimize=False).run(feeds)["y"]), (never, feeds["x"])):
        after = gated(model, choose)
        assert not any(node.op_type == "Where" for node in walk(after))
        assert np.array_equal(OrtRunner(after, optimize=False).run(feeds)["y"], wanted)


@pytest.mark.parametrize("guard", [("latency", "size"), ()])
def test_what_is_slower_row_by_row_is_not_written_unless_asked_for(guard: tuple[str, ...]) -> None:
    model, random = encoder("pre"), np.random.default_rng(0)
    feeds = {"ids": random.integers(1, 11, (6, 6)), "mask": np.ones((6, 6), np.int64)}
    samples = [Sample("s", feeds)]
    passes = [one for one in catalog.parse("gate-attention") if isinstance(one, LossyPass)]
    context = context_for(model, samples)
    judged = Judged(model, samples, measure("divergence", model, keeps=context.keeps).measure, context.execute, passes)
    edit = lossy.Edit("gate-attention", "block 0", "skip it", frozenset(), lossy.Savings())
    found = Lossy(model, None, [], edits=[edit], judged=judged)  # type: ignore[arg-type]
    timed: list[int] = []

    class Counting:
        def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            timed.append(len(feeds["ids"]))
            return {"y": np.zeros((len(feeds["ids"]), 6, 16), np.float32)}

        def close(self) -> None:
            pass

    def clock(first: Runner, second: Runner, feeds: dict[str, np.ndarray]) -> Verdict:
        second.run(feeds)
        return Verdict(1.5, 1.4, 1.6, True, False, 3)

    runner = OrtRunner(model, optimize=False)
    with pytest.raises(BudgetError, match="on 6 rows, one after the other") if guard else nullcontext():
        found.measure_written(runner, model, clock, lambda _: nullcontext(Counting()), guard)  # type: ignore[arg-type, return-value]
    assert found.latency is not None and found.timed == "6 rows, one after the other"


def test_a_gate_is_not_put_around_a_gate() -> None:
    after = gated(encoder("pre"), always)
    facts = Inference(after)
    for block in blocks_of(after).blocks:
        assert not isinstance(gates.place_of(after, block, facts), Place)


@pytest.mark.parametrize("options", ["skip=0", "skip=1", "skip=-0.2", "steps=-1", "rate=0", "rounds=0", "skip=nan"])
def test_options_that_mean_nothing_are_refused(options: str) -> None:
    with pytest.raises(InputError):
        catalog.parse(f"gate-attention{{{options}}}")


def test_without_torch_routers_are_refused() -> None:
    model = encoder("pre")
    samples = [Sample("s", {"ids": IDS, "mask": MASK})]
    context = context_for(model, samples)
    without = lossy.Context(samples, context.execute, context.observe, context.keeps)
    with pytest.raises(InputError, match="learned in torch"):
        catalog.make("gate-attention").propose(model, without, Outcome("gate-attention"))  # type: ignore[attr-defined]


def test_a_padding_mask_of_another_layout_is_refused() -> None:
    assert gates.padding_of(None) is None
    assert "cannot be told" in str(gates.padding_of("several masks fit"))
    from burnish.passes.sites import Keep

    assert "not [batch, tokens]" in str(gates.padding_of(Keep("mask", (1,))))
    assert gates.padding_of(Keep("mask", (0, 1), tail=True)) == Padding("mask", tail=True)
