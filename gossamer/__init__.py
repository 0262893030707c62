"""gossamer makes neural networks sparse, and makes it pay: in size, memory and seconds, at a quality you can see.

    report = gossamer.prune(model, "wanda", density=0.5, pattern="2:4", data=batches)
    packed = gossamer.pack(model, example)
    gossamer.save(packed, "folder")
    model = gossamer.load("folder")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .attach import attach
    from .core import Pattern, Sparsifier, Support, get_method, method, methods, pattern, select
    from .deploy import load, pack, save, unpack
    from .recipes.prune import prune

__version__ = "0.1.0"

# Names load on first use, so that `import gossamer` costs next to nothing.
_HOME = {
    **dict.fromkeys(("Pattern", "Sparsifier", "Support", "method", "pattern", "select"), "core"),
    **dict.fromkeys(("get_method", "methods"), "methods"),
    "attach": "attach.weights",
    "prune": "recipes.prune",
    **dict.fromkeys(("load", "pack", "save", "unpack"), "deploy"),
}

__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'gossamer' has no attribute {name!r}")
    import_module(".methods", __name__)  # fills the registry
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
