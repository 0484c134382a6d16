"""Scoring in several processes: Ray actors, here or on a cluster, each of which holds the model and the samples."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as oir

from burnish.ir import weights
from burnish.ir.errors import InputError, MissingPackageError
from burnish.ir.text import structure_fingerprint
from burnish.ir.walk import graphs
from burnish.passes.protocols import Executor
from burnish.passes.scoring import Bench, Edits, Job, Score

_LOSSES = 3
"""So many times the number of workers may be lost before that is an error."""


class Workers:
    """A `burnish.passes.scoring.Spread` over Ray actors; they live until `close`, and serve one job at a time.

    The scores are those of one process, bit for bit, on machines whose kernels compute the same. What a lost worker was
    at is scored by another one.
    """

    def __init__(self, where: str, execute: Callable[[], Executor]) -> None:
        """Nothing is started yet.

        Args:
            where: the number of processes on this machine, or `ray://HOST:PORT` of a cluster on which burnish is
                installed; there is an actor for each of its CPUs.
            execute: makes what makes runners; it is called in the workers.

        Raises:
            InputError: `where` is neither.
        """
        number = int(where) if where.isdecimal() else 0
        if number < 1 and not where.startswith("ray://"):
            raise InputError(
                f"`{where}` says neither how many workers nor where they are",
                hint="give a number, or the address of a cluster as in `ray://host:10001`",
            )
        self.where, self.number, self.execute = where, number, execute
        self._ray: Any = None
        self._started = False
        self._job: Job | None = None
        self._load: Any = None
        self._actors: list[Any] = []

    def __call__(self, job: Job, plans: Sequence[Edits]) -> Iterator[tuple[int, Score]]:
        """The scores as they come, each with the number of its plan.

        Raises:
            InputError: Ray cannot be started or reached, too many workers are lost, or what `Bench` raises.
        """
        self._start()
        if self._job is not job:
            self._stop_actors()
            self._job, self._load = job, self._ray.put((_pack(job), self.execute))
        while len(self._actors) < min(self.number, len(plans)):
            self._actors.append(self._actor())
        pending = list(reversed(range(len(plans))))
        running = {self._send(actor, pending, plans): actor for actor in self._actors if pending}
        return self._collect(running, pending, plans)

    def close(self) -> None:
        """Stop the actors, and Ray where it was started for them."""
        if self._ray is not None:
            self._stop_actors()
            if self._started:
                self._ray.shutdown()
            self._ray, self._job, self._load = None, None, None

    def _collect(
        self, running: dict[tuple[Any, int], Any], pending: list[int], plans: Sequence[Edits]
    ) -> Iterator[tuple[int, Score]]:
        lost = 0
        while running:
            numbers = {one: number for one, number in running}
            [done], _ = self._ray.wait(list(numbers), num_returns=1)
            number = numbers[done]
            actor = running.pop((done, number))
            try:
                found = self._ray.get(done)
            except self._ray.exceptions.RayActorError as error:
                lost += 1
                self._actors.remove(actor)
                if lost > _LOSSES * self.number:
                    cause = f"{lost} workers ended before their work was done: {str(error).splitlines()[0]}"
                    raise InputError(cause, hint="a worker may need more memory than there is: use fewer") from None
                pending.append(number)
                actor = self._actor()
                self._actors.append(actor)
            else:
                if isinstance(found, InputError):
                    raise found
                yield number, found
            if pending:
                running[self._send(actor, pending, plans)] = actor

    def _send(self, actor: Any, pending: list[int], plans: Sequence[Edits]) -> tuple[Any, int]:
        number = pending.pop()
        return actor.score.remote(plans[number]), number

    def _start(self) -> None:
        if self._ray is not None:
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError as error:
            cause = "spreading work needs Ray, which is not installed"
            raise MissingPackageError(cause, hint="pip install 'burnish[ray]'") from error
        if not ray.is_initialized():
            path = os.environ.get("PYTHONPATH")
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
            try:
                if self.number:
                    ray.init(num_cpus=self.number, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
                else:
                    ray.init(self.where, log_to_driver=False, logging_level="ERROR")
            except Exception as error:
                cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise InputError(f"Ray does not start: {cause}", place=self.where, hint="check the address") from error
            finally:
                if path is None:
                    del os.environ["PYTHONPATH"]
                else:
                    os.environ["PYTHONPATH"] = path
            self._started = True
        self._ray = ray
        if not self.number:
            self.number = max(1, int(ray.cluster_resources().get("CPU", 1)))

    def _actor(self) -> Any:
        return self._ray.remote(num_cpus=1, max_restarts=0)(_Actor).remote(self._load)

    def _stop_actors(self) -> None:
        for actor in self._actors:
            with suppress(Exception):
                self._ray.kill(actor)
        self._actors.clear()


class _Actor:
    """One worker."""

    def __init__(self, load: tuple[_Packed, Callable[[], Executor]]) -> None:
        self.packed, self.execute = load
        self.bench: Bench | None = None

    def score(self, plan: Edits) -> Score | InputError:
        """The score of a plan, or what is wrong with the job."""
        try:
            if self.bench is None:
                self.bench = Bench(_unpack(self.packed), self.execute())
            return next(iter(self.bench.scores([plan])))
        except InputError as error:
            return InputError(error.cause, place=error.place, hint=error.hint)


@dataclass(frozen=True)
class _Packed:
    """A job that can travel: its model without the weights, and these, in float64 where they are `unrounded`."""

    structure: bytes
    arrays: list[np.ndarray]
    unrounded: list[bool]
    fingerprint: str
    job: Job


def _held(model: oir.Model) -> list[oir.Value]:
    """The initializers whose values travel apart."""
    values = (value for graph in graphs(model) for value in graph.initializers.values())
    return [v for v in values if v.const_value is not None and v.const_value.dtype != oir.DataType.STRING]


def _pack(job: Job) -> _Packed:
    tensors = {value: value.const_value for value in _held(job.model)}
    arrays, unrounded = [], []
    try:
        for value, tensor in tensors.items():
            assert tensor is not None
            exact = weights.unrounded_values(tensor)
            arrays.append(np.asarray(tensor.numpy()) if exact is None else exact)
            unrounded.append(exact is not None)
            shape = oir.Shape(tensor.shape.numpy())
            value.const_value = oir.ExternalTensor("apart", 0, 0, tensor.dtype, shape=shape, name=str(value.name))
        structure = oir.serde.serialize_model(job.model).SerializeToString()
    finally:
        for value, tensor in tensors.items():
            value.const_value = tensor
    rest = replace(job, model=oir.Model(oir.Graph([], [], nodes=[]), ir_version=10), samples=list(job.samples))
    return _Packed(structure, arrays, unrounded, structure_fingerprint(job.model), rest)


def _unpack(packed: _Packed) -> Job:
    import onnx

    model = oir.serde.deserialize_model(onnx.ModelProto.FromString(packed.structure))
    for value, array, unrounded in zip(_held(model), packed.arrays, packed.unrounded, strict=True):
        assert value.const_value is not None
        dtype = value.const_value.dtype
        made = weights.rounded(array, dtype) if unrounded else oir.Tensor(array, dtype=dtype)
        made.name = value.name
        value.const_value = made
    if structure_fingerprint(model) != packed.fingerprint:
        raise InputError(
            "a worker reads the model otherwise than it was written", hint="install the same packages there"
        )
    return replace(packed.job, model=model)
