"""What passes between the blocks of two models, side by side, and the filters through which it is compared.

The errors of the streams are each divided by the size of the original's (LAPTOP-Diff, arXiv:2404.11098). Task-aware
filters (TED, arXiv:2210.01351) are learnt first: a filtered stream, read by what follows the model's last block, has to
give what the original gives. TED gives each filter a head of its own, which a vocabulary of tens of thousands of words
forbids; here it is the model's own head, so that the identity is a filter, and the one that training starts from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir
import torch
from torch import fx, nn

from burnish.backends.fx import healing_graph as halves
from burnish.ir import weights
from burnish.ir.errors import InputError
from burnish.ir.views.block import Block
from burnish.passes.depth_blocks import BLOCKS


@dataclass(frozen=True)
class Tap:
    """The stream at one place of both models.

    Attributes:
        name: of the place.
        student, teacher: the values there.
    """

    name: str
    student: oir.Value
    teacher: oir.Value


def counterparts(student: oir.Model, own: Sequence[Block], teacher: oir.Model, theirs: Sequence[Block]) -> list[int]:
    """For each block of the student the number of the block of the original that it is.

    What passes that take blocks out have noted in the student counts, where it fits; otherwise blocks are the same
    when they read the same weights. A factored layer leaves a block its other weights.

    Args:
        student, teacher: the models.
        own, theirs: their blocks.

    Raises:
        InputError: a block of the student is none of the original's.
    """
    noted, before = _noted(student), _noted(teacher) or list(range(len(theirs)))
    if len(noted) == len(own) and len(before) == len(theirs) and set(noted) <= set(before):
        return [before.index(number) for number in noted]
    return list(range(len(theirs))) if len(own) == len(theirs) else _aligned(own, theirs)


def _noted(model: oir.Model) -> list[int]:
    """The numbers that the blocks had in the original, as the model's metadata says; none where it does not."""
    try:
        found = json.loads(model.metadata_props.get(BLOCKS, "[]"))
    except ValueError:
        return []
    return found if isinstance(found, list) and all(isinstance(one, int) for one in found) else []


def ports(own: Sequence[Block], theirs: Sequence[Block], pairs: Sequence[int]) -> dict[str, str]:
    """The inputs of the original that the states of the student's blocks come from, by the student's names.

    Raises:
        InputError: a block has more or fewer states than its counterpart.
    """
    found = {}
    for block, number in zip(own, pairs, strict=True):
        if len(block.inputs) != len(theirs[number].inputs):
            raise InputError(f"block {block.index} has other states than block {number} of the original", place="heal")
        for mine, other in zip(block.inputs, theirs[number].inputs, strict=True):
            found[str(mine.name)] = str(other.name)
    return found


def taps(student: Sequence[Block], teacher: Sequence[Block], pairs: Sequence[int]) -> list[Tap]:
    """The streams behind all blocks of the student, each beside the one that it stands for in the original.

    A block answers for the removed ones behind it on the same stream: what it hands on is what the next kept block has
    read in the original.

    Args:
        student, teacher: the blocks.
        pairs: of `counterparts`.

    Raises:
        InputError: there are no blocks.
    """
    if not student:
        raise InputError("the model has no residual blocks: there are no features to compare", place="heal")
    ends = [end_of(teacher, own, after) for own, after in zip(pairs, [*pairs[1:], len(teacher)], strict=True)]
    return [
        Tap(f"the stream behind block {one.index}", one.exit, teacher[end].exit)
        for one, end in zip(student, ends, strict=True)
    ]


def end_of(blocks: Sequence[Block], first: int, after: int) -> int:
    """The last block before `after` that the stream behind `first` goes straight through: in the same stack."""
    while first + 1 < after and blocks[first + 1].entry is blocks[first].exit:
        first += 1
    return first


