"""What `check` says of the models of the zoo: renamed, reordered, rewritten by onnxslim; and how long it takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx

from burnish.frontends import onnx_file
from burnish.tools.check import lock_file, said
from burnish.tools.check.check import check
from burnish.tools.check.difference import Report
from burnish.tools.check.take import Request, take
from burnish.tools.research import zoo
from burnish.tools.research.respelling import respelled

RESPELLED = (
    "bert-s-ts bert-s-dynp bert-s-op23 gpt2-dynp-slim gpt2-ts-ort llama-kv-ts llama-nocache-dynp-sim gemma-dynp-slim "
    "gemma-kv-ts-slim qwen-ts phi-ts-sim t5-ts-slim t5-op23 mixtral-loop-ts-sim mamba-ts codec-dyn swin-ts-slim "
    "vit-timm-ts vit-timm-dynp resnet-ts resnet-dyn mobilenet-dynp efficientnet-ts genai-llama-int4 genai-moe "
    "a6-ppocr-cls a4-silero-16k-sequence"
).split()
"""Files of many families and exporters, among them control flow, functions, contributed operators and 4-bit weights."""

TRAINED = (
    "a1-efficientnet a2-minilm a3-smollm2-nocache a4-silero a5-magika a6-ppocr-det a6-ppocr-cls a6-ppocr-rec"
).split()
"""The trained models, which onnxslim rewrites."""

ROUNDS = 8


def respellings() -> Iterator[tuple[str, int, int]]:
    """Each file of `RESPELLED`, how often it was respelled, and how many differences of any kind were told of."""
    for name in RESPELLED:
        path = zoo.ROOT / f"{name}.onnx"
        if not path.exists():
            continue
        source = onnx.load(path)
        lock = take(onnx_file.read(path), Request())
        told = 0
        for seed in range(ROUNDS):
            other = respelled(source, seed, swap=bool(seed % 2))
            found = check(onnx_file.read_bytes(other.SerializeToString()), lock, Request())
            told += len(found.differences)
            for line in said.lines(found) if found.differences else ():
                print(f"{name} {seed}: {line}", flush=True)
        yield name, ROUNDS, told


def slimmed(name: str, folder: Path) -> tuple[Report, Report | None]:
    """What is said of a trained model that onnxslim has rewritten; the second report with the old model at hand."""
    import onnxslim

    old = zoo.ROOT / f"{name}.onnx"
    new = folder / f"{name}.onnx"
    large = old.with_name(f"{old.name}.data").exists()
    result = onnxslim.slim(onnx.load(old))
    if large:
        onnx.save(result, new, save_as_external_data=True, location=f"{new.name}.data")
    else:
        onnx.save(result, new)
    del result
    before = onnx_file.read(old)
    lock = take(before, Request())
    plain = check(onnx_file.read(new), lock, Request(), None, None, name, "lock")
    if large or plain.passed:
        return plain, None
    return plain, check(onnx_file.read(new), lock, Request(), None, before, name, "lock")


def timings(name: str, folder: Path, rounds: int = 5) -> Iterator[tuple[str, int, float, float]]:
    """What samples, how many, the median seconds of `check run`, and those of one load and inference of them all.

    Both in this process, in turns, with one thread.
    """
    import onnxruntime as ort

    from burnish.frontends import samples, synthesis

    path = zoo.ROOT / f"{name}.onnx"
    model = onnx_file.read(path)
    task = folder / "task"
    task.mkdir(exist_ok=True)
    for number, sample in enumerate(zoo.task(name).samples):
        np.savez(task / f"{number:04}.npz", allow_pickle=False, **sample)
    for what, data in (("made", None), ("of the task", str(task))):
        feeds = [
            one.feeds for one in (synthesis.synthesise(model) if data is None else samples.read_samples(data, model))
        ]
        lock = folder / f"{name}.lock.yaml"
        lock_file.write(take(model, Request(data=data)), lock)
        ours: list[float] = []
        plain: list[float] = []
        for _ in range(rounds):
            begin = time.perf_counter()
            options = ort.SessionOptions()
            options.intra_op_num_threads = 1
            session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            for one in feeds:
                session.run(None, dict(one))
            del session
            plain.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            report = check(onnx_file.read(path), lock_file.read(lock), Request(data=data))
            ours.append(time.perf_counter() - begin)
            if report.differences:
                raise ValueError(f"{name} differs from its own lock: {report.differences[0].message}")
        yield what, len(feeds), statistics.median(ours), statistics.median(plain)
