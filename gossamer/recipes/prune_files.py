"""prune_files: a checkpoint in, a pruned checkpoint out, and never more than one block of it in memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ..attach.shelf import on_disk, shelf_of
from ..core.errors import TargetError
from ..core.sparsifier import Sparsifier
from .prune import PruneReport, prune

REPORT = "gossamer-prune.json"


def prune_files(
    folder: str | Path, out: str | Path, method: str | Sparsifier, *, workdir: str | Path | None = None, **how: object
) -> PruneReport:
    """Prune a checkpoint of transformers, block by block from its safetensors shards, into a folder of the same form.

    Memory holds one block, its statistics and the activations of the calibration batches. A run that was killed goes on
    from its last finished layer when it is called again. `out` appears whole, at the end: the same shards and index
    with the pruned weights in them, in the stored dtype, every other file as it was, and gossamer-prune.json.

    Args:
        folder: the checkpoint; it is only read.
        out: where to write; must not exist.
        method: as for `prune`, whose other arguments (density=, pattern=, data=, targets=, spool= ...) are `how`.
        workdir: keep finished layers here until the end; None = "OUT.work". Needs as much room as the pruned weights.

    Raises:
        TargetError: `out` exists, or a layer's weight is stored fused with others; and whatever `prune` refuses.
        FileDamaged: a shard is missing, truncated or unreadable; it is named, before any work.
        NonFiniteError: a stored weight is NaN or infinite; tensor and file are named.

    Example:
        >>> gossamer.prune_files("llama-70b", "llama-70b-sparse", "wanda", density=0.5, data=batches)  # doctest: +SKIP
    """
    out = Path(out)
    if out.exists():
        raise TargetError(f"{out} exists; choose another folder, or delete it")
    model, work = on_disk(folder), Path(workdir or f"{out}.work")
    report = prune(model, method, workdir=work, **how)  # type: ignore[arg-type]
    shelf_of(model).save(out, {REPORT: json.dumps(report.to_dict(), indent=1)})  # type: ignore[union-attr]
    if workdir is None:
        shutil.rmtree(work)
    return report