def _aligned(student: Sequence[Block], teacher: Sequence[Block]) -> list[int]:
    """For each block of the student the one of the original with which it shares the most weights, in order."""
    known: dict[oir.Value, str] = {}
    one, other = ([_signature(block, known) for block in blocks] for blocks in (student, teacher))
    shared = np.array([[len(a & b) for b in other] for a in one])
    # best[i, j]: the most that the first i blocks share with the first j; every block of the student gets a partner.
    best = np.full((len(one) + 1, len(other) + 1), -1)
    best[0] = 0
    for i in range(1, len(one) + 1):
        for j in range(i, len(other) + 1):
            joined = best[i - 1, j - 1] + shared[i - 1, j - 1] if best[i - 1, j - 1] >= 0 else -1
            best[i, j] = max(best[i, j - 1], joined)
    found, j = [], len(other)
    for i in range(len(one), 0, -1):
        while j > i and best[i, j] == best[i, j - 1]:
            j -= 1
        found.append(j - 1)
        j -= 1
    found.reverse()
    strange = [i for i, j in enumerate(found) if len(one) > len(other) or not shared[i, j]]
    if strange:
        raise InputError(
            f"block {strange[0]} shares no weight with a block of the original: it cannot be told which one it was",
            place="heal",
            hint="heal without `features`",
        )
    return found


def _signature(block: Block, known: dict[oir.Value, str]) -> set[str]:
    """Hashes of the weights that the nodes of a block read."""
    found = set()
    for node in block.nodes:
        for value in node.inputs:
            tensor = weights.tensor_of(value)
            if value is None or tensor is None or not tensor.dtype.is_floating_point() or tensor.size < 2:
                continue
            if value not in known:
                known[value] = hashlib.sha256(np.ascontiguousarray(tensor.numpy()).tobytes()).hexdigest()
            found.add(known[value])
    return found


class Filters(nn.Module):
    """A linear filter for the stream at each place, [..., features], the identity in the beginning."""

    def __init__(self, names: Sequence[str], features: int) -> None:
        super().__init__()
        self.names = list(names)
        self.linears = nn.ModuleList(nn.Linear(features, features, bias=False) for _ in names)
        for linear in self.linears:
            nn.init.eye_(linear.weight)

    def forward(self, name: str, stream: torch.Tensor) -> torch.Tensor:
        """The filtered stream."""
        made: torch.Tensor = self.linears[self.names.index(name)](stream)
        return made


class Tail:
    """What follows the last block of a model, with another stream in the place of its own.

    Args:
        module: the model.
        outputs: nodes by name.
        end: the stream behind the last block.
    """

    def __init__(self, module: fx.GraphModule, outputs: Mapping[str, fx.Node], end: fx.Node) -> None:
        parts = halves.cut(module, list(outputs.values()), halves.descendants([end]))
        self._names, self._behind = list(outputs), parts.behind
        self._at = [node is end for node in parts.kept]
        self.others = {str(i): node for i, node in enumerate(parts.kept) if node is not end}

    def __call__(self, stream: torch.Tensor, others: Mapping[str, object]) -> dict[str, torch.Tensor]:
        """The outputs by name; `others` are the values that `others` names."""
        given = [stream if here else others[str(i)] for i, here in enumerate(self._at)]
        return dict(zip(self._names, self._behind(*given), strict=True))


def learn(
    filters: Sequence[Filters], loss: Callable[[int, str], torch.Tensor], steps: int, rate: float, seed: int,
    add: Callable[[Iterable[nn.Parameter]], None],
) -> None:  # fmt: skip
    """Train the filters of several models, the models frozen; each step takes one place of all of them.

    Args:
        filters: of each model, for the same places.
        loss: `f(step, name)`: how far the outputs behind the filters of a place are from the original's, added up.
        steps: how many.
        rate: of Adam.
        seed: of the order of places.
        add: adds up gradients over processes.
    """
    parameters = [parameter for one in filters for parameter in one.parameters()]
    optimizer = torch.optim.Adam(parameters, rate)
    random = np.random.default_rng([seed, 2])
    names = filters[0].names
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss(step, names[int(random.integers(len(names)))]).backward()
        add(parameters)
        optimizer.step()
