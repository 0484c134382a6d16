"""Runs edited models, and of each only what its edit changed.

The original is cut into sections (`burnish.passes.sections`), each loaded once, and what passes between them is kept
for every sample. An edited model is cut in the same way. A section of it that the original has as well is run by what
was loaded for that, and one whose whole history is the original's is not run at all.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as oir

from burnish.ir.errors import InputError
from burnish.ir.samples import Sample
from burnish.ir.views.blocks import stacks
from burnish.passes.lossy import Mixed, mixed, port
from burnish.passes.protocols import Executor, Runner
from burnish.passes.sections import Section, cut, places
from burnish.passes.shelf import Shelf

Past = Hashable
"""Where a value comes from, equal for values that are equal on every sample."""


@dataclass(frozen=True, eq=False)
class Step:
    """A section to run.

    Attributes:
        section: the section.
        inputs: where its inputs come from.
        outputs: of its outputs, those that are needed: number and what they are.
        done: values that are not needed any more afterwards.
    """

    section: Section
    inputs: tuple[Past, ...]
    outputs: Mapping[int, Past]
    done: tuple[Past, ...]


@dataclass(frozen=True, eq=False)
class Route:
    """How to compute the outputs of a model.

    Attributes:
        model: the model.
        steps: the sections to run, in order.
        outputs: where each output comes from, by the name that it has in the original.
        mixed: what makes an output one of the original's sizes, where it has others.
    """

    model: oir.Model
    steps: tuple[Step, ...]
    outputs: Mapping[str, Past]
    mixed: Mapping[str, Mixed]


@dataclass(frozen=True, eq=False)
class _Loaded:
    """A section in a session; `outputs` are the numbers of what it gives, in order."""

    runner: Runner
    inputs: tuple[str, ...]
    outputs: tuple[int, ...]


class Rerun:
    """The original and what it computes on samples, for running edited copies of it.

    Args:
        model: the original, in normal form; not to be changed as long as this is used.
        samples: what models are run on.
        execute: makes runners.
        memory: bytes of values of the original that are kept in memory; the rest goes to a temporary file.
    """

    def __init__(self, model: oir.Model, samples: Sequence[Sample], execute: Executor, memory: int) -> None:
        self.model, self.samples, self.execute = model, samples, execute
        self._known = places(model, stacks(model))
        self._shelf = Shelf(memory)
        self._loaded: dict[Hashable, list[_Loaded]] = {}
        self._numbers: dict[Hashable, int] = {}
        self._kept: set[Past] = set()
        self.whole = self._route(model, everything=True)

    def prepare(self, on_step: Callable[[int, int], None] = lambda number, total: None) -> None:
        """Run the original on all samples and keep what passes between its sections.

        Raises:
            InputError: the model cannot be loaded or refuses a sample.
        """
        self._kept = {past for step in self.whole.steps for past in step.outputs.values()}
        for number, sample in enumerate(self.samples):
            on_step(number, len(self.samples))
            try:
                for past, array in self._run(self.whole, number, self._loaded, {}).items():
                    if isinstance(array, np.ndarray):
                        array.flags.writeable = False
                    self._shelf.put((past, number), array)
            except InputError as error:
                raise InputError(error.cause, place=f"sample `{sample.name}`", hint=error.hint) from error

    def value(self, past: Past, number: int) -> Any:
        """A value of the original on a sample; not to be changed."""
        return self._value(past, number, {})

    def original(self, number: int) -> dict[str, Any]:
        """What the original computes on a sample, by the names of its outputs; not to be changed."""
        return {name: self.value(past, number) for name, past in self.whole.outputs.items()}

    def route(self, edited: oir.Model) -> Route:
        """How to compute an edited copy of the original, with what of it is known already.

        Args:
            edited: made by `burnish.passes.lossy.apply`; not to be changed as long as the route is used.
        """
        return self._route(edited, everything=False)

    @contextmanager
    def running(self, route: Route) -> Iterator[Callable[[int], dict[str, Any]]]:
        """A function that runs the model of a route on the sample of a number; it loads what is not loaded.

        It gives the outputs that the model still has, by the names that they have in the original.

        Raises:
            InputError: (the function) the model cannot be loaded or does not run.
        """
        own: dict[Hashable, list[_Loaded]] = {}

        def run(number: int) -> dict[str, Any]:
            held = self._run(route, number, own, self._loaded)
            found = {name: self._value(past, number, held) for name, past in route.outputs.items()}
            return found | {name: mix.of(found[name]) for name, mix in route.mixed.items()}

        try:
            yield run
        finally:
            _close(own)

    def close(self) -> None:
        """Free the sessions and what was kept."""
        _close(self._loaded)
        self._shelf.close()

    def _route(self, model: oir.Model, *, everything: bool) -> Route:
        sections = cut(model, self._known)
        own: dict[Hashable, int] = {}
        past: dict[oir.Value, Past] = {}
        inputs: list[tuple[Past, ...]] = []
        for section in sections:
            inputs.append(tuple(_past(value, past) for value in section.inputs))
            key = (section.key, inputs[-1])
            number = self._numbers.get(key)
            if number is None:
                number = own.setdefault(key, len(self._numbers) + len(own))
            past.update({value: (number, index) for value, index in section.outputs.items()})
        if everything:
            self._numbers.update(own)
        outputs = {port(value): _past(value, past) for value in model.graph.outputs}
        wanted = {one for one in outputs.values() if one not in self._kept}
        last = set(outputs.values())
        steps: list[Step] = []
        for section, sources in zip(reversed(sections), reversed(inputs), strict=True):
            given = {index: past[value] for value, index in section.outputs.items()}
            needed = {index: one for index, one in given.items() if everything or one in wanted}
            if not needed:
                continue
            wanted.update(one for one in sources if one not in self._kept)
            done = (
                ()
                if everything
                else tuple(one for one in dict.fromkeys((*sources, *needed.values())) if one not in last)
            )
            last.update(sources)
            steps.append(Step(section, sources, needed, done))
        mixes = {port(value): mix for value in model.graph.outputs if (mix := mixed(value)) is not None}
        return Route(model, tuple(reversed(steps)), outputs, mixes)

    def _run(
        self,
        route: Route,
        number: int,
        own: dict[Hashable, list[_Loaded]],
        shared: Mapping[Hashable, list[_Loaded]],
    ) -> dict[Past, Any]:
        held: dict[Past, Any] = {}
        for step in route.steps:
            arrays = [self._value(one, number, held) for one in step.inputs]
            loaded = _suiting(shared, step) or _suiting(own, step)
            if loaded is None:
                loaded = self._load(route.model, step.section, arrays)
                own.setdefault(step.section.key, []).append(loaded)
            found = loaded.runner.run(dict(zip(loaded.inputs, arrays, strict=True)))
            by_number = dict(zip(loaded.outputs, found.values(), strict=True))
            held.update({past: by_number[index] for index, past in step.outputs.items()})
            for past in step.done:
                held.pop(past, None)
        return held

    def _value(self, past: Past, number: int, held: Mapping[Past, Any]) -> Any:
        if past in held:
            return held[past]
        if past in self._kept:
            return self._shelf.get((past, number))
        assert isinstance(past, tuple)
        kind, what = past
        if kind == "constant":
            return what.numpy()
        name, default, mix = what
        if name in self.samples[number].feeds:
            array = self.samples[number].feeds[name]
            return array if mix is None else mix.of(array)
        if default is None:
            raise InputError(f"the sample has no input `{name}`")
        return default.numpy()

    def _load(self, model: oir.Model, section: Section, arrays: Sequence[Any]) -> _Loaded:
        part = section.model(model)
        for value, array in zip(part.graph.inputs, arrays, strict=True):
            if value.type is None and isinstance(array, np.ndarray):
                value.dtype = oir.DataType.from_numpy(array.dtype)
        names = tuple(str(value.name) for value in part.graph.inputs)
        return _Loaded(self.execute(part), names, tuple(section.outputs.values()))


def _close(loaded: dict[Hashable, list[_Loaded]]) -> None:
    for one in (one for found in loaded.values() for one in found):
        one.runner.close()
    loaded.clear()


def _past(value: oir.Value, past: Mapping[oir.Value, Past]) -> Past:
    """Where a value comes from; a value that no section computes is an input or a constant."""
    found = past.get(value)
    if found is None:
        given = ("input", (port(value), value.const_value, mixed(value)))
        found = given if value.is_graph_input() else ("constant", value.const_value)
    return found


def _suiting(loaded: Mapping[Hashable, list[_Loaded]], step: Step) -> _Loaded | None:
    """What computes the step and gives all that is needed of it."""
    return next((one for one in loaded.get(step.section.key, ()) if set(step.outputs) <= set(one.outputs)), None)
