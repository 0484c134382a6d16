"""What `check` found as JUnit XML: a suite for each model, a test for each field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from xml.etree import ElementTree as ET

from burnish.tools.check import said
from burnish.tools.check.difference import Difference, Field, Report, Verdict
from burnish.tools.check.pointed import in_repository, line
from burnish.tools.terminal import printable


def text(reports: Sequence[Report], failed: Mapping[str, str] | None = None) -> str:
    """The document, in UTF-8 when written.

    A test fails with what regressed, and has notes and what is tolerated as its output. It is skipped where the lock
    holds nothing to compare.

    Args:
        reports: one for each model.
        failed: models that could not be checked, with the reason.
    """
    root = ET.Element("testsuites", name="burnish check")
    for report in reports:
        _suite(root, report)
    for name, reason in (failed or {}).items():
        suite = _counted(root, name, tests=1, errors=1)
        case = ET.SubElement(suite, "testcase", name="check", classname=printable(name))
        ET.SubElement(case, "error", message=printable(reason), type="error")
    for counted in ("tests", "failures", "errors", "skipped"):
        root.set(counted, str(sum(int(suite.get(counted, 0)) for suite in root)))
    ET.indent(root)
    return "<?xml version='1.0' encoding='utf-8'?>\n" + ET.tostring(root, encoding="unicode") + "\n"


def _suite(root: ET.Element, report: Report) -> None:
    skipped = {one: why for one in Field if not _of(report, one) and (why := _uncompared(report, one))}
    bad = {one.field for one in report.regressions}
    suite = _counted(root, report.model, tests=len(Field), failures=len(bad), skipped=len(skipped))
    for one in Field:
        case = ET.SubElement(suite, "testcase", name=one.value, classname=printable(report.model))
        found = _of(report, one)
        regressions = [each for each in found if each.verdict is Verdict.REGRESSION]
        if regressions:
            message = "; ".join(map(said.told, regressions))
            failure = ET.SubElement(case, "failure", message=message, type="regression")
            failure.text = "\n".join(_lines(report, regressions))
        if one in skipped:
            ET.SubElement(case, "skipped", message=skipped[one])
        if others := [each for each in found if each.verdict is not Verdict.REGRESSION]:
            ET.SubElement(case, "system-out").text = "\n".join(said.listed(others))


def _counted(root: ET.Element, name: str, **counts: int) -> ET.Element:
    told = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0} | counts
    attributes = {"name": printable(name)} | {key: str(number) for key, number in told.items()}
    return ET.SubElement(root, "testsuite", attributes)


def _of(report: Report, field: Field) -> list[Difference]:
    return [one for one in report.differences if one.field is field]


def _lines(report: Report, found: list[Difference]) -> list[str]:
    lines = list(said.listed(found))
    where = line(report, found[0])
    return lines if where is None else [*lines, f"at {printable(in_repository(report.lock))}:{where}"]


def _uncompared(report: Report, field: Field) -> str:
    """Why a field was not compared; empty when it was."""
    old = report.old
    if field is Field.VALUES and not old.values:
        return "the lock holds no outputs"
    if field is Field.METRIC and old.metric is None:
        return "the lock holds no metric"
    return "the lock holds no latency" if field is Field.LATENCY and old.latency is None else ""
