"""Variants of trained models as packs: their size, and the memory of their sessions.

`python -m burnish.tools.research.delta make` trains and quantizes the variants, `sizes` packs them and compresses their
files in other ways, `memory` measures sessions in processes of their own, and `page` writes `docs/results/delta.md` of
what was measured. Models and packs lie in `$BURNISH_CACHE/delta`, numbers in `docs/results/delta.json`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as oir

from burnish.backends.ort.session import OrtRunner, executor, from_path
from burnish.frontends import onnx_file
from burnish.ir.samples import Sample
from burnish.tools import terminal
from burnish.tools.research import zoo

ROOT = Path(__file__).resolve().parents[2]
NUMBERS, PAGE = (ROOT / "docs" / "results" / f"delta.{kind}" for kind in ("json", "md"))
FOLDER = Path(os.environ.get("BURNISH_CACHE", Path.home() / ".cache" / "burnish")) / "delta"

SUBJECTS = {
    "vit": ROOT / "tools" / "demo" / "digits_vit.onnx",
    "minilm": zoo.ROOT / "a2-minilm.onnx",
    "smollm2": zoo.ROOT / "a3-smollm2-nocache.onnx",
}
LARGEST_XZ = 100_000_000
"""Bytes of models together up to which xz is tried: a core takes six minutes for each gigabyte."""
TITLES = {"vit": "digits ViT", "minilm": "MiniLM", "smollm2": "SmolLM2-135M"}
Make = Callable[[Path, Path], None]


def make(names: Sequence[str]) -> None:
    """The variants that are not there yet."""
    for subject in names:
        folder = FOLDER / subject
        folder.mkdir(parents=True, exist_ok=True)
        for name, made in VARIANTS[subject].items():
            target = folder / f"{name}.onnx"
            if not target.exists():
                made(SUBJECTS[subject], target)
                print(subject, name, flush=True)


def _healed(samples: Callable[[oir.Model], list[Sample]], **options: Any) -> Make:
    """Train it on its task."""

    def made(base: Path, target: Path) -> None:
        import burnish
        from burnish.backends.fx.healing import HealOptions, heal

        model = onnx_file.read(base)
        given = {"held_out": 0.1, "evaluations": 2, **options}
        healed = heal(model.clone(), model, samples(model), HealOptions(**given))
        print(target.stem, f"loss {healed.before:.4f} -> {healed.after:.4f}, {len(healed.written)} weights", flush=True)
        burnish.emit(healed.model, target)

    return made


def _quantized(**options: Any) -> Make:
    def made(base: Path, target: Path) -> None:
        import burnish

        burnish.optimize(base, target, verify="off", guard=[], **options)

    return made


def _digits(*classes: int) -> Callable[[oir.Model], list[Sample]]:
    def samples(model: oir.Model) -> list[Sample]:
        with np.load(ROOT / "tools" / "demo" / "digits.npz") as digits:
            images, labels = digits["image"], digits["label"]
        kept = np.isin(labels, classes)
        name = str(model.graph.inputs[0].name)
        return [Sample("digits", {name: images[kept]}, labels[kept])]

    return samples


def _texts(count: int) -> Callable[[oir.Model], list[Sample]]:
    def samples(model: oir.Model) -> list[Sample]:
        from burnish.tools.research import healing

        rows = healing.samples()[:: healing.TEXTS // count]
        names = {str(one.name) for one in model.graph.inputs}
        return [
            replace(one, feeds={key: value[:, :128] for key, value in one.feeds.items() if key in names})
            for one in rows
        ]

    return samples


def _sentences() -> list[Sample]:
    from burnish.tools.research import zoo_tasks

    some = zoo_tasks.load("a2-minilm", zoo.ROOT).samples[:3]
    return [Sample(f"sentences {number}", dict(feeds)) for number, feeds in enumerate(some)]


def _damaged(**options: Any) -> Make:
    """A block leaves, and what is trained makes up for it."""

    def made(base: Path, target: Path) -> None:
        import burnish
        from burnish.backends.fx.healing import HealOptions, heal
        from burnish.ir.views.block_drop import drop
        from burnish.ir.views.blocks import stacks

        original = onnx_file.read(base)
        student = original.clone()
        structure = stacks(student)
        drop(student, structure, [structure.blocks[1]])
        given = {"held_out": 0.1, "evaluations": 2, **options}
        healed = heal(student, original, _sentences(), HealOptions(**given))
        print(target.stem, f"loss {healed.before:.4f} -> {healed.after:.4f}, {len(healed.written)} weights", flush=True)
        burnish.emit(healed.model, target)

    return made


VARIANTS: dict[str, dict[str, Make]] = {
    "vit": {
        "low-digits": _healed(_digits(0, 1, 2, 3, 4), loss="task", train="all", steps=60, batch=32, rate=1e-3),
        "high-digits": _healed(_digits(5, 6, 7, 8, 9), loss="task", train="all", steps=60, batch=32, rate=1e-3),
        "low-last": _healed(
            _digits(0, 1, 2, 3, 4), loss="task", train="blocks", blocks=1, steps=60, batch=32, rate=1e-3
        ),
        "low-lora": _healed(_digits(0, 1, 2, 3, 4), loss="task", train="lora", rank=2, steps=60, batch=32, rate=1e-2),
        "int8": _quantized(passes=["quantize-weights{bits=8}"]),
    },
    "minilm": {
        "last": _damaged(train="last", steps=8, batch=8, rate=1e-4),
        "lora": _damaged(train="lora", steps=8, batch=8, rate=1e-3),
        "all": _damaged(train="all", steps=8, batch=8, rate=1e-5),
        "int8": _quantized(passes=["quantize-weights{bits=8}"]),
    },
    "smollm2": {
        "last": _healed(_texts(8), loss="task", train="last", steps=6, batch=1, rate=1e-4),
        "lora": _healed(_texts(8), loss="task", train="lora", steps=6, batch=1, rate=1e-3),
        "int8": _quantized(passes=["quantize-weights{bits=8}"]),
    },
}


def sizes(names: Sequence[str]) -> None:
    """Pack the variants, one pack of them all, and compress the same files in other ways."""
    from burnish.tools.delta_command import write

    for subject in names:
        base, variants = SUBJECTS[subject], _variants(subject)
        pack = FOLDER / f"{subject}-pack"
        shutil.rmtree(pack, ignore_errors=True)
        start = time.process_time()
        found = write(f"base={base}", [f"{name}={path}" for name, path in variants.items()], str(pack))
        row: dict[str, Any] = {"pack": found["bytes"], "of": found["of"], "cpu": time.process_time() - start}
        row["base"] = found["base"]["bytes"]
        row["variants"] = [{k: v for k, v in one.items() if k != "differences"} for one in found["variants"]]
        kinds = [{one["kept_as"] for one in each["differences"]} for each in found["variants"]]
        for one, kind in zip(row["variants"], kinds, strict=True):
            one["kinds"] = sorted(kind)
        files = {"base": _files(base), **{name: _files(path) for name, path in variants.items()}}
        _keep(subject, "sizes", row)
        if row["of"] < LARGEST_XZ:
            row["xz"] = {
                name: sum(_piped(["xz", "-1", "-T1", "-c", str(one)]) for one in some) for name, some in files.items()
            }
        row["patches"] = {name: _patch(files["base"], some) for name, some in files.items() if name != "base"}
        _keep(subject, "sizes", row)


def _patch(base: Sequence[Path], files: Sequence[Path]) -> int:
    """Bytes of the patches that zstd makes: the model to the base's, the weights to the base's weights."""
    return sum(
        _piped(["zstd", "-q", "-3", "--long=30", f"--patch-from={base[min(number, len(base) - 1)]}", "-c", str(one)])
        for number, one in enumerate(files)
    )


def _piped(words: Sequence[str]) -> int:
    """Bytes that a program writes."""
    size = 0
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        while block := process.stdout.read(1 << 20):
            size += len(block)
    return size


def _files(model: Path) -> list[Path]:
    """A model's files, the model first."""
    from burnish.frontends import stored

    return [model, *(model.parent / one.path for one in stored.read(model)[1:])]


