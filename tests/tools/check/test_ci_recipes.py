"""The workflow and the pre-commit hook of the documentation: their commands are executed in a git repository."""

from __future__ import annotations

import html
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
import yaml
from examples import blocks

from burnish.tools import check_api

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "ideas" / "regression.md"
MODEL = """<ir_version: 8, opset_import: ["": 17]>
g (float[batch, 3] x) => (float[batch, 2] y) <float[3, 2] w = {1, 2, 3, 4, 5, 6}> { h = MatMul (x, w)  y = ACT (h) }"""


def documented(name: str) -> Any:
    """A YAML file that the page shows."""
    found = [block.text for block in blocks(PAGE.read_text()) if block.kind == "yaml" and block.words == (name,)]
    assert len(found) == 1
    return yaml.safe_load(found[0])


WORKFLOW = documented(".github/workflows/models.yml")
STEPS: list[dict[str, Any]] = WORKFLOW["jobs"]["check"]["steps"]
(HOOK,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())


@dataclass
class Repository:
    """A git repository with models, on a branch off `origin/main`, and the environment of a job."""

    root: Path
    temporary: Path
    environment: dict[str, str]

    def save(self, path: str, activation: str = "Relu", **names: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        text = MODEL.replace("ACT", activation)
        for old, new in names.items():
            text = re.sub(rf"\b{old}\b", new, text)
        onnx.save(onnx.parser.parse_model(text), self.root / path)

    def lock(self, path: str) -> None:
        check_api.lock(str(self.root / path), check_api.beside(self.root / path))

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=self.root, env=self.environment, capture_output=True, text=True, check=False, timeout=120
        )

    def git(self, *arguments: str) -> None:
        done = self.run("git", "-c", "user.name=a", "-c", "user.email=a@example.org", *arguments)
        assert done.returncode == 0, done.stderr

    def commit(self) -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", "change")

    def job(self) -> subprocess.CompletedProcess[str]:
        """Run the job's commands but the installation, up to the first that fails, as a runner does."""
        done = None
        for step in STEPS:
            if "run" in step and step["name"] != "Install":
                done = self.run("bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"])
                if done.returncode:
                    break
        assert done is not None
        return done

    @property
    def summary(self) -> str:
        """The step's summary as it is shown."""
        path = Path(self.environment["GITHUB_STEP_SUMMARY"])
        return html.unescape(path.read_text()) if path.exists() else ""


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    root, temporary, programs = (tmp_path / name for name in ("repository", "temporary", "bin"))
    for folder in (root, temporary, programs):
        folder.mkdir()
    (programs / "burnish").write_text(f"#!{sys.executable}\nfrom burnish.tools.cli import main\nmain()\n")
    (programs / "burnish").chmod(0o755)
    made = Repository(
        root,
        temporary,
        {
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT / ".src"),
            "HOME": str(tmp_path),
            "OMP_NUM_THREADS": "1",
            "GITHUB_ACTIONS": "true",
            "GITHUB_WORKSPACE": str(root),
            "GITHUB_BASE_REF": "main",
            "GITHUB_STEP_SUMMARY": str(temporary / "summary.md"),
            "RUNNER_TEMP": str(temporary),
        },
    )
    made.git("init", "--quiet", "--initial-branch", "main")
    for path in ("models/net.onnx", "models/deep/other net.onnx"):
        made.save(path)
        made.lock(path)
    made.save("elsewhere/free.onnx")
    made.commit()
    made.git("update-ref", "refs/remotes/origin/main", "HEAD")
    made.git("switch", "--quiet", "--create", "change")
    return made


def test_the_workflow_is_one() -> None:
    assert set(WORKFLOW) == {"name", True, "permissions", "defaults", "jobs"}, "YAML 1.1 reads `on` as true"
    assert WORKFLOW["permissions"] == {"contents": "read", "security-events": "write"}
    assert WORKFLOW["defaults"]["run"]["shell"] == "bash", "the commands count on pipefail"
    used = [step["uses"] for step in STEPS if "uses" in step]
    assert len(used) == 4 and all(re.fullmatch(r"[\w-]+(/[\w-]+)+@v\d+", name) for name in used)
    python = next(step["with"] for step in STEPS if "setup-python" in step.get("uses", ""))
    assert python["cache"] == "pip"
    assert python["cache-dependency-path"] == ".github/workflows/models.yml"


