"""Arrays of unsigned integers as compressed planes of bytes: all lowest bytes, all second ones, and so on.

The high bytes of numbers alike compress well and the low bytes of weights do not at all, so each plane of each block is
kept in the form that suits it. Decoding never makes more bytes than were asked for.
"""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

BLOCK = 1 << 19
"""Elements that are coded at a time."""

MANTISSA = {"float16": 10, "bfloat16": 7, "float32": 23, "float64": 52}
"""Bits behind the exponent of the floating-point numbers that are known."""

_PLAIN, _FILL, _HUFFMAN, _RANGE = range(4)
_HEAD = 5
_SAMPLE = 1 << 14
_FILTERS: list[dict[str, Any]] = [
    {"id": lzma.FILTER_LZMA2, "preset": 2, "dict_size": 1 << 20, "lc": 1, "lp": 0, "pb": 0}
]


class Damaged(ValueError):
    """The bytes are not what was written."""


def encode(numbers: np.ndarray) -> bytes:
    """A block of at most `BLOCK` little-endian unsigned integers of 1, 2, 4 or 8 bytes."""
    width = numbers.dtype.itemsize
    table = np.ascontiguousarray(numbers).view(np.uint8).reshape(-1, width)
    return b"".join(_encode_plane(np.ascontiguousarray(table[:, place])) for place in range(width))


def decode(read: Callable[[int], bytes], count: int, width: int) -> np.ndarray:
    """The block of `count` numbers that `encode` wrote.

    Args:
        read: gives the next so many bytes, or fewer at the end.
        count: at most `BLOCK`.
        width: bytes of a number.

    Raises:
        Damaged: there are no such planes.
    """
    table = np.empty((count, width), np.uint8)
    for place in range(width):
        head = read(_HEAD)
        if len(head) < _HEAD:
            raise Damaged("it ends too early")
        size = int.from_bytes(head[1:], "little")
        if size > 2 * count + 1024:
            raise Damaged("a plane is longer than its numbers")
        content = read(size)
        if len(content) < size:
            raise Damaged("it ends too early")
        table[:, place] = _decode_plane(head[0], content, count)
    found: np.ndarray = table.reshape(-1).view(np.dtype(f"<u{width}"))
    return found


def encode_change(numbers: np.ndarray, base: np.ndarray, mantissa: int) -> bytes:
    """A block of numbers as their differences to those of a base, as integers.

    Numbers of like exponents differ by alike, so the differences are put in the order of the exponents.

    Args:
        numbers, base: unsigned integers of one width.
        mantissa: the bits of a number behind its exponent; 0 for what are no floating-point numbers.
    """
    return encode(zigzag(numbers - base)[_order(base, mantissa)])


def decode_change(read: Callable[[int], bytes], base: np.ndarray, mantissa: int) -> np.ndarray:
    """The numbers that `encode_change` wrote. Raises Damaged as `decode` does."""
    change = np.empty_like(base)
    change[_order(base, mantissa)] = unzigzag(decode(read, base.size, base.dtype.itemsize))
    change += base
    return change


def _order(base: np.ndarray, mantissa: int) -> np.ndarray | slice:
    if not mantissa:
        return slice(None)
    largest = (1 << 8 * base.dtype.itemsize - 1 - mantissa) - 1
    exponents = (base >> mantissa) & largest
    return np.argsort(exponents.astype(np.uint8 if largest < 256 else np.uint16), kind="stable")


def zigzag(numbers: np.ndarray) -> np.ndarray:
    """Differences modulo 2^n, so that small ones of both signs become small unsigned numbers."""
    sign = np.zeros_like(numbers) - (numbers >> (8 * numbers.dtype.itemsize - 1))
    found: np.ndarray = (numbers << 1) ^ sign
    return found


def unzigzag(numbers: np.ndarray) -> np.ndarray:
    """What `zigzag` was given."""
    found: np.ndarray = (numbers >> 1) ^ (np.zeros_like(numbers) - (numbers & 1))
    return found


def spans(count: int, row: int = 1) -> Iterator[tuple[int, int]]:
    """Where blocks of `count` elements begin and end: whole rows of `row` elements where these fit."""
    step = BLOCK // row * row if row <= BLOCK else BLOCK
    for start in range(0, count, step):
        yield start, min(start + step, count)


def _encode_plane(plane: np.ndarray) -> bytes:
    content = plane.tobytes()
    form, made = _PLAIN, content
    if plane.size and not (plane != plane[0]).any():
        form, made = _FILL, content[:1]
    elif _entropy(plane) < 7.9:
        coders = {_HUFFMAN: _huffman, _RANGE: _range}
        piece = (
            content
            if plane.size <= 4 * _SAMPLE
            else b"".join(content[start : start + _SAMPLE] for start in range(0, plane.size - _SAMPLE, plane.size // 4))
        )
        sizes = {one: len(coder(piece)) for one, coder in coders.items()}
        best = _RANGE if sizes[_RANGE] < 0.98 * sizes[_HUFFMAN] else _HUFFMAN
        coded = coders[best](content)
        if len(coded) < len(content):
            form, made = best, coded
    return bytes([form]) + len(made).to_bytes(_HEAD - 1, "little") + made


def _entropy(plane: np.ndarray) -> float:
    """Bits a byte, were each on its own."""
    shares = np.bincount(plane, minlength=256) / plane.size
    shares = shares[shares > 0]
    return float(-(shares * np.log2(shares)).sum())


def _huffman(content: bytes) -> bytes:
    coder = zlib.compressobj(6, zlib.DEFLATED, -15)
    return coder.compress(content) + coder.flush()


def _range(content: bytes) -> bytes:
    return lzma.compress(content, lzma.FORMAT_RAW, filters=_FILTERS)


def _decode_plane(form: int, content: bytes, count: int) -> np.ndarray:
    if form == _FILL:
        if len(content) != 1:
            raise Damaged("a plane of one value has several")
        return np.full(count, content[0], np.uint8)
    if form == _HUFFMAN:
        try:
            coder = zlib.decompressobj(-15)
            content = coder.decompress(content, count + 1)
        except zlib.error as error:
            raise Damaged("a plane cannot be unpacked") from error
    elif form == _RANGE:
        try:
            content = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_FILTERS).decompress(content, count + 1)
        except (lzma.LZMAError, EOFError) as error:
            raise Damaged("a plane cannot be unpacked") from error
    elif form != _PLAIN:
        raise Damaged("a plane has an unknown form")
    if len(content) != count:
        raise Damaged("a plane has another length than its numbers")
    return np.frombuffer(content, np.uint8)
