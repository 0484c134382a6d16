"""Choices of regions, kept on disk: for the same model, samples, machine and records nothing is measured twice."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import msgspec
import onnx_ir as oir
import tvm

from burnish.backends.ort import timing
from burnish.backends.ort.kernel_times import processor
from burnish.backends.ort.session import runtime
from burnish.backends.tvm import versions
from burnish.backends.tvm.artifact import Evidence
from burnish.backends.tvm.target import Target
from burnish.ir import text
from burnish.ir.samples import Sample
from burnish.passes.score_store import Store, samples_fingerprint
from burnish.passes.verify import COMPILED


@dataclass(frozen=True)
class Tried:
    """What a region is like as compiled code, beside the same region in ONNX Runtime.

    Attributes:
        nodes: how many nodes it has.
        evidence: what was measured.
        wins: whether it may be compiled.
        tuned: how many of its kernels have a tuned schedule.
    """

    nodes: int
    evidence: Evidence
    wins: bool
    tuned: int = 0


@dataclass(frozen=True)
class Choice:
    """Which nodes of a model are not compiled, and what was measured to find out.

    Attributes:
        date: of the measurement, `2026-11-26`.
        stay: why nodes stay on ONNX Runtime, by their place in the model.
        tried: regions, each as the places of its nodes in ascending order, and what they are like.
        records: SHA-256 of each file of tuning records that was looked up, in hex; empty where there was none.
    """

    date: str
    stay: dict[int, str]
    tried: list[tuple[list[int], Tried]]
    records: dict[str, str]


class Choices:
    """The choices for one target on this machine, in a store.

    A choice is found by the fingerprints of the model, weights and all, and of the samples; by the target, the threads,
    the versions of burnish, TVM, tvm-ffi and ONNX Runtime, the source of what compiles and times, the processor or GPU
    and the allowed errors. It is used when the files of tuning records that it looked up are what they were.

    Attributes:
        looked_up: SHA-256 of the files of tuning records that schedules are looked up in, by name; empty for a file
            that is not there. Filled by whoever gives kernels their schedules.
    """

    def __init__(
        self,
        store: Store,
        target: Target,
        version: str,
        looked_up: Mapping[str, str] | None = None,
        digest: Callable[[str], str] = lambda name: "",
        *,
        everything: bool = False,
    ) -> None:
        """
        Args:
            store: where choices are kept.
            target: what is compiled for; its code runs on this machine.
            version: of burnish.
            looked_up: see the attribute; None where no records are used.
            digest: of a file of tuning records, as it is now.
            everything: whether regions are compiled whatever they measure.
        """
        self.looked_up = {} if looked_up is None else looked_up
        self._store, self._digest = store, digest
        own = tvm.cuda().device_name if target.kind == "cuda" else processor()
        wheels = [f"{name} {version}" for name, version in versions.found().items()]
        parts = [f"burnish {version}", _sources(), *wheels, f"onnxruntime {runtime().__version__}", own]
        asked = ["all" if everything else "measured", "plain" if looked_up is None else "with records"]
        place = [str(target), "1 thread", *asked, str(sorted(COMPILED.items())), *parts]
        self._measure = "regions " + hashlib.sha256("\n".join(place).encode()).hexdigest()

    @property
    def warning(self) -> str:
        """What the user should know of the store; empty when all is well."""
        return self._store.warning or ""

    def recall(self, model: oir.Model, samples: Sequence[Sample]) -> Choice | None:
        """The choice that was made for a model on samples; None where none was, or records have changed since."""
        known = self._store.scores(text.fingerprint(model), samples_fingerprint(samples), self._measure)
        try:
            found = msgspec.convert(known.get(""), Choice, str_keys=True)
        except msgspec.ValidationError:
            return None
        places = range(len(model.graph))
        if not all(place in places for one, _ in found.tried for place in one) or not found.stay.keys() <= {*places}:
            return None
        return found if all(self._digest(name) == value for name, value in found.records.items()) else None

    def keep(
        self,
        model: oir.Model,
        samples: Sequence[Sample],
        stay: Mapping[oir.Node, str],
        tried: Mapping[frozenset[oir.Node], Tried],
        before: Choice | None,
    ) -> None:
        """Write a choice.

        Args:
            model, samples: as for `recall`.
            stay: why nodes are not compiled.
            tried: what was measured of regions, by their nodes.
            before: the choice that it was made from; None when all was measured now.
        """
        date = datetime.now(UTC).date().isoformat()
        place = {node: index for index, node in enumerate(model.graph)}
        found = Choice(
            date,
            {place[node]: reason for node, reason in stay.items()},
            [(sorted(place[node] for node in nodes), _dated(one, date)) for nodes, one in tried.items()],
            {**self.looked_up, **({} if before is None else before.records)},
        )
        plain = msgspec.to_builtins(found, str_keys=True)
        self._store.add_scores(text.fingerprint(model), samples_fingerprint(samples), "", {self._measure: plain})


def _dated(tried: Tried, date: str) -> Tried:
    return replace(tried, evidence=msgspec.structs.replace(tried.evidence, date=tried.evidence.date or date))


@cache
def _sources() -> str:
    """SHA-256, in hex, of the code that compiles and measures: other code may be faster or slower."""
    state = hashlib.sha256()
    for file in (*sorted(Path(__file__).parent.rglob("*.py")), Path(timing.__file__)):
        state.update(file.read_bytes())
    return state.hexdigest()
