"""The mlps of blocks go, their attention stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from burnish.ir.views.block import Block
from burnish.passes.depth_branches import Branch, mlp_of
from burnish.passes.depth_parts import DropBranches


@dataclass(frozen=True)
class DropMlp(DropBranches):
    """Drop the mlp of blocks, or their mixture of experts; the attention stays (arXiv:2406.15786).

    Nothing is added to the stream in its place; the norm behind the sum of a post-norm block stays.

    Attributes:
        blocks: drop exactly the mlp of these, as in `3+4+12`, numbered as `burnish inspect --blocks` shows them.
    """

    what: ClassVar[str] = "mlp"

    def branch(self, block: Block) -> Branch | str | None:
        return mlp_of(block)
