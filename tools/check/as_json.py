"""What `check` found as a JSON document for programs. Its form has a version; fields are added without a new one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec

import burnish
from burnish.tools.check import said
from burnish.tools.check.difference import Difference, Report, Verdict
from burnish.tools.check.pointed import line
from burnish.tools.terminal import printable

VERSION = 1


def document(report: Report) -> dict[str, Any]:
    """All that a report says, in plain types.

    Returns:
        `version` of this form; `burnish`, the program's version; `model` and `lock`, paths; `verdict`: `fine` or
        `regression`; `sentence`; `counts` of differences by verdict; `differences`, each with `field`, `verdict`,
        `message`, `place`, `old`, `new` and `line` (of the lock file, from 1; None without one); `sizes`, `old` and
        `new`, as the lock file has them.
    """
    counts = {verdict.value: sum(one.verdict is verdict for one in report.differences) for verdict in Verdict}
    return {
        "version": VERSION,
        "burnish": burnish.__version__,
        "model": _valid(report.model),
        "lock": _valid(report.lock),
        "verdict": "fine" if report.passed else "regression",
        "sentence": said.sentence(report),
        "counts": counts,
        "differences": [_difference(report, one) for one in report.differences],
        "sizes": {"old": msgspec.to_builtins(report.old.sizes), "new": msgspec.to_builtins(report.new.sizes)},
    }


def failure(model: str, lock: str, reason: str) -> dict[str, Any]:
    """The document of a check that could not be made: `verdict` is `failed`, and there is a `reason`."""
    return {
        "version": VERSION,
        "burnish": burnish.__version__,
        "model": _valid(model),
        "lock": _valid(lock),
        "verdict": "failed",
        "sentence": printable(f"`{model}` could not be checked: {reason}"),
        "reason": _valid(reason),
    }


def text(found: Mapping[str, Any]) -> str:
    """A document as text in ASCII, a line break at its end."""
    return json.dumps(found, indent=2, allow_nan=False) + "\n"


def _difference(report: Report, one: Difference) -> dict[str, Any]:
    return {
        "field": one.field.value,
        "verdict": one.verdict.value,
        "message": _valid(one.message),
        "place": _valid(one.place),
        "old": _valid(one.old),
        "new": _valid(one.new),
        "line": line(report, one),
    }


def _valid(text: str) -> str:
    """Text with lone surrogates, which JSON has no word for, written out."""
    return text.encode(errors="backslashreplace").decode()
