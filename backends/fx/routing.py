"""Routers that are learned alone: which rows of a model's samples can do without the attention of a block.

As in Router-Tuning (arXiv:2410.13184), nothing but the routers is trained, a gate is open or closed, and its gradient
is that of the sigmoid of its score (straight through, arXiv:1308.3432). What differs: the loss is the distance from
what the model computes with all gates open, so that no labels are needed; the share of closed gates has a target;
logistic noise is added to scores while training; and routers do not start open, from where nothing would close them,
but at what was measured: how far each row's outputs move when one gate alone is closed, of which the mean of the stream
tells something or nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as oir
import torch
from torch import nn

from burnish.backends.fx.routing_gates import TINY, Fit, Routers
from burnish.ir.samples import Sample
from burnish.passes.gates import Router
from burnish.passes.lossy import Keeps
from burnish.passes.routers import Routed, Routing

_SEEN = 8
"""Batches on which a share is met."""
_LOOKS = 4
"""How often trained routers are looked at."""
_STRENGTH = 100.0
"""Of the squared distance from the wanted share, where the distance from the original counts 1 at the start."""
_RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
_NEWTON = 30


def _expected(x: torch.Tensor, far: torch.Tensor, strength: float) -> torch.Tensor:
    """Weights and a bias, float64 [features + 1], of the logarithm of the distance that is expected of a mean.

    They maximize the Poisson likelihood, which asks for the conditional mean of any distribution, with a ridge.
    """
    found = torch.zeros(x.shape[1] + 1, dtype=torch.float64)
    found[-1] = far.mean().log()
    ones = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    ridge = torch.full((x.shape[1] + 1,), strength, dtype=torch.float64)
    ridge[-1] = 0.0
    scale = far.mean()
    for _ in range(_NEWTON):
        rate = (ones @ found).clamp(-60, 60).exp() / scale
        slope = ones.T @ (rate - far / scale) / len(x) + ridge * found
        curve = (ones.T * rate) @ ones / len(x) + torch.diag(ridge + TINY)
        step = torch.linalg.solve(curve, slope)
        found = found - step * min(1.0, 2.0 / max(float((ones @ step).abs().max()), TINY))
    return found


def _surprise(x: torch.Tensor, far: torch.Tensor, found: torch.Tensor) -> float:
    """How unlikely distances are, relative to others of the same rows."""
    logs = (x @ found[:-1] + found[-1]).clamp(-60, 60)
    return float((logs.exp() - far * logs).mean())


def _scale(run: Routers, fit: Fit) -> None:
    """Let gates read means that are centred and of one spread."""
    for gate, means in zip(run.gates, fit.means, strict=True):
        x = means.double()
        gate.centre.copy_(x.mean(0))
        gate.spread.copy_(x.std(0).clamp_min(1e-6) if len(x) > 1 else torch.ones(x.shape[1]))


def _fitted(run: Routers, fit: Fit, held: Fit) -> None:
    """Let each score be the logarithm of the distance that is expected of its mean.

    How much a mean may say is chosen on held-out rows; where it says nothing there, the score is the same for all rows.
    """
    level = float((fit.distances.double().mean() + TINY).log())
    for number, gate in enumerate(run.gates):
        x, z = ((one.means[number].double() - gate.centre) / gate.spread for one in (fit, held))
        y, rest = (one.distances[:, number].double() + TINY for one in (fit, held))
        best = torch.cat([torch.zeros(x.shape[1]), y.mean().log()[None]]).double()
        least = _surprise(z, rest, best)
        for strength in _RIDGES:
            found = _expected(x, y, strength)
            surprise = _surprise(z, rest, found)
            if surprise < least:
                least, best = surprise, found
        with torch.no_grad():
            gate.weight.copy_(best[:-1])
            gate.bias.copy_(best[-1] - level)


def _trained(run: Routers, wanted: Routing, first: float, tell: Callable[[], None], look: Callable[[], object]) -> None:
    """Steps of AdamW on the routers alone; `look` is called now and then."""
    parameters = [one for gate in run.gates for one in gate.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=wanted.rate, weight_decay=0.0)
    looks = {wanted.steps * (number + 1) // _LOOKS for number in range(_LOOKS)}
    for step in range(wanted.steps):
        for group in optimizer.param_groups:
            group["lr"] = wanted.rate * (1 - step / wanted.steps)
        run.learn(True)
        run.set("routed")
        far = torch.cat([run.distance(run.run(one), one) for one in run.batches.training[run.batches.at(step)]]).mean()
        closed = torch.cat([one for gate in run.gates for one in gate.closed]).mean()
        loss = far / max(first, TINY) + _STRENGTH * (closed - wanted.share).square()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        run.learn(False)
        tell()
        if step + 1 in looks:
            look()


def _same(run: Routers, share: float, means: torch.Tensor) -> tuple[float, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Gates that are the same for all rows, those closed whose mean distances are least, and how far that is.

    Where no whole number of gates is the share, it is between the two numbers around it, as if rows were drawn by lot.
    """
    order = torch.argsort(means).tolist()
    exact = share * len(order)
    found = []
    for count in sorted({int(np.floor(exact)), int(np.ceil(exact)), round(exact)}):
        closed = set(order[:count])
        biases = [torch.tensor(-1.0 if number in closed else 1.0) for number in range(len(order))]
        run.load([(torch.zeros_like(gate.weight), bias) for gate, bias in zip(run.gates, biases, strict=True)])
        found.append((count, run.judged(run.batches.held_out)[0], run.read()))
    far = float(np.interp(exact, [one[0] for one in found], [one[1] for one in found]))
    return far, min(found, key=lambda one: abs(one[0] - exact))[2]


