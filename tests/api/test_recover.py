"""recover: the pruned model comes nearer to the dense one, its zeros stay, and it is left as it was found."""

from __future__ import annotations

import copy
import signal

import pytest
import torch

from gossamer.core.errors import BudgetError, CalibrationError, FileDamaged, NonFiniteError, TargetError
from gossamer.recipes.prune import prune
from gossamer.recipes.recover import Distillation, recover, squarehead

transformers = pytest.importorskip("transformers")


def pair():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    dense = transformers.BertModel(config).eval()
    for p in dense.parameters():  # default weights are so small that layers hardly differ
        p.data.mul_(3.0 if p.ndim > 1 else 1.0)
    model = copy.deepcopy(dense)
    prune(model, "magnitude", density=0.3)
    return dense, model


def batches(n: int = 6) -> list[dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(1)
    mask = torch.ones(4, 9, dtype=torch.long)
    mask[0, 5:] = 0
    return [{"input_ids": torch.randint(50, (4, 9), generator=g), "attention_mask": mask} for _ in range(n)]


def loss(model, dense) -> float:
    held_out = {"input_ids": torch.randint(50, (16, 9), generator=torch.Generator().manual_seed(9))}
    with torch.no_grad():
        got, want = (m(**held_out, output_hidden_states=True).hidden_states[1:] for m in (model, dense))
    return float(squarehead(got, want))


def test_recovery_lowers_the_loss_on_held_out_text_and_keeps_the_zeros() -> None:
    dense, model = pair()
    frozen = model.encoder.layer[0].output.dense.bias.requires_grad_(False)
    zeros = {n: p == 0 for n, p in model.named_parameters() if p.ndim == 2}
    embedding = model.embeddings.word_embeddings.weight.clone()
    frozen_value = frozen.clone()
    dense.train()
    model.encoder.train()
    before = loss(model.eval(), dense.eval())
    model.encoder.train()
    report = recover(model, dense, batches(), steps=60, lr=3e-3)
    assert model.encoder.training
    model.eval()
    assert loss(model, dense) < 0.7 * before
    model.encoder.train()
    assert report.steps == 60 and report.losses[-1] < report.losses[0]
    for n, p in model.named_parameters():
        if n in zeros:
            assert bool((p[zeros[n]] == 0).all())
    assert torch.equal(model.embeddings.word_embeddings.weight, embedding)
    assert set(model.state_dict()) == set(dense.state_dict())  # no masks left behind
    assert torch.equal(frozen, frozen_value) and model.encoder.training and not model.training
    assert all(p.grad is None for p in model.parameters())
    assert not frozen.requires_grad and model.embeddings.word_embeddings.weight.requires_grad
    assert model.config._attn_implementation == dense.config._attn_implementation


def test_squarehead_is_its_definition_and_ignores_padding() -> None:
    s, t = [torch.randn(2, 3, 4) for _ in range(2)], [torch.randn(2, 3, 4) for _ in range(2)]
    mask = torch.tensor([[True, True, False], [True, False, False]])
    want = sum(((a - b)[mask] ** 2).sum() / (b[mask] ** 2).sum() for a, b in zip(s, t))
    torch.testing.assert_close(squarehead(s, t, mask), want)


def test_time_limits_hold_and_errors_say_what_is_missing() -> None:
    dense, model = pair()
    report = recover(model, dense, batches(), steps=100_000, seconds=0.5)
    assert 1 <= report.steps < 100_000
    with pytest.raises(CalibrationError, match="no batches"):
        recover(model, dense, [], steps=1)
    with pytest.raises(TargetError, match="no support to hold"):
        recover(copy.deepcopy(dense), dense, batches(), steps=1)


def causal_pair():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, num_key_value_heads=2, **sizes))
    for p in dense.parameters():
        p.data.mul_(5.0 if p.ndim > 1 else 1.0)
    model = copy.deepcopy(dense.eval())
    prune(model, "magnitude", density=0.5)
    return dense, model


@pytest.mark.parametrize("kind", ["squarehead", "cross_entropy", "kl"])
def test_each_loss_is_its_definition_token_by_token(kind) -> None:
    dense, model = causal_pair()
    batch = batches(1)[0]
    got = Distillation(**{"squarehead": 0.0, kind: 2.0})(model, dense, batch)
    s, t = (m(**batch, output_hidden_states=True) for m in (model, dense))
    real = batch["attention_mask"].bool()
    tokens = [(b, i) for b in range(4) for i in range(9) if real[b, i]]
    log_s, log_t = s.logits.log_softmax(-1), t.logits.log_softmax(-1)
    if kind == "kl":
        each = [sum(log_t[b, i, v].exp() * (log_t[b, i, v] - log_s[b, i, v]) for v in range(50)) for b, i in tokens]
        want = sum(each) / len(tokens)
    elif kind == "cross_entropy":
        each = [-log_s[b, i, batch["input_ids"][b, i + 1]] for b, i in tokens if (b, i + 1) in tokens]
        want = sum(each) / len(each)
    else:
        mean = lambda xs: sum(xs) / len(tokens)
        pairs = list(zip(s.hidden_states, t.hidden_states))[1:]
        want = sum(
            mean([(x[b, i] - y[b, i]).square().mean() for b, i in tokens])
            / mean([y[b, i].square().mean() for b, i in tokens])
            for x, y in pairs
        )
    torch.testing.assert_close(got, 2.0 * want, rtol=1e-4, atol=1e-5)


