"""A model as one library that needs tvm-ffi: what it computes, what it refuses, what lies in the folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as oir
import pytest

tvm = pytest.importorskip("tvm")
tvm_ffi = pytest.importorskip("tvm_ffi")

from burnish.backends.ort.session import executor  # noqa: E402
from burnish.backends.tvm import compiling, weights_file  # noqa: E402
from burnish.backends.tvm.kernels import compilers, emitting, inspection  # noqa: E402
from burnish.backends.tvm.target import Target, parse  # noqa: E402
from burnish.ir.errors import InputError  # noqa: E402

MODEL = """<ir_version: 10, opset_import: ["": 20]>
g (float[rows, 6] x, float[rows, 5] add) => (float[5, rows] y, float[rows, 6] same, float[rows] sums)
<float[6, 70] w, float[70, 5] v> {
  a = MatMul (x, w)
  b = MatMul (a, v)
  c = Softmax (b)
  d = Add (c, add)
  y = Transpose<perm = [1, 0]> (d)
  same = Identity (x)
  axes = Constant<value = int64[1] {1}>()
  sums = ReduceSum<keepdims = 0> (a, axes)
}"""
NVCC = shutil.which("nvcc")


def model(text: str = MODEL) -> oir.Model:
    """A model from text; what it declares and does not compute is a weight, drawn at random."""
    made = oir.from_onnx_text(text)
    random = np.random.default_rng(0)
    for value in [one for node in made.graph for one in node.inputs]:
        if value is not None and value.producer() is None and not value.is_graph_input() and value.const_value is None:
            assert value.shape is not None and value.dtype is not None
            array = random.standard_normal(value.shape.numpy()).astype(value.dtype.numpy())
            value.const_value = oir.tensor(array, name=value.name)
            made.graph.register_initializer(value)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kernels") / "out"
    emitting.emit(model(), parse("llvm"), path, title="a model")
    return path


def weights(folder: Path) -> list[np.ndarray]:
    """The weights of a folder, in order, each at a multiple of 64 bytes."""
    with open(folder / "weights.safetensors", "rb") as stream:
        found = weights_file.read(folder / "weights.safetensors", stream, len)
    return [array for name, array in found.items() if not name.endswith(".fill")]


def bound(folder: Path) -> Callable[..., Any]:
    """The model of a folder with its weights."""
    functions = tvm_ffi.load_module(str(folder / "model.so"))
    found: Callable[..., Any] = functions.bind(*map(tvm_ffi.from_dlpack, weights(folder)))
    found.module = functions  # the code lives as long as this
    return found


def feeds(rows: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(rows)
    return {name: random.standard_normal((rows, size)).astype(np.float32) for name, size in (("x", 6), ("add", 5))}


def tensor(array: np.ndarray) -> Any:
    return tvm_ffi.from_dlpack(array)


@pytest.mark.parametrize("rows", [1, 3, 130])
def test_it_computes_what_onnx_runtime_computes_for_any_size(folder: Path, rows: int) -> None:
    given = feeds(rows)
    expected = executor(level="basic")(model()).run(given)
    found = bound(folder)(*map(tensor, given.values()))
    for one, (name, array) in zip(found, expected.items(), strict=True):
        assert tuple(one.shape) == array.shape, name
        np.testing.assert_allclose(np.from_dlpack(one), array, rtol=1e-5, atol=1e-5, err_msg=name)


def test_memory_that_does_not_begin_at_64_bytes_gives_the_same(folder: Path) -> None:
    given = feeds(3)
    run = bound(folder)
    for shift in (4, 8, 60):
        moved = []
        for array in given.values():
            memory = np.zeros(array.nbytes + 128, np.uint8)
            start = -memory.ctypes.data % 64 + shift
            moved.append(memory[start : start + array.nbytes].view(np.float32).reshape(array.shape))
            moved[-1][...] = array
        for one, other in zip(run(*map(tensor, moved)), run(*map(tensor, given.values())), strict=True):
            np.testing.assert_array_equal(np.from_dlpack(one), np.from_dlpack(other))


def test_into_memory_of_the_caller_nothing_is_allocated(folder: Path) -> None:
    functions = tvm_ffi.load_module(str(folder / "model.so"))
    given = [tensor(array) for array in feeds(4).values()]
    size = functions.workspace(*given)
    assert 4 * 70 * 4 <= size < 3 * 4 * 70 * 4, "what is dead makes room"
    outputs = [tvm.runtime.empty(shape, "float32") for shape in ((5, 4), (4, 6), (4,))]
    space = tvm.runtime.empty([size], "uint8")
    own = [tensor(array) for array in weights(folder)]
    functions.run(*given, *own, *outputs, space)
    for one, other in zip(outputs, functions.call(*given, *own), strict=True):
        np.testing.assert_array_equal(one.numpy(), np.from_dlpack(other))
    with pytest.raises(ValueError, match="the workspace has 64 of"):
        functions.run(*given, *own, *outputs, tvm.runtime.empty([64], "uint8"))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x, add: (x,), "the model: 1 arguments for 2"),
        (lambda x, add: (x[:, :4].copy(), add), "`x` has another size in dimension 1 than 6"),
        (lambda x, add: (x, add[:2].copy()), "`add` has another size in dimension 0 than rows"),
        (lambda x, add: (x.astype(np.float64), add), "`x` has another dtype"),
        (lambda x, add: (x[0], add), "`x` has another number of dimensions"),
        (lambda x, add: (np.asfortranarray(x), add), "`x` is not contiguous"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_with_the_reason(
    folder: Path, change: Callable[..., Any], message: str
) -> None:
    run = bound(folder)
    with pytest.raises((ValueError, TypeError)) as caught:
        run(*map(tensor, change(*feeds(3).values())))
    assert message in str(caught.value)


def test_the_example_in_python_needs_no_tvm(folder: Path) -> None:
    pytest.importorskip("safetensors")
    code = "import runpy, sys; runpy.run_path('example.py'); assert 'tvm' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "(5, 1) torch.float32"


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_the_header_is_c_and_the_example_in_cpp_runs(folder: Path, tmp_path: Path) -> None:
    include = [f"-I{one}" for one in tvm_ffi.libinfo.include_paths()]
    header = ["gcc", "-std=c99", "-pedantic", "-Werror", "-fsyntax-only", "-x", "c", str(folder / "model.h"), *include]
    subprocess.run(header, check=True)
    library = Path(tvm_ffi.libinfo.find_libtvm_ffi()).parent
    build = ["g++", "-Wall", "-Werror", "example.cc", "./model.so", *include, f"-L{library}", "-ltvm_ffi"]
    subprocess.run([*build, "-o", str(tmp_path / "example")], cwd=folder, check=True)
    environment = os.environ | {"LD_LIBRARY_PATH": str(library)}
    done = subprocess.run(
        [tmp_path / "example"], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_kernels_that_read_weights_alone_are_run_once(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["": 20]> g (float[n, 8] x) => (float[n, 12] y)
    <float[12, 8] w> {
      t = Transpose<perm = [1, 0]> (w)
      y = MatMul (x, t)
    }"""
    emitted = emitting.emit(model(text), parse("llvm"), tmp_path / "out")
    (own,) = weights(tmp_path / "out")
    assert emitted.calls == 1 and own.shape == (8, 12)
    x = np.ones((2, 8), np.float32)
    (found,) = bound(tmp_path / "out")(tensor(x))
    np.testing.assert_allclose(np.from_dlpack(found), x @ own, rtol=1e-5, atol=1e-5)


