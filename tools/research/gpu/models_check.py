"""Whole models on a GPU: compiled by TVM with default schedules, against torch eager and `torch.compile`.

    python -m burnish.tools.research.gpu.models_check OUT.json [--seconds 300] [--only resnet50,bert] [--compile MODE]

Models with random weights of the sizes of the papers are traced here (torch, transformers). Every model runs in its own
process. Numbers come first: the outputs in float16 are compared with torch's in float32. Times are medians of CUDA
events over runs in turns, each version captured in a CUDA graph where it can be.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

CASES = [
    ("bert", 1), ("resnet50", 1), ("vit", 1), ("llama", 1), ("bert", 32), ("resnet50", 32), ("vit", 32), ("llama", 32)
]  # fmt: skip


def module(name: str, batch: int) -> tuple[Any, tuple[Any, ...]]:
    """A model in float32 on the CPU and inputs for it."""
    import torch
    import transformers as t
    from torch import nn

    torch.manual_seed(0)

    class Plain(nn.Module):
        """The main output of a model of transformers as a tensor."""

        def __init__(self, inner: Any, key: str, **options: Any) -> None:
            super().__init__()
            self.inner, self.key, self.options = inner, key, options

        def forward(self, x: Any) -> Any:
            return getattr(self.inner(x, **self.options), self.key)

    if name == "resnet50":
        made = Plain(t.ResNetForImageClassification(t.ResNetConfig()), "logits")
        return made.eval(), (torch.randn(batch, 3, 224, 224),)
    if name == "vit":
        config = t.ViTConfig(attn_implementation="eager")
        return Plain(t.ViTForImageClassification(config), "logits").eval(), (torch.randn(batch, 3, 224, 224),)
    if name == "bert":
        config = t.BertConfig(attn_implementation="eager")
        return Plain(t.BertModel(config), "last_hidden_state").eval(), (torch.randint(0, 30000, (batch, 128)),)
    config = t.LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16, num_key_value_heads=4,
        vocab_size=8192, attn_implementation="eager",
    )  # fmt: skip
    return Plain(t.LlamaForCausalLM(config), "logits", use_cache=False).eval(), (torch.randint(0, 8000, (batch, 128)),)


def cast(inputs: tuple[Any, ...], device: str, half: bool) -> tuple[Any, ...]:
    """Inputs on a device, floating point in float16 when `half`."""
    return tuple(x.to(device).half() if half and x.is_floating_point() else x.to(device) for x in inputs)


def compiled(made: Any, inputs: tuple[Any, ...], target: str, graphs: bool = False) -> tuple[Any, Any, int]:
    """The executable, the lowered graph it was made from, and its kernels; with CUDA graphs when `graphs`."""
    import burnish
    from burnish.backends.tvm import compiling
    from burnish.backends.tvm.lowering import lower
    from burnish.backends.tvm.target import parse
    from burnish.passes import recipes
    from burnish.passes.pipeline import Pipeline

    model = burnish.load(made, inputs)
    small = Pipeline(recipes.named("default", "onnx", None)[:-1]).rewrite(model).model
    lowered, chosen = lower(small), parse(target)
    module = compiling.scheduled(compiling.fused(lowered.module, chosen), chosen)
    code = compiling.build(module, chosen, graphs=graphs)
    kernels = sum(1 for name in module.get_global_vars() if name.name_hint != "main")
    return code, lowered, kernels


def median_ms(run: Callable[[], Any], rounds: int = 30) -> float:
    """The median time of a call on the GPU, in milliseconds."""
    import torch

    for _ in range(3):
        run()
    torch.cuda.synchronize()
    times = []
    for _ in range(rounds):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return float(statistics.median(times))


def one(name: str, batch: int, mode: str, half: bool) -> dict[str, Any]:
    """All numbers of one model."""
    import numpy as np
    import torch

    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    made, inputs = module(name, batch)
    with torch.no_grad():
        wanted = made.to(device)(*cast(inputs, device, False)).float().cpu()
    made = made.cpu()
    if half:
        made = made.half()
    given = cast(inputs, "cpu", half)
    import tvm

    from burnish.backends.tvm.runner import TvmRunner
    from burnish.ir import weights

    row: dict[str, Any] = {"model": name, "batch": batch}

    def note(**found: Any) -> None:
        row.update({key: round(one, 4) if isinstance(one, float) else one for key, one in found.items()})
        print("ROW " + json.dumps(row), flush=True)

    place = cast(inputs, device, half)
    for graphs in (False, True)[: 1 + gpu]:
        start = time.perf_counter()
        code, lowered, kernels = compiled(made, given, "cuda:sm_90" if gpu else "llvm", graphs)
        arrays = [tensor.numpy() for value in lowered.weights if (tensor := weights.tensor_of(value)) is not None]
        runner = TvmRunner(code, tvm.cuda(0) if gpu else tvm.cpu(), lowered.inputs, lowered.outputs, arrays)
        found = next(iter(runner.run({lowered.inputs[0]: given[0].numpy()}).values())).astype(np.float32)
        error = float(np.abs(found - wanted.numpy()).max() / wanted.abs().max())
        mark = "_graph" if graphs else ""
        note(**{f"compile{mark}_s": time.perf_counter() - start, "kernels": kernels, f"error{mark}": error})
        if gpu:
            handed = [tvm.runtime.from_dlpack(place[0])]
            note(**{f"tvm{mark}_ms": median_ms(partial(runner.run_tensors, handed))})
    if not gpu:
        return row
    made = made.to(device)
    with torch.no_grad():
        note(torch_error=float((made(*place).float().cpu() - wanted).abs().max() / wanted.abs().max()))
        note(eager_ms=median_ms(lambda: made(*place)))
        if mode != "none":
            fast = torch.compile(made, mode=mode)
            start = time.perf_counter()
            fast(*place)
            note(compile_torch_s=time.perf_counter() - start)
            note(compiled_ms=median_ms(lambda: fast(*place)))
        note(tvm_graph_again_ms=median_ms(partial(runner.run_tensors, handed)))
    return row


def main() -> None:
    """Run all cases within the time, one process each, and print the rows as they come."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--only", default="")
    parser.add_argument("--compile", default="reduce-overhead")
    parser.add_argument("--float32", action="store_true")
    parser.add_argument("--each", type=float, default=60)
    parser.add_argument("--case", default="")
    options = parser.parse_args()
    if options.case:
        name, batch = options.case.split(":")
        one(name, int(batch), options.compile, not options.float32)
        return
    start, rows = time.monotonic(), []
    for name, batch in CASES:
        left = options.seconds - (time.monotonic() - start)
        if left < 20 or (options.only and name not in options.only.split(",")):
            continue
        command = [sys.executable, "-m", "burnish.tools.research.gpu.models_check", options.out]
        command += ["--case", f"{name}:{batch}", "--compile", options.compile, *["--float32"] * options.float32]
        text = _output(command, min(left, options.each))
        found = [json.loads(line[4:]) for line in text.splitlines() if line.startswith("ROW ")]
        rows += found[-1:]
        print(rows[-1] if found else f"{name}:{batch} failed: {text[-1500:]}", flush=True)
        with open(options.out, "w") as stream:
            json.dump(rows, stream, indent=1)


def _output(command: list[str], seconds: float) -> str:
    """What a command prints within its time."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            return process.communicate(timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            process.kill()
            return process.communicate()[0]


if __name__ == "__main__":
    main()
