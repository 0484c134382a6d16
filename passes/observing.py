"""Reduce what passes through values of a model: everything about it but the computing."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from typing import Any

import numpy as np
import onnx_ir as oir

from burnish.ir.errors import InputError
from burnish.ir.samples import Sample
from burnish.passes import sites as places
from burnish.passes.book import Book
from burnish.passes.reducers import Reducer
from burnish.passes.sites import LIMIT, Keep, Site

Take = Callable[[oir.Value, Any], None]
"""Is given each value that is computed, which it neither changes nor keeps."""

Run = Callable[[Mapping[str, np.ndarray], Take], None]
"""Computes values of a model from its inputs."""

Load = Callable[[list[oir.Value]], AbstractContextManager[Run]]
"""Gets ready to compute the given values of a model; what that holds is freed when the context ends."""


def observe(
    model: oir.Model,
    load: Load,
    sites: Mapping[str, Site],
    reducers: Reducer | Mapping[str, Reducer],
    samples: Iterable[Sample],
    limit: int | None = LIMIT,
    book: Book | None = None,
) -> dict[str, Reducer]:
    """`Observer.observe` for a model whose values `load` computes; same arguments, result and errors.

    Without a limit all values are computed in one run: for a `load` that holds only one of them at a time. Runs over a
    sequence are noted in `book`, and go on from where those before them were killed.
    """
    wanted = _Wanted(model, sites, reducers)
    if iter(samples) is samples:
        raise InputError(
            "the samples can be read only once, and a model may be run several times over them",
            hint="give a list, or an object whose `__iter__` starts anew",
        )
    first = next(iter(samples), None)
    if first is None:
        raise InputError("there are no samples to observe the model on")
    for value in wanted.stored:
        wanted.add(value, np.asarray(places.stored(value)), first)
    others = [value for value in wanted.by_value if value not in wanted.stored]
    for value in [value for value in others if value.producer() is None]:
        for sample in samples:
            wanted.add(value, _given(value, sample), sample)
    computed = [value for value in others if value.producer() is not None]
    parts = [computed] if limit is None else places.groups(model, computed, samples, limit)
    for group in filter(None, parts):
        page = None
        if book is not None and isinstance(samples, Sequence):
            page = book.page(model, samples, wanted.of(group))
            if page.start == len(samples):
                continue
        with load(group) as run:
            start = 0 if page is None else page.start
            for number, sample in enumerate(islice(samples, start, None), start + 1):
                _compute(run, sample, wanted)
                if page is not None:
                    page.seen(number)
    return wanted.results()


def _compute(run: Run, sample: Sample, wanted: _Wanted) -> None:
    """Reduce the values of one sample; what the model says when it refuses it gets the sample's name."""
    try:
        run(sample.feeds, lambda value, array: wanted.add(value, array, sample))
    except InputError as error:
        if error.place is not None and error.place.startswith("value `"):
            raise
        raise InputError(error.cause, place=f"sample `{sample.name}`", hint=error.hint) from error


def _given(value: oir.Value, sample: Sample) -> np.ndarray:
    array = sample.feeds.get(str(value.name))
    if array is None and value.const_value is not None:
        array = value.const_value.numpy()
    if array is None:
        raise InputError(f"input `{value.name}` is missing", place=f"sample `{sample.name}`")
    return array


class _Wanted:
    """What is reduced of each value: one reducer for all sites that ask for the same."""

    def __init__(self, model: oir.Model, sites: Mapping[str, Site], reducers: Reducer | Mapping[str, Reducer]) -> None:
        self._found: dict[str, Reducer] = {}
        self.by_value: dict[oir.Value, dict[tuple[Keep | None, str], Reducer]] = {}
        for name, site in sites.items():
            why = places.refusal(model, site.value)
            if why is not None:
                raise InputError(f"it cannot be observed: {why}", place=f"site `{name}`, value `{site.value.name}`")
            reducer = reducers if isinstance(reducers, Reducer) else reducers.get(name)
            if reducer is None:
                raise InputError("there is no reducer for it", place=f"site `{name}`")
            held = self.by_value.setdefault(site.value, {})
            self._found[name] = held.setdefault((site.keep, reducer.options), reducer.fresh())
        self.stored = [value for value in self.by_value if places.stored(value) is not None]

    def of(self, values: Iterable[oir.Value]) -> dict[str, Reducer]:
        """The reducers of values, under keys that name them."""
        return {
            f"{value.name} {keep} {options}": reducer
            for value in values
            for (keep, options), reducer in self.by_value[value].items()
        }

    def results(self) -> dict[str, Reducer]:
        """A reducer for each site; those that saw the same share memory, but may be merged and go on apart."""
        seen: set[int] = set()
        found = {}
        for name, reducer in self._found.items():
            found[name] = reducer.twin() if id(reducer) in seen else reducer
            seen.add(id(reducer))
        return found

    def add(self, value: oir.Value, array: Any, sample: Sample) -> None:
        """Reduce one array of a value."""
        if not isinstance(array, np.ndarray):
            raise InputError("it is no tensor", place=f"value `{value.name}`")
        for (keep, _), reducer in self.by_value[value].items():
            try:
                reducer.add(array, None if keep is None else keep.of(sample.feeds, array))
            except InputError as error:
                place = f"value `{value.name}`, sample `{sample.name}`"
                raise InputError(error.cause, place=place, hint=error.hint) from error


def value_named(model: oir.Model, name: str) -> oir.Value:
    """The value of the main graph that is called so.

    Raises:
        InputError: there is none, or it is in a nested graph only.
    """
    graph = model.graph
    everything = [*graph.inputs, *graph.initializers.values(), *(out for node in graph for out in node.outputs)]
    named = {str(value.name): value for value in everything}
    if name in named:
        return named[name]
    nested = {str(out.name) for node in graph.all_nodes() for out in node.outputs}
    if name in nested:
        raise InputError("it is inside a sub-graph, where it cannot be observed", place=f"value `{name}`")
    close = difflib.get_close_matches(name, named, 1)
    raise InputError(
        "the model has no such value", place=f"`{name}`", hint=f"did you mean `{close[0]}`?" if close else None
    )
