"""The user's own metric: a function of all outputs and labels."""

from __future__ import annotations

import hashlib
import inspect
import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from burnish.frontends.functions import function_named, is_function
from burnish.ir.errors import InputError
from burnish.ir.samples import Sample

Metric = Callable[[list[dict[str, np.ndarray]], list[Any]], float]


class UserMeasure:
    """A metric of the user's, as a measure: of each sample its outputs and labels are kept.

    Attributes:
        name: how it was named.
        higher_is_better: the function's attribute of that name; True where it has none.
    """

    def __init__(self, name: str, function: Metric) -> None:
        self._own = uuid.uuid4().hex
        better = getattr(function, "higher_is_better", True)
        if not isinstance(better, bool):
            raise InputError(
                f"its attribute `higher_is_better` is {better!r}, not True or False", place=f"metric `{name}`"
            )
        self.name, self.higher_is_better, self._function = name, better, function

    @property
    def key(self) -> str:
        """The name and a hash of the module's source; one of its own where that does not tell all that it does."""
        plain = inspect.isfunction(self._function) and self._function.__closure__ is None
        module = inspect.getmodule(self._function) if plain else None
        try:
            source = inspect.getsource(module) if module is not None else None
        except (OSError, TypeError):
            source = None
        known = self._own if source is None else hashlib.sha256(source.encode()).hexdigest()
        return f"{self.name} | {known}"

    def partial(
        self, outputs: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray], sample: Sample
    ) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
        """The outputs and the labels, which cannot be changed: the function is asked about them several times."""
        return {name: _guarded(array) for name, array in outputs.items()}, _guarded(sample.labels)

    def value(self, partials: Sequence[Any]) -> float:
        """What the function makes of them.

        Raises:
            InputError: it raises, or what it returns is not one finite number.
        """
        place = f"metric `{self.name}`"
        if not partials:
            raise InputError("there are no samples to measure", place=place)
        labels = [label for _, label in partials]
        try:
            found = self._function([dict(outputs) for outputs, _ in partials], labels)
        except (Exception, SystemExit) as error:
            hint = "it is given two lists with an entry for each sample: its outputs by name, and its labels"
            if any(x is None for x in labels):
                hint = "some samples have no labels, for which it is given None"
            if "read-only" in str(error):
                hint = "copy an array before you change it"
            raise InputError(f"the function failed: {type(error).__name__}: {error}", place=place, hint=hint) from error
        return _number(found, place)


def _guarded(array: Any) -> Any:
    """An array that cannot be written to, over the same numbers; anything else as it is."""
    if not isinstance(array, np.ndarray):
        return array
    view = array.view()
    view.flags.writeable = False
    return view


def _number(found: object, place: str) -> float:
    """A result as a float: of Python or NumPy, with no axis or one element, whole or not."""
    hint = "return one number for all samples"
    array = np.asarray(found) if isinstance(found, (bool, int, float, np.generic, np.ndarray)) else None
    if array is None or array.dtype.kind not in "fiubV" or array.size != 1:
        shape = f" of shape {list(array.shape)}" if array is not None and array.size != 1 else ""
        raise InputError(f"the function returned {type(found).__name__}{shape}, not a number", place=place, hint=hint)
    try:
        number = float(array.reshape(-1)[0])
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"the function returned no number: {error}", place=place, hint=hint) from error
    if not math.isfinite(number):
        raise InputError(
            f"the function returned {number}", place=place, hint="is there a division by zero, or a logarithm?"
        )
    return number


def user_measure(metric: str | Metric) -> UserMeasure:
    """The measure of a function, or of the function that `package.module:function` names.

    The function takes a list of the outputs by name of each sample, in order, and a list of their labels (None where a
    sample has none), and returns one number. It is also asked about some of the samples alone, for the error of the
    measurement. All outputs are in memory at once.

    Raises:
        InputError: it cannot be imported, or is no function.
    """
    if isinstance(metric, str):
        if not is_function(metric):
            raise InputError(f"`{metric}` is no name of a function", hint="name it as `package.module:function`")
        return UserMeasure(metric, function_named(metric))
    if not callable(metric):
        raise InputError(f"a {type(metric).__name__} is no metric", hint="give a function of outputs and labels")
    return UserMeasure(getattr(metric, "__name__", type(metric).__name__), metric)
