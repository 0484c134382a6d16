"""Load a compiled model: check the folder, then its weights, then its code, and chain its parts."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from burnish.backends.tvm import artifact, processor, versions, weights_file
from burnish.backends.tvm.artifact import Manifest, Port, Step
from burnish.backends.tvm.reasons import last_line
from burnish.ir.errors import InputError

if TYPE_CHECKING:
    from burnish.backends.tvm.kernels.running import KernelsRunner
    from burnish.backends.tvm.runner import TvmRunner
    from burnish.backends.tvm.steps import OrtPart


def load(path: str | os.PathLike[str], *, threads: int | None = None) -> ArtifactRunner:
    """What `burnish.backends.tvm.load` says."""
    folder = Path(path)
    manifest = artifact.read(folder, versions.found())
    kind = manifest.target.partition(":")[0]
    tvm = versions.runtime(whole=kind != "llvm")
    device = {"llvm": tvm.cpu, "cuda": tvm.cuda}.get(kind, tvm.cpu)()
    if not device.exist:
        raise InputError(
            f"it is compiled for {manifest.target}, and there is no such device here",
            place=str(folder),
            hint="run it on a machine with one, or compile for this one with `--target llvm`",
        )
    lacking = processor.lacking(manifest.extensions)
    if lacking:
        raise InputError(
            f"it is compiled for {manifest.target}, and this processor lacks {', '.join(lacking)}",
            place=str(folder),
            hint="compile it for this machine with `--target llvm`",
        )
    from burnish.backends.tvm.runner import use_threads

    use_threads(threads)
    weights = _weights(folder, manifest)
    code = _code(tvm, folder, manifest) if any(step.kind == "tvm" for step in manifest.steps) else None
    parts = [_part(folder, step, code, device, weights, threads) for step in manifest.steps]
    return ArtifactRunner(manifest, parts, device)


class ArtifactRunner:
    """A compiled model. Several threads may run it: each part lets them in one after the other.

    Attributes:
        manifest: what the folder holds.
        inputs, outputs: names, dtypes and sizes, in order.
    """

    def __init__(self, manifest: Manifest, parts: list[TvmRunner | OrtPart | KernelsRunner], device: Any) -> None:
        self.manifest, self.inputs, self.outputs = manifest, manifest.inputs, manifest.outputs
        self._parts, self._device = parts, device
        self._last = _last_uses(manifest)
        on_host = manifest.target.startswith("llvm")
        self._ranged = [one.name for one in manifest.inputs if on_host and one.highest is not None]
        self._picks = any(one.highest is not None for one in manifest.inputs)
        self._names = [one.name for one in manifest.outputs]
        self._whole = len(parts) == 1 and list(manifest.steps[0].outputs) == self._names
        fixed = all(isinstance(size, int) for one in manifest.inputs for size in one.shape)
        checked = self._whole and fixed and not self._picks and manifest.steps[0].kind == "ort"
        alike = checked and len(manifest.steps[0].inputs) == len(manifest.inputs)
        self._direct = cast("OrtPart", parts[0]).session_run if alike else None
        """What runs all of the model and checks its inputs itself, as ONNX Runtime does where all sizes are numbers."""
        self._seen: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
        """Dtypes and sizes that were accepted last: checking them again would take as long as a small model."""

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs by name, in the order of the model's outputs, as arrays on the host.

        Raises:
            InputError: an input is missing, unknown, or has another dtype or shape; the code refuses the inputs; the
                runner is closed.
        """
        if self._direct is not None and len(feeds) == len(self.inputs):
            try:
                return self._direct(feeds)
            except InputError:
                pass  # what is wrong is said below, in the words of all compiled models
        if not _alike(self._seen, feeds):
            _check(self.inputs, {name: (str(one.dtype), one.shape) for name, one in feeds.items()})
            self._seen = {name: (one.dtype, one.shape) for name, one in feeds.items()}
        if self._picks:
            _check_range(self.inputs, feeds)
        if len(self._parts) == 1:
            found = self._parts[0].run(feeds)
            return (
                found if self._whole else {name: found[name] if name in found else feeds[name] for name in self._names}
            )
        from burnish.backends.tvm.steps import array

        return {name: array(one) for name, one in self._run(feeds).items()}

    def run_tensors(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """The outputs by name as TVM tensors on the device; `torch.from_dlpack` takes them without a copy.

        Args:
            feeds: by name, what DLPack hands over: torch tensors, CuPy arrays. Those that are on the device, contiguous
                and at a multiple of 64 bytes (torch's are) are not copied. They are not changed. On a GPU nothing looks
                at what inputs of indices hold.

        Raises:
            InputError: as for `run`.
        """
        from burnish.backends.tvm.runner import tensor_on

        return {name: tensor_on(self._device, one) for name, one in self._run(self._tensors(feeds)).items()}

    def bound(self, feeds: Mapping[str, Any]) -> Callable[[], object]:
        """Run the model on `feeds`, and give a call that does so again on the same memory, for timing.

        Raises:
            InputError: as for `run`.
        """
        tensors = self._tensors(feeds)

        def call() -> None:
            self._run(tensors)
            self._device.sync()

        call()
        return call

    def _tensors(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs on the device, checked."""
        from burnish.backends.tvm.runner import tensor_on

        tensors = {name: tensor_on(self._device, one) for name, one in feeds.items()}
        _check(self.inputs, {name: (str(one.dtype), tuple(one.shape)) for name, one in tensors.items()})
        _check_range(self.inputs, {name: np.from_dlpack(tensors[name]) for name in self._ranged})
        return tensors

    def _run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        if not self._parts:
            raise InputError("the runner is closed")
        values = dict(feeds)
        for index, (step, part) in enumerate(zip(self.manifest.steps, self._parts, strict=True)):
            found = part.run_tensors([values[name] for name in step.inputs])
            values.update(zip(step.outputs, found, strict=True))
            for name in self._last[index]:
                del values[name]
        return {one.name: values[one.name] for one in self.outputs}

    def close(self) -> None:
        """Free the code and the weights; it cannot run afterwards."""
        for part in self._parts:
            part.close()
        self._parts = []


def _part(
    folder: Path, step: Step, code: Any, device: Any, weights: Mapping[str, np.ndarray], threads: int | None
) -> TvmRunner | OrtPart | KernelsRunner:
    if step.kind == "ort":
        from burnish.backends.ort import session
        from burnish.backends.tvm.steps import OrtPart

        return OrtPart(session.from_path(folder / step.file, threads=threads or 1), step.inputs, step.outputs)
    from burnish.backends.tvm.runner import TvmRunner, shared

    missing = [name for name in step.weights if name not in weights]
    if missing:
        raise artifact.damaged(folder / artifact.WEIGHTS, f"the weight `{missing[0]}` is not in it")
    tensors = [shared(weights[name], device) for name in step.weights]
    if step.kind == "kernels":
        from burnish.backends.tvm.kernels.running import KernelsRunner

        return KernelsRunner(folder / step.file, device, step.inputs, step.outputs, tensors)
    return TvmRunner(code, device, step.inputs, step.outputs, tensors, step.function)


def _weights(folder: Path, manifest: Manifest) -> dict[str, np.ndarray]:
    listed = next((one for one in manifest.files if one.path == artifact.WEIGHTS), None)
    if listed is None:
        return {}
    file, seen = folder / artifact.WEIGHTS, sha256()
    with open(file, "rb") as stream:
        found = weights_file.read(file, stream, seen.update)
    if seen.hexdigest() != listed.sha256:
        raise artifact.damaged(file, "its SHA-256 is not that of the manifest")
    return found


def _code(tvm: Any, folder: Path, manifest: Manifest) -> Any:
    """The library, from a copy with a name of its own.

    The system's loader gives a library that it has under the same name already, whatever became of the file since; and
    what is loaded is then the very bytes that were compared.
    """
    from burnish.backends.tvm.quiet import quiet

    file = folder / artifact.CODE
    content = file.read_bytes()
    if sha256(content).hexdigest() != next(one.sha256 for one in manifest.files if one.path == artifact.CODE):
        raise artifact.damaged(file, "its SHA-256 is not that of the manifest")
    try:
        with quiet(), tempfile.TemporaryDirectory(prefix="burnish-") as aside:
            copy = Path(aside) / artifact.CODE
            copy.write_bytes(content)
            return tvm.runtime.load_module(str(copy))
    except OSError as error:
        hint = "free some space, or set `TMPDIR`"
        raise InputError(f"the code cannot be copied: {error.strerror}", place=str(file), hint=hint) from error
    except Exception as error:
        raise InputError(f"TVM cannot load the code: {last_line(error)}", place=str(file)) from error


def _last_uses(manifest: Manifest) -> list[list[str]]:
    """The values that nothing behind a step reads, for each step: those that it may be the last to need."""
    kept = {one.name for one in manifest.outputs}
    gone: list[list[str]] = []
    for step in reversed(manifest.steps):
        over = [name for name in dict.fromkeys((*step.inputs, *step.outputs)) if name not in kept]
        gone.append(over)
        kept.update(over)
    return gone[::-1]


def _alike(seen: Mapping[str, tuple[np.dtype, tuple[int, ...]]], feeds: Mapping[str, np.ndarray]) -> bool:
    if not seen or len(seen) != len(feeds):
        return False
    for name, (dtype, shape) in seen.items():
        one = feeds.get(name)
        if one is None or one.dtype != dtype or one.shape != shape:
            return False
    return True


def _check(ports: tuple[Port, ...], given: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Refuse inputs that are not what the manifest says, with the first thing that is wrong."""
    known = {one.name for one in ports}
    unknown = sorted(set(given) - known)
    if unknown:
        raise InputError(f"there is no input `{unknown[0]}`", hint="the inputs are: " + ", ".join(sorted(known)))
    sizes: dict[str, int] = {}
    for one in ports:
        if one.name not in given:
            raise InputError(f"the input `{one.name}` is missing")
        dtype, shape = given[one.name]
        if dtype != one.dtype:
            raise InputError(f"the input `{one.name}` is {dtype}, and has to be {one.dtype}")
        wanted = ", ".join(str(size) for size in one.shape)
        fits = len(shape) == len(one.shape) and all(
            size == found if isinstance(size, int) else size is None or sizes.setdefault(size, found) == found
            for size, found in zip(one.shape, shape, strict=True)
        )
        if not fits:
            raise InputError(f"the input `{one.name}` has shape {list(shape)}, and has to have [{wanted}]")


def _check_range(ports: tuple[Port, ...], feeds: Mapping[str, np.ndarray]) -> None:
    """Refuse indices of rows that there are not: compiled code would pick others without a word."""
    for one in ports:
        array = feeds.get(one.name)
        if array is None or one.lowest is None or one.highest is None or not array.size:
            continue
        low, high = int(array.min()), int(array.max())
        if low < one.lowest or high > one.highest:
            found = low if low < one.lowest else high
            raise InputError(f"the input `{one.name}` holds {found}, outside {one.lowest} to {one.highest}")