def test_a_pull_request_that_changes_no_model_is_fine(repository: Repository) -> None:
    repository.save("elsewhere/free.onnx", "Sigmoid")
    repository.commit()
    done = repository.job()
    assert (done.returncode, done.stdout, repository.summary) == (0, "", "")


def test_a_regression_fails_and_is_shown(repository: Repository) -> None:
    repository.save("models/net.onnx", "Sigmoid")
    repository.save("models/deep/other net.onnx", h="hidden")
    repository.commit()
    done = repository.job()
    assert done.returncode == 123
    printed = done.stdout + done.stderr
    (annotation,) = re.findall(r"^::error (.*)$", printed, re.MULTILINE)
    line = re.match(r"file=models/net\.lock\.yaml,line=(\d+),title=[^:]*models/net\.onnx::.*Sigmoid", annotation)
    assert line and int(line[1]) <= len((repository.root / "models/net.lock.yaml").read_text().splitlines())
    assert "Traceback" not in printed
    assert "models/net.onnx" in repository.summary and "Sigmoid" in repository.summary
    assert "models/deep/other net.onnx" in repository.summary

    shown = {step["uses"].split("@")[0]: step for step in STEPS if "if" in step}
    files = {
        "github/codeql-action/upload-sarif": ("sarif_file", ["burnish.sarif"]),
        "actions/upload-artifact": ("path", ["burnish.html", "burnish.xml"]),
    }
    assert {name: step["if"] for name, step in shown.items()} == {
        name: f"always() && hashFiles('{written[-1]}') != ''" for name, (_, written) in files.items()
    }
    for name, (key, written) in files.items():
        assert shown[name]["with"][key].split() == written
        assert all((repository.root / one).is_file() for one in written)
    results = json.loads((repository.root / "burnish.sarif").read_text())["runs"][0]["results"]
    assert [one["level"] for one in results].count("error") == 1
    suites = ET.parse(repository.root / "burnish.xml").getroot()
    assert len(suites.findall(".//testcase")) >= 2 and len(suites.findall(".//failure")) == 1


def test_an_accepted_change_passes(repository: Repository) -> None:
    repository.save("models/net.onnx", "Sigmoid")
    repository.lock("models/net.onnx")
    repository.commit()
    done = repository.job()
    assert done.returncode == 0, done.stderr
    assert "::error" not in done.stdout + done.stderr


def test_a_lost_lock_fails(repository: Repository) -> None:
    repository.git("mv", "models/net.lock.yaml", "models/deep/net.lock.yaml")
    repository.commit()
    done = repository.job()
    assert done.returncode == 123
    assert re.search(r"^::error file=models/net\.onnx,.*lock", done.stdout + done.stderr, re.MULTILINE)


def test_the_hook_is_one() -> None:
    (config,) = documented(".pre-commit-config.yaml")["repos"]
    assert [hook["id"] for hook in config["hooks"]] == [HOOK["id"]] == ["burnish-check"]
    assert HOOK["language"] == "python"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert HOOK["additional_dependencies"] == project["optional-dependencies"]["cpu"]
    assert shlex.split(HOOK["entry"])[0] in project["scripts"]


def test_the_hook_checks_staged_models_that_have_a_lock(repository: Repository) -> None:
    del repository.environment["GITHUB_ACTIONS"]
    repository.save("models/deep/other net.onnx", h="hidden")
    repository.save("elsewhere/free.onnx", "Sigmoid")

    def hook() -> subprocess.CompletedProcess[str]:
        repository.git("add", "--all")
        listed = repository.run("git", "diff", "--staged", "--name-only", "--diff-filter=ACMRT", "-z").stdout
        staged = [name for name in listed.split("\0") if re.search(HOOK["files"], name)]
        return repository.run(*shlex.split(HOOK["entry"]), *staged)

    fine = hook()
    assert fine.returncode == 0, fine.stderr
    assert "free.onnx" not in fine.stdout.splitlines()[0]
    repository.save("models/net.onnx", "Sigmoid")
    regressed = hook()
    assert regressed.returncode == 1
    assert "Sigmoid" in regressed.stdout
