"""What must hold of a decoder with caches, however its attention is spelled and whatever runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as oir
import pytest

from burnish.backends.decoding.decoder import Decoder
from burnish.backends.decoding.parity import ensure, parity, perplexity
from burnish.backends.decoding.state import State
from burnish.ir.errors import InputError
from burnish.passes import catalog
from burnish.passes.pipeline import Pipeline
from burnish.passes.recipes import NORMAL_FORM
from burnish.tools.decoders import open_decoder
from burnish.tools.research import structures

SLOW = pytest.mark.slow
GROWING = ["llama-kv-dynp", "llama-kv-op23", "llama-kv-dynp-fuse", "gemma-kv-ts-ort", "qwen-dynp", "genai-mha"]
SHARED = ["genai-llama", "genai-window", "genai-qwen"]
REST = ["llama-kv-ts", "llama-kv-eager", "gemma-kv-dynp", "gemma-kv-op23", "qwen-op23", "genai-moe", "a3-smollm2-kv"]


def opened(name: str, runtime: str = "ort") -> Decoder:
    return open_decoder(oir.from_proto(structures.load(name)), runtime=runtime)


@pytest.fixture(params=["llama-kv-dynp", "genai-llama"])
def decoder(request: pytest.FixtureRequest) -> Decoder:
    """One whose caches grow, one whose caches are written in place."""
    return opened(request.param)


def text(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 100, (rows, length))


def near(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, atol=1e-4 * float(np.abs(expected).max()))


@pytest.mark.parametrize("name", [*GROWING, *SHARED, *(pytest.param(one, marks=SLOW) for one in REST)])
def test_a_text_in_pieces_is_the_text_at_once(name: str) -> None:
    decoder = opened(name)
    assert decoder.mixes
    assert decoder.ports.packing == ("start" if name.startswith("genai") and name != "genai-mha" else "end")
    found = parity(decoder)
    assert found.relative < 1e-4, found


@pytest.mark.parametrize("name", ["llama-kv-op23", "genai-llama"])
def test_another_runtime_decodes_as_well(name: str) -> None:
    found = parity(opened(name, "fx"))
    assert found.relative < 1e-4, found
    ids = text(1, 9)
    near(opened(name, "fx").start().feed(ids), opened(name).start().feed(ids))


def test_a_table_in_few_bits_says_how_many_tokens_there_are() -> None:
    model = oir.from_proto(structures.load("llama-kv-dynp"))
    quantized = Pipeline((*NORMAL_FORM, *catalog.parse("quantize-weights{bits=8,block=16}"))).rewrite(model).model
    assert any(node.op_type == "GatherBlockQuantized" for node in quantized.graph)
    narrow = open_decoder(quantized)
    assert narrow.ports.vocabulary == 500 and parity(narrow).relative < 1e-4


def test_padding_may_lie_anywhere(decoder: Decoder) -> None:
    ids, keep = text(3, 8), np.random.default_rng(1).random((3, 8)) < 0.6
    keep[:, 0], keep[2] = [True, False, True], False
    state = decoder.start(3)
    first = state.feed(ids, keep)
    assert state.lengths.tolist() == keep.sum(1).tolist()
    assert not first[~keep].any()
    second = state.feed(text(3, 2, 5))
    for row in (0, 1):
        alone = decoder.start()
        near(first[row, keep[row]], alone.feed(ids[row : row + 1, keep[row]])[0])
        near(second[row], alone.feed(text(3, 2, 5)[row : row + 1])[0])
    near(second[2], decoder.start().feed(text(3, 2, 5)[2:])[0])


def test_what_is_cut_off_was_never_there(decoder: Decoder) -> None:
    ids, more = text(2, 7), text(2, 3, 9)
    state = decoder.start(2)
    state.feed(ids)
    state.truncate([3, 5])
    assert state.lengths.tolist() == [3, 5]
    found = state.feed(more)
    for row, length in enumerate((3, 5)):
        whole = np.concatenate([ids[row, :length], more[row]])[None]
        near(found[row], decoder.start().feed(whole)[0, length:])
    with pytest.raises(InputError, match=r"rows of \[6, 8\] tokens cannot be cut to \[7, 7\]"):
        state.truncate(7)
    state.truncate(0)
    near(state.feed(ids), decoder.start(2).feed(ids))


def test_forks_rows_and_joined_states_live_on_their_own(decoder: Decoder) -> None:
    ids = text(2, 6)
    state = decoder.start(2)
    state.feed(ids)
    fork, chosen = state.fork(), state.select([1, 1, 0])
    several = State.joined([state, chosen, decoder.start()])
    nexts = {name: text(one.rows, 2, seed) for seed, (name, one) in enumerate(
        {"state": state, "fork": fork, "chosen": chosen, "several": several}.items())}  # fmt: skip
    found = {
        "state": state.feed(nexts["state"]),
        "fork": fork.feed(nexts["fork"]),
        "chosen": chosen.feed(nexts["chosen"]),
        "several": several.feed(nexts["several"]),
    }
    rows = {"state": [0, 1], "fork": [0, 1], "chosen": [1, 1, 0], "several": [0, 1, 1, 1, 0, None]}
    for name, scores in found.items():
        for index, row in enumerate(rows[name]):
            before = ids[row] if row is not None else np.zeros(0, np.int64)
            whole = np.concatenate([before, nexts[name][index]])[None]
            near(scores[index], decoder.start().feed(whole)[0, len(before) :])


def test_bytes_are_those_of_the_arrays_held() -> None:
    growing, shared = opened("llama-kv-dynp").start(2), opened("genai-llama").start(2)
    growing.feed(text(2, 5))
    shared.feed(text(2, 5))
    layers, rows, heads, tokens, size = 4, 2, 2, 5, 8
    assert growing.cache_bytes == 2 * layers * rows * heads * tokens * size * 4
    held = shared.cache_bytes
    shared.feed(text(2, 3))
    assert shared.cache_bytes == held == shared.buffer_bytes == 2 * 3 * 2 * 2 * 64 * 16 * 4


def test_a_buffer_that_is_full_grows() -> None:
    ids = text(1, 100)
    decoder = opened("genai-llama")
    state = decoder.start()
    pieces = [state.feed(ids[:, start : start + 7]) for start in range(0, 100, 7)]
    near(np.concatenate(pieces, 1), decoder.start().feed(ids))


def test_the_perplexity_does_not_depend_on_pieces() -> None:
    decoder = opened("qwen-dynp")
    texts = [text(1, 20, seed)[0] for seed in range(2)]
    assert perplexity(decoder, texts, piece=3) == pytest.approx(perplexity(decoder, texts), rel=1e-4)


def test_rows_of_one_length_only_without_a_mask() -> None:
    masked = opened("llama-kv-op23")
    decoder = Decoder(replace(masked.ports, packing=""), masked.engine)
    state = decoder.start(2)
    near(state.feed(text(2, 4)), opened("llama-kv-op23").start(2).feed(text(2, 4)))
    with pytest.raises(InputError, match="cannot tell rows of different lengths apart"):
        state.feed(text(2, 4), np.asarray([[True] * 4, [False] + [True] * 3]))
    with pytest.raises(InputError, match="cannot tell rows of different lengths apart"):
        state.truncate([4, 3])


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("gpt2-ts", "the model has no caches"),
        ("mamba-dynp", "is a state that no output is found to continue"),
        ("bert-s-ts", "the model has no caches"),
    ],
)
def test_what_is_no_decoder_is_refused(name: str, cause: str) -> None:
    with pytest.raises(InputError, match=cause):
        opened(name)


def test_tokens_that_the_model_does_not_have_are_refused(decoder: Decoder) -> None:
    state = decoder.start()
    with pytest.raises(InputError, match="the model has no token 500, it has 500"):
        state.feed(np.asarray([[500]]))
    with pytest.raises(InputError, match="the model has no token -1"):
        state.feed(np.asarray([[-1]]))
    with pytest.raises(InputError, match="there is no token"):
        state.feed(np.asarray([[1]]), np.asarray([[False]]))


def test_a_row_does_not_grow_beyond_the_positions() -> None:
    state = opened("genai-llama").start()
    state.feed(text(1, 120))
    with pytest.raises(InputError, match="129 tokens are more than the 128 that the model has positions for"):
        state.feed(text(1, 9))
    assert state.length() == 120
    state.feed(text(1, 8))


def test_rows_share_a_range_that_one_of_them_fills() -> None:
    decoder = opened("genai-llama")
    ids, more = text(2, 120), text(2, 12, 9)
    state = decoder.start(2)
    state.feed(ids, np.asarray([[True] * 120, [True] * 5 + [False] * 115]))
    found = state.feed(more, np.asarray([[True] * 3 + [False] * 9, [True] * 12]))
    assert state.lengths.tolist() == [123, 17] and not found[0, 3:].any()
    near(found[0, :3], decoder.start().feed(np.concatenate([ids[:1], more[:1, :3]], 1))[0, 120:])
    near(found[1], decoder.start().feed(np.concatenate([ids[1:, :5], more[1:]], 1))[0, 5:])


def changed(name: str, change: Callable[[onnx.GraphProto], None]) -> Decoder:
    proto = structures.load(name)
    change(proto.graph)
    return open_decoder(oir.from_proto(proto))


def test_a_model_of_one_row() -> None:
    def fixed(graph: onnx.GraphProto) -> None:
        for value in (*graph.input, *graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = 1

    decoder = changed("llama-kv-dynp", fixed)
    assert not decoder.mixes and parity(decoder).relative < 1e-4
    with pytest.raises(InputError, match="the model takes batches of 1, not of 2"):
        decoder.start(2)


def test_a_model_that_scores_the_last_token_only() -> None:
    def last(graph: onnx.GraphProto) -> None:
        (scores,) = [one for one in graph.output if one.name == "logits"]
        for node in graph.node:
            node.output[:] = ["every" if one == "logits" else one for one in node.output]
        graph.initializer.append(onnx.numpy_helper.from_array(np.asarray([-1]), "last"))
        graph.node.append(onnx.helper.make_node("Gather", ["every", "last"], ["logits"], axis=1))
        scores.type.tensor_type.shape.dim[1].dim_value = 1

    ids, keep = text(2, 6), np.asarray([[False] * 2 + [True] * 4, [True] * 6])
    decoder = changed("llama-kv-dynp", last)
    assert parity(decoder).relative < 1e-4
    ensure(decoder)
    found = decoder.start(2).feed(ids, keep)
    near(found[:, -1], opened("llama-kv-dynp").start(2).feed(ids, keep)[:, -1])
    assert not found[:, :-1].any()


@pytest.mark.parametrize("from_mask", [True, False])
def test_a_model_that_counts_padding_is_found_out(from_mask: bool) -> None:
    """Positions that the model makes itself: those of the tokens that its mask lets through, or those of the slots."""

    def own(graph: onnx.GraphProto) -> None:
        graph.input.remove(next(one for one in graph.input if one.name == "position_ids"))
        numbers = {"axis": 1, "one": 1, "ones": [1], "two": [2], "zero": [0], "far": [2**31]}
        graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(v), f"own-{k}") for k, v in numbers.items())
        counted = ["attention_mask"] if from_mask else ["own-slots"]
        lines = [
            ("Shape", ["attention_mask"], "own-shape"),
            ("Expand", ["own-one", "own-shape"], "own-slots"),
            ("CumSum", [*counted, "own-axis"], "own-counted"),
            ("Sub", ["own-counted", "own-one"], "own-places"),
            ("Shape", ["input_ids"], "own-ids"),
            ("Gather", ["own-ids", "own-ones"], "own-new"),
            ("Neg", ["own-new"], "own-start"),
            ("Slice", ["own-places", "own-start", "own-far", "own-ones"], "position_ids"),
        ]
        rest = list(graph.node)
        del graph.node[:]
        graph.node.extend([*(onnx.helper.make_node(op, given, [made]) for op, given, made in lines), *rest])

    decoder = changed("llama-kv-dynp", own)
    assert decoder.mixes is from_mask
    assert parity(decoder).relative < 1e-4


@pytest.mark.parametrize("dtype", ["FLOAT16", "BFLOAT16"])
def test_caches_of_half_precision(dtype: str) -> None:
    kind = onnx.TensorProto.DataType.Value(dtype)

    def narrow(graph: onnx.GraphProto) -> None:
        ports = {one.name for one in (*graph.input, *graph.output) if one.name.startswith(("past", "present"))}
        for node in graph.node:
            node.input[:] = [f"{one}.wide" if one in ports else one for one in node.input]
            node.output[:] = [f"{one}.wide" if one in ports else one for one in node.output]
        first, last = [], []
        for value in (*graph.input, *graph.output):
            if value.name in ports:
                value.type.tensor_type.elem_type = kind
                ends = [value.name, f"{value.name}.wide"]
                if value.name.startswith("past"):
                    first.append(onnx.helper.make_node("Cast", ends[:1], ends[1:], to=onnx.TensorProto.FLOAT))
                else:
                    last.append(onnx.helper.make_node("Cast", ends[1:], ends[:1], to=kind))
        nodes = [*first, *graph.node, *last]
        del graph.node[:]
        graph.node.extend(nodes)

    decoder = changed("llama-kv-op23", narrow)
    found = parity(decoder)
    assert decoder.mixes and 0 < found.relative < (2e-3 if dtype == "FLOAT16" else 2e-2), found
    state = decoder.start()
    state.feed(text(1, 8))
    whole = opened("llama-kv-op23").start()
    whole.feed(text(1, 8))
    assert state.cache_bytes * 2 == whole.cache_bytes


def test_runtimes_that_cannot_be() -> None:
    model = oir.from_proto(structures.load("llama-kv-op23"))
    with pytest.raises(InputError, match="TVM compiles files, not models in memory"):
        open_decoder(model, runtime="tvm")
    with pytest.raises(InputError, match="there is no runtime `other`"):
        open_decoder(model, runtime="other")


def test_caches_whose_sizes_are_not_known_are_refused() -> None:
    def odd(graph: onnx.GraphProto) -> None:
        (one,) = [port for port in graph.input if port.name == "past_key_values.1.key"]
        one.type.tensor_type.shape.dim[3].Clear()
        one.type.tensor_type.shape.dim[3].dim_param = "any"

    with pytest.raises(InputError, match="every size but the batch and the length has to be the same number in both"):
        changed("llama-kv-op23", odd)


def test_a_layer_without_a_cache_beside_others_is_refused() -> None:
    def forgotten(graph: onnx.GraphProto) -> None:
        names = ("past_key_values.1.key", "past_key_values.1.value")
        for port in [one for one in graph.input if one.name in names]:
            graph.input.remove(port)
        for node in graph.node:
            node.input[:] = ["" if one in names else one for one in node.input]

    with pytest.raises(InputError, match="this attention keeps no keys and values, others of the model do"):
        changed("genai-mha", forgotten)
