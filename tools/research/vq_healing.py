"""Codebooks healed from an ONNX file: `OMP_NUM_THREADS=1 python -m burnish.tools.research.vq_healing [page]`.

A small autoencoder of scikit-learn's digits with a codebook between its halves (VQ-VAE) is trained in torch until few
of its codes are used, and exported. From the file it is healed towards its own input, its codes trained one by one,
through one matrix (SimVQ), or not at all, with three seeds, and judged in ONNX Runtime on digits that nothing has seen.
Every run goes to `docs/results/vq-healing.json` when it is done and is not made again; `page` only writes the page.
"""

from __future__ import annotations

import sys
import tempfile
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as oir
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from burnish.backends.fx.healing import HealOptions, heal
from burnish.backends.ort.session import executor
from burnish.frontends import onnx_file
from burnish.ir.edit import name_nodes
from burnish.ir.samples import Sample
from burnish.ir.views.codebook import codebooks
from burnish.passes.pipeline import Pipeline
from burnish.passes.recipes import NORMAL_FORM
from burnish.tools.research.depth import Numbers
from burnish.tools.research.train_digits import digits

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
NUMBERS = Numbers(RESULTS / "vq-healing.json")
SEEDS = (0, 1, 2)
WIDTH = 8
STEPS, RATE = 400, 3e-3
BEDS = {"collapsed": (256, 1000), "untrained": (256, 0)}
"""Codes, and steps of 64 digits in torch before the export."""
_WAYS = {"frozen": "frozen", "direct": "trained one by one", "linear": "times one trained matrix (SimVQ)"}

Array = np.ndarray[Any, Any]


