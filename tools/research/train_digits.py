"""Trains the two small classifiers of `tools/demo` on scikit-learn's digits and writes them with their test data.

`python -m burnish.tools.research.train_digits [FOLDER]` writes `digits_resnet.onnx` and `digits_vit.onnx` (input
`image` float32 [batch, 1, 8, 8] in 0..1, output `logits` float32 [batch, 10]; the ResNet keeps its BatchNormalization
nodes) and `digits.npz` with the 500 held-out digits (`image`, `label` int64 [500]). The seed fixes the result on one
machine.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from burnish.tools.research import zoo_export
from burnish.tools.research.zoo_random import Network

DEMO = Path(__file__).resolve().parents[1] / "demo"
HELD_OUT = 500
BATCH = 64


class _ConvNorm(nn.Sequential):
    def __init__(self, before: int, after: int, size: int = 3, stride: int = 1) -> None:
        convolution = nn.Conv2d(before, after, size, stride, size // 2, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(after))


class _Residual(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = _ConvNorm(before, after, 3, stride)
        self.second = _ConvNorm(after, after)
        self.shortcut = _ConvNorm(before, after, 1, stride) if stride != 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


class DigitsResNet(nn.Module):
    """Stem, three residual blocks at 8, 4 and 2 pixels, mean over the pixels, linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _ConvNorm(1, 16)
        self.blocks = nn.Sequential(_Residual(16, 16, 1), _Residual(16, 32, 2), _Residual(32, 64, 2))
        self.head = nn.Linear(64, 10)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.stem(image))).mean((2, 3)))


class _VitBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.project(mixed)
        return x + self.mlp(self.norm2(x))


class DigitsVit(nn.Module):
    """Pre-norm vision transformer over 2 x 2 patches with a class token and learnt positions."""

    def __init__(self, width: int = 48, layers: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.class_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, 17, width) * 0.02)
        self.blocks = nn.Sequential(*(_VitBlock(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


def digits() -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    """Training images, held-out images (float32 [n, 1, 8, 8] in 0..1), training labels, held-out labels (int64 [n])."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = (images / 16).reshape(-1, 1, 8, 8).astype(np.float32)
    parts = train_test_split(images, labels.astype(np.int64), test_size=HELD_OUT, stratify=labels, random_state=0)
    return tuple(parts)


def train(
    build: Callable[[], nn.Module], images: Tensor, labels: Tensor, epochs: int, rate: float, seed: int = 0
) -> nn.Module:
    """A module of `build` trained with AdamW on randomly turned, scaled and shifted images, in evaluation mode."""
    torch.manual_seed(seed)
    module = build()
    steps = epochs * -(-len(images) // BATCH)
    optimizer = torch.optim.AdamW(module.parameters(), rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(module(moved(images[batch])), labels[batch], label_smoothing=0.05).backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return module.eval()


def moved(images: Tensor) -> Tensor:
    """Each image turned by up to 14 degrees, scaled by up to 10 % and shifted by up to 0.7 pixels."""
    count = len(images)
    angle = (torch.rand(count) - 0.5) * 0.5
    scale = 1 + (torch.rand(count) - 0.5) * 0.2
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    shift = (torch.rand(count, 2) - 0.5) * 0.35
    matrix = torch.stack([cosine, -sine, shift[:, 0], sine, cosine, shift[:, 1]], 1).reshape(count, 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def write_model(module: nn.Module, example: Tensor, file: Path) -> None:
    """Write a module as ONNX of opset 17, its batch symbolic.

    Args:
        module: images to logits.
        example: two images.
        file: where.
    """
    axes = {"image": {0: "batch"}, "logits": {0: "batch"}}
    zoo_export.torchscript(Network(module, (example,), ("image",), ("logits",), axes), file, opset=17)


def main(folder: Path) -> int:
    """Train, measure on the held-out digits, write; the exit code is 1 when an accuracy is below 0.95."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    images, held_out, labels, answers = digits()
    np.savez_compressed(folder / "digits.npz", image=held_out, label=answers)
    plans = {"resnet": (DigitsResNet, 15, 5e-3), "vit": (DigitsVit, 80, 3e-3)}
    worst = 1.0
    for name, (build, epochs, rate) in plans.items():
        start = time.perf_counter()
        module = train(build, torch.from_numpy(images), torch.from_numpy(labels), epochs, rate)
        with torch.no_grad():
            guesses = module(torch.from_numpy(held_out)).argmax(1).numpy()
        accuracy = float((guesses == answers).mean())
        target = folder / f"digits_{name}.onnx"
        write_model(module, torch.from_numpy(held_out[:2]), target)
        size = target.stat().st_size / 1e3
        seconds = time.perf_counter() - start
        print(f"{target.name}: accuracy {accuracy:.3f} on {len(answers)} digits, {size:.0f} kB, {seconds:.0f} s")
        worst = min(worst, accuracy)
    return int(worst < 0.95)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else DEMO))
