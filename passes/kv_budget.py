"""How many tokens of a prompt each cache keeps, and what a model says about it in its metadata."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import onnx_ir as oir
from numpy.typing import NDArray

from burnish.ir.errors import InputError
from burnish.passes.budget import Amount
from burnish.passes.depth_blocks import BLOCKS, STATES
from burnish.passes.kv_sharing import SHARED

BUDGET = "burnish.budget"
"""Key of the model's metadata: a `Budget` as JSON."""

MILLION = 1_000_000


class Queries(msgspec.Struct, frozen=True):
    """The last queries of one layer.

    Attributes:
        name: of an output, [batch, heads, queries, size].
        scale: what the products of these queries and the keys of the cache are multiplied with.
        softcap: scores are softcap * tanh(scores / softcap); 0 for none.
    """

    name: str
    scale: float
    softcap: float


class BudgetedCache(msgspec.Struct, frozen=True):
    """The caches of the keys and of the values of one layer.

    Attributes:
        past, present: names of the inputs and of the outputs, keys first.
        queries: of all layers that read these keys.
        keep: millionths of the tokens that stay, or their number.
    """

    past: tuple[str, str]
    present: tuple[str, str]
    queries: tuple[Queries, ...]
    keep: int


class Budget(msgspec.Struct, frozen=True):
    """What a decoder keeps of a prompt.

    Attributes:
        hidden: name of an input, int64 [caches, batch]: so many slots at the start of each cache hold nothing; of
            com.microsoft GroupQueryAttention, where tokens lie at the start, so many tokens of each row are lost.
        window: the last tokens, whose queries say what is kept; they are kept themselves.
        pool: weights of so many neighbouring keys are averaged.
        relative: `keep` of the caches is in millionths of the tokens.
        caches: in the order of the rows of `hidden`; caches that are not listed keep every token.
        layers: what the metadata said then of blocks that went and caches that were renamed.
    """

    hidden: str
    window: int
    pool: int
    relative: bool
    caches: tuple[BudgetedCache, ...]
    layers: str = ""

    def counts(self, length: int) -> NDArray[np.int64]:
        """How many tokens each cache keeps of a prompt of so many, int64 [caches]; the window is kept in any case.

        Shares are rounded so that the sum over all caches is that of the shares, rounded down.
        """
        keeps = np.array([one.keep for one in self.caches], np.int64)
        if self.relative:
            edges = np.concatenate([[0], np.cumsum(keeps)]) * length // MILLION
            keeps = np.diff(edges)
        return np.minimum(np.maximum(keeps, self.window), length)


def read(model: oir.Model) -> Budget | None:
    """The budget of a model; None where it has none.

    Raises:
        InputError: the metadata cannot be read, or names what the model does not have.
    """
    found = model.metadata_props.get(BUDGET)
    if found is None:
        return None
    hint = "apply `budget-kv` after the passes that rename or remove caches"
    try:
        budget = msgspec.json.decode(found, type=Budget)
    except msgspec.DecodeError as error:
        raise InputError(f"it cannot be read: {error}", place=f"the model's `{BUDGET}`", hint=hint) from None
    given = {value.name for value in (*model.graph.inputs, *model.graph.outputs)}
    names = [budget.hidden]
    for one in budget.caches:
        names += [*one.past, *one.present, *(query.name for query in one.queries)]
    missing = next((name for name in names if name not in given), None)
    if missing is not None:
        raise InputError(f"it names `{missing}`, which the model lacks", place=f"the model's `{BUDGET}`", hint=hint)
    if budget.layers != _layers(model):
        raise InputError("its layers were renamed since", place=f"the model's `{BUDGET}`", hint=hint)
    return budget


def write(model: oir.Model, budget: Budget) -> None:
    """Note a budget in the metadata, beside what is said there of the layers."""
    noted = msgspec.structs.replace(budget, layers=_layers(model))
    model.metadata_props[BUDGET] = msgspec.json.encode(noted).decode()


def _layers(model: oir.Model) -> str:
    return " ".join(model.metadata_props.get(key, "-") for key in (BLOCKS, STATES, SHARED))


def shares(weights: Sequence[float], amount: Amount, floor: float) -> NDArray[np.int64]:
    """What each cache keeps, `BudgetedCache.keep`: together the same as if each kept `amount`.

    B_l = B_min + (B - B_min) * L * u_l of ZigZagKV (arXiv:2412.09036), with u_l the share of `weights` and B_min a
    part of the budget B. No cache keeps more than everything; what is over goes to the others in the same proportion.

    Args:
        weights: positive numbers, what the caches need; all equal for a uniform budget.
        amount: what a cache keeps on average, a share of the tokens or their number.
        floor: B_min / B.
    """
    own = np.asarray(weights, np.float64)
    mean = amount.number * (MILLION if amount.relative else 1)
    wanted = mean * (floor + (1 - floor) * len(own) * own / own.sum())
    while amount.relative and wanted.max() > MILLION * (1 + 1e-9):
        full = wanted >= MILLION
        rest = wanted[~full]
        wanted = np.where(full, MILLION, wanted)
        wanted[~full] = rest * (mean * len(own) - MILLION * full.sum()) / rest.sum()
    edges = np.rint(np.concatenate([[0], np.cumsum(wanted)])).astype(np.int64)
    kept = np.diff(edges)
    found: NDArray[np.int64] = np.minimum(kept, MILLION) if amount.relative else kept
    return found
