"""Measure weights in few bits: `OMP_NUM_THREADS=1 python -m burnish.tools.research.quant_weights MODEL [ROW...]`.

MODEL is `a2`, `a3`, `a5`, `decode` for the time of one token of SmolLM2 with a cache, or `awq` for what scales of the
inputs would add. Every row is a way to round the same layers, ours and those of
`onnxruntime.quantization.matmul_nbits_quantizer`, run by ONNX Runtime on data that nothing was calibrated on. Rows that
are named are made, else all. Writes `docs/results/quant-weights.json` after each row and `quant-weights.md`.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as oir

import burnish
from burnish.backends.ort.session import executor
from burnish.frontends import onnx_file
from burnish.ir import weights
from burnish.ir.edit import name_nodes
from burnish.ir.samples import Sample
from burnish.passes import catalog, lossy
from burnish.passes.base import Outcome
from burnish.passes.grids import Grid
from burnish.passes.lossy import Context, LossyPass
from burnish.passes.moments import moments
from burnish.passes.pipeline import Pipeline, constant_bytes
from burnish.passes.recipes import NORMAL_FORM
from burnish.passes.weight_rounding import change, rounded
from burnish.passes.weight_sites import Matrix, matrices
from burnish.tools.lossy_context import context_for
from burnish.tools.research import quant_weights_page as page
from burnish.tools.research import zoo, zoo_tasks
from burnish.tools.research.once import Once


@dataclass(frozen=True)
class Bed:
    """A model in normal form, samples to calibrate on, samples to evaluate on, and the metric of their outputs."""

    model: oir.Model
    calibration: list[Sample]
    evaluation: list[Sample]
    metric: Callable[[Any], float]


def _plain(samples: Iterable[Mapping[str, np.ndarray]]) -> list[Sample]:
    return [Sample(str(index), dict(feeds)) for index, feeds in enumerate(samples)]


def _normal(name: str) -> oir.Model:
    model = Pipeline(NORMAL_FORM).rewrite(onnx_file.read(zoo.ROOT / f"{name}.onnx")).model
    name_nodes(model)
    return model


def smollm() -> Bed:
    """Calibrated on the beginnings of 32 texts of Python's help, evaluated on those of 8 others, 256 tokens each."""
    from burnish.tools.research.zoo_data import topic_texts

    task = zoo_tasks.load("a3-smollm2-nocache", zoo.ROOT)
    every, _ = topic_texts(zoo.ROOT, cached=False, count=40)
    return Bed(_normal("a3-smollm2-nocache"), _plain(every[8:]), _plain(task.samples), task.metric)


def minilm() -> Bed:
    from burnish.tools.research.lowrank_beds import minilm as bed

    found = bed()
    name_nodes(found.model)
    return Bed(found.model, found.folds[0][0], found.evaluation, found.metric)


def magika() -> Bed:
    """Calibrated on every other file, evaluated on the rest."""
    task = zoo_tasks.load("a5-magika", zoo.ROOT)
    samples, half = _plain(task.samples), range(1, len(task.samples), 2)
    labels = [task.labels[index] for index in half]

    def accuracy(outputs: Any) -> float:
        guesses = np.concatenate([next(iter(one.values())).argmax(-1) for one in outputs])
        return float((guesses == np.concatenate(labels)).mean())

    return Bed(_normal("a5-magika"), samples[::2], [samples[index] for index in half], accuracy)


ACTIVATIONS = {"int8": "", "float": " (activations in float)"}
"""What is multiplied, and how a row says so."""

BEDS: dict[str, Callable[[], Bed]] = {"a2": minilm, "a3": smollm, "a5": magika}


def ours(bed: Bed, context: Context, **options: Any) -> oir.Model:
    """A copy with every layer rounded by `quantize-weights`, also where a weight was published in few bits."""
    one = catalog.make("quantize-weights", {"published": False} | options)
    assert isinstance(one, LossyPass)
    outcome = Outcome("quantize-weights")
    edits = one.propose(bed.model, context, outcome) if one.decided else one.asked(bed.model, outcome)
    return lossy.apply(bed.model, edits, [one])[0]


