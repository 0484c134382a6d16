"""What healing is told and what it tells."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

import onnx_ir as oir

from burnish.ir.errors import InputError
from burnish.passes.catalog import converted, nearest


@dataclass(frozen=True)
class HealOptions:
    """How a model is trained to do again what its original does.

    Attributes:
        loss: `distil` from the original, which needs no labels: the divergence of the scores, or the squared error of
            other outputs; the model's own `task` by labels or next tokens; or `both`, added up.
        temperature: divides the scores that are distilled; the divergence is multiplied by its square.
        features: weight of the squared error of what passes between the blocks, each divided by its own size
            (LAPTOP-Diff, arXiv:2404.11098); 0 for none.
        filters: steps in which linear filters first learn to keep what the output needs of these values, which are then
            compared behind the filters (TED, arXiv:2210.01351); 0 for no filters.
        train: `all` weights; the `factors` of low-rank pairs; the `last` three blocks with what follows them
            (arXiv:2411.15558); the `blocks` with the largest gradients (arXiv:2408.15600); or `lora`, a low-rank change
            of the matrices of all blocks, added to them in the end (arXiv:2106.09685).
        untie: give a head that reads the table of an embedding a copy of it, so that `last` can train it.
        blocks: how many blocks `blocks` trains.
        rank, alpha: of `lora`: the change is alpha / rank times a product of that rank.
        frobenius: decay of the squared norm of the product of two factors, half of which is multiplied with it
            (arXiv:2209.13569).
        spectral: split each product of two factors anew before training, by its singular values (same source).
        noise: each factor is multiplied by 1 + noise * normal while training.
        fade: share of the budget in which norms that `replace-norm` has replaced fade out, along a line, so that the
            student begins as the original (arXiv:2405.11582); 0 for at once.
        momentum: share of a step's statistics in those that replaced norms keep; 0 keeps the ones that they begin with.
        codebooks: how the codes of codebooks are trained: `direct` each by itself; `linear` all through one matrix and
            one vector, which are folded into them in the end (SimVQ, arXiv:2411.02038); `frozen` not at all. Gradients
            pass the search for the nearest straight through (arXiv:1711.00937).
        revive: first let queries be the codes that no row of the first batches chooses (arXiv:2005.00341).
        commitment: how much queries are drawn to their codes, relative to codes to queries.
        memory: bytes of activations that may be held for the gradients of one step; blocks are computed twice where
            they would take more. None for no limit.
        cache: bytes of values of frozen layers and of the original that may be kept from step to step.
        batch: rows of a step; samples of a model with a symbolic batch are cut into rows and put together anew.
        rate: the highest learning rate of AdamW, reached after `warm_up` and lowered to 0 along a cosine.
        warm_up: share of the budget.
        clip: the largest norm of a gradient.
        held_out: share of the rows that is not trained on, but says which weights are the best.
        evaluations: how often within the budget these are looked at.
        patience: after so many evaluations without improvement it ends.
        steps, minutes: the budget; what is reached first ends it. Without either it is 300 steps.
        seed: of the split, the order and the noise.
        device: a torch device.
    """

    loss: Literal["distil", "task", "both"] = "distil"
    temperature: float = 2.0
    features: float = 0.0
    filters: int = 0
    train: Literal["all", "factors", "last", "blocks", "lora"] = "all"
    untie: bool = False
    blocks: int = 4
    rank: int = 8
    alpha: float = 16.0
    frobenius: float = 0.0
    spectral: bool = False
    noise: float = 0.0
    fade: float = 0.5
    momentum: float = 0.1
    codebooks: Literal["direct", "linear", "frozen"] = "direct"
    revive: bool = False
    commitment: float = 0.25
    memory: int | None = None
    cache: int = 2 << 30
    batch: int = 8
    rate: float = 1e-4
    warm_up: float = 0.05
    clip: float = 1.0
    held_out: float = 0.1
    evaluations: int = 10
    patience: int = 3
    steps: int | None = None
    minutes: float | None = None
    seed: int = 0
    device: str = "cpu"

    def check(self) -> None:
        """Nothing, where the options make sense.

        Raises:
            InputError: one of them does not.
        """
        choices = {
            "loss": ("distil", "task", "both"), "train": ("all", "factors", "last", "blocks", "lora"),
            "codebooks": ("linear", "direct", "frozen"),
        }  # fmt: skip
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"`{name}` is `{getattr(self, name)}`", place="heal", hint=f"give {_or(allowed)}")
        least = {
            "temperature": 1e-3, "features": 0, "filters": 0, "blocks": 1, "rank": 1, "alpha": 0, "frobenius": 0,
            "fade": 0, "momentum": 0, "commitment": 0,
            "noise": 0, "memory": 1, "cache": 0, "batch": 1, "rate": 0, "warm_up": 0, "clip": 0, "held_out": 0,
            "evaluations": 1, "patience": 1, "steps": 1, "minutes": 0, "seed": 0,
        }  # fmt: skip
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= bound):
                raise InputError(f"`{name}` is {value}", place="heal", hint=f"give a number of at least {bound}")
        if self.filters and not self.features:
            raise InputError(
                "filters without features do nothing", place="heal", hint="give `features` a weight, such as 1"
            )
        for name in ("warm_up", "held_out", "fade", "momentum"):
            if getattr(self, name) >= 1:
                raise InputError(f"`{name}` is {getattr(self, name)}", place="heal", hint="give a share below 1")


def read_options(text: str) -> HealOptions:
    """The options that a text gives, `steps=600,rate=1e-3`; the others have their defaults.

    Raises:
        InputError: the text names what is no option, or gives one a value that it cannot have.
    """
    known = get_type_hints(HealOptions)
    given: dict[str, Any] = {}
    for pair in filter(None, (one.strip() for one in text.split(","))):
        name, equals, value = (part.strip() for part in pair.partition("="))
        name = name.replace("-", "_")
        if name not in known:
            raise InputError(f"healing has no option `{name}`", hint=nearest(name, known))
        if not equals:
            raise InputError(f"`{pair}` gives no value", place="heal", hint="write `steps=600,rate=1e-3`")
        given[name] = converted(value, known[name], name, "heal")
    options = HealOptions(**given)
    options.check()
    return options


def _or(words: tuple[str, ...]) -> str:
    return ", ".join(f"`{word}`" for word in words[:-1]) + f" or `{words[-1]}`"


@dataclass(frozen=True)
class Progress:
    """Where training is.

    Attributes:
        step: steps that were made.
        loss: of the last step.
        held_out: the best loss on held-out rows so far.
        share: of the budget that is used, 0 to 1.
    """

    step: int
    loss: float
    held_out: float
    share: float


@dataclass(frozen=True)
class Healed:
    """What became of a model.

    Attributes:
        model: a copy of the student with the trained weights; nothing else differs. Without improvement it is the
            student itself.
        written: the initializers that changed.
        before, after: the loss on held-out rows, of the student and of `model`; measured by ONNX Runtime where integers
            were trained.
        trained: numbers that were trained.
        steps: steps that were made, those before a resumption included.
        seconds: how long it took, likewise.
        ended: why it ended, in plain words.
        history: after each evaluation the step, the mean loss of the steps since the one before, and that on held-out
            rows.
        checkpoint: the file from which the same call has the result at once; None where none was asked for.
        frozen: integers and codebooks that cannot be trained, by the nodes that read them, each with the reason.
    """

    model: oir.Model
    written: tuple[str, ...]
    before: float
    after: float
    trained: int
    steps: int
    seconds: float
    ended: str
    history: tuple[tuple[int, float, float], ...] = field(default=(), repr=False)
    checkpoint: Path | None = None
    frozen: tuple[str, ...] = ()

    @property
    def improved(self) -> bool:
        """Whether training made the loss on held-out rows smaller."""
        return bool(self.written)


def forget(checkpoint: Path) -> None:
    """Delete a checkpoint, with what killed processes have left of writing it."""
    for file in (checkpoint, *checkpoint.parent.glob(f"{checkpoint.name}.*.partial")):
        file.unlink(missing_ok=True)
