"""The page of a training run: its curve, its cost, its layers."""

from __future__ import annotations

import io
from pathlib import Path

from ..core.errors import need
from ..core.files import whole_file
from ..recipes.trained import TrainedRun
from .figures import clean, style
from .ink import ink

_HERE = Path(__file__).parent


def write_training_report(run: TrainedRun, path: str | Path) -> Path:
    """Write a page that holds everything, readable offline, on light and dark paper.

    Raises:
        MissingDependency: matplotlib or jinja2 is missing; install the extra "report".
    """
    jinja2 = need("jinja2", "report")
    room = jinja2.Environment(loader=jinja2.FileSystemLoader(_HERE), autoescape=True, undefined=jinja2.StrictUndefined)
    page = room.get_template("training.html").render(
        run=run,
        css=(_HERE / "page.css").read_text(encoding="utf-8"),
        headline=headline(run),
        facts=facts(run),
        light=_curve(run, dark=False),
        dark=_curve(run, dark=True),
    )
    with whole_file(path) as draft:
        draft.write_text(page, encoding="utf-8")
    return Path(path)


def headline(run: TrainedRun) -> str:
    """The figure that counts, at which price."""
    share = run.flops / max(run.dense_flops, 1)
    work = (
        "dense training"
        if run.is_dense
        else f"{share:.1%} of dense training's FLOPs, {run.density:.1%} of weights kept"
    )
    return f"{run.quality_label} {run.score:.4f} after {run.plan['steps']:,} steps: {work}"


def facts(run: TrainedRun) -> list[tuple[str, str]]:
    """What else a reader wants to know, name and value."""
    told = [
        ("method", run.name),
        *((label, f"{value:.4f}") for label, value in run.quality.items()),
        ("not zero", f"{run.nonzeros:,} of {run.parameters:,} parameters"),
        ("FLOPs", f"{run.flops:.4g}, zeros skipped; {run.dense_flops:.4g} dense"),
        ("time", f"{run.seconds:.1f} s on {run.threads} thread{'s' if run.threads > 1 else ''}"),
        ("links that came or went", f"{run.churned:,}"),
        ("stopped and went on", f"{run.interruptions} times"),
        ("started from", f"{run.plan['start']}, {run.start_flops:.4g} FLOPs" if run.plan["start"] else "a new network"),
        ("rate, batch, optimizer, decay", ", ".join(str(run.plan[k]) for k in ("rate", "batch", "optimizer", "decay"))),
    ]
    return told


def _curve(run: TrainedRun, *, dark: bool) -> str:
    pen = ink(dark)
    with need("matplotlib", "report").rc_context(style(pen)):
        drawn = need("matplotlib.figure", "report").Figure(figsize=(7.4, 3.4), layout="constrained")
        axes = drawn.subplots()
        steps, losses, densities = zip(*run.curve) if run.curve else ((), (), ())
        axes.plot(steps, losses, color=pen.series[0], lw=1.2)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("loss of the batch")
        other = axes.twinx()
        other.plot(steps, densities, color=pen.series[1], lw=1.2)
        other.set_ylim(0, 1.05)
        other.set_ylabel("density")
        other.grid(visible=False)
        out = io.StringIO()
        drawn.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return clean(out.getvalue(), prefix=f"curve-{'dark' if dark else 'light'}", title="Loss and density by step.")
