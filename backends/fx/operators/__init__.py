"""The operators of the torch.fx bridge: importing this package enters all of them into the registry."""

from burnish.backends.fx.operators import (  # noqa: F401
    attention,
    contrib,
    contrib_attention,
    control,
    elementwise,
    movement,
    network,
    quantize,
    recurrent,
    reduce,
    resize,
    shape,
)
