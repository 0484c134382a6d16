"""The protobuf of an .onnx file without its large weights, which stay in the mapped file.

Parsing a model with its weights needs twice their memory, and reading one weight copies it again. Here the wire format
is walked down to `ModelProto.graph.initializer.raw_data`; each large payload is replaced by an external-data entry that
gives its place in the same file. What is left is small, and the `onnx` package parses it.
Source: https://protobuf.dev/programming-guides/encoding and `onnx.proto` (field numbers).
"""

from __future__ import annotations

import mmap
import weakref
from typing import Any

import numpy as np
import onnx
import onnx_ir as oir

INLINE = "\0inline"
"""The location in the external-data entry of a weight that lies in the model file itself."""

Buffer = mmap.mmap | bytes
"""A whole model file."""

_SMALL = 1024
_GRAPH, _INITIALIZER, _RAW_DATA, _EXTERNAL_DATA, _DATA_LOCATION = 7, 5, 9, 13, 14
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class WireError(ValueError):
    """The bytes are not a protobuf message, or end too early."""


def weightless(buffer: Buffer) -> tuple[bytes, set[tuple[int, int]]]:
    """The bytes of a ModelProto without its large initializers.

    Args:
        buffer: the whole model file.

    Returns:
        The serialized ModelProto, and the (offset, length) in `buffer` of every payload that was left out.

    Raises:
        WireError: `buffer` is not a protobuf message.
    """
    spans: set[tuple[int, int]] = set()
    return b"".join(_model(buffer, spans)), spans


def mapped(buffer: Buffer, proto: oir.ExternalTensor) -> oir.LazyTensor:
    """The tensor of a payload that was left out: read from the mapped file when asked, in an aligned array.

    An array in a model file seldom starts at a multiple of its element size, which vector instructions need, so
    reading copies such an array; the copy is shared by everybody who holds it, and freed with the last of them.

    Args:
        buffer: the whole model file; stays mapped as long as the tensor lives.
        proto: the tensor that stands for the payload, with its offset and length in `buffer`.
    """
    dtype, shape, offset, length = proto.dtype, proto.shape, proto.offset or 0, proto.length or 0
    packed = dtype.bitwidth < 8
    element = np.dtype(np.uint8) if packed else np.dtype(dtype.numpy()).newbyteorder("<")
    kept: weakref.ref[np.ndarray] | None = None

    def read() -> oir.TensorProtocol:
        nonlocal kept
        array = kept() if kept is not None else None
        if array is None:
            array = np.frombuffer(buffer, element, count=length // element.itemsize, offset=offset)
            if not array.flags.aligned:
                array = array.copy()
                kept = weakref.ref(array)
        if packed:
            return oir.PackedTensor(array, dtype, shape=shape)
        return oir.Tensor(array.reshape(shape.numpy()), dtype=dtype, shape=shape)

    return _Mapped(
        read,
        dtype,
        shape,
        name=proto.name,
        doc_string=proto.doc_string,
        metadata_props=proto.metadata_props,
        content=memoryview(buffer)[offset : offset + length],
    )


class _Mapped(oir.LazyTensor):
    """A tensor in a mapped file, whose bytes go elsewhere without an array in between."""

    def __init__(self, *args: Any, content: memoryview, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._content = content

    def tobytes(self) -> bytes:
        return bytes(self._content)

    def tofile(self, file: Any) -> None:
        file.write(self._content)


def _model(buffer: Buffer, spans: set[tuple[int, int]]) -> list[bytes]:
    kept, start, position, end = [], 0, 0, len(buffer)
    while position < end:
        field, body, position_after = read_field(buffer, position, end)
        if field == _GRAPH << 3 | _BYTES:
            graph = _graph(buffer, body, position_after, spans)
            size = sum(map(len, graph))
            kept += [buffer[start:position], bytes([field]), encode_varint(size), *graph]
            start = position_after
        position = position_after
    kept.append(buffer[start:end])
    return kept


def _graph(buffer: Buffer, start: int, end: int, spans: set[tuple[int, int]]) -> list[bytes]:
    kept, position = [], start
    while position < end:
        field, body, position_after = read_field(buffer, position, end)
        if field == _INITIALIZER << 3 | _BYTES and position_after - body > _SMALL:
            tensor = _tensor(buffer, body, position_after, spans)
            if tensor is not None:
                kept += [buffer[start:position], bytes([field]), encode_varint(len(tensor)), tensor]
                start = position_after
        position = position_after
    kept.append(buffer[start:end])
    return kept


def _tensor(buffer: Buffer, start: int, end: int, spans: set[tuple[int, int]]) -> bytes | None:
    payloads, position = [], start
    while position < end:
        field, body, position_after = read_field(buffer, position, end)
        if field >> 3 in (_EXTERNAL_DATA, _DATA_LOCATION):
            return None
        if field == _RAW_DATA << 3 | _BYTES:
            payloads.append((position, body, position_after))
        position = position_after
    if len(payloads) != 1 or payloads[0][2] - payloads[0][1] <= _SMALL:
        return None
    field_start, body, after = payloads[0]
    spans.add((body, after - body))
    place = onnx.TensorProto(data_location=onnx.TensorProto.EXTERNAL)
    for key, text in (("location", INLINE), ("offset", str(body)), ("length", str(after - body))):
        place.external_data.add(key=key, value=text)
    stand_in: bytes = place.SerializeToString()
    return buffer[start:field_start] + buffer[after:end] + stand_in


def read_field(buffer: Buffer, position: int, end: int) -> tuple[int, int, int]:
    """The tag of the field at `position`, where its content starts, and where the next field starts."""
    tag, position = _decode_varint(buffer, position, end)
    kind = tag & 7
    if tag >> 3 == 0:
        raise WireError(f"byte {position - 1} is not the start of a protobuf field")
    if kind == _BYTES:
        length, body = _decode_varint(buffer, position, end)
        after = body + length
    elif kind == _VARINT:
        body = position
        _, after = _decode_varint(buffer, position, end)
    elif kind in (_FIXED64, _FIXED32):
        body, after = position, position + (8 if kind == _FIXED64 else 4)
    else:
        raise WireError(f"byte {position - 1} is not the start of a protobuf field")
    if after > end:
        raise WireError(f"a field at byte {position} needs {after - end} bytes more than there are")
    return tag, body, after


def _decode_varint(buffer: Buffer, position: int, end: int) -> tuple[int, int]:
    result = shift = 0
    while True:
        if position >= end:
            raise WireError("the data ends in the middle of a field")
        byte = buffer[position]
        position += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, position
        shift += 7
        if shift > 63:
            raise WireError(f"byte {position - 1} is not part of a protobuf number")


def encode_varint(number: int) -> bytes:
    """`number` (>= 0) in the protobuf variable-length encoding."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)
