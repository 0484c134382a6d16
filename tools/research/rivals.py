"""Run burnish and other graph optimizers as their users do, one process each, and account for CPU time and memory.

The other tools are not dependencies of burnish: `pip install onnxslim==0.1.98 onnxsim==0.8.1` beside it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_ONNXSCRIPT = """
import sys, onnx_ir, onnxscript.optimizer
model = onnx_ir.load(sys.argv[1]); onnxscript.optimizer.optimize(model)
onnx_ir.save(model, sys.argv[2], external_data=sys.argv[3] or None)
"""
_ORT_FUSIONS = """
import sys, onnx_ir
from onnxscript.rewriter.ort_fusions import optimize_for_ort
model, counts = optimize_for_ort(onnx_ir.load(sys.argv[1]))
onnx_ir.save(model, sys.argv[2], external_data=sys.argv[3] or None)
"""
_BURNISH = "import sys; from burnish.tools.cli import optimize_main; optimize_main()"

FAMILY = {"bert": "bert", "a2": "bert", "vit": "vit", "llama": "gpt2", "a3": "gpt2"}
"""The `--model_type` of ONNX Runtime's transformers optimizer, by the first word of a model's name."""

TOOLS = (
    "burnish",
    "burnish-verified",
    "burnish-ort",
    "onnxslim",
    "onnxsim",
    "onnxscript",
    "ort-fusions",
    "ort-transformers",
)
OURS = TOOLS[:3]


@dataclass(frozen=True)
class Made:
    """What one tool made of one model.

    Attributes:
        tool: its name.
        file: the output, None when the tool failed.
        cpu: CPU seconds of the whole process.
        memory: its peak resident set in MB.
        message: the last line it printed when it failed.
    """

    tool: str
    file: Path | None
    cpu: float
    memory: float
    message: str


def command(tool: str, name: str, source: Path, target: Path) -> list[str] | None:
    """The command line of a tool; None when it does not apply to this model."""
    data = f"{target.name}.data" if source.with_name(source.name + ".data").exists() else ""
    python = sys.executable
    if tool in OURS:
        extra = {"burnish": ["--verify", "off"], "burnish-verified": [], "burnish-ort": ["--target", "ort-cpu"]}[tool]
        return [python, "-c", _BURNISH, str(source), "-o", str(target), *extra]
    if tool in ("onnxslim", "onnxsim"):
        return [str(Path(python).with_name(tool)), str(source), str(target)]
    if tool == "onnxscript":
        return [python, "-c", _ONNXSCRIPT, str(source), str(target), data]
    if tool == "ort-fusions":
        return [python, "-c", _ORT_FUSIONS, str(source), str(target), data]
    kind = FAMILY.get(name.split("-")[0])
    if kind is None:
        return None
    flags = ["--use_external_data_format"] if data else []
    module = "onnxruntime.transformers.optimizer"
    return [python, "-m", module, "--input", str(source), "--output", str(target), "--model_type", kind, *flags]


def run(tool: str, name: str, source: Path, folder: Path) -> Made | None:
    """Let `tool` optimize the file `source`; its output goes to `folder`/tool/name.onnx.

    A small process of its own starts the tool: a process inherits the peak memory of the one that started it.
    """
    words = [sys.executable, "-m", "burnish.tools.research.rivals", tool, name, str(source), str(folder)]
    found = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    return None if found is None else Made(**{**found, "file": Path(found["file"]) if found["file"] else None})


def _measure(tool: str, name: str, source: Path, folder: Path, seconds: int = 600) -> dict[str, object] | None:
    target = folder / tool / f"{name}.onnx"
    target.parent.mkdir(parents=True, exist_ok=True)
    for old in target.parent.glob(f"{target.name}*"):
        old.unlink()
    words = command(tool, name, source, target)
    if words is None:
        return None
    log = target.with_suffix(".log")
    environment = dict(os.environ, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    with log.open("wb") as stream:
        process = subprocess.Popen(
            ["timeout", str(seconds), *words], stdout=stream, stderr=subprocess.STDOUT, env=environment, cwd=folder
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    said = log.read_text(errors="replace").strip().splitlines()
    good = process.returncode == 0 and target.exists()
    message = "" if good else (said[-1][:160] if said else f"exit code {process.returncode}, no output")
    return {
        "tool": tool,
        "file": str(target) if good else None,
        "cpu": usage.ru_utime + usage.ru_stime,
        "memory": usage.ru_maxrss / 1024,
        "message": message,
    }


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))))
