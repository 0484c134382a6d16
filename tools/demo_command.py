"""`burnish demo`: optimize the embedded models on their embedded data, and show what was gained."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import click

from burnish.tools import terminal

MODELS = {"digits_resnet": "a residual network with BatchNorm", "digits_vit": "a vision transformer"}
_FOLDER = Path(__file__).parent / "demo"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-o", "--output", type=click.Path(file_okay=False), help="Keep the optimized models in this folder.")
@click.option("--target", type=click.Choice(("onnx", "ort-cpu")), default="ort-cpu", show_default=True)
def demo_command(output: str | None, target: str) -> int:
    """Optimize two small real models, trained on scikit-learn's digits, and judge them on 500 held-out digits."""
    from burnish.tools import api, report

    console = terminal.out()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(output or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name, what in MODELS.items():
            before, after = _FOLDER / f"{name}.onnx", folder / f"{name}.onnx"
            console.print(f"\n{name}: {what}, {_FOLDER / 'digits.npz'}\n", style="bold")
            with terminal.progress(name) as on_step:
                result = api.optimize(
                    before, after, data=_FOLDER / "digits.npz", target=target, verify="each", on_step=on_step
                )
            report.show(result, console)
            for line in _measured(before, after):
                console.print(line)
    return 0


def _measured(before: Path, after: Path) -> list[str]:
    """Accuracy of both files on the held-out digits, and their paired latency at batch 1 and 64."""
    import numpy as np

    from burnish.backends.ort import session, timing

    with np.load(_FOLDER / "digits.npz") as data:
        images, labels = data["image"], data["label"]
    runners = [session.from_path(path, threads=1) for path in (before, after)]
    right = [int((_logits(runner, images).argmax(axis=1) == labels).sum()) for runner in runners]
    lines = [f"accuracy  {right[0]} -> {right[1]} of {len(labels)} held-out digits"]
    for batch in (1, 64):
        actions = [partial(runner.run, {"image": images[:batch]}) for runner in runners]
        found = timing.paired(*actions, seconds=1.0)
        lines.append(
            f"latency   batch {batch}: {found.median_a * 1e3:.3f} -> {found.median_b * 1e3:.3f} ms, {found.ratio:.3f}x"
            f" ({found.low:.3f} to {found.high:.3f}), 1 thread, paired rounds"
        )
    for runner in runners:
        runner.close()
    return lines


def _logits(runner: Any, images: Any) -> Any:
    return runner.run({"image": images})["logits"]
