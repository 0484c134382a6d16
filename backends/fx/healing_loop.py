"""The steps of training, looked at on held-out rows, and kept on disk so that a killed run goes on."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from burnish.backends.fx.healing_loss import Term
from burnish.backends.fx.healing_options import HealOptions, Progress
from burnish.backends.fx.healing_ranks import Ranks
from burnish.ir.errors import InputError

SAVE_SECONDS = 60.0
"""The longest time between two checkpoints, unless they take more than a twentieth of it to write."""
STEPS = 300
"""The budget where none is given."""

Losses = Callable[[bool, int], list[Term]]
"""`f(training, number)`: the terms of the loss on a batch, as many for each; held out, those of the outputs alone."""


@dataclass
class State:
    """How far training is; plain numbers, kept with the weights."""

    step: int = 0
    seconds: float = 0.0
    first: float = math.nan
    best: float = math.nan
    stale: int = 0
    looked: int = 0
    sum: float = 0.0
    count: int = 0
    history: list[tuple[int, float, float]] = field(default_factory=list)


class Loop:
    """Training of some parameters.

    Args:
        parameters: what is trained, by name.
        losses: gives the loss of a batch.
        held_out: how many batches are held out.
        order: `f(step)` is the number of the batch of a step.
        penalty: added to the loss once for a step; None for nothing.
        modes: modules that behave otherwise in training.
        options: the budget and the rest.
        ranks: the processes.
        file: where checkpoints go; None for none.
        started: when the clock of the budget began, by `time.monotonic`.
        on_share: is told before each step how much of the budget is used; None for nothing.
        settled: the share of the budget before which looks without improvement are no reason to end.

    Attributes:
        state: where it is.
        ended: why it ended.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        losses: Losses,
        held_out: int,
        order: Callable[[int], int],
        penalty: Callable[[], torch.Tensor] | None,
        modes: Sequence[nn.Module],
        options: HealOptions,
        ranks: Ranks,
        file: Path | None,
        started: float,
        on_share: Callable[[float], None] | None = None,
        settled: float = 0.0,
    ) -> None:
        self._on_share, self._settled = on_share, settled
        self.parameters = dict(parameters)
        self._losses, self._held_out, self._order, self._penalty = losses, held_out, order, penalty
        self._modes, self._options, self._ranks, self._file = modes, options, ranks, file
        self._started, self._saved, self._writing = started, time.monotonic(), 0.0
        self._optimizer = torch.optim.AdamW(list(self.parameters.values()), lr=0.0, weight_decay=0.0)
        self._steps = STEPS if options.steps is None and options.minutes is None else options.steps
        self.state, self.ended = State(), ""
        self.best: dict[str, torch.Tensor] = {}

    def run(self, on_step: Callable[[Progress], None] | None) -> None:
        """Train until the budget is used; afterwards the parameters have their best values.

        Raises:
            InputError: the loss is not finite before the first step.
        """
        if not self._resume():
            self.state.first = self.state.best = self.evaluate()
            if not math.isfinite(self.state.first):
                raise InputError("the student's loss on held-out rows is not a finite number", place="heal")
            self._remember()
        finished = bool(self.ended)
        while not self.ended:
            share = self._share()
            if share >= 1:
                self.ended = "the budget is used"
                break
            loss = self._step(share)
            state = self.state
            state.step, state.sum, state.count = state.step + 1, state.sum + loss, state.count + 1
            share = min(self._share(), 1.0)
            if on_step is not None and self._ranks.rank == 0:
                on_step(Progress(state.step, loss, state.best, share))
            if not math.isfinite(loss):
                self.ended = "the loss is no longer a finite number"
            elif math.floor(share * self._options.evaluations) > state.looked:
                state.looked = math.floor(share * self._options.evaluations)
                self._look(share)
                self._save()
            elif self._ranks.first(time.monotonic() - self._saved) > max(SAVE_SECONDS, 20 * self._writing):
                self._save()
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.best[name])
        if not finished:
            self._save()
        self.state.seconds += time.monotonic() - self._started

    def evaluate(self) -> float:
        """The loss on all held-out batches, without penalty and features."""
        self._mode(False)
        with torch.no_grad():
            return mean((self._losses(False, number) for number in range(self._held_out)), self._ranks)

    def _step(self, share: float) -> float:
        """One step of the optimizer; returns the loss before it."""
        options = self._options
        torch.manual_seed(options.seed * 1_000_003 + self.state.step)
        self._mode(True)
        if self._on_share is not None:
            self._on_share(share)
        self._optimizer.zero_grad(set_to_none=True)
        terms = self._losses(True, self._order(self.state.step))
        counts = self._ranks.total(term.count for term in terms)
        loss = sum((t.total * (t.weight / max(n, 1.0)) for t, n in zip(terms, counts, strict=True)), torch.zeros(()))
        if self._penalty is not None and self._ranks.rank == 0:
            loss = loss + self._penalty()
        if loss.requires_grad:
            loss.backward()
        self._ranks.add_gradients(self.parameters.values())
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), options.clip)
        value = self._ranks.total([float(loss.detach())])[0]
        if not (math.isfinite(value) and bool(torch.isfinite(norm))):
            return math.nan
        for group in self._optimizer.param_groups:
            group["lr"] = options.rate * schedule(share, self._first_share(), options.warm_up)
        self._optimizer.step()
        return value

    def _first_share(self) -> float:
        """What one step takes of the budget at least, so that the first one moves something."""
        return 1.0 / self._steps if self._steps else 1e-3

    def _look(self, share: float) -> None:
        """See how it does on held-out rows, and remember the best; `share` of the budget is used."""
        state = self.state
        found = self.evaluate()
        state.history.append((state.step, state.sum / max(state.count, 1), found))
        state.sum, state.count = 0.0, 0
        if found < state.best:
            state.best, state.stale = found, 0
            self._remember()
            return
        state.stale += share > self._settled
        if state.stale >= self._options.patience:
            self.ended = f"{state.stale} evaluations without improvement"

    def _remember(self) -> None:
        self.best = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def _share(self) -> float:
        """How much of the budget is used."""
        options = self._options
        seconds = self.state.seconds + time.monotonic() - self._started
        shares = [self.state.step / self._steps] if self._steps else []
        if options.minutes is not None:
            shares.append(self._ranks.first(seconds / max(60 * options.minutes, 1e-9)))
        return max(shares)

    def _mode(self, training: bool) -> None:
        for module in self._modes:
            module.train(training)

    def _save(self) -> None:
        """Keep everything under another name first, so that the file is whole or not there."""
        start = self._saved = time.monotonic()
        if self._file is None or self._ranks.rank != 0:
            return
        state = asdict(self.state)
        state["seconds"] += time.monotonic() - self._started
        kept = {
            "state": state,
            "ended": self.ended,
            "parameters": {name: one.detach() for name, one in self.parameters.items()},
            "best": self.best,
            "optimizer": self._optimizer.state_dict(),
        }
        partial = self._file.with_name(f"{self._file.name}.{os.getpid()}.partial")
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as stream:
            torch.save(kept, stream)
            stream.flush()
            os.fsync(stream.fileno())
        with suppress(FileNotFoundError):  # another process has ended the same training, and cleaned up
            os.replace(partial, self._file)
        self._saved = time.monotonic()
        self._writing = self._saved - start

    def _resume(self) -> bool:
        """Go on where a run that was killed has stopped; False when there is nothing that can be read."""
        found = self._read()
        everywhere = self._ranks.total([float(found is not None)])[0] == self._ranks.world
        if found is None or not everywhere:
            return False
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(found["parameters"][name])
        self.best = {name: one.to(self._ranks.device) for name, one in found["best"].items()}
        self._optimizer.load_state_dict(found["optimizer"])
        self.state = State(**found["state"])
        self.state.history = [(int(a), float(b), float(c)) for a, b, c in self.state.history]
        self.ended = found["ended"]
        return True

    def _read(self) -> dict[str, Any] | None:
        if self._file is None or not self._file.exists():
            return None
        try:
            found: dict[str, Any] = torch.load(self._file, map_location="cpu", weights_only=True)
        except Exception:  # a file that is damaged or of another version is as good as none
            return None
        same = {name: tuple(one.shape) for name, one in found.get("parameters", {}).items()} == {
            name: tuple(one.shape) for name, one in self.parameters.items()
        }
        return found if same else None


def mean(batches: Iterable[list[Term]], ranks: Ranks) -> float:
    """The loss of all batches of all processes, from the terms of each batch."""
    totals: list[float] = []
    for terms in batches:
        found = [part for term in terms for part in (float(term.total), term.count)]
        totals = [a + b for a, b in zip(totals or [0.0] * len(found), found, strict=True)]
    totals = ranks.total(totals)
    return sum(total / max(count, 1.0) for total, count in zip(totals[::2], totals[1::2], strict=True))


def schedule(share: float, least: float, warm_up: float) -> float:
    """The learning rate at a share of the budget, relative to the highest: a line up, then a cosine down to 0."""
    if share < warm_up:
        return max(share, least) / max(warm_up, least)
    return 0.5 * (1 + math.cos(math.pi * min((share - warm_up) / (1 - warm_up), 1.0)))
