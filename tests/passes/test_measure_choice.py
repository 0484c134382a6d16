"""Which measure is taken for a model, and what it is told of padding."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as oir
import pytest

from burnish.backends.ort.session import executor
from burnish.frontends import load
from burnish.frontends.samples import read_samples
from burnish.ir.errors import InputError
from burnish.ir.samples import Sample, are_pairs
from burnish.passes.measure_choice import NAMES, measure
from burnish.passes.measures import Agreement
from burnish.tools.observe import keeps_of

DEMO = Path(__file__).parents[2] / "tools" / "demo"


def parsed(source: str, **arrays: np.ndarray) -> oir.Model:
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 23]> {source}')
    for name, array in arrays.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    return load(proto)


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def classifier(width: int = 3, last: str = "Identity") -> oir.Model:
    return parsed(
        f"g (float[N, 4] x) => (float[N, {width}] y) {{ z = MatMul (x, w)  y = {last} (z) }}", w=drawn(4, width)
    )


def language(causal: int = 1) -> oir.Model:
    source = f"""g (int64[N, S] ids) => (float[N, S, 20] logits) {{
        x = Gather (table, ids)  q = MatMul (x, wq)  k = MatMul (x, wk)  v = MatMul (x, wv)
        a = Attention <q_num_heads: int = 2, kv_num_heads: int = 2, is_causal: int = {causal}> (q, k, v)
        o = MatMul (a, wo)  h = Add (x, o)  logits = MatMul (h, head)
    }}"""
    square = {name: drawn(8, 8, seed=i) for i, name in enumerate(("wq", "wk", "wv", "wo"))}
    return parsed(source, table=drawn(20, 8, seed=9), head=drawn(8, 20, seed=8), **square)


def labelled(*labels: object) -> list[Sample]:
    return [Sample(f"s{i}", {"x": drawn(2, 4)}, np.asarray(one)) for i, one in enumerate(labels)]


def test_the_demo_models_are_judged_by_accuracy_with_labels_and_agreement_without() -> None:
    for name, high in (("digits_resnet", 0.99), ("digits_vit", 0.9)):
        model = load(DEMO / f"{name}.onnx")
        (batch,) = read_samples(DEMO / "digits.npz", model)
        found = measure(None, model, [batch], keeps=keeps_of)
        assert (found.measure.name, found.padding) == ("accuracy", None) and "class numbers" in found.reason
        runner = executor()(model)
        outputs = runner.run(batch.feeds)
        assert found.measure.value([found.measure.partial(outputs, outputs, batch)]) > high
        bare = measure(None, model, [Sample("s", batch.feeds)])
        assert bare.measure.name == "agreement" and "there are no labels" in bare.reason


@pytest.mark.parametrize(
    ("model", "samples", "name"),
    [
        (classifier(), labelled([0, 1], [2, -100]), "accuracy"),
        (classifier(), labelled([0, 3], [1, 1]), "agreement"),
        (classifier(), labelled([0.5, 1.0]), "agreement"),
        (classifier(), [*labelled([0, 1]), Sample("s", {"x": drawn(2, 4)})], "agreement"),
        (classifier(last="Relu"), labelled([0, 1]), "fidelity"),
        (classifier(last="Relu"), labelled([0, 1], [-1, -2]), "recall"),
        (classifier(), labelled([0, 1], [-1, -2]), "recall"),
        (classifier(last="Softmax"), labelled([0, 1]), "accuracy"),
        (classifier(last="Sigmoid"), labelled([[0, 1, 1], [1, 0, 0]]), "accuracy"),
        (classifier(1, "Sigmoid"), labelled([0, 1]), "accuracy"),
        (classifier(1), labelled([0, 1]), "accuracy"),
        (classifier(1), labelled([0, 7]), "fidelity"),
        (classifier(1), labelled([0.3, 1.2]), "fidelity"),
        (classifier(1), [], "fidelity"),
        (language(), [], "perplexity"),
        (language(0), [], "agreement"),
    ],
)
def test_what_is_taken_when_nothing_is_asked_for(model: oir.Model, samples: list[Sample], name: str) -> None:
    found = measure(None, model, samples)
    assert found.measure.name == name and found.reason


def test_a_language_model_with_next_tokens_or_its_own_identifiers_as_labels_is_judged_by_perplexity() -> None:
    ids = np.random.default_rng(0).integers(0, 20, (2, 6))
    model = language()
    outputs = executor()(model).run({"ids": ids})
    following = np.concatenate([ids[:, 1:], np.full((2, 1), -100)], 1)
    values = set()
    for labels in (None, ids, following):
        sample = Sample("s", {"ids": ids}, labels)
        found = measure(None, model, [sample])
        assert found.measure.name == "perplexity"
        values.add(round(found.measure.value([found.measure.partial(outputs, outputs, sample)]), 9))
    assert len(values) == 1 and math.isfinite(values.pop())
    assert measure(None, model, [Sample("s", {"ids": ids}, np.array([1, 0]))]).measure.name == "accuracy"


def test_every_name_is_found_in_whatever_spelling_and_others_are_refused() -> None:
    samples = labelled([0, 1])
    for name in NAMES:
        assert measure(name, classifier(), samples).measure.name == name
    assert measure("R@1", classifier(), samples).measure.name == "recall"
    assert measure("Relative_Error", classifier(), samples).measure.name == "relative-error"
    with pytest.raises(InputError, match="no metric `acuracy`") as caught:
        measure("acuracy", classifier(), samples)
    assert "did you mean `accuracy`" in str(caught.value.hint) and "package.module:function" in str(caught.value.hint)


def test_a_measure_of_the_callers_is_taken_as_it_is() -> None:
    own = Agreement(measure("agreement", classifier()).look)  # type: ignore[arg-type]
    assert measure(own, classifier()).measure is own


@pytest.mark.parametrize("name", ["accuracy", "recall", "auc", "perplexity"])
def test_labels_that_are_missing_are_told_before_anything_runs(name: str) -> None:
    with pytest.raises(InputError, match="no labels") as caught:
        measure(name, classifier(), [*labelled([0, 1]), Sample("bare", {"x": drawn(2, 4)})])
    assert caught.value.hint


def test_padding_is_left_out_where_a_mask_tells_it() -> None:
    source = """g (float[N, S, 4] x, int64[N, S] mask) => (float[N, S, 4] y, float[N, S, 4] z) {
        axis = Constant <value_ints: ints = [2]> ()  c = Cast <to: int = 1> (mask)
        m = Unsqueeze (c, axis)  k = Mul (x, m)
        h = MatMul (k, w)  y = Relu (h)  z = Neg (y)
    }"""
    model = parsed(source, w=drawn(4, 4))
    found = measure("relative-error", model, keeps=keeps_of).measure
    assert set(found.keeps) == {"y", "z"}  # type: ignore[attr-defined]
    keep = measure("divergence", model, keeps=keeps_of).measure.keep  # type: ignore[attr-defined]
    assert keep is not None and keep.input == "mask"


def test_labels_are_pairs_only_when_every_query_has_its_document() -> None:
    assert are_pairs([np.array([0, 1]), np.array([-1, -2, -3])])
    for labels in ([], [np.array([0, 1, 2]), np.array([-1])], [np.array([-1, -2])], [np.array([0.0, -1.0])]):
        assert not are_pairs(labels)
    assert not are_pairs([np.array([0, 1, 5, -100])])
