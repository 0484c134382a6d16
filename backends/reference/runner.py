"""Evaluate a model node by node in float64.

Every float16, bfloat16 and float32 tensor is float64 here, so the result is free of the model's own rounding: two
spellings of the same function agree to about 1e-12, and whatever differs by more than that differs in meaning. Weights
are read through `burnish.ir.weights.exact`, that is unrounded where a rewrite made them; float attributes are used as
they stand, unrounded too. Integers, booleans and the narrow dtypes of quantization keep their own arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as oir

from burnish.backends.reference import fallback
from burnish.backends.reference.registry import OPERATORS, REAL, Array, Call, Operator, cast
from burnish.ir import weights
from burnish.ir.errors import BurnishError, InputError
from burnish.ir.match import describe
from burnish.ir.walk import is_op

_SMALL = 4096
"""Constants of up to this many elements stay in memory between their uses."""

Values = dict[oir.Value, Any]
Attributes = Mapping[str, Any]


@dataclass(frozen=True)
class _Step:
    node: oir.Node
    run: Operator | None
    call: Call
    references: tuple[tuple[str, str], ...]
    dead: tuple[oir.Value, ...]


@dataclass(frozen=True)
class _Plan:
    steps: tuple[_Step, ...]
    opsets: Mapping[str, int]


class ReferenceRunner:
    """Runs one model in float64; the model must not be edited while it is in use.

    Args:
        model: any model whose operators are of the standard's domains or among the known ones of `com.microsoft`;
            graphs nested in nodes and model-local functions included.

    Raises:
        InputError: an operator has no implementation here (raised at construction where it can be known).
    """

    def __init__(self, model: oir.Model) -> None:
        from burnish.backends.reference import (  # noqa: F401
            attention,
            contrib,
            elementwise,
            movement,
            network,
            packed,
            recurrent,
            resize,
        )

        self._model = model
        self._plans: dict[int, _Plan] = {}
        self._constants: dict[oir.Value, Array] = {}
        self._plan(model.graph, model.opset_imports)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Evaluate the model.

        Args:
            feeds: an array for every input without a default, by name; floats of any width.

        Returns:
            An array for every output by name, in order; every float is float64.

        Raises:
            InputError: an input is missing or unknown, or a node cannot be evaluated.
        """
        graph = self._model.graph
        inputs = {str(v.name): v for v in graph.inputs}
        unknown = [name for name in feeds if name not in inputs]
        missing = [n for n, v in inputs.items() if n not in feeds and v.const_value is None]
        if unknown or missing:
            cause = f"there is no input `{unknown[0]}`" if unknown else f"input `{missing[0]}` is missing"
            raise InputError(cause, hint=f"the model's inputs are {', '.join(inputs)}")
        values: Values = {inputs[name]: _fed(array) for name, array in feeds.items()}
        with np.errstate(all="ignore"):
            outputs = self._evaluate(graph, values, {})
        return {str(v.name): found for v, found in zip(graph.outputs, outputs, strict=True)}

    def close(self) -> None:
        """Forget the constants that were kept between runs."""
        self._constants.clear()

    def _plan(self, graph: oir.Graph | oir.Function, opsets: Mapping[str, int]) -> _Plan:
        plan = self._plans.get(id(graph))
        if plan is None:
            plan = self._plans[id(graph)] = _Plan(tuple(self._steps(graph, opsets)), opsets)
        return plan

    def _steps(self, graph: oir.Graph | oir.Function, opsets: Mapping[str, int]) -> list[_Step]:
        alive = {v for v in graph.outputs if v is not None}
        own = {out for node in graph for out in node.outputs} | set(graph.inputs)
        steps: list[_Step] = []
        for node in reversed(list(graph)):
            if node.op_type == "Constant" and weights.tensor_of(node.outputs[0]) is not None:
                continue
            used = {v for v in _read(node) if v in own}
            dead = tuple(v for v in used if v not in alive)
            alive |= used
            steps.append(self._step(node, opsets, dead))
        return steps[::-1]

    def _step(self, node: oir.Node, opsets: Mapping[str, int], dead: tuple[oir.Value, ...]) -> _Step:
        domain = "" if node.domain == "ai.onnx" else node.domain
        version = opsets.get(domain, opsets.get("ai.onnx", 1) if not domain else 1)
        given = [i for i, out in enumerate(node.outputs) if out.name != ""]
        own = {n: _attribute(a) for n, a in node.attributes.items() if not a.is_ref()}
        references = tuple((n, str(a.ref_attr_name)) for n, a in node.attributes.items() if a.is_ref())
        call = Call(node.op_type, own, given[-1] + 1 if given else 0, version)
        run: Operator | None = None
        if node.op_identifier() not in self._model.functions and not is_op(node, "If", "Loop", "Scan"):
            run = OPERATORS.get((domain, node.op_type)) or fallback.find(node, version)
        for attribute in node.attributes.values():
            if attribute.type == oir.AttributeType.GRAPH and not attribute.is_ref():
                self._plan(attribute.as_graph(), opsets)
        return _Step(node, run, call, references, dead)

    def _constant(self, value: oir.Value) -> Any:
        found = self._constants.get(value)
        if found is not None:
            return found
        tensor = weights.tensor_of(value) or value.const_value
        if tensor is None:
            raise InputError(f"value `{value.name}` is read before it is computed")
        exact = weights.exact(value) if tensor.dtype in REAL else None
        array = _array(tensor) if exact is None else exact
        if array.size <= _SMALL:
            self._constants[value] = array
        return array

    def _get(self, values: Values, value: oir.Value | None) -> Any:
        if value is None or value.name == "":
            return None
        return values[value] if value in values else self._constant(value)

    def _evaluate(self, graph: oir.Graph | oir.Function, values: Values, attributes: Attributes) -> list[Any]:
        """Run the nodes of `graph`, whose inputs are in `values`, and give its outputs."""
        for step in self._plans[id(graph)].steps:
            try:
                results = self._results(step, values, attributes)
            except BurnishError:
                raise
            except Exception as error:
                raise InputError(
                    f"cannot be evaluated: {error or type(error).__name__}", place=describe(step.node)
                ) from error
            for out, result in zip(step.node.outputs, results, strict=False):
                if out.name != "" and result is not None:
                    values[out] = result
            for value in step.dead:
                values.pop(value, None)
        return [self._get(values, v) for v in graph.outputs]

    def _results(self, step: _Step, values: Values, attributes: Attributes) -> Sequence[Any]:
        node, call = step.node, step.call
        if step.references:
            own = dict(call.attributes) | {n: attributes[r] for n, r in step.references if r in attributes}
            call = Call(call.op, own, call.outputs, call.version)
        if step.run is None:
            function = self._model.functions.get(node.op_identifier())
            if function is not None:
                return self._function(function, [self._get(values, v) for v in node.inputs], call.attributes)
            structure = {"If": self._if, "Loop": self._loop, "Scan": self._scan}[node.op_type]
            return structure(call, [self._get(values, v) for v in node.inputs], values, attributes)
        if node.op_type == "Gather" and (rows := self._rows(node, values, call)) is not None:
            return (rows,)
        result = step.run(call, *(self._get(values, v) for v in node.inputs))
        return result if isinstance(result, tuple) else (result,)

    def _rows(self, node: oir.Node, values: Values, call: Call) -> Array | None:
        """A Gather from a large table, widened after taking instead of before."""
        table = node.inputs[0]
        if table is None or table in values or weights.unrounded(table) is not None:
            return None
        tensor = weights.tensor_of(table)
        if tensor is None or tensor.size <= _SMALL or tensor.dtype not in REAL:
            return None
        taken = np.take(tensor.numpy(), self._get(values, node.inputs[1]), axis=call.get("axis", 0))
        return np.asarray(taken.astype(np.float64))

    def _function(self, function: oir.Function, inputs: Sequence[Any], given: Attributes) -> list[Any]:
        self._plan(function, function.opset_imports)
        attributes = {n: _attribute(a) for n, a in function.attributes.items() if a.value is not None} | dict(given)
        values: Values = {v: x for v, x in zip(function.inputs, inputs, strict=False) if x is not None}
        for value in function.inputs:
            values.setdefault(value, None)
        return self._evaluate(function, values, attributes)

    def _if(self, call: Call, inputs: Sequence[Any], values: Values, attributes: Attributes) -> list[Any]:
        branch = call.get("then_branch" if bool(np.asarray(inputs[0]).reshape(-1)[0]) else "else_branch")
        return self._evaluate(branch, values, attributes)

    def _loop(self, call: Call, inputs: Sequence[Any], values: Values, attributes: Attributes) -> list[Any]:
        body: oir.Graph = call.get("body")
        limit = None if inputs[0] is None else int(inputs[0].reshape(-1)[0])
        going = True if inputs[1] is None else bool(inputs[1].reshape(-1)[0])
        carried = list(inputs[2:])
        collected: list[list[Array]] = [[] for _ in range(len(body.outputs) - 1 - len(carried))]
        step = 0
        while going and (limit is None or step < limit):
            state = [np.asarray(step, np.int64), np.asarray(going), *carried]
            values.update(zip(body.inputs, state, strict=True))
            condition, *rest = self._evaluate(body, values, attributes)
            carried = rest[: len(carried)]
            for rows, row in zip(collected, rest[len(carried) :], strict=True):
                rows.append(row)
            going = bool(condition.reshape(-1)[0])
            step += 1
        outputs = body.outputs[1 + len(carried) :]
        return carried + [np.stack(r) if r else _empty(v) for r, v in zip(collected, outputs, strict=True)]

    def _scan(self, call: Call, inputs: Sequence[Any], values: Values, attributes: Attributes) -> list[Any]:
        body: oir.Graph = call.get("body")
        if call.version < 9:
            raise InputError("Scan is known from opset 9 on", hint="convert the model to opset 9 or newer")
        count = call.get("num_scan_inputs")
        carried, scanned = list(inputs[: len(inputs) - count]), inputs[len(inputs) - count :]
        axes = call.get("scan_input_axes") or [0] * count
        back = call.get("scan_input_directions") or [0] * count
        rows = [np.moveaxis(x, a, 0)[:: -1 if b else 1] for x, a, b in zip(scanned, axes, back, strict=True)]
        made = len(body.outputs) - len(carried)
        collected: list[list[Array]] = [[] for _ in range(made)]
        for items in zip(*rows, strict=True):
            values.update(zip(body.inputs, [*carried, *items], strict=True))
            rest = self._evaluate(body, values, attributes)
            carried = rest[: len(carried)]
            for column, item in zip(collected, rest[len(carried) :], strict=True):
                column.append(item)
        axes = call.get("scan_output_axes") or [0] * made
        back = call.get("scan_output_directions") or [0] * made
        outputs = body.outputs[len(carried) :]
        stacked = [
            np.stack(c[:: -1 if b else 1]) if c else _empty(v) for c, b, v in zip(collected, back, outputs, strict=True)
        ]
        return carried + [np.moveaxis(x, 0, a) for x, a in zip(stacked, axes, strict=True)]


