"""Every example in the guide and in the docstrings runs and prints what it says."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest
import torch

import gossamer
from gossamer import core
from gossamer.core import registry

ROOT = Path(gossamer.__file__).parent
ROOMS = ("core", "score", "penalty", "solve", "methods")
MODULES = sorted(
    ".".join(("gossamer", *path.relative_to(ROOT).with_suffix("").parts))
    for room in ROOMS
    for path in (ROOT / room).rglob("*.py")
    if path.name != "__init__.py"
)


@pytest.fixture
def own_registry(monkeypatch):
    """The guide registers a method; it must not stay."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))


@pytest.mark.parametrize("page", ["patterns", "budgets", "supports", "methods", "penalties"])
def test_guide(page, own_registry):
    importlib.import_module("gossamer.methods")
    path = ROOT.parent / "docs" / "guide" / f"{page}.md"
    result = doctest.testfile(str(path), module_relative=False)
    assert result.attempted and not result.failed


RECIPES = [f"gossamer.recipes.{name}" for name in ("curve", "random_search", "sparse_ift")]


@pytest.mark.parametrize("name", [*MODULES, *RECIPES, "gossamer.nn.branches"])
def test_docstrings(name):
    module = importlib.import_module(name)
    names = {"torch": torch, **{n: getattr(core, n) for n in core.__all__}}
    assert not doctest.testmod(module, extraglobs=names).failed