def test_labels_of_a_batch_are_what_cross_entropy_goes_by() -> None:
    _, model = causal_pair()
    ids = batches(1)[0]["input_ids"]
    labels = ids.masked_fill(torch.arange(9) < 4, -100)
    only_text = Distillation(squarehead=0.0, cross_entropy=1.0)
    got = only_text(model, None, {"input_ids": ids, "labels": labels})
    torch.testing.assert_close(got, model(input_ids=ids, labels=labels).loss)
    assert got != only_text(model, None, {"input_ids": ids})


ALL = Distillation(squarehead=1.0, cross_entropy=1.0, kl=0.5)


def recovered(file=None, progress=None, steps=9, **options):
    dense, model = causal_pair()
    report = recover(model, dense, batches(), steps=steps, lr=3e-3, loss=ALL, accumulate=2, checkpoint=file,
                     save_every=0.0, progress=progress, **options)  # fmt: skip
    return model, report


# What the system would call: a signal sent for real may not find room on the stack that an engine, loaded by another
# test, has set aside for signals.
def interrupt(words: str, step: int, steps: int) -> None:
    if step == 4:
        signal.getsignal(signal.SIGINT)(signal.SIGINT, None)


def fall_over(words: str, step: int, steps: int) -> None:
    if step == 4:
        raise SystemExit("killed before the step was saved")


@pytest.mark.parametrize("way, saved", [(interrupt, 4), (fall_over, 3)])
def test_a_stopped_recovery_goes_on_bit_for_bit(way, saved, tmp_path) -> None:
    whole, _ = recovered()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        recovered(tmp_path / "a.safetensors", way)
    model, report = recovered(tmp_path / "a.safetensors")
    assert report.resumed == saved and report.steps == 9
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), model.parameters()))
    again, report = recovered(tmp_path / "a.safetensors")  # a finished one is read back
    assert report.resumed == report.steps == 9
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters()))


def test_a_checkpoint_of_something_else_is_refused(tmp_path) -> None:
    file = tmp_path / "a.safetensors"
    recovered(file)
    with pytest.raises(TargetError, match="holds a recovery with plan"):
        recovered(file, steps=10)
    dense, model = causal_pair()
    model.model.layers[0].mlp.up_proj.weight.data[0] = 0
    with pytest.raises(TargetError, match="holds a recovery with masks"):
        recover(model, dense, batches(), steps=9, lr=3e-3, loss=ALL, accumulate=2, checkpoint=file)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(FileDamaged, match="delete it to start"):
        recovered(file)


def test_accumulated_batches_make_the_step_of_one_large_batch() -> None:
    ways = []
    for parts in (2, 1):
        dense, model = causal_pair()
        ids = batches(1)[0]["input_ids"]
        given = [{"input_ids": part} for part in ids.chunk(parts)]
        recover(model, dense, given, steps=3, lr=1e-2, loss=Distillation(0.0, 1.0), accumulate=parts)
        ways.append(model.model.layers[1].mlp.down_proj.weight)
    torch.testing.assert_close(*ways, rtol=2e-2, atol=2e-3)  # the passes are in bfloat16


def test_the_report_states_memory_time_and_what_is_left() -> None:
    told = []
    spent = iter(range(1000))
    dense, model = causal_pair()
    params = sum(p.numel() for p in model.parameters())
    report = recover(model, dense, batches(), steps=1000, seconds=40.0, clock=lambda: float(next(spent)),
                     progress=lambda *x: told.append(x))  # fmt: skip
    assert 5 < report.steps < 40 and report.seconds >= 40.0
    assert told[-1][1] == report.steps and told[-1][2] <= report.steps + 1
    assert told[0][2] < 1000 and " s left" in told[0][0]
    masks = sum(m.weight.numel() for m in dense.model.layers.modules() if isinstance(m, torch.nn.Linear))
    assert report.bytes == 4 * 2 * params + masks + 12 * (params - model.model.embed_tokens.weight.numel())


def test_what_cannot_be_learnt_is_refused_with_the_remedy() -> None:
    dense, model = pair()
    for weights in ({"squarehead": -1.0}, {"squarehead": 0.0}):
        with pytest.raises(BudgetError, match="one is above 0"):
            Distillation(**weights)
    with pytest.raises(TargetError, match="gives no logits"):
        recover(model, dense, batches(), steps=1, loss=Distillation(cross_entropy=1.0))
    with pytest.raises(TargetError, match="pass it as teacher"):
        recover(model, None, batches(), steps=1)
    masked = transformers.BertForMaskedLM(model.config)
    with pytest.raises(TargetError, match="needs labels"):
        Distillation(squarehead=0.0, cross_entropy=1.0)(masked, None, batches(1)[0])
    dense.encoder.layer[0].output.dense.weight.data[0, 1] = torch.nan
    with pytest.raises(NonFiniteError, match="lower lr"):
        recover(model, dense, batches(), steps=1)
