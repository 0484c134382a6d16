"""LSTM, GRU and RNN, all directions, layouts, lengths and activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F

from burnish.backends.fx.registry import operator
from burnish.backends.fx.values import Tensor, Value, tensor

Activation = Callable[[Tensor], Tensor]


def _affine(x: Tensor, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    return alpha * x + beta


def _scaled_tanh(x: Tensor, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    return alpha * torch.tanh(beta * x)


def _thresholded(x: Tensor, alpha: float = 1.0) -> Tensor:
    return torch.where(x > alpha, x, torch.zeros_like(x))


def _hard_sigmoid(x: Tensor, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    return torch.clamp(alpha * x + beta, 0.0, 1.0)


def _clip(x: Tensor, alpha: float | None = None, beta: float | None = None) -> Tensor:
    return x if alpha is None and beta is None else torch.clamp(x, alpha, beta)


def _hard_swish(x: Tensor, alpha: float = 1 / 6, beta: float = 0.5) -> Tensor:
    return x * torch.clamp(alpha * x + beta, 0.0, 1.0)


_ACTIVATIONS: dict[str, tuple[Callable[..., Tensor], int]] = {
    "relu": (torch.relu, 0), "tanh": (torch.tanh, 0), "sigmoid": (torch.sigmoid, 0), "softsign": (F.softsign, 0),
    "softplus": (F.softplus, 0), "affine": (_affine, 2), "leakyrelu": (F.leaky_relu, 1),
    "thresholdedrelu": (_thresholded, 1), "scaledtanh": (_scaled_tanh, 2), "hardsigmoid": (_hard_sigmoid, 2),
    "elu": (F.elu, 1), "clip": (_clip, 2), "hardswish": (_hard_swish, 2),
}  # fmt: skip
"""By name in lower case: the function, and how many of alpha and beta it takes."""


def activation(name: str, alpha: float | None = None, beta: float | None = None) -> Activation:
    """The activation that recurrent and fused operators know by `name` (any case)."""
    function, takes = _ACTIVATIONS[name.lower()]
    given = [(key, v) for key, v in (("alpha", alpha), ("beta", beta))[:takes] if v is not None]
    if function is F.leaky_relu:
        return partial(function, negative_slope=0.01 if alpha is None else alpha)
    return partial(function, **dict(given)) if given else function


def _activations(
    names: Sequence[str] | None, alphas: Sequence[float] | None, betas: Sequence[float] | None,
    default: Sequence[str], directions: int, clip: float | None,
) -> list[list[Activation]]:  # fmt: skip
    left, right = list(alphas or ()), list(betas or ())
    made: list[Activation] = []
    each = len(default)
    for name in list(names or [*default] * directions):
        takes = _ACTIVATIONS[name.lower()][1]
        one = left.pop(0) if left and takes > 0 else None
        two = right.pop(0) if right and takes > 1 else None
        found = activation(name, one, two)
        # What the gates read is clipped, as ONNX Runtime does it; what is made of the cell is not.
        of_cell = len(made) % each == 2
        made.append(found if not clip or of_cell else partial(_clipped, found, clip))
    return [made[i * each : (i + 1) * each] for i in range(directions)]


def _clipped(function: Activation, limit: float, x: Tensor) -> Tensor:
    return function(torch.clamp(x, -limit, limit))


def _unrolled(
    step: Callable[..., tuple[Tensor, ...]], x: Tensor, state: list[list[Tensor]], lengths: Tensor | None,
    backwards: Sequence[bool],
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """Run `step(direction, x[t], *state)` over time; states of rows that have ended stay, their outputs are zero."""
    outputs, finals = [], []
    for d, back in enumerate(backwards):
        now, rows = [part[d] for part in state], []
        for t in range(len(x) - 1, -1, -1) if back else range(len(x)):
            new = step(d, x[t], *now)
            if lengths is not None:
                alive = (t < lengths)[:, None]
                new = tuple(torch.where(alive, a, b) for a, b in zip(new, now, strict=True))
                rows.append(torch.where(alive, new[0], torch.zeros_like(new[0])))
            else:
                rows.append(new[0])
            now = list(new)
        outputs.append(torch.stack(rows[::-1] if back else rows))
        finals.append(now)
    return torch.stack(outputs, 1), [torch.stack(parts) for parts in zip(*finals, strict=True)]


def _prepare(
    x: Tensor, lengths: Value, layout: int, states: Sequence[Value], directions: int, size: int
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    if layout:
        x = x.transpose(0, 1)
        states = [None if s is None else s.transpose(0, 1) for s in states]
    blank = x.new_zeros(directions, x.shape[1], size)
    return x, tensor(lengths), [blank if s is None else s for s in states]


def _finish(y: Tensor, states: Sequence[Tensor], layout: int) -> tuple[Tensor, ...]:
    if layout:
        return y.permute(2, 0, 1, 3), *(s.transpose(0, 1) for s in states)
    return y, *states


def _backwards(direction: str) -> list[bool]:
    return {"forward": [False], "reverse": [True], "bidirectional": [False, True]}[direction]


def _fast(
    kind: str, order: Sequence[int], x: Tensor, w: Tensor, r: Tensor, b: Tensor, states: list[Tensor], direction: str
) -> tuple[Tensor, list[Tensor]]:
    """torch's own LSTM or GRU, with the gates in its order."""
    x = x.flip(0) if direction == "reverse" else x
    weights = []
    for d in range(w.shape[0]):
        parts = (w[d], r[d], *b[d].chunk(2))
        weights += [torch.cat([part.chunk(len(order))[i] for i in order]) for part in parts]
    options = (True, 1, 0.0, False, w.shape[0] == 2, False)
    if kind == "LSTM":
        y, *found = torch._VF.lstm(x, tuple(s.contiguous() for s in states), weights, *options)
    else:
        y, *found = torch._VF.gru(x, states[0].contiguous(), weights, *options)
    y = y.reshape(*y.shape[:2], w.shape[0], -1).transpose(1, 2)
    return (y.flip(0) if direction == "reverse" else y), list(found)


