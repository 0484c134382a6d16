"""Which residual blocks a model can do without, by the criteria of the literature.

Each gives a number for each block; the blocks of the lowest numbers go first. None looks at more than one block at a
time, save `angular`, whose blocks follow each other. What removing several together really costs only the joint result
tells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_ir as oir

from burnish.ir import weights
from burnish.ir.errors import InputError
from burnish.ir.samples import Sample
from burnish.ir.views.block import Block, Structure
from burnish.ir.views.block_drop import drop, obstacle
from burnish.ir.views.blocks import stacks
from burnish.passes import criticality, measure_choice, probes
from burnish.passes.lossy import Context
from burnish.passes.reducers import Moments
from burnish.passes.rerun import Rerun
from burnish.passes.resets import resettable
from burnish.passes.scoring import MEMORY
from burnish.passes.sites import Keep

Outputs = Mapping[str, np.ndarray]

Criterion = Literal[
    "output-loss",
    "block-influence",
    "angular",
    "perplexity",
    "taylor",
    "magnitude",
    "magnitude-l2",
    "criticality",
    "reverse",
    "random",
]
"""See `docs/ideas/depth.md` for what each is and where it comes from."""


@dataclass(frozen=True)
class Ranking:
    """Chooses blocks of a model.

    Attributes:
        criterion: by what.
        context: samples and what runs models.
        seed: of `random` and of the draws of `criticality`.
        iterative: choose one block at a time, each on the model without those before it (SLEB, arXiv:2402.09025).
    """

    criterion: Criterion
    context: Context
    seed: int = 0
    iterative: bool = False

    def choose(self, model: oir.Model, structure: Structure, count: int) -> list[Block]:
        """The `count` blocks that go, in the order of the model.

        Args:
            model: in normal form; not changed.
            structure: its blocks.
            count: how many, at least one.

        Raises:
            InputError: fewer blocks can go together, or the criterion cannot look at this model.
        """
        if self.criterion == "angular" and not self.iterative:
            return self._window(model, structure, count)
        order = self._order(model, structure, count)
        if len(order) < count:
            cause = f"{count} blocks cannot go, {len(order)} can together"
            raise InputError(cause, hint="`burnish inspect --blocks` says why the others stay")
        return sorted(order, key=lambda block: block.index)

    def ladder(self, model: oir.Model, structure: Structure) -> list[list[Block]]:
        """What goes when one block goes, when two go, and so on up to all that can; arguments as for `choose`."""
        if self.criterion == "angular" and not self.iterative:
            counts = range(1, max(map(len, _runs(structure)), default=0) + 1)
            return [self._window(model, structure, count) for count in counts]
        order = self._order(model, structure, len(structure.blocks))
        return [sorted(order[:count], key=lambda block: block.index) for count in range(1, len(order) + 1)]

    def _order(self, model: oir.Model, structure: Structure, most: int) -> list[Block]:
        """Up to `most` blocks that can go together, in the order in which they go."""
        gone: list[Block] = []
        if not self.iterative:
            scores = self.scores(model, structure)
            for block in sorted(scores, key=lambda block: (scores[block], block.index)):
                if len(gone) < most and obstacle(structure, [*gone, block]) is None:
                    gone.append(block)
            return gone
        while len(gone) < most:
            left = without(model, [block.index for block in gone])
            kept = [block for block in structure.blocks if block not in gone]
            scores = self.scores(left, stacks(left))
            if not scores:
                break
            gone.append(kept[min(scores, key=lambda block: (scores[block], block.index)).index])
        return gone

    def scores(self, model: oir.Model, structure: Structure) -> dict[Block, float]:
        """A number for each block that can go; the lowest goes first. `angular` looks at windows of one block.

        Raises:
            InputError: the criterion cannot look at this model.
        """
        blocks = [block for block in structure.blocks if obstacle(structure, [block]) is None]
        found = _CRITERIA[self.criterion](self, model, blocks)
        wrong = next((block for block, score in zip(blocks, found, strict=True) if not np.isfinite(score)), None)
        if wrong is not None:
            raise InputError(f"`{self.criterion}` is not finite for block {wrong.index}", hint="look at the samples")
        return dict(zip(blocks, (float(one) for one in found), strict=True))

    def _window(self, model: oir.Model, structure: Structure, count: int) -> list[Block]:
        """The blocks after which the stream has turned least (Gromov et al., arXiv:2403.17887)."""
        runs = _runs(structure)
        windows = [run[start : start + count] for run in runs for start in range(len(run) - count + 1)]
        windows = [window for window in windows if obstacle(structure, window) is None]
        if not windows:
            cause = f"no {count} blocks that follow each other can go together"
            raise InputError(cause, hint="ask for fewer, or take another criterion")
        return windows[int(np.argmin(self._angles(model, windows)))]

    def _angles(self, model: oir.Model, windows: Sequence[Sequence[Block]]) -> list[float]:
        pairs = [(window[0], window[-1]) for window in windows]
        reducers = probes.cosines(model, pairs, self.context, lambda axis: probes.LastAngle(axis))
        return [one.mean for one in reducers if isinstance(one, probes.LastAngle)]

    def _influence(self, model: oir.Model, blocks: Sequence[Block]) -> list[float]:
        """1 - mean cosine of a token before and behind the block (ShortGPT, arXiv:2403.03853)."""
        reducers = probes.cosines(model, [(one, one) for one in blocks], self.context, lambda axis: Moments(axis))
        means = [one.mean for one in reducers if isinstance(one, Moments)]
        if any(mean is None for mean in means):
            raise InputError("no row of the samples counts: all is padding")
        return [1 - float(mean[0]) for mean in means if mean is not None]

    def _output_loss(self, model: oir.Model, blocks: Sequence[Block]) -> list[float]:
        """What the outputs move when the block alone is removed, squared (LAPTOP-Diff, arXiv:2404.11098)."""
        states = {value for block in stacks(model).blocks for value in block.outputs}
        watched = {str(value.name): (value, -1) for value in model.graph.outputs if value not in states}
        keeps = {name: keep for name, keep in self.context.keeps(model, watched).items() if isinstance(keep, Keep)}

        def moved(after: Outputs, before: Outputs, sample: Sample) -> tuple[float, int]:
            total, count = 0.0, 0
            for name in watched:
                gap = after[name].astype(np.float64) - before[name]
                if name in keeps:
                    gap = gap[np.broadcast_to(keeps[name].of(sample.feeds, before[name]), gap.shape)]
                total, count = total + float(np.square(gap).sum()), count + gap.size
            return total, count

        found = self._removed(model, blocks, moved)
        return [sum(total for total, _ in parts) / max(sum(count for _, count in parts), 1) for parts in found]

    def _perplexity(self, model: oir.Model, blocks: Sequence[Block]) -> list[float]:
        """The perplexity of the model without the block (SLEB, arXiv:2402.09025, when iterative)."""
        measure = measure_choice.measure("perplexity", model, self.context.samples, keeps=self.context.keeps).measure
        return [measure.value(parts) for parts in self._removed(model, blocks, measure.partial)]

    def _removed(
        self, model: oir.Model, blocks: Sequence[Block], partial: Callable[[Outputs, Outputs, Sample], Any]
    ) -> Iterator[list[Any]]:
        """For each block what `partial` keeps of each sample, of the model without the block and of the model."""
        samples = self.context.samples
        rerun = Rerun(model, samples, self.context.execute, MEMORY)
        try:
            rerun.prepare()
            for block in blocks:
                with rerun.running(rerun.route(without(model, [block.index]))) as run:
                    yield [partial(run(at), rerun.original(at), sample) for at, sample in enumerate(samples)]
        finally:
            rerun.close()

    def _taylor(self, model: oir.Model, blocks: Sequence[Block]) -> list[float]:
        """Σ |w · ∂loss/∂w| over the block's weights (Molchanov et al., arXiv:1906.10771)."""
        if self.context.gradients is None:
            raise InputError("`taylor` needs gradients", hint="install the extra `torch`, or take another criterion")
        slopes = self.context.gradients(model, self.context.samples)
        found = []
        for block in blocks:
            held = {name: array for name, array in _weights(block).items() if name in slopes}
            found.append(sum(float(np.abs(array * slopes[name]).sum()) for name, array in held.items()))
        if not any(found):
            raise InputError("all gradients are zero: the loss depends on no weight of a block", hint="give labels")
        return found

    def _criticality(self, model: oir.Model, blocks: Sequence[Block]) -> list[float]:
        """What the outputs lose when a layer is drawn anew, the mean over the block's layers (arXiv:2410.14470)."""
        look = criticality.reading(model)
        value = next(one for one in model.graph.outputs if one.name == look.output)
        keep = self.context.keeps(model, {look.output: (value, -1)})[look.output]
        if isinstance(keep, str):
            raise InputError(f"it cannot be told which rows of `{look.output}` are padding: {keep}")
        subject = resettable(model)
        runner = self.context.execute(subject.model)
        try:
            judge = criticality.Criticality(subject, runner, self.context.samples, look, keep)
            changes = {part.name: judge.change(part.drawn(self.seed, 0)).criticality for part in subject.parts}
        finally:
            runner.close()
        found = []
        for block in blocks:
            own = [changes[str(node.name)] for node in block.nodes if node.name in changes]
            if not own:
                raise InputError(f"no layer of block {block.index} can be reset", hint="take another criterion")
            found.append(sum(own) / len(own))
        return found

    def _magnitude(self, model: oir.Model, blocks: Sequence[Block]) -> list[float]:
        """Σ |w| or Σ w² over the block's weights."""
        power = 2 if self.criterion == "magnitude-l2" else 1
        return [sum(float((np.abs(array) ** power).sum()) for array in _weights(one).values()) for one in blocks]

    def _reverse(self, model: oir.Model, blocks: Sequence[Block]) -> list[float]:
        return [-float(block.index) for block in blocks]

    def _random(self, model: oir.Model, blocks: Sequence[Block]) -> list[float]:
        return list(np.random.default_rng(self.seed).permutation(len(blocks)).astype(float))


