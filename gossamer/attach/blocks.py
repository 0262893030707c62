"""Blocks: the repeated parts of a network, as its lists of modules say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from .targets import Target


def blocks_of(model: nn.Module, targets: Sequence[Target]) -> dict[str, tuple[str, ...]]:
    """Per block, the targets inside it: blocks are the entries of the outermost lists of modules.

    An entry that is a target itself, or holds none, is no block.
    """
    names = {t.name for t in targets}
    found: dict[str, tuple[str, ...]] = {}
    for name in entries_of_lists(model):
        inner = tuple(t.name for t in targets if t.name.startswith(f"{name}."))
        if inner and name not in names:
            found[name] = inner
    return found


def entries_of_lists(module: nn.Module, path: str = "") -> list[str]:
    """Names of the entries of the outermost lists of modules."""
    dotted = f"{path}." if path else ""
    if path and isinstance(module, nn.ModuleList):
        return [f"{dotted}{child}" for child, _ in module.named_children()]
    return [name for child, inner in module.named_children() for name in entries_of_lists(inner, f"{dotted}{child}")]


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """transformers' models keep no keys and values meanwhile: nothing is generated, and a block may run twice."""
    configs = {id(c): c for m in model.modules() if getattr(c := getattr(m, "config", None), "use_cache", False)}
    try:
        for config in configs.values():
            config.use_cache = False
        yield
    finally:
        for config in configs.values():
            config.use_cache = True
