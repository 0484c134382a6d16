"""Write .onnx files whole or not at all, without copying their weights in memory."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_ir as oir

from burnish.backends.aside import BEFORE, put_right, temporary_folder
from burnish.ir import origin
from burnish.ir.errors import InputError
from burnish.ir.walk import graphs, walk
from burnish.ir.wire import encode_varint

LARGEST_INLINE = (1 << 31) - 1
"""The largest protobuf message, in bytes."""

_SMALL = 1024
_PAGE = 4096
_BLOCK = 1 << 20
"""Bytes written at a time. A file that is written in small pieces, or copied by the kernel, lies in the page cache in
small pages, and ONNX Runtime takes up to 15 % longer to load it."""
_RAW_DATA_TAG, _INITIALIZER_TAG, _GRAPH_TAG = b"\x4a", b"\x2a", b"\x3a"


@dataclass(frozen=True)
class Staged:
    """A model written into a temporary folder beside its target, not yet visible under its name.

    Attributes:
        path: the .onnx file to open for verification; its external data lie next to it, under their final name.
        data: the external data file, or None.
        target: where `commit` moves the model.
    """

    path: Path
    data: Path | None
    target: Path

    def commit(self) -> list[Path]:
        """Move the files to their final names; on failure what was there before is put back.

        Returns:
            The model file, and the external data file where there is one.

        Raises:
            InputError: the files cannot be moved.
        """
        folder = self.target.parent
        final_data = folder / self.data.name if self.data is not None else None
        before = self.path.parent / BEFORE / (final_data or self.target).name
        try:
            if self.data is not None and final_data is not None:
                if final_data.exists():
                    before.parent.mkdir()
                    os.replace(final_data, before)
                os.replace(self.data, final_data)
            os.replace(self.path, self.target)
        except BaseException as error:
            if self.data is not None and final_data is not None and self.path.exists():
                if not self.data.exists():
                    final_data.unlink()
                if before.exists():
                    os.replace(before, final_data)
            if isinstance(error, OSError):
                raise _write_error(error, self.target) from error
            raise
        _sync(folder)
        return [self.target] if final_data is None else [self.target, final_data]


def write(
    model: oir.Model, path: str | os.PathLike[str], *, external: bool | None = None, limit: int = LARGEST_INLINE
) -> list[Path]:
    """Write `model` to `path`, whole or not at all; the same model gives the same bytes.

    Args:
        model: the model; not changed.
        path: the .onnx file; replaced when it exists.
        external: put the weights into `<name>.data`; by default when the model was read from such a file or exceeds
            `limit`.
        limit: bytes above which weights cannot be inside the file.

    Returns:
        The files that were written, the model first.

    Raises:
        InputError: the target cannot be written, is a file that the model is read from, or the model is too large for
            one file.
    """
    with staged(model, path, external=external, limit=limit) as stage:
        return stage.commit()


@contextlib.contextmanager
def staged(
    model: oir.Model, path: str | os.PathLike[str], *, external: bool | None = None, limit: int = LARGEST_INLINE
) -> Iterator[Staged]:
    """`write` in two steps: the file can be opened and verified as `.path` before `.commit()` gives it its name.

    Without a commit, or on any error or interrupt, nothing is left behind. What a killed process left is removed by the
    next one that writes into that folder.
    """
    target = Path(path)
    use_data = _wants_data_file(model, external, limit, target)
    data_name = f"{target.name}.data" if use_data else None
    for name in (target.name, data_name):
        if name is not None:
            check_target(target.with_name(name) if target.name else target, *origin.files(model))
    with contextlib.ExitStack() as stack:
        try:
            put_right(target.parent)
            folder = stack.enter_context(temporary_folder(target.parent))
            stage = Staged(folder / target.name, folder / data_name if data_name else None, target)
            _write_files(model, stage.path, stage.data, limit)
        except OSError as error:
            raise _write_error(error, target) from error
        yield stage


def _wants_data_file(model: oir.Model, external: bool | None, limit: int, target: Path) -> bool:
    tensors = _tensors(model)
    if external:
        return True
    size = sum(tensor.nbytes for tensor in tensors if tensor.dtype != oir.DataType.STRING)
    if external is None:
        return size + _PAGE > limit or any(isinstance(tensor, oir.ExternalTensor) for tensor in tensors)
    if size + _PAGE > limit:
        raise _too_large(target, size)
    return False


def _too_large(target: Path, size: int) -> InputError:
    cause = f"the weights have {size / 2**30:.1f} GiB, more than fits into one .onnx file"
    return InputError(cause, place=str(target), hint="allow an external data file")


def _tensors(model: oir.Model) -> list[oir.TensorProtocol]:
    """The tensors of all initializers."""
    values = [value for graph in graphs(model) for value in graph.initializers.values()]
    return [value.const_value for value in values if value.const_value is not None]


def check_target(target: Path, *sources: Path | None) -> None:
    """Check, before any work is done, that `target` can be written and is none of the `sources`.

    Raises:
        InputError: its folder is missing or closed, it is not a regular file, or it is a source.
    """
    place, folder = str(target), target.parent
    try:
        if not target.name:
            raise InputError("the output has no file name", place=place, hint="give the name of an .onnx file to write")
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is not a folder", place=place, hint="write to a folder")
        if not folder.is_dir():
            cause = f"the folder {folder} does not exist"
            raise InputError(cause, place=place, hint=f"create it: mkdir -p {folder}")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if not target.exists():
            return
        if not stat.S_ISREG(target.stat().st_mode):
            kind = "a folder" if target.is_dir() else "not a regular file"
            raise InputError(f"the output is {kind}", place=place, hint="give the name of an .onnx file to write")
        if any(source is not None and source.exists() and target.samefile(source) for source in sources):
            cause = "the output is the model that is being read, or a part of it"
            raise InputError(cause, place=place, hint="give another name: the original is never touched")
    except OSError as error:
        raise _write_error(error, target) from error


def _write_files(model: oir.Model, path: Path, data_path: Path | None, limit: int) -> None:
    with _weightless(model, data_path) as placed:
        proto = oir.to_proto(model)
    if data_path is not None:
        with open(data_path, "xb") as stream:
            for start, tensor in placed:
                stream.write(b"\0" * (start - stream.tell()))
                _copy(tensor, stream)
            _finish(stream)
        with open(path, "xb") as stream:
            stream.write(proto.SerializeToString(deterministic=True))
            _finish(stream)
    else:
        with open(path, "xb") as stream:
            _write_inline(proto, iter([tensor for _, tensor in placed]), stream, limit, path)
            _finish(stream)


@contextlib.contextmanager
def _weightless(model: oir.Model, data_path: Path | None) -> Iterator[list[tuple[int, oir.TensorProtocol]]]:
    """For the time of the body, put stand-ins in the place of large weights, and have no other tensor on disk.

    Yields:
        The offset in the data file and the tensor of every stand-in, in the order in which they are written.
    """
    placed: list[tuple[int, oir.TensorProtocol]] = []
    kept: list[tuple[oir.Value, oir.TensorProtocol]] = []
    attributes: list[tuple[oir.Node, str, oir.Attr]] = []
    position = 0
    try:
        for graph in graphs(model):
            for value in graph.initializers.values():
                tensor = value.const_value
                if tensor is None:
                    continue
                kept.append((value, tensor))
                movable = data_path is not None or graph is model.graph
                if movable and tensor.dtype != oir.DataType.STRING and tensor.nbytes > _SMALL:
                    position = -(-position // _PAGE) * _PAGE if tensor.nbytes >= _PAGE else -(-position // 64) * 64
                    placed.append((position, tensor))
                    value.const_value = oir.ExternalTensor(
                        data_path.name if data_path is not None else "inline", position, tensor.nbytes, tensor.dtype,
                        shape=oir.Shape(tensor.shape.numpy()), name=value.name or "", doc_string=tensor.doc_string,
                        metadata_props=dict(tensor.metadata_props),
                    )  # fmt: skip
                    position += tensor.nbytes
                elif isinstance(tensor, oir.ExternalTensor):
                    value.const_value = oir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=value.name)
        for node in walk(model):
            for name, attribute in list(node.attributes.items()):
                if isinstance(attribute.value, oir.ExternalTensor):
                    attributes.append((node, name, attribute))
                    tensor = attribute.value
                    node.attributes[name] = oir.AttrTensor(name, oir.Tensor(tensor.numpy(), dtype=tensor.dtype))
        yield placed
    finally:
        for value, tensor in kept:
            value.const_value = tensor
        for node, name, attribute in attributes:
            node.attributes[name] = attribute


def _write_inline(
    proto: onnx.ModelProto, tensors: Iterator[oir.TensorProtocol], stream: BinaryIO, limit: int, path: Path
) -> None:
    """Stream the message, with the weights in the places of their stand-ins.

    The fields of a protobuf message may come in any order: the initializers are written one by one after the rest.
    """
    pieces: list[tuple[bytes, oir.TensorProtocol | None]] = []
    for initializer in proto.graph.initializer:
        if initializer.data_location != onnx.TensorProto.EXTERNAL:
            content = initializer.SerializeToString(deterministic=True)
            pieces.append((_INITIALIZER_TAG + encode_varint(len(content)) + content, None))
            continue
        initializer.ClearField("external_data")
        initializer.ClearField("data_location")
        large = next(tensors)
        content = initializer.SerializeToString(deterministic=True) + _RAW_DATA_TAG + encode_varint(large.nbytes)
        pieces.append((_INITIALIZER_TAG + encode_varint(len(content) + large.nbytes) + content, large))
    del proto.graph.initializer[:]
    graph = proto.graph.SerializeToString(deterministic=True)
    proto.ClearField("graph")
    rest = proto.SerializeToString(deterministic=True)
    size = len(graph) + sum(len(head) + (tensor.nbytes if tensor is not None else 0) for head, tensor in pieces)
    head = rest + _GRAPH_TAG + encode_varint(size) + graph
    if len(head) - len(graph) + size > limit:
        raise _too_large(path, size)
    blocks = _Blocks(stream)
    blocks.write(head)
    for content, tensor in pieces:
        blocks.write(content)
        if tensor is not None:
            _copy(tensor, blocks)
    blocks.flush()


class _Blocks:
    """What is written to a stream, gathered to whole blocks that begin at multiples of their size."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._pending = bytearray()
        self._written = 0

    def write(self, content: bytes) -> int:
        """Take `content`; give the stream whole blocks only."""
        for start in range(0, len(content), _BLOCK):
            self._pending += content[start : start + _BLOCK]
            if len(self._pending) >= _BLOCK:
                self._written += self._stream.write(self._pending[:_BLOCK])
                del self._pending[:_BLOCK]
        return len(content)

    def tell(self) -> int:
        """Bytes taken so far."""
        return self._written + len(self._pending)

    def flush(self) -> None:
        """Give the stream what is left."""
        self._written += self._stream.write(self._pending)
        self._pending.clear()


