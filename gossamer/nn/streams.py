"""Streams: the residual stream of a model, and the layers that read and write it.

Whoever changes the stream's basis or width needs to know these layers and nothing else of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ..core.errors import TargetError
from .families import FAMILIES, UNFIT, Family, Half

JOINTS = ("attention_joint", "feed_joint")
Place = tuple[nn.Module, str]


@dataclass(frozen=True)
class Reading:
    """One half of one block: it reads the stream, and adds to it.

    Args:
        name: of its joint, in the model.
        own_norm: (block, name) of the half's norm.
        norm: what normalised the stream that it reads: its own norm where norms come first, that of the half before
            where they come last; None if nobody did.
    """

    block: nn.Module
    half: Half
    name: str
    own_norm: Place
    norm: Place | None

    @property
    def joint(self) -> str:
        """The joint's name in the block."""
        return self.name.rpartition(".")[2]

    @property
    def readers(self) -> list[nn.Module]:
        """All linear layers that read the stream here."""
        return [self.block.get_submodule(name) for name in self.half.readers]

    @property
    def writer(self) -> nn.Module:
        """The linear layer whose outputs are added."""
        return self.block.get_submodule(self.half.writer)


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

    def readings(self) -> list[Reading]:
        """Every half of every block."""
        found: list[Reading] = []
        for i, block in enumerate(self.blocks):
            for half, joint in zip(self.family.halves, JOINTS):
                own = (block, half.norm)
                before = (found[-1].own_norm if found else None) if self.family.post else own
                found.append(Reading(block, half, f"{self.name}.{i}.{joint}", own, before))
        return found

    def tables(self, model: nn.Module) -> list[nn.Embedding]:
        """The embedding tables whose rows make the stream, if nobody else uses one of them (as a tied head does)."""
        owner = model.get_submodule(self.owner)
        tables = [owner.get_submodule(name) for name in self.family.embeddings]
        ours = {id(t.weight) for t in tables}
        uses = sum(id(p) in ours for _, p in model.named_parameters(remove_duplicate=False))
        return tables if uses == len(tables) else []


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
        f"the residual stream of {model} cannot be sliced: {lacks}. Each half of a block must read the "
        f"stream by linear layers and add what one of them writes; known are {', '.join(sorted(known))}"
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
            problems.append(f"block {i}: its norms come after the additions; of its class only those before are known")
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
