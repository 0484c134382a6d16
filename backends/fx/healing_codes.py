"""Codebooks that are trained: the nearest code forwards, and backwards a gradient for what is looked for.

The search for the nearest code has no gradient. What is looked up stands for the query itself when gradients pass
(straight through), the codes are drawn to the queries that chose them, and the queries to their codes (van den Oord et
al. 2017, arXiv:1711.00937). Trained one by one, codes that no query chooses never move. With `linear` the codes stay
and are multiplied with one matrix, which moves all of them together (SimVQ, Zhu et al. 2024, arXiv:2411.02038); in the
end their product is a codebook again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np
import onnx_ir as oir
import torch
import torch.nn.functional as F
from torch import fx, nn

from burnish.backends.fx.bridge import bridge_of
from burnish.backends.fx.healing_loss import Term
from burnish.backends.fx.healing_ranks import Ranks
from burnish.ir import match
from burnish.ir.views.codebook import Codebook, codebooks
from burnish.ir.views.parameter import find_parameter

Way = Literal["linear", "direct", "frozen"]

_MOVES = ("Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze")


class Codes(nn.Module):
    """A codebook and the search for the nearest of its codes.

    Args:
        codes: float [codes, features].
        way: how they are trained.
        commitment: how much queries are drawn to codes, relative to codes to queries.
        keeps: numbers of codes keep an axis of 1.

    Attributes:
        seen: of each call in training, how far queries and codes are apart, and how many queries there were.
        rows: the queries [rows, features] of each call, where they are asked for.
        size: the mean square of the elements of queries, by which these distances are divided.
    """

    codes: torch.Tensor

    def __init__(self, codes: torch.Tensor, way: Way, commitment: float, keeps: bool) -> None:
        super().__init__()
        self.way, self.commitment, self.keeps, self.size = way, commitment, keeps, 1.0
        if way == "direct":
            self.codes = nn.Parameter(codes)
        else:
            self.register_buffer("codes", codes)
        if way == "linear":
            width = codes.shape[1]
            self.turn = nn.Parameter(torch.eye(width, dtype=codes.dtype))
            self.shift = nn.Parameter(torch.zeros(width, dtype=codes.dtype))
        self.seen: list[tuple[torch.Tensor, int]] = []
        self.rows: list[torch.Tensor] | None = None

    def table(self) -> torch.Tensor:
        """The codes that are searched, [codes, features]."""
        return F.linear(self.codes, self.turn, self.shift) if self.way == "linear" else self.codes

    def folded(self) -> np.ndarray:
        """The same, float64, from products in float64."""
        codes = self.codes.detach().double().cpu()
        if self.way == "linear":
            codes = codes @ self.turn.detach().double().cpu().T + self.shift.detach().double().cpu()
        return np.asarray(codes.numpy())

    def forward(self, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The numbers of the nearest codes, [...] or [..., 1], and the codes, [..., features]."""
        table = self.table()
        rows = query.reshape(-1, query.shape[-1])
        with torch.no_grad():
            index = (rows @ table.T - table.square().sum(1) / 2).argmax(1)
        found = F.embedding(index, table)
        if self.rows is not None:
            self.rows.append(rows.detach())
        if self.training:
            apart = self.commitment * (rows - found.detach()).square().mean(1).sum()
            if self.way != "frozen":
                apart = apart + (found - rows.detach()).square().mean(1).sum()
            self.seen.append((apart / self.size, len(rows)))
            found = rows + (found - rows).detach()
        numbers = index.reshape(*query.shape[:-1], 1) if self.keeps else index.reshape(query.shape[:-1])
        return numbers, found.reshape(query.shape)


