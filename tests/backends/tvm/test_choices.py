"""Choices of regions that were made before: made again without measuring, while all that they depend on is the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as oir
import pytest
from golden import parse_graph

import burnish
from burnish.ir.errors import VerificationError

tvm = pytest.importorskip("tvm")

from burnish.backends.tvm import beside, choices, compiling, load, loading  # noqa: E402
from burnish.backends.tvm.choices import Choices  # noqa: E402
from burnish.backends.tvm.choose import Chooser, Chosen  # noqa: E402
from burnish.backends.tvm.target import parse  # noqa: E402
from burnish.ir.samples import Sample  # noqa: E402
from burnish.passes.protocols import Verdict  # noqa: E402
from burnish.passes.score_store import Store  # noqa: E402
from burnish.passes.verify import COMPILED  # noqa: E402
from burnish.tools import api, compiled  # noqa: E402

TEXT = """g (float[n, 4] x) => (float[k, 4] z, float[2, k] places)
    <float[4, 4] w, float[1, 4] v, int64[1] one = {1}> {
    m = MatMul(x, w)  i = NonZero(m)  places = Cast<to=1>(i)  t = Transpose(i)  r = GatherND(m, t)
    u = Unsqueeze(r, one)  b = MatMul(u, v)  z = Tanh(b) }"""

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the regions that are compiled to be measured; those with a Tanh are faster."""
    seen: list[int] = []
    wins: list[bool] = []
    measure = Chooser._measured

    def watched(self: Chooser, region: Any) -> Any:
        seen.append(len(region.nodes))
        wins.append(any(node.op_type == "Tanh" for node in region.nodes))
        return measure(self, region)

    def slower(a: Any, b: Any, *, budget: float, margin: float, least: int, alone: bool = False) -> Verdict:
        whole = budget == 2.0
        faster = not whole and wins[-1]
        ratio = 1.0 if whole else 0.5 if faster else 2.0
        return Verdict(ratio, ratio - 0.01, ratio + 0.01, slower=ratio > 1, faster=faster, rounds=9)

    monkeypatch.setattr(Chooser, "_measured", watched)
    monkeypatch.setattr(beside.timing, "slower", slower)
    monkeypatch.setattr(beside, "once", lambda call: 1.0)
    return seen


def model(scale: float = 1.0) -> oir.Model:
    """Two regions that can be compiled around one that cannot; weights times `scale`."""
    found = oir.from_proto(parse_graph(f'<ir_version: 9, opset_import: ["": 20]> {TEXT}'))
    if scale != 1.0:
        held = found.graph.initializers["w"]
        assert held.const_value is not None
        held.const_value = oir.tensor(held.const_value.numpy() * np.float32(scale), name="w")
    return found


def chooser(
    store: Path,
    *,
    of: oir.Model | None = None,
    rows: int = 3,
    records: dict[str, str] | None = None,
    version: str = "1",
    **options: Any,
) -> Chooser:
    """What chooses regions, and keeps choices in a store."""
    target, files = parse("llvm"), records or {}
    kept = Choices(Store(store), target, version, records, lambda name: files.get(name, ""), **options)
    x = np.random.default_rng(rows).standard_normal((rows, 4)).astype(np.float32)
    return Chooser(
        of or model(),
        target,
        [Sample("some", {"x": x})],
        api.ort_judge("onnx"),
        lambda fused: (compiling.scheduled(fused, target), 0),
        choices=kept,
        **options,
    )


def choice(store: Path, **options: Any) -> tuple[Chooser, list[Chosen]]:
    """A chooser that has kept its choice, and what it chose."""
    one = chooser(store, **options)
    found = one.choose()
    one.keep()
    return one, found


def shown(found: list[Chosen]) -> list[Any]:
    """Regions and what was measured of them, the day left out."""
    return [
        (one.region.kind, [node.op_type for node in one.region.nodes], one.evidence.ratio, one.evidence.note)
        for one in found
    ]


