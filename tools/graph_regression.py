"""What a test calls: `graph_regression.check(model_or_module, samples)` compares a model with its lock file."""

from __future__ import annotations

import hashlib
import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from burnish.tools.pytest_plugin import SUFFIX, Ledger

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as oir

    from burnish.frontends.measures import Metric
    from burnish.passes.protocols import Measure
    from burnish.tools.check.difference import Report
    from burnish.tools.check.tolerances import Tolerances

_LONGEST = 120
"""Characters of a lock's name; file systems allow 255 bytes for a name with its suffix."""


class GraphRegression:
    """The locks of one test.

    A lock lies in a folder beside the test file, named as the file: `test_export/test_encoder.lock.yaml`. The second
    check of a test without a name of its own adds `+2`, the third `+3`.
    """

    def __init__(self, test: pytest.Item, ledger: Ledger) -> None:
        self._test = test
        self._ledger = ledger
        self._names: list[str] = []
        self._unnamed = 0

    def check(
        self,
        model: Any,
        samples: Any = None,
        *,
        name: str | None = None,
        tolerance: str | Path | Tolerances | None = None,
        metric: str | Measure | Metric | None = None,
        old: Any = None,
        run: bool = True,
        **options: Any,
    ) -> Report:
        """Compare a model with its lock file; with `--graph-update` write or renew it.

        Args:
            model: the path of an `.onnx` or `.pt2` file, an `onnx_ir.Model`, an `onnx.ModelProto`, a `torch.nn.Module`
                or a `torch.export.ExportedProgram`. A relative path starts at the current folder, or else at pytest's
                root folder. A module is exported in inference mode and has its mode back afterwards.
            samples: what the outputs are computed on. For a module or program what it is called with: a tensor, a tuple
                of positional or a dict of named arguments, or a list of these, of which the first is what it is
                exported with. Else what `--data` takes, or one dict of arrays. Made from the inputs' meaning if absent.
            name: of the lock, instead of the test's. Tests of one file may share a lock.
            tolerance: what may differ: a tolerance file, from pytest's root folder, or `Tolerances`.
            metric: the metric whose value is locked; needs labelled samples.
            old: the model as it was, in any of the forms of `model` but with a module's samples; names the first node
                whose numbers part.
            run: compute outputs; without, the lock holds what can be read from the graph.
            options: of the export of a module: `dynamic_shapes`, `input_names`, `output_names`, `opset`.

        Returns:
            The report; in an update what was accepted.

        The test fails, with the report as its text, when something differs that may not, when there is no lock, and
        when the model or the samples cannot be used.
        """
        from burnish.ir.errors import BurnishError

        path = self._path(name)
        try:
            asked = {"metric": metric, "run": run}
            given = (self._found(model), self._found(samples), tolerance, self._found(old))
            return self._check(path, *given, asked, options)
        except BurnishError as error:
            failure = f"{error}"
        pytest.fail(failure, pytrace=False)

    def _check(
        self,
        path: Path,
        model: Any,
        samples: Any,
        tolerance: Any,
        old: Any,
        asked: dict[str, Any],
        options: dict[str, Any],
    ) -> Report:
        ledger, shown = self._ledger, self._ledger.shown(path)
        ledger.used.add(shown)
        known_to_exist = path.exists()
        if not known_to_exist and not ledger.update:
            pytest.fail(f"there is no lock `{shown}`\n\nhint: `{self._command()}` writes it; commit it", pytrace=False)
        from burnish.tools.check import lock_file, said
        from burnish.tools.check.check import check
        from burnish.tools.check.difference import Report
        from burnish.tools.check.take import Request, take
        from burnish.tools.check.tolerances import Tolerances, read

        if isinstance(tolerance, str | Path):
            tolerance = read(self._ledger.root / tolerance)
        graph, data = read_subject(model, samples, options)
        request = Request(data=data, **asked)
        label = ledger.shown(Path(model)) if isinstance(model, str | Path) else type(model).__name__
        if not known_to_exist:
            lock = take(graph, request)
            path.parent.mkdir(parents=True, exist_ok=True)
            lock_file.write(lock, path)
            ledger.changes[shown] = ["written"]
            return Report(label, shown, lock, lock)
        before = None if old is None else read_subject(old, samples, options if is_traced(old) else {})[0]
        known = lock_file.read(path)
        report = check(graph, known, request, tolerance or Tolerances(), before, model_name=label, lock_name=shown)
        if ledger.update and shown not in ledger.changes:
            if report.new != known:
                lock_file.write(report.new, path)
                ledger.changes[shown] = ["renewed", *said.listed(report.differences, accepted=True)]
        elif not report.passed:
            what = "\n".join(said.lines(report))
            hint = f"`{self._command()}` accepts what the model is now"
            if ledger.update:
                hint = "another check of this run wrote this lock; give the checks different names"
            pytest.fail(f"{what}\n\nhint: {hint}", pytrace=False)
        return report

    def _found(self, given: Any) -> Any:
        """A path that is there from pytest's root folder only, from there; anything else as it is."""
        if isinstance(given, str | Path) and not Path(given).exists() and (self._ledger.root / given).exists():
            return self._ledger.root / given
        return given

    def _path(self, name: str | None) -> Path:
        """Where the lock of the next check lies; a name that this test used already fails the test."""
        if name is None:
            self._unnamed += 1
            stem = safe(".".join(self._own_names())) + (f"+{self._unnamed}" if self._unnamed > 1 else "")
        else:
            stem = safe(name)
        if stem in self._names:
            pytest.fail(f"this test checked `{stem}` already\n\nhint: give each check a name of its own", pytrace=False)
        self._names.append(stem)
        return self._ledger.locks_of(self._test.path) / f"{stem}{SUFFIX}"

    def _own_names(self) -> list[str]:
        """The test's names below its file: those of its classes, and its own with its parameters."""
        names: list[str] = []
        for node in self._test.listchain():
            names = [] if isinstance(node, pytest.File) else [*names, node.name]
        return names

    def _command(self) -> str:
        """The command that updates this test's locks."""
        import shlex

        file, here = self._test.path, self._test.config.invocation_params.dir
        shown = file.relative_to(here) if file.is_relative_to(here) else file
        return f"pytest {shlex.quote('::'.join([str(shown), *self._own_names()]))} --graph-update"


