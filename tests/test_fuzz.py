"""Random graphs keep their meaning under every exact pass and under the default recipe."""

from __future__ import annotations

import functools
from functools import partial

import fuzz
import onnx
import onnx_ir as oir
import pytest
from golden import prepare
from laws import LawBroken, OrtRunner, check_contract, rewrite

from burnish.backends.reference.runner import ReferenceRunner
from burnish.frontends import onnx_file
from burnish.ir.samples import Sample
from burnish.passes import catalog, recipes, verify
from burnish.passes.base import ExactPass, Pass
from burnish.passes.pipeline import Pipeline

SEEDS = 150
BATCH = 10
SHARE = 3


@functools.cache
def exact_passes() -> list[Pass]:
    """Every exact pass with its default options."""
    return [catalog.make(name) for name in catalog.names() if issubclass(catalog.load(name), ExactPass)]


class Original:
    """A random model, what it gives in ONNX Runtime and in float64, and comparisons with it."""

    def __init__(self, seed: int) -> None:
        self.proto, feeds = fuzz.model(seed)
        onnx.checker.check_model(self.proto, full_check=True)
        self.model = onnx_file.read_bytes(self.proto.SerializeToString())
        self.sample = Sample(f"seed {seed}", feeds)
        self.expected = verify.Expected(OrtRunner(self.model, False), [self.sample])
        self.noise = OrtRunner(self.model, True)
        self.exact = ReferenceRunner(self.model)
        self._prepared: dict[frozenset[str], oir.Model] = {}

    def prepared(self, one: Pass) -> oir.Model:
        """The model with the facts that `one` needs."""
        needs = frozenset(one.needs) & {"inlined", "lifted"}
        if needs not in self._prepared:
            self._prepared[needs] = prepare(self.proto, one)
        return self._prepared[needs]

    def check(self, before: oir.Model, after: oir.Model, what: str) -> None:
        """Raise LawBroken when the model `after` has another contract than `before`, or other outputs."""
        check_contract(before, after)
        found = verify.compare(self.expected, OrtRunner(after, False), partial(self.expected.differences, self.noise))
        for one in found.outputs:
            if not one.holds:
                raise LawBroken(f"{what}: output `{one.output}` differs by {one.error:.3g}, not {one.tolerance:.3g}")
        error = verify.replay(self.exact, ReferenceRunner(after), self.sample)
        if not error <= verify.REPLAY_TOLERANCE:
            raise LawBroken(f"{what}: in float64 the outputs differ by {error:.3g}")


def check_seed(seed: int, share: int = 1) -> None:
    """Hold exact passes alone, and the default recipe, to their laws on one random model.

    Args:
        seed: of the model.
        share: take every so many passes only, and one target instead of both; other seeds take the others.

    Raises:
        LawBroken: a pass changes what the model computes or its contract, does not tell the truth, or finds more to do
            in a second run.
    """
    original = Original(seed)
    for one in exact_passes()[seed % share :: share]:
        name = one.pass_name()
        before = original.prepared(one)
        after, outcome = rewrite(one, before)
        if outcome.rewritten:
            original.check(before, after, name)
            again = rewrite(one, after)[1]
            if again.rewritten:
                raise LawBroken(f"{name}: a second run rewrites {again.rewritten} more")
    for target in ("onnx", "ort-cpu") if share == 1 else (("onnx", "ort-cpu")[seed % 2],):
        passes = recipes.named("default", target, None)
        after = Pipeline(passes).rewrite(original.model, check=True).model
        original.check(original.model, after, f"default for {target}")


@pytest.mark.parametrize("first", range(0, SEEDS, BATCH))
def test_random_graphs_keep_their_meaning(first: int) -> None:
    for seed in range(first, first + BATCH):
        try:
            check_seed(seed, SHARE)
        except Exception as error:
            raise LawBroken(f"seed {seed}: {error}") from error
