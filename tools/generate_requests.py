"""The lines of a request file: which can be answered, and what is wrong with the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from burnish.ir.errors import InputError

if TYPE_CHECKING:
    from burnish.backends.decoding.loop import Ask


class Line(msgspec.Struct, forbid_unknown_fields=True):
    """One line of a request file; what is left out is as on the command line.

    Attributes:
        id: anything; it is written into the answer.
        prompt: a text; or `ids`, tokens.
        max_tokens, temperature, top_k, top_p, seed: as the options.
        stop: one string that ends the answer, or several.
    """

    id: Any = None
    prompt: str | None = None
    ids: list[int] | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None


@dataclass(frozen=True)
class Request:
    """One request.

    Attributes:
        number: of its line, from 1 on.
        id: what the line calls it.
        ask: what is asked of the decoder; None where the line is broken.
        stops: strings that end the answer.
        cause: what is wrong with the line; empty where nothing is.
    """

    number: int
    id: Any
    ask: Ask | None
    stops: tuple[str, ...] = ()
    cause: str = ""


def read(path: str, make: Callable[[Line, int], tuple[Ask, tuple[str, ...]]]) -> list[Request]:
    """The requests of a file with one JSON object on each line; blank lines are passed over.

    Args:
        path: the file.
        make: what is asked by the n-th line, from 0 on, and its stop strings; raises InputError where that cannot be.

    Raises:
        InputError: the file cannot be read, or holds no line.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"the file cannot be read: {error.strerror}", place=path, hint="check the path") from None
    found = [_request(line, number, make) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise InputError("the file holds no request", place=path, hint='write lines like {"prompt": "Once upon"}')
    return found


def _request(line: bytes, number: int, make: Callable[[Line, int], tuple[Ask, tuple[str, ...]]]) -> Request:
    try:
        given = msgspec.json.decode(line, type=Line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return Request(number, None, None, cause=str(error))
    try:
        ask, stops = make(given, number - 1)
    except InputError as error:
        return Request(number, given.id, None, cause=error.cause)
    return Request(number, given.id, ask, stops)
