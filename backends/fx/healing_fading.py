"""Norms and attentions that fade into what has replaced them, without padding in statistics (arXiv:2405.11582).

While a student trains, each place computes `fade * norm(x) + (1 - fade) * (BN(x) + eta * x)`, and so with attentions.
The batch normalization takes the statistics of the step's rows, whose running mean the result keeps. Looked at on
held-out rows, a student is always what it will be: the replacement alone, with the running statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as oir
import torch
import torch.nn.functional as F
from torch import fx, nn

from burnish.backends.fx import bridge
from burnish.backends.fx.bridge import bridge_of
from burnish.backends.fx.operators.network import per_channel
from burnish.backends.fx.write_back import values_of
from burnish.ir import match
from burnish.ir.errors import InputError
from burnish.passes.kernel_attention import replaced as replaced_attentions
from burnish.passes.lossy import Keeps
from burnish.passes.replaced_norms import Former, replaced
from burnish.passes.sites import Keep

Add = Callable[[Iterable[float]], list[float]]
"""Adds numbers up over all processes."""


class FormerNorm(nn.Module):
    """A normalization over the last axis."""

    gain: torch.Tensor
    bias: torch.Tensor

    def __init__(self, former: Former, dtype: torch.dtype) -> None:
        super().__init__()
        self.centred, self.epsilon = former.centred, former.epsilon
        self.register_buffer("gain", torch.from_numpy(np.array(former.gain)).to(dtype), persistent=False)
        self.register_buffer("bias", torch.from_numpy(np.array(former.bias)).to(dtype), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x normalized."""
        if self.centred:
            return F.layer_norm(x, x.shape[-1:], self.gain, self.bias, self.epsilon)
        return x * (x.square().mean(-1, keepdim=True) + self.epsilon).rsqrt() * self.gain + self.bias


class FormerAttention(nn.Module):
    """Attention with a softmax and no mask."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Of [batch, heads, tokens, size]."""
        return F.scaled_dot_product_attention(q, k, v, scale=self.scale)


