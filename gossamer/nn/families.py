"""Families: how the blocks of a transformer read their residual stream, and what they add to it.

A block has two halves, attention and feed-forward; each reads the stream and adds to it what one linear layer writes,
and a norm stands before the reading or after the addition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

Run = Callable[[nn.Module, Tensor, Mapping[str, Any]], Tensor]


@dataclass(frozen=True)
class Half:
    """One of a block's two additions to the stream.

    Args:
        norm: name in the block of what normalises the stream before it is read; after the addition in post-norm blocks.
        readers: names of all linear layers that read the normalised stream.
        writer: name of the linear layer whose outputs are added.
        run: (block, what is read, the block's further arguments by name) → what is added.
    """

    norm: str
    readers: tuple[str, ...]
    writer: str
    run: Run


@dataclass(frozen=True)
class Family:
    """Blocks that are built alike.

    Args:
        blocks: names of their classes in transformers.
        halves: attention and feed-forward.
        embeddings: names, beside the list of blocks, of the tables whose rows are added up to the first stream; empty
            where the model looks at their width elsewhere.
        positional: names of the arguments that a model gives its blocks by position, after the stream.
        scale_offset: a norm's scale is its weight plus this.
        post: x becomes norm(x + run(x)), not x + run(norm(x)).
    """

    blocks: tuple[str, ...]
    halves: tuple[Half, Half]
    embeddings: tuple[str, ...] = ()
    positional: tuple[str, ...] = ()
    scale_offset: float = 0.0
    post: bool = False


def _attention(block: nn.Module, x: Tensor, named: Mapping[str, Any]) -> Tensor:
    return block.self_attn(hidden_states=x, **named)[0]


def _feed(block: nn.Module, x: Tensor, named: Mapping[str, Any]) -> Tensor:
    return block.mlp(x)


def _gpt2_attention(block: nn.Module, x: Tensor, named: Mapping[str, Any]) -> Tensor:
    return block.attn(x, **named)[0]


def _opt_attention(block: nn.Module, x: Tensor, named: Mapping[str, Any]) -> Tensor:
    return functional.dropout(_attention(block, x, named), block.dropout, block.training)


def _opt_feed(block: nn.Module, x: Tensor, named: Mapping[str, Any]) -> Tensor:
    return functional.dropout(block.fc2(block.activation_fn(block.fc1(x))), block.dropout, block.training)


def _phi3_attention(block: nn.Module, x: Tensor, named: Mapping[str, Any]) -> Tensor:
    return block.resid_attn_dropout(_attention(block, x, named))


def _phi3_feed(block: nn.Module, x: Tensor, named: Mapping[str, Any]) -> Tensor:
    return block.resid_mlp_dropout(block.mlp(x))


def _bert_attention(block: nn.Module, x: Tensor, named: Mapping[str, Any]) -> Tensor:
    own = {name: value for name, value in named.items() if not name.startswith("encoder_")}
    out = block.attention.output
    return out.dropout(out.dense(block.attention.self(x, **own)[0]))


def _bert_feed(block: nn.Module, x: Tensor, named: Mapping[str, Any]) -> Tensor:
    return block.output.dropout(block.output.dense(block.intermediate(x)))


def _vit_attention(block: nn.Module, x: Tensor, named: Mapping[str, Any]) -> Tensor:
    return block.dropout(block.attention(x, **named)[0])


def _vit_feed(block: nn.Module, x: Tensor, named: Mapping[str, Any]) -> Tensor:
    return block.dropout(block.mlp(x))


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_LLAMA = Family(
    ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer", "SmolLM3DecoderLayer"),
    (
        Half("input_layernorm", _QKV, "self_attn.o_proj", _attention),
        Half("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", _feed),
    ),
    ("embed_tokens",),
)
_STARCODER2 = replace(
    _LLAMA,
    blocks=("Starcoder2DecoderLayer",),
    halves=(_LLAMA.halves[0], Half("post_attention_layernorm", ("mlp.c_fc",), "mlp.c_proj", _feed)),
)
_PHI3 = replace(
    _LLAMA,
    blocks=("Phi3DecoderLayer",),
    halves=(
        Half("input_layernorm", ("self_attn.qkv_proj",), "self_attn.o_proj", _phi3_attention),
        Half("post_attention_layernorm", ("mlp.gate_up_proj",), "mlp.down_proj", _phi3_feed),
    ),
)
_OPT = Family(
    ("OPTDecoderLayer",),
    (
        Half("self_attn_layer_norm", _QKV, "self_attn.out_proj", _opt_attention),
        Half("final_layer_norm", ("fc1",), "fc2", _opt_feed),
    ),
    ("embed_tokens", "embed_positions"),
)
_GPT2 = Family(
    ("GPT2Block",),
    (
        Half("ln_1", ("attn.c_attn",), "attn.c_proj", _gpt2_attention),
        Half("ln_2", ("mlp.c_fc",), "mlp.c_proj", _feed),
    ),
    positional=("past_key_values", "attention_mask", "encoder_hidden_states"),
)
_VIT = Family(
    ("ViTLayer",),
    (
        Half(
            "layernorm_before",
            ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
            "attention.o_proj",
            _vit_attention,
        ),
        Half("layernorm_after", ("mlp.fc1",), "mlp.fc2", _vit_feed),
    ),
    positional=("attention_mask",),
)
_BERT = Family(
    ("BertLayer", "RobertaLayer"),
    (
        Half(
            "attention.output.LayerNorm",
            ("attention.self.query", "attention.self.key", "attention.self.value"),
            "attention.output.dense",
            _bert_attention,
        ),
        Half("output.LayerNorm", ("intermediate.dense",), "output.dense", _bert_feed),
    ),
    positional=("attention_mask", "encoder_hidden_states"),
    post=True,
)
_GEMMA = replace(_LLAMA, blocks=("GemmaDecoderLayer",), scale_offset=1.0)
FAMILIES = (_LLAMA, _GEMMA, _STARCODER2, _PHI3, _OPT, _GPT2, _VIT, _BERT)

_PARALLEL = "its attention and its feed-forward part read the stream side by side"
_OUTER = "norms scale what its halves add to the stream, and a rotation does not pass through a scale"
_EXPERTS = "its feed-forward part is a mixture of experts, stored as stacked weights"
UNFIT = {
    **dict.fromkeys(("PhiDecoderLayer", "GPTNeoXLayer", "FalconDecoderLayer", "CohereDecoderLayer"), _PARALLEL),
    **dict.fromkeys(("Gemma2DecoderLayer", "Gemma3DecoderLayer", "Olmo2DecoderLayer"), _OUTER),
    **dict.fromkeys(("MixtralDecoderLayer", "Qwen2MoeDecoderLayer", "Qwen3MoeDecoderLayer"), _EXPERTS),
    **dict.fromkeys(("T5Block", "BartEncoderLayer", "WhisperEncoderLayer"), "it is half of an encoder-decoder"),
}
