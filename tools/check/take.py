"""Take a model's lock: what it is, what it holds and what it computes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as oir

from burnish.ir.canonical import Canonical, Order, canonical
from burnish.ir.canonical import opsets as opsets_of
from burnish.ir.errors import InputError
from burnish.ir.walk import walk
from burnish.passes.prove import RANDOM
from burnish.tools.check import counts
from burnish.tools.check.lock import VERSION, Lock, SampleSet, SegmentLock, Sized
from burnish.tools.check.padding import Padding

if TYPE_CHECKING:
    from burnish.backends.ort.session import OrtRunner
    from burnish.ir.samples import Sample


@dataclass(frozen=True)
class Request:
    """What is wanted besides what the graph says.

    Attributes:
        data: samples, as for `burnish.frontends.samples.read_samples`; None for made ones.
        metric: a name of `burnish.passes.measure_choice`, a function of outputs and labels, or its name; None for what
            the labels of the samples suggest, and no metric without labels.
        latency: time the model against a reference matrix product.
        run: run the model at all; nothing is known of what it computes when not.
        threads: inside an operator, of what is run.
    """

    data: Any = None
    metric: Any = None
    latency: bool = False
    run: bool = True
    threads: int = 1


def take(model: oir.Model, request: Request | None = None, known: Lock | None = None) -> Lock:
    """The lock of a model, which is not changed.

    Args:
        model: the model as read.
        request: what is wanted.
        known: an older lock. What follows from what did not change since is taken from it, and samples are made from
            the roles that it recorded, so that another spelling of the same model gets the same inputs.

    Raises:
        InputError: the samples cannot be read or made, the model cannot be run on any of them, or is not valid ONNX.
    """
    try:
        return _take(model, request, known)
    except (InputError, MemoryError, OSError):
        raise
    except Exception as error:  # a graph that contradicts itself can make any rule about graphs fail
        reason = _invalid(model)
        if not reason:
            raise
        raise InputError(f"this is not valid ONNX: {reason}", hint="export it again; no runtime can load it") from error


def _invalid(model: oir.Model) -> str:
    """Why ONNX's own checker refuses a model; empty when it does not, or cannot say."""
    import onnx

    try:
        onnx.checker.check_model(oir.serde.serialize_model(model), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return " ".join(str(error).split())
    except Exception:
        return ""
    return ""


def _take(model: oir.Model, request: Request | None, known: Lock | None) -> Lock:
    from burnish import __version__

    asked = request if request is not None else Request()
    with _running(model, asked) as runner:
        reading = canonical(model)  # while a session holds the weights: nobody reads them a second time
        ran = _Ran(model, runner, asked, known) if runner is not None else None
    inputs, outputs, opsets = counts.types(model.graph.inputs), counts.types(model.graph.outputs), counts.opsets(model)
    alike = known is not None and known.structure == reading.structure_fingerprint
    ports = known is not None and (known.inputs, known.outputs, known.opsets) == (inputs, outputs, opsets)
    at = _numbers(model, asked, ran, known if ports else None)
    if known is not None and alike and ports and (known.sizes.parameters, known.sizes.bytes) == counts.stored(model):
        sizes, views, passes = known.sizes, known.views, known.passes
        code, segments = known.code, known.segments
        if known.weights != reading.full_fingerprint:
            code, segments = _segments(model, reading)
    else:
        sizes, views, passes, code, segments = _derived(model, reading, at)
    return Lock(
        lock=VERSION,
        made_with=__version__,
        inputs=inputs,
        outputs=outputs,
        opsets=opsets,
        structure=reading.structure_fingerprint,
        weights=reading.full_fingerprint,
        sizes=sizes,
        operators=counts.operators(model),
        views=views,
        passes=passes,
        metric=ran.metric if ran is not None else None,
        latency=ran.latency if ran is not None else None,
        code=code,
        segments=segments,
        samples=ran.set if ran is not None else None,
        values=ran.values.locks() if ran is not None else [],
    )


@contextmanager
def _running(model: oir.Model, asked: Request) -> Iterator[OrtRunner | None]:
    """A session of the model, where it is wanted; that it cannot run is an error that says what can be done."""
    if not asked.run:
        yield None
        return
    from burnish.backends.ort.session import executor

    try:
        with closing(executor(threads=asked.threads)(model)) as runner:
            yield runner
    except InputError as error:
        if error.hint is None or "--verify" in error.hint:
            error.hint = "lock what the graph says alone with `--no-run`"
        raise


_Derived = tuple[Sized, dict[str, int], dict[str, int], dict[str, list[str]], list[SegmentLock]]


def _derived(model: oir.Model, reading: Canonical, at: Mapping[str, int]) -> _Derived:
    """What follows from the graph, found in a copy in canonical order so that the order of the file does not count."""
    from burnish.ir.views.blocks import stacks

    copy = _in_order(model, reading)
    views = counts.views(copy, stacks(copy).blocks)
    return counts.sizes(copy, at), views, counts.passes(copy), *_segments(model, reading)


def _segments(model: oir.Model, reading: Canonical) -> tuple[dict[str, list[str]], list[SegmentLock]]:
    from burnish.ir.segments import segments
    from burnish.tools.check.weights import code_of, locks_of

    found = segments(model, reading)
    return code_of(found), locks_of(found)


def _in_order(model: oir.Model, reading: Canonical) -> oir.Model:
    """A copy whose nodes are in canonical order; weights are shared."""
    from burnish.ir.walk import graphs

    copy, order = model.clone(), Order(reading.structure, opsets_of(model))
    for graph, other in zip(list(graphs(model)), list(graphs(copy)), strict=True):
        twins = dict(zip(graph, other, strict=True))
        ordered = [twins[node] for node in order.of(graph)]
        other.remove(twins.values())
        other.extend(ordered)
    return copy


def _numbers(model: oir.Model, asked: Request, ran: _Ran | None, known: Lock | None) -> dict[str, int]:
    """Numbers for the dynamic dimensions: those counted with before, else those of the first sample."""
    from burnish.ir.concrete import open_dims
    from burnish.ir.cost import dims_of

    if known is not None:
        return known.sizes.at
    names = open_dims(model, {})
    if not names:
        return {}
    try:
        first = ran.first if ran is not None else samples_of(model, asked.data, None)[0]
    except InputError:
        return {}
    found = dims_of(model, first.feeds)
    return {name: found[name] for name in names if name in found}


def samples_of(model: oir.Model, data: Any, known: Lock | None) -> list[Sample]:
    """The samples that a model is run on, those that are given by names without the folder that they lie in.

    Args:
        model: what they are for.
        data: as in `Request`.
        known: the lock whose roles made samples are made from.
    """
    from burnish.frontends import samples, synthesis
    from burnish.tools.check.recorded import roles_of

    if data is None:
        return synthesis.synthesise(model, meanings=roles_of(known, model))
    found = samples.read_samples(data, model)
    if not isinstance(data, str | os.PathLike):
        return found
    folder = f"{Path(data) if Path(data).is_dir() else Path(data).parent}{os.sep}"
    return [replace(one, name=one.name.removeprefix(folder)) for one in found]


class _Ran:
    """A model run once on all samples.

    Attributes:
        set: what it was run on.
        first: the first sample that it took.
        values: what it computed.
        metric, latency: as far as asked for.
    """

    def __init__(self, model: oir.Model, runner: OrtRunner, asked: Request, known: Lock | None) -> None:
        from burnish.frontends.synthesis import usable
        from burnish.tools.check.measured import Metered, latency
        from burnish.tools.check.outputs import Values, fingerprint
        from burnish.tools.check.recorded import recorded

        samples = samples_of(model, asked.data, known)
        given = asked.data is not None
        self._runner, self._by_feeds = runner, {id(one.feeds): one for one in samples}
        self._meter = Metered(model, samples, asked)
        self._random = bool(walk(model, *RANDOM, "Dropout"))
        self._roles = recorded(model, known)
        self.values = Values()
        kept, refused = self._all(samples) if given else usable(samples, self)
        self.first = kept[0]
        self.metric = self._meter.lock()
        self.latency = latency(runner, self.first, asked.threads) if asked.latency else None
        self.set = SampleSet(
            given=given,
            fingerprint=fingerprint(samples),
            roles=self._roles,
            refused=len(refused),
        )

    def _all(self, samples: Sequence[Sample]) -> tuple[list[Sample], list[tuple[Sample, str]]]:
        """The given samples that the model takes, and the others."""
        kept: list[Sample] = []
        refused: list[tuple[Sample, str]] = []
        for sample in samples:
            try:
                self.run(sample.feeds)
            except InputError as error:
                refused.append((sample, error.cause.splitlines()[0]))
            else:
                kept.append(sample)
        if not kept:
            sample, reason = refused[0]
            hint = "give inputs that it takes with `--data`"
            raise InputError(f"the model refuses every sample; first ({sample.name}): {reason}", hint=hint)
        return kept, refused

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """The outputs on a sample, by name; they are noted."""
        outputs = self._runner.run(feeds)
        again = self._runner.run(feeds) if self._random else None
        sample = self._by_feeds[id(feeds)]
        self.values.add(sample.name, outputs, Padding(feeds, self._roles), again)
        self._meter.add(outputs, sample)
        return outputs
