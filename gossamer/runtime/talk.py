"""Talk: a language model and its tokenizer in conversation, answers token by token as they come.

Shapes: V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gossamer.core.errors import DispatchError, GossamerError, TargetError
from gossamer.runtime.decoder import Decoder

Say = Callable[[str], object]
# What a tokenizer gives for bytes that are not yet a whole character.
UNFINISHED = "�"


@dataclass(frozen=True)
class Answer:
    """What was said, and how fast.

    Args:
        text: without special tokens.
        tokens: how many were made, a stop token included.
        prompt_tokens: of the conversation up to the question.
        seconds: from the question to the last token.
        ended: "stop" where the model ended by itself, "length" where it was cut.
    """

    text: str
    tokens: int
    prompt_tokens: int
    seconds: float
    ended: str


class Engine(Protocol):
    """Continues tokens, and tells each one that is not a stop as it comes."""

    def run(self, ids: list[int], most: int, stop: set[int], hear: Callable[[int], None]) -> list[int]: ...


class Decoded:
    """gossamer's decoder; what it has read stays in its cache as far as the next question repeats it."""

    name = "gossamer's decoder"

    def __init__(self, model: nn.Module, context: int, choose: Callable[[Tensor], int]) -> None:
        self.decoder, self.choose = Decoder(model, max_tokens=context), choose
        self.read: list[int] = []

    def run(self, ids: list[int], most: int, stop: set[int], hear: Callable[[int], None]) -> list[int]:
        """As in `Engine`."""
        known = _shared(self.read, ids[:-1])
        self.decoder.rewind(known)
        logits_V = self.decoder.prefill(ids[known:])
        self.read, found = list(ids), []
        while True:
            found.append(self.choose(logits_V))
            if found[-1] in stop:
                return found
            hear(found[-1])
            if len(found) == most:
                return found
            logits_V = self.decoder.step(found[-1])
            self.read.append(found[-1])


class Generated:
    """transformers' `generate`, for models that the decoder does not serve."""

    name = "transformers"

    def __init__(self, model: Any, temperature: float, seed: int) -> None:
        self.model, self.temperature, self.seed = model, temperature, seed

    def run(self, ids: list[int], most: int, stop: set[int], hear: Callable[[int], None]) -> list[int]:
        """As in `Engine`."""
        ids_1T = torch.tensor([ids])
        ends = sorted(stop) or None
        sampling = {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(self.seed)
            out_1T = self.model.generate(
                input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T), max_new_tokens=most, eos_token_id=ends,
                pad_token_id=ends[0] if ends else 0, streamer=_Ear(stop, hear), **sampling,
            )  # fmt: skip
        return out_1T[0, len(ids) :].tolist()


class _Ear:
    """What `generate` tells its tokens: the prompt first, then each new one."""

    def __init__(self, stop: set[int], hear: Callable[[int], None]) -> None:
        self.stop, self.hear, self.began = stop, hear, False

    def put(self, value: Tensor) -> None:
        if self.began:
            for token in value.flatten().tolist():
                if token not in self.stop:
                    self.hear(token)
        self.began = True

    def end(self) -> None:
        pass


