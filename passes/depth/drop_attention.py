"""The attention of blocks goes, their mlps stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from burnish.ir.views.block import Block
from burnish.passes.depth_branches import Branch, attention_of
from burnish.passes.depth_parts import DropBranches


@dataclass(frozen=True)
class DropAttention(DropBranches):
    """Drop the self-attention of blocks, with its caches; the mlps stay (arXiv:2406.15786).

    Nothing is added to the stream in its place; the norm behind the sum of a post-norm block stays. The names of the
    caches that stay are numbered anew without gaps.

    Attributes:
        blocks: drop exactly the attention of these, as in `3+4+12`, numbered as `burnish inspect --blocks` shows them.
    """

    what: ClassVar[str] = "attention"

    def branch(self, block: Block) -> Branch | str | None:
        return attention_of(block)
