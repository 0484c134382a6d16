"""A vision transformer for digits and a BERT-like classifier of docstrings, as ONNX files with data, for `norms.py`.

The text is real and so are its labels: docstrings of three installed packages, by package, cut to 16 to 32 words.
Words that name a package are left out. The classifier has the blocks of BERT (a norm behind each sum), three of them,
64 wide, and is trained on the spot.
"""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from burnish.tools.research import zoo_data, zoo_export
from burnish.tools.research.train_digits import DEMO, digits
from burnish.tools.research.zoo_random import Network

PACKAGES = ("matplotlib", "scipy", "torch")
_TELLING = frozenset(
    "array arrays axes axis matplotlib mpl ndarray np numpy plt pyplot pytorch scipy sp tensor tensors torch".split()
)
_EACH, _HELD_OUT, _WORDS, _LENGTH = 1200, 300, 3000, 32
_WIDTH, _HEADS, _BLOCKS = 64, 4, 3


@dataclass(frozen=True)
class Bed:
    """A model and its data.

    Attributes:
        name: for people.
        file: the model.
        data: its training samples with labels, an `.npz`.
        feeds: inputs that neither training nor healing has seen.
        answers: their labels.
        output: the name of the scores.
    """

    name: str
    file: Path
    data: Path
    feeds: dict[str, np.ndarray]
    answers: np.ndarray
    output: str = "logits"


def vision(folder: Path, seed: int) -> Bed:
    """The vision transformer of `burnish demo`; the same for each seed."""
    images, held_out, labels, answers = digits()
    data = folder / "digits-train.npz"
    np.savez(data, image=images, label=labels)
    return Bed("digits ViT (norm before each branch)", DEMO / "digits_vit.onnx", data, {"image": held_out}, answers)


def text(folder: Path, seed: int) -> Bed:
    """A classifier trained with a seed."""
    data, held_out, file = (folder / f"text-{name}" for name in ("train.npz", "held-out.npz", f"{seed}.onnx"))
    if not held_out.exists():
        for target, (ids, mask, labels) in zip((data, held_out), _texts(), strict=True):
            np.savez(target, ids=ids, mask=mask, label=labels)
    if not file.exists():
        ids, mask, labels = (np.load(data)[name] for name in ("ids", "mask", "label"))
        module = _trained(torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(labels), seed)
        example = torch.from_numpy(ids[:2]), torch.from_numpy(mask[:2])
        axes = {"ids": {0: "batch", 1: "seq"}, "mask": {0: "batch", 1: "seq"}, "logits": {0: "batch"}}
        zoo_export.torchscript(Network(module, example, ("ids", "mask"), ("logits",), axes), file, opset=17)
    found = np.load(held_out)
    feeds = {"ids": found["ids"], "mask": found["mask"]}
    return Bed("docstrings, BERT-like (norm behind each sum)", file, data, feeds, found["label"])


def _docstrings(package: str) -> Iterator[list[str]]:
    """The words of the longer docstrings of a package, its files in an order drawn by lot, each once."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations, f"`{package}` is not installed"
    files = sorted(Path(spec.submodule_search_locations[0]).rglob("*.py"))
    order = np.random.default_rng(0).permutation(len(files))
    for text in zoo_data.docstrings_of(files[index] for index in order):
        words = re.findall(r"[a-z]+|[^\sa-z]", text.lower())
        yield [word for word in words if word not in _TELLING]


def _texts() -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Token ids, masks (int64 [texts, 32]) and labels (int64 [texts]), to train on and held out."""
    rng = np.random.default_rng(0)
    parts: tuple[list[tuple[list[str], int]], list[tuple[list[str], int]]] = ([], [])
    for label, package in enumerate(PACKAGES):
        found = list(islice(_docstrings(package), _EACH))
        chosen = [found[i][: rng.integers(16, _LENGTH)] for i in rng.permutation(len(found))]
        for index, words in enumerate(chosen):
            parts[index < _HELD_OUT].append((words, label))
    counts = Counter(word for words, _ in parts[0] for word in words)
    known = {word: 3 + rank for rank, (word, _) in enumerate(counts.most_common(_WORDS - 3))}
    made = []
    for part in parts:
        ids, mask = np.zeros((2, len(part), _LENGTH), np.int64)
        for row, (words, _) in enumerate(part):
            tokens = [1, *(known.get(word, 2) for word in words)][:_LENGTH]
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        made.append((ids, mask, np.array([label for _, label in part], np.int64)))
    return made[0], made[1]


class _Block(nn.Module):
    """A block of BERT: a norm behind each sum."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(_WIDTH, _WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(_WIDTH, 4 * _WIDTH), nn.Linear(4 * _WIDTH, _WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        query, key, value = (
            layer(x).reshape(batch, tokens, _HEADS, width // _HEADS).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        scores = query @ key.transpose(2, 3) * (width // _HEADS) ** -0.5 + bias
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, tokens, width)
        x = self.norm1(x + self.out(mixed))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class Classifier(nn.Module):
    """Tokens (int64 [batch, seq]) and their mask to the scores of the packages, read off the first token."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(_WORDS, _WIDTH), nn.Embedding(_LENGTH, _WIDTH)
        self.norm = nn.LayerNorm(_WIDTH)
        self.blocks = nn.ModuleList(_Block() for _ in range(_BLOCKS))
        self.pool, self.head = nn.Linear(_WIDTH, _WIDTH), nn.Linear(_WIDTH, len(PACKAGES))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1], device=ids.device)[None]
        x = self.norm(self.words(ids) + self.places(places))
        bias = (1.0 - mask[:, None, None, :].float()) * -10000.0
        for block in self.blocks:
            x = block(x, bias)
        return self.head(torch.tanh(self.pool(x[:, 0])))


def _trained(ids: Tensor, mask: Tensor, labels: Tensor, seed: int, epochs: int = 4, batch: int = 64) -> nn.Module:
    torch.manual_seed(seed)
    module = Classifier()
    steps = epochs * -(-len(ids) // batch)
    optimizer = torch.optim.AdamW(module.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(ids)).split(batch):
            optimizer.zero_grad()
            hidden = (torch.rand(ids[rows].shape) < 0.1) & (ids[rows] > 2)
            seen = ids[rows].masked_fill(hidden, 2)
            F.cross_entropy(module(seen, mask[rows]), labels[rows], label_smoothing=0.05).backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return module.eval()