def _copy(tensor: oir.TensorProtocol, stream: BinaryIO | _Blocks) -> None:
    start = stream.tell()
    if hasattr(tensor, "tofile"):
        tensor.tofile(stream)
    else:
        stream.write(tensor.tobytes())
    if stream.tell() - start != tensor.nbytes:
        raise OSError(errno.EIO, f"{stream.tell() - start} of {tensor.nbytes} bytes were written")


def _finish(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _sync(folder: Path) -> None:
    """Make the new names in `folder` survive a power cut, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


_HINTS = {
    errno.ENOSPC: "free some space, or write to another disk",
    errno.EDQUOT: "free some space, or write to another disk",
    errno.EFBIG: "raise the limit on file sizes (`ulimit -f`), or write to another disk",
    errno.EACCES: "write to a folder you own",
    errno.EPERM: "write to a folder you own",
    errno.EROFS: "write to another disk",
    errno.ENAMETOOLONG: "give a shorter name",
}


def _write_error(error: OSError, target: Path) -> InputError:
    # numpy reports a short write as an OSError without a number.
    reason = error.strerror or "the disk is full or a limit on file sizes was reached"
    hint = _HINTS.get(error.errno or errno.ENOSPC, "check the path and the disk; nothing was written")
    return InputError(f"the model cannot be written: {reason}", place=str(target), hint=hint)