def _fed(array: Any) -> Any:
    """An input as the nodes see it; a sequence stays a list."""
    if isinstance(array, list):
        return [_fed(a) for a in array]
    array = np.asarray(array)
    if array.dtype.kind in "OSU":
        return array.astype(object)
    dtype = oir.DataType.from_numpy(array.dtype)
    return cast(array, dtype) if dtype in REAL else array


def _array(tensor: oir.TensorProtocol) -> Array:
    if tensor.dtype == oir.DataType.STRING:
        found = np.asarray(tensor.numpy(), object)
        spelled = [x.decode() if isinstance(x, bytes) else x for x in found.reshape(-1)]
        return np.asarray(spelled, object).reshape(found.shape)
    array = tensor.numpy()
    return array.astype(np.float64) if tensor.dtype in REAL else array


def _attribute(attribute: oir.Attr) -> Any:
    if attribute.type == oir.AttributeType.STRING:
        return attribute.as_string()
    if attribute.type == oir.AttributeType.STRINGS:
        return list(attribute.as_strings())
    if attribute.type == oir.AttributeType.TENSOR:
        return _array(attribute.as_tensor())
    if attribute.type == oir.AttributeType.FLOAT:
        stored = np.float32(attribute.as_float())
        root = weights.meant(stored)
        return root if root != float(stored) else attribute.as_float()
    return list(attribute.value) if isinstance(attribute.value, tuple) else attribute.value


def _read(node: oir.Node) -> Iterable[oir.Value]:
    """The values a node reads, those that its nested graphs take from outside included."""
    yield from (v for v in node.inputs if v is not None)
    for attribute in node.attributes.values():
        if attribute.type == oir.AttributeType.GRAPH and not attribute.is_ref():
            graph = attribute.as_graph()
            for inner in graph:
                yield from _read(inner)
            yield from (v for v in graph.outputs if v is not None)


def _empty(value: oir.Value) -> Array:
    """What no iteration collects: no rows of the declared shape."""
    dtype = value.dtype or oir.DataType.FLOAT
    dims = [d if isinstance(d, int) else 0 for d in value.shape] if value.shape is not None else []
    return np.zeros([0, *dims], np.float64 if dtype in REAL else dtype.numpy())
