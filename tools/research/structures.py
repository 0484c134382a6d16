"""The exported graphs of the zoo without their weights, small enough to be kept in the repository.

`python -m burnish.tools.research.structures` packs every file of `zoo_families.FILES`, built where it is missing, into
`tests/exported/structures/FAMILY.tar.xz`, and the trained models into `real.tar.xz`. Random float tensors (and packed
int4 ones) lose their data and keep a seed, a mean and a deviation in their `doc_string`; whatever has structure of its
own, such as integers, scalars, masks and rotary tables, stays. Equal tensors get equal seeds, transposed ones too, so
tied weights stay tied. Documentation and metadata go.

`load(name)` fills the tensors again: the models run and give finite outputs.
"""

from __future__ import annotations

import functools
import hashlib
import io
import lzma
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

FOLDER = Path(__file__).resolve().parents[2] / "tests" / "exported" / "structures"
LARGEST, DISTINCT = 16, 16
"""Tensors of no more elements, or of no more distinct values, are kept."""
_SEED = "seed "


def names() -> tuple[str, ...]:
    """The files that are packed, in the order of their families."""
    return tuple(_archives())


def load(name: str) -> onnx.ModelProto:
    """A packed model with its tensors filled. KeyError for a name that is not packed."""
    model = onnx.ModelProto()
    model.ParseFromString(_packed(_archives()[name])[name])
    for tensor in _tensors(model.graph):
        if tensor.doc_string.startswith(_SEED):
            fill(tensor)
    return model


def _archives() -> dict[str, str]:
    """The archive of each file."""
    from burnish.tools.research import zoo, zoo_families

    return {name: family for name, (family, _) in zoo_families.FILES.items()} | dict.fromkeys(zoo.REAL, "real")


@functools.lru_cache(maxsize=2)
def _packed(family: str) -> dict[str, bytes]:
    with tarfile.open(FOLDER / f"{family}.tar.xz") as archive:
        found = {}
        for member in archive.getmembers():
            file = archive.extractfile(member)
            assert file is not None
            found[member.name.removesuffix(".onnx")] = file.read()
        return found


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from _tensors(inner)


def fill(tensor: onnx.TensorProto) -> None:
    """Give a tensor that `strip` emptied random values of the same mean and deviation."""
    _, seed, mean, deviation, order = tensor.doc_string.split()
    shape = tuple(tensor.dims)
    generator = np.random.default_rng(int(seed, 16))
    if tensor.data_type == onnx.TensorProto.UINT8:
        values: NDArray[Any] = generator.integers(0, 256, shape, np.uint8)
    else:
        spread = 3**0.5 * float(deviation)
        drawn = generator.uniform(float(mean) - spread, float(mean) + spread, shape[::-1] if order == "T" else shape)
        values = (drawn.T if order == "T" else drawn).astype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    tensor.raw_data = np.ascontiguousarray(values).tobytes()
    tensor.ClearField("doc_string")


def strip(model: onnx.ModelProto) -> None:
    """Take the random tensors' data and all documentation away."""
    for item in (
        model,
        model.graph,
        *model.functions,
        *model.graph.value_info,
        *model.graph.input,
        *model.graph.output,
    ):
        item.ClearField("doc_string")
        item.ClearField("metadata_props")
    for graph in (model.graph, *model.functions):
        for node in graph.node:
            node.ClearField("doc_string")
            node.ClearField("metadata_props")
    for tensor in _tensors(model.graph):
        tensor.ClearField("doc_string")
        tensor.ClearField("metadata_props")
        _strip(tensor)


def _strip(tensor: onnx.TensorProto) -> None:
    kept = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.UINT8)
    if int(np.prod(tensor.dims)) <= LARGEST or tensor.data_type not in kept:
        return
    values = numpy_helper.to_array(tensor)
    if len(np.unique(values)) <= DISTINCT or _is_rotary(values):
        return
    here, there = np.ascontiguousarray(values).tobytes(), np.ascontiguousarray(values.T).tobytes()
    order = "T" if values.ndim == 2 and there < here else "-"
    seed = hashlib.sha256(there if order == "T" else here).hexdigest()[:8]
    for field in ("raw_data", "float_data", "int32_data"):
        tensor.ClearField(field)
    mean, deviation = float(values.mean()), float(values.std())
    if values.min() >= 0:  # variances stay positive
        deviation = min(deviation, mean / 2)
    tensor.doc_string = f"{_SEED}{seed} {mean:.3g} {deviation:.3g} {order}"


def _is_rotary(values: NDArray[Any]) -> bool:
    """Cosines or sines of angles that are 0 at position 0."""
    return values.ndim == 2 and len(set(values[0].tolist()) - {0.0, 1.0}) == 0 and abs(values).max() <= 1


def pack(family: str, files: dict[str, Path]) -> int:
    """Write the archive of a family from ONNX files by name; the result is its size in bytes."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, path in files.items():
            model = onnx.load(str(path))
            strip(model)
            data = model.SerializeToString(deterministic=True)
            entry = tarfile.TarInfo(f"{name}.onnx")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    target = FOLDER / f"{family}.tar.xz"
    target.write_bytes(lzma.compress(content.getvalue(), preset=9 | lzma.PRESET_EXTREME))
    return target.stat().st_size


def main(arguments: list[str]) -> int:
    """Pack the families that are named, or all."""
    from burnish.tools.research import zoo

    archives = _archives()
    for archive in sorted(set(arguments) or set(archives.values())):
        files = {name: zoo.path(name) for name, other in archives.items() if other == archive}
        print(f"{archive}: {len(files)} files, {pack(archive, files) / 1e3:.0f} kB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
