"""What the views say of a model, held against the truth about it.

Every check gives a `Cell`: `right` when all that there is was found as it is; `refused` when something was not read, or
is called unknown, with what the view says was missing; `wrong` when anything was found that is not so.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as oir

from burnish.ir.inference import Inference
from burnish.ir.views.attention import Miss
from burnish.ir.views.attention_layer import AttentionLayer, attention_layers
from burnish.ir.views.block import Block, Structure
from burnish.ir.views.blocks import stacks
from burnish.ir.views.codebook import Codebook, codebooks
from burnish.ir.views.embedding import Embedding, Head, heads, token_embedding
from burnish.ir.views.experts import Experts, find_experts
from burnish.ir.views.state import State, states
from burnish.tools.research.zoo_truth import Attend, Truth

RIGHT, REFUSED, WRONG = "right", "refused", "wrong"


@dataclass(frozen=True)
class Cell:
    """The verdict on one view of one file; `reason` says what was refused or is wrong, and is empty when it is right.

    `empty`: there is nothing of this kind in the model, and nothing was found.
    """

    verdict: str
    reason: str = ""
    empty: bool = False


@dataclass(frozen=True)
class Seen:
    """What the views find in one model."""

    layers: tuple[AttentionLayer, ...]
    misses: tuple[Miss, ...]
    structure: Structure
    states: tuple[State, ...]
    experts: tuple[Experts | Miss, ...]
    codebooks: tuple[Codebook, ...]
    embedding: Embedding | None
    heads: tuple[Head | Miss, ...]


def see(model: oir.Model) -> Seen:
    """Read all views of `model`."""
    facts = Inference(model)
    found = list(attention_layers(model, facts))
    layers = tuple(one for one in found if isinstance(one, AttentionLayer))
    ports = frozenset(port for one in layers for port in (*one.cache.past, *one.cache.present))
    return Seen(
        layers,
        tuple(one for one in found if isinstance(one, Miss)),
        stacks(model, facts),
        tuple(states(model, facts, ports)),
        tuple(find_experts(model, facts)),
        tuple(codebooks(model)),
        token_embedding(model, facts),
        tuple(heads(model, facts)),
    )


def check(seen: Seen, truth: Truth) -> dict[str, Cell]:
    """The cells of one file by view."""
    return {view: one(seen, truth) for view, one in CHECKS.items()}


def _cell(wrong: Sequence[str], refused: Sequence[str], empty: bool) -> Cell:
    for verdict, reasons in ((WRONG, wrong), (REFUSED, refused)):
        if reasons:
            return Cell(verdict, "; ".join(dict.fromkeys(reasons)))
    return Cell(RIGHT, empty=empty)


def _attention(seen: Seen, truth: Truth) -> Cell:
    wrong: list[str] = []
    refused: list[str] = []
    # An encoder and the decoder's layers that do not read it run in any order.
    expected = sorted(truth.attention, key=lambda one: (one.cross, one.causal))
    found = sorted(seen.layers, key=lambda one: (one.cross, bool(one.causal)))
    pairs = _align([_shape_of(one) for one in found], [_shape(one) for one in expected])
    for number, layer in enumerate(found):
        if number not in pairs:
            shape = "heads {}, kv heads {}, head size {}, cross {}".format(*_shape_of(layer))
            wrong.append(f"layer {number} ({shape}) is none of the model")
            continue
        for field, has, should in _fields(layer, expected[pairs[number]]):
            if has is None and should is not None:
                refused.append(f"{field} not known")
            elif has != should:
                wrong.append(f"layer {number}: {field} {has}, not {should}")
    if len(pairs) < len(expected):
        reasons = dict.fromkeys(miss.reason for miss in seen.misses) or ["no reason given"]
        refused.append(f"{len(expected) - len(pairs)} of {len(expected)} layers: {', '.join(reasons)}")
    return _cell(wrong, refused, not expected)


def _shape_of(layer: AttentionLayer) -> tuple[int, int, int, bool]:
    return layer.heads, layer.kv_heads, layer.head_size, layer.cross


def _shape(one: Attend) -> tuple[int, int, int, bool]:
    return one.heads, one.kv_heads, one.head_size, one.cross


def _fields(layer: AttentionLayer, one: Attend) -> Iterator[tuple[str, object, object]]:
    """What is found and what there is, by name; None is unknown."""
    scale = one.head_size**-0.5 if one.scale is None else one.scale
    yield "value size", layer.value_size, one.head_size
    yield "scale", round(layer.scale / scale, 3), 1.0
    yield "causal", layer.causal, one.causal
    yield "window", layer.window, one.window
    yield "softcap", layer.softcap, one.softcap or 0.0
    yield "rotary", layer.rotary.dims if layer.rotary is not None else 0, one.rotary
    yield "rotary of keys", layer.key_rotary.dims if layer.key_rotary is not None else 0, one.rotary
    yield "interleaved", layer.rotary.interleaved if layer.rotary is not None else False, False
    yield "query norm", layer.query_norm is not None, one.norms
    yield "key norm", layer.key_norm is not None, one.norms


def _align(found: Sequence[object], expected: Sequence[object]) -> dict[int, int]:
    """The longest common subsequence: positions in `found` to positions in `expected`."""
    table = [[0] * (len(expected) + 1) for _ in range(len(found) + 1)]
    for i in reversed(range(len(found))):
        for j in reversed(range(len(expected))):
            same = table[i + 1][j + 1] + 1 if found[i] == expected[j] else 0
            table[i][j] = max(same, table[i + 1][j], table[i][j + 1])
    pairs, i, j = {}, 0, 0
    while i < len(found) and j < len(expected):
        if found[i] == expected[j] and table[i][j] == table[i + 1][j + 1] + 1:
            pairs[i], i, j = j, i + 1, j + 1
        elif table[i + 1][j] >= table[i][j + 1]:
            i += 1
        else:
            j += 1
    return pairs


def _cache(seen: Seen, truth: Truth) -> Cell:
    """Every past and present port at the layer that it belongs to, and at its block; a state's two ends together."""
    wrong: list[str] = []
    refused: list[str] = []
    expected = list(truth.cache)
    layers = [(_names(one.cache.past), _names(one.cache.present)) for one in seen.layers if one.cache]
    blocks = [(_names(one.inputs), _names(one.outputs)) for one in seen.structure.blocks if one.inputs or one.outputs]
    pairs = [((one.past.name,), (one.present.name,)) for one in seen.states]
    ends = [((past,), (present,)) for ports in expected for past, present in zip(*ports, strict=True)]
    attends = truth.cached == "attention"
    if attends:  # of a layer that is not read, the cache is a state like any other
        pairs = [pair for pair in pairs if pair not in ends]
    for what, found, right in (
        ("layers", layers, expected if attends else []),
        ("states", pairs, [] if attends else ends),
        ("blocks", blocks, expected if truth.blocks else []),
    ):
        wrong += [f"{what} with {ports}" for ports in found if ports not in right]
        missing = sum(ports not in found for ports in right)
        if missing:
            refused.append(f"ports of {missing} of {len(right)} {what} not found")
    return _cell(wrong, refused, not expected)


