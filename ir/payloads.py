"""Where the values of tensors lie in the files of a model: spans of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import onnx

from burnish.ir.wire import Buffer, WireError, read_field

LEAST = 1025
"""The fewest bytes of a tensor that counts: smaller ones cost more to keep account of than they weigh."""

_BYTES = 2
_MESSAGES = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph"},
}
"""By kind of message, the fields of `onnx.proto` that lead to tensors, and the kinds of message these are."""
_FLOATS, _DOUBLES, _RAW, _EXTERNAL, _LOCATION = 4, 10, 9, 13, 14
_DEEPEST = 100
"""Protobuf's own limit of messages in messages."""


@dataclass(frozen=True)
class Payload:
    """The values of one tensor as they lie in a file.

    Attributes:
        offset, length: in bytes.
        name: the tensor's; may be empty.
        dtype: the number that ONNX has for it.
        dims: its shape.
    """

    offset: int
    length: int
    name: str
    dtype: int
    dims: tuple[int, ...]


@dataclass(frozen=True)
class StoredFile:
    """One file of a model.

    Attributes:
        path: of an external data file as the model names it, with `/`; of the model file its name.
        content: its bytes, mapped.
        payloads: in the order of their offsets, none over another.
    """

    path: str
    content: Buffer
    payloads: tuple[Payload, ...]


@dataclass
class Found:
    """The payloads of a model file: in the file itself, and by the location of their external data."""

    inside: list[Payload] = field(default_factory=list)
    outside: dict[str, list[Payload]] = field(default_factory=dict)


def find(buffer: Buffer) -> Found:
    """The payloads of a serialized ModelProto: initializers and constants, in branches and functions too.

    Args:
        buffer: the whole model file.

    Raises:
        WireError: it is not a protobuf message.
    """
    found = Found()
    _walk(buffer, 0, len(buffer), "model", found, 0)
    return found


def apart(payloads: Sequence[Payload], size: int) -> tuple[Payload, ...]:
    """Those of at least `LEAST` bytes that lie within `size` bytes, sorted, without those that begin in another."""
    kept: list[Payload] = []
    end = 0
    for one in sorted(payloads, key=lambda one: (one.offset, -one.length)):
        if one.length >= LEAST and one.offset >= end and one.offset + one.length <= size:
            kept.append(one)
            end = one.offset + one.length
    return tuple(kept)


def _walk(buffer: Buffer, start: int, end: int, kind: str, found: Found, depth: int) -> None:
    if depth > _DEEPEST:
        raise WireError("there are too many messages in each other")
    inner, position = _MESSAGES[kind], start
    while position < end:
        tag, body, after = read_field(buffer, position, end)
        below = inner.get(tag >> 3) if tag & 7 == _BYTES else None
        if below == "tensor":
            _tensor(buffer, body, after, found)
        elif below is not None:
            _walk(buffer, body, after, below, found, depth + 1)
        position = after


def _tensor(buffer: Buffer, start: int, end: int, found: Found) -> None:
    """Add the values of one tensor: raw ones, packed floats, or where its external data lie."""
    values: list[tuple[int, int, int]] = []
    rest, external, position = [], False, start
    while position < end:
        tag, body, after = read_field(buffer, position, end)
        number = tag >> 3
        external |= number in (_EXTERNAL, _LOCATION)
        if number in (_RAW, _FLOATS, _DOUBLES) and tag & 7 == _BYTES and after - body >= LEAST:
            values.append((body, after - body, number))
        elif after - position < 1 << 16:
            rest.append(buffer[position:after])
        position = after
    if not values and not external:
        return
    try:
        proto = onnx.TensorProto.FromString(b"".join(rest))
    except Exception as error:
        raise WireError("a tensor is no protobuf message") from error
    dtype, dims = proto.data_type, tuple(proto.dims)
    for offset, length, number in values:
        kind = {_FLOATS: onnx.TensorProto.FLOAT, _DOUBLES: onnx.TensorProto.DOUBLE}.get(number, dtype)
        found.inside.append(Payload(offset, length, proto.name, kind, dims))
    if proto.data_location == onnx.TensorProto.EXTERNAL:
        entries = {entry.key: entry.value for entry in proto.external_data}
        offset, length = int(entries.get("offset", "0")), int(entries.get("length", "0"))
        one = Payload(offset, length, proto.name, dtype, dims)
        found.outside.setdefault(entries.get("location", ""), []).append(one)
