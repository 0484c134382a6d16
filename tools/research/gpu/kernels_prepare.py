"""What `kernels_check` needs on a machine with a GPU: libraries compiled here, models, inputs, and what they give.

python -m burnish.tools.research.gpu.kernels_prepare FOLDER [--target cuda:sm_90] [--only NAME]
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from burnish.backends.tvm import target as targets
from burnish.backends.tvm.kernels import emitting
from burnish.frontends import onnx_file
from burnish.ir.samples import Sample
from burnish.passes import recipes
from burnish.passes.pipeline import Pipeline
from burnish.tools.api import samples_for
from burnish.tools.research import fused_cases
from burnish.tools.research.gpu.kernels_check import error

ROOT = Path(__file__).resolve().parents[3]
WHEELS = ("apache-tvm-ffi==0.1.14.post1", "msgspec==0.22.0", "onnx_ir==1.1.0")
_BATCH = 32
_LARGE = 1 << 20
"""Bytes of inputs of which one sample is enough."""
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def matmul_gelu(size: int, dtype: int = TensorProto.FLOAT16) -> onnx.ModelProto:
    """`Gelu(x @ w)` of square matrices."""
    weight = (np.random.default_rng(0).standard_normal((size, size)) / size**0.5).astype(np.float32)
    stored = weight.astype(helper.tensor_dtype_to_np_dtype(dtype))
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Gelu", ["m"], ["y"])]
    x, y = (helper.make_tensor_value_info(name, dtype, [size, size]) for name in "xy")
    graph = helper.make_graph(nodes, "matmul_gelu", [x], [y], [numpy_helper.from_array(stored, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def halved(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model in float16, inputs and outputs too, its nodes in order."""
    import onnx_ir as oir
    from onnxruntime.transformers.float16 import convert_float_to_float16

    made = oir.from_proto(convert_float_to_float16(model, keep_io_types=False, disable_shape_infer=False))
    made.graph.sort()
    proto: onnx.ModelProto = oir.to_proto(made)
    return proto


def models() -> dict[str, tuple[Callable[[], onnx.ModelProto], bool]]:
    """Makers by name, and whether the model is to be run in float16."""
    demo, zoo = ROOT / "tools" / "demo", ROOT / ".zoo"
    return {
        "digits-resnet": (lambda: onnx.load(demo / "digits_resnet.onnx"), False),
        "digits-vit": (lambda: onnx.load(demo / "digits_vit.onnx"), False),
        "matmul-gelu": (lambda: matmul_gelu(1024), False),
        "bert": (lambda: onnx.load(zoo / "bert-s-dynp.onnx"), True),
        "llama-kv": (lambda: onnx.load(zoo / "llama-kv-dynp.onnx"), False),
        "efficientnet": (lambda: onnx.load(zoo / "a1-efficientnet.onnx"), True),
        **fused_regions(),
    }


def fused_regions(depth: int = 2048, width: int = 1024) -> dict[str, tuple[Callable[[], onnx.ModelProto], bool]]:
    """Products with quantized weights, for decoding and for a prompt; torch's twin of `half` is the vendor's."""
    found: dict[str, tuple[Callable[[], onnx.ModelProto], bool]] = {}
    for rows in (1, 16, 256):
        for bits in (4, 8):
            maker = partial(fused_cases.dequantized, rows, depth, width, bits, transposed=True, dtype=np.float16)
            found[f"int{bits}-{rows}"] = maker, False
        found[f"half-{rows}"] = partial(fused_cases.plain, rows, depth, width, np.float16), False
        found[f"pair-{rows}"] = partial(fused_cases.pair, rows, depth, 128, width, np.float16), False
    return found


