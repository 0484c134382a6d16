"""Static int8 beside ONNX Runtime's own quantizer: errors on held-out data, bytes, kernels and paired latency.

    python -m burnish.tools.research.quant_static a1 [--folder .zoo]
    python -m burnish.tools.research.quant_static page

Both quantizers get the same model (in normal form, norms folded, opset 13 or newer) and the same samples; what they
make is measured on samples that neither saw. Each run writes a model's rows to docs/results/quant-static.json, of which
`page` makes docs/results/quant-static.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as oir

import burnish
from burnish.backends.ort.kernel_times import KernelTimes
from burnish.backends.ort.session import executor
from burnish.ir.edit import name_nodes
from burnish.ir.samples import Sample
from burnish.passes import catalog, lossy, recipes
from burnish.passes.base import Outcome
from burnish.passes.latency import Work
from burnish.passes.lossy import LossyPass
from burnish.passes.pipeline import Pipeline, constant_bytes
from burnish.tools.lossy_context import context_for
from burnish.tools.research import zoo_tasks

PAGE = Path(__file__).resolve().parents[2] / "docs" / "results" / "quant-static.md"
DEMO = Path(__file__).resolve().parents[1] / "demo"

OURS = {
    "burnish": "",
    "burnish, minmax": "{calibration=minmax}",
    "burnish, percentile": "{calibration=percentile}",
    "burnish, mse": "{calibration=mse}",
    "burnish, entropy": "{calibration=entropy}",
    "burnish, symmetric": "{symmetric=true}",
    "burnish, biases left": "{correct_bias=false}",
    "burnish, weights not clipped": "{rounding=nearest}",
    "burnish, weights by mse": "{rounding=mse}",
    "burnish, weights by gptq": "{rounding=gptq}",
    "burnish, 7 bits": "{weight_bits=7}",
    "burnish, 7 bits by gptq": "{weight_bits=7,rounding=gptq}",
    "burnish, stem too": "{stem=true}",
    "burnish, one scale a weight": "{per_channel=false}",
    "burnish, one scale a weight, equalized": "{per_channel=false}",
    "burnish, equalized": "",
    "burnish, float8e4m3fn": "{dtype=float8e4m3fn}",
    "burnish, float8e5m2": "{dtype=float8e5m2}",
}
FLOATS = tuple(label for label, options in OURS.items() if "dtype=float8" in options)
RIVALS = ("MinMax", "Entropy", "Percentile")

Array = np.ndarray[Any, Any]
Outputs = list[dict[str, Array]]


@dataclass(frozen=True)
class Bed:
    """A model with samples to fit to and others to judge by.

    Attributes:
        model: the original.
        fit: samples of the calibration.
        held: samples that neither quantizer sees.
        metric: of the outputs for the held-out samples; None where there are no labels for them.
        classes: the first output holds scores of classes along its last axis.
    """

    model: oir.Model
    fit: list[Sample]
    held: list[Sample]
    metric: Callable[[Outputs], float] | None
    classes: bool = True


def zoo(name: str, folder: Path, fit: int, held: int, *, classes: bool = True) -> Bed:
    task = zoo_tasks.load(name, folder)
    samples = [Sample(f"{name} {index}", dict(feeds)) for index, feeds in enumerate(task.samples)]
    chosen = slice(fit, fit + held)
    metric = zoo_tasks._METRICS[name]
    labels = task.labels[chosen]
    return Bed(
        burnish.load(folder / f"{name}.onnx"),
        samples[:fit],
        samples[chosen],
        lambda outputs: metric(outputs, labels),
        classes,
    )


def varied(image: Array) -> Iterator[Array]:
    """An image [1, 3, 224, 224] as it is, its four corners, and all of them mirrored."""
    for corner in ((8, 8), (0, 0), (0, 16), (16, 0), (16, 16)):
        cut = image[:, :, corner[0] : corner[0] + 208, corner[1] : corner[1] + 208]
        place = np.minimum((np.arange(224) * 208) // 224, 207)
        whole = image if corner == (8, 8) else cut[:, :, place][:, :, :, place]
        yield from (whole, whole[:, :, :, ::-1].copy())


def _a1(folder: Path) -> Bed:
    """Ten photographs to fit to; ten others in ten variants each, of which the labels are those of the photographs."""
    task = zoo_tasks.load("a1-efficientnet", folder)
    images = [feeds["image"] for feeds in task.samples]
    fit = [Sample(f"photo {index}", {"image": image}) for index, image in enumerate(images[:10])]
    held = [
        Sample(f"photo {index}, {number}", {"image": one})
        for index, image in enumerate(images[10:])
        for number, one in enumerate(varied(image))
    ]
    labels = np.repeat([int(np.ravel(label)[0]) for label in task.labels[10:]], 10)

    def accuracy(outputs: Outputs) -> float:
        return float(np.mean([next(iter(one.values())).argmax(-1)[0] for one in outputs] == labels))

    return Bed(burnish.load(folder / "a1-efficientnet.onnx"), fit, held, accuracy)


def _digits(name: str) -> Bed:
    digits = np.load(DEMO / "digits.npz")
    images, labels = digits["image"], digits["label"]
    half = len(images) // 2
    batches = [Sample(f"digits {at}", {"image": images[at : at + 25]}) for at in range(0, len(images), 25)]
    count = half // 25
    wanted = labels[25 * count : 25 * len(batches)]

    def accuracy(outputs: Outputs) -> float:
        guesses = np.concatenate([next(iter(one.values())).argmax(-1) for one in outputs])
        return float((guesses == wanted).mean())

    return Bed(burnish.load(DEMO / f"digits_{name}.onnx"), batches[:count], batches[count:], accuracy)


def _cls(folder: Path) -> Bed:
    """Twenty lines to fit to and 400 others: nearly all are certain, and of fewer, two or three make all the error."""
    from burnish.tools.research import mixed_beds

    lines = mixed_beds.BEDS["a6-cls"](folder)
    labels = np.concatenate([np.ravel(sample.labels) for sample in lines.unseen if sample.labels is not None])

    def accuracy(outputs: Outputs) -> float:
        return float(np.mean(np.concatenate([next(iter(one.values())).argmax(-1) for one in outputs]) == labels))

    return Bed(burnish.load(lines.path), lines.search[:20], lines.unseen, accuracy)


BEDS: dict[str, Callable[[Path], Bed]] = {
    "a1": _a1,
    "a2": lambda folder: zoo("a2-minilm", folder, 5, 10, classes=False),
    "a5": lambda folder: zoo("a5-magika", folder, 40, 100),
    "a6-cls": _cls,
    "a6-rec": lambda folder: zoo("a6-ppocr-rec", folder, 20, 40),
    "resnet": lambda folder: _digits("resnet"),
    "vit": lambda folder: _digits("vit"),
}


def prepared(model: oir.Model) -> oir.Model:
    """The model as `quantize-static` gets it."""
    (one,) = catalog.parse("quantize-static")
    assert isinstance(one, LossyPass)
    normal = [catalog.make(name) for name in recipes.NORMAL_FORM]
    asked = [step for text in one.prepare for step in catalog.parse(text)]
    found = Pipeline((*normal, *asked, *normal)).rewrite(model).model
    name_nodes(found)
    return found


def ours(model: oir.Model, fit: Sequence[Sample], label: str) -> oir.Model:
    """What burnish makes of all layers at once."""
    options = OURS[label]
    if label.endswith("equalized"):
        model = Pipeline((catalog.make("equalize-channels"),)).rewrite(model).model
    if label in FLOATS:
        model = Pipeline((catalog.make("raise-opset", {"to": 21}),)).rewrite(model).model
    (one,) = catalog.parse(f"quantize-static{options}")
    assert isinstance(one, LossyPass)
    edits = one.propose(model, context_for(model, fit), Outcome(one.pass_name()))
    return lossy.apply(model, edits, [one])[0]


def theirs(model: oir.Model, fit: Sequence[Sample], method: str) -> oir.Model:
    """What `onnxruntime.quantization.quantize_static` makes of the model: per channel, 8 bits unsigned by 8 signed."""
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType
    from onnxruntime.quantization import quantize_static as quantize

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds = iter([dict(sample.feeds) for sample in fit])

        def get_next(self) -> Mapping[str, Array] | None:
            return next(self.feeds, None)

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "source.onnx", Path(folder) / "target.onnx"
        oir.save(model, source)
        quantize(
            source,
            target,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=getattr(CalibrationMethod, method),
        )
        return oir.from_proto(onnx.load(target))


def kernels(model: oir.Model) -> Counter[str]:
    """The operators that ONNX Runtime is left with."""
    with tempfile.TemporaryDirectory() as folder:
        executor(trace=Path(folder))(model).close()
        graph = onnx.load(Path(folder) / "optimized.onnx", load_external_data=False).graph
        return Counter(node.op_type for node in graph.node)


def outputs_of(model: oir.Model, samples: Sequence[Sample]) -> Outputs:
    """What a model computes for each sample."""
    runner = executor()(model)
    found = [dict(runner.run(sample.feeds)) for sample in samples]
    runner.close()
    return found


def compared(bed: Bed, reference: Outputs, found: Outputs) -> dict[str, float | None]:
    """The relative error of the first output, the share of rows with the same first class, and the metric."""
    pairs = [tuple(next(iter(one.values())) for one in both) for both in zip(reference, found, strict=True)]
    apart = sum(float(np.square(b.astype(np.float64) - a).sum()) for a, b in pairs)
    size = sum(float(np.square(a.astype(np.float64)).sum()) for a, _ in pairs)
    same = np.concatenate([np.ravel(a.argmax(-1) == b.argmax(-1)) for a, b in pairs]) if bed.classes else None
    return {
        "error": (apart / size) ** 0.5,
        "agreement": None if same is None else float(same.mean()),
        "metric": None if bed.metric is None else bed.metric(found),
    }


def row(bed: Bed, base: oir.Model, reference: Outputs, make: Callable[[], oir.Model], clock: bool) -> dict[str, Any]:
    """Everything that is measured of one result; a tool that fails has its message."""
    start = time.process_time()
    try:
        made = make()
    except Exception as error:
        return {"failed": (str(error).strip().splitlines() or [type(error).__name__])[0][:160]}
    took = time.process_time() - start
    found: dict[str, Any] = {"cpu": took, "bytes": constant_bytes(made)}
    found |= compared(bed, reference, outputs_of(made, bed.held))
    if clock:
        found["kernels"] = dict(kernels(made).most_common())
        timer = KernelTimes(seconds=3.0)
        feeds = bed.held[0].feeds
        found["seconds"] = timer(Work(base, feeds), [Work(made, feeds)])
    return found


def measure(name: str, folder: Path, data: Path, wanted: Sequence[str]) -> None:
    """Write rows of one model, those that are named or all that are not there, each as soon as it is made."""
    bed = BEDS[name](folder)
    base = prepared(bed.model)
    reference = outputs_of(base, bed.held)
    makers = {"burnish": partial(ours, base, bed.fit, "burnish")}
    makers |= {f"ONNX Runtime, {method}": partial(theirs, base, bed.fit, method) for method in RIVALS}
    makers |= {label: partial(ours, base, bed.fit, label) for label in OURS}
    head = {
        "fit": sum(len(next(iter(one.feeds.values()))) for one in bed.fit),
        "held": sum(len(next(iter(one.feeds.values()))) for one in bed.held),
        "bytes": constant_bytes(base),
        "metric": None if bed.metric is None else bed.metric(reference),
        "kernels": dict(kernels(base).most_common()),
    }
    for label, make in makers.items():
        known = json.loads(data.read_text()) if data.exists() else {}
        found = known.setdefault(name, {"rows": {}})
        if label in wanted if wanted else label not in found["rows"]:
            clock = label in ("burnish", FLOATS[0]) or label not in OURS
            found["rows"][label] = row(bed, base, reference, make, clock)
            found |= head | {"rows": {one: found["rows"][one] for one in makers if one in found["rows"]}}
            print(name, label, found["rows"][label], flush=True)
            data.write_text(json.dumps(known, indent=1) + "\n")


def main() -> None:
    """Measure the models that are named, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", choices=[*BEDS, "page"])
    parser.add_argument("--folder", type=Path, default=Path(".zoo"))
    parser.add_argument("--data", type=Path, default=PAGE.with_suffix(".json"))
    parser.add_argument("--rows", nargs="*", default=())
    given = parser.parse_args()
    for name in given.names:
        if name == "page":
            from burnish.tools.research.quant_static_page import page

            PAGE.write_text(page(json.loads(given.data.read_text())))
        else:
            measure(name, given.folder, given.data, given.rows)


if __name__ == "__main__":
    main()