@operator("LSTM", several=True)
def lstm(
    x: Tensor, w: Tensor, r: Tensor, b: Value = None, lengths: Value = None, h0: Value = None, c0: Value = None,
    peepholes: Value = None, hidden_size: int | None = None, direction: str = "forward", layout: int = 0,
    activations: Sequence[str] | None = None, activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None, clip: float | None = None, input_forget: int = 0,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Outputs of all steps, the last output, and the last cell state."""
    directions, size = w.shape[0], r.shape[2]
    x, lengths, states = _prepare(x, lengths, layout, (h0, c0), directions, size)
    plain = activations is None and lengths is None and peepholes is None and not clip and not input_forget
    b = w.new_zeros(directions, 8 * size) if b is None else b
    if plain and x.shape[0]:
        return _finish(*_fast("LSTM", (0, 2, 3, 1), x, w, r, b, states, direction), layout)
    acts = _activations(activations, activation_alpha, activation_beta, ("Sigmoid", "Tanh", "Tanh"), directions, clip)
    p = w.new_zeros(directions, 3 * size) if peepholes is None else peepholes

    def step(d: int, now: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        f, g, out = acts[d]
        i, o, forget, cell = (F.linear(now, w[d], b[d, : 4 * size]) + F.linear(h, r[d], b[d, 4 * size :])).chunk(4, -1)
        into, outof, keep = p[d].chunk(3)
        i = f(i + into * c)
        forget = 1.0 - i if input_forget else f(forget + keep * c)
        c = forget * c + i * g(cell)
        return f(o + outof * c) * out(c), c

    return _finish(*_unrolled(step, x, [list(s) for s in states], lengths, _backwards(direction)), layout)


@operator("GRU", several=True)
def gru(
    x: Tensor, w: Tensor, r: Tensor, b: Value = None, lengths: Value = None, h0: Value = None,
    hidden_size: int | None = None, direction: str = "forward", layout: int = 0,
    activations: Sequence[str] | None = None, activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None, clip: float | None = None, linear_before_reset: int = 0,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Outputs of all steps, and the last one."""
    directions, size = w.shape[0], r.shape[2]
    x, lengths, states = _prepare(x, lengths, layout, (h0,), directions, size)
    b = w.new_zeros(directions, 6 * size) if b is None else b
    if activations is None and lengths is None and not clip and linear_before_reset and x.shape[0]:
        return _finish(*_fast("GRU", (1, 0, 2), x, w, r, b, states, direction), layout)
    acts = _activations(activations, activation_alpha, activation_beta, ("Sigmoid", "Tanh"), directions, clip)

    def step(d: int, now: Tensor, h: Tensor) -> tuple[Tensor]:
        f, g = acts[d]
        wb, rb = b[d].chunk(2)
        inputs = F.linear(now, w[d], wb)
        z, reset = f(inputs[:, : 2 * size] + F.linear(h, r[d, : 2 * size], rb[: 2 * size])).chunk(2, -1)
        if linear_before_reset:
            new = g(inputs[:, 2 * size :] + reset * F.linear(h, r[d, 2 * size :], rb[2 * size :]))
        else:
            new = g(inputs[:, 2 * size :] + F.linear(reset * h, r[d, 2 * size :], rb[2 * size :]))
        return ((1.0 - z) * new + z * h,)

    return _finish(*_unrolled(step, x, [list(s) for s in states], lengths, _backwards(direction)), layout)


@operator("RNN", several=True)
def rnn(
    x: Tensor, w: Tensor, r: Tensor, b: Value = None, lengths: Value = None, h0: Value = None,
    hidden_size: int | None = None, direction: str = "forward", layout: int = 0,
    activations: Sequence[str] | None = None, activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None, clip: float | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Outputs of all steps, and the last one."""
    directions, size = w.shape[0], r.shape[2]
    x, lengths, states = _prepare(x, lengths, layout, (h0,), directions, size)
    b = w.new_zeros(directions, 2 * size) if b is None else b
    acts = _activations(activations, activation_alpha, activation_beta, ("Tanh",), directions, clip)

    def step(d: int, now: Tensor, h: Tensor) -> tuple[Tensor]:
        return (acts[d][0](F.linear(now, w[d], b[d, :size]) + F.linear(h, r[d], b[d, size:])),)

    return _finish(*_unrolled(step, x, [list(s) for s in states], lengths, _backwards(direction)), layout)
