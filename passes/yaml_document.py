"""A YAML file that a person wrote, read as nodes, so that every mistake in it is shown with its line."""

from __future__ import annotations

from typing import Any

from burnish.ir.errors import InputError


class Document:
    """The text of a YAML file and where it came from.

    Attributes:
        path: the file, for errors.
        text: what it holds.
    """

    def __init__(self, path: str, text: str) -> None:
        self.path, self.text, self._lines = path, text, text.splitlines()

    def fail(self, node: Any, cause: str, hint: str) -> InputError:
        """An error that shows the line of a node, or the line of that number from 0."""
        line = node.start_mark.line if hasattr(node, "start_mark") else int(node)
        shown = self._lines[line].rstrip() if line < len(self._lines) else ""
        return InputError(f"{cause}\n    {shown}", place=f"{self.path}:{line + 1}", hint=hint)

    def root(self, hint: str) -> Any:
        """The outermost node; None of an empty file.

        Args:
            hint: what to write instead, where the text as a whole is no YAML.

        Raises:
            InputError: it is no YAML, or nested too deeply.
        """
        import yaml

        try:
            return yaml.compose(self.text, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            cause = f"this is not YAML: {error.problem}"
            raise self.fail(mark.line if mark else 0, cause, "mind indentation and colons") from None
        except (yaml.YAMLError, RecursionError) as error:
            cause = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise InputError(f"this is not YAML: {cause}", place=self.path, hint=hint) from None
