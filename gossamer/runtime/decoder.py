"""A Llama that decodes one token at a time, with as few steps between the weights and the logits as there can be.

Shapes: V vocabulary, D width, I width of the gated layer, H query heads and N key heads of d numbers, S most tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.attach.adapted import refuse_adapters
from gossamer.core.errors import DispatchError, GossamerError
from gossamer.formats import Format, Int4Groups, TileBitmask
from gossamer.kernels.cpu.int4decode import Int4Product
from gossamer.kernels.cpu.launch import Launch
from gossamer.kernels.cpu.memory import floats, large_pages
from gossamer.kernels.cpu.tiledecode import TileProduct
from gossamer.kernels.cpu.trial import need_kernels
from gossamer.nn import PackedLinear
from gossamer.nn.sliced import is_sliced

# What a token needs beside its weights: (kernel, addresses), laid out once.
Calls = list[tuple[Launch, tuple[int, ...]]]


class DecoderBusy(GossamerError, RuntimeError):
    """A decoder was called while another thread was in it: it has one key-value cache."""


@dataclass(frozen=True)
class _Product:
    """A stored weight, laid out for one token, and the bias it adds."""

    stored: Format
    bias: Tensor | None
    launch: Launch

    @classmethod
    def of(cls, layers: Sequence[nn.Module], dtype: torch.dtype, threads: int) -> _Product:
        stored, bias = _stored(layers, dtype), _biases(layers)
        return cls.made(stored, bias, threads)

    @classmethod
    def made(cls, stored: Format, bias: Tensor | None, threads: int) -> _Product:
        product = Int4Product.of(stored) if isinstance(stored, Int4Groups) else TileProduct.of(stored)
        large_pages(*stored.parts().values())
        return cls(stored, bias, product.launch(1, stored.dtype.itemsize, threads=threads))

    def call(self, x: Tensor, y: Tensor, add: Tensor | None = None) -> tuple[Launch, tuple[int, ...]]:
        """y = W x + b, or y = W x + add."""
        shift = self.bias if add is None else add
        parts = (part.data_ptr() for part in self.stored.parts().values())
        return self.launch, (x.data_ptr(), *parts, 0 if shift is None else shift.data_ptr(), y.data_ptr())


def _stored(layers: Sequence[nn.Module], dtype: torch.dtype) -> Format:
    """Layers that read the same input, as one weight: one below the other."""
    formats = [layer.fmt if isinstance(layer, PackedLinear) else None for layer in layers]
    fours = [fmt for fmt in formats if isinstance(fmt, Int4Groups)]
    if len(fours) == len(layers):
        return stack(fours)
    return TileBitmask.from_dense(torch.cat([layer.weight.detach().to(dtype) for layer in layers]))


def stack(parts: Sequence[Int4Groups]) -> Int4Groups:
    """Weights of the same width, one below the other."""
    first = parts[0]
    counts = torch.cat([part.indptr.diff() for part in parts])
    indptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in ("indices", "values", "codes")}
    return Int4Groups(sum(part.rows for part in parts), first.cols, indptr, **joined)


def _biases(layers: Sequence[nn.Module]) -> Tensor | None:
    if all(layer.bias is None for layer in layers):
        return None
    shifts = (floats(layer.out_features).zero_() if layer.bias is None else layer.bias for layer in layers)
    return torch.cat([shift.detach().float() for shift in shifts])


class Decoder:
    """One sequence, token by token: weights laid out for streaming, its own key-value cache, one call per token.

    Queries, keys and values are one product, and so are gate and up; norms, rotary turns, attention, gates and
    residual sums are vector code between them, and the whole token is one chain of kernels without Python. Every
    weight is stored as it comes: pruned ones as tiles of a bitmask, 4-bit ones as they are, dense ones in the same
    tiles without a mask, so that dense and sparse models differ by their weights alone. The model is not kept.

    A decoder holds one sequence and serves one caller at a time; make one per sequence.

    Args:
        model: a Llama of transformers (`LlamaForCausalLM`) on the CPU, dense, pruned or packed, float32 or bfloat16.
        max_tokens: tokens that the cache can hold, rounded up to a multiple of 16.
        head: how to store the output head, a function of its weight [V, D], such as `Int4Groups.from_dense`; as it
            comes when None. The embedding stays as it is.
        threads: threads of a product; torch's number when None.

    Raises:
        TargetError: the model carries adapters; merge and remove them first.
        DispatchError: another architecture, dtype, device or size than these kernels serve; the message says which.

    Example:
        >>> decoder = Decoder(model, max_tokens=256)                                # doctest: +SKIP
        >>> tokenizer.decode(decoder.generate(tokenizer("The spider").input_ids, 20))  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        max_tokens: int = 2048,
        head: Callable[[Tensor], Format] | None = None,
        threads: int | None = None,
    ) -> None:
        need_kernels("Decoder", "call the model itself, token by token")
        refuse_adapters(model)
        config = _served(model)
        self.max_tokens = -(-max_tokens // 16) * 16
        self.vocabulary, self.position = config.vocab_size, 0
        self._busy = threading.Lock()
        self._threads = threads or torch.get_num_threads()
        with torch.no_grad():
            self._build(model, config, head)

    def _build(self, model: Any, config: Any, head: Callable[[Tensor], Format] | None) -> None:
        from gossamer.kernels.cpu.step import Chain, plan_norm

        weight_VD = model.lm_head.weight.detach()
        dtype = weight_VD.dtype
        width = config.hidden_size
        self._where = torch.zeros(1, dtype=torch.int64)
        self._eps = torch.tensor([config.rms_norm_eps], dtype=torch.float32)
        self._x_D, self._logits_V = floats(width).zero_(), floats(self.vocabulary)
        self._embedding_VD = model.get_input_embeddings().weight.detach()
        turns = _turns(model.model.rotary_emb, self.max_tokens)
        self._layers = [_Layer(layer, config, self, turns, dtype) for layer in model.model.layers]
        self._body = [call for layer in self._layers for call in layer.calls()]
        stored = TileBitmask.from_dense(weight_VD) if head is None else head(weight_VD)
        self._head = _Product.made(stored, _biases([model.lm_head]), self._threads)
        self._last_weight = model.model.norm.weight.detach().float().clone()
        out = self._head.stored.dtype
        self._last_D = torch.empty(width, dtype=out)
        norm = plan_norm(width, out.itemsize)
        ends: Calls = [
            (norm, self._norm(self._x_D, self._last_weight, self._last_D)),
            self._head.call(self._last_D, self._logits_V),
        ]
        self._silent, self._speaking = Chain.of(self._body), Chain.of([*self._body, *ends])

    def _norm(self, x: Tensor, weight: Tensor, out: Tensor) -> tuple[int, ...]:
        return x.data_ptr(), weight.data_ptr(), self._eps.data_ptr(), out.data_ptr()

    @property
    def nbytes(self) -> int:
        """Bytes that one token reads of the weights: all products, without embedding and cache."""
        products = [p for layer in self._layers for p in layer.products] + [self._head]
        return sum(_read(product.stored) for product in products)

    def reset(self) -> None:
        """Forget the sequence; the next token is the first."""
        self.rewind(0)

    def rewind(self, position: int) -> None:
        """Forget all but the first `position` tokens.

        Raises:
            ValueError: fewer were read.
        """
        if not 0 <= position <= self.position:
            raise ValueError(
                f"{self.position} tokens were read, there is no going to {position}; give no more than that"
            )
        self._alone(self._set_position, position)

    def _set_position(self, position: int) -> None:
        self.position = position

    def step(self, token: int) -> Tensor:
        """Read one token and return the logits [V] of the next, float32, in memory of their own.

        Raises:
            ValueError: the token is not in the vocabulary, or the cache is full; make a decoder with more max_tokens.
            DecoderBusy: another thread is in this decoder.
        """
        return self._alone(self._step, token, True)

    def prefill(self, tokens: Sequence[int] | Tensor) -> Tensor:
        """Read a prompt and return the logits [V] after its last token. All but that one skip the output head.

        Raises:
            ValueError: the prompt is empty, or a token is refused as in `step`.
            DecoderBusy: another thread is in this decoder.
        """
        tokens = [int(t) for t in torch.as_tensor(tokens).view(-1)]
        if not tokens:
            raise ValueError("prefill reads at least one token; give the prompt its first token")
        return self._alone(self._read_all, tokens)

    def _read_all(self, tokens: list[int]) -> Tensor:
        for token in tokens[:-1]:
            self._step(token, False)
        return self._step(tokens[-1], True)

    def generate(
        self,
        tokens: Sequence[int] | Tensor,
        count: int,
        *,
        stop: Sequence[int] = (),
        choose: Callable[[Tensor], int] | None = None,
    ) -> list[int]:
        """Continue a prompt by `count` tokens, or up to a token in `stop` (which is returned, too).

        Args:
            choose: picks a token from the logits [V]; the most likely one when None.

        Raises:
            ValueError: the prompt and its continuation do not fit the cache; as in `prefill`.
            DecoderBusy: another thread is in this decoder.
        """
        pick = choose or (lambda logits_V: int(logits_V.argmax()))
        logits_V, found = self.prefill(tokens), []
        while len(found) < count:
            found.append(pick(logits_V))
            if found[-1] in stop or len(found) == count:
                break
            logits_V = self.step(found[-1])
        return found

    def _alone(self, work: Callable[..., Any], *args: Any) -> Any:
        if not self._busy.acquire(blocking=False):
            raise DecoderBusy("this decoder is at work in another thread; make one decoder per sequence")
        try:
            return work(*args)
        finally:
            self._busy.release()

    def _step(self, token: int, speak: bool) -> Tensor:
        if not 0 <= token < self.vocabulary:
            raise ValueError(f"token {token} is not in the vocabulary of {self.vocabulary}")
        if self.position >= self.max_tokens:
            raise ValueError(f"the cache is full with {self.max_tokens} tokens; make a Decoder with more max_tokens")
        self._where[0] = self.position
        self._x_D.copy_(self._embedding_VD[token])
        (self._speaking if speak else self._silent).run()
        self.position += 1
        return self._logits_V.clone() if speak else self._logits_V


class _Layer:
    """One block: its products, its buffers and its share of the cache."""

    def __init__(self, layer: Any, config: Any, decoder: Decoder, turns: Tensor, dtype: torch.dtype) -> None:
        attention, gated, threads = layer.self_attn, layer.mlp, decoder._threads
        self.decoder, self.turns = decoder, turns
        self.heads, self.key_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_width, self.gate_width = attention.head_dim, config.intermediate_size
        self.qkv = _Product.of([attention.q_proj, attention.k_proj, attention.v_proj], dtype, threads)
        self.o = _Product.of([attention.o_proj], dtype, threads)
        self.gate_up = _Product.of([gated.gate_proj, gated.up_proj], dtype, threads)
        self.down = _Product.of([gated.down_proj], dtype, threads)
        self.products = (self.qkv, self.o, self.gate_up, self.down)
        norms = layer.input_layernorm, layer.post_attention_layernorm
        self.norms = [norm.weight.detach().float().clone() for norm in norms]
        self.scale = torch.tensor([attention.scaling], dtype=torch.float32)
        n, d, most = self.key_heads, self.head_width, decoder.max_tokens
        self.keys_NdS, self.values_NSd = floats(n, d, most).zero_(), floats(n, most, d).zero_()
        # One set of buffers would do for all layers; they are small, and so each layer stands for itself.
        self.buffers = [torch.zeros(product.stored.cols, dtype=product.stored.dtype) for product in self.products]
        self.rows = floats(self.qkv.stored.rows).zero_(), floats(self.gate_up.stored.rows).zero_()

    def calls(self) -> Calls:
        from gossamer.kernels.cpu.step import plan_attend, plan_gate, plan_norm

        x_D, at = self.decoder._x_D, self.decoder._where
        into_qkv, into_o, into_gate, into_down = self.buffers
        heads_row, gate_row = self.rows
        sizes = [buffer.element_size() for buffer in self.buffers]
        attend = plan_attend(self.heads, self.key_heads, self.head_width, self.decoder.max_tokens, sizes[1])
        cache = (heads_row, self.turns, at, self.keys_NdS, self.values_NSd, self.scale, into_o)
        return [
            (plan_norm(x_D.numel(), sizes[0]), self.decoder._norm(x_D, self.norms[0], into_qkv)),
            self.qkv.call(into_qkv, heads_row),
            (attend, tuple(t.data_ptr() for t in cache)),
            self.o.call(into_o, x_D, add=x_D),
            (plan_norm(x_D.numel(), sizes[2]), self.decoder._norm(x_D, self.norms[1], into_gate)),
            self.gate_up.call(into_gate, gate_row),
            (plan_gate(self.gate_width, sizes[3]), (gate_row.data_ptr(), into_down.data_ptr())),
            self.down.call(into_down, x_D, add=x_D),
        ]


def _turns(rotary: nn.Module, most: int) -> Tensor:
    """Cosines and sines of every position, float32 [S, 2, d / 2]."""
    cosine, sine = rotary(torch.zeros(1, dtype=torch.float32), torch.arange(most)[None])
    half = cosine.shape[-1] // 2
    return torch.stack([cosine[0, :, :half], sine[0, :, :half]], 1).float().contiguous()


def _read(stored: Format) -> int:
    """Bytes that a product reads: masks and indices only where something was dropped."""
    whole = stored.density == 1.0
    skipped = ("bits",) if isinstance(stored, TileBitmask) and stored.dtype is torch.bfloat16 else ("indices",)
    return sum(part.nbytes for name, part in stored.parts().items() if not (whole and name in skipped))


def _served(model: nn.Module) -> Any:
    """The model's config, if all that it asks for is served."""
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    if kind != "llama" or not hasattr(model, "lm_head"):
        raise DispatchError(f"Decoder takes LlamaForCausalLM of transformers (model_type 'llama'), got {kind!r}")
    weight = model.lm_head.weight
    reasons = [
        (config.hidden_act != "silu", f"gates with {config.hidden_act}; the decoder has silu"),
        (weight.dtype not in (torch.float32, torch.bfloat16), f"{weight.dtype}; cast it to float32 or bfloat16"),
        (weight.device.type != "cpu", f"weights on {weight.device}; move the model to the CPU"),
        (is_sliced(model), "a sliced residual stream (gossamer.slice); call the model itself"),
        (config.attention_bias or config.mlp_bias, "biases in its attention or gated layers"),
        (config.rope_parameters["rope_type"] == "dynamic", "dynamic rotary scaling"),
    ]
    for wrong, why in reasons:
        if wrong:
            raise DispatchError(f"Decoder cannot run this Llama: it has {why}")
    return config
