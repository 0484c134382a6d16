"""What a written model says about itself: no private paths, and how it was made."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as oir

from burnish.ir.walk import graphs

_PRIVATE_KEYS = ("pkg.torch.", "pkg.onnxscript.", "namespace")
_PATH = re.compile(r"""File "|\.py\b|(?:^|[\s"'(])(?:/[\w.-]+){2,}|\b[A-Za-z]:\\""")


def strip_private(model: oir.Model) -> None:
    """Drop what exporters leave of the machine they ran on: stack traces, module scopes, doc strings with file paths.

    Metadata of the model itself (`model.metadata_props`) stay, except the exporters' own keys.
    """
    _strip(model)
    for function in model.functions.values():
        _strip(function)
    for graph in graphs(model):
        _strip(graph)
        for value in (*graph.inputs, *graph.initializers.values()):
            _strip(value)
            if value.const_value is not None:
                _strip(value.const_value)
        for node in graph:
            _strip(node)
            for output in node.outputs:
                _strip(output)


def provenance(
    model: oir.Model, *, version: str, recipe: Sequence[str], input_fingerprint: str, fired: Mapping[str, Any]
) -> None:
    """Say in `model.metadata_props`, under `burnish.*`, how the model was made. The same arguments give the same text.

    Args:
        model: the model to mark.
        version: the version of burnish.
        recipe: the passes with their options, in order.
        input_fingerprint: SHA-256 of the input model.
        fired: what each pass changed, as JSON values.
    """
    model.metadata_props["burnish.version"] = version
    model.metadata_props["burnish.recipe"] = _json(list(recipe))
    model.metadata_props["burnish.input_sha256"] = input_fingerprint
    model.metadata_props["burnish.fired"] = _json(dict(fired))


def _json(content: Any) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def _strip(thing: Any) -> None:
    for key in [key for key in thing.metadata_props if key.startswith(_PRIVATE_KEYS)]:
        del thing.metadata_props[key]
    if thing.doc_string and _PATH.search(thing.doc_string):
        if isinstance(thing, oir.serde.TensorProtoTensor):
            thing.raw.ClearField("doc_string")
        else:
            thing.doc_string = None
