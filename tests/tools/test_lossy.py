"""`optimize` with a budget: edits are searched, measured on held-out samples, and what was lost is said."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest

import burnish
from burnish.ir.errors import BudgetError, InputError, UnchangedError
from burnish.tools import cli, report

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "tools" / "demo"
QUICK = "project-rank{ranks=1,joint=False}"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of scores for each test."""
    monkeypatch.setenv("BURNISH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def digits(tmp_path: Path, count: int = 200, **changed: np.ndarray) -> Path:
    """A file with some labelled digits."""
    with np.load(DEMO / "digits.npz") as data:
        arrays = {"image": data["image"][:count], "labels": data["label"][:count]} | changed
    np.savez(tmp_path / "digits.npz", **{name: array for name, array in arrays.items() if array is not None})
    return tmp_path / "digits.npz"


def optimize(tmp_path: Path, model: str = "digits_vit", **arguments: object) -> burnish.tools.api.Result:  # type: ignore[name-defined]
    """A run on labelled digits."""
    chosen: dict[str, object] = {"data": digits(tmp_path), "passes": [QUICK], "max_drop": "2%"} | arguments
    return burnish.optimize(DEMO / f"{model}.onnx", tmp_path / "out.onnx", **chosen)  # type: ignore[arg-type]


def test_the_written_model_is_smaller_and_loses_what_is_said(tmp_path: Path) -> None:
    result = optimize(tmp_path)
    found = report.as_dict(result)["lossy"]
    assert found["edits"] and found["result"]["drop"] + found["result"]["spread"] <= found["budget"]["allowed"]
    assert result.sizes[1] < 0.95 * result.sizes[0]
    made = json.loads({p.key: p.value for p in onnx.load(tmp_path / "out.onnx").metadata_props}["burnish.fired"])
    assert [f"{edit['site']} | {edit['option']}" for edit in found["edits"]] == made[QUICK]
    runner = burnish.tools.api._open(tmp_path / "out.onnx", "onnx", False)
    with np.load(digits(tmp_path)) as data:
        right = (runner.run({"image": data["image"]})["logits"].argmax(1) == data["labels"]).mean()
    assert right >= found["original"] - 0.03


def test_a_second_search_measures_nothing_and_writes_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimize(tmp_path)
    first = (tmp_path / "out.onnx").read_bytes()
    from burnish.passes import scoring

    monkeypatch.setattr(scoring, "Bench", None)
    optimize(tmp_path)
    assert (tmp_path / "out.onnx").read_bytes() == first


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


def test_passes_that_name_their_edits_need_no_data_and_no_budget(tmp_path: Path) -> None:
    result = burnish.optimize(DEMO / "digits_vit.onnx", tmp_path / "out.onnx", passes=["remove-blocks{blocks=1}"])
    assert result.lossy is not None and [edit.site for edit in result.lossy.edits] == ["block 1"]
    assert result.lossy.result is None and result.sizes[1] < 0.8 * result.sizes[0]


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
    with pytest.raises(InputError, match="nothing can be edited: `remove-blocks`: the model has no residual blocks"):
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
    report.write(optimize(tmp_path, data=tmp_path / "two.npz"), tmp_path / "report.json")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    found = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)["lossy"]
    assert found["result"]["spread"] == "infinite"


def test_scores_that_cannot_be_kept_are_said(
    tmp_path: Path, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own_cache.write_text("no folder")
    report.show(optimize(tmp_path))
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


def test_a_picture_of_no_search_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output, plot = tmp_path / "out.onnx", tmp_path / "plan.svg"
    monkeypatch.setattr(
        sys, "argv", ["optimize", str(DEMO / "digits_vit.onnx"), "-o", str(output), "--plot", str(plot)]
    )
    with pytest.raises(SystemExit) as stopped:
        cli.optimize_main()
    assert stopped.value.code == 2 and "nothing is searched" in capsys.readouterr().err
    assert not output.exists() and not plot.exists()


@pytest.mark.parametrize("seconds", [0.8, 2.0, 3.2])
def test_a_search_that_is_killed_goes_on_and_ends_with_the_same_bytes(tmp_path: Path, seconds: float) -> None:
    data = digits(tmp_path)
    command = [
        sys.executable,
        "-c",
        "from burnish.tools.cli import main; main()",
        "optimize",
        str(DEMO / "digits_vit.onnx"),
        "--data",
        str(data),
    ]
    command += ["--max-drop", "2%", "-p", QUICK, "-o"]

    def start(output: str, cache: str) -> subprocess.Popen[bytes]:
        environment = os.environ | {"BURNISH_CACHE": str(tmp_path / cache), "PYTHONPATH": str(ROOT / ".src")}
        return subprocess.Popen([*command, str(tmp_path / output)], env=environment, stdout=subprocess.DEVNULL)

    assert start("whole.onnx", "one").wait() == 0
    killed = start("out.onnx", "other")
    time.sleep(seconds)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert killed.returncode == 0 or not (tmp_path / "out.onnx").exists()
    assert start("out.onnx", "other").wait() == 0
    assert (tmp_path / "out.onnx").read_bytes() == (tmp_path / "whole.onnx").read_bytes()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"digits.npz", "whole.onnx", "out.onnx", "one", "other"}
