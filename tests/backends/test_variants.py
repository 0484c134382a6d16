"""Variants of a pack in sessions beside each other: they compute what their files compute, and share the weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from burnish.backends.delta import writing
from burnish.backends.ort.session import from_path
from burnish.backends.ort.variants import Variants
from burnish.frontends import stored
from burnish.ir.errors import InputError

DEMO = Path(__file__).parents[2] / "tools" / "demo"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def packed(folder: Path, paths: dict[str, Path], *, keep_base: bool = True) -> Path:
    """The pack of models, the base first."""
    models = {name: stored.read(path) for name, path in paths.items()}
    base = next(iter(models))
    writing.write(folder / "pack", (base, models.pop(base)), models, keep_base=keep_base)
    return folder / "pack"


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, Path]:
    """A vision transformer, and three that each change one more layer; `b` has external data, `c` another output."""
    model = onnx.load(DEMO / "digits_vit.onnx")
    found = {"base": DEMO / "digits_vit.onnx"}
    random = np.random.default_rng(0)
    large = [one for one in model.graph.initializer if len(one.raw_data) > 20_000]
    for number, name in enumerate("abc"):
        array = numpy_helper.to_array(large[number])
        array = array + 0.02 * array.std() * random.standard_normal(array.shape).astype(np.float32)
        large[number].CopyFrom(numpy_helper.from_array(array, large[number].name))
        found[name] = tmp_path / f"{name}.onnx"
        copy = onnx.ModelProto.FromString(model.SerializeToString())
        if name == "c":
            copy.graph.node.add(op_type="Softmax", input=["logits"], output=["shares"])
            copy.graph.output.append(helper.make_tensor_value_info("shares", TensorProto.FLOAT, None))
        onnx.save(copy, found[name], save_as_external_data=name == "b", location="b.data", size_threshold=64)
    return found


@pytest.mark.parametrize("prepared", [False, True])
def test_variants_compute_what_their_files_compute(paths: dict[str, Path], tmp_path: Path, prepared: bool) -> None:
    pack = packed(tmp_path, paths)
    with np.load(DEMO / "digits.npz") as digits:
        feeds = {"image": digits["image"][:32]}
    for _ in range(2):  # prepared anew, and as they are
        variants = Variants(pack, prepared=tmp_path / "prepared" if prepared else None)
        assert variants.names == ("base", "a", "b", "c")
        runners = {name: variants.load(name) for name in variants.names}
        for name, runner in runners.items():
            expected = from_path(paths[name]).run(feeds)
            outputs = runner.run(feeds)
            assert list(outputs) == list(expected)
            for key, array in expected.items():
                np.testing.assert_allclose(outputs[key], array, rtol=1e-4, atol=1e-5)
        assert np.abs(runners["a"].run(feeds)["logits"] - runners["base"].run(feeds)["logits"]).max() > 1e-3


def test_prepared_weights_are_kept_once(paths: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "prepared"
    variants = Variants(packed(tmp_path, paths), prepared=folder)
    for name in variants.names:
        variants.load(name).close()
    sizes = {name: (folder / f"{name}.data").stat().st_size for name in variants.names}
    assert all(sizes[name] < 0.6 * sizes["base"] for name in "abc")
    at = (folder / "a.onnx").stat().st_mtime_ns
    Variants(tmp_path / "pack", prepared=folder).load("a")
    assert (folder / "a.onnx").stat().st_mtime_ns == at
    index = json.loads((folder / "prepared.json").read_text())
    index["made_for"]["processor"] = "another"
    (folder / "prepared.json").write_text(json.dumps(index))
    Variants(tmp_path / "pack", prepared=folder)
    assert [one.name for one in folder.iterdir()] == ["prepared.json"]
    (folder / "prepared.json").write_text("[]")
    with pytest.raises(InputError, match="index"):
        Variants(tmp_path / "pack", prepared=folder)
    with pytest.raises(InputError, match="something else"):
        Variants(tmp_path / "pack", prepared=tmp_path)


def test_weights_in_memory_are_shared_and_freed(paths: dict[str, Path], tmp_path: Path) -> None:
    variants = Variants(packed(tmp_path, paths))
    one, other = variants.model("a"), variants.model("b")

    def shared() -> int:
        pairs = [(one.graph.initializers[name], other.graph.initializers[name]) for name in one.graph.initializers]
        arrays = [(a.const_value.numpy(), b.const_value.numpy()) for a, b in pairs]
        return sum(np.shares_memory(a, b) for a, b in arrays if a.nbytes > 1024)

    large = sum(value.const_value.nbytes > 1024 for value in one.graph.initializers.values())
    assert shared() == large - 1
    assert not next(iter(one.graph.initializers.values())).const_value.numpy().flags.writeable
    runner = variants.load("c")
    held = len(variants._held)
    runner.close()
    del runner
    assert len(variants._held) < held


def test_a_pack_without_its_base_is_loaded_with_it(paths: dict[str, Path], tmp_path: Path) -> None:
    pack = packed(tmp_path, paths, keep_base=False)
    image = np.zeros((1, 1, 8, 8), np.float32)
    with pytest.raises(InputError, match="does not hold the base"):
        Variants(pack).load("a")
    variants = Variants(pack, stored.read(paths["base"]))
    assert variants.names == ("a", "b", "c")
    for prepared in (None, tmp_path / "prepared"):
        variants = Variants(pack, stored.read(paths["base"]), prepared=prepared)
        expected = from_path(paths["c"]).run({"image": image})
        np.testing.assert_allclose(variants.load("c").run({"image": image})["shares"], expected["shares"], atol=1e-5)


@pytest.mark.parametrize("name", ["base.data", "changes.data", "graphs.data"])
def test_what_is_damaged_is_not_loaded(paths: dict[str, Path], tmp_path: Path, name: str) -> None:
    pack = packed(tmp_path, paths)
    data = bytearray((pack / name).read_bytes())
    for place in range(40, len(data), 400):
        data[place] ^= 4
    (pack / name).write_bytes(data)
    variants = Variants(pack)
    with pytest.raises(InputError, match="damaged after it was written"):
        variants.load("c")


def test_weights_of_other_kinds_and_in_other_places(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    weights = {
        "half": random.standard_normal((64, 64)).astype(np.float16),
        "bytes": random.integers(0, 255, (64, 64), np.uint8),
    }
    inner = numpy_helper.from_array(random.standard_normal((64, 64)).astype(np.float16), "inner")
    held = numpy_helper.from_array(random.standard_normal((64, 64)).astype(np.float16), "held")
    body = [
        helper.make_graph(
            [helper.make_node("MatMul", ["y", "inner"], ["r"])], "then", [],
            [helper.make_tensor_value_info("r", TensorProto.FLOAT16, None)], [inner],
        ),
        helper.make_graph(
            [helper.make_node("Identity", ["y"], ["s"])], "else", [],
            [helper.make_tensor_value_info("s", TensorProto.FLOAT16, None)],
        ),
    ]  # fmt: skip
    nodes = [
        helper.make_node("Constant", [], ["c"], value=held),
        helper.make_node("MatMul", ["x", "half"], ["h"]),
        helper.make_node("Cast", ["bytes"], ["b"], to=TensorProto.FLOAT16),
        helper.make_node("Add", ["b", "c"], ["d"]),
        helper.make_node("Cast", ["packed"], ["p"], to=TensorProto.FLOAT16),
        helper.make_node("Add", ["d", "p"], ["e"]),
        helper.make_node("MatMul", ["h", "e"], ["y"]),
        helper.make_node("If", ["flag"], ["z"], then_branch=body[0], else_branch=body[1]),
    ]
    packed_numbers = helper.make_tensor("packed", TensorProto.INT4, [64, 64], random.bytes(2048), raw=True)
    for name in ("base", "a"):
        graph = helper.make_graph(
            nodes, "g",
            [
                helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["N", 64]),
                helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
            ],
            [helper.make_tensor_value_info("z", TensorProto.FLOAT16, None)],
            [*(numpy_helper.from_array(array, key) for key, array in weights.items()), packed_numbers],
        )  # fmt: skip
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        (tmp_path / f"{name}.onnx").write_bytes(made.SerializeToString())
        weights["half"] = weights["half"] * np.float16(0.5)
    paths = {name: tmp_path / f"{name}.onnx" for name in ("base", "a")}
    variants = Variants(packed(tmp_path, paths))
    for name, path in paths.items():
        for flag in (True, False):
            feeds = {"x": np.ones((2, 64), np.float16), "flag": np.array(flag)}
            expected = from_path(path).run(feeds)["z"]
            np.testing.assert_allclose(variants.load(name).run(feeds)["z"], expected, rtol=0.02, atol=1)


MEASURE = """
import ctypes, sys
from pathlib import Path
import numpy as np
from burnish.backends.ort.session import from_path
from burnish.backends.ort.variants import Variants

