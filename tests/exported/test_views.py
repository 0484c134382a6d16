"""Every view of every exported graph against the source of its model.

The page with all results is docs/results/views.md, made by `python -m burnish.tools.research.views`.
"""

from dataclasses import replace

import onnx_ir as oir
import pytest

from burnish.passes import recipes
from burnish.passes.pipeline import Pipeline
from burnish.tools.research import structures, views, zoo_families, zoo_truth
from burnish.tools.research.views_check import REFUSED, RIGHT, WRONG, check, see

FAST = ("ts", "dynp", "op23", "eager-ort", "dynp-fuse", "", "-int4")
"""Flavours that are read in every run; the others are close to one of these."""


def marks(name):
    flavour = zoo_families.FILES[name][1] if name in zoo_families.FILES else ""
    return [] if flavour in FAST and "smollm2" not in name else [pytest.mark.slow]


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in structures.names()])
def test_all_views_are_right(name):
    found = views.cells(name)
    assert {view: (cell.verdict, cell.reason) for view, cell in found.items() if cell.verdict != RIGHT} == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", structures.names())
def test_nothing_is_wrong_in_a_file_as_it_was_exported(name):
    found = views.cells(name, raw=True)
    assert {view: cell.reason for view, cell in found.items() if cell.verdict == WRONG} == {}


def test_every_untruth_shows():
    truth = zoo_truth.of("mixtral-dynp")
    (layer, *_), (run,) = truth.attention, truth.blocks
    model = oir.from_proto(structures.load("mixtral-dynp"))
    seen = see(Pipeline(recipes.NORMAL_FORM).rewrite(model).model)
    assert {cell.verdict for cell in check(seen, truth).values()} == {RIGHT}

    def attends(**changed):
        return replace(truth, attention=(replace(layer, **changed),) * 3)

    untruths = {
        "attention": [
            *(attends(**{field: 3}) for field in ("heads", "kv_heads", "head_size", "scale", "window", "softcap")),
            *(attends(**{field: True}) for field in ("cross", "norms")),
            *(attends(**{field: 0}) for field in ("causal", "rotary")),
            replace(truth, attention=truth.attention[1:]),
            replace(truth, attention=(*truth.attention, layer)),
        ],
        "cache": [replace(truth, cache=((("past",), ("present",)),), cached="attention")],
        "blocks": [
            *(replace(truth, blocks=(replace(run, count=count),)) for count in (2, 4)),
            *(
                replace(truth, blocks=(replace(run, **{field: value}),))
                for field, value in [
                    ("parts", ("attention", "mlp")),
                    ("form", "post"),
                    ("fixed", "shape"),
                    ("pattern", "AB"),
                ]
            ),
        ],
        "experts": [
            replace(truth, experts=(replace(truth.experts[0], number=8),) * 3),
            replace(truth, experts=(replace(truth.experts[0], top=1),) * 3),
            replace(truth, experts=(*truth.experts, truth.experts[0])),
        ],
        "codebook": [replace(truth, codebooks=((4, 4),))],
        "embedding": [replace(truth, embedding=(500, 49)), replace(truth, embedding=None)],
        "head": [replace(truth, tied=True), replace(truth, head=(499, 48)), replace(truth, softcap=30.0)],
    }
    for view, others in untruths.items():
        for other in others:
            assert check(seen, other)[view].verdict in (WRONG, REFUSED), (view, other)
