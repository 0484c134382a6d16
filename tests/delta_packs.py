"""Delta packs for tests: small models, variants of them in all spellings of external data, and their packs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from burnish.backends.delta import reading, rebuilding, writing
from burnish.frontends import stored


def network(random: np.random.Generator, layers: int = 3, dtype: str = "float32") -> onnx.ModelProto:
    """Products one after the other, a branch with a weight of its own, and a constant in a node."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    weights = {f"w{i}": random.standard_normal((32, 32)).astype(dtype) for i in range(layers)}
    nodes, value = [], "x"
    for name in weights:
        nodes.append(helper.make_node("MatMul", [value, name], [f"y{name}"]))
        value = f"y{name}"
    held = numpy_helper.from_array(random.standard_normal((40, 32)).astype(dtype), "held")
    nodes.append(helper.make_node("Constant", [], ["c"], value=held))
    inner = numpy_helper.from_array(random.standard_normal((32, 32)).astype(dtype), "inner")
    body = helper.make_graph(
        [helper.make_node("MatMul", [value, "inner"], ["r"])],
        "then",
        [],
        [helper.make_tensor_value_info("r", kind, None)],
        [inner],
    )
    other = helper.make_graph(
        [helper.make_node("Identity", [value], ["s"])], "else", [], [helper.make_tensor_value_info("s", kind, None)]
    )
    nodes.append(helper.make_node("If", ["flag"], ["z"], then_branch=body, else_branch=other))
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("x", kind, ["N", 32]),
            helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("z", kind, None), helper.make_tensor_value_info("c", kind, None)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def edited(model: onnx.ModelProto, random: np.random.Generator) -> onnx.ModelProto:
    """A copy with one to three edits of weights or of the graph."""
    made = onnx.ModelProto.FromString(model.SerializeToString())
    for _ in range(int(random.integers(1, 4))):
        tensor = made.graph.initializer[int(random.integers(len(model.graph.initializer)))]
        array = numpy_helper.to_array(tensor).copy()
        match int(random.integers(8)):
            case 0:
                array = (array + 0.01 * random.standard_normal(array.shape)).astype(array.dtype)
            case 1:
                array[int(random.integers(len(array)))] = 0
            case 2:
                change = random.standard_normal((array.shape[0], 2)) @ random.standard_normal((2, array.shape[1]))
                array = (array + 0.1 * change).astype(array.dtype)
            case 3:
                with np.errstate(all="ignore"):
                    array.flat[0], array.flat[-1] = (np.nan, -np.inf) if array.dtype.kind == "f" else (1, 0)
            case 4:
                tensor.name += "'"
                for node in made.graph.node:
                    node.input[:] = [tensor.name if f"{name}'" == tensor.name else name for name in node.input]
            case 5:
                made.doc_string += "changed "
            case 6:
                made.graph.node.add(op_type="Neg", input=["c"], output=[f"neg{len(made.graph.node)}"])
            case 7:
                extra = numpy_helper.from_array(random.standard_normal(300 + len(made.graph.initializer)), "")
                extra.name = f"extra{len(made.graph.initializer)}"
                made.graph.initializer.append(extra)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return made


def saved(model: onnx.ModelProto, folder: Path, name: str, external: str = "") -> Path:
    """The path of the model, its weights in the file, in one beside it, or in one each in a folder."""
    path = folder / f"{name}.onnx"
    if external:
        one = external == "one"
        if not one:
            (folder / "weights").mkdir(exist_ok=True)
            for tensor in model.graph.initializer:
                onnx.external_data_helper.set_external_data(tensor, f"weights/{name}-{tensor.name.strip(chr(39))}")
                tensor.data_location = TensorProto.EXTERNAL
            onnx.save(onnx.external_data_helper.write_external_data_tensors(model, str(folder)), path)
            return path
        onnx.save(model, path, save_as_external_data=True, location=f"{name}.data", size_threshold=64)
    else:
        path.write_bytes(model.SerializeToString())
    return path


def content(folder: Path) -> dict[str, bytes]:
    """The files below a folder."""
    return {str(one.relative_to(folder)): one.read_bytes() for one in sorted(folder.rglob("*")) if one.is_file()}


