"""Run models with torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as oir
import torch
from torch import fx

from burnish.backends.fx import bridge
from burnish.backends.fx.builder import to_graph_module
from burnish.ir.errors import BurnishError, InputError

Watcher = Callable[[torch.Tensor], None]


class FxRunner:
    """One module on one device, fed with and giving arrays.

    Attributes:
        module: the GraphModule; None after `close`.
        options: what runs it, for reports.

    Args:
        module: from `to_graph_module`.
        device: a torch device.
        compiled: run it through `torch.compile`, which compiles it for the shapes of the first run and again for
            others.
    """

    def __init__(self, module: fx.GraphModule, device: str = "cpu", *, compiled: bool = False) -> None:
        self._bridge = bridge.bridge_of(module)
        try:
            self._device = torch.device(device)
            torch.empty(0, device=self._device)  # a module without weights would be moved anywhere
            self.module: fx.GraphModule | None = module.to(self._device)
        except (RuntimeError, AssertionError) as error:
            raise InputError(
                f"torch cannot use the device `{device}`: {str(error).splitlines()[0]}",
                hint="a GPU needs its driver, and a build of torch for it" if device.startswith("cuda") else None,
            ) from error
        self._call: Callable[..., Any] | None = torch.compile(module, dynamic=False) if compiled else module
        self._refusal = "torch.compile fails" if compiled else "torch refuses the inputs"
        opaque = f", {', '.join(self._bridge.opaque)} in ONNX Runtime" if self._bridge.opaque else ""
        self.options = f"torch {torch.__version__}, {device}{', inductor' * compiled}{opaque}"

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs by name, in the order of the model's outputs.

        Raises:
            InputError: the module refuses these inputs, or the runner is closed.
        """
        call = self._callable()
        return self._arrays(self._guarded(lambda arguments: call(*arguments), feeds))

    def bound(self, feeds: Mapping[str, np.ndarray]) -> Callable[[], object]:
        """Run the module on `feeds`, and give a call that does so again on the same tensors and waits, for timing.

        Raises:
            InputError: as for `run`.
        """
        call, gpu = self._callable(), self._device.type == "cuda"

        def first(arguments: list[Any]) -> Callable[[], object]:
            def again() -> None:
                with torch.no_grad():
                    call(*arguments)
                if gpu:
                    torch.cuda.synchronize(self._device)

            again()
            return again

        found: Callable[[], object] = self._guarded(first, feeds)
        return found

    def watch(self, feeds: Mapping[str, np.ndarray], watchers: Mapping[str, Watcher]) -> dict[str, np.ndarray]:
        """`run`, with every watcher called on the value of its name when that has been computed.

        A watcher gets the tensor itself, on the runner's device and without a gradient; it must not change or keep it.

        Raises:
            InputError: as for `run`, or no tensor of the main graph has that name.
        """
        module = self._open()
        unknown = [name for name in watchers if name not in self._bridge.values]
        if unknown:
            raise InputError(f"there is no value `{unknown[0]}` to watch")
        by_node: dict[str, list[Watcher]] = {}
        for name, watcher in watchers.items():
            by_node.setdefault(self._bridge.values[name], []).append(watcher)
        interpreter = _Interpreter(module, by_node)
        return self._arrays(self._guarded(lambda arguments: interpreter.run(*arguments), feeds))

    def close(self) -> None:
        """Free the module."""
        self.module = self._call = None

    def _callable(self) -> Callable[..., Any]:
        self._open()
        assert self._call is not None
        return self._call

    def _open(self) -> fx.GraphModule:
        if self.module is None:
            raise InputError("the runner is closed")
        return self.module

    def _guarded(self, function: Callable[[list[Any]], Any], feeds: Mapping[str, np.ndarray]) -> Any:
        wanted = self._bridge.inputs
        unknown = [name for name in feeds if name not in wanted]
        missing = [name for name in wanted if name not in feeds]
        if unknown or missing:
            cause = f"there is no input `{unknown[0]}`" if unknown else f"input `{missing[0]}` is missing"
            raise InputError(cause, hint=f"the model's inputs are {', '.join(wanted)}")
        arguments = [self._tensor(feeds[name]) for name in wanted]
        try:
            with torch.no_grad():
                return function(arguments)
        except BurnishError:
            raise
        except Exception as error:
            raise InputError(f"{self._refusal}: {_reason(error)}") from error

    def _tensor(self, array: Any) -> Any:
        if isinstance(array, list | tuple):
            return tuple(self._tensor(a) for a in array)
        array = np.asarray(array)
        if array.dtype.kind in "OSU":
            return array
        found = bridge.to_torch(array, oir.DataType.from_numpy(array.dtype))
        if found is None:
            raise InputError(f"torch has no dtype for arrays of {array.dtype}")
        return found.to(self._device)

    def _arrays(self, results: Any) -> dict[str, Any]:
        return {name: _array(value) for name, value in zip(self._bridge.outputs, results, strict=True)}


def _array(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_array(v) for v in value]
    return bridge.to_numpy(value) if isinstance(value, torch.Tensor) else value


class _Interpreter(fx.Interpreter):
    """Runs a module node by node and shows the values of some."""

    def __init__(self, module: fx.GraphModule, watchers: Mapping[str, list[Watcher]]) -> None:
        super().__init__(module)
        self._watchers = watchers

    def run_node(self, n: fx.Node) -> Any:
        """The value of one node, shown to its watchers when it is a tensor."""
        found = super().run_node(n)
        if isinstance(found, torch.Tensor):
            for watcher in self._watchers.get(n.name, ()):
                watcher(found)
        return found


def _reason(error: Exception) -> str:
    """The first line that says what happened: of the compiler's errors that is one about the compiler's own error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith("backend=")]
    return (telling or lines or [type(error).__name__])[0]


def executor(
    *, device: str = "cpu", fallback: bool = True, compiled: bool = False, threads: int | None = None
) -> Callable[[oir.Model], FxRunner]:
    """A function that makes a runner for an in-memory model.

    Args:
        device: a torch device, `cpu` or `cuda`.
        fallback: let ONNX Runtime run the nodes that torch cannot.
        compiled: as for `FxRunner`.
        threads: threads inside an operator, for all of torch in this process; None leaves torch's setting.

    Returns:
        `f(model) -> FxRunner`, which raises InputError when the model cannot be expressed. The weights are copied.
    """

    def load(model: oir.Model) -> FxRunner:
        if threads is not None:
            torch.set_num_threads(threads)
        return FxRunner(to_graph_module(model, fallback=fallback), device, compiled=compiled)

    return load
