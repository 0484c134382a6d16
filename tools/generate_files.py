"""What lies in the folder of a decoder: the model, its tokenizer, and what other tools wrote about both."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from burnish.ir.errors import InputError, MissingPackageError

if TYPE_CHECKING:
    import tokenizers

GENAI = "genai_config.json"
TOKENIZER = "tokenizer.json"
INNER = "onnx"
"""The folder for graphs inside that of a model, as on the Hugging Face hub."""


@dataclass(frozen=True)
class Folder:
    """What is known of a decoder besides its graph.

    Attributes:
        model: the `.onnx` file.
        tokenizer: its `tokenizer.json`; None when there is none.
        limit: positions that the model is made for; None when nothing says so.
        stops: ids of the tokens that end a text.
        words: special tokens by what they are for, such as `bos_token`; for chat templates.
        template: the chat template; None when there is none.
    """

    model: Path
    tokenizer: Path | None
    limit: int | None
    stops: frozenset[int]
    words: Mapping[str, str]
    template: str | None


def read(model: str, tokenizer: str | None = None) -> Folder:
    """Find out what lies beside a model.

    `genai_config.json`, `generation_config.json`, `config.json` and `tokenizer_config.json` are read where they are
    there: the model's file, the number of positions (the first that says so), and the tokens that end a text (all).

    Args:
        model: a folder, or an `.onnx` file in one.
        tokenizer: a `tokenizer.json`, or a folder that holds one; beside the model when None.

    Raises:
        InputError: there is no such file, a folder holds no model or several, or a file cannot be read.
    """
    given = Path(model)
    folder = given if given.is_dir() else given.parent
    if folder.name == INNER and not (folder / TOKENIZER).is_file():
        folder = folder.parent
    genai = _document(folder / GENAI)
    found = _tokenizer(folder, tokenizer)
    beside = found.parent if found is not None else folder
    generation, config = _document(folder / "generation_config.json"), _document(folder / "config.json")
    words = _document(beside / "tokenizer_config.json")
    decoder = _part(genai, "model")
    limits = (decoder.get("context_length"), config.get("max_position_embeddings"))
    stops = [one.get("eos_token_id") for one in (decoder, generation, config)]
    special = {name: _word(words.get(name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    jinja = beside / "chat_template.jinja"
    template = jinja.read_text(encoding="utf-8") if jinja.is_file() else words.get("chat_template")
    return Folder(
        _model(given, decoder),
        found,
        next((one for one in limits if isinstance(one, int) and one > 0), None),
        frozenset(_numbers(stops)),
        {name: word for name, word in special.items() if word is not None},
        template if isinstance(template, str) else None,
    )


def _model(given: Path, genai: Mapping[str, Any]) -> Path:
    if given.is_file():
        return given
    if not given.is_dir():
        raise InputError("there is no such file or folder", place=str(given), hint="check the path")
    named = _part(genai, "decoder").get("filename")
    inside = sorted(given.glob("*.onnx"))
    if not inside and (given / INNER).is_dir():
        given = given / INNER
        inside = [one for one in given.glob("*.onnx") if one.name == "model.onnx"] or sorted(given.glob("*.onnx"))
    if isinstance(named, str):
        file = given / named
        if Path(named).name != named or not file.is_file():
            raise InputError(f"it names the model `{named}`, which is not there", place=str(given / GENAI))
        return file
    if len(inside) != 1:
        what = f"several models: {', '.join(one.name for one in inside[:4])}" if inside else "no `.onnx` file"
        raise InputError(f"the folder holds {what}", place=str(given), hint="give the path of the model's file")
    return inside[0]


def _tokenizer(folder: Path, given: str | None) -> Path | None:
    if given is None:
        beside = folder / TOKENIZER
        return beside if beside.is_file() else None
    file = Path(given) / TOKENIZER if Path(given).is_dir() else Path(given)
    if not file.is_file():
        raise InputError("there is no tokenizer", place=str(file), hint=f"give a `{TOKENIZER}`, or its folder")
    return file


def _document(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"it cannot be read: {error}", place=str(path), hint="mend or remove it") from error
    if not isinstance(found, dict):
        raise InputError("it is no JSON object", place=str(path), hint="mend or remove it")
    return found


def _part(document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = document.get(name)
    return found if isinstance(found, Mapping) else {}


def _word(given: Any) -> str | None:
    found = given.get("content") if isinstance(given, Mapping) else given
    return found if isinstance(found, str) else None


def _numbers(given: Iterable[Any]) -> Iterable[int]:
    for one in given:
        yield from (n for n in (one if isinstance(one, list) else [one]) if isinstance(n, int) and n >= 0)


class Words:
    """A tokenizer.

    Attributes:
        size: its ids are smaller than this.
        stops: ids of the tokens that end a text, those of the folder included.
    """

    def __init__(self, folder: Folder) -> None:
        """
        Raises:
            InputError: there is no tokenizer, or it cannot be read.
            MissingPackageError: the package `tokenizers` is not installed.
        """
        if folder.tokenizer is None:
            raise InputError(
                "there is no tokenizer beside the model",
                place=str(folder.model),
                hint=f"give a `{TOKENIZER}` with `--tokenizer`, or ids in the lines of `--requests`",
            )
        self._folder = folder
        self._made = _loaded(folder.tokenizer)
        known = self._made.get_vocab(with_added_tokens=True)
        self.size = max(known.values(), default=-1) + 1
        ending = folder.words.get("eos_token")
        own = self._made.token_to_id(ending) if ending is not None else None
        self.stops = folder.stops | ({own} if own is not None else set())

    def ids(self, text: str) -> tuple[int, ...]:
        """The tokens of a prompt, with those that the tokenizer puts around a text."""
        return tuple(self._made.encode(text).ids)

    def text(self, ids: Sequence[int]) -> str:
        """What tokens say; special ones say nothing."""
        return str(self._made.decode(list(ids), skip_special_tokens=True))

    def message(self, text: str) -> tuple[int, ...]:
        """The tokens of a message to a chat model, by its template, up to where the answer begins.

        Raises:
            InputError: there is no template, or it cannot be filled in.
        """
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if self._folder.template is None:
            raise InputError("the model has no chat template", place=str(self._folder.model), hint="leave `--chat` out")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        messages = [{"role": "user", "content": text}]
        try:
            template = environment.from_string(self._folder.template)
            filled = template.render(messages=messages, add_generation_prompt=True, **self._folder.words)
        except (TemplateError, TypeError, ValueError) as error:
            place = str(self._folder.model)
            raise InputError(f"the chat template cannot be filled in: {error}", place=place) from error
        return tuple(self._made.encode(filled, add_special_tokens=False).ids)


def _loaded(path: Path) -> tokenizers.Tokenizer:
    try:
        import tokenizers
    except ImportError as error:
        raise MissingPackageError(
            "text needs the package `tokenizers`, which is not installed", hint="pip install 'burnish[generate]'"
        ) from error
    try:
        made = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain exceptions
        lines = str(error).splitlines() or [type(error).__name__]
        raise InputError(f"this is no tokenizer: {lines[0]}", place=str(path), hint=f"give a `{TOKENIZER}`") from error
    made.no_truncation()
    made.no_padding()
    return made


def _refuse(message: str) -> Callable[[], None]:
    raise ValueError(message)