class Fading(nn.Module):
    """In training, a mixture of what was there and what stands in its place; else the latter."""

    def __init__(self, former: nn.Module) -> None:
        super().__init__()
        self.former, self.share = former, 0.0

    def forward(self, other: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        """The mixture, of which `share` is what was there."""
        return torch.lerp(other, self.former(*inputs), self.share) if self.training and self.share > 0 else other


class RowNorm(nn.Module):
    """A BatchNormalization that, in training, normalizes by the rows that count and takes note of their statistics.

    Args:
        epsilon: added to the variance.
        keep: which rows count, where a mask says it.

    Attributes:
        seen: number, mean and variance of the rows of each call since it was last emptied.
    """

    def __init__(self, epsilon: float, keep: Keep | None) -> None:
        super().__init__()
        self.epsilon, self.keep = epsilon, keep
        self.seen: list[tuple[float, torch.Tensor, torch.Tensor]] = []

    def forward(
        self, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor]:  # fmt: skip
        """x [rows, channels, ...] normalized; `mean` and `variance` are used where it does not train."""
        if self.training:
            axes = [0, *range(2, x.dim())]
            weight = self._kept(x, mask)
            count = float(weight.sum())
            if count > 1:
                mean = (x * weight).sum(axes) / count
                variance = ((x - per_channel(mean, x)).square() * weight).sum(axes) / count
                self.seen.append((count, mean.detach(), variance.detach()))
        scaled = (x - per_channel(mean, x)) * per_channel((variance + self.epsilon).rsqrt() * scale, x)
        return (scaled + per_channel(bias, x),)

    def _kept(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Zeros and ones [rows, 1, ...]."""
        kept = np.ones([1] * x.dim(), bool)
        if self.keep is not None and mask is not None:
            given = {self.keep.input: mask.detach().cpu().numpy()}
            kept = self.keep.of(given, np.broadcast_to(np.float32(0), tuple(x.shape)))
        whole = np.broadcast_to(kept, (x.shape[0], 1, *x.shape[2:]))
        return torch.from_numpy(whole.copy()).to(x.device, x.dtype)


class FadingParts:
    """The replaced normalizations and attentions of a student, made ready for training.

    Args:
        student: the changed model; what they were is known in the process that replaced them.
        module: the student in torch; its graph is changed.
        momentum: how much of a step's statistics goes into the running ones; 0 leaves these as they are, and training
            uses them.
        keeps: says which rows are padding; all count without it.

    Attributes:
        paths: the names of what the replacements learn, besides statistics.

    Raises:
        InputError: it cannot be told which rows are padding.
    """

    def __init__(self, student: oir.Model, module: fx.GraphModule, momentum: float, keeps: Keeps | None) -> None:
        self._module, self._momentum = module, momentum
        self._fading: list[Fading] = []
        self._rows: list[tuple[RowNorm, str, str]] = []
        found = list(replaced(student))
        self._paths = {value: path for path, value in values_of(student, bridge_of(module).weights).items()}
        wanted = {str(one.batch.outputs[0].name): one for one in found if one.batch is not None}
        sites = {name: (one.batch.inputs[0], 1) for name, one in wanted.items() if one.batch is not None}
        kept = keeps(student, sites) if keeps is not None and sites else {}  # type: ignore[arg-type]
        attentions = list(replaced_attentions(student))
        trained = [value for one in found for value in one.trained]
        trained += [value for one in attentions for value in one.trained]
        self.paths = list(dict.fromkeys(self._paths[value] for value in trained))
        for path in self.paths:
            self._learnt(path)
        nodes = {node.name: node for node in module.graph.nodes}
        values, renamed = bridge_of(module).values, dict[str, str]()
        for one in found:
            if one.batch is not None and momentum:
                keep = kept.get(str(one.batch.outputs[0].name))
                if isinstance(keep, str):
                    hint = "give `momentum` 0, which keeps the statistics as they are"
                    raise InputError(f"padding cannot be left out of its statistics: {keep}", place="heal", hint=hint)
                self._normalize(nodes[values[str(one.batch.outputs[0].name)]], one.batch, keep)
            dtype = module.get_parameter(self._paths[one.trained[0]]).dtype
            x, y = (nodes[values[str(value.name)]] for value in (one.input, one.output))
            renamed[y.name] = self._fade(FormerNorm(one.former, dtype), y, x)
        for other in attentions:
            own = (other.former.queries, other.former.keys, other.former.values)
            if any(name not in values for name in own):  # another edit has changed what it read
                continue
            y = nodes[values[str(other.output.name)]]
            renamed[y.name] = self._fade(FormerAttention(other.former.scale), y, *(nodes[values[name]] for name in own))
        if renamed:
            module.graph.eliminate_dead_code()
            module.recompile()
            ties = bridge_of(module)
            names = {value: renamed.get(name, name) for value, name in ties.values.items()}
            bridge.attach(module, replace(ties, values=names))
            module.to(next(module.parameters()).device)

    def _learnt(self, path: str) -> None:
        """Make a constant a parameter, such as eta, a single number."""
        if path in dict(self._module.named_buffers()):
            parent, _, name = path.rpartition(".")
            where = self._module.get_submodule(parent)
            tensor = getattr(where, name)
            delattr(where, name)
            where.register_parameter(name, nn.Parameter(tensor))

    def _normalize(self, node: fx.Node, batch: oir.Node, keep: Keep | None) -> None:
        """Let rows that count be normalized by their own statistics; `node` takes the only result of `batch`."""
        (call,) = node.all_input_nodes
        mean, variance = (self._paths[value] for value in batch.inputs[3:5] if value is not None)
        for path in (mean, variance):
            self._learnt(path)
            self._module.get_parameter(path).requires_grad_(False)
        mask = None
        if keep is not None:
            placeholder = bridge_of(self._module).inputs[keep.input]
            mask = next(one for one in self._module.graph.nodes if one.name == placeholder)
        made = RowNorm(float(match.attribute(batch, "epsilon", 1e-5)), keep)
        name = f"row_norm_{len(self._rows)}"
        self._module.add_submodule(name, made)
        with self._module.graph.inserting_after(call):
            new = self._module.graph.call_module(name, (*call.args[:5], mask))
        call.replace_all_uses_with(new)
        self._rows.append((made, mean, variance))

    def _fade(self, former: nn.Module, node: fx.Node, *inputs: fx.Node) -> str:
        """Let what a node computes be mixed with what was there; returns the name of the mixture in the graph."""
        made, name = Fading(former), f"fading_{len(self._fading)}"
        self._fading.append(made)
        self._module.add_submodule(name, made)
        with self._module.graph.inserting_after(node):
            new = self._module.graph.call_module(name, (node, *inputs))
        node.replace_all_uses_with(new, lambda user: user is not new)
        return str(new.name)

    def __bool__(self) -> bool:
        """Whether there is anything that fades."""
        return bool(self._fading)

    def without_statistics(self, values: Mapping[str, oir.Value]) -> dict[str, oir.Value]:
        """What may be trained by gradients."""
        own = {path for _, *paths in self._rows for path in paths}
        return {path: value for path, value in values.items() if path not in own}

    def statistics(self) -> dict[str, nn.Parameter]:
        """The running statistics, which have no gradients, by name."""
        return {path: self._module.get_parameter(path) for _, *paths in self._rows for path in paths}

    def at(self, fade: float, share: float) -> None:
        """Set how much of what was there is left at a share of the budget: from 1 to 0 within `fade` of it."""
        left = max(0.0, 1.0 - share / fade) if fade else 0.0
        for one in self._fading:
            one.share = left

    def average(self, add: Add) -> None:
        """Let the running statistics take in what was seen in a step; `add` adds up over processes."""
        with torch.no_grad():
            for made, *paths in self._rows:
                seen, made.seen = made.seen, []
                size = self._module.get_parameter(paths[0]).numel()
                sums = torch.zeros(1 + 2 * size, dtype=torch.float64)
                for count, mean, variance in seen:
                    mean, variance = mean.double().cpu(), variance.double().cpu()
                    sums += count * torch.cat([torch.ones(1, dtype=torch.float64), mean, variance + mean.square()])
                rows, *rest = add(sums.tolist())
                if rows:
                    mean, square = (torch.tensor(rest, dtype=torch.float64) / rows).split(size)
                    for path, now in zip(paths, (mean, square - mean.square()), strict=True):
                        parameter = self._module.get_parameter(path)
                        parameter.lerp_(now.to(parameter), self._momentum)
