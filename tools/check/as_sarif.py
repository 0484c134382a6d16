"""What `check` found as SARIF 2.1.0 (OASIS, 2020): a rule for each field, a result for each difference."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import burnish
from burnish.tools.check import said
from burnish.tools.check.difference import Difference, Field, Report, Verdict
from burnish.tools.check.pointed import in_repository, line
from burnish.tools.terminal import printable

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"

RULES = {
    Field.INPUTS: "Names, order, types and dimensions of the inputs",
    Field.OUTPUTS: "Names, order, types and dimensions of the outputs",
    Field.OPSETS: "Versions of the operator sets",
    Field.STRUCTURE: "Nodes, their attributes and how they hang together, by block",
    Field.OPERATORS: "Nodes by operator",
    Field.VIEWS: "Blocks, attention, caches, layers and norms",
    Field.NODES: "The number of nodes",
    Field.PARAMETERS: "The number of parameters",
    Field.BYTES: "Bytes of the constants by dtype",
    Field.MULTIPLY_ADDS: "Multiply-adds of one run",
    Field.PEAK_ACTIVATION: "Bytes of the activations that live at once",
    Field.WEIGHTS: "The weights, by layer",
    Field.VALUES: "The outputs on samples",
    Field.METRIC: "The metric on samples",
    Field.PASSES: "What the passes of the default recipe find to rewrite",
    Field.LATENCY: "Time of a run over the time of a reference product",
}
_LEVELS = {Verdict.REGRESSION: "error", Verdict.TOLERATED: "note", Verdict.NOTE: "note"}


def document(reports: Sequence[Report], failed: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The log, in plain types.

    A result stands at the line of the lock file that it contradicts, and names the model as the target of the analysis
    and the part of it as a logical location. What a tolerance allows is a suppressed result.

    Args:
        reports: one for each model.
        failed: models that could not be checked, with the reason: notifications of the invocation.
    """
    unchecked = [
        {
            "level": "error",
            "message": {"text": printable(reason)},
            "locations": [{"physicalLocation": {"artifactLocation": _artifact(name)}}],
        }
        for name, reason in (failed or {}).items()
    ]
    driver = {
        "name": "burnish check",
        "semanticVersion": burnish.__version__,
        "rules": [
            {"id": one.value, "shortDescription": {"text": RULES[one]}, "defaultConfiguration": {"level": "error"}}
            for one in Field
        ],
    }
    run = {
        "tool": {"driver": driver},
        "invocations": [{"executionSuccessful": not unchecked, "toolExecutionNotifications": unchecked}],
        "columnKind": "unicodeCodePoints",
        "results": [_result(report, one) for report in reports for one in report.differences],
    }
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}


def _result(report: Report, one: Difference) -> dict[str, Any]:
    shown = said.arrow(one)
    found: dict[str, Any] = {
        "ruleId": one.field.value,
        "ruleIndex": list(Field).index(one.field),
        "level": _LEVELS[one.verdict],
        "message": {"text": _plain(f"{said.told(one)} ({shown})" if shown else said.told(one))},
        "analysisTarget": _artifact(report.model),
        "locations": [_location(report, one)],
        "partialFingerprints": {"burnishCheck/v1": _fingerprint(report, one)},
    }
    if one.verdict is Verdict.TOLERATED:
        found["suppressions"] = [{"kind": "external", "justification": "within tolerance"}]
    return found


def _location(report: Report, one: Difference) -> dict[str, Any]:
    where = line(report, one)
    physical: dict[str, Any] = {"artifactLocation": _artifact(report.model if where is None else report.lock)}
    if where is not None:
        physical["region"] = {"startLine": where}
    found: dict[str, Any] = {"physicalLocation": physical}
    if one.place:
        found["logicalLocations"] = [{"fullyQualifiedName": printable(one.place)}]
    return found


def _artifact(path: str) -> dict[str, str]:
    shown = in_repository(path)
    quoted = quote(shown.encode(errors="surrogatepass"))
    return {"uri": f"file://{quoted}"} if shown.startswith("/") else {"uri": quoted, "uriBaseId": "%SRCROOT%"}


def _plain(text: str) -> str:
    """Text in which no link (`[text](1)`) and no placeholder (`{0}`) is read (SARIF 2.1.0, 3.11.5 and 3.11.6)."""
    return re.sub(r"\{(\d+)\}", r"{{\1}}", text.replace("](", "] ("))


def _fingerprint(report: Report, one: Difference) -> str:
    """What makes two results the same finding in two runs: the model, the field and the place; not the numbers."""
    identity = repr((report.model, one.field.value, one.place, one.key))
    return hashlib.blake2b(identity.encode(errors="backslashreplace"), digest_size=8).hexdigest()
