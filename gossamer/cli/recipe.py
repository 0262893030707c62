"""What `gossamer prune` is asked for: the same keys as flags and in a YAML file; flags win."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from ..core.errors import GossamerError, unknown

OPPOSITE = {"density": "sparsity", "sparsity": "density"}
HOW_MANY = ("samples", "length", "batch", "seed", "reconstruct")
FRACTIONS = ("density", "sparsity")
LISTS = ("targets", "skip")
STAGES = ("recover", "evaluate", "pack")


@dataclass(frozen=True)
class Recipe:
    """One pruning job.

    Args:
        model: folder, asset name or hub id.
        method: a registered name.
        density: fraction kept, in [0, 1]; or sparsity, 1 − density; or neither where the pattern fixes it.
        pattern: a name or an expression; None = the method's own.
        regroup: patterns that tie rows choose which rows they tie.
        sequential: "layer" or "block": what is still dense while its statistics are taken; None = the method's own.
        reconstruct: epochs in which each pruned block is trained back towards the dense one, with `data`; 0 = none.
        data: text file or "asset:NAME"; needed by methods that look at activations.
        samples, length, batch, seed: of the calibration data; see `calibration.batches`.
        targets, skip: glob patterns of layers.
        unreached: "dense" or "magnitude": what becomes of layers that no calibration text reaches.
        spool: folder where activations of calibration wait, but for the last used; None = in memory.
        on_disk: the model stays in its safetensors shards, one block in memory at a time.
        allocation: how the density is spread over the layers.
        workdir: where finished layers are kept until the end; None = OUT/.work.
        out: folder to write.
        options: the method's own.
    """

    model: str = ""
    method: str = ""
    density: float | None = None
    sparsity: float | None = None
    pattern: str | None = None
    regroup: bool = False
    sequential: str | None = None
    reconstruct: int = 0
    data: str | None = None
    samples: int = 128
    length: int | None = None
    batch: int = 8
    seed: int = 0
    targets: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    unreached: str = "dense"
    on_disk: bool = False
    spool: str | None = None
    allocation: str = "uniform"
    workdir: str | None = None
    out: str = ""
    options: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("samples", "length", "batch"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise GossamerError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def job(self) -> dict[str, object]:
        """What decides the result: two runs with the same job may share their finished layers."""
        return {k: v for k, v in asdict(self).items() if k not in ("workdir", "out", "spool")}


def read(path: Path) -> dict[str, object]:
    """The keys of a YAML recipe, checked.

    Raises:
        UnknownName: a key that recipes do not have; near names are listed.
        GossamerError: it is not YAML, or a value is of the wrong kind.
    """
    import yaml

    try:
        held = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise GossamerError(f"{path} cannot be read as a recipe: {error}") from error
    if not isinstance(held, dict):
        raise GossamerError(f"{path} must be a YAML mapping such as 'method: wanda', got {type(held).__name__}")
    known = [*(f.name for f in fields(Recipe)), *STAGES]
    for key in held:
        if key not in known:
            raise unknown("recipe key", str(key), known)
    return {key: _checked(key, value) for key, value in held.items() if value is not None}


def _checked(key: str, value: object) -> object:
    if key in STAGES:  # `stages.stages` looks into them
        return value
    if key in LISTS:
        value = [value] if isinstance(value, str) else value
        good = isinstance(value, list) and all(isinstance(v, str) for v in value)
        return tuple(value) if good else _refuse(key, value, "a name pattern or a list of them")
    if key == "options":
        return value if isinstance(value, dict) else _refuse(key, value, "a mapping")
    if key in HOW_MANY:
        return value if type(value) is int else _refuse(key, value, "a whole number")
    if key in ("regroup", "on_disk"):
        return value if isinstance(value, bool) else _refuse(key, value, "true or false")
    if key in FRACTIONS:
        return float(value) if type(value) in (int, float) else _refuse(key, value, "a number from 0 to 1")
    # YAML 1.1 reads 2:4 as the base-60 number 124, which no one who writes a recipe means.
    if key == "pattern" and type(value) is int:
        return f"{value // 60}:{value % 60}"
    return value if isinstance(value, str) else _refuse(key, value, "text")


def _refuse(key: str, value: object, wanted: str) -> object:
    raise GossamerError(f"recipe key {key!r} needs {wanted}, got {value!r}")


def merge(held: Mapping[str, object], flags: Mapping[str, object]) -> Recipe:
    """A recipe's keys with the flags that were given on top."""
    given = {k: v for k, v in flags.items() if v not in (None, (), {}, "")}
    below = {k: v for k, v in held.items() if k not in STAGES and OPPOSITE.get(k) not in given}
    options = {**below.get("options", {}), **given.get("options", {})}  # type: ignore[dict-item]
    return Recipe(**{**below, **given, "options": options})  # type: ignore[arg-type]


def options(pairs: Sequence[str]) -> dict[str, object]:
    """--option damping=0.01 --option block=64 → {"damping": 0.01, "block": 64}.

    Raises:
        GossamerError: a pair lacks its "=".
    """
    import yaml

    parsed = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign or not name:
            raise GossamerError(f"--option needs NAME=VALUE, got {pair!r}; for example --option damping=0.01")
        parsed[name] = yaml.safe_load(value)
    return parsed
