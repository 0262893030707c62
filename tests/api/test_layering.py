"""Who may import whom: docs/architecture.md's table, enforced on every import statement, those in functions too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "gossamer"

BELOW_METHODS = {"core", "formats", "kernels", "score", "solve", "nn", "attach", "penalty"}
ALLOWED: dict[str, set[str]] = {
    "core": set(),
    "formats": {"core"},
    "kernels": {"core", "formats"},
    "score": {"core"},
    "penalty": {"core"},
    "solve": {"core", "kernels"},
    "nn": {"core", "formats", "kernels"},
    "attach": {"core", "score", "kernels", "nn"},
    "methods": BELOW_METHODS,
    "recipes": BELOW_METHODS | {"methods"},
    "data": {"core"},
    # A saved vision model is built again from the classes in data.vision.
    "deploy": BELOW_METHODS | {"methods", "data"},
    "runtime": BELOW_METHODS | {"deploy"},
}
# These stand on top and may import everything.
TOP = {"integrations", "report", "cli", "demos", "__init__", "__main__"}

# Each takes from a tenth of a second to several to import, or is optional.
HEAVY = {
    "numba", "llvmlite", "transformers", "matplotlib", "jinja2", "onnxruntime", "openvino", "onnx", "sklearn", "scipy",
    "PIL", "gguf", "tokenizers", "yaml", "triton", "lightning", "ray", "lm_eval", "datasets",
}  # fmt: skip


def files() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def room_of(file: Path) -> str:
    part = file.relative_to(ROOT).parts[0]
    return part.removesuffix(".py")


def imports(source: str, file: Path) -> Iterator[tuple[str, int, bool]]:
    """(dotted module, line, at the top level of the file), without those that only type checkers see."""
    package = ("gossamer", *file.relative_to(ROOT).parent.parts)
    for node, top in _walk(ast.parse(source), True):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*start, *([node.module] if node.module else [])])
            # "from .. import data" names a room in its list of names.
            names = [f"{base}.{a.name}" for a in node.names] if base == "gossamer" else [base]
            yield from ((name, node.lineno, top) for name in names)


def _walk(node: ast.AST, top: bool) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child, top
        yield from _walk(child, top and not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)))


def breaches(source: str, file: Path) -> list[str]:
    room = room_of(file)
    if room in TOP:
        return []
    found = []
    for module, line, _ in imports(source, file):
        parts = module.split(".")
        other = parts[1] if parts[0] == "gossamer" and len(parts) > 1 else None
        if other and (ROOT / other).is_dir() and other not in ALLOWED[room] | {room}:
            found.append(f"{file.relative_to(ROOT.parent)}:{line} ({room}) imports {other}")
    return found


def heavy(source: str, file: Path) -> list[str]:
    return [
        f"{file.relative_to(ROOT.parent)}:{line} imports {module} before it is needed"
        for module, line, top in imports(source, file)
        if top and module.split(".")[0] in HEAVY
    ]


def test_every_room_has_a_rule():
    rooms = {p.name for p in ROOT.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert rooms <= ALLOWED.keys() | TOP, f"say in ALLOWED what {rooms - ALLOWED.keys() - TOP} may import"


@pytest.mark.parametrize("file", files(), ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_point_downwards(file):
    assert breaches(file.read_text(), file) == []


# Kernels are written in Numba's or Triton's language; their files are imported by the first product that runs on them.
KERNEL_FILES = {ROOT / "kernels" / "cpu", ROOT / "kernels" / "triton"}


@pytest.mark.parametrize("file", [f for f in files() if f.parent not in KERNEL_FILES], ids=lambda f: f.name)
def test_heavy_libraries_load_on_first_use(file):
    assert heavy(file.read_text(), file) == []


@pytest.mark.parametrize(
    "line",
    [
        "from ..methods import weights",
        "from gossamer.deploy.pack import pack",
        "from .. import data",
        "import gossamer.cli",
        "def f():\n    from ..kernels import ops",
    ],
)
def test_a_planted_breach_is_seen(line):
    assert len(breaches(line, ROOT / "core" / "planted.py")) == 1


def test_what_is_no_breach_is_not_called_one():
    allowed = "from .errors import near\nfrom ..core import select\nimport torch\nfrom .. import __version__"
    typed = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..deploy import PackReport"
    assert breaches(f"{allowed}\n{typed}", ROOT / "core" / "planted.py") == []


def test_a_planted_heavy_import_is_seen():
    file = ROOT / "report" / "planted.py"
    assert len(heavy("import matplotlib.pyplot as plt", file)) == 1
    assert len(heavy("class A:\n    from transformers import AutoModel", file)) == 1
    assert heavy("def f():\n    import matplotlib", file) == []
