"""Training loops of other libraries: supports hold, and a run resumed from a checkpoint is the same bit for bit."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

import gossamer
from gossamer.core.errors import TargetError
from gossamer.integrations import lightning_callback, trainer_callback
from gossamer.recipes.prune import prune
from gossamer.recipes.recover import Distillation

OPTIONS = {"density": 0.25, "every": 2}
METHODS = ("rigl", "set", "gradual_magnitude")
# These add to gradients within the optimizer's step.
WITHIN = {"topkast": {"density": 0.25, "every": 2}, "sr_ste": {"pattern": "2:4", "pull": 0.1}}
BOTH = pytest.mark.parametrize("backend", ["masked", "sparse"])
X = torch.randn(48, 8, generator=torch.Generator().manual_seed(3))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Dropout(0.1), nn.Linear(32, 4))


def zeros(model: nn.Module) -> int:
    return sum(int((m.weight == 0).sum()) for m in model.modules() if isinstance(m, nn.Linear))


def equal(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(n == m and torch.equal(x, y) for (n, x), (m, y) in pairs)


class Scored(nn.Module):
    """What the Trainer wants: a loss first."""

    _keys_to_ignore_on_save = None  # it asks for this where a checkpoint lacks a key

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.net(x) - x[:, :4]).square().mean()}


def trainer(folder, *callbacks, **options):
    from transformers import Trainer, TrainingArguments
    from transformers.utils import logging

    logging.disable_progress_bar()
    asked = {"max_steps": 12, "save_steps": 5, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no", "learning_rate": 0.01}
    args = TrainingArguments(str(folder), **asked, **quiet, **options)
    return Trainer(Scored(), args, train_dataset=[{"x": x} for x in X], callbacks=list(callbacks))


@BOTH
@pytest.mark.parametrize("method", METHODS)
def test_the_trainer_goes_on_from_its_checkpoint(method, backend, tmp_path):
    from transformers import TrainerCallback

    callback, counts = trainer_callback(method, backend=backend, **OPTIONS), []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            counts.append(sum(s.count for s in callback.handle.supports().values()))

    whole = trainer(tmp_path, callback)
    whole.add_callback(Count())
    whole.train()
    assert len(counts) == 12 and counts[-1] == 96 and (method == "gradual_magnitude" or set(counts) == {96})
    assert zeros(whole.model) >= 8 * 32 + 32 * 4 - 96  # links that came in with the last step are 0 as well
    assert set(whole.model.state_dict()) == set(Scored().state_dict())  # the masks are gone
    again = trainer(tmp_path, trainer_callback(method, backend=backend, **OPTIONS))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert equal(whole.model, again.model)


@pytest.mark.parametrize("method", WITHIN)
def test_the_trainer_goes_on_with_what_happens_within_its_optimizer(method, tmp_path):
    runs = [trainer(tmp_path, trainer_callback(method, **WITHIN[method])) for _ in range(2)]
    runs[0].train()
    runs[1].train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert equal(runs[0].model, runs[1].model)


class Words(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, place: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(60, (12,), generator=torch.Generator().manual_seed(place))
        return {"input_ids": ids, "labels": ids}


def test_a_language_model_goes_on_and_loads_as_ever(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no"}
    runs = []
    for start in (None, str(tmp_path / "checkpoint-4")):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes))
        args = TrainingArguments(str(tmp_path), max_steps=8, save_steps=4, per_device_train_batch_size=4, **quiet)
        run = Trainer(model, args, train_dataset=Words(), callbacks=[trainer_callback("rigl", **OPTIONS)])
        run.train(resume_from_checkpoint=start)
        runs.append(model)
    assert equal(*runs)
    runs[0].save_pretrained(tmp_path / "final")
    assert equal(runs[0], LlamaForCausalLM.from_pretrained(tmp_path / "final"))
    assert (runs[0].model.layers[0].mlp.up_proj.weight == 0).float().mean() > 0.5


def test_a_pruned_language_model_is_recovered_by_the_trainer_and_by_its_kin(tmp_path):
    """TRL's trainers are Trainers with a `compute_loss` of their own, as this one."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    dense = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes)).eval()
    pruned = copy.deepcopy(dense)
    prune(pruned, "magnitude", density=0.5)
    before = zeros(pruned)
    seen = []

    class Distilled(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **_):
            return Distillation(cross_entropy=1.0)(model, dense, inputs)

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, **_):
            held = model.model.layers[0].mlp.up_proj.parametrizations.weight
            moments = [x for x in optimizer.state[held.original].values() if x.shape == held.original.shape]
            seen.append([float(x.detach()[~held[0].mask].abs().max()) for x in (held.original, *moments)])

    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no", "learning_rate": 0.01}
    runs = []
    for start in (None, str(tmp_path / "checkpoint-4")):
        model, callback = copy.deepcopy(pruned), trainer_callback("hold")
        args = TrainingArguments(str(tmp_path), max_steps=8, save_steps=4, per_device_train_batch_size=4, **quiet)
        Distilled(model, args, train_dataset=Words(), callbacks=[callback, Look()]).train(resume_from_checkpoint=start)
        runs.append(model)
    assert equal(*runs) and len(seen) == 12 and seen == [[0.0] * 3] * 12
    assert zeros(runs[0]) == before and set(runs[0].state_dict()) == set(dense.state_dict())
    assert not torch.equal(runs[0].model.layers[0].mlp.up_proj.weight, pruned.model.layers[0].mlp.up_proj.weight)


