"""Where a difference is shown in the files of a repository: the line of the lock file that it contradicts."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from burnish.tools.check.difference import Difference, Report

if TYPE_CHECKING:
    from burnish.tools.check.yaml_tree import Tree


def line(report: Report, one: Difference) -> int | None:
    """The line of the lock file that a difference contradicts, from 1; None when there is no such file."""
    if not report.lock or not Path(report.lock).is_file():
        return None
    state = os.stat(report.lock)
    return _tree(report.lock, state.st_mtime_ns, state.st_size).line(one.key)


@lru_cache(maxsize=1)
def _tree(path: str, _changed: int, _size: int) -> Tree:
    from burnish.tools.check import yaml_tree

    return yaml_tree.read(path, "a lock file")


def in_repository(path: str) -> str:
    """A path as code hosting shows it: from the root of the workspace, with `/`; absolute for what is outside.

    The root is `GITHUB_WORKSPACE`, else the current folder.
    """
    root = os.path.realpath(os.environ.get("GITHUB_WORKSPACE") or os.curdir)
    whole = os.path.join(os.path.realpath(os.path.dirname(path) or os.curdir), os.path.basename(path))
    found = Path(whole)
    return (found.relative_to(root) if found.is_relative_to(root) else found).as_posix()
