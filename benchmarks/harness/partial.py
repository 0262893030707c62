"""What is finished of a run, kept outside results/ so that a run that was stopped goes on where it was."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

from gossamer.core.files import cache_root, whole_file
from gossamer.report.machine import slug

from .outcome import Outcome
from .problem import ROOT
from .rounds import Block


def fingerprint(root: Path = ROOT) -> str:
    """Of every source file that a figure depends on: figures of two versions are never mixed."""
    total = sha256()
    for folder in ("gossamer", "benchmarks"):
        for file in sorted((root / folder).rglob("*.py")):
            total.update(file.read_bytes())
    return total.hexdigest()[:16]


@dataclass(frozen=True)
class Partial:
    """Finished blocks of one run; `settings` must agree (JSON-able) or the file is of another run and is ignored."""

    path: Path
    settings: dict

    @classmethod
    def of(cls, problem: str, settings: dict) -> Partial:
        """The file of a problem on this machine."""
        name = f"{problem}-{slug()}-{sha256(json.dumps(settings).encode()).hexdigest()[:8]}.partial.json"
        return cls(cache_root() / "benchmarks" / name, settings | {"source": fingerprint()})

    def read(self) -> dict[str, list[Outcome]]:
        """Finished blocks by name and threads; empty where there are none, or they are of other settings or sources."""
        try:
            held = json.loads(self.path.read_text())
            if held["settings"] != json.loads(json.dumps(self.settings)):
                return {}
            return {key: [Outcome.read(r) for r in records] for key, records in held["blocks"].items()}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def keep(self, finished: dict[str, list[Outcome]]) -> None:
        """Write all finished blocks, whole or not at all."""
        blocks = {key: [o.record() for o in outcomes] for key, outcomes in finished.items()}
        held = {"settings": self.settings, "kept": datetime.now(UTC).isoformat(timespec="seconds"), "blocks": blocks}
        with whole_file(self.path) as draft:
            draft.write_text(json.dumps(held))

    def remove(self) -> None:
        """The run is complete."""
        self.path.unlink(missing_ok=True)


def key(block: Block) -> str:
    """A block's name in the file."""
    return f"{block.name}|{block.threads}"
