"""What a model does, as calls of kernels in order: where each tensor lies, and how large the workspace is.

Nothing is allocated while the kernels run. Tensors between two kernels lie in slots of one workspace; two tensors share
a slot when one is dead before the other is written ("greedy by size" for shared objects of Pisarchyk and Lee, Efficient
Memory Management for Deep Neural Net Inference, 2020). With symbolic dimensions a slot is as large as the largest of
its tensors for the sizes of the call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import tvm
from tvm import relax

from burnish.backends.tvm.kernels import expressions
from burnish.backends.tvm.registry import Unsupported

_LIKELY = 64
"""What a symbolic dimension counts as where tensors are compared by size."""


@dataclass(frozen=True)
class Place:
    """Where a tensor begins: `kind` is `input`, `weight`, `output` or `slot`."""

    kind: str
    index: int


@dataclass(frozen=True)
class Tensor:
    """A tensor that kernels read or write.

    Attributes:
        place: where it lies.
        shape: sizes as `tirx` expressions of the symbols of the inputs.
        dtype: TVM's name of it.
    """

    place: Place
    shape: tuple[Any, ...]
    dtype: str

    @property
    def fixed(self) -> bool:
        """Whether no size hangs on those of the inputs."""
        return not any(True for size in self.shape for _ in expressions.variables(size))

    @property
    def likely_bytes(self) -> int:
        """Its size in bytes if every symbol were 64."""
        return expressions.count(self.shape, _LIKELY) * expressions.bytes_of(self.dtype)


@dataclass(frozen=True)
class Step:
    """A call of a kernel; `kernel` is empty where the tensor read is copied to the tensor written.

    Attributes:
        kernel: its name in the module.
        reads: tensors, and sizes as expressions, that it takes.
        writes: the tensors behind them.
        sizes: numbers that it takes behind the tensors.
    """

    kernel: str
    reads: tuple[Any, ...]
    writes: tuple[Tensor, ...]
    sizes: tuple[Any, ...] = ()

    def moved(self, places: Mapping[Place, Place]) -> Step:
        """The same step on tensors that lie elsewhere."""
        reads, writes = (
            tuple(
                replace(one, place=places.get(one.place, one.place)) if isinstance(one, Tensor) else one for one in part
            )
            for part in (self.reads, self.writes)
        )
        return replace(self, reads=reads, writes=writes)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors of it."""
        return tuple(one for one in (*self.reads, *self.writes) if isinstance(one, Tensor))


Arrays = dict[Place, np.ndarray]
Once = Callable[[Sequence[Step], Arrays], None]
"""Runs steps on the arrays at their places, and adds there what they write."""


