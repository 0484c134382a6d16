"""Delta packs: what is rebuilt is what was packed, byte for byte, and what was damaged is refused."""

from __future__ import annotations

import json
import lzma
import os
import shutil
from io import BytesIO
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from burnish.backends.delta import low_rank, manifest, planes, reading, rebuilding, writing
from burnish.frontends import stored
from burnish.ir.errors import InputError

DTYPES = ("float32", "float16", "float64", "int8", "int64")


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


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of packs are written: none has to outlive the machine."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a base, three variants of it, and the pack of them."""
    random = np.random.default_rng(7)
    (tmp_path / "in").mkdir()
    base = network(random)
    paths = {"base": saved(base, tmp_path / "in", "base")}
    for name, external in (("a", ""), ("b", "one"), ("c", "each")):
        changed = onnx.ModelProto.FromString(base.SerializeToString())
        for tensor in changed.graph.initializer[1:]:
            array = numpy_helper.to_array(tensor)
            noise = 0.01 * random.standard_normal(array.shape)
            if tensor.name == "w1":
                noise = 0.1 * random.standard_normal((32, 1)) @ random.standard_normal((1, 32))
            tensor.CopyFrom(numpy_helper.from_array((array + noise).astype(np.float32), tensor.name))
        paths[name] = saved(changed, tmp_path / "in", name, external)
    models = {name: stored.read(path) for name, path in paths.items()}
    writing.write(tmp_path / "pack", ("base", models.pop("base")), models)
    return tmp_path


def rebuilt(folder: Path, into: Path, base: Path | None = None) -> dict[str, bytes]:
    """The files of all models of a pack."""
    into.mkdir()
    pack = reading.Pack(folder, None if base is None else stored.read(base))
    for model in (*([] if base else [pack.manifest.base]), *pack.manifest.variants):
        rebuilding.rebuild(pack, model.name, into / model.files[0].path)
    return content(into)


@pytest.mark.parametrize("seed", range(15))
def test_what_is_rebuilt_is_what_was_packed(tmp_path: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    source = tmp_path / "in"
    source.mkdir()
    base = network(random, 1 + seed % 4, DTYPES[seed % len(DTYPES)])
    spelled = ("", "one", "each")
    paths = [saved(onnx.ModelProto.FromString(base.SerializeToString()), source, "base", spelled[seed % 3])]
    for number in range(3):
        one = edited(base, random)
        paths.append(saved(one, source, f"v{number}", spelled[(seed + number) % 3]))
    models = {path.stem: stored.read(path) for path in paths}
    first = models.pop("base")
    made = writing.write(tmp_path / "pack", ("base", first), models)
    assert rebuilt(tmp_path / "pack", tmp_path / "out") == content(source)
    again = writing.write(tmp_path / "again", ("base", first), models)
    assert made == again and content(tmp_path / "pack") == content(tmp_path / "again")
    writing.write(tmp_path / "light", ("base", first), models, keep_base=False)
    expected = {name: data for name, data in content(source).items() if "base" not in name}
    assert rebuilt(tmp_path / "light", tmp_path / "out2", paths[0]) == expected


def test_a_tensor_is_kept_once_and_as_what_takes_least(folder: Path) -> None:
    found = manifest.read(folder / "pack")
    base = set(found.used(found.base))
    assert len({one.sha256 for one in found.tensors}) == len(found.tensors)
    for model in found.variants:
        own = [found.tensors[index] for index in found.used(model) if index not in base]
        kept = {one.name: one for one in own}
        assert len(base & set(found.used(model))) >= 3  # w0, the constant and the branch's weight
        assert kept["w2"].coding == "change" and kept["w2"].stored < 0.75 * kept["w2"].bytes
        assert found.tensors[kept["w2"].of].name == "w2"


def test_of_many_tensors_alike_the_nearest_is_found(tmp_path: Path) -> None:
    random = np.random.default_rng(4)
    arrays = [random.standard_normal((16, 20)).astype(np.float32) for _ in range(150)]

    def model(arrays: list[np.ndarray], name: str) -> Path:
        weights = [numpy_helper.from_array(array, f"{name}{number}") for number, array in enumerate(arrays)]
        nodes = [helper.make_node("Identity", [one.name], [f"y{number}"]) for number, one in enumerate(weights)]
        outputs = [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, [16, 20]) for i in range(len(arrays))]
        made = helper.make_model(helper.make_graph(nodes, "g", [], outputs, weights), ir_version=10)
        (tmp_path / f"{name}.onnx").write_bytes(made.SerializeToString())
        return tmp_path / f"{name}.onnx"

    changed = [array + 0.001 * random.standard_normal(array.shape).astype(np.float32) for array in arrays]
    base, other = stored.read(model(arrays, "w")), stored.read(model(changed[3:], "v"))
    found = writing.write(tmp_path / "pack", ("base", base), {"other": other})
    kept = [found.tensors[index] for index in found.used(found.variants[0])]
    assert [found.tensors[one.of].name for one in kept] == [f"w{number}" for number in range(3, 150)]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("rank", [1, 8, 32])