class Codebooks:
    """The codebooks of a student, made trainable.

    Args:
        student: the model.
        module: made from it; its graph is changed.
        way: how they are trained.
        commitment: see `Codes`.

    Attributes:
        paths: the names of what is trained of them.
        held: the constants of the model that hold codes and their norms, which nothing else may train.
        refused: why others stay as they are, by the nodes that search them.
    """

    def __init__(self, student: oir.Model, module: fx.GraphModule, way: Way, commitment: float) -> None:
        self._module = module
        self._made: dict[int, Codes] = {}
        self._first: dict[int, np.ndarray] = {}
        self.held: set[oir.Value] = set()
        self.refused: dict[oir.Node, str] = {}
        nodes = {node.name: node for node in module.graph.nodes}
        values = bridge_of(module).values
        for number, book in enumerate(codebooks(student)):
            self.held |= _constants(book)
            read = [book.search.query, book.indices, *(node.inputs[1] for node in book.lookups)]
            given = [*read, *(node.outputs[0] for node in book.lookups)]
            if (reason := _refusal(book)) is not None:
                self.refused[book.anchor] = reason
            elif any(value is None or str(value.name) not in values for value in given):
                self.refused[book.anchor] = "it is in a branch or a loop"
            else:
                like = next(iter(module.parameters()))
                codes = torch.from_numpy(book.codes()).to(like)
                made = Codes(codes, way, commitment, bool(match.attribute(book.anchor, "keepdims", 1)))
                found = {value: nodes[values[str(value.name)]] for value in given if value is not None}
                self._insert(number, made, book, found)
        if self._made:
            module.graph.lint()
            module.recompile()
        self.paths = [f"healing_codes_{number}.{name}" for number, made in self._made.items() for name in _names(made)]

    def _insert(self, number: int, made: Codes, book: Codebook, nodes: dict[oir.Value, fx.Node]) -> None:
        """Let what reads the number of a code, or the code, read what `made` finds."""
        graph, name = self._module.graph, f"healing_codes_{number}"
        self._module.add_submodule(name, made.train(self._module.training))
        self._made[number], self._first[number] = made, made.folded()
        old = nodes[book.indices]
        with graph.inserting_after(old):
            both = graph.call_module(name, (nodes[book.search.query],))
        with graph.inserting_after(both):
            codes = graph.call_function(_item, (both, 1))
            numbers = graph.call_function(_item, (both, 0))
        old.replace_all_uses_with(numbers)
        for lookup in book.lookups:
            node, index = nodes[lookup.outputs[0]], nodes[lookup.inputs[1]]  # type: ignore[index]
            with graph.inserting_after(node):
                placed = graph.call_function(_placed, (codes, numbers if index is old else index))
            node.replace_all_uses_with(placed)

    def __bool__(self) -> bool:
        """Whether there is one."""
        return bool(self._made)

    def measure(self, runs: Iterable[object], ranks: Ranks, seed: int | None) -> None:
        """Take the sizes of queries from some runs of the module, each made as it is asked for.

        Args:
            runs: on different rows.
            ranks: the processes, which all get the same codes.
            seed: where a query of these rows, drawn at random, takes the place of each code that none of them chooses
                (random restarts, Dhariwal et al. 2020, arXiv:2005.00341); None to leave the codes.
        """
        for made in self._made.values():
            made.rows = []
        with torch.no_grad():
            for _ in runs:
                pass
            for made in self._made.values():
                rows = torch.cat(made.rows or [made.codes[:0]])
                made.rows = None
                total, count = ranks.total([float(rows.double().square().sum()), float(rows.numel())])
                made.size = max(total / max(count, 1.0), 1e-30)
                if seed is not None:
                    _revive(made, rows, ranks, seed)

    def term(self) -> Term:
        """How far queries and codes are apart, of all calls since the last one."""
        term = Term(torch.zeros(()), 0.0)
        for made in self._made.values():
            for apart, count in made.seen:
                term = Term(term.total.to(apart.device) + apart, term.count + count / len(self._made))
            made.seen = []
        return term

    def write(self, model: oir.Model) -> list[str]:
        """Put the codes into a copy of the student, with their norms, the products of `linear` made in float64.

        Returns:
            The names of the constants that were written.
        """
        before = set(model.graph.initializers)
        for number, book in list(enumerate(codebooks(model))):
            if number in self._made:
                codes = self._made[number].folded()
                if not np.array_equal(codes, self._first[number]):
                    book.write(model, codes)
        return sorted(set(model.graph.initializers) - before)


def _revive(made: Codes, rows: torch.Tensor, ranks: Ranks, seed: int) -> None:
    """Let queries be the codes that no row chooses; those of the first process for all."""
    index = made(rows)[0].reshape(-1)
    used = torch.tensor(ranks.total(torch.bincount(index, minlength=len(made.codes)).tolist())) > 0
    count = int(ranks.first(float(len(rows))))
    free = (~used).nonzero().reshape(-1)[:count].to(made.codes.device)
    given = torch.zeros(len(free), rows.shape[1])
    if ranks.rank == 0:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        given = rows[order[: len(free)].to(rows.device)]
    made.codes[free] = torch.tensor(ranks.total(given.reshape(-1).tolist())).to(made.codes).reshape(given.shape)


def _names(made: Codes) -> list[str]:
    return [name for name, _ in made.named_parameters()]


def _constants(book: Codebook) -> set[oir.Value]:
    """The constants that hold the codes and what the search adds."""
    read = [book.search.codes.value, *(value for value, _ in book.search.added), *(n.inputs[0] for n in book.lookups)]
    found = [find_parameter(value) for value in read]
    return {one.source for one in found if one is not None}


def _refusal(book: Codebook) -> str | None:
    """Why a codebook cannot be trained, in plain words; None when it can."""
    if not book.by_distance:
        return "its search is not for the smallest distance"
    if book.read_only is not None:
        return book.read_only
    for node in book.lookups:
        value = node.inputs[1]
        while value is not book.indices:
            move = match.producer(value, *_MOVES)
            if move is None:
                return "the codes are looked up in another order than they are found"
            value = move.inputs[0]
    return None


def _item(pair: tuple[torch.Tensor, torch.Tensor], index: int) -> torch.Tensor:
    return pair[index]


def _placed(codes: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Codes [..., features] in the order of their numbers, which have another shape."""
    return codes.reshape(*numbers.shape, codes.shape[-1])