def theirs(bed: Bed, method: str, block: int, symmetric: bool, bits: int = 4) -> oir.Model:
    """The model as ONNX Runtime's quantizer writes it."""
    import logging

    import onnx
    from onnxruntime.quantization import matmul_nbits_quantizer as quantizer

    class Reader(quantizer.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter([sample.feeds for sample in bed.calibration])

        def get_next(self) -> Any:
            return next(self.left, None)

        def __iter__(self) -> Any:
            return iter([sample.feeds for sample in bed.calibration])

        def __deepcopy__(self, memo: Any) -> Any:
            return Reader()

    logging.disable(logging.INFO)
    config = {
        "default": lambda: quantizer.DefaultWeightOnlyQuantConfig(
            block_size=block, is_symmetric=symmetric, accuracy_level=4, bits=bits
        ),
        "RTN": lambda: quantizer.RTNWeightOnlyQuantConfig(),
        "k-quant": lambda: quantizer.KQuantWeightOnlyQuantConfig(),
        "HQQ": lambda: quantizer.HQQWeightOnlyQuantConfig(block_size=block, bits=bits),
        "GPTQ": lambda: quantizer.GPTQWeightOnlyQuantConfig(
            calibration_data_reader=Reader(), block_size=128, actorder=False, mse=False, perchannel=True
        ),
    }[method]()
    with tempfile.TemporaryDirectory() as folder:
        files = burnish.emit(bed.model, Path(folder) / "model.onnx")
        given = onnx.load(files[0])
        made = quantizer.MatMulNBitsQuantizer(
            given, bits=bits, block_size=block, is_symmetric=symmetric, accuracy_level=4, algo_config=config
        )
        made.process()
        onnx.save(made.model.model, Path(folder) / "out.onnx", save_as_external_data=True, location="out.data")
        model = onnx_file.read(Path(folder) / "out.onnx")
        for value in model.graph.initializers.values():
            if isinstance(value.const_value, oir.ExternalTensor):
                value.const_value = oir.Tensor(np.array(value.const_value.numpy()), dtype=value.const_value.dtype)
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = oir.AttrInt64("accuracy_level", 4)
    return model


def rows() -> dict[str, Callable[[Bed, Context], oir.Model]]:
    """By name what makes each row."""
    found: dict[str, Callable[[Bed, Context], oir.Model]] = {"float32": lambda bed, context: bed.model}
    same = {"embeddings": False}
    for block in (32, 128):
        for kind, symmetric in (("symmetric", True), ("zero points", False)):
            for rounding in ("nearest", "mse", "hqq", "gptq"):
                options = {"bits": 4, "block": block, "symmetric": symmetric, "rounding": rounding} | same
                found[f"ours {rounding}, {kind}, {block}"] = _ours(options)
            for method in ("default", "RTN", "GPTQ"):
                found[f"ORT {method}, {kind}, {block}"] = _theirs(method, block, symmetric)
        found[f"ORT k-quant, zero points, {block}"] = _theirs("k-quant", block, False)
        found[f"ORT HQQ, float zero points, {block}"] = _theirs("HQQ", block, False)
    for rounding in ("nearest", "mse", "gptq"):
        for bits, block in ((4, 32), (4, 64), (8, 64), (2, 32)):
            options = {"bits": bits, "block": block, "rounding": rounding}
            found[f"whole, {bits} bits, {rounding}, symmetric, {block}"] = _ours(options)
    for activations, words in ACTIVATIONS.items():
        options = {"published": True, "activations": activations}
        found[f"ours as published{words}"] = _ours(options | {"bits": 4} | same)
        found[f"whole as published{words}"] = _ours(options | {"bits": 8})
    return found


def _ours(options: Mapping[str, Any]) -> Callable[[Bed, Context], oir.Model]:
    return lambda bed, context: ours(bed, context, **options)


def _theirs(method: str, block: int, symmetric: bool) -> Callable[[Bed, Context], oir.Model]:
    return lambda bed, context: theirs(bed, method, block, symmetric)


def measure(name: str, wanted: list[str]) -> None:
    """Make the rows of a model, and write what is known after each."""
    bed = BEDS[name]()
    context = context_for(bed.model, bed.calibration)
    once = Once(context.observe(bed.model))
    context = replace(context, observe=once.again)
    reference: list[dict[str, np.ndarray]] = []
    runner = executor()(bed.model)
    reference = [runner.run(sample.feeds) for sample in bed.evaluation]
    runner.close()
    known = rows()
    for row in wanted or known:
        make = known[row]
        start = time.process_time()
        try:
            model = make(bed, context)
            seconds = time.process_time() - start
            runner = executor()(model)
            outputs = [runner.run(sample.feeds) for sample in bed.evaluation]
            runner.close()
        except Exception as error:  # a rival may fail in any way, and then the table says so
            page.note(name, row, {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"})
            print(row, "failed", error)
            continue
        apart = sum(
            float(((one[k] - was[k]) ** 2).sum()) for one, was in zip(outputs, reference, strict=True) for k in was
        )
        size = sum(float((was[k].astype(np.float64) ** 2).sum()) for was in reference for k in was)
        found = {
            "metric": bed.metric(outputs),
            "error": (apart / size) ** 0.5,
            "bytes": constant_bytes(model),
            "seconds": seconds,
        }
        page.note(name, row, found)
        print(row, found, flush=True)
        weights.release(model)
        del model, outputs
        gc.collect()
    page.write()


def activation_aware() -> None:
    """What scales of the inputs, the AWQ of Lin et al. (2023, arXiv:2306.00978), take off the errors of layers of A2.

    An input that is s times smaller meets weights that are s times larger, for s the root mean square of the input to
    a power from 0 to 1 that is best for the layer; weights are rounded by squared error, or by GPTQ, in blocks of 32.
    """
    bed = minilm()
    found = {name: one for name, one, _ in matrices(bed.model) if isinstance(one, Matrix) and one.linears}
    changes: dict[str, list[float]] = {}
    groups = {name: one.linears for name, one in found.items()}
    for name, moment in moments(bed.model, groups, context_for(bed.model, bed.calibration)):
        assert not isinstance(moment, str)
        weight, sizes = found[name].weight(), np.sqrt(np.diag(moment[0])) + 1e-9
        exponents = [(sizes**power) / np.exp(np.log(sizes**power).mean()) for power in np.linspace(0, 1, 20)]
        plain = np.ones(len(sizes))
        best = min(exponents, key=lambda scale: _changed(weight, moment, scale, "mse"))
        for row, scale, rounding in (
            ("nearest", plain, "nearest"),
            ("squared error", plain, "mse"),
            ("squared error, scaled", best, "mse"),
            ("GPTQ", plain, "gptq"),
            ("GPTQ, scaled", best, "gptq"),
        ):
            changes.setdefault(row, []).append(_changed(weight, moment, scale, rounding))
    for row, all_of_them in changes.items():
        page.note("awq", row, {"error": float(np.exp(np.log(all_of_them).mean() / 2)), "layers": len(all_of_them)})
    page.write()


def _changed(weight: np.ndarray, moment: np.ndarray, scale: np.ndarray, rounding: Any) -> float:
    kind, scaled = np.dtype(np.float32), weight * scale
    own = moment / np.outer(scale, scale)
    levels, scales = rounded(scaled, Grid(4, False), 32, rounding, mirrored=True, dtype=kind, moment=own)
    return change(scaled, levels, scales, own)


def decode(wanted: list[str]) -> None:
    """The time of one token of SmolLM2 behind 256 others, in turns with float32, on one thread."""
    from burnish.backends.ort.timing import paired

    task = zoo_tasks.load("a3-smollm2-kv", zoo.ROOT)
    model = _normal("a3-smollm2-kv")
    feeds = dict(task.samples[0])
    rng = np.random.default_rng(0)
    feeds["input_ids"] = feeds["input_ids"][:, :1]
    feeds["position_ids"] = np.full((1, 1), 256)
    feeds["attention_mask"] = np.ones((1, 257), np.int64)
    for key, array in feeds.items():
        if key.startswith("past_key_values"):
            feeds[key] = rng.standard_normal((1, array.shape[1], 256, array.shape[3])).astype(np.float32)
    plain = executor()(model)
    context = context_for(model, [Sample("token", feeds)])
    bed = Bed(model, [], [], lambda outputs: 0.0)
    page.note("decode", "float32", {"ratio": 1.0, "low": 1.0, "high": 1.0, "bytes": constant_bytes(model)})
    kinds: dict[str, dict[str, Any]] = {}
    for bits, block, embeddings in ((4, 32, True), (4, 64, True), (4, 128, False), (8, 64, True), (2, 64, True)):
        options = {"bits": bits, "block": block, "embeddings": embeddings, "rounding": "nearest"}
        kinds[f"{bits} bits, {block}" + ("" if embeddings else ", layers only")] = options
    for activations, words in ACTIVATIONS.items():
        kinds[f"as published{words}"] = {"bits": 8, "published": True, "activations": activations}
    for row, options in kinds.items():
        if wanted and row not in wanted:
            continue
        made = ours(bed, context, **options)
        runner = executor()(made)
        timed = paired(partial(plain.run, feeds), partial(runner.run, feeds))
        found = {"ratio": timed.ratio, "low": timed.low, "high": timed.high, "bytes": constant_bytes(made)}
        page.note("decode", row, found)
        print(row, timed, flush=True)
        runner.close()
    page.write()


if __name__ == "__main__":
    if sys.argv[1] == "decode":
        decode(sys.argv[2:])
    elif sys.argv[1] == "awq":
        activation_aware()
    else:
        measure(sys.argv[1], sys.argv[2:])
