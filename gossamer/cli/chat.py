"""gossamer chat: talk to a language model, in the terminal or by a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from ..core.errors import GossamerError, TargetError
from .screen import Json, emit, err, out, waiting

if TYPE_CHECKING:
    from ..runtime.talk import Talk
    from .models import Loaded

FORGET = "/reset"


def chat(
    model: Annotated[str, typer.Argument(help="A packed or pruned language model: folder, packaged asset, or hub id.")],
    prompt: Annotated[list[str] | None, typer.Option(help="Ask this and end; repeatable, one question each.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one answer, at most.")] = 256,
    context: Annotated[int, typer.Option(min=16, help="Tokens of the whole conversation, at most.")] = 2048,
    temperature: Annotated[float, typer.Option(min=0, help="0: the most likely token; larger: more random.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    system: Annotated[str | None, typer.Option(help="Said before the conversation (chat models only).")] = None,
    as_json: Json = False,
) -> None:
    """Talk to a language model: each line is a question, /reset forgets the conversation, Ctrl-D ends it.

    Lines come from the terminal, from a pipe, or from --prompt. The tokenizer's chat template shapes the conversation;
    without one the model continues the text. Llamas run in gossamer's decoder, others in transformers, which is said.

    Example: gossamer chat small-packed
    """
    from ..runtime.talk import Talk

    with waiting(f"loading {model}"):
        loaded = _language_model(model)
        how = {"max_tokens": max_tokens, "context": context, "temperature": temperature, "seed": seed, "system": system}
        talk = Talk(loaded.model, loaded.tokenizer, **how)
    if talk.why and not as_json:
        err().print(f"Answers come from transformers: {talk.why}", style="dim")
    turns = [turn for turn in _conversation(talk, prompt, as_json)]
    if as_json:
        emit(
            True,
            {"model": model, "engine": talk.engine.name, "why": talk.why, "template": talk.template, "turns": turns},
        )


def _language_model(spec: str) -> Loaded:
    """The model with its tokenizer, packed where the folder says so.

    Raises:
        TargetError: no language model, or no tokenizer beside it.
    """
    from . import models

    loaded = models.load(spec, packed=True)
    if not loaded.causal:
        raise TargetError(
            f"{spec} holds a {type(loaded.model).__name__}, which predicts no next token; chat needs a causal language "
            "model, such as LlamaForCausalLM"
        )
    if loaded.tokenizer is None:
        raise TargetError(f"{spec} holds no tokenizer; save the model with tokenizer=..., or copy its files there")
    return loaded


def _conversation(talk: Talk, prompts: list[str] | None, silent: bool) -> Iterator[dict[str, object]]:
    asked, typed = _questions(prompts)
    for question in asked:
        if question.strip() == FORGET:
            talk.reset()
            continue
        try:
            answer = talk.ask(question, (lambda piece: None) if silent else _say)
        except GossamerError as error:
            if not typed:
                raise
            err().print(str(error), style="yellow")
            continue
        if not silent:
            out().print()
            speed = answer.tokens / max(answer.seconds, 1e-9)
            err().print(f"{answer.tokens} tokens, {speed:.1f} a second, {answer.ended}", style="dim")
        yield {"question": question, "answer": answer.text} | {k: v for k, v in asdict(answer).items() if k != "text"}


def _questions(prompts: list[str] | None) -> tuple[Iterator[str], bool]:
    """The questions, and whether somebody types them."""
    if prompts:
        return iter(prompts), False
    typed = sys.stdin.isatty()
    lines = _typed() if typed else (line.rstrip("\n") for line in sys.stdin)
    return (line for line in lines if line.strip()), typed


def _typed() -> Iterator[str]:
    while True:
        try:
            yield input("> ")
        except EOFError:
            return


def _say(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()