def packed(folder: Path) -> Path:
    """The folder, with a base, three variants of it in `in`, and their pack in `pack`."""
    random = np.random.default_rng(7)
    (folder / "in").mkdir()
    base = network(random)
    paths = {"base": saved(base, folder / "in", "base")}
    for name, external in (("a", ""), ("b", "one"), ("c", "each")):
        changed = onnx.ModelProto.FromString(base.SerializeToString())
        for tensor in changed.graph.initializer[1:]:
            array = numpy_helper.to_array(tensor)
            noise = 0.01 * random.standard_normal(array.shape)
            if tensor.name == "w1":
                noise = 0.1 * random.standard_normal((32, 1)) @ random.standard_normal((1, 32))
            tensor.CopyFrom(numpy_helper.from_array((array + noise).astype(np.float32), tensor.name))
        paths[name] = saved(changed, folder / "in", name, external)
    models = {name: stored.read(path) for name, path in paths.items()}
    writing.write(folder / "pack", ("base", models.pop("base")), models)
    return folder


def rebuilt(folder: Path, into: Path, base: Path | None = None) -> dict[str, bytes]:
    """The files of all models of a pack."""
    into.mkdir()
    pack = reading.Pack(folder, None if base is None else stored.read(base))
    for model in (*([] if base else [pack.manifest.base]), *pack.manifest.variants):
        rebuilding.rebuild(pack, model.name, into / model.files[0].path)
    return content(into)


def rounded_weights(array: np.ndarray, how: str) -> tuple[np.ndarray, np.ndarray]:
    """A weight in few bits, as ONNX Runtime's operators and QDQ hold it, and its scales."""
    if how == "columns":  # QDQ of a MatMul: int8, a scale for each output
        scales = np.abs(array).max(0) / 127
        return np.clip(np.rint(array / scales), -128, 127).astype(np.int8), scales
    if how == "rows":  # of a table: uint8
        scales = np.abs(array).max(1) / 127
        return np.clip(np.rint(array / scales[:, None]) + 128, 0, 255).astype(np.uint8), scales
    blocks = array.T.reshape(array.shape[1], -1, 32)  # MatMulNBits, scales of both signs
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)
    bits = 8 if how == "blocks" else 4
    half = 1 << bits - 1
    scales = largest / -half
    numbers = np.clip(np.rint(blocks / scales) + half, 0, 2 * half - 1).astype(np.uint8)
    if bits == 4:
        numbers = numbers[..., ::2] | numbers[..., 1::2] << 4
    return numbers, scales[..., 0]


HOW = ("columns", "rows", "blocks", "nibbles")


HOW = ("columns", "rows", "blocks", "nibbles")
"""Ways to round."""


def rounded_pack(folder: Path) -> Path:
    """The pack of a model, a variant in which its weights have few bits, and one that was rounded otherwise."""
    random = np.random.default_rng(11)
    arrays = {how: random.standard_normal((320, 352)).astype(np.float32) for how in HOW}
    few: dict[str, np.ndarray] = {}
    for how, array in arrays.items():
        numbers, scales = rounded_weights(array, how)
        few |= {how: numbers, f"{how} scale": scales.astype(np.float32)}
    other = few | {how: few[how] ^ (random.random(few[how].shape) < 0.02) for how in HOW}
    paths = {}
    for name, weights in (("base", arrays), ("few", few), ("other", other)):
        tensors = [numpy_helper.from_array(array, key) for key, array in weights.items()]
        nodes = [helper.make_node("Shape", [one.name], [f"{one.name} shape"]) for one in tensors]
        outputs = [helper.make_tensor_value_info(f"{one.name} shape", TensorProto.INT64, None) for one in tensors]
        model = helper.make_model(helper.make_graph(nodes, "g", [], outputs, tensors), ir_version=10)
        paths[name] = folder / f"{name}.onnx"
        paths[name].write_bytes(model.SerializeToString())
    models = {name: stored.read(path) for name, path in paths.items()}
    writing.write(folder / "pack", ("base", models.pop("base")), models)
    return folder / "pack"
