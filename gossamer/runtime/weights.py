"""A product's weight in every form that might be fastest, laid out on first use and shared by all plans."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from ..core.sparsifier import require_finite
from ..deploy.structure import density_of, detect, support_of
from ..formats import CSR, RowGrouped, format_named
from ..kernels.cpu.stream import Stream
from ..kernels.lowering import lower
from ..kernels.tuning import finite_ms, recall, remember

# Rows of a fully kept weight that share their columns, which is all rows: the widest group.
FULL = 8
# From here on zeros are multiplied rather than skipped: one row by itself runs at half the speed of a group.
MOSTLY_KEPT = 0.9
# Rounds of measuring, and about how long a round may take.
ROUNDS, ROUND_SECONDS = 5, 1e-3
KIND = "compile"


@dataclass(frozen=True)
class Form:
    """One way to hold a weight.

    Args:
        name: for people, such as "rowgrouped(g=4)" or "rowgrouped(g=4), re-ordered".
        stream: what the kernels read.
    """

    name: str
    stream: Stream

    @property
    def nbytes(self) -> int:
        order = () if self.stream.order_M is None else (self.stream.order_M,)
        parts = (self.stream.starts_BG, self.stream.indices_E, self.stream.values_EG, *order)
        return sum(p.numel() * p.element_size() for p in parts)


class Weights:
    """The forms of one weight matrix, and which was fastest at which work.

    Args:
        w_MK: the weight as a matrix.
        name: of its layer, for errors.
        taps: columns of one kernel, of a convolution's weight.
        remeasure: measure also what this machine measured in an earlier run.

    Raises:
        NonFiniteError: the weight holds NaN or infinity.
    """

    def __init__(self, w_MK: Tensor, name: str, *, taps: int = 1, remeasure: bool = False) -> None:
        require_finite(w_MK, f"the weight of layer {name!r}")
        self.w_MK, self.density = w_MK.contiguous(), density_of(w_MK)
        self._makers = self._possible(taps)
        self._forms: dict[str, Form] = {}
        self._fastest: dict[object, str] = {}
        self.remeasure, self.measured, self.recalled = remeasure, 0, 0
        self._lock = threading.RLock()

    def _possible(self, taps: int) -> dict[str, Callable[[], Stream]]:
        makers: dict[str, Callable[[], Stream]] = {}
        if self.density < MOSTLY_KEPT:
            for s in detect(self.w_MK, taps):
                inner = ", ".join(f"{k}={v}" for k, v in s.options)
                order = ", re-ordered" if s.reordered else ""
                build = partial(format_named(s.format).from_dense, **dict(s.options))
                if group_rows_of(s.format, dict(s.options)) in (1, 2, 4, 8):
                    makers[f"{s.format}({inner}){order}"] = partial(self._stored, build)
            makers["csr"] = partial(self._stored, CSR.from_dense)
        if self.density > 0.25:
            makers[f"full(g={FULL})"] = self._full
        return makers

    def _stored(self, build: Callable) -> Stream:
        return lower(build(self.w_MK, support_of(self.w_MK)))

    def _full(self) -> Stream:
        everything = torch.ones(self.w_MK.shape, dtype=torch.bool, device="cpu")
        return lower(RowGrouped.from_dense(self.w_MK, everything, g=FULL))

    def form(self, name: str) -> Form:
        with self._lock:
            if name not in self._forms:
                self._forms[name] = Form(name, self._makers[name]())
            return self._forms[name]

    def fastest(
        self,
        work: object,
        ways: Callable[[Form], Callable[[], None] | None],
        others: Mapping[str, Callable[[], Callable[[], None]]] = MappingProxyType({}),
    ) -> Form | str | None:
        """The form that runs this work fastest, or the name of another way that does: measured once per machine.

        None when no form can run it.

        Args:
            work: what the time depends on, such as panels, width and threads.
            ways: makes a function that runs a form on real memory; None where the form cannot serve.
            others: makers of functions that do the same without any form.
        """
        with self._lock:
            if work not in self._fastest:
                self._fastest[work] = self._recalled(work, ways, others) or self._measured(work, ways, others)
            name = self._fastest[work]
            return self.form(name) if name in self._makers else name or None

    def _key(self, work: object, others: Iterable[str]) -> dict[str, object]:
        ways = [*self._makers, *others]
        return {"shape": list(self.w_MK.shape), "percent": round(100 * self.density), "ways": ways, "work": repr(work)}

    def _recalled(
        self, work: object, ways: Callable[[Form], Callable[[], None] | None], others: Iterable[str]
    ) -> str | None:
        """What an earlier run chose here; None where it did not, or a form cannot serve after all."""
        if self.remeasure or len(self._makers) + len(list(others)) < 2:
            return None
        key = self._key(work, others)
        times = recall(KIND, key, lambda value: {n: finite_ms(value[n]) for n in value if n in key["ways"]})
        name = min(times, key=times.__getitem__) if times else None
        if name in self._makers and ways(self.form(name)) is None:
            return None
        self.recalled += name is not None
        return name

    def _measured(
        self,
        work: object,
        ways: Callable[[Form], Callable[[], None] | None],
        others: Mapping[str, Callable[[], Callable[[], None]]],
    ) -> str:
        found = {name: ways(self.form(name)) for name in self._makers}
        able = {name: run for name, run in found.items() if run is not None}
        able |= {name: make() for name, make in others.items()}
        if len(able) < 2:
            return next(iter(able), "")
        times = _in_turn(able)
        chosen = min(times, key=times.__getitem__)
        remember(KIND, self._key(work, others), {name: 1e3 * seconds for name, seconds in times.items()})
        self.measured += 1
        for name in [n for n in self._forms if n != chosen and n not in self._fastest.values()]:
            del self._forms[name]
        return chosen

    @property
    def nbytes(self) -> int:
        """Of the forms in use."""
        return sum(form.nbytes for form in self._forms.values())


def group_rows_of(name: str, options: Mapping[str, int]) -> int:
    """Rows that share their columns once lowered."""
    return options.get("g", options.get("a", 1))


def _in_turn(ways: Mapping[str, Callable[[], None]]) -> dict[str, float]:
    """Seconds of each way at its best, each taking its turn in every round."""
    best, repeats = {}, {}
    for name, run in ways.items():
        run()
        began = time.perf_counter()
        run()
        best[name] = time.perf_counter() - began
        repeats[name] = max(1, min(20, int(ROUND_SECONDS / max(best[name], 1e-7))))
    for _ in range(ROUNDS):
        for name, run in ways.items():
            began = time.perf_counter()
            for _ in range(repeats[name]):
                run()
            best[name] = min(best[name], (time.perf_counter() - began) / repeats[name])
    return best
