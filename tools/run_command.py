"""`burnish run`: run a compiled model, or an ONNX file, on samples."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from burnish.tools import terminal

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as oir

    from burnish.backends.tvm.artifact import Manifest
    from burnish.passes.protocols import Runner


@click.command("run")
@click.argument("model", type=click.Path())
@click.option("--data", metavar="D", help="Samples: .npz, a folder of them, or package.module:function.")
@click.option("-o", "--output", metavar="FILE.npz", help="Write the outputs.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(min=1), help="Threads inside a kernel.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of a table.")
def run_command(model: str, data: str | None, output: str | None, threads: int, as_json: bool) -> None:
    """Run MODEL on samples: the folder that `optimize --target llvm` wrote, or an .onnx file in ONNX Runtime.

    Nothing of a folder is loaded unless every file of it has the hash that its manifest lists.
    """
    if output is not None:
        _check_output(output, model, data)
    found, outputs = run(model, data, threads=threads, keep=output is not None)
    if output is not None:
        _write(output, outputs)
    if as_json:
        click.echo(json.dumps(found, indent=2, allow_nan=False))
        return
    _show(found)
    if output is not None:
        terminal.out().print(f"written  {output}")


def run(
    model: str, data: Any = None, *, threads: int = 1, keep: bool = False
) -> tuple[dict[str, Any], list[dict[str, np.ndarray]]]:
    """All that `burnish run` shows, as the JSON document that `--json` prints, and the outputs of each sample.

    Args:
        model: an artefact or an `.onnx` file.
        data: as for `read_samples`; samples are made for an `.onnx` file when it is None.
        threads: threads inside a kernel.
        keep: return the outputs; else there are none.

    Raises:
        InputError: the model cannot be loaded, or refuses a sample.
    """
    from burnish.backends.ort import timing
    from burnish.backends.tvm import artifact
    from burnish.ir.errors import InputError
    from burnish.tools.api import samples_for

    if Path(model).is_dir():
        if data is None:
            hint = "give them with `--data`"
            raise InputError("a compiled model does not say what its inputs mean", place=model, hint=hint)
        from burnish.backends import tvm

        loaded = tvm.load(model, threads=threads)
        runner: Runner = loaded
        manifest: artifact.Manifest | None = loaded.manifest
        samples = samples_for(contract(loaded.manifest), data)
    else:
        runner, samples, manifest = *_opened(model, data, threads), None
    seen: dict[str, _Statistics] = {}
    kept: list[dict[str, np.ndarray]] = []
    try:
        for sample in samples:
            try:
                outputs = runner.run(sample.feeds)
            except InputError as error:
                error.place = f"{model}, {sample.name}"
                raise
            for name, array in outputs.items():
                seen.setdefault(name, _Statistics()).add(array)
            if keep:
                kept.append(outputs)
        time = timing.single(lambda: runner.run(samples[0].feeds), rounds=20, seconds=1.0)
    finally:
        runner.close()
    return {
        "model": model,
        "runtime": f"ONNX Runtime, {_threads(threads)}" if manifest is None else runtime(manifest, threads),
        "verified": None if manifest is None else manifest.verified,
        "samples": len(samples),
        "outputs": {name: one.as_dict() for name, one in seen.items()},
        "seconds": {"median": time.median, "low": time.low, "high": time.high, "rounds": time.rounds},
        "timed": samples[0].name,
    }, kept


def _opened(model: str, data: Any, threads: int) -> tuple[Any, list[Any]]:
    from burnish.backends.ort import session
    from burnish.frontends import onnx_file
    from burnish.ir.errors import InputError
    from burnish.tools.api import samples_for

    if not Path(model).is_file():
        raise InputError("there is no such file or folder", place=model, hint="check the path")
    samples = samples_for(onnx_file.read(model), data)
    return session.from_path(model, threads=threads), samples


def contract(manifest: Manifest) -> oir.Model:
    """A model that has the inputs of the compiled one, and nothing else: what samples are held to."""
    import onnx_ir as oir
    from ml_dtypes import bfloat16
    from numpy import dtype

    inputs = []
    for port in manifest.inputs:
        kind = oir.DataType.from_numpy(dtype(bfloat16 if port.dtype == "bfloat16" else port.dtype))
        value = oir.Value(name=port.name, shape=oir.Shape(port.shape), type=oir.TensorType(kind))
        inputs.append(value)
    return oir.Model(oir.Graph(inputs, [], nodes=[], opset_imports={"": 18}, name="contract"), ir_version=10)


class _Statistics:
    """What is shown of one output over all samples: a NaN is counted, and left out of the rest."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.dtype, self.count, self.nans = "", 0, 0
        self.low, self.high, self.total = math.inf, -math.inf, 0.0

    def add(self, array: Any) -> None:
        import numpy as np

        if not isinstance(array, np.ndarray):
            self.dtype = "sequence" if isinstance(array, list) else "nothing"
            return
        self.dtype = array.dtype.name
        if array.shape not in self.shapes:
            self.shapes.append(array.shape)
        if array.dtype.kind in "OSU":
            return
        numbers = array.astype(np.float64).reshape(-1)
        known = numbers[~np.isnan(numbers)]
        self.nans += numbers.size - known.size
        if known.size:
            self.low, self.high = min(self.low, float(known.min())), max(self.high, float(known.max()))
            self.total, self.count = self.total + float(known.sum()), self.count + known.size

    def as_dict(self) -> dict[str, Any]:
        """In plain types; None for what is not a finite number."""
        mean = self.total / self.count if self.count else math.nan
        numbers = {"lowest": self.low, "highest": self.high, "mean": mean}
        finite = {name: one if math.isfinite(one) else None for name, one in numbers.items()}
        return {"dtype": self.dtype, "shapes": [list(one) for one in self.shapes], **finite, "nans": self.nans}


