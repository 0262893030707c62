"""gossamer makes neural networks sparse, and makes it pay: in size, memory and seconds, at a quality you can see.

report = gossamer.prune(model, "wanda", density=0.5, pattern="2:4", data=batches)
packed = gossamer.pack(model, example)
fast = gossamer.compile(packed, example)
gossamer.save(packed, "folder")
model = gossamer.load("folder")
"""

from __future__ import annotations

from importlib import import_module

from . import methods  # fills the registry

# `attach` names both a room and its one verb: imported here first, the verb wins.
from .attach import adapt, attach, load_adapter
from .core import Pattern, Sparsifier, Support, get_method, method, pattern, select

__version__ = "0.1.0"

# The rest loads on first use, so that `import gossamer` costs next to nothing beyond torch.
_HOME = {
    "prune": "recipes.prune",
    "prune_files": "recipes.prune_files",
    "on_disk": "attach.shelf",
    "Reconstruct": "recipes.reconstruct",
    "compile": "runtime.compiled",
    "Decoder": "runtime.decoder",
    "export_onnx": "deploy.export",
    "rearrange": "recipes.rearrange",
    "slice": "recipes.slicegpt",
    **dict.fromkeys(("load", "pack", "report_of", "save", "unpack"), "deploy"),
    "save_pretrained": "integrations.pretrained",
    "load_pretrained": "integrations.reading",
    **dict.fromkeys(("spgemm", "spgemm_plan"), "kernels.spgemm"),
}

__all__ = [
    "Decoder",
    "Pattern",
    "Reconstruct",
    "Sparsifier",
    "Support",
    "adapt",
    "attach",
    "compile",
    "export_onnx",
    "get_method",
    "load",
    "load_adapter",
    "load_pretrained",
    "method",
    "methods",
    "on_disk",
    "pack",
    "pattern",
    "prune",
    "prune_files",
    "rearrange",
    "report_of",
    "save",
    "save_pretrained",
    "select",
    "slice",
    "spgemm",
    "spgemm_plan",
    "unpack",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'gossamer' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
