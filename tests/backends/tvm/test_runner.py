"""Running a compiled model: arrays and DLPack, dynamic sizes, threads, parts of both kinds, and loading it quickly."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import onnx_ir as oir
import pytest

tvm = pytest.importorskip("tvm")

import artefacts  # noqa: E402

import burnish  # noqa: E402
from burnish.backends import tvm as backend  # noqa: E402
from burnish.backends.tvm import artifact, versions  # noqa: E402
from burnish.backends.tvm.loading import ArtifactRunner  # noqa: E402
from burnish.ir.errors import InputError, MissingPackageError  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return artefacts.write(tmp_path_factory.mktemp("made") / "out")


@pytest.fixture(scope="module")
def runner(folder: Path) -> ArtifactRunner:
    return backend.load(folder)


def agree(found: dict[str, np.ndarray], feeds: dict[str, np.ndarray]) -> None:
    expected = artefacts.expected(feeds)
    assert list(found) == list(expected)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", [(1, 1), (3, 7), (0, 4)])
def test_arrays_of_any_size_go_in_and_come_out(runner: ArtifactRunner, sizes: tuple[int, int]) -> None:
    feeds = artefacts.feeds(*sizes)
    agree(runner.run(feeds), feeds)


def test_arrays_that_are_not_contiguous_or_not_aligned_are_copied(runner: ArtifactRunner) -> None:
    feeds = artefacts.feeds()
    memory = np.empty(feeds["x"].nbytes + 4, np.uint8)[4:].view(np.float32).reshape(feeds["x"].shape)
    memory[:] = feeds["x"]
    agree(runner.run({"x": memory, "i": np.asfortranarray(feeds["i"])}), feeds)


def test_torch_tensors_go_in_and_come_out_without_copies(runner: ArtifactRunner) -> None:
    torch = pytest.importorskip("torch")
    feeds = artefacts.feeds()
    given = {name: torch.from_numpy(array.copy()).clone() for name, array in feeds.items()}
    found = {name: torch.from_dlpack(one) for name, one in runner.run_tensors(given).items()}
    agree({name: one.numpy() for name, one in found.items()}, feeds)
    from burnish.backends.tvm.runner import tensor_on

    assert tensor_on(tvm.cpu(), given["x"]).data_ptr() == given["x"].data_ptr()
    tensors = runner.run_tensors(given)
    assert torch.from_dlpack(tensors["y"]).data_ptr() == tensors["y"].data_ptr()
    shifted = torch.zeros(given["x"].numel() + 1)[1:].view(given["x"].shape)
    shifted[:] = given["x"]
    agree({n: torch.from_dlpack(t).numpy() for n, t in runner.run_tensors(given | {"x": shifted}).items()}, feeds)
    mixed = runner.run_tensors({"x": feeds["x"], "i": given["i"]})
    agree({n: t.numpy() for n, t in mixed.items()}, feeds)


def test_outputs_stay_as_they_are_when_it_runs_again(runner: ArtifactRunner) -> None:
    first, second = artefacts.feeds(2, 3), {n: a + 1 for n, a in artefacts.feeds(2, 3).items()}
    kept = runner.run_tensors(first)
    runner.run_tensors(second)
    agree({name: one.numpy() for name, one in kept.items()}, first)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda f: f.pop("i"), "`i` is missing"),
        (lambda f: f.update(k=f["i"]), "no input `k`"),
        (lambda f: f.update(x=f["x"].astype(np.float64)), "is float64, and has to be float32"),
        (lambda f: f.update(x=f["x"][0]), r"has shape \[3, 8\], and has to have \[batch, seq, 8\]"),
        (lambda f: f.update(x=f["x"][:, :, :7]), r"has shape \[2, 3, 7\]"),
        (lambda f: f.update(i=f["i"][:1]), r"`i` has shape \[1, 3\]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(runner: ArtifactRunner, change, message: str) -> None:
    feeds = artefacts.feeds()
    change(feeds)
    with pytest.raises(InputError, match=message):
        runner.run(feeds)
    with pytest.raises(InputError):
        runner.run_tensors({name: np.array(one) for name, one in feeds.items()})


def test_several_threads_run_it_at_once(runner: ArtifactRunner) -> None:
    wrong: list[object] = []

    def work(number: int) -> None:
        try:
            for turn in range(30):
                feeds = artefacts.feeds(1 + number, 1 + turn % 5)
                agree(runner.run(feeds), feeds)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not wrong


def test_after_close_it_refuses_to_run(folder: Path) -> None:
    runner = backend.load(folder, threads=1)
    runner.close()
    runner.close()
    with pytest.raises(InputError, match="closed"):
        runner.run(artefacts.feeds())


def test_parts_on_tvm_and_on_onnx_runtime_are_chained(folder: Path, tmp_path: Path) -> None:
    """The model of the artefact, and behind it a part that is a file for ONNX Runtime, reading both of its outputs."""
    text = """<ir_version: 10, opset_import: ["": 18]>
    g (float[batch, seq, 32] y, int64[batch, seq] j) => (float[batch, seq] z) {
      m = ReduceMax<keepdims=0>(y, axes)  f = Cast<to=1>(j)  z = Add(m, f) }"""
    text = text.replace("(float[batch, seq] z)", "(float[batch, seq] z) <int64[1] axes = {-1}>")
    with artifact.staged(tmp_path / "both") as stage:
        for one in (artifact.CODE, artifact.WEIGHTS):
            (stage.path / one).write_bytes((folder / one).read_bytes())
        burnish.emit(oir.from_onnx_text(text), stage.path / "region_1.onnx")
        whole = artifact.read(folder, versions.found())
        steps = (*whole.steps, artifact.Step("ort", ("y", "j"), ("z",), file="region_1.onnx"))
        outputs = (artifact.Port("z", "float32", ("batch", "seq")), whole.outputs[1])
        fields = {name: getattr(whole, name) for name in ("target", "versions", "fingerprint", "inputs")}
        stage.seal(artifact.Manifest(**fields, outputs=outputs, steps=steps))
        stage.commit()
    runner, feeds = backend.load(tmp_path / "both"), artefacts.feeds()
    expected = artefacts.expected(feeds)
    found = runner.run(feeds)
    np.testing.assert_allclose(found["z"], expected["y"].max(-1) + expected["j"], rtol=1e-4, atol=1e-5)
    assert list(found) == ["z", "j"] and np.array_equal(found["j"], expected["j"])
    assert np.array_equal(runner.run_tensors(feeds)["z"].numpy(), found["z"])


def fresh(code: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3] / ".src"), "TVM_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)


def test_a_fresh_process_loads_and_runs_it_without_torch_or_the_compiler(folder: Path) -> None:
    ran = fresh(f"""