def _variants(subject: str) -> dict[str, Path]:
    return {name: FOLDER / subject / f"{name}.onnx" for name in VARIANTS[subject]}


WAYS = {
    "files": "a session for each file",
    "unpacked": "the same, weights not packed",
    "shared": "`Variants(pack)`",
    "prepared": "`Variants(pack, prepared=...)`",
}
COUNTS = (1, 2, 4)


def memory(names: Sequence[str]) -> None:
    """What processes take that load one, two and four models and run each once; then the times of a run."""
    for subject in names:
        models = {"base": SUBJECTS[subject], **_variants(subject)}
        chosen = list(models)[: max(COUNTS)]
        row: dict[str, Any] = {"models": chosen, "resident": {way: {} for way in WAYS}}
        with tempfile.TemporaryDirectory(prefix="burnish-", dir=FOLDER) as folder:
            _child(subject, "prepared", len(chosen), folder)  # the first time writes them
            row["prepared"] = sum(one.stat().st_size for one in Path(folder).iterdir())
            for way in WAYS:
                for count in COUNTS:
                    if count <= len(chosen):
                        row["resident"][way][str(count)] = _child(subject, way, count, folder)["bytes"]
            _keep(subject, "memory", {**row, "times": {}})
            row["times"] = _child(subject, "times", 1, folder)["ratios"]
        _keep(subject, "memory", row)


