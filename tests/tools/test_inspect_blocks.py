"""`burnish inspect --blocks` names what the model has, and says what it could not read."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
from click.testing import CliRunner
from golden import parse_graph

from burnish.tools.inspect_command import inspect_command

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> str:
    result = CliRunner().invoke(inspect_command, [*arguments, "--blocks"], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_the_document_names_values_and_nodes_of_the_model() -> None:
    file = ROOT / "tools" / "demo" / "digits_vit.onnx"
    found = json.loads(run(str(file), "--json"))["blocks"]
    proto = onnx.load(file)
    values = {name for node in proto.graph.node for name in node.output}
    nodes = {node.name for node in proto.graph.node}
    assert [stack["pattern"] for stack in found["stacks"]] == ["AAA"]
    for block in found["blocks"]:
        places = ["entry", "attention_in", "attention_out", "mid", "mlp_in", "mlp_out", "exit"]
        assert {block[place] for place in places} <= values
        assert block["nodes"] and set(block["nodes"]) <= nodes
        assert block["attention"] == [
            {"heads": 4, "kv_heads": 4, "head_size": 12, "value_size": 12}
            | {"causal": False, "window": None, "cross": False, "cache": "none"}
        ]
    ends = [(block["entry"], block["exit"]) for block in found["blocks"]]
    assert [exit for _, exit in ends[:-1]] == [entry for entry, _ in ends[1:]]


def test_a_model_without_blocks_says_so(tmp_path: Path) -> None:
    file = tmp_path / "plain.onnx"
    onnx.save(parse_graph("g (float[N, 4] x) => (float[N, 4] y) <float[4, 4] w> { y = MatMul (x, w) }"), file)
    assert "no residual stream: no sum adds to a value what matrices compute from it" in run(str(file))
    found = json.loads(run(str(file), "--json"))["blocks"]
    assert found["stacks"] == found["blocks"] == []
    assert len(found["missing"]) == 1


def test_codebooks_are_shown(tmp_path: Path) -> None:
    file = tmp_path / "codes.onnx"
    graph = """g (float[N, 8] z) => (float[N, 8] y) <float[16, 8] e> {
      m = Gemm <transB = 1> (z, e)  i = ArgMax <axis = 1, keepdims = 0> (m)  y = Gather (e, i) }"""
    proto = parse_graph(graph)
    proto.graph.node[1].name = "search"
    onnx.save(proto, file)
    assert json.loads(run(str(file), "--json"))["blocks"]["codebooks"] == [
        {"codes": 16, "features": 8, "node": "search"}
    ]
    assert "search     16         8" in run(str(file))


def test_memories_are_shown(tmp_path: Path) -> None:
    file = tmp_path / "memory.onnx"
    graph = """g (float[N, 12] q, float[N, 12] t) => (float[N, 8, 5] y) <
        float[12, 16] a, float[12, 16] b, float[256, 5] c, int64[1] k = {8},
        int64[1] e = {2}, int64[1] f = {1}, int64[2] s = {0, 64}, int64 n = {16}> {
      p = MatMul (q, a)  r = MatMul (t, b)  v, i = TopK <axis = -1> (p, k)  w, j = TopK <axis = -1> (r, k)
      v1 = Unsqueeze (v, e)  w1 = Unsqueeze (w, f)  x = Add (v1, w1)  z = Reshape (x, s)  g, h = TopK <axis = -1> (z, k)
      i1 = Unsqueeze (i, e)  j1 = Unsqueeze (j, f)  m = Mul (i1, n)  l = Add (m, j1)  u = Reshape (l, s)
      rows = GatherElements <axis = -1> (u, h)  y = Gather (c, rows) }"""
    proto = parse_graph(graph)
    proto.graph.node[8].name = "best"
    onnx.save(proto, file)
    assert json.loads(run(str(file), "--json"))["blocks"]["product_keys"] == [
        {"node": "best", "heads": 1, "keys": [16, 16], "chosen": 8, "table": [256, 5]}
    ]
    assert "best        1  16 x 16       8   256      5" in run(str(file))
