"""Write what is needed to see a wrong rewrite again."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from burnish.backends import onnx_writer
from burnish.passes.prove import Miscompiled


def write(failure: Miscompiled, folder: str | Path) -> str:
    """Write the reduced model, its inputs and the command into `folder`; gives the command.

    Raises:
        InputError: when the folder cannot be written.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    onnx_writer.write(failure.model, place / "model.onnx")
    np.savez(place / "inputs.npz", **failure.sample.feeds)  # type: ignore[arg-type]
    command = (
        f"BURNISH_LIMIT=1 optimize {place / 'model.onnx'} -o {place / 'out.onnx'} --recipe none "
        f"-p '{failure.spec}' --data {place / 'inputs.npz'} --verify each"
    )
    (place / "command.txt").write_text(f"# {failure.cause}\n{command}\n", encoding="utf-8")
    return command
