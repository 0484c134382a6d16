"""The C++ source of a whole model around its kernels, and the C header of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import Any

import jinja2

from burnish.backends.tvm.kernels import expressions
from burnish.backends.tvm.kernels.plan import Plan, Step, Tensor
from burnish.backends.tvm.target import Target

_GIVEN = {"input": "in", "weight": "weights", "output": "out"}


def header(plan: Plan, target: Target, title: str) -> str:
    """`model.h`: the functions of the library for C."""
    inputs, outputs = plan.names
    lines = [
        *(f"input {name}: {_shape(one)}" for name, one in zip(inputs, plan.inputs, strict=True)),
        *(f"weight {index}: {_shape(one)}" for index, one in enumerate(plan.weights)),
        *(f"output {name}: {_shape(one)}" for name, one in zip(outputs, plan.outputs, strict=True)),
    ]
    cuda = target.kind == "cuda"
    return rendered(
        "model.h.jinja",
        title=_comment(title),
        target=str(target),
        where="on one GPU, each beginning at 16 bytes" if cuda else "best begun at 64 bytes, else copied",
        tensors=[_comment(line) for line in lines],
        inputs=len(plan.inputs),
        weights=len(plan.weights),
        outputs=len(plan.outputs),
        rank=_rank(plan),
        stream=" on the stream that TVMFFIEnvSetStream has set" if cuda else "",
    )


def source(plan: Plan, target: Target, offsets: Sequence[int]) -> str:
    """The functions of `model.h` and those of tvm-ffi, behind the kernels or linked to them.

    Args:
        plan: what is called.
        target: where.
        offsets: where the bytes of each weight begin in the file of the weights.
    """
    return "\n".join(_source(plan, target, offsets))


def _source(plan: Plan, target: Target, offsets: Sequence[int]) -> Iterator[str]:
    cuda = target.kind == "cuda"
    names = {variable: f"n{index}_{_letters(variable)}" for index, (variable, _, _) in enumerate(plan.symbols)}
    yield f"#define DEVICE {'kDLCUDA' if cuda else 'kDLCPU'}"
    if not cuda:
        yield "#include <omp.h>"
    yield text("common.cc")
    yield text(f"{target.kind}.cc")
    yield f"const int kRanks[] = {{{', '.join(str(len(one.shape)) for one in plan.outputs)}}};"
    yield f"const DLDataType kDtypes[] = {{{', '.join(expressions.dlpack(one.dtype) for one in plan.outputs)}}};"
    yield from _sizes(plan, names)
    yield from _slots(plan, names)
    yield "}  // namespace"
    if not cuda:
        for kernel in plan.kernels:
            yield f'extern "C" int32_t __tvm_ffi_{kernel}(void*, void*, int32_t, void*);'
    yield from _weights(plan, offsets)
    yield from _plan(plan, names)
    yield from _run(plan, names)
    yield "namespace {"
    yield text("calls.cc")


def _sizes(plan: Plan, names: dict[Any, str]) -> Iterator[str]:
    yield "struct Sizes {"
    yield from (f"  int64_t {name};" for name in names.values())
    yield "};"
    yield "int sizes_of(DLTensor* const* in, Sizes* sizes) {"
    for index, (name, one) in enumerate(zip(plan.names[0], plan.inputs, strict=True)):
        dtype = expressions.dlpack(one.dtype)
        yield f"  if (checked(in[{index}], {_quoted(name)}, {dtype}, {len(one.shape)}) != 0) return -1;"
    for variable, index, axis in plan.symbols:
        yield f"  const int64_t {names[variable]} = sizes->{names[variable]} = in[{index}]->shape[{axis}];"
    for index, (name, one) in enumerate(zip(plan.names[0], plan.inputs, strict=True)):
        for axis, size in enumerate(one.shape):
            wanted = f"has another size in dimension {axis} than {expressions.plain(size)}"
            yield f"  if (in[{index}]->shape[{axis}] != {expressions.text(size, names)})"
            yield f'    return fail("ValueError", {_quoted(name)}, {_quoted(wanted)});'
    for a, b in plan.checks:
        wanted = f"is not {expressions.plain(b)}: two sizes do not agree"
        yield f"  if ({expressions.text(a, names)} != {expressions.text(b, names)})"
        yield f'    return fail("ValueError", {_quoted(expressions.plain(a))}, {_quoted(wanted)});'
    yield "  return 0;"
    yield "}"


def _slots(plan: Plan, names: dict[Any, str]) -> Iterator[str]:
    """Where each slot begins; behind the last one is the size of the workspace."""
    yield f"void slots_of(const Sizes& sizes, int64_t (&at)[{len(plan.slots) + 1}]) {{"
    yield from _named(names)
    yield "  at[0] = 0;"
    for index, slot in enumerate(plan.slots):
        sizes = list(dict.fromkeys(_bytes(one, names) for one in slot))
        largest = sizes[0] if len(sizes) == 1 else f"std::max<int64_t>({{{', '.join(sizes)}}})"
        yield f"  at[{index + 1}] = at[{index}] + padded({largest});"
    yield "}"


def _weights(plan: Plan, offsets: Sequence[int]) -> Iterator[str]:
    yield 'extern "C" TVM_FFI_DLL_EXPORT void model_weights(void* file, DLDevice device, DLTensor* weights) {'
    yield "  char* const bytes = static_cast<char*>(file);"
    for index, (one, offset) in enumerate(zip(plan.weights, offsets, strict=True)):
        yield f"  static int64_t s{index}[] = {{{', '.join(str(int(size)) for size in one.shape) or '1'}}};"
        kind = f"{expressions.dlpack(one.dtype)}, {len(one.shape)}, s{index}"
        yield f"  weights[{index}] = view(bytes + INT64_C({offset}), device, {kind});"
    yield "}"


def _plan(plan: Plan, names: dict[Any, str]) -> Iterator[str]:
    yield 'extern "C" TVM_FFI_DLL_EXPORT int model_plan(DLTensor* const* in, int64_t (*shapes)[MODEL_RANK],'
    yield "                                             int64_t* workspace) {"
    yield "  Sizes sizes{};"
    yield "  if (sizes_of(in, &sizes) != 0) return -1;"
    yield from _named(names)
    yield f"  int64_t at[{len(plan.slots) + 1}];"
    yield "  slots_of(sizes, at);"
    yield f"  *workspace = std::max<int64_t>(at[{len(plan.slots)}], 64);"
    for index, one in enumerate(plan.outputs):
        for axis, size in enumerate(one.shape):
            yield f"  shapes[{index}][{axis}] = {expressions.text(size, names)};"
    yield "  return 0;"
    yield "}"


def _run(plan: Plan, names: dict[Any, str]) -> Iterator[str]:
    yield 'extern "C" TVM_FFI_DLL_EXPORT int model_run(DLTensor* const* given, DLTensor* const* given_weights,'
    yield "                                            DLTensor* const* given_outputs, void* workspace) {"
    yield "  Sizes sizes{};"
    yield "  if (sizes_of(given, &sizes) != 0) return -1;"
    yield from _named(names)
    yield f"  int64_t at[{len(plan.slots) + 1}];"
    yield "  slots_of(sizes, at);"
    yield "  if (reinterpret_cast<uintptr_t>(workspace) % 64 != 0)"
    yield '    return fail("ValueError", "workspace", "does not begin at 64 bytes");'
    yield "  const DLDevice device = given[0]->device;"
    yield "  Held held{};"
    yield "  DLTensor in[MODEL_INPUTS], out[MODEL_OUTPUTS], weights[MODEL_WEIGHTS + 1];"
    for index, name in enumerate(plan.names[0]):
        yield f"  if (taken(given[{index}], {_quoted(name)}, false, &in[{index}], &held) != 0) return -1;"
    for index, (name, one) in enumerate(zip(plan.names[1], plan.outputs, strict=True)):
        yield from _output(index, name, one, names)
    for index, one in enumerate(plan.weights):
        checked = (
            f'checked(given_weights[{index}], "weight {index}", {expressions.dlpack(one.dtype)}, {len(one.shape)})'
        )
        taken = f'taken(given_weights[{index}], "weight {index}", false, &weights[{index}], &held)'
        yield f"  if ({checked} != 0 || {taken} != 0) return -1;"
    yield "  char* const space = static_cast<char*>(workspace);"
    yield "  TVMFFIAny nothing{};"
    for index, step in enumerate(plan.steps):
        yield from _step(index, step, names)
    yield "  return 0;"
    yield "}"


def _output(index: int, name: str, one: Tensor, names: dict[Any, str]) -> Iterator[str]:
    checked = f"checked(given_outputs[{index}], {_quoted(name)}, {expressions.dlpack(one.dtype)}, {len(one.shape)})"
    yield f"  if ({checked} != 0) return -1;"
    for axis, size in enumerate(one.shape):
        yield f"  if (given_outputs[{index}]->shape[{axis}] != {expressions.text(size, names)})"
        yield f'    return fail("ValueError", {_quoted(name)}, "has another size in dimension {axis}");'
    yield f"  if (taken(given_outputs[{index}], {_quoted(name)}, true, &out[{index}], &held) != 0) return -1;"


def _step(index: int, step: Step, names: dict[Any, str]) -> Iterator[str]:
    yield f"  {{  // {index}: {step.kernel or 'copy'}"
    arguments = (*step.reads, *step.writes)
    given = []
    for number, one in enumerate(arguments):
        if not isinstance(one, Tensor):
            given.append(f"any({expressions.text(one, names)})")
            continue
        given.append(f"any(&t{number})")
        data = f"space + at[{one.place.index}]"
        if one.place.kind in _GIVEN:
            data = f"{_GIVEN[one.place.kind]}[{one.place.index}].data"
        sizes = ", ".join(expressions.text(size, names) for size in one.shape)
        yield f"    const int64_t s{number}[] = {{{sizes or '1'}}};"
        kind = f"{expressions.dlpack(one.dtype)}, {len(one.shape)}, s{number}"
        yield f"    DLTensor t{number} = view({data}, device, {kind});"
    if step.kernel:
        given += [f"any({expressions.text(size, names)})" for size in step.sizes]
        yield f"    TVMFFIAny args[] = {{{', '.join(given)}}};"
        yield f"    if (__tvm_ffi_{step.kernel}(nullptr, args, {len(given)}, &nothing) != 0) return -1;"
    else:
        yield "    if (copied(t0, t1) != 0) return -1;"
    yield "  }"


def _named(names: dict[Any, str]) -> Iterator[str]:
    yield from (f"  [[maybe_unused]] const int64_t {name} = sizes.{name};" for name in names.values())


def _bytes(one: Tensor, names: dict[Any, str]) -> str:
    sizes = [expressions.text(size, names) for size in one.shape]
    return " * ".join([f"INT64_C({expressions.bytes_of(one.dtype)})", *sizes])


def _rank(plan: Plan) -> int:
    return max(1, *(len(one.shape) for one in plan.outputs))


def _shape(one: Tensor) -> str:
    return f"{one.dtype}[{', '.join(expressions.plain(size) for size in one.shape)}]"


def _letters(variable: Any) -> str:
    return "".join(letter if letter.isascii() and letter.isalnum() else "_" for letter in str(variable.name))


def _comment(text: str) -> str:
    return text.replace("*/", "* /").replace("\n", " ")


def rendered(name: str, **values: Any) -> str:
    """A template with values in it."""
    return str(jinja2.Template(text(name), keep_trailing_newline=True).render(**values))


def text(name: str) -> str:
    """The text of a template."""
    return resources.files("burnish.backends.tvm.kernels").joinpath("templates", name).read_text(encoding="utf-8")


def _quoted(text: str) -> str:
    return json.dumps(text)
