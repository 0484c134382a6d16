"""Run models with ONNX Runtime; an in-memory model is handed over without copying its weights."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx_ir as oir

from burnish.ir.errors import InputError, MissingPackageError
from burnish.ir.walk import graphs, is_op

if TYPE_CHECKING:
    import onnx
    import onnxruntime

Level = Literal["all", "layout", "extended", "basic", "off"]

_LEVELS = {
    "all": "ORT_ENABLE_ALL",
    "layout": "ORT_ENABLE_LAYOUT",
    "extended": "ORT_ENABLE_EXTENDED",
    "basic": "ORT_ENABLE_BASIC",
    "off": "ORT_DISABLE_ALL",
}
_BORROWED = 1024
"""Tensors of at least this many bytes are lent to ONNX Runtime, smaller ones are written into the model."""


class OrtRunner:
    """One model in one ONNX Runtime session.

    Attributes:
        session: the `onnxruntime.InferenceSession`.
        options: what the session was made with, for reports.
    """

    def __init__(self, session: onnxruntime.InferenceSession, options: str, lent: Sequence[Any] = ()) -> None:
        self.session: onnxruntime.InferenceSession | None = session
        self.options = options
        self._lent = list(lent)
        self._outputs = [out.name for out in session.get_outputs()]
        self._views = {i.name: i.type for i in session.get_inputs() if i.type in _NOT_NUMPY}
        self._typed = bool(self._views) or any(out.type in _NOT_NUMPY for out in session.get_outputs())

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs by name, in the order of the model's outputs.

        Raises:
            InputError: the model refuses these inputs, or the runner is closed.
        """
        if self.session is None:
            raise InputError("the session is closed")
        try:
            if self._typed:
                return self._run_typed(feeds)
            found = self.session.run(self._outputs, dict(feeds))
        except Exception as error:
            raise refusal(error, "ONNX Runtime refuses the inputs") from error
        return dict(zip(self._outputs, found, strict=True))

    def _run_typed(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """`run` for dtypes that NumPy does not know (bfloat16, float8), which travel as their bits."""
        assert self.session is not None
        values = {name: value_of(np.ascontiguousarray(array)) for name, array in feeds.items()}
        found = self.session.run_with_ort_values(self._outputs, values)
        return {n: taken(v) for n, v in zip(self._outputs, found, strict=True)}

    def bound(self, feeds: Mapping[str, np.ndarray]) -> Callable[[], object]:
        """Run the model on `feeds`, and give a call that does so again with inputs and outputs in place, for timing.

        Raises:
            InputError: the model refuses these inputs, or the runner is closed.
        """
        session = self.session
        if session is None:
            raise InputError("the session is closed")
        kinds = [one.type for one in (*session.get_inputs(), *session.get_outputs())]
        if not all(kind.startswith("tensor(") and kind != "tensor(string)" for kind in kinds):
            return lambda: self.run(feeds)
        binding = session.io_binding()
        try:
            for name, array in feeds.items():
                binding.bind_ortvalue_input(name, value_of(np.ascontiguousarray(array)))
            for name in self._outputs:
                binding.bind_output(name, "cpu")
            session.run_with_iobinding(binding)
            for name, value in zip(self._outputs, binding.get_outputs(), strict=True):
                binding.bind_ortvalue_output(name, value)
        except Exception as error:
            raise refusal(error, "ONNX Runtime refuses the inputs") from error
        return partial(_run_bound, session, binding, tuple(self._lent))

    def keep(self, things: Sequence[Any]) -> None:
        """Hold things as long as the session: what it borrows from."""
        self._lent.extend(things)

    def close(self) -> None:
        """Free the session and what it borrows."""
        self.session = None
        self._lent.clear()


_NOT_NUMPY = {
    "tensor(bfloat16)": oir.DataType.BFLOAT16,
    "tensor(float8e4m3fn)": oir.DataType.FLOAT8E4M3FN,
    "tensor(float8e4m3fnuz)": oir.DataType.FLOAT8E4M3FNUZ,
    "tensor(float8e5m2)": oir.DataType.FLOAT8E5M2,
    "tensor(float8e5m2fnuz)": oir.DataType.FLOAT8E5M2FNUZ,
}


def _run_bound(session: onnxruntime.InferenceSession, binding: Any, lent: tuple[Any, ...]) -> None:
    """Run a session that reads `lent`, which has to be there also when the runner is gone or closed."""
    session.run_with_iobinding(binding)


def executor(
    *,
    threads: int = 1,
    level: Level = "all",
    target: str = "ort-cpu",
    lean: bool = False,
    packed: bool = True,
    trace: Path | None = None,
    written: Path | None = None,
) -> Callable[[oir.Model], OrtRunner]:
    """A function that loads an in-memory model into a session.

    Args:
        threads: threads inside an operator; operators run one after the other.
        level: ONNX Runtime's own graph optimizations.
        target: `ort-cuda` for CUDA with the CPU for what it lacks, else the CPU.
        lean: use less memory and start sooner, run slower: no second, packed copy of the weights. For checking, never
            for timing.
        packed: let operators make a second, packed copy of their weights, which is quicker.
        trace: a folder for the graph as ONNX Runtime optimized it (`optimized.onnx`, large weights beside it) and for
            its profile of the runs, which `session.end_profiling()` writes and names.
        written: a file for the graph as ONNX Runtime optimized it, with the packed copies of weights (`prepared`).

    Returns:
        `f(model) -> OrtRunner`, which raises InputError when the model cannot be loaded and MissingPackageError when
        the runtime is not installed. The model's weights are borrowed: it must outlive the runner and not be edited
        meanwhile.
    """

    def load(model: oir.Model) -> OrtRunner:
        options, said = _options(threads, level, lean, packed)
        if trace is not None:
            _trace(options, trace)
        if written is not None:
            _write(options, written)
            options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
        proto, lent = _lend(model)
        if lent.names:
            options.add_session_config_entry("session.use_external_initializer_file_buffers_directly", "1")
            options.add_external_initializers_from_files_in_memory(
                lent.names, lent.buffers, [b.nbytes for b in lent.buffers]
            )
        return _start(proto, options, target, said, lent.buffers)

    return load


def from_path(
    path: str | Path, *, threads: int = 1, level: Level = "all", target: str = "ort-cpu", lean: bool = False
) -> OrtRunner:
    """Load a file as ONNX Runtime's users do; arguments and errors as for `executor`."""
    options, said = _options(threads, level, lean)
    return _start(str(path), options, target, said)


def runtime() -> Any:
    """The `onnxruntime` module, silenced: what it would log is raised as an error anyway.

    Its builds of 1.32 and newer report to their maker unless they are told not to before they are imported; a caller
    who imported it earlier has made that choice already.

    Raises:
        MissingPackageError: it is not installed.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingPackageError(
            "running a model needs ONNX Runtime, which is not installed", hint="pip install 'burnish[cpu]'"
        ) from error
    onnxruntime.set_default_logger_severity(4)
    return onnxruntime


def _options(threads: int, level: Level, lean: bool, packed: bool = True) -> tuple[onnxruntime.SessionOptions, str]:
    ort = runtime()
    options: onnxruntime.SessionOptions = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, _LEVELS[level])
    if lean or not packed:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if lean:
        options.enable_cpu_mem_arena = False
    unpacked = ", weights not packed" * (not packed)
    said = f"{threads} thread{'s' * (threads > 1)}, optimization level {level}{', lean' * lean}{unpacked}"
    return options, said


def _trace(options: onnxruntime.SessionOptions, folder: Path) -> None:
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    _write(options, folder / "optimized.onnx")


def _write(options: onnxruntime.SessionOptions, file: Path) -> None:
    options.optimized_model_filepath = str(file)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", str(_BORROWED))


def _start(source: str | bytes, options: Any, target: str, said: str, lent: Sequence[Any] = ()) -> OrtRunner:
    ort = runtime()
    providers = ["CPUExecutionProvider"]
    if target == "ort-cuda":
        if "CUDAExecutionProvider" not in ort.get_available_providers():
            raise MissingPackageError("the installed ONNX Runtime cannot use CUDA", hint="pip install 'burnish[gpu]'")
        providers = ["CUDAExecutionProvider", *providers]
    try:
        session = ort.InferenceSession(source, options, providers=providers, enable_fallback=0)
    except Exception as error:
        raise refusal(error, "ONNX Runtime cannot load the model") from error
    return OrtRunner(session, f"ONNX Runtime {ort.__version__}, {session.get_providers()[0]}, {said}", lent)


def refusal(error: Exception, what: str) -> InputError:
    """An ONNX Runtime error as ours: its first line without the codes, and the node it names."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    first = " ".join(lines[:2]) if lines[0].endswith("following indices") else lines[0]
    node = re.search(r"running (\w+) node\. Name:\s?'([^']*)'", first) or re.search(
        r"(?:N|n)ode:?\s?\(([^)]*)\)()", first
    )
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", first)
    text = re.sub(r"^Non-zero status code returned while running .*?Status Message: ", "", text)
    text = re.sub(r"^\S*/onnxruntime/\S+ .*?\) ", "", text)
    place = None if node is None else f"{node[1]} `{node[2]}`" if node[2] else f"node `{node[1]}`"
    return InputError(f"{what}: {text.strip().rstrip('.')}", place=place)


def _type_of(array: np.ndarray) -> oir.DataType:
    return oir.DataType.STRING if array.dtype.kind in "OSU" else oir.DataType.from_numpy(array.dtype)


def value_of(array: np.ndarray) -> onnxruntime.OrtValue:
    """An OrtValue on the memory of `array`, which has to be in C order."""
    import onnxruntime as ort  # `runtime` has silenced it before there was a session

    dtype = _type_of(array)
    if dtype in _NOT_NUMPY.values():
        bits = array.view(np.uint16 if dtype == oir.DataType.BFLOAT16 else np.uint8)
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, dtype.value)
    return ort.OrtValue.ortvalue_from_numpy(array)