_CRITERIA: Mapping[str, Callable[[Ranking, oir.Model, Sequence[Block]], list[float]]] = {
    "output-loss": Ranking._output_loss,
    "block-influence": Ranking._influence,
    "angular": lambda ranking, model, blocks: ranking._angles(model, [[block] for block in blocks]),
    "perplexity": Ranking._perplexity,
    "taylor": Ranking._taylor,
    "magnitude": Ranking._magnitude,
    "magnitude-l2": Ranking._magnitude,
    "criticality": Ranking._criticality,
    "reverse": Ranking._reverse,
    "random": Ranking._random,
}


_ON_TABLES = ("Add", "Sub", "Where", "Expand", "Tile")
"""Operators that read masks and tables of positions."""


def without(model: oir.Model, gone: Iterable[int]) -> oir.Model:
    """A copy without the blocks of these numbers, which can go together; weights are shared."""
    numbers = list(gone)
    copy = model.clone()
    if numbers:
        structure = stacks(copy)
        drop(copy, structure, [structure.blocks[number] for number in numbers])
    return copy


def _runs(structure: Structure) -> list[list[Block]]:
    """Blocks that can go, in runs that follow each other."""
    found: list[list[Block]] = []
    for block in structure.blocks:
        if obstacle(structure, [block]) is not None:
            continue
        if found and found[-1][-1].exit is block.entry:
            found[-1].append(block)
        else:
            found.append([block])
    return found


def _weights(block: Block) -> dict[str, np.ndarray]:
    """The float64 weights that the nodes of a block read, by name; tables that are added to scores are none.

    Raises:
        InputError: one is quantized.
    """
    found = {}
    for node, value in ((one, value) for one in block.nodes for value in one.inputs if value is not None):
        tensor = weights.tensor_of(value)
        if tensor is None or tensor.size < 2 or tensor.dtype in (oir.DataType.INT64, oir.DataType.BOOL):
            continue
        if not tensor.dtype.is_floating_point():
            raise InputError(f"its weight `{value.name}` is quantized", place=f"block {block.index}")
        if node.op_type not in _ON_TABLES or min((1, 1, *tensor.shape.numpy())[-2:]) == 1:
            found[str(value.name)] = tensor.numpy().astype(np.float64)
    return found