def _child(subject: str, way: str, count: int, folder: str) -> dict[str, Any]:
    words = [sys.executable, "-m", __spec__.name, "child", subject, way, str(count), folder]
    found: dict[str, Any] = json.loads(subprocess.run(words, stdout=subprocess.PIPE, check=True).stdout)
    return found


def child(subject: str, way: str, count: int, folder: str) -> dict[str, Any]:
    """In a process of its own: how much its memory grows, or the times of a run beside a session of the file."""
    from burnish.backends.ort.timing import paired
    from burnish.backends.ort.variants import Variants

    models = {"base": SUBJECTS[subject], **_variants(subject)}
    feeds = _feeds(subject)
    pack = FOLDER / f"{subject}-pack"
    if way == "times":
        alone = from_path(models["base"])
        feeds = _taken(alone, feeds)
        found = {}
        for name, prepared in (("shared", None), ("prepared", folder)):
            other = Variants(pack, prepared=prepared).load("base")
            timing = paired(partial(alone.run, feeds), partial(other.run, feeds), seconds=20)
            found[name] = [timing.ratio, timing.low, timing.high]
        return {"ratios": found}
    before = _resident()
    if way in ("files", "unpacked"):
        if way == "files":
            runners = [from_path(models[name]) for name in list(models)[:count]]
        else:
            load = executor(packed=False)
            runners = [load(onnx_file.read(models[name])) for name in list(models)[:count]]
    else:
        variants = Variants(pack, prepared=folder if way == "prepared" else None)
        runners = [variants.load(name) for name in variants.names[:count]]
    for runner in runners:
        runner.run(_taken(runner, feeds))
    return {"bytes": _resident() - before}


