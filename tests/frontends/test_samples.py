"""Samples that users give are read in every form, and refused with a place, a cause and a hint."""

from __future__ import annotations

import io
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx_ir as oir
import pytest
from onnx import parser

from burnish.frontends import arrays
from burnish.frontends.samples import read_samples
from burnish.ir.errors import InputError
from burnish.ir.samples import Sample

HEADER = '<ir_version: 10, opset_import: ["": 20]>'
TEXT = "g (int64[b, s] ids, int64[b, s] mask) => (int64[b, s] y) { y = Mul (ids, mask) }"
IMAGE = "g (float[b, 3, 4, 4] image) => (float[b, 3, 4, 4] y) { y = Relu (image) }"
FIXED = "g (float[2, 4] x) => (float[2, 4] y) { y = Relu (x) }"


def model(text: str) -> oir.Model:
    return oir.from_proto(parser.parse_model(HEADER + text))


def tokens(rows: int = 2, length: int = 5, dtype: type = np.int64) -> dict[str, np.ndarray]:
    return {"ids": np.arange(rows * length, dtype=dtype).reshape(rows, length), "mask": np.ones((rows, length), dtype)}


def refused(spec: object, text: str) -> InputError:
    with pytest.raises(InputError) as caught:
        read_samples(spec, model(text))
    assert caught.value.place
    return caught.value


def test_arrays_of_the_inputs_ranks_are_one_batch(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, **tokens(), labels=np.array([3, 4]))
    (sample,) = read_samples(path, model(TEXT))
    assert sample.name == str(path) and sample.feeds["ids"].shape == (2, 5) and list(sample.labels) == [3, 4]


def test_arrays_of_one_more_axis_are_stacked_samples(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    stacked = {name: np.stack([array] * 3) for name, array in tokens(dtype=np.int32).items()}
    np.savez_compressed(path, **stacked, label=np.array([7, 8, 9]))
    samples = read_samples(str(path), model(TEXT))
    assert [sample.name for sample in samples] == [f"{path}[{i}]" for i in range(3)]
    assert [int(sample.labels) for sample in samples] == [7, 8, 9]
    assert samples[0].feeds["ids"].dtype == np.int64 and samples[0].feeds["ids"].shape == (2, 5)


def test_numbers_are_stacked_for_inputs_without_axes(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.zeros((3, 2, 4), np.float32), rate=np.full(3, 16000))
    read = model("g (float[b, 4] x, int64 rate) => (float[b, 4] y, int64 z) { y = Relu (x) z = Identity (rate) }")
    samples = read_samples(tmp_path / "data.npz", read)
    assert len(samples) == 3
    assert all(isinstance(one.feeds["rate"], np.ndarray) and one.feeds["rate"].shape == () for one in samples)


def test_a_multiple_of_a_fixed_batch_is_cut(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.zeros((6, 4)), labels=np.arange(6))
    samples = read_samples(tmp_path / "data.npz", model(FIXED))
    assert [sample.feeds["x"].shape for sample in samples] == [(2, 4)] * 3
    assert samples[0].feeds["x"].dtype == np.float32 and list(samples[1].labels) == [2, 3]


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    for name, value in (("b", 1.0), ("a", 0.0)):
        np.save(tmp_path / f"{name}.npy", np.full((1, 3, 4, 4), value))
    (tmp_path / "notes.txt").write_text("not data")
    first, second = read_samples(tmp_path, model(IMAGE))
    assert not first.feeds["image"].any() and second.feeds["image"].all()


def test_a_function_is_called_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "def rows():\n    for n in (2, 3):\n        yield {'ids': [[1] * n], 'mask': [[True] * n]}, n\n"
    (tmp_path / "burnish_sample_source.py").write_text(code + "def broken():\n    raise KeyError('no')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    first, second = read_samples("burnish_sample_source:rows", model(TEXT))
    assert first.feeds["mask"].dtype == np.int64 and second.feeds["ids"].shape == (1, 3) and int(second.labels) == 3
    assert "did you mean `rows`" in str(refused("burnish_sample_source:row", TEXT))
    assert "KeyError" in refused("burnish_sample_source:broken", TEXT).cause
    assert "cannot be imported" in refused("burnish_no_such_module:rows", TEXT).cause
    sys.modules.pop("burnish_sample_source")


def test_dictionaries_pairs_and_samples_are_taken_and_a_missing_batch_is_added() -> None:
    given = [{"ids": [1, 2], "mask": [1, 1]}, ({"ids": [[1]], "mask": [[1]]}, 5), Sample("mine", tokens())]
    first, second, third = read_samples(given, model(TEXT))
    assert first.feeds["ids"].shape == (1, 2) and int(second.labels) == 5 and third.name == "mine"


def test_other_columns_of_a_data_set_are_ignored() -> None:
    class Table(list):  # type: ignore[type-arg]
        column_names = ("ids", "mask", "text", "label")

    row = {"ids": [1, 2], "mask": [1, 0], "text": "two words", "label": 1}
    (sample,) = read_samples(Table([row]), model(TEXT))
    assert list(sample.feeds) == ["ids", "mask"] and int(sample.labels) == 1
    Table.column_names = ("input_idz", "mask")
    assert refused(Table([row]), TEXT).cause == "input `ids` is missing"


@pytest.mark.parametrize(
    ("row", "text", "cause", "hint"),
    [
        ({"ids": [[1]], "maks": [[1]]}, TEXT, "input `mask` is missing", "did you mean it by `maks`?"),
        ({**tokens(), "masks": 1}, TEXT, "the model has no input `masks`", "did you mean `mask`?"),
        ({"ids": [[1.5]], "mask": [[1]]}, TEXT, "found float64, the model has int64", None),
        ({"image": np.zeros((1, 3, 4, 4), np.uint8)}, IMAGE, "found uint8, the model has float32", "normalized"),
        ({"image": np.full((1, 3, 4, 4), 1e300)}, IMAGE, "float64 values are too large for the model's float32", None),
        ({"image": np.zeros((3, 4))}, IMAGE, "found 2 axes [3, 4], the model has 4 [b, 3, 4, 4]", None),
        ({"image": np.zeros((1, 1, 4, 4))}, IMAGE, "axis 1 has length 1, the model has 3 [b, 3, 4, 4]", None),
        ({"ids": [[1, 2]], "mask": [[1]]}, TEXT, "`s` is 1 here and 2 in axis 1 of `ids`", "one size"),
        ({"ids": [["a"]], "mask": [[1]]}, TEXT, "found <U1, the model has int64", None),
        ({"ids": [[1], [1, 2]], "mask": [[1]]}, TEXT, "this is no array", None),
        ({"ids": {}, "mask": [[1]]}, TEXT, "found dict, not numbers", "arrays"),
        (3, TEXT, "a sample is a int", "dictionary"),
    ],
)
def test_what_does_not_fit_is_said(row: object, text: str, cause: str, hint: str | None) -> None:
    error = refused([row], text)
    assert error.cause.startswith(cause) and "[0]" in str(error.place)
    assert hint is None or hint in str(error.hint)


def test_sizes_that_the_model_computes_are_checked() -> None:
    text = "g (float[past] p, float[s] x, float[total] m) => (float[total] y) { y = Identity (m) }"
    loaded = model(text)
    loaded.graph.inputs[2].shape = oir.Shape([oir.SymbolicDim("past + s")])
    feeds = {"p": np.zeros(2), "x": np.zeros(3), "m": np.zeros(5)}
    assert read_samples([feeds], loaded)
    with pytest.raises(InputError, match="`past \\+ s` is 5"):
        read_samples([{**feeds, "m": np.zeros(4)}], loaded)


def test_int64_that_fits_becomes_int32_and_other_does_not() -> None:
    text = "g (int32[n] x) => (int32[n] y) { y = Identity (x) }"
    assert read_samples([{"x": [1, 2]}], model(text))[0].feeds["x"].dtype == np.int32
    assert "do not fit" in refused([{"x": [2**40]}], text).cause
    assert "do not fit" in refused([{"x": np.array([2**32 + 1], np.uint64)}], text).cause


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "none.npz", TEXT).cause
    (tmp_path / "text.npz").write_text("hello")
    assert "no whole `.npz`" in refused(tmp_path / "text.npz", TEXT).cause
    np.savez(tmp_path / "data.npz", **tokens(200, 50))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "data.npz").read_bytes()[:-4000])
    assert "no whole `.npz`" in refused(tmp_path / "cut.npz", TEXT).cause
    (tmp_path / "x.csv").write_text("1,2")
    assert "cannot be read from `.csv`" in refused(tmp_path / "x.csv", TEXT).cause
    (tmp_path / "empty").mkdir()
    assert refused(tmp_path / "empty", TEXT).cause == "there are no samples"
    assert refused([], TEXT).cause == "there are no samples"
    assert "one dictionary" in refused(tokens(), TEXT).cause
    assert "iterated" in refused(7, TEXT).cause