def test_a_trainer_that_was_stopped_goes_on_in_the_same_process(tmp_path):
    whole = trainer(tmp_path / "a", trainer_callback("rigl", **OPTIONS))
    whole.train()
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 7:
                raise KeyboardInterrupt

    run = trainer(tmp_path / "b", trainer_callback("rigl", **OPTIONS))
    run.add_callback(stop := Stop())
    with pytest.raises(KeyboardInterrupt):
        run.train()
    run.remove_callback(stop)
    run.train(resume_from_checkpoint=True)
    assert equal(whole.model, run.model)


def test_the_trainer_is_not_asked_to_restore_the_callback(tmp_path):
    with pytest.raises(TargetError, match="restores itself"):
        trainer(tmp_path, trainer_callback("static"), restore_callback_states_from_checkpoint=True)


def test_a_trainer_that_resumes_needs_its_callback_from_the_start(tmp_path):
    trainer(tmp_path, trainer_callback("rigl", **OPTIONS)).train()
    again = trainer(tmp_path)
    again.add_callback(trainer_callback("rigl", **OPTIONS))
    with pytest.raises(TargetError, match="masks did not reach the model"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_a_trainer_takes_one_sparse_callback(tmp_path):
    run = trainer(tmp_path, trainer_callback("rigl", **OPTIONS), trainer_callback("set", **OPTIONS))
    with pytest.raises(TargetError, match="has 2 sparse callbacks"):
        run.train()


@pytest.mark.parametrize("method", METHODS)
def test_accelerate_saves_and_restores_a_handle(method, tmp_path):
    from accelerate import Accelerator

    def begin():
        accelerator = Accelerator(cpu=True)
        model = net()
        model, opt = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01))
        handle = gossamer.attach(model, method, optimizer=opt, total_steps=12, **OPTIONS)
        accelerator.register_for_checkpointing(handle)
        return accelerator, model, opt, handle

    def train(accelerator, model, opt, handle, steps):
        for step in steps:
            x = X[4 * step % 48 :][:4]
            opt.zero_grad()
            accelerator.backward((model(x) - x[:, :4]).square().mean())
            opt.step()
            handle.step()

    whole = begin()
    train(*whole, range(5))
    whole[0].save_state(str(tmp_path))
    train(*whole, range(5, 12))
    again = begin()
    again[0].load_state(str(tmp_path))
    train(*again, range(5, 12))
    assert equal(whole[1], again[1]) and whole[3].report() == again[3].report()


def lightning_run(folder, callback, parts: int = 2):
    pl = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
    saver = pl.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return pl.Trainer(max_epochs=2, accumulate_grad_batches=parts, callbacks=[callback, saver], **quiet)


def lightning_module(optimizers: int = 1):
    pl = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def training_step(self, batch, index):
            return (self.net(batch) - batch[:, :4]).square().mean()

        def test_step(self, batch, index):
            self.answer = self.net(batch)

        def configure_optimizers(self):
            made = [torch.optim.AdamW(self.parameters(), lr=0.01) for _ in range(optimizers)]
            return made[0] if optimizers == 1 else made

    module = Module()
    module.automatic_optimization = optimizers == 1
    return module


def lightning_twice(folder, method, **options):
    """Trained at a stretch, and from the checkpoint halfway."""
    loader = torch.utils.data.DataLoader(X, batch_size=4)
    for start in (None, folder / "epoch=0.ckpt"):
        torch.manual_seed(1)
        module = lightning_module()
        module.net[2].p = 0.0  # Lightning restores no random state, and no place within an epoch
        callback = lightning_callback(method, **options)
        lightning_run(folder, callback).fit(module, loader, ckpt_path=start)
        assert callback.handle is None
        yield module


@pytest.mark.filterwarnings("ignore")
@BOTH
@pytest.mark.parametrize("method", METHODS)
def test_lightning_goes_on_from_its_checkpoint(method, backend, tmp_path):
    whole, again = lightning_twice(tmp_path, method, backend=backend, **OPTIONS)
    assert zeros(whole) >= 8 * 32 + 32 * 4 - 96 and equal(whole, again)
    assert set(whole.state_dict()) == set(lightning_module().state_dict())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", WITHIN)
def test_lightning_goes_on_with_what_happens_within_its_optimizer(method, tmp_path):
    whole, again = lightning_twice(tmp_path, method, **WITHIN[method])
    assert zeros(whole) >= (8 * 32 + 32 * 4) / 2 and equal(whole, again)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fits", [True, False])
def test_lightning_evaluates_a_checkpoint_of_the_run(fits, tmp_path):
    loader = torch.utils.data.DataLoader(X, batch_size=48)
    module, run = lightning_module(), lightning_run(tmp_path, lightning_callback("topkast", **WITHIN["topkast"]))
    run.fit(module, loader)
    if not fits:  # a process that evaluates only
        module, run = lightning_module(), lightning_run(tmp_path, lightning_callback("topkast", **WITHIN["topkast"]))
    run.test(module, loader, ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    held = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["state_dict"]
    for name in ("net.0", "net.3"):
        original, mask = (held[f"{name}.parametrizations.weight.{part}"] for part in ("original", "0.mask"))
        assert torch.equal(module.get_submodule(name).weight, torch.where(mask, original, 0))
    assert module.answer.isfinite().all() and zeros(module) == 8 * 32 + 32 * 4 - 96


@pytest.mark.filterwarnings("ignore")
def test_lightning_with_two_optimizers_is_refused(tmp_path):
    module = lightning_module(optimizers=2)
    run = partial(lightning_run(tmp_path, lightning_callback("static"), parts=1).fit, module)
    with pytest.raises(TargetError, match="the module has 2"):
        run(torch.utils.data.DataLoader(X, batch_size=4))