def resident():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))

how, folder = sys.argv[1:]
feeds = {"x": np.ones((1, 1024), np.float32)}
from_path(f"{folder}/small.onnx").run({"x": np.ones((1, 4), np.float32)})
before = resident()
if how == "apart":
    runners = [from_path(f"{folder}/{name}.onnx") for name in "abc"]
else:
    variants = Variants(f"{folder}/pack", prepared=None if how == "shared" else f"{folder}/prepared")
    runners = [variants.load(name) for name in "abc"]
for runner in runners:
    runner.run(feeds)
if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # what loading took and gave back may still be held
    libc.malloc_trim(0)
print(resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux says how much is resident")
def test_three_sessions_take_less_than_two_thirds_of_what_they_take_apart(tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    weights = {f"w{number}": random.standard_normal((1024, 1024)).astype(np.float32) for number in range(13)}

    def saved(name: str, arrays: dict[str, np.ndarray]) -> Path:
        values = ["x", *(f"{key}.y" for key in arrays)]
        nodes = [
            helper.make_node("MatMul", [value, key], [f"{key}.y"])
            for value, key in zip(values[:-1], arrays, strict=True)
        ]
        size = len(next(iter(arrays.values())))
        graph = helper.make_graph(
            nodes, "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", size])],
            [helper.make_tensor_value_info(values[-1], TensorProto.FLOAT, ["N", size])],
            [numpy_helper.from_array(array, key) for key, array in arrays.items()],
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        path = tmp_path / f"{name}.onnx"
        onnx.save(model, path, save_as_external_data=True, location=f"{name}.data")
        return path

    saved("small", {"w": np.ones((4, 4), np.float32)})
    paths = {"base": saved("base", weights)}
    for number, name in enumerate("abc"):
        paths[name] = saved(name, weights | {f"w{number}": weights[f"w{number}"] * np.float32(1.5)})
    pack = packed(tmp_path, paths)
    base = sum(one.stat().st_size for one in (paths["base"], tmp_path / "base.data"))
    assert sum(one.stat().st_size for one in pack.iterdir()) <= (1 + 3 / 13 + 0.01) * base
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / ".src"), "OMP_NUM_THREADS": "1"}

    def measured(how: str) -> int:
        words = [sys.executable, "-c", MEASURE, how, str(tmp_path)]
        return int(subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout)

    apart = measured("apart")
    measured("prepared")  # the first time writes them
    assert measured("shared") <= 0.65 * apart
    assert measured("prepared") <= 0.65 * apart