def test_a_damaged_member_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", **tokens(20, 50))
    data = bytearray((tmp_path / "data.npz").read_bytes())
    data[2000] ^= 255
    (tmp_path / "bad.npz").write_bytes(data)
    assert refused(tmp_path / "bad.npz", TEXT).exit_code == 2


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    np.save(tmp_path / "data.npy", np.array([{"a": 1}], object), allow_pickle=True)
    assert "pickle" in refused(tmp_path / "data.npy", IMAGE).cause
    np.savez(tmp_path / "data.npz", ids=np.array([print], object), mask=np.zeros((1, 1), np.int64))
    assert "pickle" in refused(tmp_path / "data.npz", TEXT).cause


def test_a_file_that_unpacks_to_too_much_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "LARGEST_BYTES", 10_000)
    np.savez_compressed(tmp_path / "bomb.npz", **tokens(100, 100))
    assert (tmp_path / "bomb.npz").stat().st_size < 80_000
    assert "unpacks to" in refused(tmp_path / "bomb.npz", TEXT).cause


def test_a_header_that_announces_too_much_is_refused_unread(tmp_path: Path) -> None:
    for shape, cause in (((1, 3, 4, 1 << 40), "takes more than"), ((1, 3, 4, 400), "cut short")):
        stream = io.BytesIO()
        np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})
        (tmp_path / "lie.npy").write_bytes(stream.getvalue())
        assert cause in refused(tmp_path / "lie.npy", IMAGE).cause
        with zipfile.ZipFile(tmp_path / "lie.npz", "w") as archive:
            archive.writestr("image.npy", stream.getvalue())
        assert cause in refused(tmp_path / "lie.npz", IMAGE).cause


def test_an_npy_file_needs_a_model_of_one_input(tmp_path: Path) -> None:
    np.save(tmp_path / "data.npy", np.zeros((1, 4)))
    error = refused(tmp_path / "data.npy", TEXT)
    assert "2 inputs" in error.cause and "`ids`, `mask`" in str(error.hint)


def test_stacked_arrays_need_one_count(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", ids=np.zeros((3, 1, 2), np.int64), mask=np.zeros((4, 1, 2), np.int64))
    assert "different numbers of samples" in refused(tmp_path / "data.npz", TEXT).cause
    np.savez(tmp_path / "data.npz", **{name: np.stack([a] * 3) for name, a in tokens().items()}, labels=np.zeros(4))
    assert "4 labels for 3 samples" in refused(tmp_path / "data.npz", TEXT).cause
