"""Results are written beside the name of the machine they were measured on: JSON for machines, Markdown for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from gossamer.core.files import whole_file
from gossamer.report.machine import hardware, slug, versions

FOLDER = Path(__file__).parent / "results"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def write_results(
    name: str,
    record: Mapping[str, object],
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    notes: Sequence[str] = (),
    *,
    folder: Path = FOLDER,
) -> Path:
    """Write FOLDER/NAME-MACHINE.{json,md} and return the Markdown's path."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    machine, libraries = hardware(), versions(("torch", "numba", "transformers", "onnxruntime", "openvino", "scipy"))
    full = {"benchmark": name, "measured": now, "hardware": machine, "versions": libraries, **record}
    stem = folder / f"{name}-{slug()}"
    with whole_file(stem.with_suffix(".json")) as draft:
        draft.write_text(json.dumps(full, indent=1) + "\n")
    where = "; ".join(f"{k} {v}" for k, v in {**machine, **libraries}.items())
    text = [f"# {name}", "", f"Measured {now} on {where}.", "", table(heads, rows), "", *(f"- {n}" for n in notes), ""]
    with whole_file(stem.with_suffix(".md")) as draft:
        draft.write_text("\n".join(text))
    return stem.with_suffix(".md")
