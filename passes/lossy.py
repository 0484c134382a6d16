"""What a lossy pass is: it lists edits, each with what it would save, and makes those that are chosen.

The engine scores every edit alone, chooses among the edits of all lossy passes together, and measures the joint result.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as oir

from burnish.ir import cost
from burnish.ir.edit import name_nodes, separate_names
from burnish.ir.errors import InputError
from burnish.ir.samples import Sample
from burnish.passes import catalog
from burnish.passes.base import Outcome, Pass
from burnish.passes.protocols import Executor, Observer
from burnish.passes.routers import Routes
from burnish.passes.sites import Keep

Keeps = Callable[[oir.Model, Mapping[str, tuple[oir.Value, int | None]]], Mapping[str, Keep | str | None]]
"""Which rows of values (each with the axis of its features) count and are no padding, or why that cannot be told."""

Gradients = Callable[[oir.Model, Sequence[Sample]], Mapping[str, np.ndarray]]
"""The gradient of the task's loss, summed over all samples, by the name of the initializer."""


_PORT = "burnish.port"
_DEFAULT = "burnish.default"
_UNIT = "burnish.unit"
_MIXED = "burnish.mixed"


@dataclass(frozen=True)
class Savings:
    """What one edit alone takes away; negative numbers are what it adds.

    Attributes:
        parameters: elements of constants that the model holds.
        bytes: bytes of constants that the model holds.
        macs: multiply-adds of one run on the sample with the most; None when unknown.
        seconds: seconds of one run on the target, from timed kernels; None when not measured.
        conversions: how many of these seconds conversions between integers and floating point take away again where
            nothing beside the edit is edited as well.
    """

    parameters: int = 0
    bytes: int = 0
    macs: int | None = None
    seconds: float | None = None
    conversions: float = 0.0


@dataclass(frozen=True, eq=False)
class Edit:
    """One independent change that could be made to a model.

    Attributes:
        spec: the pass that makes it, with its options, as text.
        site: what it changes, for people and as a key: `block 7`, `encoder.0.query`. Stable from run to run.
        option: what it makes of it: `drop`, `rank 96`.
        claims: what it takes for itself, mostly names of nodes. Two edits with a claim in common exclude each other.
        savings: what it alone takes away.
        payload: arrays that `apply` needs and the model does not hold, such as a basis; edits may share them.
        anchors: names of the nodes or values by which `apply` finds its site again.
        cases: payloads in the place of its own, each with the share of the rows for which it does what they do; it is
            timed as these, since what a single sample decides tells little. None where it does the same for all.
        unconverted: names of values that it rounds to integers and edits beside it round as well, each with the sites
            of these, which its pass edits. With all of them nothing is converted there, and never where none is named.
            Empty where time does not count.
    """

    spec: str
    site: str
    option: str
    claims: frozenset[str]
    savings: Savings
    payload: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)
    anchors: tuple[str, ...] = ()
    unconverted: Mapping[str, frozenset[str]] = field(default_factory=dict)
    cases: tuple[tuple[float, Mapping[str, np.ndarray]], ...] = field(default=(), repr=False)

    @property
    def key(self) -> str:
        """The edit as text: the same for the same edit of the same model in every run."""
        return f"{self.spec} | {self.site} | {self.option}"


@dataclass(frozen=True)
class Context:
    """What a lossy pass may look at when it proposes.

    Attributes:
        samples: the samples that edits are fitted to; never those that the result is verified on.
        execute: makes a runner for a model.
        observe: makes an observer for a model.
        keeps: says which rows of a value are no padding.
        gradients: of the task's loss; None where torch is missing.
        routes: learns routers of gates; None where torch is missing.
        dims: the sizes that the largest sample gives to symbolic dimensions, for multiply-adds.
        searched: edits are chosen one by one, so that none can count on the others; else all of them are made.
        timed: edits are chosen by the time that they save, so that what they save only beside each other is needed.
        on_step: progress: (what is done, its number, how many there are).
    """

    samples: Sequence[Sample]
    execute: Executor
    observe: Callable[[oir.Model], Observer]
    keeps: Keeps
    gradients: Gradients | None = None
    routes: Routes | None = None
    dims: Mapping[str, int] = field(default_factory=dict)
    searched: bool = False
    timed: bool = False
    on_step: Callable[[str, int, int], None] = lambda what, number, total: None


