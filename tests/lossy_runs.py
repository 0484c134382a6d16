"""`optimize` with a budget on some labelled digits."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import burnish

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "tools" / "demo"
QUICK = "project-rank{ranks=1,joint=False}"


def digits(tmp_path: Path, count: int = 200, **changed: np.ndarray) -> Path:
    """A file with some labelled digits."""
    with np.load(DEMO / "digits.npz") as data:
        arrays = {"image": data["image"][:count], "labels": data["label"][:count]} | changed
    np.savez(tmp_path / "digits.npz", **{name: array for name, array in arrays.items() if array is not None})
    return tmp_path / "digits.npz"


def optimize(tmp_path: Path, model: str = "digits_vit", **arguments: object) -> burnish.tools.api.Result:  # type: ignore[name-defined]
    """A run on labelled digits."""
    chosen: dict[str, object] = {"data": digits(tmp_path), "passes": [QUICK], "max_drop": "2%"} | arguments
    return burnish.optimize(DEMO / f"{model}.onnx", tmp_path / "out.onnx", **chosen)  # type: ignore[arg-type]
