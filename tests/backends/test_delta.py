"""Delta packs: what is rebuilt is what was packed, byte for byte."""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path

import numpy as np
import onnx
import pytest
from delta_packs import HOW, content, edited, network, packed, rebuilt, rounded_pack, saved
from onnx import TensorProto, helper, numpy_helper

from burnish.backends.delta import low_rank, manifest, planes, reading, rebuilding, writing
from burnish.frontends import stored

DTYPES = ("float32", "float16", "float64", "int8", "int64")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of packs are written: none has to outlive the machine."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a base, three variants of it, and the pack of them."""
    return packed(tmp_path)


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