class Undecided(InputError):
    """The options of a lossy pass leave the choice to a measurement. Exit code 2."""


@dataclass(frozen=True)
class LossyPass(Pass):
    """A pass that changes the function within a budget. It proposes and applies edits; it does not choose.

    Class attributes:
        order: passes of a lower number apply their chosen edits first: 0 whole blocks, 10 parts of blocks, 20 sharing,
            30 factors, 40 numbers of fewer bits.
        needs: also what proposing needs; the engine proposes on the normal form.
        prepare: exact passes, as a recipe names them, that are to run before the normal form is closed: what an edit
            would otherwise have to leave alone.
        saves: its edits are to save bytes or time; one that only shows what others would lose saves nothing.
        by_row: what its edits save differs from row to row: the result is timed on rows one by one, and is not written
            where it is slower.
        ports: whether it adds inputs and outputs, which samples of the original lack; it is made without samples then.
    """

    order: ClassVar[int]
    prepare: ClassVar[tuple[str, ...]] = ()
    ports: ClassVar[bool] = False
    saves: ClassVar[bool] = True
    by_row: ClassVar[bool] = False

    @property
    def decided(self) -> bool:
        """Whether the options settle the choice by a rule that looks at samples (the seven blocks of least influence).

        Then all that `propose` returns is made, and nothing is searched.
        """
        return False

    @property
    def everywhere(self) -> bool:
        """Whether `asked` gives an edit for every site; within a budget such edits are searched instead."""
        return False

    @abstractmethod
    def propose(self, model: oir.Model, context: Context, outcome: Outcome) -> list[Edit]:
        """Every edit that could be made, in a fixed order, none of which enlarges the model without saving time.

        Args:
            model: the model in normal form; not changed.
            context: samples and what runs models.
            outcome: takes the sites that are left alone, with the reason (`outcome.skip`); nothing is taken.

        Raises:
            InputError: the pass cannot work on this model or these samples at all.
        """

    @abstractmethod
    def apply(self, model: oir.Model, edits: Sequence[Edit], outcome: Outcome) -> None:
        """Make edits of this pass, which do not exclude each other, in place; none of them leaves the model as it is.

        Args:
            model: a copy of what they were proposed for, to which passes of a lower order may have applied theirs.
            edits: the chosen ones.
            outcome: `outcome.take(node)` is asked once for each edit, before it is made.
        """

    def asked(self, model: oir.Model, outcome: Outcome) -> list[Edit]:
        """The edits that the options name outright, for a pass that needs no measurement to know what to do.

        Raises:
            Undecided: the options leave the choice to a measurement.
            InputError: they name what the model has not, or what cannot be made.
        """
        raise Undecided(
            f"`{self.pass_name()}` has to be told how much may be lost",
            hint="give samples with `--data` and a budget with `--max-drop` or `--max-size`",
        )

    def rewrite(self, model: oir.Model, outcome: Outcome) -> None:
        """Make the edits that the options name outright."""
        name_nodes(model)
        self.apply(model, self.asked(model, outcome), outcome)


def saved(before: oir.Model, after: oir.Model, dims: Mapping[str, int]) -> Savings:
    """What `after` holds and multiplies less than `before`.

    Args:
        before, after: models whose values have shapes; not changed.
        dims: numbers for symbolic dimensions.
    """
    old, new = cost.model_cost(before, dict(dims)), cost.model_cost(after, dict(dims))
    return Savings(
        old.total.parameters - new.total.parameters,
        sum(one.bytes for one in old.stored) - sum(one.bytes for one in new.stored),
        None if old.macs is None or new.macs is None else old.macs - new.macs,
    )


def port(value: oir.Value) -> str:
    """The name that an input or output of a model made by `apply` had in the original; passes may rename caches."""
    return str(value.meta.get(_PORT, value.name))


