"""Run passes in order, hold them to their word, and account for what each did."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as oir

from burnish.ir import edit, facts, text, weights
from burnish.ir.errors import BurnishError, InputError
from burnish.ir.walk import graphs
from burnish.passes import catalog
from burnish.passes.base import Outcome, Pass


@dataclass
class Step:
    """What one pass did in one run of a pipeline.

    Attributes:
        spec: the pass and its options as text.
        outcome: its own account.
        seconds: CPU time.
        nodes: node counts before and after.
        bytes: bytes of all constants before and after.
        undone: why its work was taken back; empty when it was kept.
    """

    spec: str
    outcome: Outcome
    seconds: float = 0.0
    nodes: tuple[int, int] = (0, 0)
    bytes: tuple[int, int] = (0, 0)
    undone: str = ""


@dataclass
class Run:
    """A rewritten model and the account of every step.

    Attributes:
        model: the rewritten model; the caller's model is untouched.
        steps: one per pass of the pipeline, in order; passes that had nothing new to look at are left out.
    """

    model: oir.Model
    steps: list[Step] = field(default_factory=list)

    @property
    def rewritten(self) -> int:
        """Rewrites in all steps."""
        return sum(step.outcome.rewritten for step in self.steps)


class Pipeline:
    """An ordered list of passes.

    Args:
        passes: passes, or their text (`"fold-batchnorm"`, `"fuse-attention{target=ort-cpu}"`).

    Raises:
        InputError: for an unknown pass or option, and when a pass needs a fact that an earlier one breaks.
    """

    def __init__(self, passes: Sequence[Pass | str]) -> None:
        self.passes: tuple[Pass, ...] = tuple(
            one for item in passes for one in ([item] if isinstance(item, Pass) else catalog.parse(item))
        )
        self._check_order()

    def _check_order(self) -> None:
        broken: dict[str, str] = {}
        for one in self.passes:
            for fact in one.needs:
                if fact in broken:
                    raise InputError(
                        f"`{one.pass_name()}` needs `{fact}`, which `{broken[fact]}` before it breaks",
                        hint=f"put a pass that gives `{fact}` between them: {', '.join(_givers(fact)) or 'none does'}",
                    )
            broken.update(dict.fromkeys(one.breaks, one.pass_name()))
            for fact in one.gives:
                broken.pop(fact, None)

    def specs(self) -> list[str]:
        """The passes as text, as recipes and the command line spell them."""
        return [catalog.spec(one) for one in self.passes]

    def rewrite(
        self,
        model: oir.Model,
        *,
        limit: int | None = None,
        undone: dict[str, str] | None = None,
        check: bool = False,
        on_step: Callable[[str, int, int], None] | None = None,
        after: Callable[[oir.Model, Step], None] | None = None,
    ) -> Run:
        """Rewrite a copy of `model`; nothing is executed.

        A pass is run again only when something has changed since it last found nothing to do, so a recipe may name a
        pass several times. Passes are deterministic: the same model and pipeline give the same result.

        Args:
            model: left untouched; weights are shared with the copy.
            limit: stop after so many rewrites over all passes.
            undone: passes (by text) to leave out, with the reason, which is kept in the report.
            check: check the facts around every pass, and that a pass tells the truth about having changed something.
            on_step: called before each pass with its name, its number and the number of passes.
            after: called after each pass that changed something.
        """
        limit = _limit_from_environment() if limit is None else limit
        run = Run(model.clone())
        idle: dict[str, int] = {}
        changes, size = 0, (_nodes(run.model), constant_bytes(run.model))
        dump = os.environ.get("BURNISH_DUMP")
        if dump:
            _dump(dump, 0, "input", run.model)
        for number, one in enumerate(self.passes):
            spec = catalog.spec(one)
            if undone and spec in undone:
                if not any(step.spec == spec for step in run.steps):
                    run.steps.append(Step(spec, Outcome(one.pass_name()), undone=undone[spec]))
                continue
            if idle.get(spec) == changes or (limit is not None and changes >= limit):
                continue
            if on_step is not None:
                on_step(spec, number, len(self.passes))
            left = None if limit is None else limit - changes
            step = self._run_one(one, spec, run.model, size, left, check)
            size = step.nodes[1], step.bytes[1]
            changes += step.outcome.rewritten
            idle[spec] = changes if step.outcome.rewritten == 0 else -1
            run.steps.append(step)
            if step.outcome.rewritten and after is not None:
                after(run.model, step)
            if step.outcome.rewritten and dump:
                _dump(dump, len(run.steps), one.pass_name(), run.model)
        return run

    def _run_one(
        self, one: Pass, spec: str, model: oir.Model, size: tuple[int, int], limit: int | None, check: bool
    ) -> Step:
        outcome = Outcome(one.pass_name(), limit)
        step = Step(spec, outcome, nodes=(size[0], size[0]), bytes=(size[1], size[1]))
        model.meta.pop("burnish.names", None)
        if check:
            facts.check(model, one.needs, one.pass_name(), "before")
        before = text.text(model) if check else ""
        start = time.process_time()
        try:
            one.rewrite(model, outcome)
        except BurnishError:
            raise
        except Exception as error:
            raise PassFailure(one.pass_name(), error) from error
        if outcome.rewritten:
            edit.separate_names(model)
        step.seconds = time.process_time() - start
        if outcome.rewritten:
            step.nodes, step.bytes = (size[0], _nodes(model)), (size[1], constant_bytes(model))
        if check:
            facts.check(model, (*(f for f in one.needs if f not in one.breaks), *one.gives), one.pass_name(), "after")
            if (text.text(model) == before) != (outcome.rewritten == 0):
                raise PassFailure(
                    one.pass_name(),
                    AssertionError(f"it reports {outcome.rewritten} rewrites, but its text says otherwise"),
                )
        return step


class PassFailure(BurnishError):
    """A defect of burnish itself: a pass raised, or did not tell the truth. Exit code 3."""

    exit_code = 3

    def __init__(self, name: str, error: Exception) -> None:
        super().__init__(
            f"`{name}` failed: {type(error).__name__}: {error}",
            hint=f"this is a defect of burnish; leave the pass out with `--without {name}` and report the model",
        )
        self.pass_name = name


def _givers(fact: str) -> list[str]:
    return [f"`{name}`" for name in catalog.names() if fact in catalog.load(name).gives]


def _limit_from_environment() -> int | None:
    given = os.environ.get("BURNISH_LIMIT")
    if given is None:
        return None
    if not given.isdecimal():
        raise InputError(f"cannot read `{given}`", place="BURNISH_LIMIT", hint="give a number of rewrites")
    return int(given)


def _nodes(model: oir.Model) -> int:
    return sum(len(graph) for graph in graphs(model))


_FRAME, _ENTRY = 3, 16
"""Bytes in a file around a node, and of an initializer or a value beside its name and numbers."""


def constant_bytes(model: oir.Model) -> int:
    """Bytes of all constants of a model, in initializers and in Constant nodes, those of nested graphs included."""
    total = 0
    for graph in graphs(model):
        total += sum(v.const_value.nbytes for v in graph.initializers.values() if v.const_value is not None)
        total += sum(t.nbytes for n in graph if n.op_type == "Constant" and (t := weights.tensor_of(n.outputs[0])))
    return total


def structure_bytes(model: oir.Model) -> int:
    """About what everything but the numbers of initializers takes in a file: nodes, the types of values, and names."""
    nodes = sum(int(oir.serde.serialize_node(node).ByteSize()) + _FRAME for node in model.graph)
    values = [value for node in model.graph for value in node.outputs if not value.is_graph_output()]
    names = [*(value.name for value in values), *model.graph.initializers]
    return nodes + sum(len(str(name)) + _ENTRY for name in names)


def _dump(folder: str, number: int, name: str, model: oir.Model) -> None:
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / f"{number:03d}-{name}.txt").write_text(text.text(model))
    except OSError as error:
        raise InputError(
            f"cannot write: {error.strerror}", place=f"BURNISH_DUMP={folder}", hint="name a folder to write to"
        ) from None
