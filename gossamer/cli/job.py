"""prune → recover → evaluate → pack → report: one job, each stage found finished, half done, or begun."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import CalibrationError, TargetError, need
from ..core.files import whole_file, whole_folder
from .screen import bar, emit, err, waiting
from .stages import Pack, Recover, Stages

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from ..core import Sparsifier
    from ..report import Run
    from .models import Loaded
    from .recipe import Recipe

JOB, PRUNED, RECOVERED, PACKED, REPORT, SPENT = "job.json", "pruned", "recovered", "packed", "report.html", "spent.json"
WORK = ".work"
OURS = (JOB, PRUNED, RECOVERED, PACKED, REPORT, "run.json", WORK)


class Job:
    """One recipe in one folder. A stage whose result is there is over; the rest goes on where it was."""

    def __init__(self, asked: Recipe, stages: Stages, sparsifier: Sparsifier) -> None:
        self.asked, self.stages, self.sparsifier = asked, stages, sparsifier
        self.out = Path(asked.out)
        self.work = self.out / WORK

    def claim(self, *, overwrite: bool) -> None:
        """The folder belongs to one recipe.

        Raises:
            TargetError: it holds another recipe's job, or files of something else.
            CalibrationError: a stage has no text to read.
            MissingDependency: it asks for zero-shot tasks, and lm-eval is not installed.
        """
        self._refuse_what_lacks_text()
        wanted = json.loads(json.dumps({**self.asked.job, **self.stages.to_dict()}))
        foreign = {p.name for p in self.out.glob("*")} - set(OURS) if self.out.is_dir() else set()
        if self.out.is_file() or foreign or (self.out.is_dir() and any(self.out.iterdir()) and not self._claimed()):
            raise TargetError(f"{self.out} holds files of something else; choose another folder")
        if overwrite and self._claimed():
            shutil.rmtree(self.out)
        if self._claimed():
            self._refuse_other(wanted)
            err().print(f"Going on with the job in {self.out}.")
            return
        with whole_file(self.out / JOB) as draft:
            draft.write_text(json.dumps(wanted, indent=1))

    def _refuse_what_lacks_text(self) -> None:
        """Before hours of work, not after."""
        from .judge import held_out

        if self.stages.evaluate is not None:
            held_out(self.asked, self.stages.evaluate)
            if self.stages.evaluate.zero_shot:
                need("lm_eval", "eval")
        if self.stages.recover is not None and not (self.stages.recover.data or self.asked.data):
            raise CalibrationError("recovery reads texts; give the recipe data:, or recover: a data: of its own")

    def _claimed(self) -> bool:
        return (self.out / JOB).exists()

    def _refuse_other(self, wanted: Mapping[str, object]) -> None:
        held = json.loads((self.out / JOB).read_text())
        for key in sorted({*wanted, *held}):
            if wanted.get(key) != held.get(key):
                raise TargetError(
                    f"{self.out} holds a job with {key} = {held.get(key)!r}, now it is {wanted.get(key)!r}; choose "
                    "another folder, or --overwrite to start anew"
                )

    def run(self) -> Run | None:
        """All stages that are not over; the record of the report, where there is one to be made."""
        self._prune()
        if self.stages.recover is not None:
            self._recover(self.stages.recover)
        if self.stages.pack is not None:
            self._pack(self.stages.pack)
        report = self._report() if self.stages.evaluate is not None else None
        for file in self.work.glob("*.safetensors"):  # of a recovery that is over
            file.unlink()
        return report

    @property
    def models(self) -> dict[str, str]:
        """What is evaluated, by the name that the report gives it."""
        held = {"dense": self.asked.model, PRUNED: str(self.out / PRUNED)}
        return held if self.stages.recover is None else {**held, RECOVERED: str(self.out / RECOVERED)}

    @property
    def last(self) -> Path:
        """The model that is packed."""
        return self.out / (RECOVERED if self.stages.recover is not None else PRUNED)

    def _prune(self) -> None:
        from .prune import run

        if not (self.out / PRUNED).exists():
            began = time.perf_counter()
            asked = replace(self.asked, out=str(self.out / PRUNED), workdir=str(self.work / PRUNED))
            run(asked, self.sparsifier)
            self._spent(PRUNED, time.perf_counter() - began)

    def _recover(self, how: Recover) -> None:
        from ..recipes.recover import recover
        from . import models

        if (self.out / RECOVERED).exists():
            return
        with waiting("loading the pruned model and its teacher"):
            student, teacher = models.load(str(self.out / PRUNED)), models.load(self.asked.model)
            stored = next(student.model.parameters()).dtype
            student.model.float()  # what learns is kept in float32, whatever it is stored in
            batches = self._texts(student, how)
        with bar("recovering") as progress:
            report = recover(
                student.model,
                _teacher(teacher),
                batches,
                steps=how.steps,
                seconds=how.seconds or None,
                lr=how.lr,
                warm_up=how.warm_up,
                loss=_loss(how, student),
                accumulate=how.accumulate,
                checkpoint=self.work / "recover.safetensors",
                save_every=how.save_every,
                clock=time.process_time if how.clock == "processor" else time.perf_counter,
                progress=progress,
            )
        student.model.to(stored)
        self._spent(RECOVERED, report.seconds)
        with whole_folder(self.out / RECOVERED) as draft, models.quiet():
            student.model.save_pretrained(draft)
            if student.tokenizer is not None:
                student.tokenizer.save_pretrained(draft)

    def _texts(self, loaded: Loaded, how: Recover) -> list:
        from . import calibration

        source = how.data or self.asked.data
        length = how.length or self.asked.length
        return calibration.batches(loaded, source, samples=how.samples, length=length, batch=how.batch, seed=how.seed)

    def _pack(self, how: Pack) -> None:
        from .. import pack, save
        from . import models
        from .pack import whole_numbers

        if (self.out / PACKED).exists():
            return
        with waiting("loading the model to pack"):
            loaded = models.load(str(self.last))
        calls = [models.example(loaded, tokens=n, batch=how.batch) for n in whole_numbers(how.tokens, "pack.tokens")]
        with bar("measuring") as progress:
            packed = pack(loaded.model, calls, min_gain=how.min_gain, inplace=True, remeasure=True, progress=progress)
        save(packed, self.out / PACKED, tokenizer=loaded.tokenizer)

    def _report(self) -> Run:
        from ..report import load_run, write_report
        from .judge import judged, story

        if (self.out / REPORT).exists():
            return load_run(self.out / "run.json")
        measure = partial(judged, self.asked, self.stages.evaluate)
        found = {}
        for name, spec in self.models.items():
            found[name] = self._once(self.work / f"judged-{name}.json", partial(measure, spec, name))
        run = story(self, found)
        write_report(run, self.out / REPORT)
        return run

    def _once(self, file: Path, make) -> dict:
        if not file.exists():
            made = make()
            with whole_file(file) as draft:
                draft.write_text(json.dumps(made, indent=1))
        return json.loads(file.read_text())

    def _spent(self, stage: str, seconds: float) -> None:
        """Remember how long a stage took; of one that was stopped, its last session and what its own record says."""
        with whole_file(self.work / SPENT) as draft:
            draft.write_text(json.dumps({**self.spent, stage: seconds}))

    @property
    def spent(self) -> dict[str, float]:
        """Seconds by stage."""
        file = self.work / SPENT
        return json.loads(file.read_text()) if file.exists() else {}

    def record(self, run: Run | None) -> dict[str, object]:
        """JSON-ready."""
        done = {n: str(self.out / n) for n in (PRUNED, RECOVERED, PACKED, REPORT) if (self.out / n).exists()}
        figures = {s.name: s.quality for s in run.settings} if run else {}
        return {
            "out": str(self.out),
            "job": {**self.asked.job, **asdict(self.stages)},
            "done": done,
            "quality": figures,
        }


def _teacher(loaded: Loaded) -> nn.Module:
    """Rounded to bfloat16 where its passes run in that anyway."""
    import torch

    return loaded.model.bfloat16() if torch.cpu._is_avx512_bf16_supported() else loaded.model.float()


def _loss(how: Recover, loaded: Loaded):
    from ..recipes.recover import Distillation

    own = how.cross_entropy if how.cross_entropy >= 0 else float(loaded.causal)
    return Distillation(how.squarehead, own, how.kl)


def job(asked: Recipe, stages: Stages, sparsifier: Sparsifier, *, overwrite: bool, as_json: bool) -> None:
    """Run a recipe with stages and say what came of it."""
    from ..report import headline, table

    one = Job(asked, stages, sparsifier)
    one.claim(overwrite=overwrite)
    run = one.run()
    told = [f"{name}: {where}" for name, where in one.record(run)["done"].items()]  # type: ignore[attr-defined]
    emit(as_json, one.record(run), *(() if as_json or run is None else (table(run), headline(run))), *told)
