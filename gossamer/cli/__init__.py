"""The command line. Its parts load on first use, so that `gossamer --help` answers at once."""

from __future__ import annotations


def main() -> None:
    """What the `gossamer` script and `python -m gossamer` run."""
    from .app import app

    app(prog_name="gossamer")


__all__ = ["main"]
