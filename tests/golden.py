"""Golden files of passes: Markdown with a sentence, a graph in ONNX text, and what the pass makes of it.

The file's name is the pass. A case is prose, an `onnx` block, an optional `options` block (`{target=ort-cpu}`), and a
`becomes` block (the text of the result) or an `unchanged` block (one `operator: reason` a line). The header of the
graph may be left out. A value declared between `<` and `>` without values, which no node computes, is a weight and
gets values from a seed made of its name.

A lossy pass whose options name nothing outright has a `proposes` block (its edits, then the sites left alone), or an
`edits` block (`site | option` a line) before the `becomes` block; weights are not shown.
"""

from __future__ import annotations

import difflib
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as oir
from laws import LawBroken, check_laws, rewrite
from lossy_laws import check_edits, check_sound, made, proposals
from onnx_ir.passes import common

from burnish.ir.text import text
from burnish.ir.walk import walk
from burnish.passes import catalog
from burnish.passes.base import Outcome, Pass
from burnish.passes.lossy import LossyPass, Undecided

_KINDS = "onnx|options|edits|becomes|proposes|unchanged"
_BLOCK = re.compile(rf"^```({_KINDS})[ \t]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
_POSITIVE = ("var", "scale")


@dataclass(frozen=True)
class Block:
    """A fenced block of a golden file: its kind, its content, and where the whole of it lies in the file."""

    kind: str
    content: str
    start: int
    end: int


@dataclass(frozen=True)
class Case:
    """One case of a golden file."""

    sentence: str
    graph: Block
    options: Block | None
    edits: Block | None
    expected: Block | None


def read_cases(source: str) -> list[Case]:
    """The cases of a golden file."""
    blocks = [Block(found[1], found[2], found.start(), found.end()) for found in _BLOCK.finditer(source)]
    starts = [index for index, block in enumerate(blocks) if block.kind == "onnx"]
    cases: list[Case] = []
    for first, behind in zip(starts, [*starts[1:], len(blocks)], strict=True):
        graph, rest = blocks[first], blocks[first + 1 : behind]
        options = next((block for block in rest if block.kind == "options"), None)
        edits = next((block for block in rest if block.kind == "edits"), None)
        expected = next((block for block in rest if block.kind in ("becomes", "proposes", "unchanged")), None)
        prose = source[blocks[first - 1].end if first else 0 : graph.start]
        cases.append(Case(_sentence(prose, len(cases) + 1), graph, options, edits, expected))
    return cases


def _sentence(prose: str, number: int) -> str:
    """The first sentence of the prose, on one line; headings do not count."""
    lines = [line for line in prose.splitlines() if not line.startswith("#")]
    words = " ".join(" ".join(lines).split())
    return re.split(r"(?<=[.;:])\s", words)[0].rstrip(".:;") or f"case {number}"


def run_case(path: Path, index: int, bless: bool) -> None:
    """Run one case and hold its pass to the laws.

    Args:
        path: the golden file.
        index: which case.
        bless: write what the pass does into the file instead of comparing with it.

    Raises:
        LawBroken: when the result is not the expected one, or a law does not hold.
    """
    source = path.read_text()
    case = read_cases(source)[index]
    name = path.stem.replace("_", "-")
    (one,) = catalog.parse(name + (case.options.content.strip() if case.options is not None else ""))
    before = prepare(parse_graph(case.graph.content), one)
    if isinstance(one, LossyPass):
        found = _lossy(one, before, case)
    else:
        after, outcome = rewrite(one, before)
        found = _result(after, outcome)
    if bless:
        path.write_text(_blessed(source, case, *found))
    else:
        _compare(case, *found)
    if not isinstance(one, LossyPass):
        check_laws(one, before, after, outcome)


def _lossy(one: LossyPass, before: oir.Model, case: Case) -> tuple[str, str]:
    """What a lossy pass proposes, or makes of what the case or its options choose; held to the laws of such passes."""
    outcome = Outcome(one.pass_name())
    if case.edits is None:
        try:
            chosen = one.asked(before, outcome)
        except Undecided:
            edits, outcome = proposals(one, before)
            check_edits(one, before, edits, outcome)
            lines = [f"{edit.site} | {edit.option} | {edit.savings.parameters:,} parameters\n" for edit in edits]
            return "proposes", "".join(lines) + _skips(outcome)
    else:
        edits, proposed = proposals(one, before)
        check_edits(one, before, edits, proposed)
        by_name = {f"{edit.site} | {edit.option}": edit for edit in edits}
        chosen = [by_name[line] for line in case.edits.content.splitlines()]
    if not chosen:
        return "unchanged", _skips(outcome)
    after, _ = made(one, before, chosen)
    check_sound(one, before, after)
    return "becomes", text(after, weights=False)


def _skips(outcome: Outcome) -> str:
    return "".join(f"{skip.op}: {skip.reason}\n" for skip in outcome.skipped)


def _result(after: oir.Model, outcome: Outcome) -> tuple[str, str]:
    """The kind of block and its content."""
    if outcome.rewritten:
        return "becomes", text(after)
    return "unchanged", _skips(outcome)


def _compare(case: Case, kind: str, content: str) -> None:
    if case.expected is None:
        raise LawBroken("the case has no `becomes`, `proposes` or `unchanged` block; `pytest --bless FILE` writes it")
    if case.expected.kind != kind:
        raise LawBroken(f"expected `{case.expected.kind}`, found `{kind}`:\n\n{content}")
    if case.expected.content != content:
        lines = difflib.unified_diff(
            case.expected.content.splitlines(), content.splitlines(), "expected", "found", lineterm="", n=99
        )
        raise LawBroken("\n".join(lines))


def _blessed(source: str, case: Case, kind: str, content: str) -> str:
    block = f"```{kind}\n{content}```"
    if case.expected is not None:
        return source[: case.expected.start] + block + source[case.expected.end :]
    end = (case.edits or case.options or case.graph).end
    return f"{source[:end]}\n\n{block}{source[end:]}"


def parse_graph(source: str) -> onnx.ModelProto:
    """A model from ONNX text whose header, or parts of it, may be left out; declared weights get values."""
    body = source.strip()
    header = body[: body.index(">") + 1] if body.startswith("<") else "<>"
    body = body[len(header) :] if body.startswith("<") else body
    fields = [header[1:-1].strip()] if header[1:-1].strip() else []
    if "ir_version" not in header:
        fields.insert(0, "ir_version: 10")
    if "opset_import" not in header:
        contrib = ', "com.microsoft": 1' if "com.microsoft" in body else ""
        fields.append(f'opset_import: ["": 20{contrib}]')
    model = onnx.parser.parse_model(f"<{', '.join(fields)}>\n{body}")
    for graph in _graphs(model.graph):
        _fill(graph)
    return model


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for nested in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                yield from _graphs(nested)


def _fill(graph: onnx.GraphProto) -> None:
    """Turn declared values that nothing computes into weights."""
    known = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    known |= {name for node in graph.node for name in node.output}
    for value in [value for value in graph.value_info if value.name not in known]:
        kind = value.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        if dtype.kind not in "fV":
            raise LawBroken(f"`{value.name}` is not floating point: give its values, `{value.name} = {{1, 2}}`")
        array = weight(value.name, tuple(size.dim_value for size in kind.shape.dim)).astype(dtype)
        graph.initializer.append(onnx.numpy_helper.from_array(array, value.name))
        graph.value_info.remove(value)


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float64 values made from the name: normal, by the root of the fan-in; in [0.5, 1.5] for var and scale."""
    random = np.random.default_rng(zlib.crc32(name.encode()))
    if any(word in name for word in _POSITIVE):
        return random.uniform(0.5, 1.5, shape)
    fan_in = 1 if len(shape) < 2 else shape[-2] if len(shape) == 2 else int(np.prod(shape[1:]))
    return random.standard_normal(shape) / np.sqrt(max(fan_in, 1))


def name_nodes(model: oir.Model) -> None:
    """Give every node that has no name one of its own; ONNX text seldom names nodes."""
    for number, node in enumerate(walk(model)):
        node.name = node.name or f"{node.op_type}_{number}"


def prepare(proto: onnx.ModelProto, one: Pass) -> oir.Model:
    """The model with types inferred and names given, and with the facts that only a conversion can establish."""
    onnx.checker.check_model(proto)
    inferred = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    model = oir.from_proto(inferred)
    name_nodes(model)
    if "inlined" in one.needs:
        common.InlinePass()(model)
    if "lifted" in one.needs:
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    return model
