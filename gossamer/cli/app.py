"""The commands, gathered."""

from __future__ import annotations

import logging
import os
from typing import Annotated

import typer

from . import assets, cache, doctor
from .bench import bench
from .chat import chat
from .codes import EPILOG, Group
from .demo import demo
from .methods import methods
from .pack import pack
from .prune import prune
from .report import report
from .screen import err
from .slice import slice
from .sweep import sweep
from .train import train
from .warmup import warmup

app = typer.Typer(
    name="gossamer",
    cls=Group,
    help="Make neural networks sparse, and make it pay: in size, memory and seconds, at a quality you can see.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for command in (demo, prune, slice, pack, chat, train, sweep, bench, report, methods, warmup):
    app.command(epilog=EPILOG)(command)
app.add_typer(assets.app, name="assets")
app.add_typer(cache.app, name="cache")
app.add_typer(doctor.app, name="doctor")


def _version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _all(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    ours = logging.getLogger("gossamer")
    if not any(isinstance(h, _ToStderr) for h in ours.handlers):
        ours.addHandler(_ToStderr())
    # A first kernel takes seconds to compile; on a terminal it should say so.
    if err().is_terminal:
        ours.setLevel(logging.INFO)


class _ToStderr(logging.Handler):
    """Log lines through the console of the moment, so that they do not tear progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        err().print(self.format(record), style="dim" if record.levelno < logging.WARNING else "yellow")
