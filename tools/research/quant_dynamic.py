"""Measure dynamic int8, halves, caches: `OMP_NUM_THREADS=1 python -m burnish.tools.research.quant_dynamic BED [ROW]`.

BED is one of `BEDS`, or `cache` for SmolLM2 with a cache of integers. Every row is a way to write the same file in
fewer bits: burnish's, through `burnish.optimize` for `ort-cpu`, and ONNX Runtime's. Rows that are named are made, else
all. `error` is the relative Frobenius error of all outputs on data that nothing was fitted to; times are CPU seconds of
the thread that runs the model, in turns with float32. Writes `docs/results/quant-dynamic.json` and `quant-dynamic.md`.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as oir

import burnish
from burnish.backends.ort.assigned import assigned
from burnish.backends.ort.session import OrtRunner, executor
from burnish.frontends import onnx_file
from burnish.ir import edit
from burnish.passes.pipeline import constant_bytes
from burnish.tools.research import quant_dynamic_page as page
from burnish.tools.research import zoo, zoo_tasks

Feeds = Mapping[str, np.ndarray]
DEMO = Path(__file__).resolve().parents[1] / "demo"
SECONDS = 6.0
"""For timing a row against float32, at most."""


@dataclass(frozen=True)
class Bed:
    """A file, data to fit to and to evaluate on, the metric of the outputs, and what is timed."""

    file: Path
    calibration: Sequence[Feeds]
    evaluation: Sequence[Feeds]
    metric: Callable[[Any], float]
    timed: Feeds


def _plain(samples: Sequence[Any]) -> list[dict[str, np.ndarray]]:
    return [dict(one.feeds) for one in samples]


def minilm() -> Bed:
    """Calibrated on 96 texts, timed on one row of 128 tokens."""
    from burnish.tools.research.lowrank_beds import minilm as bed

    found = bed()
    evaluation = _plain(found.evaluation)
    row = {name: array[:1] for name, array in evaluation[0].items()}
    return Bed(zoo.ROOT / "a2-minilm.onnx", _plain(found.folds[0][0]), evaluation, found.metric, row)


def smollm() -> Bed:
    """Calibrated on 4 texts of 256 tokens, evaluated on 8 others, timed on one of them."""
    from burnish.tools.research.zoo_data import topic_texts

    task = zoo_tasks.load("a3-smollm2-nocache", zoo.ROOT)
    texts, _ = topic_texts(zoo.ROOT, cached=False, count=12)
    return Bed(zoo.ROOT / "a3-smollm2-nocache.onnx", texts[8:], task.samples, task.metric, {**task.samples[0]})


def _split(name: str, first: int) -> Bed:
    """Calibrated on the first samples of a task, evaluated on all others."""
    task = zoo_tasks.load(name, zoo.ROOT)
    measured = zoo_tasks.metric_of(name, task.labels[first:])
    return Bed(zoo.ROOT / f"{name}.onnx", task.samples[:first], task.samples[first:], measured, task.samples[first])


def digits() -> Bed:
    """Calibrated on 100 digits, evaluated on all others, timed on 64."""
    with np.load(DEMO / "digits.npz") as data:
        images, labels = data["image"], data["label"]
    batches = [{"image": images[at : at + 50]} for at in range(100, len(images), 50)]
    return Bed(
        DEMO / "digits_vit.onnx",
        [{"image": images[:100]}],
        batches,
        lambda outputs: float((np.concatenate([one["logits"] for one in outputs]).argmax(-1) == labels[100:]).mean()),
        {"image": images[:64]},
    )


BEDS: dict[str, Callable[[], Bed]] = {
    "a2": minilm,
    "a3": smollm,
    "a4": lambda: _split("a4-silero", 4),
    "a4-sequence": lambda: _split("a4-silero-16k-sequence", 4),
    "a5": lambda: _split("a5-magika", 40),
    "vit": digits,
    "a1": lambda: _split("a1-efficientnet", 2),
}


def _ours(*passes: str, fitted: bool = False) -> Callable[[Bed], oir.Model]:
    def make(bed: Bed) -> oir.Model:
        chosen = list(passes) or None
        data = list(bed.calibration) if fitted else None
        found = burnish.optimize(bed.file, passes=chosen, data=data, target="ort-cpu", verify="off", guard=[])
        return found.model

    return make


def _theirs(*operators: str, normal: bool = False) -> Callable[[Bed], oir.Model]:
    """ONNX Runtime's `quantize_dynamic` of the file, or of its normal form."""

    def make(bed: Bed) -> oir.Model:
        import logging

        from onnxruntime.quantization import QuantType, quantize_dynamic

        logging.disable(logging.WARNING)
        with tempfile.TemporaryDirectory() as folder:
            file, out = bed.file, Path(folder) / "out.onnx"
            if normal:
                found = burnish.optimize(file, Path(folder) / "in.onnx", recipe="normal-form", verify="off", guard=[])
                file = found.files[0]
            quantize_dynamic(
                file,
                out,
                op_types_to_quantize=list(operators) or None,
                per_channel=True,
                weight_type=QuantType.QInt8,
                use_external_data_format=any(Path(folder).glob("in.onnx?*"))
                or bed.file.with_name(f"{bed.file.name}.data").exists(),
                extra_options={"EnableSubgraph": True},
            )
            return _held(out)

    return make


