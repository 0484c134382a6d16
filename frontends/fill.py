"""Values for one input of one sample: identifiers within their table, masks by pattern, positions in order."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as oir

from burnish.frontends.roles import Role

MASKED_SCORE = -1e4
PATTERNS = ("all ones", "left-padded", "right-padded", "holes", "rows differ", "empty row")
CONTENTS = ("normal", "uniform", "large", "zeros", "constant", "small")
_WORDS = ("", "a", "burnish", "Straße 5")


def kept_positions(pattern: str, rows: int, length: int, rng: np.random.Generator) -> np.ndarray:
    """Which positions of each row a mask lets through: bool [rows, length], at least one a row but for "empty row".

    Args:
        pattern: one of `PATTERNS`; "rows differ" pads the first row left, the second right, and makes holes in a third;
            "empty row" lets nothing of the first row through.
        rows: the batch.
        length: positions a row; a mask of one position is all ones.
        rng: where the holes are drawn from.
    """
    kept = np.ones((rows, length), np.bool_)
    if length < 2:
        return kept
    for row in range(rows):
        one = pattern if pattern != "rows differ" else PATTERNS[1 + row % 3]
        # Rows of one batch are padded by different amounts, the last of several not at all.
        pads = min(length - 1, max(1, length // 3 - row)) if row == 0 or row < rows - 1 else 0
        pads = max(pads, 1) if pattern == "rows differ" else pads
        if one == "left-padded":
            kept[row, :pads] = False
        elif one == "right-padded":
            kept[row, length - pads :] = False
        elif one == "empty row" and row == 0:
            kept[row] = False
        elif one == "holes" and length > 2:
            kept[row, 1:-1] = rng.random(length - 2) > 0.3
            kept[row, 1 + (length // 2 + row) % (length - 2)] = False
    return kept


def mask(role: Role, shape: tuple[int, ...], dtype: np.dtype, pattern: str, rng: np.random.Generator) -> np.ndarray:
    """A mask of `shape`, the last axis being the positions; an additive one holds 0 and `MASKED_SCORE`."""
    length = shape[-1] if shape else 1
    rows = shape[0] if len(shape) > 1 else 1
    kept = kept_positions(pattern, rows, length, rng)
    kept = np.broadcast_to(kept.reshape((rows, *(1,) * (len(shape) - 2), length)) if len(shape) > 1 else kept[0], shape)
    if len(shape) > 2 and pattern == "holes" and length > 2:
        elements = rng.random(shape) > 0.2
        elements[..., 0] = True
        kept = kept & elements
    if role.additive:
        bias = rng.standard_normal(shape) if pattern == "rows differ" else np.zeros(shape)
        return np.where(kept, bias, MASKED_SCORE).astype(dtype)
    return np.where(kept, role.kept, 1 - role.kept).astype(dtype)


def ids(
    role: Role, shape: tuple[int, ...], dtype: np.dtype, kept: np.ndarray | None, rng: np.random.Generator
) -> np.ndarray:
    """Random numbers within the table, its ends among them; masked positions hold the padding token if known."""
    rows = role.rows if role.rows is not None else role.lowest + 2
    rows = max(role.lowest + 1, min(rows, _largest(dtype) + 1))
    drawn = rng.integers(role.lowest, rows, shape)
    if drawn.size >= 4:
        drawn.flat[1], drawn.flat[2] = rows - 1, role.lowest
    padding = [token for token in role.special if role.lowest <= token < rows]
    if padding and kept is not None and kept.shape == shape:
        drawn = np.where(kept, np.where(drawn == padding[0], (drawn + 1) % rows, drawn), padding[0])
    return drawn.astype(dtype)


def positions(role: Role, shape: tuple[int, ...], dtype: np.dtype, past: int, kept: np.ndarray | None) -> np.ndarray:
    """Positions in order: counted over what the mask lets through where there is one, else from `past` on.

    Args:
        kept: bool [batch, past + new positions], None without a mask.
    """
    length = shape[-1] if shape else 1
    if kept is not None and len(shape) >= 2 and kept.shape[0] == shape[-2] and kept.shape[1] >= length:
        counted = np.maximum(np.cumsum(kept, axis=1) - 1, 0)[:, kept.shape[1] - length :]
    else:
        counted = np.arange(past, past + length)
    counted = np.broadcast_to(counted, shape) if shape else counted.reshape(())
    limit = _largest(dtype) if role.rows is None else role.rows - 1
    clipped: np.ndarray = np.clip(counted, role.lowest, limit)
    return clipped.astype(dtype)


def numbers(role: Role, shape: tuple[int, ...], dtype: np.dtype, content: str, rng: np.random.Generator) -> np.ndarray:
    """Floating-point values, all finite.

    Args:
        content: "normal" (standard normal), "uniform" (0 to 1), "large" (1000 times normal, every eighth zero; 30 times
            in dtypes of less than 32 bits), "zeros", "constant" (0.5 everywhere) or "small" (a thousandth of normal:
            what saturates elsewhere does not here).
    """
    if content == "uniform":
        drawn = rng.random(shape)
    elif content == "large":
        drawn = rng.standard_normal(shape) * (1e3 if dtype.itemsize >= 4 else 30.0)
        drawn = np.where(np.arange(drawn.size).reshape(shape) % 8 == 7, 0.0, drawn)
    elif content == "small":
        drawn = rng.standard_normal(shape) * 1e-3
    elif content == "zeros":
        drawn = np.zeros(shape)
    elif content == "constant":
        drawn = np.full(shape, 0.5)
    else:
        drawn = rng.standard_normal(shape)
    return np.asarray(drawn).astype(dtype)


def state(shape: tuple[int, ...], dtype: np.dtype, turn: int, rng: np.random.Generator) -> np.ndarray:
    """What a recurrent network carries: zeros at the first turn, then values between -1 and 1."""
    return (np.zeros(shape) if turn == 0 else rng.uniform(-1.0, 1.0, shape)).astype(dtype)


def small(
    role: Role, shape: tuple[int, ...], dtype: np.dtype, turn: int, sizes: Mapping[str, int], rng: np.random.Generator
) -> np.ndarray:
    """Integers that count something: a choice, a size, the length of every row, an index, or plain small numbers."""
    length = sizes["length"]
    if role.kind == "choice":
        return np.full(shape, role.choices[turn % len(role.choices)]).astype(dtype)
    if role.kind == "size":
        return np.full(shape, 1 + turn % 3).astype(dtype)
    if role.kind == "lengths":
        return np.full(shape, length).astype(dtype)
    if role.kind in ("ends", "total"):
        total = sizes["past"] + length
        return np.full(shape, total if role.kind == "total" else total - 1).astype(dtype)
    # Negative numbers and larger ones tell divisions and comparisons apart; a model that refuses them has others.
    wide = turn % 4 == 3 and dtype.kind == "i"
    drawn = rng.integers(-7, 8, shape) if wide else rng.integers(0, 2, shape)
    if wide and np.size(drawn):
        drawn = np.where(np.arange(np.size(drawn)).reshape(shape) == 0, -1, drawn)
    return np.asarray(drawn).astype(dtype)


def text(shape: tuple[int, ...], turn: int) -> np.ndarray:
    """Short strings, the empty one and non-ASCII among them; dtype object."""
    count = int(np.prod(shape, dtype=np.int64))
    return np.array([_WORDS[(turn + place) % len(_WORDS)] for place in range(count)], object).reshape(shape)


def numpy_dtype(value: oir.Value) -> np.dtype:
    """The NumPy dtype of a typed value."""
    assert value.dtype is not None
    return np.dtype(object) if value.dtype == oir.DataType.STRING else np.dtype(value.dtype.numpy())


def _largest(dtype: np.dtype) -> int:
    return int(np.iinfo(dtype).max) if dtype.kind in "iu" else 1