def test_a_merged_adapter_is_found_again(dtype: str, rank: int) -> None:
    random = np.random.default_rng(rank)
    kind = reading.dtype(dtype)
    base = random.standard_normal((256, 192)).astype(kind)
    change = random.standard_normal((256, rank)) @ random.standard_normal((rank, 192)) * 0.2 / np.sqrt(rank)
    changed = (base.astype(np.float32) + change.astype(np.float32)).astype(kind)
    found = low_rank.find(base, changed)
    assert found is not None and found.left.shape == (256, rank)
    guess = found.guess(base, 0)
    assert (guess == changed).mean() > 0.3, "the rest is the last places of small numbers"
    assert np.abs(guess.astype(np.float64) - changed.astype(np.float64)).max() < 16 * 2.0 ** -planes.MANTISSA[dtype]
    assert (
        low_rank.find(base, (base.astype(np.float32) + 0.2 * random.standard_normal(base.shape)).astype(kind)) is None
    )
    order = random.permutation(rank)  # sums are exact: their order makes no difference
    other = low_rank.Factors(found.left[:, order], found.right[order], found.scale)
    assert other.guess(base, 0).tobytes() == guess.tobytes()
    assert np.concatenate([found.guess(base[i : i + 1], i) for i in range(256)]).tobytes() == guess.tobytes()


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("spread", [0, 1, 200, None])
def test_planes_give_back_what_they_were_given(width: int, spread: int | None) -> None:
    random = np.random.default_rng(3)
    kind = np.dtype(f"<u{width}")
    numbers = random.integers(0, np.iinfo(kind).max, 40_000, kind, endpoint=True)
    changed = numbers.copy() if spread is None else numbers + random.integers(0, spread + 1, numbers.size).astype(kind)
    assert (planes.unzigzag(planes.zigzag(numbers)) == numbers).all()
    for mantissa in {0, {2: 7, 4: 23, 8: 52}.get(width, 0)}:
        packed = planes.encode_change(changed, numbers, mantissa)
        read = BytesIO(packed).read
        assert (planes.decode_change(read, numbers, mantissa) == changed).all()
    packed = planes.encode(changed)
    assert (planes.decode(BytesIO(packed).read, changed.size, width) == changed).all()
    assert len(packed) <= changed.nbytes + 5 * width


def test_a_plane_that_unpacks_to_more_than_it_should_is_refused() -> None:
    bomb = lzma.compress(bytes(1 << 26), lzma.FORMAT_RAW, filters=planes._FILTERS)
    packed = bytes([3]) + len(bomb).to_bytes(4, "little") + bomb
    with pytest.raises(planes.Damaged):
        planes.decode(BytesIO(packed).read, 1 << 16, 1)
    with pytest.raises(planes.Damaged, match="longer"):
        planes.decode(BytesIO(bytes([0, 255, 255, 255, 255])).read, 16, 1)


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


def test_weights_of_few_bits_are_what_those_of_the_base_are_rounded_to(tmp_path: Path) -> None:
    pack = reading.Pack(rounded_pack(tmp_path))
    found = pack.manifest
    for model in found.variants:
        kept = {found.tensors[index].name: found.tensors[index] for index in found.used(model)}
        for how in HOW:
            assert kept[how].coding == "rounded" and found.tensors[kept[how].of].name == how
            assert found.tensors[kept[how].by].name == f"{how} scale"
            assert kept[how].stored < (40 if model.name == "few" else 0.2 * kept[how].bytes)
        target = tmp_path / "out" / f"{model.name}.onnx"
        target.parent.mkdir(exist_ok=True)
        rebuilding.rebuild(pack, model.name, target)
        assert target.read_bytes() == (tmp_path / f"{model.name}.onnx").read_bytes()