def route(
    model: oir.Model,
    wanted: Routing,
    samples: Sequence[Sample],
    keeps: Keeps | None = None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> Routed:
    """Learn routers for the attention of a model; the same samples and options give the same routers.

    Of what was measured, what was trained from there, and gates that are the same for all rows, the routers are taken
    that are nearest to the original on held-out rows, when each closes the wanted share of the gates.

    Args:
        model: not changed.
        wanted: where, how many, and how.
        samples: what is learned from.
        keeps: says which rows of the outputs are padding; all count without it.
        on_step: progress.

    Raises:
        InputError: there are less than two rows, or torch cannot express the model or differentiate it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(wanted.seed)
        run = Routers(model, wanted, samples, keeps)
        parts = run.batches.training, run.batches.held_out
        count = sum(len(batch) for part in parts for batch in part) * len(run.gates)
        done, total = 0, wanted.rounds * count + wanted.steps

        def tell() -> None:
            nonlocal done
            done += 1
            on_step(done, total)

        fit, held = (run.measured(part, tell) for part in parts)
        found: dict[str, tuple[float, list[tuple[torch.Tensor, torch.Tensor]]]] = {}

        def note(name: str) -> float:
            far = run.meet(wanted.share, run.batches.training[:_SEEN])
            apart = run.judged(run.batches.held_out)[0]
            if name not in found or apart < found[name][0]:
                found[name] = apart, run.read()
            return far

        _scale(run, fit)
        first, again = 0.0, (fit, held)
        for number in range(wanted.rounds):
            if number:
                run.load(found["measured"][1])
                again = tuple(run.measured(part, tell, "routed") for part in parts)  # type: ignore[assignment]
            _fitted(run, *again)
            first = note("measured") if not number else min(first, note("measured"))
        if wanted.steps:
            run.load(found["measured"][1])
            _trained(run, wanted, first, tell, lambda: note("trained"))
        found["the same for all rows"] = _same(run, wanted.share, fit.distances.mean(0))
        how = min(found, key=lambda name: found[name][0])
        run.load(found[how][1])
        alone = tuple(fit.distances.mean(0).tolist())
        closed = run.judged([*run.batches.training, *run.batches.held_out])[1]
    routers = []
    for gate in run.gates:
        weight = (gate.weight / gate.spread).detach().double().numpy()
        bias = float(gate.bias.detach()) - float(weight @ gate.centre.double().numpy())
        routers.append(Router(weight, bias))
    distances = {name: far for name, (far, _) in found.items()}
    return Routed(tuple(routers), tuple(float(one) for one in closed), how, distances, alone)
