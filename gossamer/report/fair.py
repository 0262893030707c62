"""Are two training runs compared fairly? The handbook's questions, answered from their records in plain words."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..core.errors import TargetError
from ..recipes.trained import TrainedRun

# Ratios up to these are called the same: counts are exact, work varies with the supports, clocks with the machine.
SAME_COUNT, SAME_WORK, SAME_TIME = 1.01, 1.05, 1.2
TUNED = ("rate", "batch", "optimizer", "decay", "tried")
MANY_DEAD = 0.5


@dataclass(frozen=True)
class Answer:
    """One question about two runs, first and second.

    Args:
        question: in a few words.
        verdict: "fair", "unfair", or "unknown" where the records cannot tell.
        said: why, in a sentence or two.
    """

    question: str
    verdict: str
    said: str


def fairness(first: TrainedRun, second: TrainedRun) -> tuple[Answer, ...]:
    """Every question about two runs of one task.

    Raises:
        TargetError: the runs trained different tasks.

    Reference: the questions follow Hoefler et al., Sparsity in Deep Learning, arXiv:2102.00554, and Blalock et al.,
        What is the State of Neural Network Pruning?, arXiv:2003.03033.
    """
    if first.plan["task"] != second.plan["task"]:
        tasks = f"{first.plan['task']!r} and {second.plan['task']!r}"
        raise TargetError(f"the runs trained {tasks}, two tasks; compare like with like")
    questions: tuple[Callable[[TrainedRun, TrainedRun], Answer], ...]
    questions = (_nonzeros, _flops, _cost, _tuning, _dense, _collapse, _warm_start, _luck)
    return tuple(ask(first, second) for ask in questions)


def _nonzeros(a: TrainedRun, b: TrainedRun) -> Answer:
    size = f"{a.parameters:,}" if a.parameters == b.parameters else f"{a.parameters:,} and {b.parameters:,}"
    told = f"{a.nonzeros:,} and {b.nonzeros:,} of {size} parameters are not zero"
    return _ratio("same nonzeros?", a.nonzeros, b.nonzeros, SAME_COUNT, told, "keeps")


def _flops(a: TrainedRun, b: TrainedRun) -> Answer:
    per = [r.flops / max(r.plan["steps"] * r.plan["batch"], 1) for r in (a, b)]  # type: ignore[operator]
    told = f"a sample takes {per[0]:.3g} and {per[1]:.3g} FLOPs of training, zeros skipped"
    return _ratio("same FLOPs?", *per, SAME_WORK, told, "computes")


def _cost(a: TrainedRun, b: TrainedRun) -> Answer:
    """All samples seen, all FLOPs, and the clock where it can be compared."""
    samples = [r.plan["steps"] * r.plan["batch"] for r in (a, b)]  # type: ignore[operator]
    told = f"{samples[0]:,} and {samples[1]:,} samples, {a.cost:.3g} and {b.cost:.3g} FLOPs in all"
    if a.threads == b.threads:
        told += f", {a.seconds:.1f} and {b.seconds:.1f} s on {a.threads} thread{'s' * (a.threads > 1)}"
        if _times(a.seconds * b.cost, b.seconds * a.cost) > SAME_TIME:
            told += " (the clock and the FLOPs need not agree: masked training computes its zeros)"
    if samples[0] != samples[1]:
        return _ratio("same training cost?", *samples, 1.0, told, "sees")
    return _ratio("same training cost?", a.cost, b.cost, SAME_WORK, told, "costs")


def _tuning(a: TrainedRun, b: TrainedRun) -> Answer:
    other = [f"{k} {a.plan[k]} and {b.plan[k]}" for k in TUNED if a.plan[k] != b.plan[k]]
    tried = a.plan["tried"], b.plan["tried"]
    if tried[0] != tried[1]:
        said = (
            f"{tried[0]} settings were tried for the first, {tried[1]} for the second: whoever searches more finds more"
        )
        return Answer("tuned equally?", "unfair", said)
    if not other:
        return Answer("tuned equally?", "fair", "both use the same rate, batch, optimizer and decay")
    if tried == (1, 1):
        said = f"they differ in {', '.join(other)}, and no search is on record; say tried= in the recipes"
        return Answer("tuned equally?", "unknown", said)
    return Answer(
        "tuned equally?", "fair", f"{tried[0]} settings were tried for each; they differ in {', '.join(other)}"
    )


def _dense(a: TrainedRun, b: TrainedRun) -> Answer:
    question = "a dense baseline at equal cost?"
    dense = [r for r in (a, b) if r.is_dense]
    if len(dense) == 2:
        return Answer(question, "fair", "both are dense")
    sparse = min((r for r in (a, b) if not r.is_dense), key=lambda r: r.cost)
    one_step = sparse.dense_flops / max(sparse.plan["steps"], 1)  # type: ignore[operator]
    steps = max(round(sparse.cost / max(one_step, 1)), 1)
    if not dense:
        said = f"neither run is dense; a dense network trained for the cheaper one's FLOPs would take {steps:,} steps"
        return Answer(question, "unknown", said)
    if _times(dense[0].cost, sparse.cost) <= SAME_WORK:
        return Answer(
            question, "fair", f"the dense run costs {dense[0].cost:.3g} FLOPs, the sparse one {sparse.cost:.3g}"
        )
    said = (
        f"the dense run costs {dense[0].cost / max(sparse.cost, 1):.2g} times the sparse one's FLOPs; "
        f"at equal FLOPs it would train {steps:,} steps"
    )
    return Answer(question, "unfair", said)


def _collapse(a: TrainedRun, b: TrainedRun) -> Answer:
    """A layer without links lets nothing through; one whose neurons are mostly cut off lets little."""
    lost = []
    for which, run in (("first", a), ("second", b)):
        lost += [f"{r.name} of the {which} keeps nothing" for r in run.layers if r.size and not r.kept]
        lost += [
            f"{r.name} of the {which} has {r.dead_outputs} outputs without a link"
            for r in run.layers
            if r.kept and r.dead_outputs > MANY_DEAD * r.outputs
        ]
    if lost:
        return Answer("layer collapse?", "unfair", f"{'; '.join(lost)}: what is compared there is a smaller network")
    low = min((r for r in (*a.layers, *b.layers)), key=lambda r: r.kept / max(r.size, 1))
    return Answer("layer collapse?", "fair", f"none; the sparsest layer, {low.name}, keeps {low.kept / low.size:.2%}")


def _warm_start(a: TrainedRun, b: TrainedRun) -> Answer:
    started = [bool(r.plan["start"]) for r in (a, b)]
    if not any(started):
        return Answer("unfair warm start?", "fair", "no, both start from new networks")
    if all(started) and a.plan["start"] == b.plan["start"]:
        return Answer("unfair warm start?", "fair", f"no, both start from {a.plan['start']}")
    told = [
        f"the {which} starts from {r.plan['start']}, which had cost {r.start_flops:.3g} FLOPs (counted above)"
        for which, r in (("first", a), ("second", b))
        if r.plan["start"]
    ]
    return Answer("unfair warm start?", "unfair", f"yes, {'; '.join(told)}")


def _luck(a: TrainedRun, b: TrainedRun) -> Answer:
    better = (a.score > b.score) == a.higher_is_better
    told = f"{a.quality_label} {a.score:.4f} and {b.score:.4f}"
    if a.score == b.score:
        return Answer("who is better?", "unknown", f"{told}: neither")
    said = f"{told}: the {'first' if better else 'second'}, on one seed each; three seeds say how much is luck"
    return Answer("who is better?", "unknown", said)


def _ratio(question: str, a: float, b: float, same: float, told: str, verb: str) -> Answer:
    times = _times(a, b)
    if times <= same:
        return Answer(question, "fair", told)
    more = f"the {'first' if a > b else 'second'} {verb} {times:.3g} times as much"
    return Answer(question, "unfair", f"{told}: {more}")


def _times(a: float, b: float) -> float:
    """How many times the larger is the smaller."""
    low, high = sorted((a, b))
    return 1.0 if high == low else high / low if low else math.inf