def samples(proto: Path) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Inputs by name: those that the model is verified with."""
    given: list[Sample] = list(samples_for(onnx_file.read(proto)))
    small = sum(value.nbytes for value in given[0].feeds.values()) < _LARGE
    for one in given[: 2 if small else 1]:
        yield one.name, {name: np.ascontiguousarray(value) for name, value in one.feeds.items()}


def has_batch(model: onnx.ModelProto) -> bool:
    """Whether the first dimension of every input and output is one symbol, the same for all."""
    first = [value.type.tensor_type.shape.dim[:1] for value in (*model.graph.input, *model.graph.output)]
    return all(dim and dim[0].dim_param for dim in first) and len({dim[0].dim_param for dim in first}) == 1


def prepare(name: str, maker: Callable[[], onnx.ModelProto], half: bool, target: Any, folder: Path) -> dict[str, Any]:
    """One model in a folder of its own."""
    folder.mkdir(parents=True)
    original = maker()
    model = halved(original) if half else original
    onnx.save(model, folder / "model.onnx")
    onnx.save(original, folder / "original.onnx")
    normal = Pipeline(recipes.named("default", "onnx", None)[:-1]).rewrite(onnx_file.read(folder / "model.onnx")).model
    begun = time.perf_counter()
    emitted = emitting.emit(normal, target, folder / "kernels", title=name)
    seconds = time.perf_counter() - begun
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    sessions = [
        onnxruntime.InferenceSession(str(folder / file), options, providers=["CPUExecutionProvider"])
        for file in ("model.onnx", "original.onnx")
    ]
    arrays: dict[str, np.ndarray] = {}
    rows: list[dict[str, Any]] = []
    outputs = [one.name for one in sessions[0].get_outputs()]
    for number, (row, feeds) in enumerate(samples(folder / "model.onnx")):
        wide = {one.name: feeds[one.name] for one in sessions[1].get_inputs()}
        if half:
            wide = {
                key: value.astype(np.float32) if value.dtype == np.float16 else value for key, value in wide.items()
            }
        wanted = sessions[1].run(outputs, wide)
        worst = 0.0
        same = sessions[0].run(outputs, {one.name: feeds[one.name] for one in sessions[0].get_inputs()})
        for index, one in enumerate(emitted.inputs):
            arrays[f"{number}.in.{index}"] = feeds[one[0]]
        for index, (want, own) in enumerate(zip(wanted, same, strict=True)):
            arrays[f"{number}.out.{index}"] = want
            worst = max(worst, error(own, want))
        rows.append({"sample": row, "error of ONNX Runtime in this dtype": worst})
    if has_batch(model):
        rows.append(rows[0] | {"sample": f"{_BATCH} times the first", "of": 0, "repeat": _BATCH})
    (folder / "original.onnx").unlink()
    np.savez_compressed(folder / "samples.npz", **arrays)  # type: ignore[arg-type]
    about = {"name": name, "half": half, "samples": rows, "weights": len(emitted.weights), "seconds": round(seconds, 1)}
    about |= {"kernels": len(emitted.kernels), "calls": emitted.calls, "target": str(target)}
    (folder / "about.json").write_text(json.dumps(about, indent=1))
    for left in ("kernels.o", "model.cu", "model.cc"):
        (folder / "kernels" / left).unlink(missing_ok=True)
    return about


def _not_python(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if Path(folder, name).is_file() and not name.endswith(".py")]


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--target", default="cuda:sm_90")
@click.option("--only", multiple=True, help="Names of models.")
@click.option("--wheels/--no-wheels", default=True, help="Download the wheels for Python 3.12 too.")
def main(folder: Path, target: str, only: tuple[str, ...], wheels: bool) -> None:
    """Write what `kernels_check` needs into FOLDER."""
    machine = targets.parse(target)
    for name, (maker, half) in models().items():
        if (only and name not in only) or (folder / name).exists():
            continue
        print(prepare(name, maker, half, machine, folder / name), flush=True)
    if wheels and not (folder / "wheels").exists():
        platforms = [word for one in _PLATFORMS for word in ("--platform", one)]
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
        command += ["--python-version", "3.12", "--implementation", "cp", *platforms]
        subprocess.run([*command, "-d", str(folder / "wheels"), *WHEELS], check=True)
    if not (folder / "src").exists():
        shutil.copytree(ROOT / ".src" / "burnish", folder / "src" / "burnish", ignore=_not_python)
    size = sum(one.stat().st_size for one in folder.rglob("*") if one.is_file())
    print(f"{size / 1e6:.1f} MB in {folder}")


if __name__ == "__main__":
    main()
