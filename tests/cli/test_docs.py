"""What the docs show runs, and what is generated is up to date."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGES = (
    "index.md",
    "quickstart.md",
    "guide/calibration.md",
    "guide/decode.md",
    "guide/finetuning.md",
    "guide/formats.md",
    "guide/kernels.md",
    "guide/machine.md",
    "guide/neighbours.md",
    "guide/one-shot.md",
    "guide/pack.md",
    "guide/recovery.md",
    "guide/runtime.md",
    "guide/save.md",
    "guide/scores.md",
    "guide/shrink-schedules.md",
    "guide/slicing.md",
    "guide/sweeps.md",
    "guide/training.md",
    "guide/types.md",
)
# Sessions at a prompt, with what they print: tests/laws/test_examples.py runs these (methods.md is
# made of docstrings). Code that needs assets or minutes
# is marked `py` in the pages and is not run.
PROMPTS = (
    "methods.md",
    "guide/budgets.md",
    "guide/methods.md",
    "guide/patterns.md",
    "guide/penalties.md",
    "guide/supports.md",
)


# The pages show that times are remembered: in the folder they run in, with the user's compiled kernels.
KEPT_HERE = """\
from pathlib import Path
from gossamer.kernels import tuning
tuning.cache_root = lambda: Path("cache").absolute()
"""


def blocks(page: Path) -> str:
    """The Python of a page as one program."""
    return "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL))


def execute(program: str, where: Path) -> subprocess.CompletedProcess:
    program = KEPT_HERE + program.replace("from __future__ import annotations\n", "")
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=where,
        env={**os.environ, "PYTHONPATH": str(ROOT), "GOSSAMER_TUNING": "1"},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page, tmp_path):
    run = execute(blocks(ROOT / "docs" / page), tmp_path)
    assert run.returncode == 0, run.stderr


def test_no_page_with_code_is_left_out():
    docs = ROOT / "docs"
    with_code = {str(p.relative_to(docs)) for p in docs.rglob("*.md") if "```python" in p.read_text()}
    assert with_code == {*PAGES, *PROMPTS}


def test_the_paper_in_one_file_of_contributing_works(tmp_path):
    program = blocks(ROOT / "CONTRIBUTING.md")
    assert execute(program, tmp_path).returncode == 0
    # and its hand-worked case can fail
    broken = program.replace("by_column + by_row", "by_column")
    assert "AssertionError" in execute(broken, tmp_path).stderr


def test_the_page_of_methods_is_made_from_the_registry():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from generate import page
    finally:
        sys.path.pop(0)
    assert page() == (ROOT / "docs" / "methods.md").read_text(), "run docs/generate.py (make docs does)"


def test_every_page_of_the_guide_is_in_the_navigation():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    guide = next(next(iter(part.values())) for part in nav if "Guide" in part)
    named = {Path(next(iter(entry.values()))).name for entry in guide}
    assert {p.name for p in (ROOT / "docs" / "guide").glob("*.md")} <= named


def test_the_exit_codes_of_the_docs_are_those_of_the_program():
    from gossamer.cli import codes

    page = (ROOT / "docs" / "guide" / "cli.md").read_text()
    shown = {int(n) for n in re.findall(r"^\| (\d+) \|", page, flags=re.MULTILINE)}
    assert shown == {codes.OK, codes.UNEXPECTED, codes.USAGE, codes.YOURS, codes.ENVIRONMENT, codes.STOPPED}