@pytest.mark.parametrize(
    ("field", "value"),
    [("of", 1), ("by", 99), ("by", -1), ("by", 4), ("bits", 2), ("bits", 4), ("zero", 1 << 20), ("turned", True)],
)
def test_a_rounding_that_cannot_be_is_refused(tmp_path: Path, field: str, value: object) -> None:
    rounded_pack(tmp_path)
    found = manifest.read(tmp_path / "pack")
    number = next(i for i, one in enumerate(found.tensors) if one.coding == "rounded" and not one.turned)
    itself = next(i for i, one in enumerate(found.tensors) if one.coding == "rounded")
    change(tmp_path, **{f"tensors__{number}__{field}": itself if (field, value) in (("of", 1), ("by", 4)) else value})
    if field == "turned":  # the same numbers in another order: the digest tells
        with pytest.raises(InputError, match="damaged"):
            reading.Pack(tmp_path / "pack").check("few")
        return
    with pytest.raises(InputError, match="the manifest is damaged"):
        reading.Pack(tmp_path / "pack")


def test_a_damaged_pack_gives_an_error_or_the_right_files(folder: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    right = content(folder / "in")
    whole = content(folder / "pack")
    refused = 0
    for number in range(250):
        name = sorted(whole)[number % 4]
        data = bytearray(whole[name])
        match int(random.integers(4)):
            case 0:
                data[int(random.integers(len(data)))] ^= 1 << int(random.integers(8))
            case 1:
                del data[int(random.integers(len(data))) :]
            case 2:
                start = int(random.integers(len(data)))
                data[start : start + 8] = random.bytes(8)
            case 3:
                data += random.bytes(3)
        (folder / "pack" / name).write_bytes(data)
        into = tmp_path / "out"
        try:
            assert rebuilt(folder / "pack", into) == right
        except InputError as error:
            refused += 1
            assert str(folder / "pack") in str(error.place)
            found = content(into) if into.exists() else {}
            assert all(right[one] == found[one] for one in found)  # a model before the damage, whole
            assert not list(into.glob(".burnish-*"))
        shutil.rmtree(into, ignore_errors=True)
        (folder / "pack" / name).write_bytes(whole[name])
    assert refused > 200


def change(folder: Path, **fields: object) -> None:
    """Write another manifest into the pack."""
    path = folder / "pack" / "manifest.json"
    found = json.loads(path.read_text())
    for place, value in fields.items():
        target, steps = found, place.split("__")
        for step in steps[:-1]:
            target = target[int(step) if step.isdigit() else step]
        target[int(steps[-1]) if steps[-1].isdigit() else steps[-1]] = value
    path.write_text(json.dumps(found))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("variants__0__files__0__path", "../a.onnx"),
        ("variants__0__files__0__path", "/tmp/a.onnx"),
        ("variants__0__files__0__path", "sub/a.onnx"),
        ("variants__1__files__1__path", "x/../../b.data"),
        ("variants__1__files__1__path", "C:b.data"),
        ("variants__1__files__1__path", "x\\b.data"),
        ("variants__1__files__1__path", "b\0.data"),
        ("variants__1__files__1__path", "B.onnx"),
        ("variants__1__files__1__path", "\ud800"),
        ("variants__0__name", "../a"),
        ("variants__0__name", "base"),
        ("variants__0__skip", -1),
        ("variants__0__skip", 1 << 60),
        ("variants__0__files__0__bytes", 1 << 62),
        ("variants__0__files__0__pieces", [1 << 40]),
        ("variants__0__files__0__pieces", [-5, 0, 5]),
        ("variants__0__files__0__pieces", [0, 9999, 0]),
        ("variants__0__files__0__sha256", "0"),
        ("tensors__0__at", -1),
        ("tensors__0__at", 1 << 40),
        ("tensors__0__stored", 0),
        ("tensors__0__sha256", "z" * 64),
        ("tensors__0__dtype", "object"),
        ("tensors__6__of", 6),
        ("tensors__6__of", -1),
        ("tensors__6__rank", 1 << 40),
        ("tensors__6__coding", "pickle"),
        ("tensors__6__bytes", 1 << 40),
        ("dictionary", 60),
        ("sizes", {}),
        ("version", 2),
        ("format", "zip"),
        ("more", 1),
    ],
)
def test_a_manifest_that_cannot_be_is_refused(folder: Path, place: str, value: object) -> None:
    changed = place.startswith("tensors__6__")
    found = manifest.read(folder / "pack")
    coding = "low-rank" if place.endswith("rank") else "change"
    number = next(i for i, one in enumerate(found.tensors) if one.coding == coding)
    change(folder, **{place.replace("__6__", f"__{number}__") if changed else place: value})
    with pytest.raises(InputError) as refused:
        reading.Pack(folder / "pack")
    assert "manifest.json" in str(refused.value.place)