def taken(value: onnxruntime.OrtValue) -> np.ndarray:
    """An output as an array of the model's own dtype."""
    dtype = _NOT_NUMPY.get(value.data_type())
    if dtype is None:
        return np.asarray(value.numpy())
    shape = value.shape()
    size = int(np.prod(shape)) * dtype.numpy().itemsize
    return np.frombuffer(ctypes.string_at(value.data_ptr(), size), dtype.numpy()).reshape(shape)


class _Lent:
    """Tensors that the serialized model refers to as files, and their bytes."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.buffers: list[np.ndarray] = []

    def stand_in(self, tensor: oir.TensorProtocol | None, lend: bool) -> oir.TensorProtocol | None:
        """What is serialized instead of `tensor`: a reference, the values of a small external one, or itself."""
        if tensor is None or tensor.dtype == oir.DataType.STRING:
            return tensor
        if not lend or tensor.nbytes < _BORROWED:
            external = isinstance(tensor, oir.ExternalTensor)
            return oir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name) if external else tensor
        array = tensor.numpy()
        array_shape = array.shape
        if tensor.dtype.bitwidth < 8:
            array = np.frombuffer(tensor.tobytes(), np.uint8)
        location = f"lent-{len(self.names)}"
        self.names.append(location)
        self.buffers.append(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        shape = oir.Shape(array_shape)
        return oir.ExternalTensor(location, 0, tensor.nbytes, tensor.dtype, shape=shape, name=str(tensor.name))


def _lend(model: oir.Model) -> tuple[bytes, _Lent]:
    """The model serialized without its large tensors, and these; only those of model-local functions stay in it."""
    lent = _Lent()
    inside = {id(model.graph), *(id(graph) for graph in model.graph.subgraphs())}
    with ExitStack() as undo:
        for graph in graphs(model):
            lend = id(graph) in inside
            for value in graph.initializers.values():
                undo.callback(setattr, value, "const_value", value.const_value)
                value.const_value = lent.stand_in(value.const_value, lend)
            for node in graph:
                held = node.attributes.get("value") if is_op(node, "Constant") else None
                if held is None or held.is_ref():
                    continue
                replaced = lent.stand_in(held.as_tensor(), lend)
                if replaced is not None and replaced is not held.value:
                    undo.callback(node.attributes.__setitem__, "value", held)
                    node.attributes["value"] = oir.AttrTensor("value", replaced)
        proto = oir.serde.serialize_model(model)
    if lent.names:
        _hoist(proto.graph, proto.graph, {})
    return proto.SerializeToString(), lent


def _hoist(graph: onnx.GraphProto, main: onnx.GraphProto, renamed: Mapping[str, str]) -> None:
    """Make every reference of `graph` an initializer of the main graph: elsewhere the checker looks for its file."""
    nested = graph is not main
    own = dict(renamed)
    for i in range(len(graph.initializer) - 1, -1, -1):
        tensor = graph.initializer[i]
        if nested and tensor.external_data:
            own[tensor.name] = _adopt(main, tensor)
            del graph.initializer[i]
    for i in range(len(graph.node) - 1, -1, -1):
        node = graph.node[i]
        if node.op_type == "Constant" and node.attribute and node.attribute[0].t.external_data:
            own[node.output[0]] = _adopt(main, node.attribute[0].t)
            del graph.node[i]
    for node in graph.node:
        node.input[:] = [own.get(name, name) for name in node.input]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _hoist(attribute.g, main, own)
    for out in graph.output:
        if out.name in own:
            graph.node.add(op_type="Identity", input=[own[out.name]], output=[out.name])


def _adopt(main: onnx.GraphProto, tensor: onnx.TensorProto) -> str:
    name = f"burnish.{tensor.external_data[0].value}"
    main.initializer.add().CopyFrom(tensor)
    main.initializer[-1].name = name
    return name
