"""What a command looks at: one model, with numbers for its dynamic dimensions and the samples it is run on."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir as oir

    from burnish.ir.samples import Sample
    from burnish.passes.protocols import Runner


@dataclass(frozen=True)
class Subject:
    """A model and the options that say how it is looked at.

    Attributes:
        model: the model as read; no section changes it.
        file: the path it was read from.
        dims: numbers for dynamic dimensions as written, `batch=1,seq=128`.
        data: samples, as for `burnish.frontends.samples.read_samples`; None for made ones.
        threads: threads inside an operator, for what is run.
        top: the length of lists.
        whole: lists that are whole where nobody asks for a length are not cut.
        on_step: told what is done now, its number and how many there are.
    """

    model: oir.Model
    file: str = ""
    dims: str = ""
    data: Any = None
    threads: int = 1
    top: int = 10
    whole: bool = True
    on_step: Callable[[str, int, int], None] = field(default=lambda what, number, total: None, repr=False)

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The numbers that `dims` gives, by dimension; raises InputError when it cannot be read."""
        return parse_dims(self.dims, self.model)

    @cached_property
    def samples(self) -> list[Sample]:
        """The samples given, or made ones of the sizes in `dims`; raises InputError when there are none."""
        from burnish.ir.concrete import concrete
        from burnish.ir.errors import InputError
        from burnish.tools.api import samples_for

        if self.dims and self.data is not None:
            raise InputError("`--data` and `--dims` exclude each other", hint="the data's shapes are used as they are")
        return samples_for(concrete(self.model, self.numbers) if self.numbers else self.model, self.data)

    def sample(self, runner: Runner) -> Sample:
        """The first of the samples that `runner`, which runs the model, takes; raises InputError when it takes none."""
        from burnish.ir.errors import InputError

        reason = "there is none"
        for sample in self.samples:
            try:
                runner.run(sample.feeds)
            except InputError as error:
                reason = error.cause.splitlines()[0]
            else:
                return sample
        hint = "give inputs that it takes with `--data`"
        raise InputError(f"the model takes no sample: {reason}", place=self.file or None, hint=hint)


def parse_dims(text: str, model: oir.Model) -> dict[str, int]:
    """The numbers in `batch=1,seq=128`.

    Args:
        text: pairs of name and number; a name is that of a dimension of an input, or `INPUT.AXIS`.
        model: the model whose dimensions they are.

    Raises:
        InputError: a pair cannot be read or names no dimension of an input.
    """
    import difflib

    from burnish.ir.concrete import open_dims
    from burnish.ir.errors import InputError

    ranks = [(value.name, len(value.shape)) for value in model.graph.inputs if value.shape is not None]
    names = list(
        dict.fromkeys([*open_dims(model, {}), *(f"{name}.{axis}" for name, rank in ranks for axis in range(rank))])
    )
    found: dict[str, int] = {}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = (part.strip() for part in pair.rpartition("="))
        if not name or not number.isdecimal():
            raise InputError(f"`{pair}` is not NAME=NUMBER", place="--dims", hint="write `--dims batch=1,seq=128`")
        if name not in names:
            spelled = {one.lower(): one for one in names}
            close = difflib.get_close_matches(name.lower(), spelled, n=1)
            listed = ", ".join(f"`{one}`" for one in names) or "none"
            hint = f"did you mean `{spelled[close[0]]}`?" if close else f"the dimensions are: {listed}"
            raise InputError(f"no input has a dimension `{name}`", place="--dims", hint=hint)
        if name in found:
            raise InputError(f"`{name}` is given twice", place="--dims")
        found[name] = int(number)
    return found


def parse_counts(text: str, option: str, what: str) -> list[int]:
    """The numbers in `1,4,16`.

    Args:
        text: what the user wrote.
        option: the option's name, for the error: `--batch`.
        what: what is counted, in plural: `batch sizes`.

    Raises:
        InputError: it is no list of positive whole numbers.
    """
    from burnish.ir.errors import InputError

    if not re.fullmatch(r"[1-9]\d{0,8}(,[1-9]\d{0,8})*", text.strip()):
        raise InputError(f"`{text}` is no list of {what}", place=option, hint=f"write `{option} 1,2`")
    return list(dict.fromkeys(int(number) for number in text.split(",")))
