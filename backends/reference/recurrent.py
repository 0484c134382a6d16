"""LSTM, GRU and RNN, all directions, layouts, lengths and activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from burnish.backends.reference.elementwise import sigmoid, softplus
from burnish.backends.reference.registry import Array, Call, operator

Activation = Callable[[Array], Array]


def activation(name: str, alpha: float | None = None, beta: float | None = None) -> Activation:
    """The activation that recurrent and fused operators know by `name` (any case)."""

    def pick(value: float | None, default: float) -> float:
        return default if value is None else value

    table: dict[str, Activation] = {
        "relu": lambda x: np.maximum(x, 0.0),
        "tanh": np.tanh,
        "sigmoid": sigmoid,
        "affine": lambda x: pick(alpha, 1.0) * x + pick(beta, 0.0),
        "leakyrelu": lambda x: np.where(x < 0, pick(alpha, 0.01) * x, x),
        "thresholdedrelu": lambda x: np.where(x > pick(alpha, 1.0), x, 0.0),
        "scaledtanh": lambda x: pick(alpha, 1.0) * np.tanh(pick(beta, 1.0) * x),
        "hardsigmoid": lambda x: np.clip(pick(alpha, 0.2) * x + pick(beta, 0.5), 0.0, 1.0),
        "elu": lambda x: np.where(x < 0, pick(alpha, 1.0) * np.expm1(np.minimum(x, 0.0)), x),
        "softsign": lambda x: x / (1.0 + np.abs(x)),
        "softplus": softplus,
        "clip": lambda x: np.clip(x, pick(alpha, -np.inf), pick(beta, np.inf)),
        "hardswish": lambda x: x * np.clip(pick(alpha, 1 / 6) * x + pick(beta, 0.5), 0.0, 1.0),
    }
    return table[name.lower()]


_DEFAULT = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}
_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
_TAKES_ALPHA = {"affine", "leakyrelu", "thresholdedrelu", "scaledtanh", "hardsigmoid", "elu", "clip"}
_TAKES_BETA = {"affine", "scaledtanh", "hardsigmoid", "clip"}


def _activations(call: Call, directions: int) -> list[list[Activation]]:
    names = list(call.get("activations") or _DEFAULT[call.op] * directions)
    alphas, betas = list(call.get("activation_alpha") or ()), list(call.get("activation_beta") or ())
    made = [
        activation(
            name,
            alphas.pop(0) if alphas and name.lower() in _TAKES_ALPHA else None,
            betas.pop(0) if betas and name.lower() in _TAKES_BETA else None,
        )
        for name in names
    ]
    each = len(_DEFAULT[call.op])
    return [made[i * each : (i + 1) * each] for i in range(directions)]


def _step_lstm(
    call: Call, gates: Array, r: Array, rb: Array, h: Array, c: Array, p: Array, acts: list[Activation]
) -> tuple[Array, Array]:
    f, g, out = acts
    size = h.shape[-1]
    parts = gates + h @ r.T + rb
    i, o, forget, cell = (parts[:, n * size : (n + 1) * size] for n in range(4))
    i = f(i + p[:size] * c)
    forget = 1.0 - i if call.get("input_forget", 0) else f(forget + p[2 * size :] * c)
    c = forget * c + i * g(cell)
    return f(o + p[size : 2 * size] * c) * out(c), c


def _step_gru(call: Call, gates: Array, r: Array, rb: Array, h: Array, acts: list[Activation]) -> Array:
    f, g = acts
    size = h.shape[-1]
    both = f(gates[:, : 2 * size] + h @ r[: 2 * size].T + rb[: 2 * size])
    z, reset = both[:, :size], both[:, size:]
    if call.get("linear_before_reset", 0):
        new = g(gates[:, 2 * size :] + reset * (h @ r[2 * size :].T + rb[2 * size :]))
    else:
        new = g(gates[:, 2 * size :] + (reset * h) @ r[2 * size :].T + rb[2 * size :])
    return np.asarray((1.0 - z) * new + z * h)


@operator("LSTM", "GRU", "RNN")
def _recurrent(
    call: Call, x: Array, w: Array, r: Array, b: Array | None = None, lengths: Array | None = None,
    h0: Array | None = None, c0: Array | None = None, peepholes: Array | None = None,
) -> Any:  # fmt: skip
    batch_first = call.get("layout", 0)
    if batch_first:
        x = x.swapaxes(0, 1)
        h0, c0 = (None if s is None else s.swapaxes(0, 1) for s in (h0, c0))
    steps, batch, _ = x.shape
    directions, size = w.shape[0], r.shape[2]
    gates = _GATES[call.op]
    b = np.zeros((directions, 2 * gates * size)) if b is None else b
    clip = call.get("clip")
    ys = np.zeros((steps, directions, batch, size))
    last_h, last_c = np.zeros((directions, batch, size)), np.zeros((directions, batch, size))
    ends = np.full(batch, steps) if lengths is None else lengths
    for d, acts in enumerate(_activations(call, directions)):
        if clip:
            # What the gates read is clipped, as ONNX Runtime does it; what is made of the cell is not.
            acts = [*(lambda v, f=f: f(np.clip(v, -clip, clip)) for f in acts[:2]), *acts[2:]]
        backwards = d == 1 or call.get("direction", "forward") == "reverse"
        h = np.zeros((batch, size)) if h0 is None else h0[d]
        c = np.zeros((batch, size)) if c0 is None else c0[d]
        p = np.zeros(3 * size) if peepholes is None else peepholes[d]
        wb, rb = b[d, : gates * size], b[d, gates * size :]
        inputs = x @ w[d].T + wb
        for t in range(steps - 1, -1, -1) if backwards else range(steps):
            alive = (t < ends)[:, None]
            if call.op == "LSTM":
                new, cell = _step_lstm(call, inputs[t], r[d], rb, h, c, p, acts)
                c = np.where(alive, cell, c)
            elif call.op == "GRU":
                new = _step_gru(call, inputs[t], r[d], rb, h, acts)
            else:
                new = acts[0](inputs[t] + h @ r[d].T + rb)
            h = np.where(alive, new, h)
            ys[t, d] = np.where(alive, new, 0.0)
        last_h[d], last_c[d] = h, c
    if batch_first:
        ys, last_h, last_c = ys.transpose(2, 0, 1, 3), last_h.swapaxes(0, 1), last_c.swapaxes(0, 1)
    return (ys, last_h, last_c) if call.op == "LSTM" else (ys, last_h)
