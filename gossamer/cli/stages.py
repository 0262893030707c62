"""What comes after pruning in a recipe: the keys of `recover:`, `evaluate:` and `pack:`, checked one by one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TypeVar

from ..core.errors import GossamerError, unknown

R = TypeVar("R")


@dataclass(frozen=True)
class Recover:
    """Training of the kept weights; see `gossamer.recipes.recover`.

    Args:
        steps: optimizer steps; sets the schedule's length.
        seconds: stop after this long; 0 = when the steps are done.
        clock: what seconds are counted by, "wall" or "processor".
        lr, warm_up, accumulate, save_every: as there.
        squarehead, cross_entropy, kl: weights of the losses; cross_entropy −1 = 1 for causal models, 0 for others.
        data: text file or "asset:NAME"; "" = that of the calibration.
        samples, length, batch, seed: of the texts; length 0 = that of the calibration.
    """

    steps: int = 400
    seconds: float = 0.0
    clock: str = "wall"
    lr: float = 5e-4
    warm_up: float = 0.1
    accumulate: int = 1
    save_every: float = 120.0
    squarehead: float = 1.0
    cross_entropy: float = -1.0
    kl: float = 0.0
    data: str = ""
    samples: int = 1024
    length: int = 0
    batch: int = 4
    seed: int = 1

    def __post_init__(self) -> None:
        if self.clock not in ("wall", "processor"):
            raise GossamerError(f"clock of recover is wall or processor, got {self.clock!r}")


@dataclass(frozen=True)
class Evaluate:
    """Perplexity and samples, of the dense, the pruned and the recovered model.

    Args:
        data: text file, or "asset:wikitext2" for its test part; "" = that part, where it calibrated.
        windows, length: of the text from its beginning; length 0 = 1024, or what the model has positions for.
        prompts: texts to go on with, the likeliest token each time.
        tokens: of each continuation.
        zero_shot: texts of each zero-shot task; 0 = none. Needs lm-eval.
    """

    data: str = ""
    windows: int = 24
    length: int = 0
    prompts: tuple[str, ...] = ()
    tokens: int = 40
    zero_shot: int = 0


@dataclass(frozen=True)
class Pack:
    """See `gossamer pack`, whose flags these are."""

    tokens: str = "128,1"
    batch: int = 1
    min_gain: float = 1.0


@dataclass(frozen=True)
class Stages:
    """What a recipe asks for beside pruning; None = not this."""

    recover: Recover | None = None
    evaluate: Evaluate | None = None
    pack: Pack | None = None

    def to_dict(self) -> dict[str, object]:
        """JSON-ready."""
        return asdict(self)


KINDS = {"recover": Recover, "evaluate": Evaluate, "pack": Pack}


def stages(held: Mapping[str, object]) -> Stages | None:
    """The stages among a recipe's keys; None where it has none.

    Raises:
        UnknownName: a stage has no such key; near ones are listed.
        GossamerError: a value is of another kind.
    """
    found = {name: _record(name, kind, held[name]) for name, kind in KINDS.items() if name in held}
    return Stages(**found) if found else None  # type: ignore[arg-type]


def _record(stage: str, kind: type[R], held: object) -> R:
    if not isinstance(held, dict):
        raise GossamerError(f"recipe key {stage!r} needs a mapping ({{}} = as usual), got {held!r}")
    usual = {f.name: f.default for f in fields(kind)}  # type: ignore[arg-type]
    for key in held:
        if key not in usual:
            raise unknown(f"key of {stage!r}", str(key), usual)
    return kind(**{key: _checked(f"{stage}.{key}", value, usual[key]) for key, value in held.items()})


def _checked(key: str, value: object, usual: object) -> object:
    """Of the kind of what is usual there."""
    if isinstance(usual, tuple):
        texts = [value] if isinstance(value, str) else value
        if isinstance(texts, list) and all(isinstance(v, str) for v in texts):
            return tuple(texts)
        raise GossamerError(f"recipe key {key!r} needs a text or a list of them, got {value!r}")
    if isinstance(usual, str):
        return str(value) if isinstance(value, (str, int)) else _refuse(key, value, "text")
    try:  # YAML 1.1 reads 1e-3, without a point, as text
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return _refuse(key, value, "a number")
    if isinstance(value, bool) or number < min(0.0, float(usual)):  # type: ignore[arg-type]
        return _refuse(key, value, "a number of 0 or more")
    return (
        number if isinstance(usual, float) else int(number) if number == int(number) else _refuse(key, value, "whole")
    )


def _refuse(key: str, value: object, wanted: str) -> object:
    raise GossamerError(f"recipe key {key!r} needs {wanted}, got {value!r}")
