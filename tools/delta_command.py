"""`burnish delta`: variants of a model kept as what differs from it, and rebuilt byte for byte."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from burnish.tools import terminal

if TYPE_CHECKING:
    from burnish.backends.delta.manifest import Manifest, Model


@click.command("delta")
@click.argument("models", nargs=-1, required=True, metavar="BASE VARIANT... | PACK [NAME]")
@click.option(
    "-o", "--output", metavar="PATH", help="The folder of the pack, or with --apply an .onnx file or a folder."
)
@click.option("--apply", "applies", is_flag=True, help="Rebuild the model NAME of PACK.")
@click.option("--show", "shows", is_flag=True, help="Say what PACK holds, and which tensors of each variant differ.")
@click.option("--no-base", is_flag=True, help="Leave the base out of the pack: who applies it has to have it.")
@click.option("--base", metavar="FILE", help="The base, for a pack without it.")
@click.option(
    "--top", default=10, show_default=True, type=click.IntRange(min=0), help="Tensors that --show lists; 0 for all."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of tables.")
def delta_command(
    models: Sequence[str],
    output: str | None,
    applies: bool,
    shows: bool,
    no_base: bool,
    base: str | None,
    top: int,
    as_json: bool,
) -> None:
    """Keep variants of a model (fine-tuned, pruned, quantized) as what differs from it.

    BASE and each VARIANT is an .onnx file, or NAME=FILE to name it. The pack is a folder: the base as it is, and the
    tensors that no other model has, compressed as differences to the base. Every model is rebuilt from it and compared
    with its file before it is written.
    """
    from burnish.ir.errors import InputError

    if applies and shows:
        raise click.UsageError("--apply and --show exclude each other")
    if applies or shows:
        if no_base:
            raise click.UsageError("--no-base is for writing a pack")
        if len(models) > 1 + applies:
            raise click.UsageError(f"give one pack{' and the name of a model' * applies}")
    if shows:
        if output is not None or base is not None:
            raise click.UsageError("--show takes neither --output nor --base")
        found = account(models[0])
        _say(found, as_json, top=top)
        return
    if output is None:
        raise click.UsageError("name what to write with `-o`")
    if applies:
        if len(models) == 1:
            from burnish.backends.delta import manifest

            names = ", ".join(f"`{one.name}`" for one in manifest.read(Path(models[0])).variants)
            raise InputError("which model of it?", place=models[0], hint=f"name one behind it: {names}")
        files = apply(models[0], models[1], output, base=base)
        if as_json:
            click.echo(json.dumps({"model": models[1], "files": [str(one) for one in files]}, indent=2))
        else:
            terminal.out().print(f"written  {', '.join(map(str, files))}: byte for byte what was packed")
        return
    if base is not None:
        raise click.UsageError("--base is for --apply; the base of a new pack is the first model")
    with terminal.progress("delta") as said:
        found = write(models[0], models[1:], output, keep_base=not no_base, said=said)
    _say(found, as_json, top=None)


def write(
    base: str, variants: Sequence[str], output: str, *, keep_base: bool = True, said: Any = None
) -> dict[str, Any]:
    """Write a pack, after each model was rebuilt from it and compared with its files.

    Args:
        base: an `.onnx` file, or `NAME=FILE`.
        variants: likewise.
        output: the folder.
        keep_base: put the base into it.
        said: progress, as `terminal.progress` gives it.

    Returns:
        What `account` gives.

    Raises:
        InputError: a model cannot be read, two have one name, or the folder cannot be written.
    """
    from burnish.backends import folders
    from burnish.backends.delta import writing
    from burnish.frontends import stored
    from burnish.ir.errors import InputError

    if not variants:
        raise InputError("there is no variant", place=base, hint="give the base and then at least one variant of it")
    named = [_named(one) for one in (base, *variants)]
    for name, path in named:
        twice = [other for own, other in named if own == name]
        if len(twice) > 1:
            hint = f"give names: `one={twice[0]} other={twice[1]}`"
            raise InputError(f"two models would have the name `{name}`", place=path, hint=hint)
    folders.check_target(Path(output), writing.KIND, *(Path(path) for _, path in named))
    models = {name: stored.read(path) for name, path in named}
    first = next(iter(models))
    base_files = models.pop(first)
    more = {} if said is None else {"said": said}
    writing.write(Path(output), (first, base_files), models, keep_base=keep_base, **more)
    return account(output)


def apply(pack: str, name: str, output: str, *, base: str | None = None) -> list[Path]:
    """Rebuild a model of a pack.

    Args:
        pack: the folder.
        name: of the model.
        output: an `.onnx` file, or a folder, where the model gets the name that it had.
        base: the base, for a pack without it.

    Returns:
        The files, the model first.

    Raises:
        InputError: the pack is damaged, the base is another one, or a file cannot be written.
    """
    from burnish.backends.delta import reading
    from burnish.backends.delta.rebuilding import rebuild
    from burnish.frontends import stored

    given = None if base is None else stored.read(base)
    opened = reading.Pack(pack, given)
    target = Path(output)
    if target.is_dir() or output.endswith(("/", os.sep)):
        target = target / opened.manifest.model(name, pack).files[0].path
    return rebuild(opened, name, target, *(Path(str(base)).with_name(one.path) for one in given or ()))


def account(pack: str) -> dict[str, Any]:
    """What a pack holds, as the JSON document that `--json` prints. Raises InputError when it is none."""
    from burnish.backends.delta import manifest

    folder = Path(pack)
    found = manifest.read(folder)
    seen = set(found.used(found.base))
    variants = []
    for model in found.variants:
        variants.append(_variant(found, model, seen))
        seen.update(found.used(model))
    size = sum(found.sizes.values()) + (folder / manifest.MANIFEST).stat().st_size
    models = (*([found.base] if found.has_base else []), *found.variants)
    return {
        "pack": pack,
        "bytes": size,
        "of": sum(map(_bytes, models)),
        "base": {"name": found.base.name, "bytes": _bytes(found.base), "in_pack": found.has_base},
        "graphs": found.sizes[manifest.GRAPHS],
        "variants": variants,
    }


def _variant(found: Manifest, model: Model, seen: set[int]) -> dict[str, Any]:
    used = found.used(model)
    changed = [found.tensors[index] for index in used if found.tensors[index].coding != "base"]
    own = [found.tensors[index] for index in used if index not in seen]
    return {
        "name": model.name,
        "files": [one.path for one in model.files],
        "bytes": _bytes(model),
        "tensors": len(used),
        "changed": len(changed),
        "changed_bytes": sum(one.bytes for one in changed),
        "stored": sum(one.stored for one in own),
        "differences": [
            {
                "tensor": one.name,
                "dtype": one.dtype,
                "shape": list(one.dims),
                "bytes": one.bytes,
                "kept_as": one.coding,
                "rank": one.rank or None,
                "of": found.tensors[one.of].name if one.of >= 0 else None,
                "stored": one.stored,
            }
            for one in changed
        ],
    }


def _bytes(model: Model) -> int:
    return sum(one.bytes for one in model.files)


def _named(text: str) -> tuple[str, str]:
    """The name and the path of a model, of `NAME=FILE` or of a file alone."""
    name, equals, path = text.partition("=")
    if equals and not Path(text).exists() and "/" not in name:
        return name, path
    return Path(text).name.removesuffix(".onnx"), text


def _say(found: dict[str, Any], as_json: bool, *, top: int | None) -> None:
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    from rich.table import Table

    out, size = terminal.out(), terminal.size
    table = Table("variant", "tensors", "differ", "size", "differ", "stored", box=None, pad_edge=False)
    for one in found["variants"]:
        counts = str(one["tensors"]), str(one["changed"])
        table.add_row(one["name"], *counts, *(size(one[key]) for key in ("bytes", "changed_bytes", "stored")))
    terminal.show(table, out)
    if top is not None:
        for one in found["variants"]:
            _say_differences(one, top)
        out.print("")
    base, share = found["base"], found["bytes"] / found["of"] if found["of"] else 1.0
    within = "" if base["in_pack"] else ", not in the pack"
    out.print(f"base     {base['name']}, {size(base['bytes'])}{within}")
    out.print(f"pack     {size(found['bytes'])}, {share:.1%} of the {size(found['of'])} of its models")
    if top is None:
        out.print("compared every model is rebuilt byte for byte")
        out.print(f"written  {found['pack']}")


def _say_differences(one: dict[str, Any], top: int) -> None:
    rows = sorted(one["differences"], key=lambda row: -row["stored"])
    shown = rows[: top or len(rows)]
    if not rows:
        return
    cells = []
    for row in shown:
        kept = row["kept_as"] + (f" {row['rank']}" if row["rank"] else "")
        kind = f"{row['dtype']} {terminal.shape(row['shape'])}"
        cells.append([row["tensor"], kind, kept, terminal.size(row["bytes"]), terminal.size(row["stored"])])
    title = f"What differs in `{one['name']}`"
    columns = ["tensor", "values", "kept as", ">size", ">stored"]
    terminal.show(terminal.table(title, columns, cells), terminal.out())
    if len(rows) > len(shown):
        terminal.out().print(f"... and {len(rows) - len(shown)} more")
