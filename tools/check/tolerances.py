"""What may differ: tolerances by field, from a YAML file. Every mistake is shown with its line."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from burnish.ir.errors import InputError
from burnish.passes.budget import Amount
from burnish.passes.catalog import nearest
from burnish.passes.verify import ROUNDING
from burnish.passes.yaml_document import Document
from burnish.tools.check.difference import Field, Verdict

LATENCY = Amount(0.15, relative=True)
"""Growth of the latency that counts as none, unless said otherwise."""

OTHER_MACHINES = 10.0
"""Times the rounding of a dtype that outputs may move on another CPU or with another runtime."""

RESOLUTION = 2e-5
"""Distance below which sketches in a lock file say nothing."""

_DTYPES = {"float": "float32", "double": "float64"}
_NUMBER = re.compile(r"((?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?)\s*(%?)", re.IGNORECASE)
_MOST = 1 << 20

GROWTH = frozenset(
    (
        Field.NODES,
        Field.PARAMETERS,
        Field.BYTES,
        Field.MULTIPLY_ADDS,
        Field.PEAK_ACTIVATION,
        Field.LATENCY,
    )
)
"""Fields that take an amount of growth."""

_DISTANCES = frozenset((Field.VALUES, Field.WEIGHTS))
_AMOUNTS = GROWTH | _DISTANCES | {Field.METRIC}


class Word(StrEnum):
    """What is allowed where it is no amount."""

    EXACT = "exact"
    IGNORE = "ignore"
    RISE = "rise"


Allowed = Word | Amount


@dataclass(frozen=True)
class Tolerances:
    """What may differ.

    Attributes:
        fields: by field, as far as given. Without it everything is exact but values (`OTHER_MACHINES` times the
            rounding of their dtype) and latency (`LATENCY`).
        outputs: of values, by the name of the output.
    """

    fields: Mapping[Field, Allowed] = field(default_factory=dict)
    outputs: Mapping[str, Allowed] = field(default_factory=dict)

    def of(self, what: Field) -> Allowed:
        """What is allowed of a field; exact where nothing is said."""
        return self.fields.get(what, LATENCY if what is Field.LATENCY else Word.EXACT)

    def is_given(self, what: Field) -> bool:
        """Whether somebody wrote it down."""
        return what in self.fields or (what is Field.VALUES and bool(self.outputs))

    def verdict(self, what: Field) -> Verdict:
        """Of a difference in a field that has no amount."""
        return Verdict.TOLERATED if self.of(what) is Word.IGNORE else Verdict.REGRESSION

    def opsets(self, old: int, new: int) -> Verdict:
        """Of the version of a domain that differs; 0 for none."""
        allowed = self.of(Field.OPSETS)
        rises = allowed is Word.RISE and new > old > 0
        return Verdict.TOLERATED if allowed is Word.IGNORE or rises else Verdict.REGRESSION

    def grows(self, what: Field, old: float, new: float) -> Verdict:
        """Of a count that is larger now."""
        return _within(self.of(what), new - old, old)

    def drops(self, drop: float, old: float) -> Verdict:
        """Of a metric that got worse by `drop`."""
        return _within(self.of(Field.METRIC), drop, old)

    def weights(self, distance: float) -> Verdict:
        """Of weights that moved by so much of their norm."""
        return _within(self.of(Field.WEIGHTS), distance, 1.0)

    def values(self, output: str, dtype: str, distance: float) -> Verdict | None:
        """Of an output that moved by so much of its size; None for what rounding explains.

        Args:
            output: its name.
            dtype: as `burnish.ir.text` has it: `float`, `float16`.
            distance: relative, infinite for what has no size.
        """
        chance = OTHER_MACHINES * rounding(dtype)
        allowed = self.outputs.get(output, self.fields.get(Field.VALUES))
        if distance <= max(0.0 if allowed is Word.EXACT else chance, RESOLUTION):
            return None
        return _within(allowed or Word.EXACT, distance, 1.0)


def rounding(dtype: str) -> float:
    """The relative error that rounding may cause in an output of a dtype as `burnish.ir.text` has it."""
    return ROUNDING.get(_DTYPES.get(dtype, dtype), 0.0)


def _within(allowed: Allowed, change: float, old: float) -> Verdict:
    if isinstance(allowed, Amount):
        fine = change <= allowed.of(old) * (1 + 1e-12)
    else:
        fine = allowed is Word.IGNORE
    return Verdict.TOLERATED if fine else Verdict.REGRESSION


def read(path: str | Path) -> Tolerances:
    """Read and validate a tolerance file.

    Raises:
        InputError: for anything unreadable, unknown or of the wrong form, with the line.
    """
    try:
        size = Path(path).stat().st_size
        if size > _MOST:
            raise InputError(f"the tolerance file has {size:,} bytes", place=str(path), hint="check the path")
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"cannot read the tolerances: {error.strerror}", place=str(path), hint="check the path"
        ) from None
    except UnicodeDecodeError:
        raise InputError("the tolerance file is not text", place=str(path), hint="it is a YAML file in UTF-8") from None
    return _Reader(str(path), text).tolerances()


class _Reader(Document):
    def tolerances(self) -> Tolerances:
        import yaml

        root = self.root("write `values: 1e-3`")
        if root is None:
            return Tolerances()
        fields: dict[Field, Allowed] = {}
        outputs: dict[str, Allowed] = {}
        for name, key, value in self._pairs(root, "the file"):
            if name not in list(Field):
                raise self.fail(key, f"there is nothing called `{name}` to tolerate", nearest(name, list(Field)))
            what = Field(name)
            if what is Field.VALUES and isinstance(value, yaml.MappingNode):
                outputs = {output: self._allowed(what, one) for output, _, one in self._pairs(value, "`values`")}
            else:
                fields[what] = self._allowed(what, value)
        return Tolerances(fields, outputs)

    def _pairs(self, node: Any, what: str) -> list[tuple[str, Any, Any]]:
        import yaml

        if not isinstance(node, yaml.MappingNode):
            raise self.fail(node, f"{what} is a mapping", "write `NAME: AMOUNT`, each on a line of its own")
        found: dict[str, tuple[str, Any, Any]] = {}
        for key, value in node.value:
            name = str(key.value)
            if not isinstance(key, yaml.ScalarNode):
                raise self.fail(key, "this is no name", "write `NAME: AMOUNT`")
            if name in found:
                raise self.fail(key, f"`{name}` is given twice", "leave one of them out")
            found[name] = (name, key, value)
        return list(found.values())

    def _allowed(self, what: Field, node: Any) -> Allowed:
        import yaml

        words = [Word.EXACT, Word.IGNORE, *([Word.RISE] if what is Field.OPSETS else [])]
        hint = f"write {' or '.join(f'`{what}: {word}`' for word in words)}"
        if what in _AMOUNTS:
            hint += f", or an amount: `{what}: {'1e-3' if what in _DISTANCES else '5%'}`"
        text = str(node.value) if isinstance(node, yaml.ScalarNode) else ""
        if text in words:
            return Word(text)
        number = _NUMBER.fullmatch(text.strip())
        if number is None or what not in _AMOUNTS:
            shown = f"`{text}`" if text else "this"
            raise self.fail(node, f"{shown} is no tolerance of `{what}`", hint)
        value = float(number[1])
        if not math.isfinite(value):
            raise self.fail(node, f"`{text}` is no tolerance of `{what}`", hint)
        return Amount(value / 100, relative=True) if number[2] else Amount(value, relative=False)