def test_links_and_other_folders_are_no_packs(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        reading.Pack(tmp_path / "nothing")
    with pytest.raises(InputError, match="no pack"):
        reading.Pack(folder / "in")
    data = folder / "pack" / "base.data"
    os.rename(data, folder / "elsewhere")
    data.symlink_to(folder / "elsewhere")
    with pytest.raises(InputError, match="file of its own"):
        reading.Pack(folder / "pack")


def test_another_base_is_refused_with_the_tensor_that_is_not_in_it(folder: Path) -> None:
    models = {name: stored.read(folder / "in" / f"{name}.onnx") for name in ("base", "a")}
    writing.write(folder / "light", ("base", models["base"]), {"a": models["a"]}, keep_base=False)
    with pytest.raises(InputError, match="does not hold the base"):
        rebuilding.rebuild(reading.Pack(folder / "light"), "a", folder / "x.onnx")
    with pytest.raises(InputError, match="no tensor with the values of `w"):
        rebuilding.rebuild(reading.Pack(folder / "light", models["a"]), "a", folder / "x.onnx")
    with pytest.raises(InputError, match="`base` is not in the pack"):
        rebuilding.rebuild(reading.Pack(folder / "light", models["base"]), "base", folder / "x.onnx")
    assert not (folder / "x.onnx").exists()
    other = onnx.load(folder / "in" / "base.onnx")  # other bytes around the same values will do
    other.doc_string = "read and written again"
    again = saved(other, folder, "again", "one")
    rebuilding.rebuild(reading.Pack(folder / "light", stored.read(again)), "a", folder / "x.onnx")
    assert (folder / "x.onnx").read_bytes() == (folder / "in" / "a.onnx").read_bytes()


def test_external_data_of_another_model_stay(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    pack = reading.Pack(folder / "pack")
    (out / "b.data").write_bytes(b"another's")
    (out / "b.onnx").write_bytes(b"older")
    with pytest.raises(InputError, match="another file"):
        rebuilding.rebuild(pack, "b", out / "b.onnx")
    assert content(out) == {"b.data": b"another's", "b.onnx": b"older"}
    (out / "b.data").unlink()
    for _ in range(2):  # what is there already and is right may stay
        assert rebuilding.rebuild(pack, "b", out / "b.onnx") == [out / "b.onnx", out / "b.data"]
    (out / "weights").symlink_to(tmp_path)
    with pytest.raises(InputError, match="no folder of its own"):
        rebuilding.rebuild(pack, "c", out / "c.onnx")
    with pytest.raises(InputError, match="name of its own external data"):
        rebuilding.rebuild(pack, "b", out / "b.data")
    with pytest.raises(InputError, match="model that is being read"):
        rebuilding.rebuild(pack, "a", folder / "pack" / "base.data")


def test_a_disk_that_fails_leaves_what_was_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = folder / "out"
    out.mkdir()
    (out / "b.onnx").write_bytes(b"older")
    replace = os.replace

    def refuse(source: object, target: object) -> None:
        if str(target).endswith(".onnx"):
            raise OSError(28, "No space left on device")
        replace(str(source), str(target))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(InputError, match="No space left"):
        rebuilding.rebuild(reading.Pack(folder / "pack"), "b", out / "b.onnx")
    assert content(out) == {"b.onnx": b"older"}


def test_a_pack_is_replaced_and_nothing_else(folder: Path) -> None:
    models = {name: stored.read(folder / "in" / f"{name}.onnx") for name in ("base", "a")}
    writing.write(folder / "pack", ("base", models["base"]), {"a": models["a"]})
    assert [one.name for one in manifest.read(folder / "pack").variants] == ["a"]
    for name, match in (("in", "no pack"), ("x.onnx", "a pack is a folder"), ("no/pack", "does not exist")):
        with pytest.raises(InputError, match=match):
            writing.write(folder / name, ("base", models["base"]), {"a": models["a"]})
    (folder / "pack" / "mine").touch()
    with pytest.raises(InputError, match="`mine`"):
        writing.write(folder / "pack", ("base", models["base"]), {"a": models["a"]})
