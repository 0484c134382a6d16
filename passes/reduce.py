"""Cut a model down around one node for as long as a failure of a pass still shows."""

from __future__ import annotations

import onnx_ir as oir

from burnish.ir import part
from burnish.ir.errors import BurnishError, InputError
from burnish.ir.samples import Sample
from burnish.passes import verify
from burnish.passes.pipeline import Pipeline
from burnish.passes.protocols import Judge

HOPS = (1, 2, 4, 8, 16)


def smallest(model: oir.Model, pipeline: Pipeline, node: str, sample: Sample, judge: Judge) -> tuple[oir.Model, Sample]:
    """The smallest neighbourhood of `node` on which `pipeline` still changes the outputs, with inputs that show it.

    Args:
        model: a model on which the first rewrite of `pipeline` is wrong.
        pipeline: the pass at fault.
        node: the name of the node that is rewritten.
        sample: inputs of `model`.
        judge: what runs models.

    Returns:
        The model and its sample; the whole model when no smaller one fails.
    """
    centre = next((one for one in model.graph if one.name == node), None)
    if centre is not None:
        for hops in HOPS:
            region = _neighbourhood(centre, hops)
            try:
                small, feeds = _extract(model, region, sample, judge)
                if _fails(small, feeds, pipeline, judge):
                    return small, feeds
            except (BurnishError, ValueError):
                continue
    return model, sample


def _neighbourhood(centre: oir.Node, hops: int) -> set[oir.Node]:
    region = {centre}
    edge = {centre}
    for _ in range(hops):
        edge = {
            near
            for node in edge
            for near in (*node.predecessors(), *node.successors())
            if near.graph is centre.graph and near not in region
        }
        region |= edge
    return region


def _extract(model: oir.Model, region: set[oir.Node], sample: Sample, judge: Judge) -> tuple[oir.Model, Sample]:
    inputs, _ = part.ends(model, region)
    observed = _observe(model, inputs, sample, judge)
    small = part.part(model, region)
    for value in small.graph.inputs:
        array = observed[str(value.name)]
        value.dtype = value.dtype or oir.DataType.from_numpy(array.dtype)
        if value.shape is None:
            value.shape = oir.Shape([None] * array.ndim)
    return small, Sample(f"inner values of: {sample.name}", observed)


def _observe(model: oir.Model, values: list[oir.Value], sample: Sample, judge: Judge) -> dict:  # type: ignore[type-arg]
    names = [str(value.name) for value in values]
    fed = {name: sample.feeds[name] for name in names if name in sample.feeds}
    watched = model.clone()
    by_name = {str(v.name): v for node in watched.graph for v in node.outputs}
    present = {str(v.name) for v in watched.graph.outputs}
    watched.graph.outputs.extend(by_name[name] for name in names if name not in fed and name not in present)
    runner = judge.execute(watched)
    try:
        found = runner.run(sample.feeds)
    finally:
        runner.close()
    return {name: fed[name] if name in fed else found[name] for name in names}


def _fails(model: oir.Model, sample: Sample, pipeline: Pipeline, judge: Judge) -> bool:
    run = pipeline.rewrite(model, limit=1)
    if run.rewritten == 0:
        return False
    before = judge.execute(model)
    try:
        after = judge.execute(run.model)
    except InputError:
        before.close()
        return True
    try:
        if not verify.compare(verify.Expected(before, [sample]), after).holds:
            return True
    finally:
        before.close()
        after.close()
    return verify.replay(judge.replay(model), judge.replay(run.model), sample) > verify.REPLAY_TOLERANCE
