"""A problem folder as the harness sees it: problem.py with its defaults filled in, and its solvers by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

from .contract import Case

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Solver:
    """One file of a problem's solvers/ folder."""

    name: str
    sparse: bool
    environment: str
    reads_files: bool
    runs: Callable[[Case], bool]
    why_not: Callable[[], str | None]


@dataclass(frozen=True)
class Problem:
    """problem.py, checked and completed. `module` is where `build`, `exact`, `export` and `error` come from."""

    name: str
    title: str
    package: str
    module: ModuleType
    cases: tuple[Case, ...]
    solvers: tuple[Solver, ...]
    groups: Mapping[str, tuple[str, ...]]
    measures: Mapping[str, str]
    panel: tuple[str, ...]

    def case(self, name: str) -> Case:
        """The case with this id."""
        return next(c for c in self.cases if c.id == name)

    def dense_case(self, case: Case) -> Case:
        """The case on which engines that multiply zeros are timed in this one's stead."""
        other = getattr(self.module, "dense_case", None)
        return self.case(other(case)) if other else case

    def tolerance(self, solver: str) -> float:
        """The largest error, relative to the largest exact value, that passes as rounding."""
        return getattr(self.module, "TOLERANCES", {}).get(solver, self.module.TOLERANCE)

    def work(self, case: Case, data: object) -> dict[str, float]:
        """What a case costs at least: {"flops": kept, "bytes": touched}, for rates and the roofline."""
        return dict(self.module.work(case, data)) if hasattr(self.module, "work") else {}

    def solves(self, solver: Solver, case: Case) -> bool:
        """Whether this solver is timed on this case: dense engines only once per dense case."""
        return solver.runs(case) and (solver.sparse or self.dense_case(case) == case)


def names() -> tuple[str, ...]:
    """Every problem there is, by its folder's name."""
    folders = (p.parent for p in (ROOT / "benchmarks").glob("*/problem.py"))
    return tuple(sorted(folder.name for folder in folders if folder != Path(__file__).parent))


def load(name: str, package: str = "benchmarks") -> Problem:
    """Read a problem folder.

    Raises:
        ValueError: problem.py lacks something, says it twice, or names a solver that is not there.
    """
    full = f"{package}.{name}"
    module = import_module(f"{full}.problem")
    lacking = [a for a in ("NAME", "TITLE", "CASES", "TOLERANCE", "build", "exact") if not hasattr(module, a)]
    if lacking:
        raise ValueError(f"{full}.problem lacks {', '.join(lacking)}; see benchmarks/README.md")
    return _checked(
        Problem(
            name=module.NAME,
            title=module.TITLE,
            package=full,
            module=module,
            cases=tuple(module.CASES),
            solvers=tuple(_solver(full, file) for file in _files(module)),
            groups={label: tuple(members) for label, members in getattr(module, "GROUPS", {}).items()},
            measures=dict(getattr(module, "MEASURES", {})),
            panel=tuple(getattr(module, "PANEL", ())),
        )
    )


def _files(module: ModuleType) -> list[str]:
    """Solvers by file name; names that begin with an underscore are shared code."""
    folder = Path(module.__file__).parent / "solvers"
    return sorted(f.stem for f in folder.glob("*.py") if not f.stem.startswith("_"))


def _solver(package: str, name: str) -> Solver:
    # Read here for its flags only; so a solver imports its engine inside `prepare`, not at the top.
    module = import_module(f"{package}.solvers.{name}")
    return Solver(
        name=name,
        sparse=module.SPARSE,
        environment=(where := getattr(module, "ENVIRONMENT", "main")),
        reads_files=where != "main" or getattr(module, "READS_FILES", False),
        runs=getattr(module, "runs", lambda case: True),
        why_not=getattr(module, "why_not", lambda: None),
    )


def _checked(problem: Problem) -> Problem:
    ids = [c.id for c in problem.cases]
    twice = {i for i in ids if ids.count(i) > 1}
    unknown = {m for members in problem.groups.values() for m in members} - {s.name for s in problem.solvers}
    if twice or unknown:
        raise ValueError(
            f"{problem.package}.problem: ids used twice: {sorted(twice)}; no solver file: {sorted(unknown)}"
        )
    return problem
