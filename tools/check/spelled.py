"""What a run of nodes is, said in few words: told from operators and constants alone, as a lock file has them."""

from __future__ import annotations

from collections.abc import Sequence

from burnish.tools.check.line import Parsed

ACTIVATIONS = ("Gelu", "Gelu by tanh", "SiLU")

_SHOWN = 6
_LAYERS = {"Conv": "convolution", "ConvTranspose": "transposed convolution", "Gemm": "Linear layer"}


def spelled(lines: Sequence[Parsed]) -> str:
    """`LayerNormalization`, `Gelu (5 nodes: Div, Erf, Add, Mul, Mul)`, `7 nodes (Shape, Gather, ...)`."""
    if len(lines) == 1:
        return lines[0].operator + "".join(f" {name}={value}" for name, value in lines[0].attributes)
    kind, shown = recognised(lines), operators(lines)
    return f"{kind} ({len(lines)} nodes: {shown})" if kind else f"{len(lines)} nodes ({shown})"


def operators(lines: Sequence[Parsed]) -> str:
    """The operators of the first few lines."""
    return ", ".join(line.operator for line in lines[:_SHOWN]) + (", ..." if len(lines) > _SHOWN else "")


def plain(line: Parsed) -> str:
    """Operator, constants and attributes of a line, without what it reads."""
    constants = ", ".join(str(one) for one in line.constants)
    shown = "".join(f" {name}={value}" for name, value in line.attributes)
    return f"{line.operator}{f'({constants})' if constants else ''}{shown}"


def brief(lines: Sequence[Parsed]) -> str:
    """The first few lines with their constants: `MatMul(float[4,4]), Add(float[4])`."""
    return ", ".join(plain(line) for line in lines[:_SHOWN]) + (", ..." if len(lines) > _SHOWN else "")


def recognised(lines: Sequence[Parsed]) -> str:
    """What a run of nodes is known to be: a norm, an activation, an attention; empty for anything else."""
    found = {line.operator for line in lines}
    if {"MatMul", "Softmax"} <= found:
        return "attention"
    if found & {"MatMul", "Gemm", "Conv"}:
        return ""
    if "ReduceMean" in found and found & {"Sqrt", "Pow", "Mul"} and found & {"Sqrt", "Reciprocal", "Div", "Pow"}:
        return "layer norm" if "Sub" in found else "RMS norm"
    if "Erf" in found:
        return "Gelu"
    if "Tanh" in found and found & {"Pow", "Mul"}:
        return "Gelu by tanh"
    if "Sigmoid" in found and "Mul" in found:
        return "SiLU"
    return ""


def layer(lines: Sequence[Parsed]) -> str:
    """The layer that added nodes are: `Linear layer`, `convolution`; empty when they are none or more than one."""
    weights = any(one.is_weight for line in lines for one in line.constants)
    heads = [line for line in lines if line.operator in (*_LAYERS, "MatMul")]
    rest = [line for line in lines if line not in heads]
    if (
        not weights
        or len(heads) != 1
        or len(rest) > 2
        or any(line.operator not in ("Add", "Transpose") for line in rest)
    ):
        return ""
    return _LAYERS.get(heads[0].operator, "Linear layer")
