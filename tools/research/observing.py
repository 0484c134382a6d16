"""Measure observing on trained models of the zoo: `OMP_NUM_THREADS=1 python -m burnish.tools.research.observing`.

Writes `docs/results/observing.json` (the numbers) and `observing.md` (the tables). Times are CPU seconds of the
process, one thread, plain inference and observing in turns on the same samples, sessions included; a ratio is the
median over the rounds. Peak memory is that of a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as oir

from burnish.backends.ort.observe import OrtObserver
from burnish.backends.ort.session import executor
from burnish.frontends import onnx_file
from burnish.ir.samples import Sample
from burnish.passes.criticality import Criticality, reading
from burnish.passes.gram import Gram
from burnish.passes.layers import Layer, gram_of, layers
from burnish.passes.protocols import Observer
from burnish.passes.reducers import Histogram, Moments, Range, Reducer
from burnish.passes.reservoirs import Reservoir
from burnish.passes.resets import resettable
from burnish.passes.sites import Site
from burnish.tools.observe import keeps_of
from burnish.tools.research import zoo

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
TOKENS = 128
ROUNDS = 5


class Text:
    """Batches of random sentences of 128 tokens without padding, made anew at each iteration."""

    def __init__(self, model: oir.Model, count: int, batch: int) -> None:
        self.names = [str(value.name) for value in model.graph.inputs]
        self.count, self.batch = count, batch

    def __iter__(self) -> Iterator[Sample]:
        rng = np.random.default_rng(0)
        for start in range(0, self.count, self.batch):
            ids = rng.integers(1000, 20000, (self.batch, TOKENS))
            yield Sample(str(start), {name: ids if "ids" in name else np.ones_like(ids) for name in self.names})


def _cpu(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def ratio(
    model: oir.Model, samples: Any, sites: dict[str, Site], reducers: Any, rounds: int = ROUNDS
) -> dict[str, float]:
    """Observing over plain inference of the same samples, both with the making of their sessions."""

    def plain() -> None:
        runner = OrtObserver(model)
        for sample in samples:
            runner.run(sample.feeds)
        runner.close()

    def observed() -> None:
        OrtObserver(model).observe(sites, reducers, samples)

    plain()
    pairs = []
    for number in range(rounds):
        first, second = (plain, observed) if number % 2 else (observed, plain)
        times = {first: _cpu(first), second: _cpu(second)}
        pairs.append((times[plain], times[observed]))
    ratios = [after / before for before, after in pairs]
    return {
        "plain": float(np.median([before for before, _ in pairs])),
        "ratio": float(np.median(ratios)),
        "lowest": min(ratios),
        "highest": max(ratios),
    }


def inputs_of(model: oir.Model) -> tuple[dict[str, Layer], dict[str, Site]]:
    """All layers and the sites of their inputs, padding left out."""
    found = layers(model)
    keeps = keeps_of(model, {name: (layer.input, gram_of(layer).feature_axis) for name, layer in found.items()})
    assert not [keep for keep in keeps.values() if isinstance(keep, str)]
    return found, {name: Site(layer.input, keeps[name]) for name, layer in found.items()}  # type: ignore[arg-type]


def text_ratios(rounds: int = ROUNDS) -> dict[str, Any]:
    """Reducers on the inputs of every linear layer of A2, 128 samples of 128 tokens."""
    model = onnx_file.read(zoo.path("a2-minilm"))
    _, sites = inputs_of(model)
    reducers: dict[str, Reducer] = {
        "Gram": Gram(),
        "Gram, float64 products": Gram(exact=True),
        "Range per tensor": Range(),
        "Range per channel": Range(axis=-1),
        "Moments": Moments(),
        "Histogram": Histogram(),
        "Reservoir": Reservoir(256),
    }
    found: dict[str, Any] = {"layers": len(sites), "values": len({id(site.value) for site in sites.values()})}
    for name, reducer in reducers.items():
        batches = (8, 1) if name == "Gram" else (8,)
        for batch in batches:
            few = rounds if name == "Gram" else max(1, rounds // 4)
            found[f"{name}, batch {batch}"] = ratio(model, Text(model, 128, batch), sites, reducer, few)
    return found


def image_ratios(rounds: int = ROUNDS) -> dict[str, Any]:
    """Gram matrices of every layer of A1, channels and patches, on its 20 pictures."""
    model = onnx_file.read(zoo.path("a1-efficientnet"))
    found, sites = inputs_of(model)
    samples = [Sample(str(index), feeds) for index, feeds in enumerate(zoo.task("a1-efficientnet").samples)]
    return {
        "channels": ratio(model, samples, sites, {n: gram_of(one, patches=False) for n, one in found.items()}, rounds),
        "patches": ratio(model, samples, sites, {name: gram_of(one) for name, one in found.items()}, rounds),
    }


def accuracy() -> dict[str, Any]:
    """How far float32 products are from float64 ones, on the inputs of A2's layers for real text."""
    model = onnx_file.read(zoo.path("a2-minilm"))
    _, sites = inputs_of(model)
    samples = [Sample(str(index), feeds) for index, feeds in enumerate(zoo.task("a2-minilm").samples)]
    fast = OrtObserver(model).observe(sites, Gram(), samples)
    exact = OrtObserver(model).observe(sites, Gram(exact=True), samples)
    worst = {"of_largest_eigenvalue": 0.0, "of_element": 0.0, "smallest_eigenvalue": 0.0, "condition": 0.0}
    for name, one in exact.items():
        other = fast[name]
        assert isinstance(one, Gram) and isinstance(other, Gram)
        scale = np.sqrt(np.diagonal(one.matrix))
        energies = np.linalg.eigvalsh(one.matrix)
        least = abs(np.linalg.eigvalsh(other.matrix)[0] - energies[0]) / energies[-1]
        difference = np.abs(np.linalg.eigvalsh(other.matrix - one.matrix)).max()
        found = {
            "of_largest_eigenvalue": difference / energies[-1],
            "of_element": (np.abs(other.matrix - one.matrix) / np.outer(scale, scale)).max(),
            "smallest_eigenvalue": least,
            "condition": energies[-1] / energies[0],
        }
        worst = {key: max(worst[key], float(number)) for key, number in found.items()}
    return worst | {"rows": int(next(iter(exact.values())).rows)}  # type: ignore[attr-defined]


