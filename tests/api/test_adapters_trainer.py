"""Adapters in the Trainer of transformers: the same as a plain loop, and exact from a checkpoint."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import gossamer
from gossamer.integrations import adapter_callback

SIZES = {"hidden_size": 72, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 2}
METHODS = {
    "s2ft": {"density": 0.2},
    "sara": {"threshold": 0.01, "again": 3, "nuclear": 0.01},
    "pst": {"total_steps": 6, "density": 0.5, "rank": 2},
    "gs_lora": {"rank": 2, "strength": 1.0},
    "loca": {"coefficients": 6},
    "sparse_spectral": {"rank": 2, "every": 2},
}


class Words(Dataset):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, place: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(60, (12,), generator=torch.Generator().manual_seed(place))
        return {"input_ids": ids, "labels": ids}


def trained(folder, method: str, start: str | None = None):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=60, **SIZES))
    before = {n: p.clone() for n, p in model.named_parameters()}
    adapters = gossamer.adapt(model, method, **METHODS[method])
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no", "learning_rate": 0.01}
    args = TrainingArguments(str(folder), max_steps=6, save_steps=4, per_device_train_batch_size=4, **quiet)
    Trainer(model, args, train_dataset=Words(), callbacks=[adapter_callback(adapters)]).train(start)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    return model, adapters


@pytest.mark.parametrize("method", METHODS)
def test_the_trainer_goes_on_from_its_checkpoint(method, tmp_path):
    model, adapters = trained(tmp_path, method)
    again, _ = trained(tmp_path, method, str(tmp_path / "checkpoint-4"))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert {int(d.steps) for d in adapters.deltas().values()} == {6}
    assert any(p.abs().max() > 0 for p in adapters.parameters())
