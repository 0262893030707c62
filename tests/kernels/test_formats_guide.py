"""The guide's pages and the docstrings' examples run as printed."""

import doctest
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch

GUIDE = Path(__file__).parents[2] / "docs" / "guide"
MODULES = [
    *(
        f"gossamer.formats.{name}"
        for name in (
            "dense",
            "csr",
            "bitmask",
            "tilebitmask",
            "int4groups",
            "nm",
            "rowgrouped",
            "block",
            "kernelpatterns",
        )
    ),
    "gossamer.formats",
    "gossamer.kernels.reference.products",
    "gossamer.kernels.dispatch",
    "gossamer.kernels.ops",
    "gossamer.nn.linear",
    "gossamer.nn.conv",
]


@pytest.mark.parametrize("page", ["formats.md", "kernels.md"])
def test_pages_run(page):
    blocks = re.findall(r"```python\n(.*?)```", (GUIDE / page).read_text(), flags=re.S)
    assert len(blocks) >= 3
    scope: dict = {}
    for block in blocks:
        exec(compile(block, page, "exec"), scope)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    result = doctest.testmod(import_module(name), extraglobs={"torch": torch})
    assert result.attempted > 0 and result.failed == 0
