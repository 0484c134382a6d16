"""Recurrent layers of a fixed number of steps, written out step by step."""

from __future__ import annotations

from typing import Any

from tvm import relax

from burnish.backends.tvm.maker import Maker
from burnish.backends.tvm.operators.activation import relu
from burnish.backends.tvm.operators.attention import fixed
from burnish.backends.tvm.operators.movement import part
from burnish.backends.tvm.registry import Unsupported, lowers

op = relax.op
STEPS = 64
"""So many steps at most are written out."""


class _Layer:
    """The weights of one direction and the inputs of its steps: gates of [batch, hidden] from x W^T + h R^T + b."""

    def __init__(self, make: Maker, given: list[Any], at: int, hidden: int, gates: int) -> None:
        self.make, self.hidden = make, hidden
        w, r, b = (None if one is None else self.of(one, at) for one in given)
        self.w, self.r = (make.emit(op.permute_dims(one, [1, 0])) for one in (w, r))
        width = gates * hidden
        self.bias = None if b is None else part(make, b, 0, 0, width)
        self.again = None if b is None else part(make, b, 0, width, 2 * width)

    def of(self, tensor: Any, at: int) -> Any:
        return self.make.emit(op.squeeze(part(self.make, tensor, 0, at, at + 1), [0]))

    def from_input(self, x: Any) -> Any:
        """x W^T + b."""
        found = self.make.emit(op.matmul(x, self.w))
        return found if self.bias is None else self.make.emit(op.add(found, self.bias))

    def from_state(self, h: Any) -> Any:
        """h R^T + b."""
        found = self.make.emit(op.matmul(h, self.r))
        return found if self.again is None else self.make.emit(op.add(found, self.again))

    def gate(self, gates: Any, index: int) -> Any:
        """One gate of several side by side."""
        return part(self.make, gates, 1, index * self.hidden, (index + 1) * self.hidden)


def _lstm_step(layer: _Layer, x: Any, state: list[Any], options: dict[str, Any]) -> list[Any]:
    make, (h, c) = layer.make, state
    gates = make.emit(op.add(layer.from_input(x), layer.from_state(h)))
    i, o, f = (op.sigmoid(layer.gate(gates, index)) for index in range(3))
    c = make.emit(op.add(op.multiply(f, c), op.multiply(i, op.tanh(layer.gate(gates, 3)))))
    return [make.emit(op.multiply(o, op.tanh(c))), c]


def _gru_step(layer: _Layer, x: Any, state: list[Any], options: dict[str, Any]) -> list[Any]:
    make, (h,) = layer.make, state
    mine, past = layer.from_input(x), layer.from_state(h)
    z, r = (make.emit(op.sigmoid(op.add(layer.gate(mine, at), layer.gate(past, at)))) for at in (0, 1))
    if options["linear_before_reset"]:
        kept = op.multiply(r, layer.gate(past, 2))
    else:
        side = part(make, layer.r, 1, 2 * layer.hidden, 3 * layer.hidden)
        kept = op.matmul(make.emit(op.multiply(r, h)), side)
        if layer.again is not None:
            kept = op.add(kept, part(make, layer.again, 0, 2 * layer.hidden, 3 * layer.hidden))
    new = make.emit(op.tanh(op.add(layer.gate(mine, 2), kept)))
    return [make.emit(op.add(new, op.multiply(z, op.subtract(h, new))))]


def _rnn_step(layer: _Layer, x: Any, state: list[Any], options: dict[str, Any]) -> list[Any]:
    total = layer.make.emit(op.add(layer.from_input(x), layer.from_state(state[0])))
    return [relu(layer.make, total) if options["relu"] else layer.make.emit(op.tanh(total))]


def _run(make: Maker, step: Any, gates: int, given: list[Any], states: list[Any], options: dict[str, Any]) -> Any:
    """All directions and steps: [steps, directions, batch, hidden], and the last states [directions, batch, hidden]."""
    x, hidden = given[0], options["hidden"]
    length, batch, _ = make.shape(x)
    if not 0 < fixed(length, "the number of steps") <= STEPS:
        raise Unsupported(f"{length} steps")
    kinds = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}[options["direction"]]
    steps = [make.emit(op.squeeze(part(make, x, 0, t, t + 1), [0])) for t in range(length)]
    columns, ends = [], []
    for at, backward in enumerate(kinds):
        layer = _Layer(make, given[1:], at, hidden, gates)
        state = [
            make.emit(op.zeros(relax.ShapeExpr([batch, hidden]), make.dtype(x))) if one is None else layer.of(one, at)
            for one in states
        ]
        column: list[Any] = [None] * length
        for t in reversed(range(length)) if backward else range(length):
            state = step(layer, steps[t], state, options)
            column[t] = state[0]
        columns.append(make.emit(op.stack(column, 0)))
        ends.append(state)
    last = [make.emit(op.stack([end[index] for end in ends], 0)) for index in range(len(states))]
    return make.emit(op.stack(columns, 1)), *last


def _options(make: Maker, lengths: Any, activations: Any, usual: list[str], **given: Any) -> dict[str, Any]:
    """The attributes that all layers have; what is not usual is refused."""
    if lengths is not None:
        raise Unsupported("sequences of several lengths")
    directions = 2 if given["direction"] == "bidirectional" else 1
    if activations is not None and list(activations) != usual * directions:
        raise Unsupported("other activations")
    if given.pop("layout"):
        raise Unsupported("a batch before the steps")
    return given


@lowers("LSTM", since=7, several=True)
def lstm(
    make: Maker, x: Any, w: Any, r: Any, b: Any = None, lengths: Any = None, h: Any = None, c: Any = None, *,
    hidden_size: int, direction: str = "forward", activations: Any = None, input_forget: int = 0, layout: int = 0,
) -> Any:  # fmt: skip
    if input_forget:
        raise Unsupported("coupled gates")
    options = _options(
        make, lengths, activations, ["Sigmoid", "Tanh", "Tanh"], hidden=hidden_size, direction=direction, layout=layout
    )
    return _run(make, _lstm_step, 4, [x, w, r, b], [h, c], options)


@lowers("GRU", since=7, several=True)
def gru(
    make: Maker, x: Any, w: Any, r: Any, b: Any = None, lengths: Any = None, h: Any = None, *,
    hidden_size: int, direction: str = "forward", activations: Any = None, linear_before_reset: int = 0,
    layout: int = 0,
) -> Any:  # fmt: skip
    options = _options(
        make, lengths, activations, ["Sigmoid", "Tanh"], hidden=hidden_size, direction=direction, layout=layout
    )
    return _run(make, _gru_step, 3, [x, w, r, b], [h], options | {"linear_before_reset": linear_before_reset})


@lowers("RNN", since=7, several=True)
def rnn(
    make: Maker, x: Any, w: Any, r: Any, b: Any = None, lengths: Any = None, h: Any = None, *,
    hidden_size: int, direction: str = "forward", activations: Any = None, layout: int = 0,
) -> Any:  # fmt: skip
    relus = activations is not None and set(activations) == {"Relu"}
    usual = ["Relu"] if relus else ["Tanh"]
    options = _options(make, lengths, activations, usual, hidden=hidden_size, direction=direction, layout=layout)
    return _run(make, _rnn_step, 1, [x, w, r, b], [h], options | {"relu": relus})