def test_a_weight_in_a_size_of_the_inputs_is_made_in_each_run(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["": 20]> g (float[n, 8] x) => (float[n, 8] y) <float[8, 1] w> {
      s = Shape (x)
      t = Transpose<perm = [1, 0]> (w)
      y = Expand (t, s)
    }"""
    emitting.emit(model(text), parse("llvm"), tmp_path / "out")
    (found,) = bound(tmp_path / "out")(tensor(np.ones((3, 8), np.float32)))
    assert tuple(found.shape) == (3, 8) and (np.from_dlpack(found) == np.from_dlpack(found)[:1]).all()


def test_a_sum_over_nothing_is_refused(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["": 20]> g (float[n, 8] x) => (float[1, 8] y) {
      a = Constant<value = int64[1] {0}>()
      y = ReduceSum (x, a)
    }"""
    emitting.emit(model(text), parse("llvm"), tmp_path / "out")
    run = bound(tmp_path / "out")
    np.testing.assert_allclose(np.from_dlpack(run(tensor(np.ones((3, 8), np.float32)))[0]), np.full((1, 8), 3.0))
    with pytest.raises(ValueError, match="two sizes do not agree"):
        run(tensor(np.ones((0, 8), np.float32)))


def test_kernels_with_threads_run_without_the_library_of_tvm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def in_parallel(module: Any, target: Target) -> Any:
        schedule = tvm.s_tir.Schedule(module)
        kernels = [one for one, function in module.functions.items() if isinstance(function, tvm.tirx.PrimFunc)]
        for name in [one.name_hint for one in kernels]:
            for block in schedule.get_child_blocks(schedule.get_sblock("root", name)):
                schedule.parallel(schedule.get_loops(block)[0])
        return schedule.mod

    monkeypatch.setattr(compiling, "scheduled", in_parallel)
    text = """<ir_version: 10, opset_import: ["": 20]> g (float[64, 8] x) => (float[64, 8] y) { y = Relu (x) }"""
    emitting.emit(model(text), parse("llvm"), tmp_path / "out")
    assert b"__TVMBackendParallelLaunch" in (tmp_path / "out" / "model.so").read_bytes()
    code = (
        "import numpy as np, tvm_ffi; run = tvm_ffi.load_module('./model.so').bind()\n"
        "x = np.arange(-256, 256, dtype=np.float32).reshape(64, 8)\n"
        "assert (np.from_dlpack(run(tvm_ffi.from_dlpack(x))[0]) == np.maximum(x, 0)).all()"
    )
    for threads in ("1", "3"):
        environment = os.environ | {"OMP_NUM_THREADS": threads}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path / "out", env=environment, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_sizes_that_are_given_are_numbers_in_the_library(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["": 20]> g (float[n, m] x) => (float[n, m] y) { y = Relu (x) }"""
    emitted = emitting.emit(model(text), parse("llvm"), tmp_path / "out", dims={"n": 2})
    assert emitted.inputs == (("x", "float32", ("2", "m")),)
    with pytest.raises(ValueError, match="`x` has another size in dimension 0 than 2"):
        bound(tmp_path / "out")(tensor(np.ones((3, 4), np.float32)))
    with pytest.raises(InputError, match="no input has a dimension `k`"):
        emitting.emit(model(text), parse("llvm"), tmp_path / "other", dims={"k": 2})


def test_without_a_compiler_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    for target, message in ((Target("cuda", "sm_90"), "compiled by nvcc, which is not here"), (parse("llvm"), "C++")):
        with pytest.raises(InputError, match=message.replace("+", r"\+")):
            emitting.emit(model(), target, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_compiler_that_does_not_know_the_architecture_or_fails_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin" / "nvcc"
    program.parent.mkdir()
    program.write_text(
        "#!/bin/sh\n[ $1 = --list-gpu-code ] && echo sm_50 sm_90 && exit\necho No space left on device >&2; exit 1\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(InputError) as caught:
        compilers.check(Target("cuda", "sm_80"))
    assert "no code for `sm_80`" in caught.value.cause and "sm_50, sm_90" in str(caught.value.hint)
    with pytest.raises(InputError) as caught:
        compilers.library(tmp_path / "model.cu", tmp_path / "model.so", Target("cuda", "sm_90"))
    assert "No space left on device" in caught.value.cause and "free space" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("dtype", "sums", "arch", "size", "on_tensor_cores"),
    [
        ("bfloat16", "float32", "sm_90", 256, True),
        ("bfloat16", "float32", "sm_80", 240, True),
        ("int8", "int32", "sm_80", 256, True),
        ("bfloat16", "float32", "sm_75", 256, False),
        ("bfloat16", "float32", "sm_90", 32, False),
        ("float32", "float32", "sm_90", 256, False),
    ],
)
def test_products_of_short_numbers_are_on_tensor_cores_where_there_are_some(
    dtype: str, sums: str, arch: str, size: int, on_tensor_cores: bool
) -> None:
    from tvm import te
    from tvm.backend.cuda import export_cuda_host

    a, b = (te.placeholder((size, size), dtype, name=name) for name in "ab")
    k = te.reduce_axis((0, size), "k")
    product = te.compute(
        (size, size), lambda i, j: te.sum(a[i, k].astype(sums) * b[k, j].astype(sums), axis=k), name="product"
    )
    function = te.create_prim_func([a, b, product]).with_attr("global_symbol", "product")
    target = Target("cuda", arch)
    with target.tvm(host="cuda_host"):
        code = tvm.compile(
            compiling.scheduled(tvm.IRModule({"product": function}), target), target.tvm(host="cuda_host")
        )
    source = export_cuda_host(code.mod)
    assert ("mma_sync(" in source) == on_tensor_cores and "product_kernel" in source


@pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
def test_a_library_for_a_gpu_has_the_kernels_and_half_matrices_run_on_tensor_cores(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["": 20]> g (float16[256, 256] x) => (float16[256, 256] y)
    <float16[256, 256] w> {
      m = MatMul (x, w)
      y = Relu (m)
    }"""
    target = Target("cuda", "sm_80")
    emitted = emitting.emit(model(text), target, tmp_path / "out")
    found = inspection.kernels(tmp_path / "out" / "model.so")
    assert [one.name for one in found] == [f"{name}_kernel" for name in emitted.kernels]
    assert found[0].matrix["HMMA"] > 0
    needed = subprocess.run(
        ["readelf", "-d", tmp_path / "out" / "model.so"], capture_output=True, text=True, check=True
    )
    libraries = [line.split("[")[1].rstrip("]") for line in needed.stdout.splitlines() if "NEEDED" in line]
    assert "libtvm_ffi.so" in libraries and not any("tvm_runtime" in one or "libcuda" in one for one in libraries)
    functions = tvm_ffi.load_module(str(tmp_path / "out" / "model.so"))
    with pytest.raises(ValueError, match="`x` is on another kind of device"):
        functions.workspace(tensor(np.zeros((256, 256), np.float16)))