def _their_halves(bed: Bed) -> oir.Model:
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.onnx"
        onnx.save(convert_float_to_float16(onnx.load(bed.file), keep_io_types=True), out)
        return _held(out)


def _held(file: Path) -> oir.Model:
    """A model whose weights are in memory."""
    model = onnx_file.read(file)
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, oir.ExternalTensor):
            value.const_value = oir.Tensor(np.array(value.const_value.numpy()), dtype=value.const_value.dtype)
    return model


INTEGERS: dict[str, Callable[[Bed], oir.Model]] = {
    "float32, file": lambda bed: onnx_file.read(bed.file),
    "float32, default recipe": _ours(),
    "quantize-dynamic": _ours("quantize-dynamic"),
    "quantize-dynamic, minmax": _ours("quantize-dynamic{clip=minmax}"),
    "quantize-dynamic, balanced": _ours("quantize-dynamic{balanced=True}", fitted=True),
    "balanced, tables in 8 bits": _ours(
        "quantize-dynamic{balanced=True}", "quantize-weights{bits=8,block=128}", fitted=True
    ),
    "quantize-dynamic, convolutions too": _ours("quantize-dynamic{convolutions=True}"),
    "ORT, MatMul, Gemm, LSTM": _theirs("MatMul", "Gemm", "LSTM"),
    "ORT, MatMul, Gemm, LSTM, of the normal form": _theirs("MatMul", "Gemm", "LSTM", normal=True),
    "ORT, everything": _theirs(),
}
HALVES: dict[str, Callable[[Bed], oir.Model]] = {
    "cast-half": _ours("cast-half", fitted=True),
    "cast-half, stored": _ours("cast-half{stored=True}"),
    "cast-half, bfloat16 stored": _ours("cast-half{stored=True,dtype=bfloat16}"),
    "ORT, float16": _their_halves,
}


def measure(name: str, wanted: Sequence[str]) -> None:
    """Make the rows of a bed, and keep what is known after each."""
    bed = BEDS[name]()
    plain = executor()(onnx_file.read(bed.file))
    reference = [plain.run(feeds) for feeds in bed.evaluation]
    for row, make in (INTEGERS | HALVES).items():
        if wanted and row not in wanted:
            continue
        start = time.process_time()
        try:
            model = make(bed)
            seconds = time.process_time() - start
            runner = executor()(model)
            outputs = [runner.run(feeds) for feeds in bed.evaluation]
        except Exception as error:  # a rival may fail in any way, and then the table says so
            page.note(name, row, {"failed": f"{type(error).__name__}: {(str(error).splitlines() or ['?'])[0][:160]}"})
            print(row, "failed:", error)
            continue
        ratio, low, high, base = timed(plain, runner, bed.timed)
        runner.close()
        edit.name_nodes(model)
        found = {
            "metric": bed.metric(outputs),
            "error": error_of(outputs, reference),
            "bytes": constant_bytes(model),
            "seconds": seconds,
            "ms": 1e3 * base * ratio,
            "speed": [1 / ratio, 1 / high, 1 / low],
            "kernels": dict(Counter(assigned(model).values()).most_common()),
        }
        page.note(name, row, found)
        print(row, found)


def error_of(outputs: Sequence[Feeds], reference: Sequence[Feeds]) -> float:
    """The relative Frobenius error of all outputs."""
    pairs = [
        (one[key].astype(np.float64), was[key].astype(np.float64))
        for one, was in zip(outputs, reference, strict=True)
        for key in was
    ]
    apart = sum(float(((one - was) ** 2).sum()) for one, was in pairs)
    return float((apart / max(sum(float((was**2).sum()) for _, was in pairs), 1e-30)) ** 0.5)


