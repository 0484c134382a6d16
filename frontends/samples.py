"""Samples that the user gives: read, checked against the model's inputs, and refused with a reason.

What can be given: an `.npz` file, a folder of `.npz` and `.npy` files, `package.module:function`, a Hugging Face
`datasets` object, or any iterable of samples, dictionaries of arrays, or pairs of a dictionary and a label.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as oir

from burnish.frontends.arrays import LARGEST_BYTES, read_npy, read_npz
from burnish.frontends.dims import free_symbols, is_unnamed, symbol_of
from burnish.frontends.fill import numpy_dtype
from burnish.frontends.functions import function_named, is_function
from burnish.frontends.labels import GROUPS, LABELS, array_of, cut_like, groups_of, taken
from burnish.frontends.roles import required_inputs
from burnish.ir.errors import InputError
from burnish.ir.samples import Sample

_FORMS = "give an `.npz` file, a folder of `.npz` or `.npy` files, or `package.module:function`"


def read_samples(spec: str | Path | object, model: oir.Model) -> list[Sample]:
    """The samples that `spec` names, each with an array for every input of `model`, in the model's dtypes.

    An `.npz` file holds arrays named as the inputs and, if wanted, `labels` and `groups`: whole numbers or texts that
    tell for each sample, or each row of a batch, what it comes from. Arrays of the inputs' ranks are one sample (a
    batch of its own); arrays of one more axis are samples stacked along it; arrays for a model of a fixed batch `b`
    whose first axis is a multiple of `b` are cut into samples. In a folder, sorted by name, every file is read so; an
    `.npy` file holds the array of a model's only input. An array of a dictionary that lacks the batch axis gets one of
    length 1. Columns of a `datasets` object that are no inputs are ignored, elsewhere they are an error.

    Numbers are cast to the model's dtype where that keeps every value (int32 to int64, int64 to int32 when all fit,
    bool to integers) and from a wider to a narrower floating-point dtype; integers do not become floating point.

    Args:
        spec: see above. A function is imported from the current path, called without arguments, and may be a generator.
        model: whose inputs the samples must fit.

    Raises:
        InputError: nothing readable, not fitting (with the file, the sample and the input), none at all, or more than
            `arrays.LARGEST_BYTES`.
    """
    if isinstance(spec, (str, Path)):
        samples = list(_named(str(spec), model))
        place = str(spec)
    else:
        place = type(spec).__name__
        samples = _bounded(_rows(spec, model, place), place)
    if not samples:
        raise InputError("there are no samples", place=place, hint=_FORMS)
    return samples


def _named(spec: str, model: oir.Model) -> Iterator[Sample]:
    """The samples of a path or of a function's name."""
    path = Path(spec)
    if spec and path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".npz", ".npy"))
        yield from _bounded((sample for file in files for sample in _file(file, model)), spec)
    elif path.is_file():
        yield from _file(path, model)
    elif is_function(spec):
        yield from _bounded(_rows(_call(spec), model, spec), spec)
    else:
        raise InputError("there is no such file or folder", place=spec, hint=_FORMS)


def _bounded(samples: Iterable[Sample], place: str) -> list[Sample]:
    """All samples, unless they take more than `LARGEST_BYTES`: an endless generator must not fill the memory."""
    kept: list[Sample] = []
    total = 0
    for sample in samples:
        total += sum(array.nbytes for array in sample.feeds.values()) + 1
        if total > LARGEST_BYTES or len(kept) >= 1_000_000:
            raise InputError(
                f"the samples take more than {LARGEST_BYTES >> 30} GiB, or are more than a million",
                place=place,
                hint="a few hundred samples are enough; give fewer",
            )
        kept.append(sample)
    return kept


def _file(path: Path, model: oir.Model) -> list[Sample]:
    if path.suffix == ".npy":
        values = required_inputs(model)
        if len(values) != 1:
            raise InputError(
                f"an `.npy` file holds one array, the model has {len(values)} inputs",
                place=str(path),
                hint="write an `.npz` file with " + ", ".join(f"`{value.name}`" for value in values),
            )
        return _cut({str(values[0].name): read_npy(path)}, model, str(path))
    if path.suffix != ".npz":
        raise InputError(f"samples cannot be read from `{path.suffix or path.name}`", place=str(path), hint=_FORMS)
    arrays = read_npz(path)
    return _cut(arrays, model, str(path))