def test_the_same_choice_is_made_again_without_compiling_anything(tmp_path: Path, measured: list[int]) -> None:
    first, found = choice(tmp_path / "store")
    assert [one.region.kind for one in found] == ["ort", "tvm"] and len(measured) == len(first.tried) >= 2
    assert first.date == "" and all(one.evidence.date == "" for one in found)
    count = len(measured)
    second, again = choice(tmp_path / "store")
    assert len(measured) == count and second.tried == [] and shown(again) == shown(found)
    assert second.date and all(one.evidence.date == second.date for one in again)


def changed(module: Any, name: str, value: Any) -> Callable[[pytest.MonkeyPatch], dict[str, Any]]:
    """Something that a choice depends on, replaced."""

    def change(patch: pytest.MonkeyPatch) -> dict[str, Any]:
        patch.setattr(module, name, value)
        return {}

    return change


RECORDS: dict[str, Any] = {"records": {"kernel.jsonl": "digest"}}
CHANGES: dict[str, Callable[[pytest.MonkeyPatch], dict[str, Any]]] = {
    "other weights": lambda patch: {"of": model(2.0)},
    "other samples": lambda patch: {"rows": 4},
    "all regions": lambda patch: {"everything": True},
    "a record": lambda patch: {"records": {"kernel.jsonl": "other"}},
    "a record is gone": lambda patch: {"records": {}},
    "no records at all": lambda patch: {"records": None},
    "the processor": changed(choices, "processor", lambda: "another, 2 processors"),
    "burnish": lambda patch: {"version": "2"},
    "TVM": changed(choices.versions, "found", lambda: {"apache-tvm": "99.0"}),
    "the code that compiles": changed(choices, "_sources", lambda: "other"),
    "the allowed error": changed(choices, "COMPILED", COMPILED | {"float32": 1e-3}),
    "ONNX Runtime": changed(choices, "runtime", lambda: type("Other", (), {"__version__": "99.0"})),
}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a choice that looked up a record."""
    store = tmp_path_factory.mktemp("kept") / "store"
    choice(store, **RECORDS)
    return store


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_choice_depends_on_is_measured_anew(change: str, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chooser(kept, **RECORDS).date
    assert chooser(kept, **(RECORDS | CHANGES[change](monkeypatch))).before is None


BROKEN = ["no choice", {}, {"date": "x", "stay": {"99": "y"}, "tried": [], "records": {}}]


def test_what_is_no_choice_is_measured_anew(kept: Path, tmp_path: Path) -> None:
    store = shutil.copytree(kept.parent, tmp_path / "copy") / kept.name
    assert chooser(store, **RECORDS).date
    for broken in BROKEN:
        database = Store(store)._database
        with database:
            assert database.execute("update scores set found = ?", [json.dumps(broken)]).rowcount
        assert chooser(store, **RECORDS).before is None


def test_a_region_that_goes_back_stays_back(tmp_path: Path, measured: list[int]) -> None:
    one, _ = choice(tmp_path / "store")
    assert one.fewer("the whole is slower") is not None
    one.keep()
    again, found = choice(tmp_path / "store")
    assert {part.region.kind for part in found} == {"ort"}
    assert again.tried == [] and "the whole is slower" in set(found[-1].region.reasons.values())


def optimize(tmp_path: Path, given: oir.Model | None = None, **options: Any) -> api.Result:
    """The command, with a folder of records."""
    (tmp_path / "records").mkdir(exist_ok=True)
    options |= {"target": "llvm", "tuning_db": tmp_path / "records", "dims": "" if given else "n=3"}
    return burnish.optimize(given or model(), tmp_path / "out", **options)


def test_a_second_run_says_when_times_were_measured_and_compares_numbers_again(
    tmp_path: Path, measured: list[int]
) -> None:
    first = optimize(tmp_path).compiled
    count = len(measured)
    second = optimize(tmp_path).compiled
    assert first is not None and second is not None and len(measured) == count > 0
    assert first.manifest.steps[-1].kind == "tvm" and first.chosen == ""
    assert not any(line.startswith("chosen") for line in compiled.lines(first))
    assert any(f"chosen    as on {second.chosen}" in line for line in compiled.lines(second))
    assert second.verification is not None and second.verification.holds and second.manifest.verified
    steps = load(tmp_path / "out").manifest.steps
    assert {step.evidence.date for step in steps} == {second.chosen} == {compiled.as_dict(second)["chosen"]}


def test_where_nothing_was_timed_nothing_is_said_of_it(tmp_path: Path) -> None:
    given = oir.from_proto(
        parse_graph('<ir_version: 9, opset_import: ["": 20]> g (float[3] x) => (float[3] y) { y = Tanh(x) }')
    )
    for _ in range(2):
        made = optimize(tmp_path, given, regions="all", guard=["size"]).compiled
        assert made is not None and made.chosen == "" and made.manifest.verified


def test_a_cache_that_was_damaged_is_told(tmp_path: Path, measured: list[int]) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "scores.sqlite").write_bytes(b"no database" * 100)
    made = optimize(tmp_path).compiled
    assert made is not None and any("was damaged" in line for line in compiled.lines(made))


def test_a_run_without_records_is_no_answer_for_one_with_some(tmp_path: Path, measured: list[int]) -> None:
    burnish.optimize(model(), tmp_path / "out", target="llvm", dims="n=3")
    count = len(measured)
    made = optimize(tmp_path).compiled
    assert made is not None and made.chosen == "" and len(measured) > count


def test_a_record_that_appears_is_measured(tmp_path: Path, measured: list[int]) -> None:
    optimize(tmp_path)
    count = len(measured)
    (found,) = Store(None)._database.execute("select found from scores").fetchone()
    looked_up = json.loads(found)["records"]
    assert looked_up and set(looked_up.values()) == {""}
    (tmp_path / "records" / next(iter(looked_up))).write_text("none of a database\n")
    again = optimize(tmp_path).compiled
    assert again is not None and again.chosen == "" and len(measured) == 2 * count
    last = optimize(tmp_path).compiled
    assert last is not None and last.chosen


def test_wrong_code_is_found_whatever_was_measured_before(
    tmp_path: Path, measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "g (float[3, 4, 4] x) => (float[3] y) <float[4, 4] w> { a = MatMul(x, w)  b = Det(a)  y = Tanh(b) }"
    given = oir.from_proto(parse_graph(f'<ir_version: 9, opset_import: ["": 20]> {text}'))
    optimize(tmp_path, given, regions="all")
    count = len(measured)
    run = loading.ArtifactRunner.run
    monkeypatch.setattr(
        loading.ArtifactRunner, "run", lambda self, given: {n: a + 1 for n, a in run(self, given).items()}
    )
    with pytest.raises(VerificationError, match="computes something else"):
        optimize(tmp_path, given, regions="all")
    assert len(measured) == count > 0


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Verdict]]:
    """What timings say, in order."""
    left: list[Verdict] = []
    monkeypatch.setattr(beside.timing, "slower", lambda a, b, **options: left.pop(0))
    yield left


def test_what_seems_faster_is_measured_again_and_the_worse_answer_counts(answers: list[Verdict]) -> None:
    lucky = Verdict(0.9, 0.85, 0.95, slower=False, faster=True, rounds=6)
    unclear = Verdict(1.0, 0.9, 1.1, slower=False, faster=False, rounds=12)
    answers += [unclear, lucky]
    assert beside.compare(lambda: 0, lambda: 0) is unclear and answers == [lucky]
    answers += [unclear]
    assert beside.compare(lambda: 0, lambda: 0) is unclear and answers == []
    answers += [lucky, lucky]
    assert beside.compare(lambda: 0, lambda: 0).faster and answers == []


@pytest.mark.parametrize(("low", "high", "kinds"), [(0.9, 1.1, {"ort"}), (0.97, 1.02, {"ort", "tvm"})])
def test_where_it_is_not_clear_that_the_whole_is_no_slower_it_is_onnx_runtimes(
    low: float, high: float, kinds: set[str], tmp_path: Path, measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    slower = beside.timing.slower

    def verdict(a: Any, b: Any, **options: Any) -> Verdict:
        if options["budget"] != 2.0:
            return slower(a, b, **options)
        return Verdict(0.99, low, high, slower=False, faster=False, rounds=options["least"])

    monkeypatch.setattr(beside.timing, "slower", verdict)
    made = optimize(tmp_path).compiled
    assert made is not None and {step.kind for step in made.manifest.steps} == kinds
