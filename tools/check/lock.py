"""What a lock file holds: all that should not change unnoticed of a model, small enough to be reviewed."""

from __future__ import annotations

from typing import Annotated

import msgspec

VERSION = 1
"""Of the form of lock files. A file of an older one is brought up to date when it is read."""

SKETCH = 8
"""Numbers in a sketch (`burnish.tools.check.sketch`)."""


Count = Annotated[int, msgspec.Meta(ge=0)]
Size = Annotated[float, msgspec.Meta(ge=0)]


class Sized(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True, omit_defaults=True, rename="kebab"):
    """Counts of a model; multiply-adds and the peak of the activations hold for the dimensions in `at`.

    Attributes:
        nodes: of all graphs.
        parameters: elements of all constants, each once.
        bytes: of all constants, by dtype.
        multiply_adds: of one run; None when unknown.
        peak_activation: bytes of the activations that live at once; None when unknown.
        at: numbers that the dynamic dimensions of the inputs are counted with, by name or `INPUT.AXIS`.
    """

    nodes: Count
    parameters: Count
    bytes: dict[str, Count]
    multiply_adds: Count | None
    peak_activation: Count | None
    at: dict[str, Count] = {}


class LayerLock(
    msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True, omit_defaults=True, rename="kebab"
):
    """The weights that one node reads: those of more than one element that are no small integers.

    Attributes:
        line: the node's line in the code of its segment, from 0.
        name: the node's name, shown to people and not compared.
        weights: a hash of the bytes of all of them, 16 hexadecimal digits.
        norm: the root of the sum of their squares.
        sketch: of all of them as one vector; empty when they are no numbers.
    """

    line: Count
    name: str
    weights: str
    norm: Size
    sketch: tuple[float, ...]


class SegmentLock(
    msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True, omit_defaults=True, rename="kebab"
):
    """A segment (`burnish.ir.segments`): its name, the key of its lines in `Lock.code`, its hashes, its layers."""

    name: str
    code: str
    structure: str
    weights: str
    layers: list[LayerLock] = []


class SampleSet(
    msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True, omit_defaults=True, rename="kebab"
):
    """What the outputs were computed on.

    Attributes:
        given: whether the samples were given with `--data`; made from the model's meaning when not.
        fingerprint: of names, dtypes, shapes and bytes of all inputs of all samples.
        roles: what each input was taken to mean: fields of `burnish.frontends.roles.Role` that differ from their
            defaults. Samples are made anew from it, so that another spelling of the model gets the same, and masks say
            what of the outputs is padding.
        refused: how many of them the model itself refused; they count no further.
    """

    given: bool
    fingerprint: str
    roles: dict[str, dict[str, object]] = {}
    refused: Count = 0


class OutputLock(
    msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True, omit_defaults=True, rename="kebab"
):
    """One output on one sample. Of one that is another when the model runs again, only the type is kept.

    Attributes:
        type: dtype and shape: `float[2,10]`.
        mean, std, low, high: of its finite elements that are no padding (`burnish.tools.check.padding`), in float64; 0
            when there are none.
        finite: how many these are.
        sketch: of these in float64, others as 0; empty for strings, sequences and absent outputs.
        hash: of its bytes, for outputs that are no floating point; empty otherwise.
    """

    type: str
    mean: float = 0.0
    std: Size = 0.0
    low: float = 0.0
    high: float = 0.0
    finite: Count = 0
    sketch: tuple[float, ...] = ()
    hash: str = ""


class SampleLock(
    msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True, omit_defaults=True, rename="kebab"
):
    """The outputs on one sample, by name."""

    sample: str
    outputs: dict[str, OutputLock]


class MetricLock(
    msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True, omit_defaults=True, rename="kebab"
):
    """The value of a metric on all samples, and whether more of it is better."""

    name: str
    value: float
    higher_is_better: bool


class LatencyLock(
    msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True, omit_defaults=True, rename="kebab"
):
    """Time of a run over the time of a reference matrix product in the same process; an interval, and what was run."""

    ratio: Size
    low: Size
    high: Size
    sample: str
    reference: str


class Lock(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True, omit_defaults=True, rename="kebab"):
    """A model as its lock file has it. Names of nodes and values are labels for people and never compared.

    Attributes:
        lock: the version of the form.
        made_with: the version of burnish.
        inputs, outputs: types by name, in order: `float[batch,3]`.
        opsets: version by domain, `ai.onnx` for the standard one.
        sizes: see `Sized`.
        operators: nodes of all graphs by operator.
        views: how many blocks, attention layers, caches, linear layers, convolutions, norms and so on there are.
        structure: the structure fingerprint (`burnish.ir.canonical`); what is derived from structure alone cannot
            differ where it does not.
        weights: the full fingerprint, weights included.
        code: the lines of the segments; segments of equal structure share one key.
        segments: in order.
        passes: rewrites by pass of the default recipe, those that fired only.
        samples, values: outputs on samples; None and empty when nothing was run.
        metric, latency: as far as asked for.
    """

    lock: int
    made_with: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    opsets: dict[str, Count]
    structure: str
    weights: str
    sizes: Sized
    operators: dict[str, Count]
    views: dict[str, Count]
    passes: dict[str, Count]
    metric: MetricLock | None = None
    latency: LatencyLock | None = None
    code: dict[str, list[str]]
    segments: list[SegmentLock]
    samples: SampleSet | None = None
    values: list[SampleLock] = []