def _cut(arrays: dict[str, np.ndarray], model: oir.Model, place: str) -> list[Sample]:
    """The samples in a set of arrays: one, stacked ones, or a multiple of the model's fixed batch."""
    labels, groups = taken(arrays, LABELS, model), taken(arrays, GROUPS, model)
    groups = groups.reshape(()) if groups is not None and groups.size == 1 else groups
    values = _check_names(arrays, model, place)
    ranked = [value for value in values if value.shape is not None]
    extra = {arrays[str(value.name)].ndim - len(value.shape or ()) for value in ranked}
    counts = {arrays[str(value.name)].shape[0] if arrays[str(value.name)].ndim else 0 for value in values}
    if extra == {1} and len(values) == len(ranked):
        if len(counts) != 1:
            raise InputError(
                "the inputs hold different numbers of samples: "
                + ", ".join(f"`{v.name}` {arrays[str(v.name)].shape[0]}" for v in values),
                place=place,
                hint="the first axis of every array counts the samples",
            )
        parts = [{name: np.asarray(array[i]) for name, array in arrays.items()} for i in range(counts.pop())]
    else:
        parts = _fixed_batches(arrays, values, counts) or [arrays]
    wanted = len(parts) if len(parts) > 1 else next(iter(counts)) if len(counts) == 1 else None
    labelled = cut_like(labels, parts, extra == {1}, wanted, "labels", place)
    grouped = cut_like(groups, parts, extra == {1}, wanted, "groups", place)
    names = [place] if len(parts) == 1 else [f"{place}[{i}]" for i in range(len(parts))]
    each = zip(names, parts, labelled, grouped, strict=True)
    return [_sample(name, part, label, group, values, model) for name, part, label, group in each]


def _sample(
    name: str,
    arrays: Mapping[str, np.ndarray],
    labels: object,
    groups: object,
    values: list[oir.Value],
    model: oir.Model,
) -> Sample:
    """A sample of checked inputs, and of labels and groups, where there are any."""
    feeds = _fit(arrays, values, name)
    label = None if labels is None else array_of(labels, f"{name}, label")
    return Sample(name, feeds, label, None if groups is None else groups_of(groups, feeds, model, f"{name}, groups"))


def _fixed_batches(
    arrays: Mapping[str, np.ndarray], values: list[oir.Value], counts: set[int]
) -> list[dict[str, np.ndarray]] | None:
    """Arrays cut into the model's fixed batch, None when it has none or they are one such batch."""
    batches = {value.shape[0] if value.shape is not None and len(value.shape) else None for value in values}
    batch, count = next(iter(batches), None), next(iter(counts), 0)
    if (
        len(batches) != 1
        or len(counts) != 1
        or not isinstance(batch, int)
        or batch < 1
        or count <= batch
        or count % batch
    ):
        return None
    return [{name: array[i : i + batch] for name, array in arrays.items()} for i in range(0, count, batch)]


def _call(spec: str) -> object:
    """What the named function returns."""
    function = function_named(spec)
    try:
        return function()
    except (Exception, SystemExit) as error:
        raise InputError(f"the function failed: {type(error).__name__}: {error}", place=spec) from error


def _rows(source: object, model: oir.Model, place: str) -> Iterator[Sample]:
    """The samples of a `datasets` object or an iterable."""
    if isinstance(source, Mapping):
        raise InputError("found one dictionary, not several samples", place=place, hint="give a list of dictionaries")
    columns = getattr(source, "column_names", None)
    if columns is not None:
        if isinstance(columns, Mapping):
            raise InputError(
                "the data set has several splits", place=place, hint=f"choose one of {', '.join(map(str, columns))}"
            )
        names = [str(value.name) for value in required_inputs(model)]
        _check_names(dict.fromkeys(name for name in columns if name in names), model, place, among=list(columns))
    if not isinstance(source, Iterable):
        raise InputError(
            "the samples cannot be iterated over", place=place, hint="return a list of dictionaries, or yield them"
        )
    rows = iter(source)
    count = 0
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except (Exception, SystemExit) as error:
            raise InputError(f"reading sample {count} failed: {type(error).__name__}: {error}", place=place) from error
        yield _row(row, model, f"{place}[{count}]", only_inputs=columns is not None)
        count += 1


def _row(row: object, model: oir.Model, place: str, *, only_inputs: bool) -> Sample:
    """One sample of an iterable."""
    name, label, group = place, None, None
    if isinstance(row, Sample):
        name, label, group, row = row.name, row.labels, row.groups, row.feeds
    elif isinstance(row, (tuple, list)) and len(row) == 2 and isinstance(row[0], Mapping):
        row, label = row
    if not isinstance(row, Mapping):
        raise InputError(
            f"a sample is a {type(row).__name__}",
            place=place,
            hint="a sample is a dictionary of arrays, named as the inputs",
        )
    given = {str(key): item for key, item in row.items()}
    names = {str(value.name) for value in model.graph.inputs}
    labels, groups = taken(given, LABELS, model), taken(given, GROUPS, model)
    label, group = labels if label is None else label, groups if group is None else group
    if only_inputs:
        given = {key: item for key, item in given.items() if key in names}
    values = _check_names(given, model, place)
    feeds = {}
    for value in values:
        array = array_of(given[str(value.name)], f"{place}, input `{value.name}`")
        lacks_batch = value.shape is not None and array.ndim + 1 == len(value.shape)
        free = lacks_batch and value.shape is not None and (value.shape[0] == 1 or not isinstance(value.shape[0], int))
        feeds[str(value.name)] = array[None] if free else array
    return _sample(name, feeds, label, group, values, model)