class Talk:
    """One conversation. The tokenizer's chat template shapes it; without one the model continues the text so far.

    Args:
        model: a causal language model of transformers, dense, pruned or packed.
        tokenizer: its tokenizer.
        max_tokens: of one answer.
        context: tokens of the whole conversation; the model's own limit if that is smaller.
        temperature: 0 takes the most likely token; larger is more random.
        seed: of the sampling.
        system: said before the conversation, where there is a chat template.

    Raises:
        TargetError: the model predicts no next token.
        GossamerError: a system text without a chat template.

    Example:
        >>> Talk(model, tokenizer).ask("Why are spiders' webs sticky?").text  # doctest: +SKIP
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_tokens: int = 256,
        context: int = 2048,
        temperature: float = 0.0,
        seed: int = 0,
        system: str | None = None,
    ) -> None:
        if not callable(getattr(model, "generate", None)) or getattr(model.config, "is_encoder_decoder", False):
            raise TargetError(f"{type(model).__name__} predicts no next token; talk to a causal language model")
        self.template = bool(getattr(tokenizer, "chat_template", None))
        if system is not None and not self.template:
            raise GossamerError("a system text needs a chat template, which this tokenizer has not; say it yourself")
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self.context = min(context, getattr(model.config, "max_position_embeddings", None) or context)
        self.stop = _stops(model, tokenizer)
        self.why: str | None = None
        self.engine = self._engine(model.eval(), temperature, seed)
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self.reset()

    def _engine(self, model: nn.Module, temperature: float, seed: int) -> Decoded | Generated:
        try:
            return Decoded(model, self.context, chooser(temperature, seed))
        except DispatchError as error:
            self.why = str(error)
            return Generated(model, temperature, seed)

    def reset(self) -> None:
        """Forget the conversation."""
        self._messages, self._ids = list(self._opening), []

    def ask(self, text: str, say: Say = lambda piece: None) -> Answer:
        """Answer one question, with all that was said before in mind.

        Args:
            say: called with pieces of the answer as they come.

        Raises:
            GossamerError: the conversation fills the context; start a new one, or allow a larger one.
        """
        began = time.perf_counter()
        messages = [*self._messages, {"role": "user", "content": text}]
        ids = self._tokens(messages, text)
        room = self.context - len(ids)
        if not ids or room < 1:
            raise GossamerError(
                f"the conversation has {len(ids)} tokens and the context {self.context}: "
                + ("start a new one, or allow a larger context" if ids else "ask something")
            )
        pieces = _Pieces(self.tokenizer, say)
        made = self.engine.run(ids, min(self.max_tokens, room), self.stop, pieces.hear)
        answer = pieces.finish()
        self._messages = [*messages, {"role": "assistant", "content": answer}]
        self._ids = [*ids, *made]
        ended = "stop" if made[-1] in self.stop else "length"
        return Answer(answer, len(made), len(ids), time.perf_counter() - began, ended)

    def _tokens(self, messages: Sequence[dict[str, str]], text: str) -> list[int]:
        if not self.template:
            # A first token that opens a text opens it once.
            return [*self._ids, *self.tokenizer(text, add_special_tokens=not self._ids).input_ids]
        whole = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        return self.tokenizer(whole, add_special_tokens=False).input_ids


class _Pieces:
    """Tokens to text as they come, whole characters at a time."""

    def __init__(self, tokenizer: Any, say: Say) -> None:
        self.tokenizer, self.say = tokenizer, say
        self.tokens: list[int] = []
        self.said = ""

    def hear(self, token: int) -> None:
        self.tokens.append(token)
        text = self._text()
        if not text.endswith(UNFINISHED):
            self._tell(text)

    def finish(self) -> str:
        self._tell(self._text())
        return self.said

    def _text(self) -> str:
        return self.tokenizer.decode(self.tokens, skip_special_tokens=True)

    def _tell(self, text: str) -> None:
        if new := text[len(self.said) :]:
            self.say(new)
        self.said = text


def chooser(temperature: float, seed: int) -> Callable[[Tensor], int]:
    """Picks a token from logits [V]: the most likely one at temperature 0, else by lot among softmax(logits / t)."""
    if temperature == 0:
        return lambda logits_V: int(logits_V.argmax())
    generator = torch.Generator().manual_seed(seed)
    return lambda logits_V: int(torch.multinomial((logits_V / temperature).softmax(0), 1, generator=generator))


def _stops(model: Any, tokenizer: Any) -> set[int]:
    found = [getattr(model.generation_config, "eos_token_id", None), getattr(tokenizer, "eos_token_id", None)]
    return {int(i) for ids in found if ids is not None for i in (ids if isinstance(ids, (list, tuple)) else [ids])}


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens at the start are the same."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