def set_unit(value: oir.Value, dtype: oir.DataType, unit: np.ndarray) -> None:
    """Let an input or output be integers of a smaller dtype: multiples of `unit`, which broadcasts to them."""
    value.type = oir.TensorType(dtype)
    value.meta[_UNIT] = unit


@dataclass(frozen=True, eq=False)
class Mixed:
    """Axes of an input or output whose elements are sums of those that the original takes or gives.

    Attributes:
        axes: the axes.
        matrix: [*sizes here, *sizes in the original] of an input, the other way round of an output: an array of the
            original's is multiplied by it, or one of the model's.
    """

    axes: tuple[int, ...]
    matrix: np.ndarray

    def of(self, array: np.ndarray) -> np.ndarray:
        """The array with these axes multiplied."""
        count = len(self.axes)
        last = tuple(range(self.matrix.ndim - count, self.matrix.ndim))
        moved = np.tensordot(array, self.matrix, (self.axes, last))
        ends = tuple(range(moved.ndim - count, moved.ndim))
        return np.ascontiguousarray(np.moveaxis(moved, ends, self.axes).astype(array.dtype))


def set_mixed(value: oir.Value, axes: Sequence[int], matrix: np.ndarray) -> None:
    """Let axes of an input or output have other sizes than in the original; see `Mixed`."""
    value.meta[_MIXED] = Mixed(tuple(axes), matrix)


def mixed(value: oir.Value) -> Mixed | None:
    """How an input or output differs from the original's; None when it has the same sizes."""
    found: Mixed | None = value.meta.get(_MIXED)
    return found


def set_default(value: oir.Value, array: np.ndarray) -> None:
    """Say what an input that a pass adds is given where samples of the original are run."""
    value.meta[_DEFAULT] = array


def feeds(model: oir.Model, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a model made by `apply` is to be given where the original is given these arrays by name."""
    found = {}
    for value in model.graph.inputs:
        array, unit, mix = given.get(port(value), value.meta.get(_DEFAULT)), value.meta.get(_UNIT), mixed(value)
        if array is not None and mix is not None:
            array = mix.of(array)
        if array is not None and unit is not None and value.dtype is not None:
            limits = np.iinfo(value.dtype.numpy())
            array = np.clip(np.rint(array / unit), limits.min, limits.max).astype(limits.dtype)
        if array is not None:
            found[str(value.name)] = array
    return found


def results(model: oir.Model, computed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a model made by `apply` has computed, under the names and in the units of the original's outputs."""
    outputs = {str(value.name): value for value in model.graph.outputs}
    found = {}
    for name, array in computed.items():
        value = outputs.get(name)
        if value is None:
            found[name] = array
            continue
        unit, mix = value.meta.get(_UNIT), mixed(value)
        array = array if unit is None else (array * unit).astype(unit.dtype)
        found[port(value)] = array if mix is None else mix.of(array)
    return found


def apply(
    model: oir.Model, chosen: Sequence[Edit], passes: Sequence[LossyPass]
) -> tuple[oir.Model, dict[str, Outcome]]:
    """A copy of `model` with edits of several passes, made in the order of the passes' numbers.

    Args:
        model: left untouched; weights are shared with the copy.
        chosen: edits that these passes proposed for `model`; no two exclude each other.
        passes: the passes.

    Returns:
        The copy, and by its text the account of each pass that had edits. `port` tells what its inputs and outputs
        were called.
    """
    copy = model.clone()
    for value in (*copy.graph.inputs, *copy.graph.outputs):
        value.meta[_PORT] = value.name
        value.meta.pop(_MIXED, None)
    outcomes = {}
    for one in sorted(passes, key=lambda one: one.order):
        own = [edit for edit in chosen if edit.spec == catalog.spec(one)]
        if own:
            outcomes[catalog.spec(one)] = outcome = Outcome(one.pass_name())
            copy.meta.pop("burnish.names", None)
            one.apply(copy, own, outcome)
            separate_names(copy)
    return copy, outcomes
