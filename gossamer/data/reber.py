"""Strings of the Reber grammar, and strings that miss it by one letter.

Shapes: N strings, T letters.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError

LETTERS = "BTPSXVE"
# From each state: the letters that may come, and the states they lead to; after state 6 the string ends.
_NEXT = (
    {"B": 1},
    {"T": 2, "P": 3},
    {"S": 2, "X": 4},
    {"T": 3, "V": 5},
    {"X": 3, "S": 6},
    {"P": 4, "V": 6},
    {"E": None},
)


@dataclass(frozen=True)
class Strings:
    """Strings that all end at the last step.

    Args:
        letters: int64 [N, T], 1 to 7; 0 before a shorter string begins.
        valid: int64 [N], 1 where the grammar makes the string, else 0.
    """

    letters: Tensor
    valid: Tensor

    def __len__(self) -> int:
        return len(self.valid)


def is_reber(text: str) -> bool:
    """True if the grammar makes this string."""
    state: int | None = 0
    for letter in text:
        if state is None or letter not in _NEXT[state]:
            return False
        state = _NEXT[state][letter]
    return state is None


def reber(count: int, *, seed: int = 0, longest: int = 30) -> Strings:
    """As many strings, no two alike; every other one has a letter changed, so that the grammar does not make it.

    A letter that may follow is chosen by lot, each with the same chance. What is changed was drawn like the rest, so
    the lengths tell nothing.

    Args:
        longest: no longer string is taken. Unit: letters.

    Example:
        >>> is_reber("BTSXSE"), is_reber("BTSXSS")
        (True, False)

    Raises:
        GossamerError: count is below 1, longest below 6, or there are fewer such strings than asked for.

    Reference: Reber, Implicit learning of artificial grammars, 1967; as used for recurrent networks since Cleeremans,
        Servan-Schreiber and McClelland, 1989.
    """
    if count < 1 or longest < 6:
        raise GossamerError(f"ask for 1 string or more, of up to 6 letters or more; got {count} of up to {longest}")
    lots = random.Random(seed)
    drawn: dict[str, None] = {}
    for _ in range(1000 * count):
        if len(drawn) == count:
            break
        text = _valid(lots)
        if len(text) <= longest:
            drawn[text] = None
    if len(drawn) < count:
        raise GossamerError(f"only {len(drawn)} strings of up to {longest} letters were found; ask for fewer")
    # Rare strings come last; which ones are changed must not depend on that.
    held: dict[str, None] = {}
    for i, text in enumerate(drawn):
        held[_spoilt(text, lots, held) if i % 2 else text] = None
    wide = max(map(len, held), default=0)
    rows = [[0] * (wide - len(text)) + [1 + LETTERS.index(letter) for letter in text] for text in held]
    valid = [int(is_reber(text)) for text in held]
    order = torch.tensor(lots.sample(range(len(rows)), len(rows)), dtype=torch.long)
    return Strings(torch.tensor(rows, dtype=torch.long)[order], torch.tensor(valid, dtype=torch.long)[order])


def _valid(lots: random.Random) -> str:
    text, state = "", 0
    while state is not None:
        letter, state = lots.choice(list(_NEXT[state].items()))
        text += letter
    return text


def _spoilt(text: str, lots: random.Random, held: Mapping[str, None]) -> str:
    while True:
        place = lots.randrange(len(text))
        other = text[:place] + lots.choice(LETTERS) + text[place + 1 :]
        if not is_reber(other) and other not in held:
            return other