import os, sys
from burnish.backends import tvm
runner = tvm.load({str(folder)!r})
import numpy as np
y = runner.run({{"x": np.ones((1, 2, 8), np.float32), "i": np.ones((1, 2), np.int64)}})["y"]
used = os.times()
maps = open("/proc/self/maps").read() if os.path.exists("/proc/self/maps") else ""
heavy = [name for name in ("torch", "onnx", "onnx_ir", "onnxruntime", "scipy") if name in sys.modules]
print(y.shape, heavy, "libtvm_compiler" in maps, used.user + used.system < 2, "TVM_USE_RUNTIME_LIB" in os.environ)
""")
    assert (ran.stdout, ran.stderr) == ("(1, 2, 32) [] False True False\n", "")


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system does not say where threads may run")
def test_loading_for_several_threads_leaves_the_callers_thread_free_to_run_on_any_core(folder: Path) -> None:
    ran = fresh(f"""
import os
before = os.sched_getaffinity(0)
from burnish.backends import tvm
tvm.load({str(folder)!r}, threads=2)
print(os.sched_getaffinity(0) == before)
""")
    assert (ran.stdout, ran.stderr) == ("True\n", "")


def test_each_loading_says_on_how_many_threads_kernels_run_from_then_on(folder: Path) -> None:
    ran = fresh(f"""
