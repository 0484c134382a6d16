"""`burnish generate`: text from a decoder, and how fast it comes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from burnish.tools import terminal
from burnish.tools.decoders import RUNTIMES
from burnish.tools.generate_prefixes import EVICTIONS, Bytes

if TYPE_CHECKING:
    from burnish.backends.decoding.choosing import Sampling
    from burnish.backends.decoding.decoder import Decoder
    from burnish.backends.decoding.loop import Answer, Ask, Figures, Loop
    from burnish.backends.decoding.radix import Tokens
    from burnish.backends.decoding.sharing import Schedule
    from burnish.tools.generate_files import Words
    from burnish.tools.generate_requests import Line, Request


@click.command("generate")
@click.argument("model", type=click.Path())
@click.option("--prompt", metavar="TEXT", help="What the text begins with.")
@click.option("--requests", metavar="FILE.jsonl", type=click.Path(), help="Prompts, one JSON object on each line.")
@click.option("--check", is_flag=True, help="Compare decoding with caches with computing at once; write no text.")
@click.option("--chat", is_flag=True, help="A prompt is a message to a chat model.")
@click.option("--max-tokens", default=128, show_default=True, type=click.IntRange(min=1), help="Tokens of an answer.")
@click.option("--temperature", default=0.0, show_default=True, type=float, help="Draw tokens; 0 takes the likeliest.")
@click.option("--top-k", default=0, show_default=True, type=int, help="Draw from so many tokens; 0 for all.")
@click.option("--top-p", default=1.0, show_default=True, type=float, help="Draw from the likeliest with this much.")
@click.option("--seed", default=0, show_default=True, type=int, help="Of what is drawn.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End an answer before this text; may be given again.")
@click.option("--batch", default=8, show_default=True, type=click.IntRange(min=1), help="Requests computed together.")
@click.option(
    "--prefix-memory",
    default=0,
    type=Bytes(),
    metavar="SIZE",
    help="Compute what prompts have in common once, and hold it in so many bytes, as 2GB; 0 for no.",
)
@click.option("--prefix-eviction", type=click.Choice(EVICTIONS), help="Keep requests in order, and drop by this rule.")
@click.option("--draft", metavar="MODEL", type=click.Path(), help="A faster decoder whose tokens are verified.")
@click.option("--draft-tokens", type=click.IntRange(1, 64), help="Of the draft, verified at once. [default: 4]")
@click.option("--calibrate", is_flag=True, help="The draft goes on from the keys and values of MODEL, not its own.")
@click.option("--tokenizer", metavar="FILE", type=click.Path(), help="A tokenizer.json. [default: beside the model]")
@click.option("--runtime", default="ort", show_default=True, type=click.Choice(RUNTIMES), help="What runs the model.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1, 1024), help="Threads of the runtime.")
@click.option("--json", "as_json", is_flag=True, help="The answer to --prompt, or all figures, as JSON.")
def generate_command(
    model: str,
    prompt: str | None,
    requests: str | None,
    check: bool,
    draft: str | None,
    draft_tokens: int | None,
    calibrate: bool,
    tokenizer: str | None,
    runtime: str,
    threads: int,
    as_json: bool,
    prefix_memory: int,
    prefix_eviction: str | None,
    **options: Any,
) -> int:
    """Write text with MODEL, an exported decoder with caches or the folder of one.

    The text goes to stdout as it comes, answers to --requests as JSON lines; figures go to stderr. Exit code 1 when a
    line of the requests cannot be answered; the others are.
    """
    from burnish.backends.decoding.parity import ensure
    from burnish.ir.errors import InputError
    from burnish.tools import generate_files, generate_prefixes
    from burnish.tools.decoders import open_decoder

    if (prompt is not None) + (requests is not None) + (check and prompt is None) != 1:
        raise InputError("give either `--prompt` or `--requests`", hint='burnish generate MODEL --prompt "Once"')
    if check and draft is not None:
        raise InputError("`--check` looks at one model", hint="leave out `--draft`, or check the draft as the model")
    for option, given in (("--calibrate", calibrate), ("--draft-tokens", draft_tokens is not None)):
        if given and draft is None:
            raise InputError(f"`{option}` is for a draft", hint="give one with `--draft`")
    generate_prefixes.check(prefix_memory, prefix_eviction, requests)
    folder = generate_files.read(model, tokenizer)
    words = generate_files.Words(folder) if prompt is not None or folder.tokenizer is not None else None
    decoder = open_decoder(folder.model, runtime=runtime, threads=threads, limit=folder.limit)
    try:
        _check_words(words, decoder)
        asker = _Asker(words, decoder, options)
        if check:
            return _checked(decoder, None if prompt is None else asker.ask(_line(prompt), 0)[0])
        ensure(decoder)
        with _loop(decoder, draft, draft_tokens or 4, calibrate, runtime, threads) as (generate, alone):
            if requests is not None:
                size = 1 if alone else options["batch"]
                plan = generate_prefixes.planner(decoder, folder.model, size, prefix_memory, prefix_eviction)
                return _answer_all(generate, decoder, asker, requests, size, plan, as_json)
            ask, stops = asker.ask(_line(str(prompt)), 0)
            answer, text, figures = _answer(generate, decoder, asker, ask, stops, stream=not as_json)
    finally:
        decoder.close()
    if as_json:
        click.echo(json.dumps(_said(answer, text, ask) | {"figures": asdict(figures)}, ensure_ascii=False))
    _report(figures)
    return 0


@contextmanager
def _loop(
    decoder: Decoder, draft: str | None, tokens: int, calibrate: bool, runtime: str, threads: int
) -> Iterator[tuple[Loop, bool]]:
    """The loop that answers, the plain one or that of a draft, which is open meanwhile; whether it has single rows."""
    from burnish.backends.decoding import loop, speculating
    from burnish.tools import generate_files
    from burnish.tools.decoders import open_decoder

    if draft is None:
        yield loop.generate, False
        return
    folder = generate_files.read(draft)
    small = open_decoder(folder.model, runtime=runtime, threads=threads, limit=folder.limit)
    try:
        speculating.check(decoder, small, calibrate=calibrate)
        made = partial(speculating.generate, draft=small, tokens=tokens, calibrate=calibrate)
        yield made, not (decoder.mixes and small.mixes)
    finally:
        small.close()


def _line(prompt: str) -> Line:
    from burnish.tools.generate_requests import Line

    return Line(prompt=prompt)


def _check_words(words: Words | None, decoder: Decoder) -> None:
    from burnish.ir.errors import InputError

    size = decoder.ports.vocabulary
    if words is not None and size is not None and words.size > size:
        raise InputError(
            f"the tokenizer has ids up to {words.size - 1}, the model's end at {size - 1}",
            place=decoder.name,
            hint="give the tokenizer of this model with `--tokenizer`",
        )


class _Asker:
    """Makes what is asked of the decoder of a line and the options of the command."""

    def __init__(self, words: Words | None, decoder: Decoder, options: dict[str, Any]) -> None:
        from burnish.backends.decoding.choosing import Sampling

        self.words, self._decoder, self._options = words, decoder, options
        named = ("temperature", "top_k", "top_p", "seed")
        self._sampling: Sampling = Sampling(**{name: options[name] for name in named})

    def ask(self, line: Line, number: int) -> tuple[Ask, tuple[str, ...]]:
        """The ask of the n-th line, from 0 on, and its stop strings; InputError where it cannot be answered."""
        from burnish.backends.decoding import loop

        options = self._options
        given = {name: getattr(line, name) for name in ("temperature", "top_k", "top_p", "seed")}
        said = {name: value for name, value in given.items() if value is not None}
        sampling = replace(self._sampling, **{"seed": self._sampling.seed + number} | said)
        stops = (line.stop,) if isinstance(line.stop, str) else tuple(line.stop or options["stop"])
        ask = loop.Ask(
            self._ids(line),
            line.max_tokens if line.max_tokens is not None else options["max_tokens"],
            sampling,
            self.words.stops if self.words is not None else frozenset(),
        )
        loop.check(self._decoder, ask)
        return ask, stops

    def _ids(self, line: Line) -> tuple[int, ...]:
        from burnish.ir.errors import InputError

        if (line.prompt is None) == (line.ids is None):
            raise InputError("a line has either a `prompt` or `ids`")
        if line.prompt is None:
            return tuple(line.ids or ())
        if self.words is None:
            raise InputError("there is no tokenizer beside the model", hint="give one with `--tokenizer`")
        if not line.prompt:
            raise InputError("the prompt is empty", place=self._decoder.name, hint="give a text to go on from")
        return self.words.message(line.prompt) if self._options["chat"] else self.words.ids(line.prompt)


def _answer(
    generate: Loop, decoder: Decoder, asker: _Asker, ask: Ask, stops: tuple[str, ...], stream: bool
) -> tuple[Answer, str, Figures]:
    from burnish.backends.decoding.speaking import Speech

    assert asker.words is not None
    speech = Speech(asker.words.text, stops, ask.ids)

    bit_by_bit = stream and not terminal.in_actions()  # there, whole lines are looked at

    def say(text: str) -> None:
        if bit_by_bit and text:
            sys.stdout.write(terminal.prose(text))
            sys.stdout.flush()

    def hear(row: int, token: int) -> bool:
        say(speech.add(token))
        return speech.stopped

    (answer,), figures = generate(decoder, [ask], hear)
    say(speech.finish())
    if stream:
        sys.stdout.write("\n" if bit_by_bit else f"{terminal.inert(terminal.prose(speech.text))}\n")
    return answer, speech.text, figures


def _answer_all(
    generate: Loop,
    decoder: Decoder,
    asker: _Asker,
    path: str,
    size: int,
    plan: Callable[[Sequence[Tokens]], Schedule] | None,
    as_json: bool,
) -> int:
    from burnish.backends.decoding import loop
    from burnish.ir.errors import InputError
    from burnish.tools import generate_prefixes, generate_requests

    requests = generate_requests.read(path, asker.ask)
    good = [one for one in requests if one.ask is not None]
    prompts = [one.ask.ids for one in good if one.ask is not None]
    lines: dict[int, dict[str, Any]] = {one.number: _broken(path, one, one.cause) for one in requests if one.cause}
    figures, failed = loop.Figures(), bool(lines)
    written = 0
    planned = plan(prompts) if plan is not None and prompts else None
    sharing = planned.start(decoder) if planned is not None else None
    begun = partial(generate, begin=sharing.prefill) if sharing is not None else generate
    for together in loop.batches(decoder, prompts, size) if planned is None else planned.batches:
        try:
            answers, took = _batch(begun, decoder, asker, [good[index] for index in together])
            lines.update({good[index].number: said for index, said in zip(together, answers, strict=True)})
            figures.add(took)
        except InputError as error:
            failed = True
            lines.update({good[index].number: _broken(path, good[index], error.cause) for index in together})
        while written < len(requests) and requests[written].number in lines:
            click.echo(json.dumps(lines.pop(requests[written].number), ensure_ascii=False))
            written += 1
    for one in requests[written:]:
        click.echo(json.dumps(lines.pop(one.number), ensure_ascii=False))
    found = generate_prefixes.figures(sharing, planned) if sharing is not None and planned is not None else None
    if as_json:
        click.echo(json.dumps({"figures": asdict(figures) | ({} if found is None else {"prefixes": found})}))
    if good:
        _report(figures)
    if found is not None:
        terminal.talk().print(generate_prefixes.said(found))
    return int(failed)


def _batch(
    generate: Loop, decoder: Decoder, asker: _Asker, requests: list[Request]
) -> tuple[list[dict[str, Any]], Figures]:
    from burnish.backends.decoding.speaking import Speech

    asks = [one.ask for one in requests if one.ask is not None]
    words = asker.words
    speeches = [
        Speech(words.text, one.stops, ask.ids) if words is not None else None
        for one, ask in zip(requests, asks, strict=True)
    ]

    def hear(row: int, token: int) -> bool:
        speech = speeches[row]
        if speech is None:
            return False
        speech.add(token)
        return speech.stopped

    answers, figures = generate(decoder, asks, hear)
    said = []
    for one, ask, answer, speech in zip(requests, asks, answers, speeches, strict=True):
        if speech is not None:
            speech.finish()
        text = speech.text if speech is not None else None
        said.append({"id": one.id, "line": one.number} | _said(answer, text, ask))
    return said, figures


def _broken(path: str, request: Request, cause: str) -> dict[str, Any]:
    terminal.talk().print(f"{path}, line {request.number}: {cause}")
    return {"id": request.id, "line": request.number, "error": cause}


def _said(answer: Answer, text: str | None, ask: Ask) -> dict[str, Any]:
    found: dict[str, Any] = {} if text is None else {"text": text}
    return found | {"ids": answer.ids, "ended": answer.ended, "prompt_tokens": len(ask.ids), "tokens": len(answer.ids)}


def _report(figures: Figures) -> None:
    """Say how fast it was, on stderr."""
    talk = terminal.talk()

    def speed(tokens: int, seconds: float) -> str:
        rate = f", {tokens / seconds:.1f} tokens/s" if seconds > 0 else ""
        return f"{terminal.count(tokens, 'token')} in {seconds:.2f} s{rate}"

    talk.print(f"prompt  {speed(figures.prompt_tokens, figures.prefill_seconds)}")
    if figures.decode_tokens:
        talk.print(f"answer  {speed(figures.decode_tokens, figures.decode_seconds)}, after the first")
    if figures.drafted:
        share = 100 * figures.accepted / figures.drafted
        each = figures.decode_tokens / figures.steps
        talk.print(
            f"draft   {figures.accepted} of {terminal.count(figures.drafted, 'token')} taken, {share:.0f} %; "
            f"{each:.2f} tokens a step of the model"
        )
    whole = f", of {figures.prompt_bytes / 1e6:.2f} MB for the prompt" if figures.prompt_bytes else ""
    talk.print(f"caches  {figures.cache_bytes / 1e6:.2f} MB{whole}")


def _checked(decoder: Decoder, ask: Ask | None) -> int:
    """Show how far decoding with caches is from computing at once; 1 when that is too far."""
    import numpy as np

    from burnish.backends.decoding.parity import parity, perplexity

    ids = None
    if ask is not None and len(ask.ids) >= 4:
        text = np.asarray(ask.ids, np.int64)
        ids = np.stack([text, np.roll(text, 1)])
    found = parity(decoder, ids=ids)
    narrow = any(port.dtype.itemsize < 4 for port in decoder.ports.caches)
    allowed = 2e-2 if narrow else 1e-4
    out = terminal.out()
    out.print(f"difference  {found.difference:.2g} of scores up to {found.scale:.3g} ({found.worst})")
    out.print(f"allowed     {allowed:.0e} of the largest score")
    out.print(f"batches     {'rows of any lengths' if decoder.mixes else 'rows of one length'}")
    if decoder.ports.decides:
        out.print("decisions   by the first tokens of a row, which are given at once")
    if ids is not None:
        first = ids.shape[1] // 2 if decoder.ports.decides else 0
        at_once, stepwise = (perplexity(decoder, [ids[0]], piece=piece, first=first) for piece in (None, 1))
        out.print(f"perplexity  {at_once:.5g} at once, {stepwise:.5g} token by token")
    return int(not found.relative <= allowed)