def _names(values: Sequence[oir.Value]) -> tuple[str | None, ...]:
    return tuple(value.name for value in values)


def _blocks(seen: Seen, truth: Truth) -> Cell:
    wrong: list[str] = []
    refused: list[str] = []
    expected = [run for run in truth.blocks for _ in range(run.count)]
    found = seen.structure.blocks
    pairs = _align([parts_of(block) for block in found], [run.parts for run in expected])
    for number, block in enumerate(found):
        if number not in pairs:
            wrong.append(f"block {number} of {', '.join(parts_of(block))} is none of the model")
            continue
        run = expected[pairs[number]]
        if block.form not in _FORMS[run.form]:
            wrong.append(f"block {number}: {block.form}, not {run.form}")
        if block.droppable and run.fixed:
            wrong.append(f"block {number}: can be dropped, though its {run.fixed} forbids it")
        elif not block.droppable and not run.fixed:
            refused.append(f"block {number} cannot be dropped: {block.refusal}")
    hashes = {position: found[number].hash for number, position in pairs.items()}
    _alike(truth, hashes, wrong, refused)
    if len(pairs) < len(expected):
        reasons = seen.structure.missing or ("no reason given",)
        refused.append(f"{len(expected) - len(pairs)} of {len(expected)} blocks: {', '.join(reasons)}")
    return _cell(wrong, refused, not expected)


