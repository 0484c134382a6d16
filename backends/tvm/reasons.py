"""What an error of TVM says in one line: it puts a stack of C++ frames before it."""

from __future__ import annotations


def last_line(error: object, longest: int = 300) -> str:
    """The last line of an error's text that is not empty, cut to `longest` letters; its type when it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:longest] if lines else type(error).__name__
