"""Environments of their own for engines whose pins clash with ours: made on demand in the cache, never in the main one.

benchmarks/environments/NAME.txt lists what goes in. An environment is rebuilt when its list or the Python changes.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from functools import cache
from hashlib import sha256
from pathlib import Path

from gossamer.core.files import cache_root

from .problem import ROOT

LISTS = ROOT / "benchmarks" / "environments"


class EnvironmentFailed(RuntimeError):
    """An environment could not be made; says why."""


@cache
def python_of(name: str) -> Path:
    """The interpreter of an environment, which is made first where it is missing.

    Raises:
        EnvironmentFailed: there is no such list, or pip could not install it.
    """
    if name == "main":
        return Path(sys.executable)
    wanted, folder = _wanted(name), _folder(name)
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    if not (folder / "complete").exists():
        _make(folder, python, wanted)
    return python


def is_made(name: str) -> bool:
    """Whether an environment stands already, so that its engines can take part without a download."""
    return name == "main" or (_folder(name) / "complete").exists()


def _wanted(name: str) -> Path:
    wanted = LISTS / f"{name}.txt"
    if not wanted.exists():
        there = ", ".join(sorted(f.stem for f in LISTS.glob("*.txt")))
        raise EnvironmentFailed(f"no environment is called {name!r}; there are main, {there}")
    return wanted


def _folder(name: str) -> Path:
    return cache_root() / "environments" / f"{name}-{_key(_wanted(name))}"


def _key(wanted: Path) -> str:
    return sha256(f"{sys.version_info[:2]}\n{wanted.read_text()}".encode()).hexdigest()[:12]


def _make(folder: Path, python: Path, wanted: Path) -> None:
    print(f"making the environment {wanted.stem} in {folder}", file=sys.stderr, flush=True)
    venv.create(folder, with_pip=True, clear=True)
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", wanted]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise EnvironmentFailed(f"environment {wanted.stem} could not be made: {last}")
    (folder / "complete").touch()


def installed(name: str) -> dict[str, str]:
    """What an environment holds: {package: version}."""
    listing = subprocess.run(
        [str(python_of(name)), "-m", "pip", "list", "--format=freeze", "--disable-pip-version-check"],
        capture_output=True,
        text=True,
    )
    return dict(line.split("==", 1) for line in listing.stdout.splitlines() if "==" in line)