def _alike(truth: Truth, hashes: Mapping[int, str], wrong: list[str], refused: list[str]) -> None:
    """Whether blocks of a run have equal hashes exactly where they differ in the numbers of their weights only."""
    begin = 0
    for run in truth.blocks:
        letters = {at: run.pattern[(at - begin) % len(run.pattern)] for at in range(begin, begin + run.count)}
        begin += run.count
        for one, other in itertools.combinations((at for at in letters if at in hashes), 2):
            if (hashes[one] == hashes[other]) != (letters[one] == letters[other]):
                if hashes[one] == hashes[other]:
                    wrong.append(f"blocks {one} and {other} are called alike")
                else:
                    refused.append("that blocks are alike is not seen")


_FORMS = {
    "pre": ("plain", "skip-fused", "cnn"),
    "post": ("post-norm",),
    "both": ("plain", "skip-fused"),
    "cnn": ("cnn",),
}


def parts_of(block: Block) -> tuple[str, ...]:
    """What a block adds to its stream, in order, inner sums one by one; a "+" joins what adds in parallel."""
    simple = [inner for part in block.parts for inner in (part.inner or (part,))]
    return tuple("+".join(part.kinds) for part in simple)


def _experts(seen: Seen, truth: Truth) -> Cell:
    """How many experts each layer has, how many a token takes, and that matrices and router are there."""
    found = [(one.count, one.chosen) for one in seen.experts if isinstance(one, Experts)]
    right = [(one.number, one.top) for one in truth.experts]
    wrong = [f"layers of {found}, not {right}"] if found[: len(right)] != right[: len(found)] else []
    reasons = [one.reason for one in seen.experts if isinstance(one, Miss)] or ["no reason given"]
    refused = [", ".join(dict.fromkeys(reasons))] if len(found) < len(right) else []
    return _cell(wrong, refused, not right)


def _codebook(seen: Seen, truth: Truth) -> Cell:
    """Codes and features of every codebook, and that its codes are looked up."""
    found = [one.codes().shape for one in seen.codebooks]
    wrong = [f"codebooks of {found}, not {truth.codebooks}"] if found != list(truth.codebooks)[: len(found)] else []
    wrong += ["a codebook whose codes are looked up nowhere" for one in seen.codebooks if not one.lookups]
    missing = len(truth.codebooks) - len(found)
    return _cell(wrong, [f"{missing} of {len(truth.codebooks)} not found"] if missing > 0 else [], not truth.codebooks)


def _embedding(seen: Seen, truth: Truth) -> Cell:
    """The table that the model's ids pick from."""
    one = seen.embedding
    found = (one.rows, one.width) if one is not None else None
    wrong = [f"a table of {found}, not {truth.embedding}"] if found not in (None, truth.embedding) else []
    refused = ["no table found"] if found is None and truth.embedding else []
    return _cell(wrong, refused, truth.embedding is None)


def _head(seen: Seen, truth: Truth) -> Cell:
    """The last linear layer, what caps its result, and whether its matrix is the embedding's."""
    found = [(one.classes, one.width, one.softcap, bool(one.tie)) for one in seen.heads if isinstance(one, Head)]
    right = (*truth.head, truth.softcap, truth.tied) if truth.head else None
    wrong = [f"a head of {one}, not {right}" for one in found if one != right]
    reasons = [one.reason for one in seen.heads if isinstance(one, Miss)] or ["no reason given"]
    refused = [", ".join(dict.fromkeys(reasons))] if right and not found else []
    return _cell(wrong, refused, right is None)


CHECKS: dict[str, Callable[[Seen, Truth], Cell]] = {
    "attention": _attention,
    "cache": _cache,
    "blocks": _blocks,
    "experts": _experts,
    "codebook": _codebook,
    "embedding": _embedding,
    "head": _head,
}
