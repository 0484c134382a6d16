"""The table of operators beside the schemas of the onnx package."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from typing import Any

import onnx

from burnish.backends.fx import operators, registry

OLDEST = 9
"""Models of older opsets are not read."""
LEFT_OUT = {"Constant": {"sparse_value", "value_string", "value_strings"}}
"""Attributes for which a node is refused."""
SAME = ({"linear", "bilinear"},)
"""Words that mean the same."""


def schemas() -> Iterator[tuple[Any, registry.Operator]]:
    """Every schema that models of these opsets can use, with the entry that is taken for it."""
    assert operators
    known = [s for s in onnx.defs.get_all_schemas_with_history() if s.domain in ("", "ai.onnx.ml") and not s.deprecated]
    for schema in known:
        versions = [s.since_version for s in known if (s.domain, s.name) == (schema.domain, schema.name)]
        last = min((v - 1 for v in versions if v > schema.since_version), default=schema.since_version)
        entry = registry.find(schema.domain, schema.name, last)
        if entry is not None and (schema.domain or last >= OLDEST):
            yield schema, entry


def test_every_entry_takes_all_inputs_and_attributes_of_its_schemas() -> None:
    wrong, seen = [], 0
    for schema, entry in schemas():
        seen += 1
        missing = set(schema.attributes) - set(entry.parameters) - LEFT_OUT.get(schema.name, set())
        kinds = [p.kind for p in inspect.signature(entry.function).parameters.values()]
        places = sum(kind == inspect.Parameter.POSITIONAL_OR_KEYWORD for kind in kinds)
        if missing or inspect.Parameter.VAR_POSITIONAL not in kinds and places < schema.max_input:
            wrong.append((schema.name, schema.since_version, missing))
    assert wrong == []
    assert seen > 400


def test_defaults_are_those_of_the_schemas() -> None:
    wrong = []
    for schema, entry in schemas():
        parameters = inspect.signature(entry.function).parameters
        for name, attribute in schema.attributes.items():
            if name not in parameters or not attribute.default_value.type:
                continue
            wanted, own = onnx.helper.get_attribute_value(attribute.default_value), parameters[name].default
            wanted = wanted.decode() if isinstance(wanted, bytes) else wanted
            own = list(own) if isinstance(own, tuple) else own
            numbers = isinstance(wanted, float) and isinstance(own, int | float)
            same = abs(own - wanted) <= 1e-6 * abs(wanted) if numbers else own == wanted
            if own is not None and not same and {str(own), str(wanted)} not in SAME:
                wrong.append((schema.name, schema.since_version, name, wanted, own))
    assert wrong == []


def test_every_function_is_found_under_its_own_name() -> None:
    for domain, name in registry.names():
        function = registry.find(domain, name, 10**9).function  # type: ignore[union-attr]
        assert getattr(sys.modules[function.__module__], function.__name__) is function, name