from burnish.backends import tvm
import tvm as runtime
for threads in (1, 2, None, 1):
    tvm.load({str(folder)!r}, threads=threads)
    print(runtime.get_global_func("runtime.NumThreads")())
""")
    assert (ran.stdout, ran.stderr) == ("1\n2\n2\n1\n", "")


def test_a_process_that_runs_models_says_that_it_cannot_compile(folder: Path) -> None:
    ran = fresh(f"""
from burnish.backends import tvm
tvm.load({str(folder)!r})
import burnish
burnish.optimize("nothing.onnx", target="llvm")
""")
    assert "compile in a process of its own" in ran.stderr and "InputError" in ran.stderr


def test_the_installed_wheels_can_tune() -> None:
    versions.check_tuning()


def test_wheels_that_do_not_work_together_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.15.post2"}
    monkeypatch.setattr(versions.metadata, "version", known.__getitem__)
    versions._found.cache_clear()
    try:
        with pytest.raises(MissingPackageError, match="0.1.15.post2 are not known to work") as refused:
            versions.found()
        assert refused.value.hint == "pip install 'burnish[tvm]'"
    finally:
        versions._found.cache_clear()


def test_what_is_printed_by_any_means_goes_to_a_file() -> None:
    ran = fresh("""
import os, subprocess
from burnish.backends.tvm.quiet import quiet
print("before")
with quiet() as said:
    print("python")
    os.write(2, b"descriptor\\n")
    with quiet():
        subprocess.run(["echo", "child"], check=True)
    print("again")
    found = said()
print(sorted(found.split()))
try:
    with quiet():
        raise ValueError
except ValueError:
    print("after")
os.close(2)
with quiet():
    print("python")
print("end")
""")
    assert ran.stdout.splitlines() == ["before", "['again', 'child', 'descriptor', 'python']", "after", "end"]
    assert ran.stderr == ""


def test_two_artefacts_of_one_name_are_two_runners(tmp_path: Path) -> None:
    """The second one replaces the first on disk while that is loaded."""
    text = """<ir_version: 10, opset_import: ["": 18]> g (float[n, 4] x) => (float[n, 4] y) { y = NAME (x) }"""
    runners = []
    for name in ("Neg", "Abs"):
        burnish.optimize(oir.from_onnx_text(text.replace("NAME", name)), tmp_path / "out", target="llvm", guard=[])
        runners.append(backend.load(tmp_path / "out"))
    x = np.float32([[1, -2, 3, -4]])
    for _ in range(2):
        assert np.array_equal(runners[0].run({"x": x})["y"], -x)
        assert np.array_equal(runners[1].run({"x": x})["y"], np.abs(x))
    runners[0].close()
    assert np.array_equal(runners[1].run({"x": x})["y"], np.abs(x))


def test_indices_of_rows_that_there_are_not_are_refused(tmp_path: Path) -> None:
    """TVM's code would pick other rows without a word; ONNX Runtime refuses."""
    text = """<ir_version: 10, opset_import: ["": 18]>
    g (int64[n] i, float[5, 4] t) => (float[n, 4] y) { y = Gather(t, i) }"""
    burnish.optimize(oir.from_onnx_text(text), tmp_path / "out", target="llvm", guard=[], regions="all")
    runner = backend.load(tmp_path / "out")
    t = np.arange(20, dtype=np.float32).reshape(5, 4)
    assert np.array_equal(runner.run({"i": np.array([-5, 4]), "t": t})["y"], t[[0, 4]])
    assert runner.run({"i": np.array([], np.int64), "t": t})["y"].shape == (0, 4)
    for wrong in (5, -6, 2**40):
        for run in (runner.run, runner.run_tensors):
            with pytest.raises(InputError, match=f"`i` holds {wrong}, outside -5 to 4"):
                run({"i": np.array([0, wrong]), "t": t})
