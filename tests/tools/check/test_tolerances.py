"""Tolerances: what a file may say, what it makes of differences, and every mistake in it with its line."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as oir
import pytest

from burnish.ir.errors import InputError
from burnish.passes.budget import Amount
from burnish.tools.check.check import check
from burnish.tools.check.difference import Difference, Field, Verdict
from burnish.tools.check.take import take
from burnish.tools.check.tolerances import Tolerances, Word, read

BODY = """
<ir_version: 10, opset_import: ["": 20]>
g (float[N,4] x) => (float[N,4] y, float[N,4] z)
<float[4,4] w = {1,2,3,4, 0,1,0,1, 2,0,2,0, 1,1,1,2}, float[4] b = {1,1,1,2}>
{
  [linear] a = MatMul (x, w)
  [act] y = Relu (a)
  [side] z = Add (x, b)
}
"""


def model(text: str) -> oir.Model:
    """A model of ONNX text."""
    return oir.serde.deserialize_model(onnx.parser.parse_model(text))


def found(new: str, tolerances: Tolerances) -> dict[Field, Difference]:
    """The first difference of each field."""
    differences = check(model(new), take(model(BODY)), None, tolerances).differences
    return {one.field: one for one in reversed(differences)}


def write(folder: Path, text: str) -> Path:
    """A tolerance file."""
    path = folder / "tolerances.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_says_what_may_differ(tmp_path: Path) -> None:
    text = "opsets: rise\nnodes: 5%\nbytes: 1000\nweights: ignore\nvalues:\n  y: 1e-3\n  z: exact\nmetric: 0.01\n"
    assert read(write(tmp_path, text)) == Tolerances(
        {
            Field.OPSETS: Word.RISE,
            Field.NODES: Amount(0.05, True),
            Field.BYTES: Amount(1000, False),
            Field.WEIGHTS: Word.IGNORE,
            Field.METRIC: Amount(0.01, False),
        },
        {"y": Amount(1e-3, False), "z": Word.EXACT},
    )
    assert read(write(tmp_path, "# nothing\n")) == Tolerances()


def test_by_default_a_lock_is_a_lock() -> None:
    nothing = Tolerances()
    assert nothing.verdict(Field.STRUCTURE) is Verdict.REGRESSION
    assert nothing.grows(Field.NODES, 10, 11) is Verdict.REGRESSION
    assert nothing.opsets(18, 20) is Verdict.REGRESSION
    assert nothing.weights(1e-9) is Verdict.REGRESSION
    assert nothing.drops(1e-6, 0.9) is Verdict.REGRESSION
    assert nothing.values("y", "float", 9e-5) is None
    assert nothing.values("y", "float", 2e-4) is Verdict.REGRESSION
    assert nothing.values("y", "float16", 2e-2) is None
    assert nothing.grows(Field.LATENCY, 1.0, 1.14) is Verdict.TOLERATED
    assert nothing.grows(Field.LATENCY, 1.0, 1.16) is Verdict.REGRESSION


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nodes: 5%", {Field.NODES: (106, 105)}),
        ("nodes: 3", {Field.NODES: (104, 103)}),
        ("peak-activation: 10%", {Field.PEAK_ACTIVATION: (111, 110)}),
    ],
)
def test_growth_up_to_the_amount_is_tolerated(text: str, says: dict[Field, tuple[int, int]], tmp_path: Path) -> None:
    allowed = read(write(tmp_path, text))
    for field, (over, within) in says.items():
        assert allowed.grows(field, 100, over) is Verdict.REGRESSION
        assert allowed.grows(field, 100, within) is Verdict.TOLERATED


def test_what_is_tolerated_is_still_listed() -> None:
    scaled = BODY.replace("{1,2,3,4, 0", "{1.001,2,3,4, 0")
    exact = found(scaled, Tolerances())
    assert exact[Field.WEIGHTS].verdict is Verdict.REGRESSION
    assert exact[Field.VALUES].verdict is Verdict.NOTE
    free = found(scaled, Tolerances({Field.WEIGHTS: Word.IGNORE}))
    assert free[Field.WEIGHTS].verdict is Verdict.TOLERATED
    assert free[Field.VALUES].verdict is Verdict.REGRESSION, "nothing else tells that the outputs moved"
    both = found(scaled, Tolerances({Field.WEIGHTS: Word.IGNORE}, {"y": Amount(1e-2, False)}))
    assert both[Field.VALUES].verdict is Verdict.TOLERATED


def test_a_count_that_somebody_bounded_is_judged_beside_its_cause() -> None:
    longer = BODY.replace("[act] y = Relu (a)", "d = Neg (a)\n  c = Neg (d)\n  [act] y = Relu (c)")
    assert found(longer, Tolerances())[Field.NODES].verdict is Verdict.NOTE
    bounded = found(longer, Tolerances({Field.NODES: Amount(0.1, True)}))
    assert bounded[Field.NODES].verdict is Verdict.REGRESSION
    assert bounded[Field.STRUCTURE].message == "2 nodes added in `graph`: Neg, Neg"


def test_opsets_may_rise() -> None:
    risen = BODY.replace('"": 20', '"": 21')
    assert found(risen, Tolerances())[Field.OPSETS].message == "opset 20 -> 21"
    assert found(risen, Tolerances({Field.OPSETS: Word.RISE}))[Field.OPSETS].verdict is Verdict.TOLERATED
    fallen = BODY.replace('"": 20', '"": 19')
    assert found(fallen, Tolerances({Field.OPSETS: Word.RISE}))[Field.OPSETS].verdict is Verdict.REGRESSION


@pytest.mark.parametrize(
    ("text", "line", "cause", "hint"),
    [
        ("nodes: 5%\nvalue: 1e-3", 2, "there is nothing called `value` to tolerate", "did you mean `values`?"),
        ("nodes: some", 1, "`some` is no tolerance of `nodes`", "or an amount: `nodes: 5%`"),
        ("values: 1e999", 1, "`1e999` is no tolerance of `values`", "`values: exact` or `values: ignore`"),
        ("values: -1", 1, "`-1` is no tolerance of `values`", "or an amount: `values: 1e-3`"),
        ("inputs: 5%", 1, "`5%` is no tolerance of `inputs`", "write `inputs: exact` or `inputs: ignore`"),
        ("nodes: rise", 1, "`rise` is no tolerance of `nodes`", "`nodes: exact`"),
        ("nodes:\n  - 1", 2, "this is no tolerance of `nodes`", "or an amount"),
        ("nodes: 1\nnodes: 2", 2, "`nodes` is given twice", "leave one of them out"),
        ("values:\n  y: 1\n  y: 2", 3, "`y` is given twice", "leave one of them out"),
        ("- nodes", 1, "the file is a mapping", "write `NAME: AMOUNT`"),
        ("? [a]\n: 1", 1, "this is no name", "write `NAME: AMOUNT`"),
        ("nodes: [1", 1, "this is not YAML", "mind indentation and colons"),
    ],
)
def test_mistakes_are_shown_with_their_line(text: str, line: int, cause: str, hint: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(InputError) as error:
        read(path)
    assert error.value.place == f"{path}:{line}"
    assert error.value.cause.startswith(cause)
    assert hint in str(error.value.hint)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the tolerances"):
        read(tmp_path / "none.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not text"):
        read(binary)
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (1 << 21))
    with pytest.raises(InputError, match="bytes"):
        read(large)
    with pytest.raises(InputError, match="nested too deeply"):
        read(write(tmp_path, "[" * 100_000))
