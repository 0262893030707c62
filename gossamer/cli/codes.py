"""Exit codes that mean something, and one clean panel for each error."""

from __future__ import annotations

import errno
import os
import re
import traceback

import typer
from rich.panel import Panel
from typer.core import TyperGroup

from ..core.errors import AssetError, GossamerError, MissingDependency
from .screen import err

OK, UNEXPECTED, USAGE, YOURS, ENVIRONMENT, STOPPED = 0, 1, 2, 3, 4, 130

EPILOG = (
    "Exit codes: 0 done · 1 unexpected error · 2 wrong usage · 3 an input that gossamer refuses (unknown name, pattern "
    "that does not fit, damaged file) · 4 the environment lacks something (asset, library, disk space, rights) · "
    "130 stopped by Ctrl-C. Set GOSSAMER_TRACEBACK=1 to see where an error arose."
)

# What typer raises on its own account: it prints these itself.
_TYPERS_OWN = (typer.Exit, typer.Abort, *(c for c in typer.BadParameter.__mro__ if c.__module__ != "builtins"))
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


def code_of(error: BaseException) -> int:
    """The exit code that an error ends the program with."""
    if isinstance(error, KeyboardInterrupt):
        return STOPPED
    if isinstance(error, (AssetError, MissingDependency)) or _about_the_disk(error):
        return ENVIRONMENT
    return YOURS if isinstance(error, GossamerError) else UNEXPECTED


def _about_the_disk(error: BaseException | None) -> bool:
    """True for a full or forbidden disk, also where it is the cause of one of our own errors."""
    while error is not None:
        # safetensors and tokenizers are written in Rust: their errors carry the number in words only.
        told = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
        if number in _DISK:
            return True
        error = error.__cause__
    return False


class Group(TyperGroup):
    """Commands whose errors end in a panel on stderr and an exit code."""

    def invoke(self, ctx: typer.Context) -> object:
        try:
            return super().invoke(ctx)
        except _TYPERS_OWN:
            raise
        except BrokenPipeError:
            raise
        except (Exception, KeyboardInterrupt) as error:
            _say(error, ctx.invoked_subcommand or "")
            raise typer.Exit(code_of(error)) from error


_TITLES = {UNEXPECTED: "unexpected error", YOURS: "cannot do that", ENVIRONMENT: "the environment lacks something"}


_NOTHING_KEPT = "Assets that were fetched whole are kept; anything else starts anew."
_KEPT = {
    "prune": "Finished layers are kept: run the same command again to go on from there.",
    "train": "Run the same command again to go on from the last step that was saved.",
    "sweep": "Run the same command again: finished runs are kept, half-done ones go on.",
}


def _say(error: BaseException, command: str) -> None:
    if isinstance(error, KeyboardInterrupt):
        # Whatever else a command was about to write appears whole or not at all.
        err().print(f"Stopped. {_KEPT.get(command, _NOTHING_KEPT)}")
        return
    code, text = code_of(error), str(error) or type(error).__name__
    if os.environ.get("GOSSAMER_TRACEBACK") == "1":
        err().print("".join(traceback.format_exception(error)), end="")
    elif code == UNEXPECTED:
        text = f"{type(error).__name__}: {text}\n\nGOSSAMER_TRACEBACK=1 shows where it arose."
    err().print(Panel(text, title=_TITLES[code], title_align="left", border_style="red", expand=False))
