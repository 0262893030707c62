"""What every engine that reads files starts from. Needs numpy only."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def inputs(folder: Path) -> dict[str, np.ndarray]:
    """The network's inputs by name."""
    with np.load(folder / "inputs.npz") as held:
        return {name: np.ascontiguousarray(held[name]) for name in held.files}


def one(outputs: list[np.ndarray]) -> np.ndarray:
    """The first output: what problems check."""
    return outputs[0]