@dataclass(frozen=True)
class Plan:
    """A whole model.

    Attributes:
        inputs, weights, outputs: what the caller gives, in order.
        names: names of the inputs, and of the outputs.
        arrays: of the weights.
        symbols: variables of the sizes, each with the input and the dimension that it is read from.
        checks: pairs of sizes that have to be equal.
        steps: in order.
        slots: tensors that share memory, by slot.
    """

    inputs: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    names: tuple[tuple[str, ...], tuple[str, ...]]
    arrays: tuple[np.ndarray, ...]
    symbols: tuple[tuple[Any, int, int], ...]
    checks: tuple[tuple[Any, Any], ...]
    steps: tuple[Step, ...]
    slots: tuple[tuple[Tensor, ...], ...]

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the kernels that are called, each once."""
        return tuple(dict.fromkeys(step.kernel for step in self.steps if step.kernel))


def of(function: Any, inputs: Sequence[str], outputs: Sequence[str], weights: Sequence[np.ndarray], once: Once) -> Plan:
    """The plan of a Relax function whose operators are calls of kernels.

    Kernels that read weights alone are run now, by `once`, unless the result is larger than what they read: what is
    stored in few bits stays so.

    Args:
        function: its parameters are inputs, then weights.
        inputs: names of the inputs, as many as there are.
        outputs: names of the outputs.
        weights: the arrays of the weights, in order.
        once: runs steps when the model is compiled.

    Raises:
        Unsupported: something is not a call of one kernel, or a size depends on data.
    """
    walk = _Walk(function, len(inputs), weights)
    results = walk.run()
    once(walk.before, walk.arrays)
    steps, written = _into_outputs(walk.steps, results)
    steps, kept = _numbered(steps)
    steps, slots = _shared(steps)
    return Plan(
        tuple(walk.parameters[: len(inputs)]),
        tuple(replace(walk.constants[place], place=Place("weight", index)) for index, place in enumerate(kept)),
        written,
        (tuple(inputs), tuple(outputs)),
        tuple(walk.arrays[place] for place in kept),
        tuple((variable, *source) for variable, source in walk.symbols.items()),
        tuple(walk.checks),
        tuple(steps),
        slots,
    )


@dataclass
class _Walk:
    function: Any
    inputs: int
    weights: Sequence[np.ndarray]
    tensors: dict[Any, Any] = field(default_factory=dict)
    parameters: list[Tensor] = field(default_factory=list)
    constants: dict[Place, Tensor] = field(default_factory=dict)
    arrays: Arrays = field(default_factory=dict)
    symbols: dict[Any, tuple[int, int]] = field(default_factory=dict)
    checks: list[tuple[Any, Any]] = field(default_factory=list)
    before: list[Step] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    made: int = 0

    def run(self) -> list[Tensor]:
        for index, one in enumerate(self.function.params):
            if index < self.inputs:
                found = _typed(Place("input", index), one.ty)
                for axis, size in enumerate(found.shape):
                    if expressions.is_variable(size):
                        self.symbols.setdefault(size, (index, axis))
            else:
                found = self._constant(one.ty, self.weights[index - self.inputs])
            self.parameters.append(found)
            self.tensors[one] = found
        for one in self.parameters:
            self._known(one.shape)
        for block in self.function.body.blocks:
            for binding in block.bindings:
                self.tensors[binding.var] = self._value(binding)
        results = self._read(self.function.body.body)
        return [results] if isinstance(results, Tensor) else list(results)

    def _value(self, binding: Any) -> Any:
        value = binding.value
        operator = getattr(value.op, "name", "") if isinstance(value, relax.Call) else ""
        if isinstance(binding, relax.MatchCast):
            return self._held(self._read(value), binding.var.ty)
        if operator == "relax.call_tir":
            return self._call(value)
        if operator == "relax.reshape":
            given = self._read(value.args[0])
            return replace(given, shape=self._known(tuple(binding.var.ty.shape.values)))
        return self._read(value)

    def _call(self, call: Any) -> Any:
        reads = tuple(self._read(one) for one in call.args[1].fields)
        sizes = self._known(tuple(call.args[2].values)) if len(call.args) > 2 else ()
        (result,) = call.ty_args
        several = isinstance(result, relax.TupleType)
        writes = [_typed(Place("", 0), kind) for kind in (result.fields if several else (result,))]
        known = not sizes and reads and all(isinstance(one, Tensor) and one.place in self.constants for one in reads)
        known = known and all(one.fixed for one in (*reads, *writes))
        once = known and sum(one.likely_bytes for one in writes) <= sum(one.likely_bytes for one in reads)
        for index, one in enumerate(writes):
            self._known(one.shape)
            writes[index] = replace(one, place=Place("weight", len(self.constants)) if once else self._slot())
            if once:
                self.constants[writes[index].place] = writes[index]
        (self.before if once else self.steps).append(Step(call.args[0].name_hint, reads, tuple(writes), sizes))
        return tuple(writes) if several else writes[0]

    def _slot(self) -> Place:
        self.made += 1
        return Place("slot", self.made - 1)

    def _constant(self, kind: Any, array: np.ndarray) -> Tensor:
        found = _typed(Place("weight", len(self.constants)), kind)
        self.constants[found.place] = found
        self.arrays[found.place] = array
        return found

    def _read(self, value: Any) -> Any:
        if isinstance(value, tvm.ir.GenericConst):
            return self._constant(value.ty, value.value.numpy())
        if isinstance(value, relax.Tuple):
            return tuple(self._read(one) for one in value.fields)
        if isinstance(value, relax.TupleGetItem):
            return self._read(value.tuple_value)[value.index]
        if value in self.tensors:
            return self.tensors[value]
        if expressions.is_size(value):
            return self._known((value,))[0]
        raise Unsupported(f"`{value}` is not a call of one kernel")

    def _held(self, given: Tensor, kind: Any) -> Tensor:
        """A tensor whose sizes are held to others when the model runs."""
        held = _typed(given.place, kind)
        self.checks += [(a, b) for a, b in zip(given.shape, self._known(held.shape), strict=True) if not a.same_as(b)]
        return held

    def _known(self, sizes: tuple[Any, ...]) -> tuple[Any, ...]:
        for size in sizes:
            for variable in expressions.variables(size):
                if variable not in self.symbols:
                    raise Unsupported(f"the size `{variable}` depends on data")
        return sizes


def _typed(place: Place, kind: Any) -> Tensor:
    if not isinstance(kind, relax.TensorType) or not isinstance(kind.shape, relax.ShapeExpr):
        raise Unsupported("a value is no tensor of a known shape")
    return Tensor(place, tuple(kind.shape.values), str(kind.dtype))


def _into_outputs(steps: Sequence[Step], results: Sequence[Tensor]) -> tuple[list[Step], tuple[Tensor, ...]]:
    """The steps with results written where the caller wants them; a copy where that place is taken."""
    places: dict[Place, Place] = {}
    copies = []
    outputs = tuple(replace(result, place=Place("output", index)) for index, result in enumerate(results))
    for result, output in zip(results, outputs, strict=True):
        if result.place.kind == "slot" and result.place not in places:
            places[result.place] = output.place
        else:
            copies.append(Step("", (result,), (output,)))
    return [step.moved(places) for step in [*steps, *copies]], outputs


def _numbered(steps: Sequence[Step]) -> tuple[list[Step], list[Place]]:
    """The steps with weights numbered as they are first read, and the place that each had before."""
    kept = dict.fromkeys(one.place for step in steps for one in step.tensors if one.place.kind == "weight")
    places = {place: Place("weight", index) for index, place in enumerate(kept)}
    return [step.moved(places) for step in steps], list(kept)


def _shared(steps: Sequence[Step]) -> tuple[list[Step], tuple[tuple[Tensor, ...], ...]]:
    """The steps with as few slots as "greedy by size" finds, and the tensors in each slot."""
    tensors: dict[Place, Tensor] = {}
    spans: dict[Place, tuple[int, int]] = {}
    for index, step in enumerate(steps):
        for one in step.tensors:
            if one.place.kind == "slot":
                tensors.setdefault(one.place, one)
                spans[one.place] = (spans.get(one.place, (index, 0))[0], index)
    slots: list[list[Place]] = []
    for place in sorted(tensors, key=lambda one: (-tensors[one].likely_bytes, one.index)):
        first, last = spans[place]
        free = [slot for slot in slots if all(spans[one][1] < first or last < spans[one][0] for one in slot)]
        if free:
            min(free, key=lambda slot: tensors[slot[0]].likely_bytes).append(place)
        else:
            slots.append([place])
    places = {place: Place("slot", index) for index, slot in enumerate(slots) for place in slot}
    return [step.moved(places) for step in steps], tuple(tuple(tensors[one] for one in slot) for slot in slots)
