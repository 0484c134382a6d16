"""Tokens as text, bit by bit: no half characters, and nothing behind a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_HALF = "\N{REPLACEMENT CHARACTER}"
_CONTEXT = 6
"""Tokens of the prompt that are decoded with the first new ones: some tokenizers drop a blank at a text's start."""


class Speech:
    """The text of one answer as it grows.

    Attributes:
        text: all that was said so far.
        stopped: a stop string came; it and what follows are not in the text.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], stops: Sequence[str] = (), before: Sequence[int] = ()
    ) -> None:
        """
        Args:
            decode: the text of token ids.
            stops: strings that end the answer.
            before: the tokens of the prompt.
        """
        self._decode = decode
        self._stops = [stop for stop in stops if stop]
        self._ids = list(before[-_CONTEXT:])
        self._start, self._done = 0, len(self._ids)
        self._held = ""
        self.text = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """What can be said for sure with one more token."""
        self._ids.append(token)
        return self._say(self._new(whole=False), last=False)

    def finish(self) -> str:
        """What was held back: nothing can follow that makes it something else."""
        return self._say(self._new(whole=True), last=True)

    def _new(self, whole: bool) -> str:
        """The text of the tokens since the last time that it ended with a whole character."""
        if self._done == len(self._ids):
            return ""
        known = self._decode(self._ids[self._start : self._done])
        text = self._decode(self._ids[self._start :])
        if (text.endswith(_HALF) and not whole) or len(text) < len(known):
            return ""
        self._start, self._done = self._done, len(self._ids)
        return text[len(known) :]

    def _say(self, more: str, last: bool) -> str:
        if self.stopped:
            return ""
        pending = self._held + more
        found = [place for stop in self._stops if (place := pending.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            said = pending[: min(found)]
        else:
            keep = 0 if last else self._beginning(pending)
            said, self._held = pending[: len(pending) - keep], pending[len(pending) - keep :]
        self.text += said
        return said

    def _beginning(self, text: str) -> int:
        """How many characters at the end of the text may be the beginning of a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for count in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-count:]) for stop in self._stops):
                return count
        return 0