def _threads(count: int) -> str:
    return terminal.count(count, "thread")


def runtime(manifest: Manifest, threads: int) -> str:
    """What runs a compiled model, in words."""
    plain = manifest.kernels - manifest.tuned
    tuned = f"{terminal.count(plain or manifest.kernels, 'kernel')} {'untuned' if plain else 'tuned'}"
    return f"TVM {manifest.versions['apache-tvm']}, {manifest.target}, {_threads(threads)}, {tuned}"


def _show(found: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table("output", "dtype", "shape", "lowest", "highest", "mean", "NaN", box=None, pad_edge=False)
    for name, one in found["outputs"].items():
        shapes = one["shapes"]
        shown = terminal.shape(shapes[0]) if shapes else ""
        more = f" and {len(shapes) - 1} more" if len(shapes) > 1 else ""
        numbers = ["" if one[key] is None else f"{one[key]:.4g}" for key in ("lowest", "highest", "mean")]
        table.add_row(name, one["dtype"], shown + more, *numbers, str(one["nans"]))
    out, time = terminal.out(), found["seconds"]
    terminal.show(table, out)
    span = f"{time['low'] * 1000:.3g} to {time['high'] * 1000:.3g}"
    out.print(f"samples  {found['samples']}")
    out.print(f"time     {time['median'] * 1000:.3g} ms ({span}), {time['rounds']} rounds on {found['timed']}")
    out.print(f"runtime  {found['runtime']}")
    if found["verified"] is None and found["runtime"].startswith("TVM"):
        terminal.talk().print("this code was not compared with the model when it was compiled")


def _check_output(output: str, model: str, data: str | None) -> None:
    """Refuse, before anything is run, to write over what is read, into an artefact, or where nothing can be."""
    from burnish.ir.errors import InputError

    file = Path(output)
    if file.suffix != ".npz":
        raise InputError("the outputs are written as `.npz`", place=output, hint="give a name that ends in `.npz`")
    if not file.parent.is_dir() or (file.exists() and not file.is_file()):
        hint = "name a file in a folder that exists"
        raise InputError("the outputs cannot be written there", place=output, hint=hint)
    here = file.resolve()
    for read in (Path(one).resolve() for one in (model, data) if one is not None):
        if here == read or (read.is_dir() and here.is_relative_to(read)):
            raise InputError("that is a part of what is read", place=output, hint="give another name")


def _write(output: str, outputs: list[dict[str, np.ndarray]]) -> None:
    """Write the outputs: of several samples stacked along a new first axis, or numbered where their shapes differ."""
    import numpy as np

    from burnish.tools import whole_file

    arrays: dict[str, np.ndarray] = {}
    for name in outputs[0]:
        each = [_known(one[name], name, output) for one in outputs]
        if len(each) == 1:
            arrays[name] = each[0]
        elif len({one.shape for one in each}) == 1:
            arrays[name] = np.stack(each)
        else:
            arrays.update({f"{name}[{index}]": one for index, one in enumerate(each)})
    memory = io.BytesIO()
    np.savez(memory, **arrays)  # type: ignore[arg-type]
    whole_file.write(output, memory.getvalue())


def _known(array: Any, name: str, output: str) -> np.ndarray:
    """An array in a dtype that `.npz` files have: bfloat16 and float8 become float32, which holds all their values."""
    import numpy as np

    from burnish.ir.errors import InputError

    if not isinstance(array, np.ndarray):
        raise InputError(f"the output `{name}` is no array", place=output, hint="leave `-o` out")
    return array.astype(np.float32) if array.dtype.kind == "V" or array.dtype.name == "bfloat16" else array
