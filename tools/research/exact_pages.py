"""Tables and the picture from the measurements of `exact.py`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from burnish.tools.research import rivals

Row = dict[str, Any]
TOOLS = rivals.TOOLS
IMPORTS = 1.5
"""CPU seconds that a small model costs any tool for its imports alone."""

OTHERS = tuple(tool for tool in TOOLS if tool not in rivals.OURS)


def write(results: dict[str, Row], folder: Path) -> None:
    """Write `exact.md` and `exact.svg` into `folder`."""
    parts = [
        _PREFACE,
        _section("What is computed", _ERRORS, _table(results, _error)),
        _section("Nodes", _NODES, _table(results, _number("nodes"), ("original", *TOOLS))),
        _section("Recognition", _RECOGNITION, _table(results, _recognised, ("original", *TOOLS))),
        _section("Latency, 1 thread", _LATENCY, _table(results, _ratio("latency_1"), ("original", *TOOLS))),
        _section("Latency, 2 threads", _LATENCY, _table(results, _ratio("latency_2"), ("original", *TOOLS))),
        _section("Session creation", _CREATION, _table(results, _ratio("creation"), ("original", *TOOLS))),
        _section("Size in MB", "", _table(results, _megabytes, ("original", *TOOLS))),
        _section("CPU seconds of the whole process", _CPU, _table(results, _cpu)),
        _section("Peak memory in MB of the whole process", "", _table(results, _number("memory"))),
        _section("Summary", _SUMMARY, _summary(results)),
    ]
    (folder / "exact.md").write_text("\n".join(parts))
    _plot(results, folder / "exact.svg")


def _section(title: str, text: str, table: str) -> str:
    return f"## {title}\n\n{text.strip()}\n\n{table}\n" if text else f"## {title}\n\n{table}\n"


def _table(results: dict[str, Row], cell: Callable[[Row], str], tools: tuple[str, ...] = TOOLS) -> str:
    lines = [f"| model | {' | '.join(tools)} |", "| --- |" + " --- |" * len(tools)]
    for name, row in results.items():
        cells = []
        for tool in tools:
            entry = row["tools"].get(tool)
            failed = entry is not None and entry.get("failed")
            cells.append("" if entry is None else "failed" if failed else cell(entry))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _error(entry: Row) -> str:
    error = entry.get("error")
    if error is None:
        return ""
    shown = f"{error:.0e}" if error < float("inf") else "differs"
    return shown if error <= 1e-5 else f"**{shown}**"


def _number(key: str) -> Callable[[Row], str]:
    return lambda entry: f"{entry[key]:.0f}" if key in entry else ""


def _cpu(entry: Row) -> str:
    return f"{entry['cpu']:.1f}"


def _megabytes(entry: Row) -> str:
    return f"{entry['bytes'] / 1e6:.2f}"


def _recognised(entry: Row) -> str:
    return "/".join(str(entry[family]) for family in ("attention", "norm", "activation", "rotary"))


def _ratio(key: str) -> Callable[[Row], str]:
    def cell(entry: Row) -> str:
        if key not in entry:
            return ""
        ratio = entry.get(f"{key}_ratio")
        return f"{entry[key]:.2f} ms" + (f" ({ratio:.2f}x)" if ratio is not None else "")

    return cell


def _summary(results: dict[str, Row]) -> str:
    lines = [
        "| model | latency 1 thread | latency 2 threads | session creation | CPU seconds | verified |",
        "| --- " * 6 + "|",
    ]
    for name, row in results.items():
        tools = row["tools"]
        cells = [_against_best(tools, key) for key in ("latency_1", "latency_2", "creation")]
        slim = tools.get("onnxslim", {})
        limit = max(slim.get("cpu", 0.0), IMPORTS)
        cpu = [f"{tools[one]['cpu'] / limit:.2f}x" if one in tools else "" for one in rivals.OURS[:2]]
        lines.append(f"| {name} | {' | '.join((*cells, *cpu))} |")
    return "\n".join(lines)


def short_table(results: dict[str, Row], names: tuple[str, ...]) -> str:
    """The table of the README: each model as it came, as burnish writes it for ONNX Runtime, the best other file."""
    titles = ("model", "nodes", "attention", "session creation, ms", "latency, ms", "best other tool, ms")
    lines = [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]
    for name in names:
        tools = results[name]["tools"]
        old, new = tools["original"], tools["burnish-ort"]
        best, key = min(
            (tools[t]["latency_1"], t)
            for t in OTHERS
            if "latency_1" in tools.get(t, {}) and tools[t].get("error", 1) <= 1e-3
        )
        cells = (
            f"{old['nodes']} → {new['nodes']}",
            str(new["attention"]) if new["attention"] else "",
            f"{old['creation']:.1f} → {new['creation']:.1f}",
            f"{old['latency_1']:.2f} → {new['latency_1']:.2f}",
            f"{best:.2f} ({key})",
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _against_best(tools: dict[str, Row], key: str) -> str:
    """The better of our two files over the best correct file of another tool."""
    ours = [tools[t][key] for t in ("burnish", "burnish-ort") if key in tools.get(t, {})]
    theirs = [tools[t][key] for t in OTHERS if key in tools.get(t, {}) and tools[t].get("error", 1) <= 1e-3]
    return f"{min(ours) / min(theirs):.2f}x" if ours and theirs else ""


def _plot(results: dict[str, Row], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "burnish"
    names = [name for name in results if "burnish-ort" in results[name]["tools"]]
    panels = (("creation", "session creation"), ("latency_1", "latency, 1 thread"))
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.28 * len(names) + 1.4), sharey=True, layout="constrained")
    for axis, (key, title) in zip(axes, panels, strict=True):
        for tool, colour, mark in (
            ("onnxslim", "#999999", "o"),
            ("onnxsim", "#bbbbbb", "s"),
            ("burnish-ort", "#d1495b", "D"),
        ):
            points = [
                (tools[tool][key] / tools["original"][key], place)
                for place, name in enumerate(names)
                if key in (tools := results[name]["tools"]).get(tool, {})
            ]
            axis.scatter(
                *zip(*points, strict=True), label=tool.replace("-ort", ""), color=colour, marker=mark, s=26, zorder=3
            )
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set_title(f"{title}, relative to the original", fontsize=10)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.grid(axis="x", linewidth=0.4)
        axis.set_xlim(left=0)
    axes[0].invert_yaxis()
    axes[0].legend(fontsize=8, loc="lower right")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


_PREFACE = """# Exact passes, measured

