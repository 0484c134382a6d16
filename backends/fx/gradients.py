"""The gradient of the task's loss by initializer: what Taylor criteria and the choice of blocks to train look at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as oir

from burnish.backends.fx import bridge
from burnish.backends.fx.objective import Task, call, module_of
from burnish.ir.errors import InputError
from burnish.ir.samples import Sample
from burnish.passes.lossy import Keeps


def gradients(model: oir.Model, samples: Sequence[Sample], keeps: Keeps | None = None) -> dict[str, np.ndarray]:
    """The gradient of the task's loss, summed over all rows of all samples.

    The loss is the cross-entropy of the labels; of a causal language model without labels, that of each next token.

    Args:
        model: not changed.
        samples: what the loss is computed on.
        keeps: says which rows are padding and do not count; all rows count without it.

    Returns:
        float64 arrays of the shapes of the weights, by the name of the initializer, or of the value of a Constant; zero
        where the loss does not depend on a weight. A weight that is read several times has the sum of its gradients.

    Raises:
        InputError: there are no samples, the model cannot be expressed in torch or differentiated, it is no classifier,
            or labels are missing and there is no next token.
    """
    if not samples:
        raise InputError("there are no samples", hint="give samples with `--data`")
    module = module_of(model)
    task = Task(model, module, keeps)
    origins = bridge.bridge_of(module).weights
    parameters = dict(module.named_parameters())
    found = {path: np.zeros(tuple(one.shape)) for path, one in parameters.items()}
    for sample in samples:
        loss, _ = task.loss(call(module, sample.feeds)[task.look.output], sample)
        try:
            loss.backward()
        except RuntimeError as error:
            raise InputError(f"torch cannot differentiate the model: {str(error).splitlines()[0]}") from error
        for path, parameter in parameters.items():
            if parameter.grad is not None:
                found[path] += parameter.grad.double().cpu().numpy()
                parameter.grad = None
    return {origins[path].name: array for path, array in found.items()}
