"""Times of small models as compiled code: the kernels that they call, each timed once and kept."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import relax
from tvm.runtime import vm

from burnish.backends.ort.kernel_times import LEAST_FLOOD, processor
from burnish.backends.ort.machine import last_cache
from burnish.backends.ort.observe import outputs_exchanged
from burnish.backends.ort.session import executor
from burnish.backends.tvm import compiling, versions
from burnish.backends.tvm.choose import Chooser, Schedule
from burnish.backends.tvm.lowering import Lowered, lower
from burnish.backends.tvm.maker import type_of
from burnish.backends.tvm.quiet import quiet
from burnish.backends.tvm.reasons import last_line
from burnish.backends.tvm.regions import Region
from burnish.backends.tvm.runner import tensor_on, use_threads
from burnish.backends.tvm.target import Target
from burnish.ir.errors import InputError
from burnish.passes.latency import Timer, Work
from burnish.passes.score_store import Store

_STRETCH = 0.002
"""Seconds that one measured stretch lasts at least."""

_ROUNDS = (3, 30)


class CompiledTimes:
    """A `burnish.passes.latency.Timer` for code that is compiled, which keeps what it measured on disk.

    A model is cut, fused and scheduled as the artefact will be. Its time is the sum over the kernels that it calls, and
    what stays on ONNX Runtime is timed there. A kernel is known by the structure of its scheduled function and the
    sizes of its arguments, so that equal ones, of whatever model, are timed once, and a record of tuning makes another
    kernel. It is timed when the model is run, on the very arguments that it has there: 20th percentile of stretches of
    repeated calls, on the clock of the thread where one thread of a CPU runs it. A call costs about what TVM's machine
    needs for one, and is left in.

    Where regions are compiled only when that is faster, the time is the smaller one of the compiled model's and of the
    whole in ONNX Runtime.

    Attributes:
        measured: how many kernels were run to be timed, not looked up.
    """

    def __init__(
        self,
        target: Target,
        schedule: Schedule,
        rival: Timer,
        store: Store | None = None,
        *,
        everything: bool = False,
        threads: int = 1,
        seconds: float = 0.5,
        cold: bool = False,
    ) -> None:
        """
        Args:
            target: what is compiled for; its code has to run on this machine.
            schedule: of kernels, as the artefact will have them.
            rival: times what stays on ONNX Runtime, on as many threads.
            store: where times are kept; None to keep them as long as this object lives.
            everything: all that can be compiled is, whatever it measures.
            threads: that kernels run on.
            seconds: time for each kernel, at most, about; three stretches are always timed.
            cold: the weights are not in the cache when a kernel is called.
        """
        self.measured = 0
        self._target, self._schedule, self._rival, self._store = target, schedule, rival, store
        self._everything, self._threads, self._seconds = everything, threads, seconds
        self._device = tvm.cuda() if target.kind == "cuda" else tvm.cpu()
        self._execute = executor(threads=threads)
        alone = threads == 1 and target.kind == "llvm" and time.get_clock_info("thread_time").resolution < 1e-6
        self._clock = time.thread_time if alone else time.perf_counter
        flooded = cold and target.kind == "llvm"
        self._flood = np.zeros(max(2 * last_cache(), LEAST_FLOOD), np.uint8) if flooded else None
        own = self._device.device_name if target.kind == "cuda" else processor()
        wheels = ", ".join(f"{name} {version}" for name, version in versions.found().items())
        self._place = f"{'cold, ' * flooded}{target}, {threads} threads, {wheels}, {own}"
        self._known: dict[str, float] = {}

    def __call__(self, first: Work, others: Sequence[Work]) -> list[float | str]:
        """See `burnish.passes.latency.Timer.__call__`."""
        found = [self._compiled(work) for work in (first, *others)]
        if self._everything:
            return found
        return [_smaller(own, other) for own, other in zip(found, self._rival(first, others), strict=True)]

    def _compiled(self, work: Work) -> float | str:
        try:
            return sum(self._region(region, feeds) for region, feeds in self._regions(work))
        except InputError as error:
            return error.cause
        except Exception as error:  # TVM's errors have many types
            return f"TVM cannot compile it: {last_line(error)}"

    def _regions(self, work: Work) -> list[tuple[Region, Mapping[str, np.ndarray]]]:
        """What is compiled and what is not, each with its inputs."""
        chooser = Chooser(work.model, self._target, [], None, self._schedule, everything=True)
        found = [one.region for one in chooser.choose() if one.region.outputs]
        inner = {value: None for one in found for value in one.inputs if not value.is_graph_input()}
        feeds = dict(work.feeds)
        if inner:
            with outputs_exchanged(chooser.model, list(inner)):
                runner = self._execute(chooser.model)
            feeds |= runner.run(work.feeds)
            runner.close()
        return [(one, {str(value.name): feeds[str(value.name)] for value in one.inputs}) for one in found]

    def _region(self, region: Region, feeds: Mapping[str, np.ndarray]) -> float:
        if region.kind == "ort":
            (found,) = self._rival(Work(region.model, feeds), [])
            if isinstance(found, str):
                raise InputError(found)
            return found
        with quiet():
            lowered = lower(region.model)
            module, _ = self._schedule(compiling.fused(lowered.module, self._target))
        hashes = _hashes(module)
        calls = _calls(module, lowered, feeds, hashes)
        if calls is None or any(self._recall(call) is None for call in calls):
            calls = self._run(module, lowered, feeds, hashes)
        return sum(self._known[call] for call in calls)

    def _run(
        self, module: Any, lowered: Lowered, feeds: Mapping[str, np.ndarray], hashes: Mapping[str, str]
    ) -> list[str]:
        """The kernels that a run calls, in order; those that are not known are timed meanwhile."""
        use_threads(self._threads)
        with quiet():
            code = compiling.build(module, self._target)
        machine = vm.VirtualMachine(code, self._device)
        weights = [tensor_on(self._device, array) for array in lowered.arrays()]
        places = {one.data_ptr() for one in weights}
        calls: list[str] = []

        def look(function: Any, name: str, before: bool, _: Any, *arguments: Any) -> None:
            if not before or name not in hashes:
                return
            calls.append(_call(hashes[name], [_signature(one) for one in arguments]))
            if self._recall(calls[-1]) is None:
                read = [one for one in arguments if hasattr(one, "data_ptr") and one.data_ptr() not in places]
                self._keep(calls[-1], self._time(lambda: function(*arguments), read))

        machine.set_instrument(look)
        given = [tensor_on(self._device, feeds[name]) for name in lowered.inputs]
        try:
            machine["main"](*given, *weights)
        except Exception as error:
            raise InputError(f"the compiled code does not run: {last_line(error)}") from error
        return calls

    def _time(self, call: Callable[[], object], read: Sequence[Any]) -> float:
        """Seconds of a call; `read` is in the cache when it is made."""
        self.measured += 1
        self._stretch(call, 1, read)
        count = max(1, int(np.ceil(_STRETCH / max(self._stretch(call, 1, read), 1e-7))))
        end = time.perf_counter() + self._seconds
        times: list[float] = []
        while len(times) < _ROUNDS[0] or (len(times) < _ROUNDS[1] and time.perf_counter() < end):
            times.append(self._stretch(call, count if self._flood is None else 1, read))
        return float(np.percentile(times, 20))

    def _stretch(self, call: Callable[[], object], count: int, read: Sequence[Any]) -> float:
        """Seconds of a call, from so many."""
        if self._flood is not None:
            self._flood += 1
            for one in read:
                one.numpy()
        self._device.sync()
        start = self._clock()
        for _ in range(count):
            call()
        self._device.sync()
        return (self._clock() - start) / count

    def _recall(self, call: str) -> float | None:
        if call not in self._known and self._store is not None:
            kept = self._store.timing(self._name(call))
            if kept is not None:
                self._known[call] = kept
        return self._known.get(call)

    def _keep(self, call: str, seconds: float) -> None:
        self._known[call] = seconds
        if self._store is not None:
            self._store.add_timing(self._name(call), seconds)

    def _name(self, call: str) -> str:
        return hashlib.sha256(f"{call}\n{self._place}".encode()).hexdigest()


def _smaller(own: float | str, other: float | str) -> float | str:
    if isinstance(own, str) or isinstance(other, str):
        return other if isinstance(own, str) else own
    return min(own, other)


def _hashes(module: Any) -> dict[str, str]:
    """The structure of each kernel as 16 hexadecimal digits, by its name in the module, which does not count."""
    found = {}
    for variable, function in module.functions_items():
        if isinstance(function, tvm.tirx.PrimFunc):
            alone = tvm.IRModule({"main": function.without_attr("global_symbol")})
            found[str(variable.name_hint)] = f"{tvm_ffi.structural_hash(alone) & (2**64 - 1):016x}"
    return found


def _calls(
    module: Any, lowered: Lowered, feeds: Mapping[str, np.ndarray], hashes: Mapping[str, str]
) -> list[str] | None:
    """The kernels that a run calls, as far as that is known without one; None where it is not."""
    functions = [one for _, one in module.functions_items() if isinstance(one, relax.Function)]
    if len(functions) > 1:
        return None
    (main,) = functions
    sizes: dict[Any, int] = {}
    for parameter, name in zip(main.params, lowered.inputs, strict=False):
        for size, number in zip(type_of(parameter).shape, feeds[name].shape, strict=True):
            if isinstance(size, tvm.tirx.Var):
                sizes[size] = number
    main = main.bind_symbolic_vars(sizes)
    found: list[str] = []
    whole = True

    def visit(expression: Any) -> None:
        nonlocal whole
        if isinstance(expression, relax.If):
            whole = False
        if not isinstance(expression, relax.Call) or not isinstance(expression.op, tvm.ir.Op):
            return
        kernels = [one for one in expression.args if isinstance(one, tvm.ir.GlobalVar)]
        if kernels:
            signatures = _written(expression)
            whole = whole and signatures is not None
            found.append(_call(hashes[str(kernels[0].name_hint)], signatures or []))

    relax.analysis.post_order_visit(main, visit)
    return found if whole else None


def _written(call: Any) -> list[str] | None:
    """The arguments of a `call_tir` as it is written; None where a size of them is not known."""
    if call.op.name != "relax.call_tir" or len(call.args) > 2:
        return None
    types = [type_of(one) for one in call.args[1].fields]
    out = type_of(call)
    types += list(out.fields) if isinstance(out, relax.TupleType) else [out]
    found = []
    for one in types:
        if not isinstance(one, relax.TensorType) or one.shape is None:
            return None
        if not all(isinstance(size, tvm.tirx.IntImm) for size in one.shape):
            return None
        found.append(f"{one.dtype}{list(map(int, one.shape))}")
    return found


def _signature(argument: Any) -> str:
    """An argument as the machine gives it."""
    if hasattr(argument, "data_ptr"):
        return f"{argument.dtype}{[int(size) for size in argument.shape]}"
    return str(argument)


def _call(kernel: str, signatures: Sequence[str]) -> str:
    return f"{kernel} {' '.join(signatures)}"
