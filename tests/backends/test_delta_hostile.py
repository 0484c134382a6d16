"""Delta packs that were damaged, made to deceive, or do not fit: refused, and no file is harmed."""

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
from delta_packs import content, packed, rebuilt, rounded_pack, saved

from burnish.backends.delta import manifest, planes, reading, rebuilding, writing
from burnish.frontends import stored
from burnish.ir.errors import InputError


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of packs are written: none has to outlive the machine."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a base, three variants of it, and the pack of them."""
    return packed(tmp_path)


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


def test_a_plane_that_unpacks_to_more_than_it_should_is_refused() -> None:
    bomb = lzma.compress(bytes(1 << 26), lzma.FORMAT_RAW, filters=planes._FILTERS)
    packed = bytes([3]) + len(bomb).to_bytes(4, "little") + bomb
    with pytest.raises(planes.Damaged):
        planes.decode(BytesIO(packed).read, 1 << 16, 1)
    with pytest.raises(planes.Damaged, match="longer"):
        planes.decode(BytesIO(bytes([0, 255, 255, 255, 255])).read, 16, 1)


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
