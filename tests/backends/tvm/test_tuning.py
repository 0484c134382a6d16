"""Tuning spends its budget, keeps what it finds whole, uses it again, and trusts no file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from burnish.ir.errors import InputError

tvm = pytest.importorskip("tvm")
psutil = pytest.importorskip("psutil")
pytest.importorskip("cloudpickle")

from tvm import relax  # noqa: E402

from burnish.backends.tvm import compiling, tuning  # noqa: E402
from burnish.backends.tvm.target import ARCHITECTURES, Target, parse  # noqa: E402
from burnish.backends.tvm.tuning import budget, kernels, laboratory, records, search, shared_memory  # noqa: E402
from burnish.backends.tvm.tuning.records import Record  # noqa: E402

TARGET = parse("llvm")
SIZE = 24


def fused(*sizes: int, rows: int | str = SIZE, names: str = "xw") -> Any:
    """A module that multiplies and clips once for each size, in matrices of that size."""
    builder = relax.BlockBuilder()
    rank = [tvm.tirx.Var(rows, "int64") if isinstance(rows, str) else rows]
    given = [
        relax.Var(f"{name}{index}", relax.TensorType([*(rank if name == names[0] else [size]), size], "float32"))
        for index, size in enumerate(sizes)
        for name in names
    ]
    with builder.function("main", given):
        with builder.dataflow():
            products = [builder.emit(relax.op.matmul(*given[at : at + 2])) for at in range(0, len(given), 2)]
            result = builder.emit_output(relax.Tuple([builder.emit(relax.op.nn.relu(one)) for one in products]))
        builder.emit_func_output(result)
    return compiling.fused(builder.get(), TARGET)


def run(module: Any, arrays: list[np.ndarray]) -> list[np.ndarray]:
    code = compiling.build(compiling.scheduled(module, TARGET), TARGET)
    machine = relax.VirtualMachine(code, tvm.cpu())
    return [one.numpy() for one in machine["main"](*(tvm.runtime.tensor(array) for array in arrays))]


def kernel() -> kernels.Kernel:
    return kernels.kernels(fused(SIZE))[0]


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[tuning.Database, tuning.Tuned, list[tuning.Progress]]:
    """A small kernel, tuned with eight trials."""
    database = tuning.Database(tmp_path_factory.mktemp("tuning") / "db")
    seen: list[tuning.Progress] = []
    found = tuning.tune(fused(SIZE), TARGET, tuning.Budget(8), database, seen.append, workers=1, model="random")
    return database, found, seen


def test_tuning_finds_a_schedule_that_computes_the_same(tuned: Any) -> None:
    database, found, seen = tuned
    assert found.trials == 8 and found.seconds is not None and seen[-1].done == seen[-1].total == 8
    applied = tuning.apply(fused(SIZE), database, TARGET)
    assert list(applied.seconds) == ["fused_matmul_relu"] and not applied.missing and not applied.notes
    arrays = [np.random.default_rng(index).normal(size=(SIZE, SIZE)).astype(np.float32) for index in range(2)]
    np.testing.assert_allclose(run(applied.module, arrays)[0], np.maximum(arrays[0] @ arrays[1], 0), atol=1e-4)


def test_a_second_time_nothing_is_tuned_and_names_do_not_count(tuned: Any) -> None:
    database, _, _ = tuned
    start = time.monotonic()
    again = tuning.tune(fused(SIZE, names="ab"), TARGET, tuning.Budget(8), database, model="random")
    assert again.trials == 0 and again.tasks[0].before == 8 and time.monotonic() - start < 5
    assert not tuning.apply(fused(SIZE, names="ab"), database, TARGET).missing


def test_no_process_and_no_file_is_left(tuned: Any) -> None:
    left = [one.cmdline() for one in psutil.Process().children(recursive=True)]
    assert not [one for one in left if any("popen_worker" in word for word in one)]


def test_another_target_or_number_of_threads_has_its_own_records(tuned: Any) -> None:
    database, _, _ = tuned
    assert tuning.apply(fused(SIZE), database, TARGET, threads=2).missing
    assert tuning.apply(fused(SIZE), database, parse("llvm:x86-64")).missing


def test_kernels_of_the_same_structure_are_one() -> None:
    same, other = kernels.kernels(fused(SIZE, SIZE, 16, rows=16))
    assert (same.calls, other.calls) == (2, 1) or (same.calls, other.calls) == (1, 2)


def test_a_module_that_was_scheduled_by_rules_can_be_tuned_all_the_same() -> None:
    target = parse("cuda:sm_90")
    module = fused(SIZE)
    compiling.scheduled(module, target)
    assert len(kernels.kernels(module)) == 1


@pytest.mark.parametrize("scope", ["shared", "shared.dyn"])
def test_large_tiles_lie_in_shared_memory_that_the_launch_asks_for(scope: str) -> None:
    from tvm import te
    from tvm.backend.cuda import export_cuda_host

    size = 128 * 150
    a = te.placeholder((2, size), "float32", name="a")
    turned = te.compute((2, size), lambda i, j: a[i, size - 1 - j], name="turned")
    schedule = tvm.s_tir.Schedule(te.create_prim_func([a, turned]))
    block = schedule.get_sblock("turned")
    copy = schedule.cache_read(block, 0, scope)
    rows, columns = schedule.get_loops(block)
    schedule.bind(rows, "blockIdx.x")
    schedule.compute_at(copy, rows)
    for loop in (schedule.get_loops(copy)[-1], columns):
        schedule.bind(schedule.split(loop, [None, 128])[1], "threadIdx.x")
    found = shared_memory.bytes_of(schedule.mod)
    assert found[scope] == 4 * size and sum(found.values()) == 4 * size
    made = parse("cuda:sm_90").tvm(host="cuda_host")
    with made:
        kernel = tvm.IRModule({"turned": schedule.mod["main"].with_attr("global_symbol", "turned")})
        source = export_cuda_host(tvm.compile(kernel, made).mod)
    assert ("cudaFuncAttributeMaxDynamicSharedMemorySize" in source) == (scope == "shared.dyn")


def test_a_gpu_of_each_architecture_has_what_its_blocks_may_ask_for() -> None:
    for name in ARCHITECTURES:
        plain, asking = (Target("cuda", name).tvm(asking=one) for one in (False, True))
        assert plain.attrs["max_shared_memory_per_block"] == shared_memory.GIVEN
        assert 65536 <= int(asking.attrs["max_shared_memory_per_block"]) <= 232448


def test_kernels_with_symbolic_sizes_are_left_as_they_are(tuned: Any) -> None:
    database, _, _ = tuned
    module = fused(SIZE, rows="n")
    found = tuning.tune(module, TARGET, tuning.Budget(8), database, model="random")
    applied = tuning.apply(module, database, TARGET)
    assert found.trials == 0 and found.tasks[0].reason == applied.missing["fused_matmul_relu"]
    assert "known only when it runs" in found.tasks[0].reason


@pytest.mark.parametrize("text", ["", "0", "m", "-5", "1.5", "5h", "1e9"])
def test_a_budget_is_trials_or_minutes(text: str) -> None:
    assert (budget.parse("200"), budget.parse("1.5m")) == (tuning.Budget(200), tuning.Budget(90, True))
    with pytest.raises(InputError, match="no budget"):
        budget.parse(text)


def test_once_all_kernels_were_timed_the_budget_is_shared_by_the_time_they_take() -> None:
    def job(best: float | None, trials: int, spent: float, end: str = "") -> Any:
        given = {"best": best, "trials": trials, "end": end, "share": 100.0, "first": 100.0, "done": lambda: spent}
        return SimpleNamespace(kernel=SimpleNamespace(calls=2), **given)

    jobs = [job(1e-3, 8, 8), job(3e-3, 8, 8), job(None, 0, 0)]
    search._share(jobs, tuning.Budget(300))
    assert [one.share for one in jobs] == [100.0] * 3
    jobs = [job(1e-3, 8, 8), job(3e-3, 8, 8), job(1.0, 1, 8, "every schedule was tried")]
    search._share(jobs, tuning.Budget(300, timed=True))
    assert [one.share for one in jobs] == [73, 219, 100]
    jobs = [job(1e-3, 8, 90), job(3e-3, 8, 8), job(None, 8, 8)]
    search._share(jobs, tuning.Budget(300, timed=True))
    assert [one.share for one in jobs] == [90, 202, 8]
    assert sum(budget.filled(10, [8, 8, 8], [1, 2, 0])) == 24


def test_shares_are_within_the_budget_and_those_that_cost_more_get_more() -> None:
    for amount in (1, 8, 20, 100, 1000):
        for timed in (False, True):
            parts = budget.shares(tuning.Budget(amount, timed), [5.0, 0.1, 100.0, 1.0])
            assert sum(parts) <= amount + 1e-9 and all(not part or part >= 8 for part in parts)
            assert [parts[index] for index in (1, 3, 0, 2)] == sorted(parts)


def test_a_torn_line_is_dropped_and_the_rest_is_kept(tmp_path: Path) -> None:
    one, database = kernel(), tuning.Database(tmp_path)
    database.append(one, TARGET, 1, [Record(spent=1.0), Record(spent=2.0)])
    path = database.file(one, TARGET, 1)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"spent":3.0,"sec')
    assert database.read(one, TARGET, 1).spent == 3.0
    database.append(one, TARGET, 1, [Record(spent=4.0)])
    found = database.read(one, TARGET, 1)
    assert found.spent == 7.0 and not found.notes and path.read_bytes().startswith(whole)
    path.write_bytes(whole[:20])
    database.append(one, TARGET, 1, [Record(spent=5.0)])
    assert database.read(one, TARGET, 1).spent == 5.0


def _write(folder: Path, count: int) -> None:
    one, database = kernel(), tuning.Database(folder)
    for index in range(count):
        database.append(one, TARGET, 1, [Record(spent=1.0, error="x" * (index % 97) * 200)] * 3)


def test_processes_may_write_at_once_and_be_killed(tmp_path: Path) -> None:
    processes = [get_context("fork").Process(target=_write, args=(tmp_path, count)) for count in (100, 100, 100_000)]
    for process in processes:
        process.start()
    for process in processes[:2]:
        process.join()
    os.kill(processes[2].pid or 0, signal.SIGKILL)
    processes[2].join()
    one, database = kernel(), tuning.Database(tmp_path)
    database.append(one, TARGET, 1, [Record(end="over")])
    found = database.read(one, TARGET, 1)
    assert found.trials >= 600 and found.end == "over" and not found.notes
    lines(database.file(one, TARGET, 1))


def test_what_is_not_believed_is_skipped_with_a_note(tuned: Any, tmp_path: Path) -> None:
    source, _, _ = tuned
    one, database = kernel(), tuning.Database(tmp_path)
    heading, *good = source.file(one, TARGET, 1).read_bytes().splitlines()
    path = database.file(one, TARGET, 1)
    trace = [["GetSBlock", [], ["no such block", "main"], ["b0"]]]
    bad = [
        b"nonsense",
        b"[" * 100_000,
        b'{"seconds": "quick"}',
        b'{"code": "import os"}',
        json.dumps({"seconds": -1.0, "trace": [[], []]}).encode(),
        json.dumps({"seconds": 1e-9, "trace": [[["UnsafeSetDType", [], [0, "int8"], []]], []]}).encode(),
        json.dumps({"seconds": 1e-9, "trace": [[["Annotate", ["l0", '"x"'], ["pragma_import_c"], []]], []]}).encode(),
    ]
    unusable = json.dumps({"seconds": 1e-9, "trace": [trace, []]}).encode()
    path.write_bytes(b"\n".join([heading, *bad, unusable, *good, b""]))
    assert len(database.read(one, TARGET, 1).notes) == len(bad)
    applied = tuning.apply(fused(SIZE), database, TARGET)
    assert applied.seconds == tuning.apply(fused(SIZE), source, TARGET).seconds
    assert len(applied.notes) == len(bad) + 1 and "cannot be replayed" in applied.notes[-1]


def test_a_file_about_something_else_is_skipped(tuned: Any, tmp_path: Path) -> None:
    source, _, _ = tuned
    one, database = kernel(), tuning.Database(tmp_path)
    data = source.file(one, TARGET, 1).read_bytes()
    for changed in (data.replace(b'"apache-tvm":"', b'"apache-tvm":"9'), b"\x7fELF\n" + data):
        database.file(one, TARGET, 1).write_bytes(changed)
        applied = tuning.apply(fused(SIZE), database, TARGET)
        assert applied.missing and "skipped" in applied.notes[0]


def test_a_database_that_is_no_folder_or_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="no folder"):
        tuning.Database(tmp_path / "file")
    with pytest.raises(InputError, match="cannot be written"):
        tuning.Database(tmp_path / "file" / "inner").append(kernel(), TARGET, 1, [Record()])


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    one, database = kernel(), tuning.Database(tmp_path)
    database.append(one, TARGET, 1, [Record(spent=1.0)])
    before = database.file(one, TARGET, 1).read_bytes()
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, kept[1]))
    try:
        with pytest.raises(InputError, match="cannot be written"):
            database.append(one, TARGET, 1, [Record(error="x" * 1000)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)
        signal.signal(signal.SIGXFSZ, ignored)
    assert database.file(one, TARGET, 1).read_bytes() == before


@pytest.mark.parametrize("text", ["localhost", ":9190", "host:port", "host:99999"])
def test_a_tracker_is_host_and_port(text: str) -> None:
    assert laboratory.tracker("box:9190") == ("box", 9190, "burnish")
    assert laboratory.tracker("127.0.0.1:9190/gpu") == ("127.0.0.1", 9190, "gpu")
    with pytest.raises(InputError, match="host and port"):
        laboratory.tracker(text)


def test_every_instruction_that_a_search_wrote_is_allowed(tuned: Any) -> None:
    database, _, _ = tuned
    found = database.read(kernel(), TARGET, 1)
    assert found.best() and all(records.refusal(one) is None for one in found.records)


TUNE = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
import test_tuning as here
if __name__ == "__main__":
    database = here.tuning.Database(Path(sys.argv[1]))
    here.tuning.tune(here.fused(here.SIZE), here.TARGET, here.tuning.Budget(400), database,
                     lambda progress: print(progress.done, flush=True), workers=1, model="random")
"""


