"""Folders that commands write to: the result's, and the one where finished parts wait."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ..core.errors import FileDamaged, GossamerError, TargetError
from ..core.files import whole_file
from .screen import err

REPORTS, REQUEST = ("gossamer-prune.json", "gossamer-slice.json"), "request.json"
WORK = ".work"


def check_out(out: Path, overwrite: bool) -> None:
    """A result may be written where nothing is, or over an earlier one if that was asked for.

    Raises:
        TargetError: `out` is a file, or holds an earlier result.
        GossamerError: it holds files that gossamer did not write.
    """
    if out.exists() and not out.is_dir():
        raise TargetError(f"{out} is a file; give a folder to write to")
    held = {p.name for p in out.iterdir()} - {WORK} if out.is_dir() else set()
    if held and not _ours(held):
        raise GossamerError(
            f"{out} holds files that gossamer did not write ({', '.join(sorted(held)[:3])} ...), and --overwrite would "
            "delete them; choose another folder"
        )
    if held and not overwrite:
        raise TargetError(f"{out} holds an earlier result; take another folder, or --overwrite")


def _ours(held: set[str]) -> bool:
    """Each result holds its report, and each `save` its record: a folder with neither is someone's own."""
    from .models import RECORD

    return bool(held & {*REPORTS, RECORD})


def claim(workdir: Path, job: Mapping[str, object]) -> None:
    """Finished layers belong to one job: another model, method or data must not take them over."""
    job, file = json.loads(json.dumps(job)), workdir / REQUEST
    if not file.exists():
        with whole_file(file) as draft:
            draft.write_text(json.dumps(job, indent=1))
        return
    held = _earlier(file)
    for key in job:
        if held.get(key) != job[key]:
            raise TargetError(
                f"{workdir} holds an unfinished run with {key} = {held.get(key)!r}, now it is {job[key]!r}; "
                "delete that folder to start anew, or give the same command to go on"
            )
    err().print(f"Going on with the unfinished run in {workdir}.")


def _earlier(file: Path) -> dict[str, object]:
    try:
        held = json.loads(file.read_bytes())
    except ValueError as error:
        raise FileDamaged(f"{file} cannot be read ({error}); delete {file.parent} to start anew") from error
    if not isinstance(held, dict):
        raise FileDamaged(f"{file} holds no record of a run; delete {file.parent} to start anew")
    return held


def clear(workdir: Path) -> None:
    """Remove our own files only: the user may have named a folder that holds more."""
    if not workdir.is_dir():
        return
    for file in (*workdir.glob("*.safetensors"), workdir / "journal.json", workdir / REQUEST):
        file.unlink(missing_ok=True)
    if not any(workdir.iterdir()):
        workdir.rmdir()
