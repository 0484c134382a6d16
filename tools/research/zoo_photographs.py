"""Some 270 photographs without labels, out of the pictures of Debian's package of the game GCompris.

They are read from where the package is installed, or from where it is unpacked beside the models:

    apt-get download gcompris-qt-data
    dpkg-deb -x gcompris-qt-data_*.deb .zoo/packages/gcompris-qt-data
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

_PLACE = Path("usr/share/gcompris-qt/rcc")
_ARCHIVES = (
    "categorization",
    "details",
    "erase",
    "explore_farm_animals",
    "explore_monuments",
    "explore_world_animals",
    "explore_world_music",
)
"""Those whose pictures are photographs; a few are of paintings."""

_BEGINNING = re.compile(rb"RIFF....WEBPVP8|\xff\xd8\xff", re.DOTALL)
_LEAST = 200
"""Pixels of the shorter side."""

_SAME = 0.98
"""Correlation of two small grey pictures from which on they are of one photograph."""


def photographs(folder: Path, size: int = 224) -> list[np.ndarray]:
    """The middle squares, float32 [1, 3, size, size] as (pixel - 127) / 128, each of another photograph.

    Raises:
        FileNotFoundError: the package is neither installed nor unpacked in `folder`/packages.
    """
    found: list[np.ndarray] = []
    small: list[np.ndarray] = []
    for picture in _pictures(folder):
        square = ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)
        grey = np.asarray(square.convert("L").resize((16, 16)), np.float64).reshape(-1)
        grey = (grey - grey.mean()) / max(float(np.linalg.norm(grey - grey.mean())), 1e-9)
        if any(float(grey @ one) > _SAME for one in small):
            continue
        small.append(grey)
        found.append(((np.asarray(square, np.float32) - 127) / 128).transpose(2, 0, 1)[None])
    return found


def _pictures(folder: Path) -> Iterator[Image.Image]:
    """The pictures of the archives, in their order; what is see-through becomes white."""
    places = [folder / "packages" / "gcompris-qt-data" / _PLACE, Path("/") / _PLACE]
    place = next((one for one in places if one.is_dir()), None)
    if place is None:
        raise FileNotFoundError(f"{places[0]}: see {__name__} for how to get it")
    for name in _ARCHIVES:
        data = (place / f"{name}.rcc").read_bytes()
        for match in _BEGINNING.finditer(data):
            try:
                picture = Image.open(io.BytesIO(data[match.start() :]))
                if min(picture.size) < _LEAST:
                    continue
                clear = picture.convert("RGBA")
            except OSError:
                continue  # three bytes inside another file that look like a picture's first
            white = Image.new("RGBA", clear.size, (255, 255, 255, 255))
            white.alpha_composite(clear)
            yield white.convert("RGB")