def safe(name: str) -> str:
    """A name as that of a file, of ASCII letters, digits, `.`, `_` and `-`.

    `test_encoder[fp16-2]` becomes `test_encoder-fp16-2`. Where more than these brackets changes, or the name is too
    long, a hash of the whole name is added, so that two names never become one.
    """
    plain = re.fullmatch(r"([^\[\]]+)\[([^\[\]]+)\]", name)
    spelled = f"{plain[1]}-{plain[2]}" if plain else name
    kept = re.sub(r"[^A-Za-z0-9._-]+", "-", spelled).strip("-.")[:_LONGEST]
    return kept if kept and kept == spelled else f"{kept}-{hashlib.sha256(name.encode()).hexdigest()[:8]}".lstrip("-")


def is_traced(model: Any) -> bool:
    """Whether this is a module or program of PyTorch, which is exported."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(model, torch.nn.Module | torch.export.ExportedProgram)


def read_subject(model: Any, samples: Any, options: dict[str, Any]) -> tuple[oir.Model, Any]:
    """The model as ONNX, and the samples as `burnish.frontends.samples.read_samples` takes them.

    Raises:
        InputError: the model, the samples or the options cannot be used.
    """
    from burnish.frontends import load
    from burnish.ir.errors import InputError
    from burnish.ir.samples import Sample

    if not is_traced(model):
        if options:
            hint = "leave it out, or give the module"
            raise InputError(f"`{next(iter(options))}` is for modules, which are exported", hint=hint)
        return load(model), [samples] if isinstance(samples, Mapping) else samples
    calls = samples if isinstance(samples, list) else [samples]
    if samples is None or not calls:
        hint = "graph_regression.check(module, samples): a tensor, a tuple of arguments, or a dict of named ones"
        raise InputError("a module needs samples to be exported with", place=type(model).__name__, hint=hint)
    if isinstance(model, sys.modules["torch"].nn.Module):
        order = _named(model, calls[0])
        example = {name: calls[0][name] for name in order} if isinstance(calls[0], Mapping) else calls[0]
        traced = load(model, example, **options)
    else:
        order, traced = list(model.graph_signature.user_inputs), load(model, **options)
    return traced, [Sample(f"samples[{i}]", feeds(traced, call, order)) for i, call in enumerate(calls)]


def _named(module: Any, call: Any) -> list[str]:
    """The named arguments of a call in the order of `forward`: the order of a dict is not that of the inputs."""
    if not isinstance(call, Mapping):
        return []
    declared = [name for name in inspect.signature(module.forward).parameters if name in call]
    return [*declared, *(name for name in call if name not in declared)]


def feeds(model: oir.Model, call: Any, order: Sequence[str]) -> dict[str, np.ndarray]:
    """The arguments of a call as arrays by the names of the inputs of the exported model.

    The exporter makes an input of every tensor in the arguments, nested ones included, in their order.

    Args:
        model: the exported model.
        call: a tensor or array, a tuple of positional or a dict of named arguments.
        order: the named arguments in the exporter's order.

    Raises:
        InputError: the model has more or fewer inputs than the call has tensors, or the names are others.
    """
    import numpy as np
    import torch
    from torch.utils import _pytree

    from burnish.backends.fx.bridge import to_numpy
    from burnish.ir.errors import InputError

    if isinstance(call, Mapping):
        if set(call) != set(order):
            hint = f"name the arguments it is exported with: {', '.join(f'`{name}`' for name in order) or 'none'}"
            raise InputError("a sample has other arguments than the module was exported with", hint=hint)
        call = {name: call[name] for name in order}
    tensors = [one for one in _pytree.tree_leaves(call) if isinstance(one, torch.Tensor | np.ndarray)]
    names = [str(value.name) for value in model.graph.inputs]
    if len(tensors) != len(names):
        listed = ", ".join(f"`{name}`" for name in names)
        raise InputError(
            f"a sample holds {len(tensors)} tensors, and the exported model has {len(names)} inputs: {listed}",
            hint="give tensors for exactly the inputs, or export the module yourself and check the file",
        )
    arrays = [to_numpy(one) if isinstance(one, torch.Tensor) else one for one in tensors]
    return dict(zip(names, arrays, strict=True))
