"""What the cost sections of `inspect` account for on real and random models: `python -m burnish.tools.research.costs`.

Writes `docs/results/costs.md`: how far ONNX Runtime's kernels are traced back to the nodes of the file, and the planned
memory beside what ONNX Runtime requests. The models are those of `.zoo` (`tools/research/zoo.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from burnish.backends.ort import footprint, profiling, replaced
from burnish.backends.ort.session import executor
from burnish.frontends import onnx_file
from burnish.ir import arena, concrete, cost, liveness
from burnish.ir.errors import BurnishError
from burnish.tools import terminal
from burnish.tools.subject import Subject

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "results" / "costs.md"
MODELS = (
    "a1-efficientnet a2-minilm a3-smollm2-nocache a3-smollm2-kv a4-silero a5-magika a6-ppocr-cls a6-ppocr-det "
    "a6-ppocr-rec resnet-dynp mobilenet-ts efficientnet-dynp vit-timm-dyn swin-ts bert-s-ts gpt2-dynp llama-nocache-ts "
    "llama-kv-dynp gemma-ts qwen-ts phi-ts t5-ts mixtral-ts mixtral-loop-ts mamba-dynp unet-dynp genai-llama-int4"
).split()

INTRODUCTION = """# What the cost sections account for

Made by `tools/research/costs.py` with ONNX Runtime {version}, one thread. Every model runs with the first of its
made samples; numbers depend on the sizes there, and on the instruction sets of the processor, which decide how ONNX
Runtime rewrites a graph.

`kernels` are the nodes that ONNX Runtime runs after its own optimizations. `traced` are those of them that have a
row of their own in [`inspect --utilization`](../inspect/utilization.md) with the nodes of the file whose work they
do; `inserted` ones ONNX Runtime put in to change layouts and types; the rest share a row with others, since it
cannot be told apart what each did. `nodes` are those of the file (functions inlined, constants left out), and `not
run` those that were computed before the run or are not needed. `multiply-adds in rows` is the part of the model's
multiply-adds that rows account for; a `?` means that some are not known.

The four columns on the right are bytes of activations, inputs left out: each on its own, in place, and in the
shared arena of [`inspect --memory`](../inspect/memory.md), and what ONNX Runtime's kernels requested at the worst
moment of the first run, scratch memory included. ONNX Runtime fuses nodes, so some activations of the file it does
not need at all, and what is computed from weights alone (a transposed weight) it computes before the run.
"""


def row(name: str) -> list[str]:
    """The cells of one model; raises BurnishError when it cannot be run."""
    model = onnx_file.read(ROOT / ".zoo" / f"{name}.onnx")
    runner = executor(lean=True)(model)
    sample = Subject(model).sample(runner)
    runner.close()
    copy, _ = replaced.labelled(model)
    found = profiling.profile(copy, sample.feeds, seconds=0.01)
    rows, idle = replaced.shares(copy.graph, found.graph, found.kernels)
    numbers = cost.dims_of(model, sample.feeds)
    sized = concrete.concrete(copy, numbers)
    if replaced.add_shapes(sized.graph, found.kernels):
        sized = concrete.concrete(sized, numbers)
    nodes = {node.name: node for node in sized.graph}
    macs = {name: cost.node_cost(node, numbers).macs for name, node in nodes.items()}
    whole = list(macs.values())
    known = sum(number for number in whole if number is not None)
    inside = sum(macs[node.name] or 0 for one in rows for node in one.nodes)
    single = sum(len(one.kernels) == 1 and bool(one.nodes) for one in rows)
    inserted = sum(len(one.kernels) for one in rows if not one.nodes)
    timeline = liveness.timeline(sized, numbers)
    plan = arena.plan(timeline)
    given = sum(one.bytes for one in timeline.lifetimes if one.value.is_graph_input())
    use = footprint.arena_use(model, sample.feeds)
    return [
        name,
        str(len(found.kernels)),
        str(single),
        str(inserted),
        str(len(found.kernels) - single - inserted),
        str(sum(node.op_type != "Constant" for node in copy.graph)),
        str(len(idle)),
        f"{100 * inside / known:.4g} %" + " ?" * (None in whole) if known else "?" if None in whole else "none",
        *(terminal.size(size - given) for size in (plan.unplanned, plan.in_place, plan.bytes)),
        "?" if use is None else terminal.size(use.requested),
    ]


def page(say: Callable[[str], None]) -> str:
    """The page, from running every model."""
    from burnish.backends.ort.session import runtime

    columns = "model,kernels,traced,inserted,shared,nodes,not run,multiply-adds in rows,own,in place,arena,requested"
    lines = [f"| {' | '.join(columns.split(','))} |", "| --- |" + " ---: |" * columns.count(",")]
    for name in MODELS:
        try:
            cells = row(name)
        except BurnishError as error:
            cells = [name, f"not run: {error.cause.splitlines()[0]}", *[""] * (columns.count(",") - 1)]
        lines.append(f"| {' | '.join(cells)} |")
        say(lines[-1])
    return INTRODUCTION.format(version=runtime().__version__) + "\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(lambda line: print(line, file=sys.stderr, flush=True)), encoding="utf-8")
