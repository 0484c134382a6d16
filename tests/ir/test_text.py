"""The text of a model tells models apart by what they compute, not by how things are called."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as oir
import pytest
from golden import parse_graph

from burnish.ir.text import fingerprint, structure, structure_fingerprint, text, weight_hash

GRAPH = """
g (float[N,4] x, bool c, float[4] "3") => (float[N,4] y, float[N,4] "o 1")
   <float[4,1] k = {1,2,3,4}, float[3,3] unused = {1,2,3,4,5,6,7,8,9}> {
  a = Mul (x, k)
  q = Constant <value = float {0.5}> ()
  t = If (c) <
    then_branch = g1 () => (float[N,4] z) { z = Add (a, q) },
    else_branch = g2 () => (float[N,4] z2) <float[1] w2 = {1.0}> { z2 = Sub (a, w2) }
  >
  y = com.microsoft.BiasGelu (t, "3")
  d = Clip (y, , q)
  "o 1" = Transpose <perm = [0, 1]> (d)
}
"""

TEXT = """\
opset 20, com.microsoft 1
graph (%x: float[N,4], %c: bool[], %"3": float[4])
  %0 = weight float[4,1] [[1.0], [2.0], [3.0], [4.0]]
  %1 = weight float[3,3] #ab9c5f1b
  %2: ?[?] = Mul(%x, %0)
  %3 = Constant float[] 0.5
  %4: ?[?] = If(%c)
    else_branch = graph ()
      %5 = weight float[1] [1.0]
      %6: float[N,4] = Sub(%2, %5)
      return %6
    then_branch = graph ()
      %7: float[N,4] = Add(%2, %3)
      return %7
  %y: float[N,4] = com.microsoft.BiasGelu(%4, %"3")
  %8: ?[?] = Clip(%y, _, %3)
  %"o 1": float[N,4] = Transpose(%8) perm=[0,1]
  return %y, %"o 1"
"""


def model_of(source: str) -> oir.Model:
    """A model from ONNX text."""
    return oir.from_proto(parse_graph(source))


def test_the_text_of_a_model() -> None:
    assert text(model_of(GRAPH)) == TEXT


def test_inner_names_and_metadata_do_not_matter() -> None:
    other = model_of(GRAPH)
    for node in other.graph.all_nodes():
        node.name = f"renamed_{id(node)}"
        node.metadata_props["made"] = "here"
        for out in node.outputs:
            if not out.is_graph_output():
                out.name = f"value_{id(out)}"
    other.producer_name = "someone"
    assert text(other) == TEXT
    assert fingerprint(other) == fingerprint(model_of(GRAPH))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("perm = [0, 1]", "perm = [1, 0]"),
        ("{1,2,3,4,5,6,7,8,9}", "{1,2,3,4,5,6,7,8,8}"),
        ("a = Mul", "a = Div"),
        ("Clip (y, , q)", "Clip (y, q)"),
        ("g2 () => (float[N,4] z2)", "g2 () => (float[M,4] z2)"),
        ("com.microsoft.BiasGelu", "com.other.BiasGelu"),
        ("float {0.5}", "double {0.5}"),
    ],
)
def test_a_change_of_the_model_changes_the_fingerprint(old: str, new: str) -> None:
    assert old in GRAPH
    assert fingerprint(model_of(GRAPH)) != fingerprint(model_of(GRAPH.replace(old, new)))


def test_the_structure_reads_no_weight() -> None:
    def read() -> oir.Tensor:
        raise AssertionError("the weight was read")

    model = model_of(GRAPH)
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        value.const_value = oir.LazyTensor(read, dtype=oir.DataType.FLOAT, shape=oir.Shape(value.const_value.shape))
    assert "%1 = weight float[3,3]\n" in structure(model)
    assert structure_fingerprint(model) == structure_fingerprint(model_of(GRAPH))


def test_functions_are_printed_with_their_attributes() -> None:
    source = """
    <ir_version: 10, opset_import: ["": 20, "local": 1]>
    g (float[2] x) => (float[2] y) { y = local.leaky <slope: float = 0.25> (x) }
    <domain: "local", opset_import: ["": 20]>
    leaky <slope> (a) => (b) { b = LeakyRelu <alpha: float = @slope> (a) }
    """
    assert text(model_of(source)).splitlines()[4:] == [
        "function local.leaky(%0) slope=_",
        "  %1: ?[?] = LeakyRelu(%0) alpha=@slope",
        "  return %1",
    ]


@pytest.mark.parametrize("dtype", ["FLOAT", "FLOAT16", "BFLOAT16", "INT8", "BOOL", "INT4", "FLOAT8E4M3FN", "DOUBLE"])
def test_a_hash_depends_on_the_values_and_not_on_where_they_lie(dtype: str, tmp_path: Path) -> None:
    kind = oir.DataType[dtype]
    array = (np.arange(60).reshape(6, 10) % 7).astype(kind.numpy())
    plain = oir.Tensor(array, dtype=kind)
    turned = oir.Tensor(np.asfortranarray(array), dtype=kind)
    path = tmp_path / "weights.bin"
    path.write_bytes(b"\0" * 16 + plain.tobytes())
    external = oir.ExternalTensor(
        "weights.bin", 16, plain.nbytes, kind, shape=oir.Shape([6, 10]), name="w", base_dir=tmp_path
    )
    assert weight_hash(plain) == weight_hash(turned) == weight_hash(external)
    array = array.copy()
    array[5, 9] = array[0, 0]
    assert weight_hash(oir.Tensor(array, dtype=kind)) != weight_hash(plain)


def test_strings_are_hashed_by_their_content() -> None:
    first = oir.StringTensor([b"a", b"bc", *[b"x"] * 8], shape=oir.Shape([10]))
    other = oir.StringTensor([b"ab", b"c", *[b"x"] * 8], shape=oir.Shape([10]))
    assert weight_hash(first) != weight_hash(other)