def peak(count: int, limit: int) -> dict[str, float]:
    """Peak memory in MB of a process that observes all of A2 on so many samples; 0 samples: that only runs it."""
    model = onnx_file.read(zoo.path("a2-minilm"))
    _, sites = inputs_of(model)
    held = sum(Gram().nbytes((1, width)) for width in _widths(sites))
    if count:
        OrtObserver(model).observe(sites, Gram(), Text(model, count, 8), limit=limit)
    else:
        runner = OrtObserver(model)
        for sample in Text(model, 64, 8):
            runner.run(sample.feeds)
    status = Path("/proc/self/status").read_text()  # ru_maxrss would start from the parent's
    high = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return {"peak": int(high.split()[1]) / 1e3, "statistics": held / 1e6}


def _widths(sites: dict[str, Site]) -> list[int]:
    values = {id(site.value): site.value for site in sites.values()}
    return [int(value.shape[-1]) for value in values.values()]  # type: ignore[index, arg-type]


def memory() -> dict[str, Any]:
    """`peak` in processes of their own."""
    found: dict[str, Any] = {}
    for count, limit in ((0, 1 << 30), (32, 1 << 30), (128, 1 << 30), (512, 1 << 30), (128, 1 << 25)):
        command = [sys.executable, "-m", "burnish.tools.research.observing", "--peak", str(count), str(limit)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found[f"{count} samples, limit {limit}"] = json.loads(printed)
    return found


def agreement() -> dict[str, float]:
    """torch's Gram matrices against ONNX Runtime's: the largest difference over the largest element, worst layer."""
    from burnish.backends.fx.observe import FxObserver

    worst = {}
    for name in ("a1-efficientnet", "a2-minilm"):
        model = onnx_file.read(zoo.path(name))
        found, sites = inputs_of(model)
        reducers = {key: gram_of(layer) for key, layer in found.items()}
        samples = [Sample(str(index), feeds) for index, feeds in enumerate(zoo.task(name).samples[:2])]
        observers: list[Observer] = [OrtObserver(model), FxObserver(model)]
        ours, theirs = (one.observe(sites, reducers, samples) for one in observers)
        pairs = [(ours[key].matrix, theirs[key].matrix) for key in found]  # type: ignore[attr-defined]
        worst[name] = max(float(np.abs(one - other).max() / np.abs(one).max()) for one, other in pairs)
    return worst


def critical() -> dict[str, Any]:
    """The criticality of each layer of A6's classifier of turned text lines, for two seeds of three trials."""
    model = onnx_file.read(zoo.path("a6-ppocr-cls"))
    images = np.concatenate([feeds["x"] for feeds in zoo.task("a6-ppocr-cls").samples])
    subject = resettable(model)
    runner = executor()(subject.model)
    samples = [Sample(str(start), {"x": images[start : start + 20]}) for start in range(0, len(images), 20)]
    measure = Criticality(subject, runner, samples, reading(model))
    seeds: list[list[float]] = [
        [float(np.mean([measure.change(part.drawn(seed, n)).criticality for n in range(3)])) for part in subject.parts]
        for seed in (0, 1)
    ]
    convolutions = [number for part, number in zip(subject.parts, seeds[0], strict=True) if part.operator == "Conv"]
    return {
        "rows": measure.rows,
        "read_as": measure.look.kind,
        "layers": len(subject.parts),
        "convolutions": len(convolutions),
        "mean_of_convolutions": float(np.mean(convolutions)),
        "correlation": float(np.asarray(np.corrcoef(seeds))[0, 1]),
        "same_weights": max(measure.change(part.trained()).criticality for part in subject.parts),
        "parts": [
            {"name": part.name, "operator": part.operator, "criticality": list(pair)}
            for part, *pair in zip(subject.parts, *seeds, strict=True)
        ],
    }


SECTIONS: dict[str, Callable[[], Any]] = {
    "text": text_ratios,
    "images": image_ratios,
    "accuracy": accuracy,
    "agreement": agreement,
    "memory": memory,
    "criticality": critical,
}


def page(found: dict[str, Any]) -> str:
    """The tables as Markdown."""
    text, exact = found["text"], found["accuracy"]
    ratios = "| statistic | plain s | observed / plain | lowest, highest |\n| --- | --- | --- | --- |"
    lines = [
        "# Observing, measured",
        "",
        "Made by `python -m burnish.tools.research.observing`. ONNX Runtime on CPU, one thread; CPU seconds of the",
        "process for the same samples with and without observing, in turns, the making of sessions included; the ratio",
        "is the median of the rounds.",
        "",
        "## A language model",
        "",
        f"All-MiniLM-L6 (6 layers, 384 wide): the inputs of its {text['layers']} linear layers, which are",
        f"{text['values']} values. 128 samples of 128 tokens without padding.",
        "",
        ratios,
        *(_ratio(name, one) for name, one in text.items() if isinstance(one, dict)),
        "",
        "## An image model",
        "",
        "EfficientNet-lite0: the inputs of its 50 layers, 20 pictures of 224 x 224 one by one. Observing every input",
        "costs ONNX Runtime its blocked layout; patches of a 3 x 3 or 5 x 5 convolution are 9 or 25 times the",
        "channels.",
        "",
        ratios,
        *(_ratio(f"Gram of {name}", one) for name, one in found["images"].items()),
        "",
        "## What float32 products lose",
        "",
        f"Gram matrices of all-MiniLM-L6 on {exact['rows']:,} rows of real text: float32 products in blocks that are",
        "added in float64, against float64 products; the worst of all layers. float32 has a precision of 1.2e-7.",
        "",
        "| difference | |",
        "| --- | --- |",
        f"| spectral norm, over the largest eigenvalue | {exact['of_largest_eigenvalue']:.1e} |",
        f"| any element, over the root of its two diagonal elements | {exact['of_element']:.1e} |",
        f"| smallest eigenvalue, over the largest | {exact['smallest_eigenvalue']:.1e} |",
        f"| (condition numbers up to) | {exact['condition']:.0e} |",
        "",
        "## Memory",
        "",
        "Peak resident memory of a process that collects the Gram matrices above, batches of 8 x 128 tokens.",
        "`statistics` is what the reducers declare.",
        "",
        "| | peak MB | statistics MB |",
        "| --- | --- | --- |",
    ]
    for name, one in found["memory"].items():
        count, limit = name.split(" samples, limit ")
        said = "plain inference" if count == "0" else f"{count} samples, limit {int(limit) >> 20} MiB"
        lines.append(f"| {said} | {one['peak']:.0f} | {one['statistics'] if count != '0' else 0:.0f} |")
    torch, critic = found["agreement"], found["criticality"]
    lines += [
        "",
        "## torch against ONNX Runtime",
        "",
        "Gram matrices of all layers' inputs on real samples: the largest difference over the largest element, worst",
        "layer.",
        "",
        "| model | difference |",
        "| --- | --- |",
        *(f"| {name} | {number:.1e} |" for name, number in torch.items()),
        "",
        "## Criticality",
        "",
        f"PP-OCR's classifier of turned text lines on {critic['rows']} drawn lines, three trials a layer: its",
        f"{critic['convolutions']} convolutions have a mean criticality of {critic['mean_of_convolutions']:.1f}. Over",
        f"all {critic['layers']} layers two seeds correlate by {critic['correlation']:.3f}, and resetting a layer to",
        f"its own weights gives {critic['same_weights']:g}.",
    ]
    return "\n".join(lines) + "\n"


def _ratio(name: str, one: dict[str, float]) -> str:
    return f"| {name} | {one['plain']:.2f} | **{one['ratio']:.2f}** | {one['lowest']:.2f}, {one['highest']:.2f} |"


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="*", help="what to measure anew; everything by default")
    parser.add_argument("--peak", nargs=2, type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peak:
        print(json.dumps(peak(*given.peak)))
        return
    file = RESULTS / "observing.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    for name in given.sections or SECTIONS:
        found[name] = SECTIONS[name]()
        file.write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "observing.md").write_text(page(found))


if __name__ == "__main__":
    main()
