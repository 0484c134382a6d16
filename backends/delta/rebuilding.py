"""Put a model of a pack back into files: whole and compared with their digests, or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from hashlib import sha256
from pathlib import Path

from burnish.backends import onnx_writer
from burnish.backends.aside import put_right, temporary_folder
from burnish.backends.delta.manifest import File, Model
from burnish.backends.delta.reading import Pack
from burnish.backends.folders import sync
from burnish.ir.errors import InputError


def rebuild(pack: Pack, name: str, target: Path, *sources: Path) -> list[Path]:
    """Write the files of a model as they were when it was packed, byte for byte.

    The model is written to `target`, and replaces what is there. Its external data are written beside it under the
    names that the model has for them; a file with other bytes that is there stays, and nothing is written.

    Args:
        pack: the pack.
        name: of the base or a variant.
        target: the `.onnx` file.
        sources: files that must not be replaced.

    Returns:
        The files of the model, the model first.

    Raises:
        InputError: there is no such model, the pack is damaged or for another base, or a file cannot be written.
    """
    model = pack.manifest.model(name, str(pack.folder))
    pack.check_base(model)
    onnx_writer.check_target(target, *sources, *pack.folder.iterdir())
    places = {file.path: target.parent / file.path for file in model.files[1:]} | {model.files[0].path: target}
    if len(set(places.values())) < len(model.files):
        hint = "give the model another name"
        raise InputError("the model would have the name of its own external data", place=str(target), hint=hint)
    there = {file.path for file in model.files[1:] if _is_there(file, places[file.path], target.parent)}
    needed, free = sum(file.bytes for file in model.files), shutil.disk_usage(target.parent).free
    if needed > free:
        cause = f"the model has {needed} bytes, and there is room for {free}"
        raise InputError(cause, place=str(target), hint="free some space, or write to another disk")
    try:
        put_right(target.parent)
        with temporary_folder(target.parent) as folder:
            _fill(pack, model, folder)
            _place(model, folder, places, there)
    except OSError as error:
        reason = error.strerror or "the disk is full or a limit on file sizes was reached"
        hint = "check the path and the disk; nothing was written"
        raise InputError(f"the model cannot be written: {reason}", place=str(target), hint=hint) from error
    return [places[file.path] for file in model.files]


def _fill(pack: Pack, model: Model, folder: Path) -> None:
    for number, (_, content) in enumerate(pack.files(model)):
        with open(folder / str(number), "xb") as stream:
            for block in content:
                stream.write(block)
            stream.flush()
            os.fsync(stream.fileno())


def _place(model: Model, folder: Path, places: dict[str, Path], there: set[str]) -> None:
    """Move external data to their names, then the model; on failure take them away again."""
    moved: list[Path] = []
    try:
        for number, file in reversed(list(enumerate(model.files))):
            place = places[file.path]
            if file.path in there:
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            if number and place.exists():  # somebody made it meanwhile
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(place))
            os.replace(folder / str(number), place)
            if number:
                moved.append(place)
        for parent in {place.parent for place in places.values()}:
            sync(parent)
    except BaseException:
        for place in moved:
            with contextlib.suppress(OSError):
                place.unlink()
        raise


def _is_there(file: File, place: Path, root: Path) -> bool:
    """Whether a file of these bytes is at its place already. Raises InputError when something else is."""
    above = place.parent
    while above != root:
        if above.is_symlink() or (above.exists() and not above.is_dir()):
            raise InputError("there is something that is no folder of its own", place=str(above), hint=_ELSEWHERE)
        above = above.parent
    if not place.is_symlink() and not place.exists():
        return False
    if place.is_file() and not place.is_symlink() and place.stat().st_size == file.bytes:
        with open(place, "rb") as stream:
            digest = sha256()
            while block := stream.read(1 << 20):
                digest.update(block)
        if digest.hexdigest() == file.sha256:
            return True
    cause = "there is another file with the name of the model's external data, which another model may need"
    raise InputError(cause, place=str(place), hint=_ELSEWHERE)


_ELSEWHERE = "write to a folder of its own, or remove it"
