"""Write `docs/passes.md` from the passes and their golden tests: `python -m burnish.tools.research.pass_pages`.

A pass's help and options come from its docstring, the reasons to leave a site alone from `tests/passes/*.md`.
"""

from __future__ import annotations

import re
from pathlib import Path

from burnish.passes import catalog, recipes
from burnish.passes.lossy import LossyPass
from burnish.tools.passes_command import describe

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "passes.md"

_HEAD = """# Passes

Written by `python -m burnish.tools.research.pass_pages` from the passes and their golden tests; do not edit by hand.

Exact passes preserve what the model computes ([how that is proved](ideas/proof.md)). Lossy ones, which say so, change
it: they propose edits, of which a search chooses within a budget, or make those that their options name. The order in
which exact passes run, and how to choose, is on the page of [recipes](ideas/recipes.md). `burnish passes NAME` shows a
pass in the terminal. The golden file of a pass shows on small graphs what it does and what it leaves alone. Reasons are
quoted from there, with the numbers and names of those graphs.
"""

_REASON = re.compile(r"^```(?:unchanged|proposes)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LISTED = 12


def page() -> str:
    """The page as it should be."""
    table = ["| pass | what it does | runs in |", "| --- | --- | --- |"]
    table += [f"| [{one}](#{one}) | {_cell(describe(one)['summary'])} | {_recipe(one)} |" for one in catalog.names()]
    return "\n".join([_HEAD, *table, *(line for name in catalog.names() for line in _section(name))]) + "\n"


def _section(name: str) -> list[str]:
    found = describe(name)
    golden = f"tests/passes/{name.replace('-', '_')}.md"
    lossy = " Lossy." if issubclass(catalog.load(name), LossyPass) else ""
    lines = ["", f"## {name}", "", found["summary"] + lossy]
    if found["details"]:
        lines += ["", found["details"]]
    if found["options"]:
        lines += ["", "| option | default | meaning |", "| --- | --- | --- |"]
        lines += [
            f"| `{one['name']}` ({_cell(one['type'])}) | `{one['default']}` | {_cell(one['help'])} |"
            for one in found["options"]
        ]
    reasons = _reasons(ROOT / golden)
    if reasons:
        lines += ["", "Leaves a site alone because, for instance,", "", *(f"- {one}" for one in reasons)]
    return [*lines, "", f"Golden file: [{golden}](../{golden})"]


def _recipe(name: str) -> str:
    if name in recipes.NORMAL_FORM:
        return "normal form"
    for target, where in (("onnx", "default"), ("ort-cpu", "default, `ort-cpu` and `ort-cuda`")):
        if name in {one.pass_name() for one in recipes.named("default", target, None)}:
            return where
    return "on request"


def _reasons(golden: Path) -> list[str]:
    """The distinct reasons in the `unchanged` and `proposes` blocks of a golden file, in their order."""
    if not golden.is_file():
        return []
    blocks = _REASON.findall(golden.read_text(encoding="utf-8"))
    lines = [line for block in blocks for line in block.splitlines() if ": " in line and " | " not in line]
    return list(dict.fromkeys(line.split(": ", 1)[1] for line in lines))[:_LISTED]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
