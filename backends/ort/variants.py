"""Variants of one model in sessions beside each other, which share the weights that they have in common.

What shares memory was measured in ONNX Runtime 1.32 on the CPU. A session uses weights where they are when they are
lent to it as external data in memory, or given with `add_initializer`; `add_external_initializers` copies them. But
kernels of products then make a packed copy of their own. C programs can share these in a `PrepackedWeightsContainer`,
which the Python module does not have. Two ways are left: sessions that pack nothing, which are slower, and packed
weights in files (`backends.ort.prepared`), which the system maps once for all.
"""

from __future__ import annotations

import os
import weakref
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import onnx
import onnx_ir as oir

from burnish.backends.delta.manifest import File, Model
from burnish.backends.delta.reading import Pack
from burnish.backends.ort.prepared import Prepared
from burnish.backends.ort.session import Level, OrtRunner, executor
from burnish.ir import wire
from burnish.ir.errors import InputError
from burnish.ir.payloads import StoredFile


class Variants:
    """The models of a pack, to be loaded beside each other.

    Weights of the base are mapped once, from the pack. What a variant changed is held once for all runners that use it,
    and freed with the last of them. Weights of the main graph are shared: those in branches, functions and Constant
    nodes, and those of fewer than 8 bits an element, are copied for each session.

    Args:
        path: the folder that `burnish delta` wrote.
        base: the files of the base (`burnish.frontends.stored.read`), for a pack without it.
        threads: threads inside an operator.
        level: ONNX Runtime's own graph optimizations.
        prepared: a folder for packed weights. The first time a variant is loaded it is written there as ONNX Runtime
            optimizes it, with what the base does not have. Sessions map these files, run as fast as any, and take no
            memory of their own for what they share. It is made anew for another pack, processor or ONNX Runtime.
            Without it nothing is written, and products are slower, since weights are not packed.

    Raises:
        InputError: it is no pack.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        base: Sequence[StoredFile] | None = None,
        *,
        threads: int = 1,
        level: Level = "all",
        prepared: str | os.PathLike[str] | None = None,
    ) -> None:
        self._pack = Pack(path, base)
        self._held: weakref.WeakValueDictionary[int, _Held] = weakref.WeakValueDictionary()
        self._execute = executor(threads=threads, level=level, packed=False)
        self._prepared: Prepared | None = None
        if prepared is not None:
            self._prepared = Prepared(Path(prepared), self._pack, self.names, self.model, threads=threads, level=level)

    @property
    def names(self) -> tuple[str, ...]:
        """The base, where the pack has it, and the variants."""
        found = self._pack.manifest
        return tuple(one.name for one in (*([found.base] if found.has_base else []), *found.variants))

    def load(self, name: str) -> OrtRunner:
        """A runner of a model of the pack.

        Raises:
            InputError: there is no such model, the pack is damaged or for another base, or ONNX Runtime cannot load it.
        """
        if self._prepared is not None:
            return self._prepared.load(self._find(name).name)
        used: list[_Held] = []
        runner = self._execute(self._model(name, used))
        runner.keep(used)
        return runner

    def model(self, name: str) -> oir.Model:
        """A model of the pack, made of the shared weights, which must not be written to. Raises as `load` does."""
        used: list[_Held] = []
        made = self._model(name, used)
        made.graph.meta["burnish.held"] = used
        return made

    def _find(self, name: str) -> Model:
        return self._pack.manifest.model(name, str(self._pack.folder))

    def _model(self, name: str, used: list[_Held]) -> oir.Model:
        model = self._find(name)
        self._pack.check_base(model)
        files = {file.path: _Virtual(file, rest, self) for file, rest in self._pack.graphs(model)}
        main = files[model.files[0].path]
        try:
            data, _ = wire.weightless(cast(bytes, main))  # it reads places only
            made: oir.Model = oir.from_proto(onnx.ModelProto.FromString(data))
            for value in made.graph.initializers.values():
                if isinstance(value.const_value, oir.ExternalTensor):
                    location = os.fspath(value.const_value.location)
                    written = os.path.normpath(location).replace(os.sep, "/")
                    source = main if location == wire.INLINE else files[written]
                    value.const_value = self._tensor(source, value.const_value, used)
        except InputError:
            raise
        except Exception as error:  # the libraries raise whatever they like for what is no model
            cause = f"the model `{name}` cannot be understood: {type(error).__name__}"
            raise InputError(cause, place=str(self._pack.folder), hint="rebuild it with `burnish delta`") from error
        return made

    def _tensor(self, source: _Virtual, stored: oir.ExternalTensor, used: list[_Held]) -> oir.TensorProtocol:
        """The tensor of an initializer: shared where the pack holds it as one."""
        kind, shape, offset, size = stored.dtype, stored.shape, stored.offset or 0, stored.nbytes
        index = source.tensors.get(offset)
        if index is not None and self._pack.manifest.tensors[index].bytes == size:
            used.append(self.held(index))
            values = used[-1].values
        else:
            values = np.frombuffer(source.read(offset, offset + size), np.uint8)
        if kind.bitwidth < 8:
            return oir.PackedTensor(values, kind, shape=shape, name=stored.name)
        array = values.view(np.dtype(kind.numpy()).newbyteorder("<")).reshape(shape.numpy())
        return oir.Tensor(array, dtype=kind, shape=shape, name=stored.name)

    def held(self, index: int) -> _Held:
        """The bytes of a tensor, which stay as long as what is given back."""
        found = self._held.get(index)
        if found is None:
            found = self._held[index] = _Held(np.frombuffer(self._pack.tensor(index), np.uint8))
        return found

    def size(self, index: int) -> int:
        """How many bytes a tensor has."""
        return self._pack.manifest.tensors[index].bytes


class _Held:
    """The bytes of a tensor, held by the runners that use them."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values


class _Virtual:
    """A file of a model that can be read in places, as if it were there.

    Args:
        file: what it is made of.
        rest: its bytes that are no tensors, one after the other.
        source: gives the tensors.

    Attributes:
        tensors: the index of the tensor that begins at an offset.
    """

    def __init__(self, file: File, rest: bytes, source: Variants) -> None:
        self.tensors: dict[int, int] = {}
        self._pieces, self._rest, self._source = file.pieces, rest, source
        self._starts, self._taken = list[int](), list[int]()
        position = taken = 0
        for place, number in enumerate(file.pieces):
            self._starts.append(position)
            self._taken.append(taken)
            if place % 2:
                self.tensors[position] = number
                position += source.size(number)
            else:
                position, taken = position + number, taken + number
        self._size = position

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, where: int | slice) -> int | bytes:
        if isinstance(where, int):
            return self.read(where, where + 1)[0]
        start, end, _ = where.indices(self._size)
        return self.read(start, end)

    def read(self, start: int, end: int) -> bytes:
        """The bytes from `start` to before `end`. Raises WireError where there are fewer."""
        found: list[bytes] = []
        while start < end:
            place = bisect_right(self._starts, start) - 1
            number, inside = self._pieces[place], start - self._starts[place]
            if place % 2:
                piece = self._source.held(number).values[inside : inside + end - start].tobytes()
            else:
                first = self._taken[place] + inside
                piece = self._rest[first : first + min(number - inside, end - start)]
            if not piece:
                raise wire.WireError("the file ends too early")
            found.append(piece)
            start += len(piece)
        return b"".join(found)
