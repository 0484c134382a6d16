"""How a lossy stage of `optimize` is run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from burnish.frontends.functions import is_function
from burnish.frontends.measures import Metric, user_measure
from burnish.passes.protocols import Measure
from burnish.passes.score_store import Store
from burnish.passes.search import OnStep

if TYPE_CHECKING:
    from burnish.backends.fx.healing import HealOptions
    from burnish.tools.compiled_times import KernelTiming


@dataclass(frozen=True)
class Options:
    """How a lossy stage is run.

    Attributes:
        metric: what a drop is measured by, as `burnish.optimize` takes it.
        healing: options of healing, where it is wanted.
        workers: how many processes score edits, or the `ray://` address of a cluster; None for this process.
        pairs: also score edits beside each other together, and let the selection know.
        store: where scores are kept; None to keep none.
        kernels: how edits are timed where kernels are compiled; None for ONNX Runtime.
        on_step: progress.
    """

    metric: str | Measure | None = None
    healing: HealOptions | None = None
    workers: str | None = None
    pairs: bool = False
    store: Store | None = None
    kernels: KernelTiming | None = None
    on_step: OnStep = lambda what, number, total: None


def options(
    metric: str | Measure | Metric | None = None,
    heal: HealOptions | bool | str | None = None,
    workers: str | int | None = None,
    pairs: bool = False,
    on_step: OnStep | None = None,
    kernels: KernelTiming | None = None,
) -> Options:
    """The options of `burnish.optimize` that concern a lossy stage, resolved.

    Raises:
        InputError: the metric cannot be imported, or the text of `heal` cannot be read.
    """
    healing = None if isinstance(heal, bool | str) else heal
    if isinstance(heal, str):
        from burnish.backends.fx.healing_options import read_options

        healing = read_options(heal)
    spread = None if workers is None else str(workers)
    if callable(metric) or (isinstance(metric, str) and is_function(metric)):
        metric = user_measure(metric)
    return Options(metric, healing, spread, pairs, Store(), kernels, on_step or (lambda what, number, total: None))
