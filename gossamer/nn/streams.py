"""Streams: how the blocks of a transformer read their residual stream, and what they add to it.

A block has two halves, attention and feed-forward; each reads the stream through a norm and adds to it what one linear
layer writes. Whoever changes the stream's basis or width needs to know these layers and nothing else of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from ..core.errors import TargetError

Run = Callable[[nn.Module, Tensor, Mapping[str, Any]], Tensor]


@dataclass(frozen=True)
class Half:
    """One of a block's two additions to the stream: x + run(norm(x)).

    Args:
        norm: name in the block of what normalises the stream before it is read.
        readers: names of all linear layers that read the normalised stream.
        writer: name of the linear layer whose outputs are added.
        run: (block, normalised stream, the block's further arguments by name) → what is added.
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
    """

    blocks: tuple[str, ...]
    halves: tuple[Half, Half]
    embeddings: tuple[str, ...] = ()
    positional: tuple[str, ...] = ()
    scale_offset: float = 0.0


@dataclass(frozen=True)
class Stack:
    """The blocks of one model, in the order of the stream.

    Args:
        name: dotted name of the list that holds them.
        owner: dotted name of the module that holds the list.
    """

    name: str
    owner: str
    family: Family
    blocks: tuple[nn.Module, ...]

    def tables(self, model: nn.Module) -> list[nn.Embedding]:
        """The embedding tables whose rows make the stream, if nobody else uses one of them (as a tied head does)."""
        owner = model.get_submodule(self.owner)
        tables = [owner.get_submodule(name) for name in self.family.embeddings]
        ours = {id(t.weight) for t in tables}
        uses = sum(id(p) in ours for _, p in model.named_parameters(remove_duplicate=False))
        return tables if uses == len(tables) else []


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
FAMILIES = (_LLAMA, replace(_LLAMA, blocks=("GemmaDecoderLayer",), scale_offset=1.0), _STARCODER2, _PHI3, _OPT, _GPT2)

_PARALLEL = "its attention and its feed-forward part read the stream side by side"
_OUTER = "norms scale what its halves add to the stream, and a rotation does not pass through a scale"
_EXPERTS = "its feed-forward part is a mixture of experts, stored as stacked weights"
_POST = "it normalises the stream after each addition, not before it is read"
UNFIT = {
    **dict.fromkeys(("PhiDecoderLayer", "GPTNeoXLayer", "FalconDecoderLayer", "CohereDecoderLayer"), _PARALLEL),
    **dict.fromkeys(("Gemma2DecoderLayer", "Gemma3DecoderLayer", "Olmo2DecoderLayer"), _OUTER),
    **dict.fromkeys(("MixtralDecoderLayer", "Qwen2MoeDecoderLayer", "Qwen3MoeDecoderLayer"), _EXPERTS),
    **dict.fromkeys(("BertLayer", "RobertaLayer", "TransformerBlock", "MPNetLayer"), _POST),
    **dict.fromkeys(("T5Block", "BartEncoderLayer", "WhisperEncoderLayer"), "it is half of an encoder-decoder"),
}


def stack_of(model: nn.Module) -> Stack:
    """The blocks that share the model's residual stream.

    Raises:
        TargetError: there is no list of blocks of a known class; the message says what was found and what it lacks.
    """
    known = {name: family for family in FAMILIES for name in family.blocks}
    lists = {name: [_kind(b) for b in m] for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and m}
    found = [name for name, kinds in lists.items() if len(set(kinds)) == 1 and kinds[0] in known]
    if len(found) != 1:
        raise TargetError(_refusal(type(model).__name__, found, lists, known))
    name = found[0]
    blocks = tuple(model.get_submodule(name))
    stack = Stack(name, name.rpartition(".")[0], known[_kind(blocks[0])], blocks)
    _check(stack, model)
    return stack


def _kind(block: nn.Module) -> str:
    return getattr(type(block), "sliced_from", type(block)).__name__


def _refusal(model: str, found: Sequence[str], lists: Mapping[str, list[str]], known: Mapping[str, Family]) -> str:
    if found:
        return f"{model} has {len(found)} lists of blocks ({', '.join(found)}); pass the part that has one of them"
    kinds = sorted({kind for kinds in lists.values() for kind in kinds})
    why = [f"{kind}: {UNFIT[kind]}" for kind in kinds if kind in UNFIT]
    lacks = "; ".join(why) or f"it has blocks of {', '.join(kinds) or 'no kind at all'}"
    return (
        f"the residual stream of {model} cannot be sliced: {lacks}. Blocks must normalise the stream before each half "
        f"reads it and add what one linear layer writes; known are {', '.join(sorted(known))}"
    )


def _check(stack: Stack, model: nn.Module) -> None:
    """All that a block needs is there, and nothing else reads or writes the stream."""
    problems = []
    owner = model.get_submodule(stack.owner)
    for name in ("project_in", "project_out"):
        if getattr(owner, name, None) is not None:
            problems.append(f"{name}: its embeddings are narrower than its stream")
    for i, block in enumerate(stack.blocks):
        if not getattr(block, "do_layer_norm_before", True):
            problems.append(f"block {i}: {_POST}")
        if hasattr(block, "crossattention"):
            problems.append(f"block {i}: cross-attention reads the stream as well")
        for half in stack.family.halves:
            problems += [f"block {i}: {what}" for what in _missing(block, half)]
    if problems:
        raise TargetError(
            f"the residual stream of {type(model).__name__} cannot be sliced:\n  " + "\n  ".join(problems[:12])
        )


def _missing(block: nn.Module, half: Half) -> list[str]:
    problems = []
    for name in (half.norm, *half.readers, half.writer):
        try:
            module = block.get_submodule(name)
        except AttributeError:
            problems.append(f"it has no {name}")
            continue
        plain = type(module) is nn.Linear or type(module).__name__ == "Conv1D"
        if name != half.norm and not plain:
            problems.append(
                f"{name} is a {type(module).__name__}, not a plain linear layer (remove masks, merge adapters, unpack)"
            )
    return problems
