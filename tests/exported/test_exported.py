"""What the default recipe makes of real exported graphs, held to golden files: a change shows in review.

`pytest tests/exported --bless` rewrites the files; read the difference before committing it.
"""

from collections import Counter
from pathlib import Path

import pytest

from burnish.frontends import load
from burnish.ir import text
from burnish.ir.walk import walk
from burnish.passes import recipes
from burnish.passes.pipeline import Pipeline
from burnish.tools import demo_command

HERE = Path(__file__).parent
DEMO = Path(demo_command.__file__).parent / "demo"
CASES = [(model.stem, target) for model in sorted(DEMO.glob("*.onnx")) for target in ("onnx", "ort-cpu")]


def _account(name: str, target: str) -> str:
    model = load(DEMO / f"{name}.onnx")
    run = Pipeline(recipes.named("default", target, None)).rewrite(model, check=True)
    before, after = (Counter(node.op_type for node in walk(one)) for one in (model, run.model))
    lines = [f"{name} for {target}", "", "operator before after"]
    lines += [f"{op} {before[op]} {after[op]}" for op in sorted(before | after)]
    lines += [f"all {sum(before.values())} {sum(after.values())}", "", "pass changed left-alone"]
    fired: dict[str, list[int]] = {}
    for step in run.steps:
        entry = fired.setdefault(step.spec, [0, 0])
        entry[0] += step.outcome.rewritten
        entry[1] = len(step.outcome.skipped)
    lines += [f"{spec} {changed} {left}" for spec, (changed, left) in sorted(fired.items()) if changed or left]
    return "\n".join([*lines, "", f"structure {text.structure_fingerprint(run.model)}", ""])


@pytest.mark.parametrize("name, target", CASES)
def test_the_default_recipe_does_what_it_did(name, target, request):
    golden = HERE / f"{name}-{target}.txt"
    found = _account(name, target)
    if request.config.getoption("--bless"):
        golden.write_text(found)
    assert found == golden.read_text()
