"""Adapters and peft: what each writes, the other reads; one model may carry both."""

from __future__ import annotations

import pytest
import torch

import gossamer
from gossamer.core.errors import TargetError
from tests.oracles.adapters import batch, blocks, train

peft = pytest.importorskip("peft")


@pytest.mark.parametrize(
    ("method", "options"), [("s2ft", {"density": 0.3, "targets": ["*_proj"]}), ("lora", {"rank": 2})]
)
def test_peft_reads_ours_as_lora(method, options, tmp_path):
    model = blocks()
    adapters = gossamer.adapt(model, method, **options)
    train(model, adapters.parameters())
    adapters.save(tmp_path, peft=True)
    theirs = peft.PeftModel.from_pretrained(blocks(), tmp_path)
    torch.testing.assert_close(theirs(batch(model)), model(batch(model)))
    torch.testing.assert_close(theirs.merge_and_unload()(batch(model)), model(batch(model)))


@pytest.mark.parametrize("rslora", [False, True])
def test_we_read_lora_of_peft(rslora, tmp_path):
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["up_proj", "down_proj"], use_rslora=rslora)
    config.rank_pattern, config.alpha_pattern = {"1.down_proj": 2}, {"1.down_proj": 7}
    theirs = peft.get_peft_model(blocks(), config)
    train(theirs, [p for p in theirs.parameters() if p.requires_grad])
    theirs.save_pretrained(tmp_path)
    ours = blocks()
    gossamer.load_adapter(ours, tmp_path)
    torch.testing.assert_close(ours(batch(ours)), theirs(batch(ours)))


def test_lora_learns_as_peft_does():
    """The same start, the same steps, the same numbers."""
    ours = blocks()
    adapters = gossamer.adapt(ours, "lora", rank=2, alpha=4)
    theirs = peft.get_peft_model(blocks(), peft.LoraConfig(r=2, lora_alpha=4, target_modules=["up_proj", "down_proj"]))
    for at, delta in adapters.deltas("default").items():
        theirs.get_submodule(f"base_model.model.{at}").lora_A["default"].weight.data.copy_(delta.A.data)
    train(ours, adapters.parameters(), steps=5)
    train(theirs, [p for p in theirs.parameters() if p.requires_grad], steps=5)
    torch.testing.assert_close(ours(batch(ours)), theirs(batch(ours)))


def test_a_model_of_peft_carries_ours_too():
    theirs = peft.get_peft_model(blocks(), peft.LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False))
    plain = theirs(batch(theirs))
    adapters = gossamer.adapt(theirs, "s2ft", density=0.25, targets=["*up_proj.base_layer", "*down_proj"])
    assert (theirs(batch(theirs)) == plain).all()
    train(theirs, adapters.parameters())
    learnt = theirs(batch(theirs))
    assert (learnt != plain).any()
    adapters.merge()
    torch.testing.assert_close(theirs(batch(theirs)), learnt)
    torch.testing.assert_close(theirs.merge_and_unload()(batch(theirs)), learnt)


def test_what_peft_cannot_hold_is_refused(tmp_path):
    with pytest.raises(TargetError, match="no place for"):
        gossamer.adapt(blocks(), "lora", also=["1.up_proj.bias"]).save(tmp_path, peft=True)
    with pytest.raises(TargetError, match="no thin product"):
        gossamer.adapt(blocks(), "s2ft", keep_zeros=True).save(tmp_path, peft=True)