@pytest.mark.slow
def test_tuning_goes_on_after_a_kill(tmp_path: Path) -> None:
    script = tmp_path / "tune.py"
    script.write_text(TUNE.format(path=[str(Path(__file__).parent), *sys.path]))
    process = subprocess.Popen([sys.executable, str(script), str(tmp_path / "db")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and float(process.stdout.readline()) >= 8
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    process.stdout.close()
    assert not psutil.wait_procs(children, timeout=90)[1]
    one, database = kernel(), tuning.Database(tmp_path / "db")
    before = database.read(one, TARGET, 1)
    assert before.trials >= 8 and not before.notes
    found = tuning.tune(fused(SIZE), TARGET, tuning.Budget(before.trials + 8), database, workers=1, model="random")
    assert found.tasks[0].before == before.trials and found.trials == 8


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_two_servers_of_a_tracker_measure(tmp_path: Path) -> None:
    pytest.importorskip("tornado")
    from tvm.rpc.server import Server
    from tvm.rpc.tracker import Tracker

    with pytest.raises(InputError, match="no RPC tracker"):
        laboratory.servers(("127.0.0.1", 9, "burnish"))
    tracker = Tracker(host="127.0.0.1", port=9290, port_end=9390, silent=True)
    address = (tracker.host, tracker.port)
    given = {"host": "127.0.0.1", "port_end": 9590, "tracker_addr": address, "key": "burnish", "silent": True}
    servers: list[Any] = []
    try:
        with pytest.raises(InputError, match="no server of the key"):
            laboratory.Laboratory(TARGET.tvm(), "cpu", remote=(*address, "burnish"))
        servers += [Server(port=9490, **given), Server(port=9491, **given)]
        end = time.monotonic() + 30
        while laboratory.servers((*address, "burnish")) < 2:
            assert time.monotonic() < end
            time.sleep(0.2)
        found = tuning.tune(
            fused(SIZE), TARGET, tuning.Budget(8), tuning.Database(tmp_path), rpc=(*address, "burnish"), model="random"
        )
    finally:
        for one in (*servers, tracker):
            one.terminate()
    assert found.trials == 8 and found.seconds is not None
    end = time.monotonic() + 30
    while psutil.Process().children(recursive=True):
        assert time.monotonic() < end
        time.sleep(0.2)
