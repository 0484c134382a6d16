"""Training through the torch bridge: `python -m burnish.tools.research.fx_training [compile|export|train]...`.

`train`: ten steps of fine-tuning the ONNX files of a1-efficientnet and a2-minilm on their real data. `compile`:
`torch.compile` with dynamic shapes. `export`: `torch.export` with dynamic dimensions. Results go to
`docs/results/fx-training.json`, a section each; `fx_page` makes the page of them.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as oir

from burnish.backends.fx import bridge
from burnish.backends.fx.builder import to_graph_module
from burnish.backends.fx.runner import FxRunner
from burnish.backends.fx.write_back import write_back
from burnish.backends.ort.session import executor
from burnish.frontends import onnx_file, synthesis
from burnish.ir.errors import BurnishError
from burnish.passes.verify import relative_error
from burnish.tools.research import zoo

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results" / "fx-training.json"
STEPS = 10
COMPILED = ("resnet-dyn", "vit-timm-dyn", "bert-s-dyn", "llama-nocache-dynp", "llama-kv-dynp")
EXPORTED = (
    "resnet-dynp", "mobilenet-dynp", "efficientnet-dynp", "vit-timm-dynp", "swin-dynp", "bert-s-dynp", "gpt2-dynp",
    "llama-nocache-dynp", "llama-kv-dynp", "gemma-dynp", "qwen-dynp", "phi-dynp", "t5-dynp", "mixtral-dynp",
    "mamba-dynp", "unet-dynp",
)  # fmt: skip


def _photographs() -> tuple[list[dict[str, np.ndarray]], Callable[..., Any]]:
    """Batches of photographs, and the cross entropy of their classes."""
    import torch

    task = zoo.task("a1-efficientnet")
    batches = []
    for start in range(0, 20, 5):
        rows = range(start, start + 5)
        batches.append({"image": np.concatenate([task.samples[i]["image"] for i in rows])})
    labels = [
        torch.from_numpy(np.concatenate([task.labels[i] for i in range(s, s + 5)])).long() for s in (0, 5, 10, 15)
    ]

    def loss(number: int, outputs: Sequence[Any]) -> Any:
        return torch.nn.functional.cross_entropy(outputs[0], labels[number])

    return batches, loss


def _sentences() -> tuple[list[dict[str, np.ndarray]], Callable[..., Any]]:
    """Batches of six first halves of texts with their second halves; the loss asks which half belongs to which."""
    import torch

    task = zoo.task("a2-minilm")
    keys = np.concatenate(task.labels).astype(int)
    columns = {name: np.concatenate([s[name] for s in task.samples]) for name in task.samples[0]}
    batches = []
    for start in range(0, 24, 6):
        wanted = sorted(key for key in keys if key >= 0)[start : start + 6]
        rows = [int(np.flatnonzero(keys == key)[0]) for key in wanted]
        rows += [int(np.flatnonzero(keys == -1 - key)[0]) for key in wanted]
        batches.append({name: column[rows] for name, column in columns.items()})

    def loss(number: int, outputs: Sequence[Any]) -> Any:
        half = outputs[0].shape[0] // 2
        vectors = torch.nn.functional.normalize(outputs[0], dim=-1)
        return torch.nn.functional.cross_entropy(20.0 * vectors[:half] @ vectors[half:].T, torch.arange(half))

    return batches, loss


TASKS = {"a1-efficientnet": (_photographs, 1e-4), "a2-minilm": (_sentences, 2e-5)}


def train() -> Iterator[dict[str, Any]]:
    """The mean loss over all batches before and after, as torch and as ONNX Runtime compute it."""
    import torch

    for name, (make, rate) in TASKS.items():
        batches, loss = make()
        model = onnx_file.read(zoo.path(name))
        module = to_graph_module(model)
        feeds = [[torch.from_numpy(v) for v in batch.values()] for batch in batches]
        runtime = executor()(model)
        before = [runtime.run(batch) for batch in batches]
        runtime.close()
        optimizer = torch.optim.AdamW(module.parameters(), lr=rate, weight_decay=0.0)
        start = time.process_time()
        for step in range(STEPS):
            number = step % len(batches)
            value = loss(number, module(*feeds[number]))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        seconds = (time.process_time() - start) / STEPS
        names = write_back(module, model)
        runtime, torch_runner = executor()(model), FxRunner(module)
        after = [runtime.run(batch) for batch in batches]
        found = [torch_runner.run(batch) for batch in batches]
        apart = max(relative_error(f[k], a[k]) for f, a in zip(found, after, strict=True) for k in a)
        runtime.close()

        def mean(outputs: list[dict[str, np.ndarray]], loss: Callable[..., Any] = loss) -> float:
            rows = [loss(i, [torch.from_numpy(v) for v in o.values()]) for i, o in enumerate(outputs)]
            return float(np.mean([float(row) for row in rows]))

        yield {
            "model": name, "rate": rate, "parameters": len(list(module.parameters())), "written": len(names),
            "before": mean(before), "torch": mean(found), "onnxruntime": mean(after), "error": apart,
            "cpu_s_per_step": round(seconds, 2),
        }  # fmt: skip


def _inputs(name: str) -> tuple[oir.Model, list[list[Any]]]:
    model = onnx_file.read(zoo.path(name))
    runner = executor()(model)
    kept = []
    for sample in synthesis.synthesise(model):
        try:
            runner.run(sample.feeds)
        except BurnishError:
            continue
        kept.append([bridge.to_torch(a, oir.DataType.from_numpy(a.dtype)) for a in sample.feeds.values()])
    runner.close()
    return model, kept


def _apart(found: Sequence[Any], wanted: Sequence[Any]) -> float:
    pairs = zip(found, wanted, strict=True)
    return max(relative_error(bridge.to_numpy(a), bridge.to_numpy(b)) for a, b in pairs)


def compile_all() -> Iterator[dict[str, Any]]:
    """torch.compile with inductor and dynamic shapes, one graph or an error: forwards on three sizes, and backwards.

    Samples with dimensions of 1 are left out: torch specialises those, which means compiling again.
    """
    import torch

    for name in COMPILED:
        model, samples = _inputs(name)
        samples = [inputs for inputs in samples if all(d > 1 for x in inputs for d in x.shape)][:3]
        module = to_graph_module(model)
        torch._dynamo.reset()
        compiled = torch.compile(module, dynamic=True, fullgraph=True)
        start = time.perf_counter()
        try:
            worst = max(_apart(compiled(*inputs), module(*inputs)) for inputs in samples)
            gradients = []
            for one in (compiled, module):
                module.zero_grad()
                sum(o.double().square().mean() for o in one(*samples[0]) if o.is_floating_point()).backward()
                gradients.append([bridge.to_numpy(p.grad) for p in module.parameters() if p.grad is not None])
            scale = max(float(np.abs(g).max()) for g in gradients[1])
            slope = max(float(np.abs(a - b).max()) / scale for a, b in zip(*gradients, strict=True))
            row: dict[str, Any] = {"samples": len(samples), "error": worst, "gradient_error": slope}
        except Exception as error:
            row = {"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:160]}
        yield {"model": name, **row, "seconds": round(time.perf_counter() - start, 1)}


def export_all() -> Iterator[dict[str, Any]]:
    """torch.export with the dimensions dynamic that the model declares so, run on the samples of other sizes."""
    import torch

    for name in EXPORTED:
        model, samples = _inputs(name)
        module = to_graph_module(model)
        largest = max(samples, key=lambda inputs: sum(x.numel() for x in inputs))
        start = time.perf_counter()
        shapes = [
            {
                axis: torch.export.Dim.AUTO
                for axis, d in enumerate(value.shape or ())
                if not isinstance(d, int) and x.shape[axis] > 1
            }
            for value, x in zip(model.graph.inputs, largest, strict=True)
        ]
        try:
            program = torch.export.export(module, tuple(largest), dynamic_shapes=tuple(shapes)).module()
            errors = []
            for inputs in samples:
                try:
                    errors.append(_apart(program(*inputs), module(*inputs)))
                except Exception:
                    continue
            row: dict[str, Any] = {"samples": len(samples), "ran": len(errors), "error": max(errors, default=None)}
        except Exception as error:
            row = {"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:160]}
        yield {"model": name, **row, "seconds": round(time.perf_counter() - start, 1)}


SECTIONS: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
    "train": train, "compile": compile_all, "export": export_all,
}  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Measure the named sections, or all of them."""
    import torch

    torch.set_num_threads(1)
    for section in arguments or SECTIONS:
        rows = []
        for row in SECTIONS[section]():
            print(section, row, flush=True)
            rows.append(row)
            found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            RESULTS.write_text(json.dumps(found | {section: rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
