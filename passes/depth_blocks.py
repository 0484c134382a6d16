"""What passes that take blocks out share: blocks named in options, found again, and their states renamed."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import onnx_ir as oir

from burnish.ir import weights
from burnish.ir.errors import InputError
from burnish.ir.inference import Inference
from burnish.ir.views.block import Block, Part, Structure
from burnish.ir.views.blocks import stacks
from burnish.ir.views.cache import rename_ports
from burnish.ir.views.flow import CONTRACTIONS, SKIP_NORMS
from burnish.ir.walk import is_op

BLOCKS, STATES = "burnish.blocks", "burnish.states"
"""Keys of the model's metadata: JSON lists that give, for each block (each block with a state of its own), from the
first to the last, the number it had in the original model, from 0."""


_CONTRIB = "com.microsoft"


def blocks_of(model: oir.Model, facts: Inference | None = None) -> Structure:
    """The blocks of a model, of which these facts are proven.

    Raises:
        InputError: there are none.
    """
    found = stacks(model, facts)
    if not found.blocks:
        why = "; ".join(found.missing)
        raise InputError(f"the model has no residual blocks: {why}", hint="see `burnish inspect --blocks`")
    return found


def numbered(structure: Structure, wanted: str, option: str) -> list[Block]:
    """The blocks that an option names: numbers with + between them, as in `3+4+12`.

    Raises:
        InputError: that is no list of different blocks of the model.
    """
    blocks = structure.blocks
    try:
        numbers = [int(one) for one in wanted.split("+")]
    except ValueError:
        numbers = []
    if not numbers or len(set(numbers)) < len(numbers):
        raise InputError(f"`{option}={wanted}` is no list of blocks", hint="give numbers once each, as in `3+4+12`")
    wrong = next((one for one in numbers if not 0 <= one < len(blocks)), None)
    if wrong is not None:
        last = len(blocks) - 1
        raise InputError(
            f"there is no block {wrong}: the model has the blocks 0 to {last}", place=f"`{option}={wanted}`"
        )
    return [blocks[one] for one in numbers]


def anchors(block: Block) -> tuple[str, ...]:
    """The names of its nodes, by which it is found again."""
    return tuple(str(node.name) for node in block.nodes)


def marker(block: Block) -> str:
    """The name of a node whose claim keeps a block from being removed, and its layers free for other passes."""
    plain = (node for node in reversed(block.nodes) if node.op_type not in CONTRACTIONS)
    return str(next(plain, block.nodes[-1]).name)


def anchor(block: Block) -> str:
    """The name of a node that stays in a block as long as its branches do, whatever becomes of norms beside it."""
    return str(next(node for node in reversed(block.nodes) if node.op_type in CONTRACTIONS).name)


def held(block: Block, place: int = 0) -> list[str] | None:
    """A node of each branch of a block, whose claim keeps the branch from being taken out; None when there is none.

    Args:
        block: the block.
        place: another number gives other nodes, so that several edits that need a block do not exclude each other.
    """
    names = []
    for part in block.parts:
        nodes = sorted(branch(block, part), key=lambda node: node.op_type in CONTRACTIONS)
        if place >= len(nodes):
            return None
        names.append(str(nodes[place].name))
    return names


def lending(taker: oir.Node, donor: oir.Node) -> str:
    """What edits claim that let the attention at `taker` read the keys of the one at `donor`, or take these away."""
    return f"the keys of {donor.name} for {taker.name}"


def lent(structure: Structure, block: Block) -> list[str]:
    """What an edit claims that takes the keys of a block away, from whatever attention behind it might read them."""
    behind = [layer.anchor for one in structure.blocks if one.index > block.index for layer in one.attention]
    return [lending(taker, layer.anchor) for layer in block.attention for taker in behind]


def branch(block: Block, part: Part) -> list[oir.Node]:
    """The nodes that compute what a part adds, nearest to the sum first; no skip-normalization is among them."""
    own, found = set(block.nodes), dict[oir.Node, None]()
    pending: list[oir.Value | None] = list(part.results)
    while pending:
        value = pending.pop(0)
        node = value.producer() if value is not None and value is not part.entry else None
        if node in own and node not in found and node is not None and not is_op(node, *SKIP_NORMS, domain=_CONTRIB):
            found[node] = None
            pending += node.inputs
    return list(found)


def found_again(structure: Structure, wanted: Sequence[str], site: str) -> list[Block]:
    """The blocks that these are the nodes of; sizes and masks that only they need by now may have joined them.

    Raises:
        InputError: they are not there any more, or they consist of more than that.
    """
    names = set(wanted)
    found = [block for block in structure.blocks if any(node.name in names for node in block.nodes)]
    nodes = [node for block in found for node in block.nodes]
    more = [node for node in nodes if node.name not in names and any(map(_is_weight, node.inputs))]
    if more or not names <= {str(node.name) for node in nodes}:
        raise InputError("it is not there any more as it was: another edit has changed it", place=site)
    return found


def _is_weight(value: oir.Value | None) -> bool:
    tensor = weights.tensor_of(value)
    return tensor is not None and tensor.size > 1 and tensor.dtype not in (oir.DataType.INT64, oir.DataType.BOOL)


def block_with(structure: Structure, node: str, site: str) -> Block:
    """The block that has the node of this name.

    Raises:
        InputError: there is none any more.
    """
    for block in structure.blocks:
        if any(one.name == node for one in block.nodes):
            return block
    raise InputError("it is not there any more: another edit has changed it", place=site)


class States:
    """The inputs and outputs that carry the states of blocks, read before blocks go, renamed afterwards.

    Exporters number caches by layer. The states of blocks that are alike take the names of the first of them, so that
    the numbers stay without a gap; no name is read for that.

    Args:
        model: the model.
        structure: its blocks.
    """

    def __init__(self, model: oir.Model, structure: Structure) -> None:
        self.model = model
        self.blocks = structure.blocks
        self.stateful = [block for block in self.blocks if block.inputs or block.outputs]
        self._names: dict[object, list[list[str]]] = defaultdict(list)
        for block in self.stateful:
            self._names[signature(block)].append([str(port.name) for port in _ports(block)])

    def renamed(self, kept: Iterable[Block]) -> Mapping[oir.Value, str]:
        """The names that the states of the kept blocks, in their order, shall have."""
        names: dict[oir.Value, str] = {}
        taken: dict[object, int] = defaultdict(int)
        for block in (one for one in kept if one.inputs or one.outputs):
            key = signature(block)
            names.update(zip(_ports(block), self._names[key][taken[key]], strict=True))
            taken[key] += 1
        return names

    def renumber(self, kept: Sequence[Block]) -> None:
        """Close the gaps in the names, now that all other blocks are gone, and note where the kept ones come from."""
        names = {port: name for port, name in self.renamed(kept).items() if port.name != name}
        if names:
            rename_ports(self.model, names)

    def note(self, kept: Sequence[Block], stateful: Sequence[Block] | None = None) -> None:
        """Write into the model's metadata which blocks of the original it has, and which with their states."""
        _note(self.model, BLOCKS, [self.blocks.index(block) for block in kept], len(self.blocks))
        if self.stateful:
            own = [self.stateful.index(one) for one in (kept if stateful is None else stateful) if one in self.stateful]
            _note(self.model, STATES, own, len(self.stateful))


def _note(model: oir.Model, key: str, kept: list[int], count: int) -> None:
    before = json.loads(model.metadata_props.get(key, "null")) or list(range(count))
    if len(before) == count:
        kept = [before[index] for index in kept]
    model.metadata_props[key] = json.dumps(kept, separators=(",", ":"))


def _ports(block: Block) -> tuple[oir.Value, ...]:
    return (*block.inputs, *block.outputs)


def signature(block: Block) -> object:
    """Equal for blocks whose states can change places: their numbers, dtypes, ranks and fixed sizes."""
    return len(block.inputs), tuple((port.dtype, _fixed(port)) for port in _ports(block))


def _fixed(port: oir.Value) -> object:
    return None if port.shape is None else tuple(size if isinstance(size, int) else None for size in port.shape)