def _check_names(
    given: Mapping[str, object], model: oir.Model, place: str, among: list[str] | None = None
) -> list[oir.Value]:
    """The inputs that are given, in the model's order, after checking that none is missing or unknown."""
    known = {str(value.name): value for value in model.graph.inputs}
    required = [str(value.name) for value in required_inputs(model)]
    spare = [name for name in (among if among is not None else given) if name not in known]
    for name in required:
        if name not in given:
            near = difflib.get_close_matches(name, spare, 1)
            hint = f"did you mean it by `{near[0]}`?" if near else f"the model's inputs are {_quoted(required)}"
            raise InputError(f"input `{name}` is missing", place=place, hint=hint)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean `{near[0]}`?" if near else f"the model's inputs are {_quoted(required)}"
            raise InputError(f"the model has no input `{name}`", place=place, hint=hint)
    return [value for name, value in known.items() if name in given]


def _fit(arrays: Mapping[str, np.ndarray], values: list[oir.Value], place: str) -> dict[str, np.ndarray]:
    """The arrays in the model's dtypes, after checking ranks and dimensions.

    Raises:
        InputError: a dtype, rank or dimension does not fit, or one symbol stands for two sizes.
    """
    feeds: dict[str, np.ndarray] = {}
    sizes: dict[str, tuple[int, str]] = {}
    for value in values:
        name = str(value.name)
        where = f"{place}, input `{name}`"
        array = _cast(arrays[name], value, where)
        feeds[name] = array
        if value.shape is None:
            continue
        if array.ndim != len(value.shape):
            raise InputError(
                f"found {array.ndim} axes {list(array.shape)}, the model has {len(value.shape)} {_shown(value.shape)}",
                place=where,
            )
        for axis, (dim, size) in enumerate(zip(value.shape, array.shape, strict=True)):
            if isinstance(dim, int) and dim > 0 and dim != size:
                raise InputError(
                    f"axis {axis} has length {size}, the model has {dim} {_shown(value.shape)}", place=where
                )
            symbol = symbol_of(dim)
            if symbol is None:
                continue
            first, owner = sizes.setdefault(symbol, (size, f"axis {axis} of `{name}`"))
            if first != size:
                raise InputError(
                    f"`{symbol}` is {size} here and {first} in {owner}",
                    place=where,
                    hint=f"`{symbol}` is one size in every input",
                )
    _check_expressions(feeds, values, {symbol: size for symbol, (size, _) in sizes.items()}, place)
    return feeds


def _check_expressions(
    feeds: Mapping[str, np.ndarray], values: list[oir.Value], sizes: Mapping[str, int], place: str
) -> None:
    for value in values:
        for axis, dim in enumerate(value.shape or ()):
            if (
                isinstance(dim, int)
                or is_unnamed(dim)
                or symbol_of(dim) is not None
                or not free_symbols(dim) <= set(sizes)
            ):
                continue
            expected, found = dim.evaluate(dict(sizes)), feeds[str(value.name)].shape[axis]
            if isinstance(expected, int) and expected != found:
                raise InputError(
                    f"axis {axis} has length {found}, `{dim.value}` is {expected}",
                    place=f"{place}, input `{value.name}`",
                )


def _cast(array: np.ndarray, value: oir.Value, place: str) -> np.ndarray:
    """`array` in the dtype of `value` when no value changes but by rounding of floating point."""
    if array.dtype.names is not None:
        raise InputError(f"found records of {', '.join(array.dtype.names)}, not numbers", place=place)
    if value.dtype is None:
        return array
    want = numpy_dtype(value)
    if value.dtype == oir.DataType.STRING:
        if array.dtype.kind in "US" or array.dtype == object:
            return array.astype(object)
    elif array.dtype == want:
        return array
    elif value.dtype.is_floating_point():
        if array.dtype.kind == "f" or (array.dtype.kind == "V" and want.itemsize >= array.dtype.itemsize):
            with np.errstate(over="ignore"):
                cast = array.astype(want)
            if np.isfinite(array.astype(np.float64)).sum() == np.isfinite(cast.astype(np.float64)).sum():
                return cast
            raise InputError(f"{array.dtype} values are too large for the model's {want}", place=place)
    elif array.dtype.kind in "iub":
        cast = array.astype(want)
        if np.array_equal(cast.astype(array.dtype), array) and (array.dtype.kind == "b" or np.array_equal(cast, array)):
            return cast
        raise InputError(f"some {array.dtype} values do not fit the model's {want}", place=place)
    hint = "were they normalized as for the model's training?" if array.dtype.kind in "iu" else None
    raise InputError(f"found {array.dtype}, the model has {want}", place=place, hint=hint)


def _shown(shape: oir.Shape) -> str:
    return "[" + ", ".join("?" if is_unnamed(dim) else str(dim) for dim in shape) + "]"


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
