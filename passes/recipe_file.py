"""Recipes in YAML: what to run, under which settings. Every mistake is shown with its line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from burnish.ir.errors import InputError
from burnish.passes import catalog
from burnish.passes.base import Pass
from burnish.passes.budget import OBJECTIVES, amount
from burnish.passes.yaml_document import Document

TARGETS = ("onnx", "ort-cpu", "ort-cuda", "llvm", "cuda")
COMPILED = ("llvm", "cuda")
"""Targets that kernels are compiled for; a processor or architecture may follow: `llvm:znver4`, `cuda:sm_90`."""
SETTINGS: dict[str, tuple[str, ...]] = {
    "target": TARGETS,
    "verify": ("off", "ends", "each"),
    "guard": ("latency", "size", "off"),
    "objective": OBJECTIVES,
}
TEXTS = ("max-drop", "max-size", "max-latency", "metric")


@dataclass(frozen=True)
class RecipeFile:
    """A recipe as it was written.

    Attributes:
        passes: the passes in order.
        settings: `target`, `verify`, `guard` (a tuple), `opset`, `objective`, `heal`, and as text `max-drop`,
            `max-size`, `max-latency` and `metric`, as far as given.
        require: passes that must change something.
    """

    passes: tuple[Pass, ...]
    settings: dict[str, Any]
    require: tuple[str, ...] = ()


def read(path: str | Path) -> RecipeFile:
    """Read and validate a recipe.

    Raises:
        InputError: for anything unreadable, unknown or of the wrong form, with the line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read the recipe: {error.strerror}", place=str(path), hint="check the path") from None
    except UnicodeDecodeError:
        raise InputError("the recipe is not text", place=str(path), hint="a recipe is a YAML file in UTF-8") from None
    return _Reader(str(path), text).recipe()


def kind(setting: str, value: str) -> str:
    """What a value of a setting has to be one of the known ones by: of a compiled target what is before the colon."""
    first, _, model = value.partition(":")
    return first if setting == "target" and first in COMPILED and model else value


class _Reader(Document):
    def recipe(self) -> RecipeFile:
        import yaml

        root = self.root("a recipe is a YAML file")
        if not isinstance(root, yaml.MappingNode):
            raise self.fail(root or 0, "a recipe is a mapping", "begin with `passes:` and a list of passes")
        known = ["passes", "opset", "require", "heal", *SETTINGS, *TEXTS]
        passes: tuple[Pass, ...] = ()
        settings: dict[str, Any] = {}
        require: tuple[str, ...] = ()
        seen: set[str] = set()
        for key, value in root.value:
            name = str(key.value)
            if name not in known:
                raise self.fail(key, f"a recipe has no `{name}`", catalog.nearest(name, known))
            if name in seen:
                raise self.fail(key, f"`{name}` is given twice", "put both into one")
            seen.add(name)
            if name == "passes":
                passes = tuple(self.one_pass(item) for item in self.items(value, "passes"))
            elif name == "require":
                require = tuple(self.known_pass(item) for item in self.items(value, "require"))
            elif name == "heal":
                settings["heal"] = self.truth(value)
            elif name in TEXTS:
                settings[name] = self.text_of(value, name)
            elif name == "opset":
                settings["opset"] = self.integer(value)
            elif name == "guard":
                chosen = [self.choice(item, name) for item in (value.value if _is_list(value) else [value])]
                settings[name] = tuple(one for one in chosen if one != "off")
            else:
                settings[name] = self.choice(value, name)
        if not passes:
            raise self.fail(root, "the recipe names no passes", "list them under `passes:`; `burnish passes` shows all")
        return RecipeFile(passes, settings, require)

    def items(self, node: Any, name: str) -> list[Any]:
        if not _is_list(node):
            raise self.fail(
                node, f"`{name}` is a list", f"write each on a line of its own: `{name}:`, then `  - fold-batchnorm`"
            )
        return list(node.value)

    def one_pass(self, node: Any) -> Pass:
        import yaml

        if isinstance(node, yaml.ScalarNode):
            name, options = str(node.value), {}
        elif (
            isinstance(node, yaml.MappingNode)
            and len(node.value) == 1
            and isinstance(node.value[0][1], yaml.MappingNode)
        ):
            key, value = node.value[0]
            name = str(key.value)
            options = {str(k.value): v.value for k, v in value.value}
        else:
            raise self.fail(node, "this is no pass", "write `- name` or `- name: {option: value}`")
        try:
            return catalog.make(name, options)
        except InputError as error:
            raise self.fail(node, error.cause, error.hint or "") from None

    def known_pass(self, node: Any) -> str:
        if node.value not in catalog.names():
            raise self.fail(node, f"there is no pass `{node.value}`", catalog.nearest(str(node.value), catalog.names()))
        return str(node.value)

    def choice(self, node: Any, name: str) -> str:
        value = {"false": "off", "no": "off"}.get(str(node.value).lower(), str(node.value))
        if kind(name, value) not in SETTINGS[name]:
            raise self.fail(node, f"`{name}` cannot be `{node.value}`", catalog.nearest(value, SETTINGS[name]))
        return value

    def truth(self, node: Any) -> bool:
        if str(node.value).lower() not in ("true", "false"):
            raise self.fail(node, f"`{node.value}` is neither true nor false", "write `heal: true`")
        return str(node.value).lower() == "true"

    def text_of(self, node: Any, name: str) -> str:
        if not isinstance(node.value, str):
            raise self.fail(node, f"`{name}` is one value", f"write `{name}: 1%`")
        if name != "metric":
            try:
                amount(node.value, f"--{name}")
            except InputError as error:
                raise self.fail(node, error.cause, (error.hint or "").replace(f"--{name} ", f"{name}: ")) from None
        return node.value

    def integer(self, node: Any) -> int:
        if not str(node.value).isdecimal():
            raise self.fail(node, f"`{node.value}` is not a number", "give the opset as a whole number, such as 20")
        return int(node.value)


def _is_list(node: Any) -> bool:
    import yaml

    return isinstance(node, yaml.SequenceNode)