def timed(plain: OrtRunner, other: OrtRunner, feeds: Feeds) -> tuple[float, float, float, float]:
    """The time of `other` as a share of that of `plain`, the median of pairs, quartiles; and the seconds of `plain`."""
    calls = [plain.bound(feeds), other.bound(feeds)]
    rows: list[list[float]] = []
    end = time.perf_counter() + SECONDS
    while len(rows) < 7 or (len(rows) < 60 and time.perf_counter() < end):
        row = [0.0, 0.0]
        for index in (0, 1) if len(rows) % 2 else (1, 0):
            start = time.thread_time()
            calls[index]()
            row[index] = time.thread_time() - start
        rows.append(row)
    pairs = np.asarray(rows[1:])
    low, middle, high = np.percentile(pairs[:, 1] / pairs[:, 0], [25, 50, 75])
    return float(middle), float(low), float(high), float(np.percentile(pairs[:, 0], 20))


def cache() -> None:
    """SmolLM2 with its keys and values kept as int8: perplexity, bytes, steps against the whole, time of a step."""
    from burnish.tools.research.zoo_data import topic_texts

    task = zoo_tasks.load("a3-smollm2-kv", zoo.ROOT)
    texts, _ = topic_texts(zoo.ROOT, cached=True, count=12)
    file = zoo.ROOT / "a3-smollm2-kv.onnx"
    plain = None
    for row, options in (("float32", None), ("channel", ""), ("head", "{scales=head}")):
        chosen = None if options is None else [f"quantize-cache{options}"]
        data = None if options is None else texts[8:]
        made = burnish.optimize(file, passes=chosen, data=data, target="ort-cpu", verify="off", guard=[])
        runner = executor()(made.model)
        kinds = {str(value.name): value.dtype for value in made.model.graph.inputs}

        def fed(feeds: Feeds, kinds: Mapping[str, Any] = kinds) -> dict[str, np.ndarray]:
            return {name: array.astype(kinds[name].numpy()) for name, array in feeds.items()}

        outputs = [runner.run(fed(feeds)) for feeds in task.samples]
        whole, (step, last) = outputs[0], _steps(runner, fed(task.samples[0]))
        plain = plain or (runner, step)
        found = {
            "metric": task.metric([{"logits": one["logits"]} for one in outputs]),
            "bytes": sum(array.nbytes for name, array in whole.items() if name != "logits"),
            "tokens": whole["logits"].shape[1],
            "steps": float(np.abs(last - whole["logits"][:, -1]).max() / np.abs(whole["logits"]).max()),
        }
        ratio, low, high, base = _step_ratio(plain, (runner, step))
        found |= {"ms": 1e3 * base * ratio, "speed": [1 / ratio, 1 / high, 1 / low]}
        page.note("cache", row, found)
        print(row, found)


def _steps(runner: OrtRunner, feeds: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Give all but the last 8 tokens, then each of these: what the last step is given, its logits [batch, words]."""
    length = feeds["input_ids"].shape[1]
    past = {name: array for name, array in feeds.items() if name.startswith("past")}
    cuts = [0, *range(length - 8, length + 1)]
    given, found = dict(feeds), {"logits": np.zeros(0)}
    for start, stop in zip(cuts, cuts[1:], strict=False):
        given = {name: array[:, start:stop] for name, array in feeds.items() if name in ("input_ids", "position_ids")}
        given |= {"attention_mask": feeds["attention_mask"][:, :stop], **past}
        given = {name: given[name] for name in feeds}
        found = runner.run(given)
        past = {name: found[name.replace("past_key_values", "present")] for name in past}
    return given, found["logits"][:, -1]


def _step_ratio(plain: tuple[OrtRunner, Feeds], other: tuple[OrtRunner, Feeds]) -> tuple[float, float, float, float]:
    class Bound:
        def __init__(self, pair: tuple[OrtRunner, Feeds]) -> None:
            self.pair = pair

        def bound(self, feeds: Feeds) -> Callable[[], object]:
            return self.pair[0].bound(self.pair[1])

    return timed(Bound(plain), Bound(other), {})  # type: ignore[arg-type]


if __name__ == "__main__":
    cache() if sys.argv[1] == "cache" else measure(sys.argv[1], sys.argv[2:])
    page.write()
