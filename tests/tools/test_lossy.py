"""`optimize` with a budget: edits are searched, measured on held-out samples, and what was lost is said."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from lossy_runs import DEMO, QUICK, digits, optimize

import burnish
from burnish.backends.fx.healing_options import HealOptions
from burnish.backends.ort.kernel_times import KernelTimes
from burnish.frontends.samples import read_samples
from burnish.ir.errors import BudgetError, InputError, MissingPackageError, UnchangedError
from burnish.passes import plan
from burnish.passes.budget import budget
from burnish.passes.judging import Judged
from burnish.passes.lossy import Edit
from burnish.passes.lowrank.project_rank import ProjectRank
from burnish.passes.protocols import Verdict
from burnish.passes.search import Judgement
from burnish.tools import cli, lossy_options, lossy_report, lossy_stage, report

pytestmark = pytest.mark.usefixtures("own_cache")


def test_the_written_model_is_smaller_and_loses_what_is_said(tmp_path: Path) -> None:
    result = optimize(tmp_path)
    found = report.as_dict(result)["lossy"]
    assert found["edits"] and found["result"]["drop"] + found["result"]["spread"] <= found["budget"]["allowed"]
    assert result.sizes[1] < 0.95 * result.sizes[0]
    assert found["weights"]["before"] > found["weights"]["after"] == found["weights"]["predicted"]
    made = json.loads({p.key: p.value for p in onnx.load(tmp_path / "out.onnx").metadata_props}["burnish.fired"])
    assert [f"{edit['site']} | {edit['option']}" for edit in found["edits"]] == made[QUICK]
    runner = burnish.tools.api._open(tmp_path / "out.onnx", "onnx", False)
    with np.load(digits(tmp_path)) as data:
        right = (runner.run({"image": data["image"]})["logits"].argmax(1) == data["labels"]).mean()
    assert right >= found["original"] - 0.03
    assert result.lossy is not None and found["doubt"] is None
    assert not any("would" in line for line in lossy_report.lines(result.lossy))
    for few, why in (
        (Judgement(found["original"], 0.0, 0.05, 10, 500), "500 held-out rows cannot tell the budget"),
        (Judgement(found["original"], 0.0, 0.0, 10, 20), "none of 20 held-out rows changes"),
    ):
        result.lossy.final = few
        assert any(line.startswith(f"note      {why}") for line in lossy_report.lines(result.lossy))
        told = report.as_dict(result)["lossy"]["doubt"]
        assert told["held_out"] == few.rows < told["needed"] and str(told["needed"]) in told["why"]
    assert result.lossy.judged is not None
    result.lossy.judged.samples = [replace(one, groups=np.array(["a"])) for one in result.lossy.judged.samples]
    assert any("none of 20 held-out groups changes" in line for line in lossy_report.lines(result.lossy))
    search = result.lossy.found
    assert search is not None
    for saving, whole, why in ((0.0, True, "save no time together"), (1e-3, False, "no plan holds")):
        plans = [replace(search.plan, saving=saving, whole=whole)]
        slow = replace(result.lossy, found=replace(search, plans=plans), budget=budget("0.01", objective="latency"))
        assert why in lossy_report.why_nothing(slow)
    timed = replace(result.lossy, timed_in="in ONNX Runtime")
    for whole, how in ((True, "timed together"), (False, "each timed alone")):
        timed.found = replace(search, plan=replace(search.plan, whole=whole))
        assert any(f"the edits, {how}, save" in line for line in lossy_report.lines(timed))


def test_a_second_search_measures_nothing_and_writes_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimize(tmp_path)
    first = (tmp_path / "out.onnx").read_bytes()
    from burnish.passes import scoring

    monkeypatch.setattr(scoring, "Bench", None)
    optimize(tmp_path)
    assert (tmp_path / "out.onnx").read_bytes() == first


def test_a_second_search_for_time_times_nothing_and_chooses_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = burnish.load(DEMO / "digits_resnet.onnx")
    samples = read_samples(digits(tmp_path), model)
    todo = plan.resolve(passes=["quantize-static"], max_drop="2%", objective="latency")

    def searched() -> list[tuple[object, ...]]:
        options = lossy_options.options()
        found = lossy_stage.run(model, todo, samples, burnish.tools.api.ort_judge(todo.target), options).found
        assert found is not None
        return [(one.key, one.saving, one.whole) for one in (found.plan, *found.plans)]

    first = searched()
    assert first[0][0] and any(whole for _, _, whole in first)
    monkeypatch.setattr(KernelTimes, "_measure", None)
    assert searched() == first


def test_a_drop_is_measured_by_a_function_of_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mistakes_made.py").write_text(
        "def mistakes(outputs, labels):\n"
        "    wrong = [(one['logits'].argmax(-1) != label).mean() for one, label in zip(outputs, labels)]\n"
        "    return sum(wrong) / len(wrong)\n"
        "mistakes.higher_is_better = False\n"
        "def fails(outputs, labels):\n    raise KeyError('logit')\n"
    )
    result = optimize(tmp_path, metric="mistakes_made:mistakes", max_drop=0.02)
    found = report.as_dict(result)["lossy"]
    assert found["edits"] and 0 <= found["result"]["metric"] <= found["original"] + 0.02
    for metric in ("mistakes_made:fails", "mistakes_made:other"):
        with pytest.raises(InputError, match="KeyError: 'logit'|no function `other`") as error:
            optimize(tmp_path, metric=metric)
        assert error.value.exit_code == 2


def test_the_written_model_says_that_it_was_healed(tmp_path: Path) -> None:
    options = HealOptions(steps=12, evaluations=6, patience=6, rate=3e-4)
    result = optimize(tmp_path, passes=["remove-blocks{blocks=1}"], max_drop=None, guard=["size"], heal=options)
    made = json.loads({p.key: p.value for p in onnx.load(tmp_path / "out.onnx").metadata_props}["burnish.fired"])
    assert result.lossy is not None and result.lossy.healed is not None
    assert made["heal"] == len(result.lossy.healed.written) > 0 and made["remove-blocks{blocks=1}"] == [
        "block 1 | drop"
    ]
    assert not list((tmp_path / "cache").rglob("*.pt*"))


def test_a_metric_is_not_taken_for_what_edits_are_scored_by(tmp_path: Path) -> None:
    def divergence(outputs: list[dict[str, np.ndarray]], labels: list[Any]) -> float:
        return 1.0

    with pytest.raises(InputError, match="edits are scored by a `divergence`"):
        optimize(tmp_path, metric=divergence)


def test_passes_that_name_their_edits_need_no_data_and_no_budget(tmp_path: Path) -> None:
    result = burnish.optimize(DEMO / "digits_vit.onnx", tmp_path / "out.onnx", passes=["remove-blocks{blocks=1}"])
    assert result.lossy is not None and [edit.site for edit in result.lossy.edits] == ["block 1"]
    assert result.lossy.result is None and result.sizes[1] < 0.8 * result.sizes[0]


@pytest.mark.parametrize(
    ("one", "site"),
    [
        ("select-layers{ranges=0:1+2:3}", "blocks 0:1+2:3"),
        ("drop-mlp{blocks=1}", "block 1"),
        ("early-exit{layer=2}", "blocks 2 to 2"),
        ("tie-blocks{map=1:0}", "block 1"),
    ],
)
def test_every_pass_that_can_name_its_edits_needs_no_data(tmp_path: Path, one: str, site: str) -> None:
    result = burnish.optimize(DEMO / "digits_vit.onnx", tmp_path / "out.onnx", passes=[one], verify="off")
    assert result.lossy is not None and [edit.site for edit in result.lossy.edits] == [site]


def test_ranges_that_are_none_are_said_to_be_without_a_call_for_data(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="`2:1` are no ranges of the blocks 0 to 2"):
        burnish.optimize(DEMO / "digits_vit.onnx", tmp_path / "out.onnx", passes=["select-layers{ranges=2:1}"])
    assert not (tmp_path / "out.onnx").exists()


def test_passes_that_name_their_edits_are_measured_where_there_is_data(tmp_path: Path) -> None:
    result = optimize(tmp_path, passes=["remove-blocks{blocks=1}"], max_drop=None)
    assert result.lossy is not None and result.lossy.final is not None and result.lossy.final.drop > 0


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        ({"data": None}, "no samples"),
        ({"passes": ["remove-blocks"], "max_drop": None}, "how much may be lost"),
        ({"passes": ["remove-blocks{blocks=1}"]}, "name its edits"),
        ({"max_drop": "much"}, "no amount"),
        ({"metric": "acuracy"}, "no metric"),
        ({"without": ["project-rank"]}, "no lossy pass is left"),
        ({"without": ["project-rank"], "max_drop": None}, "no lossy pass is left"),
        (
            {"recipe": "int4", "passes": None, "without": ["quantize-weights"], "max_drop": None},
            "no lossy pass is left",
        ),
    ],
)
def test_what_contradicts_or_is_missing_is_said_before_anything_is_scored(
    tmp_path: Path, arguments: dict[str, object], cause: str
) -> None:
    with pytest.raises(InputError, match=cause) as error:
        optimize(tmp_path, **arguments)
    assert error.value.hint and not (tmp_path / "out.onnx").exists()


def test_a_size_that_cannot_be_had_ends_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="the nearest is") as error:
        optimize(tmp_path, max_drop=None, max_size="5%")
    assert error.value.exit_code == 1 and not (tmp_path / "out.onnx").exists()


def test_a_model_without_residual_blocks_says_why_none_is_removed(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20]> g (float[N,4] x) => (float[N,4] y) { y = Relu(x) }'
    )
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).random((64, 1, 4), np.float32))
    with pytest.raises(InputError, match="the model has no residual blocks"):
        burnish.optimize(model, data=tmp_path / "x.npz", passes=["remove-blocks"], max_drop="1%")
    cause = "nothing can be edited: `remove-blocks`, `drop-attention`, `drop-mlp`: the model has no residual blocks"
    with pytest.raises(UnchangedError, match=cause):
        burnish.optimize(model, data=tmp_path / "x.npz", max_drop="1%")


def test_what_a_search_left_alone_is_listed_with_what_it_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    passes = ["remove-blocks", QUICK]
    report.why(optimize(tmp_path, passes=passes), "remove-blocks")
    said = capsys.readouterr().out
    assert "3 eligible, 3 matched, 0 changed" in said and said.count(", drop (alone: error ") == 3
    with pytest.raises(UnchangedError, match=r"`remove-blocks` .* changed nothing: (a chosen edit|the search)"):
        optimize(tmp_path, passes=passes, require=["remove-blocks"])


def test_the_metric_of_a_recipe_file_is_taken(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("passes:\n  - project-rank: {ranks: 1, joint: False}\nmax-drop: 2%\nmetric: agreement\n")
    found = optimize(tmp_path, recipe=recipe, passes=None, max_drop=None).lossy
    assert found is not None and found.measure is not None and found.measure.name == "agreement"


def test_a_report_is_valid_json_whatever_was_measured(tmp_path: Path) -> None:
    with np.load(DEMO / "digits.npz") as data:
        np.savez(tmp_path / "two.npz", image=data["image"][:2], labels=data["label"][:2])
    report.write(optimize(tmp_path, data=tmp_path / "two.npz", max_size="100%"), tmp_path / "report.json")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    found = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)["lossy"]
    assert found["result"]["spread"] == "infinite"


def test_a_time_that_was_wanted_and_is_not_measured_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = optimize(tmp_path)
    assert result.lossy is not None
    result.lossy.budget = budget(max_latency="80%")
    for ratio, said in ((0.75, False), (1.2, True)):
        result.lossy.latency = Verdict(ratio, ratio - 0.1, ratio + 0.1, False, False, 9)
        report.show(result)
        assert ("80 % of the time was wanted" in capsys.readouterr().out) == said


def test_scores_that_cannot_be_kept_are_said(
    tmp_path: Path, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own_cache.write_text("no folder")
    options = HealOptions(steps=1, evaluations=1)
    report.show(optimize(tmp_path, passes=["remove-blocks"], max_drop="90%", heal=options))
    assert f"scores are not kept, `{own_cache}" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["metric", "heal", "objective", "workers", "pairs"])
def test_an_option_that_would_do_nothing_is_refused(tmp_path: Path, option: str) -> None:
    value = {"metric": "accuracy", "objective": "latency", "workers": 2}.get(option, True)
    with pytest.raises(InputError, match=f"`{option}` is for") as error:
        optimize(tmp_path, passes=[], max_drop=None, **{option: value})
    assert error.value.hint and not (tmp_path / "out.onnx").exists()


def test_the_printed_python_shows_and_draws_what_the_command_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(digits(tmp_path))
    words = ["optimize", str(DEMO / "digits_vit.onnx"), "--data", data, "-p", QUICK, "--max-drop", "2%", "--dry-run"]

    def run(*more: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [*words, *more])
        with pytest.raises(SystemExit) as stopped:
            cli.optimize_main()
        return int(stopped.value.code or 0), capsys.readouterr().out

    code, program = run("--plot", str(tmp_path / "plan.svg"), "--as-python")
    exec(compile(program, "<as-python>", "exec"), {})
    assert code == 0 and "Edits, each measured alone" in capsys.readouterr().out
    assert (tmp_path / "plan.svg").read_text().rstrip().endswith("</svg>")


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"passes": ["parallel-blocks"]}, "none of the edits makes the model smaller"),
        ({"max_drop": 1e-9, "metric": "relative-error"}, "no edit stays within the budget"),
        (
            {"passes": [QUICK, "quantize-weights{bits=2}"], "max_drop": 1e-9, "metric": "relative-error"},
            "no edit stays within the budget",
        ),
    ],
)
def test_a_search_that_makes_no_edit_ends_with_exit_code_4_whatever_the_passes(
    tmp_path: Path, given: dict[str, Any], why: str
) -> None:
    with pytest.raises(UnchangedError, match=f"no edit is made: {why}") as stopped:
        optimize(tmp_path, **given)
    assert stopped.value.exit_code == 4 and not (tmp_path / "out.onnx").exists()


def test_a_size_that_the_model_has_is_told_in_the_first_line(tmp_path: Path) -> None:
    found = optimize(tmp_path, max_drop=1e-9, metric="relative-error", max_size="100%").lossy
    assert found is not None and not found.edits and (tmp_path / "out.onnx").exists()
    assert lossy_report.lines(found)[0].endswith(": the model is within the budget as it is")


def test_healing_without_torch_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingPackageError, match="healing needs PyTorch") as error:
        optimize(tmp_path, heal=True)
    assert error.value.exit_code == 2 and error.value.hint == "pip install 'burnish[torch]'"


@pytest.mark.parametrize("passes", [["remove-blocks{blocks=1}"], [QUICK]])
def test_nodes_without_names_are_edited_like_others(tmp_path: Path, passes: list[str]) -> None:
    model = onnx.load(DEMO / "digits_vit.onnx")
    for node in model.graph.node:
        node.name = ""
    onnx.save(model, tmp_path / "unnamed.onnx")
    drop = None if passes == ["remove-blocks{blocks=1}"] else "2%"
    wanted = optimize(tmp_path, passes=passes, max_drop=drop).lossy
    given = {"data": digits(tmp_path), "passes": passes, "max_drop": drop}
    found = burnish.optimize(tmp_path / "unnamed.onnx", **given).lossy  # type: ignore[arg-type]
    assert found is not None and wanted is not None and found.final == wanted.final
    assert [edit.option for edit in found.edits] == [edit.option for edit in wanted.edits]


def test_a_picture_of_no_search_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "plan.svg"
    for output, cause in ((tmp_path / "out.onnx", "nothing is searched"), (plot, "the name of another output")):
        monkeypatch.setattr(
            sys, "argv", ["optimize", str(DEMO / "digits_vit.onnx"), "-o", str(output), "--plot", str(plot)]
        )
        with pytest.raises(SystemExit) as stopped:
            cli.optimize_main()
        assert stopped.value.code == 2 and cause in capsys.readouterr().err
        assert not output.exists() and not plot.exists()


def test_what_is_saved_is_measured_and_not_only_promised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    propose = ProjectRank.propose

    def boast(self: ProjectRank, *arguments: Any) -> list[Edit]:
        edits = propose(self, *arguments)
        return [replace(one, savings=replace(one.savings, bytes=2 * one.savings.bytes)) for one in edits]

    monkeypatch.setattr(ProjectRank, "propose", boast)
    with pytest.raises(BudgetError, match="together to") as error:
        optimize(tmp_path, max_drop=None, max_size="40%")
    assert error.value.exit_code == 1 and not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize(("drop", "error"), [(0.0201, 0.0), (0.0151, 0.005)])
def test_what_loses_more_once_it_is_written_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drop: float, error: float
) -> None:
    found = lambda self, runner, model: Judgement(0.9, drop * self.original, error * self.original)  # noqa: E731
    monkeypatch.setattr(Judged, "of_runner", found)
    monkeypatch.setattr(Judged, "of", lambda self, model: Judgement(0.98, 0.0, 0.0))
    with pytest.raises(BudgetError, match="what would be written loses") as refused:
        optimize(tmp_path)
    assert refused.value.exit_code == 1 and not (tmp_path / "out.onnx").exists()
