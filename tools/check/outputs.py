"""Outputs of a model as the few numbers that a lock keeps of them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from burnish.ir.samples import Sample
from burnish.tools.check.lock import SKETCH, OutputLock, SampleLock
from burnish.tools.check.padding import Padding
from burnish.tools.check.sketch import are_numbers, rounded, sketch

ALONE = 8
"""Samples whose outputs are told one by one; those of all others are told together."""

_DIGITS = 5


def fingerprint(samples: Sequence[Sample]) -> str:
    """A hash of names, dtypes, shapes and bytes of all inputs of all samples, 16 hexadecimal digits."""
    state = hashlib.blake2b(digest_size=8)
    for sample in samples:
        for name, array in sorted(sample.feeds.items()):
            state.update(f"{name} {array.dtype} {array.shape}\n".encode(errors="surrogatepass"))
            state.update(_bytes(array))
    return state.hexdigest()


@dataclass
class Values:
    """The outputs on samples, added one after the other."""

    found: list[tuple[str, dict[str, _Told]]] = field(default_factory=list)
    rest: dict[str, _Told] = field(default_factory=dict)
    more: int = 0

    def add(
        self,
        sample: str,
        outputs: Mapping[str, object],
        padding: Padding | None = None,
        again: Mapping[str, object] | None = None,
    ) -> None:
        """Take the outputs on a sample; they are not kept.

        Args:
            sample: its name.
            outputs: by name.
            padding: what does not count of them.
            again: those of a second run, for a model that draws random numbers.
        """
        if len(self.found) < ALONE:
            told = {name: _Told() for name in outputs}
            self.found.append((sample, told))
        else:
            self.more += 1
            told = self.rest
        for name, output in outputs.items():
            one = told.setdefault(name, _Told())
            one.add(output, padding)
            one.wavers |= again is not None and not _equal(output, again[name])

    def locks(self) -> list[SampleLock]:
        """What is kept, sample by sample; samples beyond the first `ALONE` are one entry."""
        entries = [*self.found, (f"{self.more} further samples", self.rest)] if self.more else self.found
        names: dict[str, int] = {}
        made = []
        for name, told in entries:
            names[name] = names.get(name, 0) + 1
            shown = name if names[name] == 1 else f"{name} ({names[name]})"
            made.append(SampleLock(sample=shown, outputs={one: part.lock() for one, part in told.items()}))
        return made


class _Told:
    """One output, on one sample or on several that count as one long vector."""

    def __init__(self) -> None:
        self.types: list[str] = []
        self.count = self.finite = 0
        self.sum = self.squares = 0.0
        self.low, self.high = math.inf, -math.inf
        self.sketch = np.zeros(SKETCH)
        self.hash = hashlib.blake2b(digest_size=8)
        self.hashed = self.sketched = self.wavers = False

    def add(self, output: object, padding: Padding | None) -> None:
        self.types.append(_type(output))
        for array in _leaves(output):
            if padding is None:
                self._add(array, None)
            else:
                self._add(padding.without(array), padding.counted(array.shape))

    def _add(self, array: np.ndarray, counted: np.ndarray | None) -> None:
        turn, self.count = self.count, self.count + 1
        if array.dtype.kind != "f" and not _narrow(array):
            self.hash.update(f"{array.dtype.kind} {array.shape}\n".encode() + _bytes(array))
            self.hashed = True
        if not are_numbers(array):
            return
        self.sketched = True
        self.sketch += sketch(array, turn)
        flat = np.stack([array.real, array.imag]) if array.dtype.kind == "c" else array
        wide = np.asarray(flat, np.float64)
        wanted = np.isfinite(wide) if counted is None else np.isfinite(wide) & counted
        good = wide.reshape(-1) if wanted.all() else wide[wanted]
        if good.size:
            self.finite += good.size
            self.low, self.high = min(self.low, float(good.min())), max(self.high, float(good.max()))
            with np.errstate(over="ignore"):
                self.sum += float(good.sum())
                self.squares += float(np.dot(good, good))

    def lock(self) -> OutputLock:
        """What is kept, without the digits that differ between machines."""
        code = self.hash.hexdigest() if self.hashed else ""
        kind = _together(self.types)
        if self.wavers:
            return OutputLock(type=kind)
        if not self.sketched or not self.finite:
            return OutputLock(type=kind, sketch=(0.0,) * SKETCH if self.sketched else (), hash=code)
        largest = max(abs(self.low), abs(self.high))
        mean = self.sum / self.finite if math.isfinite(self.sum) else (self.low + self.high) / 2
        spread = self.squares / self.finite - mean * mean
        std = math.sqrt(max(spread, 0.0)) if math.isfinite(spread) else largest
        size = math.hypot(*self.sketch.tolist()) / math.sqrt(SKETCH)
        return OutputLock(
            type=kind,
            mean=rounded(mean, largest, _DIGITS),
            std=rounded(std, largest, _DIGITS),
            low=rounded(self.low, largest, _DIGITS),
            high=rounded(self.high, largest, _DIGITS),
            finite=self.finite,
            sketch=tuple(rounded(one, size, _DIGITS + 1) for one in self.sketch.tolist()),
            hash=code,
        )


def _narrow(array: np.ndarray) -> bool:
    """Whether an array has a floating-point dtype that NumPy does not know by itself, such as bfloat16."""
    return array.dtype.kind == "V" and "float" in array.dtype.name


def _equal(output: object, other: object) -> bool:
    pairs = zip(_leaves(output), _leaves(other), strict=True)
    return _type(output) == _type(other) and all(_bytes(one) == _bytes(two) for one, two in pairs)


def _leaves(output: object) -> Iterator[np.ndarray]:
    """The arrays in an output: itself, those of a sequence, the values of a map."""
    if isinstance(output, Mapping):
        for key in sorted(output, key=str):
            yield np.asarray(output[key])
    elif isinstance(output, list | tuple):
        for part in output:
            yield from _leaves(part)
    elif output is not None:
        yield np.asarray(output)


def _type(output: object) -> str:
    if output is None:
        return "absent"
    if isinstance(output, Mapping):
        return f"map({len(output)})"
    if isinstance(output, list | tuple):
        kinds = list(dict.fromkeys(map(_type, output)))
        return f"seq({', '.join(kinds[:3])}{', ...' if len(kinds) > 3 else ''})[{len(output)}]"
    array = np.asarray(output)
    return f"{_DTYPES.get(array.dtype.name, array.dtype.name)}[{','.join(map(str, array.shape))}]"


_DTYPES = {"float32": "float", "float64": "double", "object": "string"}


def _together(types: list[str]) -> str:
    """One type for several: sizes that differ are shown as `?`."""
    kinds = list(dict.fromkeys(types))
    if len(kinds) == 1:
        return kinds[0]
    parts = [kind.rstrip("]").partition("[") for kind in kinds]
    shapes = [shape.split(",") for _, _, shape in parts]
    if len({(dtype, len(shape)) for (dtype, _, _), shape in zip(parts, shapes, strict=True)}) > 1:
        return ", ".join(sorted(kinds)[:3]) + (", ..." if len(kinds) > 3 else "")
    sizes = [axis[0] if len(set(axis)) == 1 else "?" for axis in zip(*shapes, strict=True)]
    return f"{parts[0][0]}[{','.join(sizes)}]"


def _bytes(array: np.ndarray) -> bytes:
    """What an array holds; a hash is taken of it."""
    if array.dtype.kind in "OSU":
        return repr([one.decode(errors="backslashreplace") if isinstance(one, bytes) else str(one)
                     for one in array.reshape(-1).tolist()]).encode(errors="backslashreplace")  # fmt: skip
    return np.ascontiguousarray(array).tobytes()