class Autoencoder(nn.Module):
    """Digits [batch, 1, 8, 8] to 16 codes [batch, 4, 4] each, and back; codes are searched as the VQ-VAE does it."""

    def __init__(self, codes: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 32, 4, 2, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, 1, 1), nn.ReLU(), nn.Conv2d(32, WIDTH, 1)
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(WIDTH, 32, 3, 1, 1), nn.ReLU(), nn.ConvTranspose2d(32, 32, 4, 2, 1), nn.ReLU(),
            nn.Conv2d(32, 1, 3, 1, 1),
        )  # fmt: skip
        self.codes = nn.Parameter(torch.randn(codes, WIDTH))

    def forward(self, image: Tensor) -> Tensor:
        return self.both(image)[0]

    def both(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The image as it comes back, and how far queries and codes are apart."""
        z = self.encoder(image).permute(0, 2, 3, 1)
        rows = z.reshape(-1, WIDTH)
        distances = rows.pow(2).sum(1, keepdim=True) + self.codes.pow(2).sum(1) - 2 * rows @ self.codes.t()
        found = F.embedding(distances.argmin(1), self.codes).view(z.shape)
        apart = F.mse_loss(found, z.detach()) + 0.25 * F.mse_loss(z, found.detach())
        return self.decoder((z + (found - z).detach()).permute(0, 3, 1, 2)), apart


@cache
def original(bed: str, seed: int) -> oir.Model:
    """The autoencoder as it is read from its file, in normal form."""
    images = torch.from_numpy(digits()[0])
    torch.manual_seed(seed)
    codes, steps = BEDS[bed]
    module = Autoencoder(codes)
    optimizer = torch.optim.Adam(module.parameters(), 1e-3)
    for _ in range(steps):
        batch = images[torch.randint(len(images), (64,))]
        output, apart = module.both(batch)
        optimizer.zero_grad()
        (F.mse_loss(output, batch) + apart).backward()
        optimizer.step()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "autoencoder.onnx"
        torch.onnx.export(
            module.eval(), (images[:2],), str(file), dynamo=False, opset_version=17, input_names=["image"],
            output_names=["decoded"], dynamic_axes={"image": {0: "batch"}, "decoded": {0: "batch"}},
        )  # fmt: skip
        model = Pipeline(NORMAL_FORM).rewrite(onnx_file.read(file)).model
        oir.external_data.load_to_model(model)
    name_nodes(model)
    return model


@cache
def wanted() -> oir.Model:
    """What an autoencoder should do: give its input."""
    text = """<ir_version: 8, opset_import: ["": 17]>
    g (float[batch, 1, 8, 8] image) => (float[batch, 1, 8, 8] decoded) { decoded = Identity (image) }"""
    return oir.from_proto(onnx.parser.parse_model(text))


def judged(model: oir.Model) -> dict[str, float]:
    """The squared error a pixel on the held-out digits, the share of the codes used there, and their perplexity."""
    images = digits()[1]
    copy = model.clone()
    (book,) = codebooks(copy)
    copy.graph.outputs.append(book.indices)
    decoded, indices = executor()(copy).run({"image": images}).values()
    codes = len(book.codes())
    share = np.bincount(np.ravel(indices), minlength=codes) / np.size(indices)
    used = share[share > 0]
    return {
        "error": float(((decoded - images) ** 2).mean()),
        "used": float(len(used) / codes),
        "perplexity": float(np.exp(-(used * np.log(used)).sum())),
    }


def healed(bed: str, seed: int, way: str, revive: bool) -> dict[str, float]:
    """The autoencoder of a seed, healed in a way."""
    samples = [Sample("digits", {"image": digits()[0]})]
    options = HealOptions(
        codebooks=way, revive=revive, steps=STEPS, batch=64, rate=RATE, evaluations=20, patience=20, seed=seed,  # type: ignore[arg-type]
    )  # fmt: skip
    found = heal(original(bed, seed), wanted(), samples, options)
    folded = Pipeline(("fold-codebook",)).rewrite(found.model).model
    return judged(found.model) | {"folded": judged(folded)["error"], "seconds": found.seconds}


def _before(bed: str, seed: int) -> dict[str, float]:
    return judged(original(bed, seed))


def measure() -> None:
    """Measure what is not known yet."""
    for bed in BEDS:
        for seed in SEEDS:
            NUMBERS.get(f"{bed}/{seed}/before", partial(_before, bed, seed))
            for revive in (True, False) if bed == "collapsed" else (False,):
                for way in _WAYS if bed == "collapsed" else ("direct", "linear"):
                    NUMBERS.get(f"{bed}/{seed}/{way}/{revive}", partial(healed, bed, seed, way, revive))


_HEAD = """# Codebooks, healed

Made by `python -m burnish.tools.research.vq_healing`; numbers in [vq-healing.json](vq-healing.json). An autoencoder of
digits has 16 codes of 8 numbers between its halves, each the nearest of its codebook (VQ-VAE). It is read from its ONNX
file and [healed](../ideas/healing.md#codebooks) towards its own input, 400 steps of 64 of the 1297 training digits. All
figures are those of what is written, run by ONNX Runtime (CPU) on 500 held-out digits: the squared error a pixel
(pixels are 0 to 1), the share of the codes that are used there, and their perplexity. Of three seeds the mean is given,
and the ends in brackets.

"""
_TITLES = {
    "collapsed": "256 codes, of which training has left few in use",
    "untrained": "256 codes, from random weights on: all end with one code",
}


def page() -> None:
    """Write the page of what was measured."""
    lines = [_HEAD]
    for bed, title in _TITLES.items():
        rows = {"the file": f"{bed}/{{}}/before"}
        for revive, name in ((False, ""), (True, ", after random restarts")):
            rows |= {f"codes {what}{name}": f"{bed}/{{}}/{way}/{revive}" for way, what in _WAYS.items()}
        lines += [f"## {title}\n\n| | squared error | codes used, % | perplexity |\n| --- | --- | --- | --- |\n"]
        for name, key in rows.items():
            found = [NUMBERS.known[key.format(seed)] for seed in SEEDS if key.format(seed) in NUMBERS.known]
            if found:
                forms = {"error": (1, ".5f"), "used": (100, ".1f"), "perplexity": (1, ".1f")}
                cells = [_span([by * one[what] for one in found], form) for what, (by, form) in forms.items()]
                lines += [f"| {name} | {' | '.join(cells)} |\n"]
        lines += ["\n"]
    (RESULTS / "vq-healing.md").write_text("".join(lines).rstrip() + "\n", encoding="utf-8")


def _span(numbers: list[float], form: str) -> str:
    mean, low, high = (f"{one:{form}}" for one in (np.mean(numbers), min(numbers), max(numbers)))
    return mean if low == high else f"{mean} ({low} to {high})"


def main(arguments: list[str]) -> int:
    """Measure, and write the page."""
    if arguments != ["page"]:
        torch.set_num_threads(1)
        measure()
    page()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