def _taken(runner: OrtRunner, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Those that a model takes."""
    assert runner.session is not None
    return {one.name: feeds[one.name] for one in runner.session.get_inputs()}


def _feeds(subject: str) -> dict[str, np.ndarray]:
    if subject == "vit":
        return {"image": np.zeros((1, 1, 8, 8), np.float32)}
    ids = np.random.default_rng(0).integers(0, 20_000, (1, 64))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def _resident() -> int:
    """Bytes in memory, pages that several maps share counted once; what was freed is given back before."""
    import ctypes

    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


HEAD = """# Delta packs, measured

`python -m burnish.tools.research.delta` makes these numbers and this page. Variants of three trained models:
fine-tuned or healed in few steps, as [healing](../ideas/healing.md) trains, and with weights of 8 bits. The
digits ViT was trained on the digits 0 to 4 or 5 to 9 (all weights, its last block that gradients choose,
adapters of rank 2). MiniLM lost its second block, and the rest was distilled (`all` weights, the `last` three
blocks, adapters of rank 8: `lora`). SmolLM2 was trained on docstrings.

## Size

Every model is rebuilt from its pack byte for byte. `xz -1` compresses each file alone (of the ViT only: a core
takes minutes for each of the others); `zstd` is the patch from the base's file that `zstd -3 --long=30
--patch-from` makes.

| model | variant | file | tensors that differ | kept as | in the pack | xz | zstd |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""
TOTALS = """
All models together, the base among them:

| model | files | pack | xz | base and zstd patches | packed in |
| --- | --- | --- | --- | --- | --- |
"""
NOTES = """
A pack keeps the base as it is, to be mapped. What is trained costs what its last places cost, which are noise
and differ from those of the base: a layer that was trained takes {share} of its size, so it pays to train few
layers, or adapters. Weights of 8 bits are those of the base rounded, so their scales are what is left to keep;
scales of less than 1 kB, as the ViT has, are not looked at.
"""
MEMORY = """
## Memory and time

Resident memory of a process that loads so many models and runs each once on 64 tokens, less what it had before.
Pages that several maps share count once, and `malloc_trim` has given back what was freed. Ratios of time are
those of one run beside a session of the file, paired, one thread, with a 95 % interval; other work ran on the
machine. The models are the base and the first three variants of the table above. Only weights that are equal are
shared: a low-rank change, small in a pack, is a whole weight in memory, so the third model (`lora`) shares little.

| model | sessions | 1 | 2 | 4 | time of a run |
| --- | --- | --- | --- | --- | --- |
"""
END = """
`Variants(pack)` holds the base once and packs no weights; with `prepared` ONNX Runtime's packed weights lie in
files that all sessions map ([how](../ideas/variants.md)). Rows of an embedding that are never read are never
loaded from a file, but a pack is read whole once to compare its digests: these pages can be dropped by the
system at any time. The folders of prepared models take {folders}.
"""


def page(names: Sequence[str]) -> None:
    """Write the page about these models."""
    found = json.loads(NUMBERS.read_text())
    rows, totals, memories, folders = [], [], [], []
    trained: list[float] = []
    for subject in names:
        title, one = TITLES[subject], found[subject]["sizes"]
        for variant in one["variants"]:
            name = variant["name"]
            if variant["kinds"] == ["change"]:
                trained.append(variant["stored"] / variant["changed_bytes"])
            cells = [title, name, terminal.size(variant["bytes"]), f"{variant['changed']} of {variant['tensors']}"]
            cells += [", ".join(variant["kinds"]), terminal.size(variant["stored"])]
            others = [one[rival][name] if rival in one else None for rival in ("xz", "patches")]
            rows.append(_row([*cells, *("" if size is None else terminal.size(size) for size in others)]))
        compressed = sum(one["xz"].values()) if "xz" in one else None
        patched = one["base"] + sum(one["patches"].values()) if "patches" in one else None
        totaled = one["pack"], compressed, patched
        shares = ["" if size is None else f"{terminal.size(size)} ({size / one['of']:.0%})" for size in totaled]
        totals.append(_row([title, terminal.size(one["of"]), *shares, f"{one['cpu']:.0f} s of CPU"]))
        if (memory := found[subject].get("memory", {})).get("times"):
            folders.append(f"{terminal.size(memory['prepared'])} for {title}")
            for way, said in WAYS.items():
                sizes = [memory["resident"][way].get(str(count)) for count in COUNTS]
                ratio = memory["times"].get(way)
                time = "1" if way == "files" else "" if ratio is None else "{:.2f} ({:.2f} to {:.2f})".format(*ratio)
                shown = ("" if size is None else terminal.size(size) for size in sizes)
                memories.append(_row([title, said, *shown, time]))
    end = [MEMORY, *memories, END.format(folders=" and ".join(folders))] if memories else []
    parts = [HEAD, *rows, TOTALS, *totals, NOTES.format(share=f"{min(trained):.0%} to {max(trained):.0%}"), *end]
    PAGE.write_text("".join(parts), encoding="utf-8")


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def _keep(subject: str, what: str, row: dict[str, Any]) -> None:
    found = json.loads(NUMBERS.read_text()) if NUMBERS.exists() else {}
    found.setdefault(subject, {})[what] = row
    NUMBERS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    what, *words = sys.argv[1:]
    if what == "child":
        print(json.dumps(child(words[0], words[1], int(words[2]), words[3])))
    else:
        {"make": make, "sizes": sizes, "memory": memory, "page": page}[what](words or list(SUBJECTS))
