"""Every way to train sparse beside the others: same network, data order, steps and rate; tasks, densities and seeds.

Run: python -m benchmarks.training.run [--config short|night|gpu] [--until 06:30] [--workers 2] [--threads 1] [--quick]
A run that was stopped goes on. What is there when it stops is written, with how much of the plan it covers.
The protocol, fixed beforehand: rates, batches and options are those of the tasks and methods, tuned for none of them;
each method takes the same optimizer steps, its first parts included; figures are of the test data after the last step.
"""

from __future__ import annotations

import argparse
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import yaml

from benchmarks.results import FOLDER, write_results
from gossamer.integrations import sweep
from gossamer.integrations.pace import Status
from gossamer.report.machine import slug
from gossamer.report.sweep import HEADS, Sweep
from gossamer.report.sweep_figure import write_sweep_figure

CONFIGS = Path(__file__).parent / "configs"
RUNS = FOLDER.parent / ".training-runs"
NOTES = (
    "figure: mean over seeds ± half the 95 % interval (Student's t); kept: of the layers that methods can hold",
    "FLOPs: of training, zeros skipped, counted from the supports; the masked path that ran computes them densely",
    "of dense: share of the same steps of the dense network; one-shot + fine-tuning is charged its dense first half",
    "CPU s: processor time of the training steps. Seconds by the clock are of a shared machine, with its pauses: no "
    "speed is claimed",
    "nothing was tuned: every method has its paper's defaults, with moves of links as often as the configuration says, "
    "and the rate that the task has for the dense network; ER and ERK are the same where there is no convolution",
)

SAID = {
    "short": (
        "short: figures have not settled after so few steps, and methods that prune late (gradual magnitude, one-shot) "
        "had the fewest since; take the order of methods from the configuration 'night'",
    )
}


def protocol(config: str) -> dict[str, object]:
    """What is asked for."""
    return yaml.safe_load((CONFIGS / f"{config}.yaml").read_text())


def deadline(text: str) -> datetime | None:
    """The next time that a clock shows HH:MM, in UTC."""
    if not text:
        return None
    now = datetime.now(UTC)
    at = now.replace(hour=int(text[:2]), minute=int(text[3:]), second=0, microsecond=0)
    return at if at > now else at + timedelta(days=1)


def trained(asked: dict, folder: Path, options: argparse.Namespace) -> Sweep:
    """Train until all is done or the time is up; what is there then is read back."""
    end, last = deadline(options.until), [Status(0, 0, 0, (), None)]

    def tell(status: Status) -> None:
        last[0] = status
        if status.over[0]:
            left = "" if status.left is None else f", about {status.left / 60:.0f} min left"
            print(f"{status.over[0]}: {status.over[1]}  [{status.done} of {status.total}{left}]", flush=True)
        if end and datetime.now(UTC) > end:
            raise KeyboardInterrupt

    try:
        return sweep(asked, folder, workers=options.workers, threads=options.threads, tell=tell)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", flush=True)
        return sweep_as_it_is(asked, folder)


def sweep_as_it_is(asked: dict, folder: Path) -> Sweep:
    """The table of finished runs, without training."""
    from gossamer.data.tasks import task
    from gossamer.integrations.sweeps import gathered
    from gossamer.recipes.grid import grid

    return gathered(grid(asked, folder, task), folder.absolute(), {})


def write(found: Sweep, config: str, asked: dict) -> Path:
    """RESULTS/training-CONFIG-MACHINE.{json,md,svg}."""
    total = sum(len(r.values) for r in found.rows)
    seeds = sorted({len(r.values) for r in found.rows})
    steps = "; ".join(f"{t['task']} {t.get('steps', 'its usual')} steps" for t in map(_entry, asked["tasks"]))
    covered = f"configuration '{config}': {steps}; {total} runs, {len(found.missing)} not reached; seeds: {seeds}"
    missed = sorted({name.split("/")[0] for name in found.missing} - {r.task for r in found.rows})
    covered += f"; nothing of {', '.join(missed)}" if missed else ""
    failed = [f"{name} failed: {why}" for name, why in found.failures.items()]
    record = {"config": config, "asked": asked, **found.to_dict()}
    notes, rows = [covered, *SAID.get(config, ()), *failed, *NOTES], [r.cells() for r in found.rows]
    path = write_results(f"training-{config}", record, HEADS, rows, notes)
    write_sweep_figure(found, FOLDER / f"training-{config}-{slug()}.svg")
    return path


def _entry(task: str | dict) -> dict:
    return {"task": task} if isinstance(task, str) else task


def quick() -> None:
    """Does it run? The methods on a network of seconds."""
    asked = {**protocol("short"), "tasks": [{"task": "teacher", "steps": 60}], "densities": [0.2], "seeds": 1}
    with tempfile.TemporaryDirectory() as folder:
        print(sweep(asked, folder, workers=1).table())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", choices=sorted(p.stem for p in CONFIGS.glob("*.yaml")), default="night")
    parser.add_argument("--until", default="", metavar="HH:MM", help="stop at this time (UTC) and write what is there")
    parser.add_argument("--workers", type=int, help="one per core unless given; 1 needs no Ray")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument(
        "--runs", type=Path, help="where runs are kept until the next time; benchmarks/.training-runs/CONFIG"
    )
    parser.add_argument("--quick", action="store_true", help="a network of seconds; writes no results")
    options = parser.parse_args()
    if options.quick:
        return quick()
    asked = protocol(options.config)
    found = trained(asked, options.runs or RUNS / options.config, options)
    print(found.table(), f"written to {write(found, options.config, asked)}", sep="\n")


if __name__ == "__main__":
    main()