Made by `python -m burnish.tools.research.exact`; the numbers behind it are in `exact.json`. Models of random weights in
every export flavour: `ts` TorchScript, `eager` TorchScript with eager attention, `dyn` torch dynamo unoptimized, `dynp`
torch dynamo as it comes, `eager-dynp` both, `dyn23` opset 23. Models that begin with `a` carry trained weights.
`burnish` is `optimize --verify off`, `burnish-verified` is plain `optimize`, `burnish-ort` is `--target ort-cpu`.
ONNX Runtime 1.32 on CPU with its default session options, one process, files in turns.
"""
_ERRORS = """
Largest relative error over all outputs and all made samples (left-padded, right-padded and holey masks, empty and
non-empty caches, several shapes); above 1e-5 in bold.
"""
_NODES = "Constant nodes are not counted. A node count is no speed: see the latency below."
_RECOGNITION = "Attention / norm / activation / rotary operators in the output, whatever their domain."
_LATENCY = "Milliseconds, and in brackets the median of the rounds' ratios to `burnish`."
_CREATION = "Milliseconds to create a session from the file, and in brackets the ratio to `burnish`."
_CPU = "Imports included: they are what small models cost."
_SUMMARY = """
Our better file against the best file of another tool that computes the right thing (relative error up to 1e-3); then
our CPU time, without and with verification, against onnxslim's without, or against 1.5 s where that is more: imports
dominate there. On cnn-dyn the files of onnxslim and onnxsim are created faster because they keep the BatchNorms, which
costs 23 % latency. With two threads on a shared machine single ratios vary by a tenth and more between runs.
"""
