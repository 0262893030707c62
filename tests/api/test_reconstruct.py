"""Reconstruction: blocks trained back towards the dense model, against a loop written out by hand, and interrupted."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import gossamer
from gossamer import Reconstruct, prune
from gossamer.attach import find
from gossamer.attach.blocks import blocks_of
from gossamer.attach.blockwise import by_blocks
from gossamer.core.errors import BudgetError, CalibrationError, TargetError

transformers = pytest.importorskip("transformers")

SMALL = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
EXACT = Reconstruct(epochs=3, lr=3e-3, bfloat16=False)


def tokens(n: int, length: int = 12) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(2)
    return [{"input_ids": torch.randint(32, (2, length), generator=g)} for _ in range(n)]


def llama(**more: object) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=32, num_key_value_heads=1, initializer_range=0.3, **SMALL, **more)
    return transformers.LlamaForCausalLM(config).eval()


def t5() -> nn.Module:
    sizes = dict(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return transformers.T5ForConditionalGeneration(transformers.T5Config(decoder_start_token_id=0, **sizes)).eval()


def bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(vocab_size=32, **SMALL)).eval()


class Net(nn.Module):
    """Plain blocks without attention, and layers around them that are in no block."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.into = nn.Linear(8, 16)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16)) for _ in range(2)
        )
        self.out = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for block in self.blocks:
            x = x + block(x)
        return self.out(x)


def rows(n: int, seed: int = 1) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 10, 8, generator=g) for _ in range(n)]


@pytest.mark.parametrize("make", [llama, bert, t5])
def test_blocks_that_are_only_run_change_nothing(make):
    model = make()
    batches = [{**b, "decoder_input_ids": b["input_ids"][:, :7]} if make is t5 else b for b in tokens(2)]
    blocks = list(blocks_of(model, find(model).targets))
    seen: dict[str, list[Tensor]] = {}
    hooks = [
        model.get_submodule(b).register_forward_hook(lambda m, a, out, b=b: seen.setdefault(b, []).append(out))
        for b in blocks
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    asked = []

    def answer(block, calls):
        asked.append(block)
        outputs = [c.run() for c in calls]
        for mine, theirs in zip(outputs, seen[block], strict=True):
            assert torch.equal(*(x if isinstance(x, Tensor) else x[0] for x in (mine, theirs)))
        return outputs

    assert by_blocks(model, batches, blocks, answer) == [] and asked == blocks
    assert not any("forward" in vars(m) for m in model.modules())


def halved(w: Tensor) -> Tensor:
    return w * (w.abs() > w.abs().flatten().kthvalue(w.numel() // 2).values)


def trained_by_hand(block: nn.Module, xs: list[Tensor], ts: list[Tensor], how: Reconstruct) -> None:
    masks = [(p != 0) | (p.ndim < 2) for p in block.parameters()]
    adam = torch.optim.Adam(block.parameters(), lr=how.lr, betas=how.betas)
    held = max(1, round(how.held_out * len(xs)))

    def loss(x: Tensor, t: Tensor) -> Tensor:
        return ((block(x) - t).square().sum(-1) / t.square().sum(-1)).mean()

    def judged() -> tuple[float, dict[str, Tensor]]:
        score = sum(loss(x, t).item() for x, t in list(zip(xs, ts))[-held:])
        return score, copy.deepcopy(block.state_dict())

    found, order, step, steps = [judged()], torch.Generator().manual_seed(0), 0, how.epochs * (len(xs) - held)
    for _ in range(how.epochs):
        for i in torch.randperm(len(xs) - held, generator=order).tolist():
            adam.param_groups[0]["lr"] = how.lr * min(1, (step + 1) / (0.1 * steps)) * (1 - step / steps)
            adam.zero_grad()
            loss(xs[i], ts[i]).backward()
            for p, mask in zip(block.parameters(), masks):
                p.grad *= mask
            adam.step()
            step += 1
        found.append(judged())
    block.load_state_dict(min(found, key=lambda pair: pair[0])[1])


def by_hand(net: Net, batches: list[Tensor], how: Reconstruct) -> None:
    """Magnitude at 50 % and the training, as a plain loop over plain blocks."""
    dense = copy.deepcopy(net)
    xs, ds = list(batches), list(batches)
    for block, true in zip([net.into, *net.blocks], [dense.into, *dense.blocks]):
        for layer in (m for m in block.modules() if isinstance(m, nn.Linear)):
            layer.weight.data = halved(layer.weight.data)
        ts = [true(d).detach() for d in ds]
        trained_by_hand(block, xs, ts, how)
        inside = block is not net.into
        xs = [x + block(x).detach() if inside else block(x).detach() for x in xs]
        ds = [d + t if inside else t for d, t in zip(ds, ts)]


def test_it_is_the_loop_written_out_by_hand():
    want, got, batches = Net(), Net(), rows(8)
    by_hand(want, batches, EXACT)
    prune(got, "magnitude", density=0.5, pattern="unstructured", data=batches, skip=["out"], reconstruct=EXACT)
    for name, p in want.named_parameters():
        torch.testing.assert_close(got.get_parameter(name), p, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("method, pattern", [("alps", "2:4"), ("wanda", "row"), ("magnitude", "unstructured")])
@pytest.mark.parametrize("how", [EXACT, Reconstruct(epochs=2)])
def test_supports_are_exact_and_no_block_gets_worse_on_held_out_batches(method, pattern, how):
    model, kept = llama(), llama()
    report = prune(model, method, pattern=pattern, data=tokens(9), reconstruct=how, skip=["*.k_proj"])
    assert report.density == 0.5 and [name for name, _ in report.blocks] == ["model.layers.0", "model.layers.1"]
    assert all(fit.after <= fit.before and (fit.epoch > 0) == (fit.after < fit.before) for _, fit in report.blocks)
    for name, p in model.named_parameters():
        untouched = "k_proj" in name or "embed" in name or name in ("lm_head.weight", "model.norm.weight")
        assert torch.equal(p, kept.get_parameter(name)) == untouched or "norm" in name, name
        assert p.requires_grad and p.grad is None
    assert all((~m.weight.bool()).sum() == m.weight.numel() / 2 for m in (model.model.layers[1].mlp.down_proj,))


def test_what_the_model_gives_comes_closer_to_the_dense_model_on_unseen_batches():
    dense, plain, trained = Net(), Net(), Net()
    batches, unseen = rows(16), rows(4, seed=9)
    prune(plain, "wanda", density=0.5, data=batches)
    prune(trained, "wanda", density=0.5, data=batches, reconstruct=Reconstruct(epochs=10, lr=3e-3))
    plainly, then = (sum((net(x) - dense(x)).square().sum().item() for x in unseen) for net in (plain, trained))
    assert then < 0.7 * plainly


def test_padding_has_no_part_in_it():
    batches = tokens(4)
    for b in batches:
        b["attention_mask"] = torch.ones(2, 12, dtype=torch.long)
        b["attention_mask"][1, 7:] = 0
    changed = copy.deepcopy(batches)
    for b in changed:
        b["input_ids"][1, 7:] = 5
    first, second = llama(), llama()
    for model, data in ((first, batches), (second, changed)):
        prune(model, "wanda", density=0.5, data=data, reconstruct=EXACT)
    for a, b in zip(first.parameters(), second.parameters()):
        torch.testing.assert_close(a, b)


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [1, 5, 9])
def test_a_killed_run_goes_on_from_its_last_finished_block(at, tmp_path):
    whole, stopped = Net(), Net()
    options = dict(density=0.5, data=rows(6), reconstruct=EXACT)
    want = prune(whole, "wanda", **options)

    def die(layer: str, done: int, total: int) -> None:
        if done == min(at, total):
            raise Killed

    with pytest.raises(Killed):
        prune(stopped, "wanda", workdir=tmp_path, progress=die, **options)
    again = Net()
    report = prune(again, "wanda", workdir=tmp_path, **options)
    for a, b in zip(whole.parameters(), again.parameters()):
        assert torch.equal(a, b)
    assert [n for n, _ in report.blocks] == [n for n, _ in want.blocks]
    assert all(math.isclose(a.after, b.after) for (_, a), (_, b) in zip(report.blocks, want.blocks))
    assert any(r.resumed for r in report.layers) == (at > 1)
    with pytest.raises(TargetError, match="reconstruct"):
        prune(Net(), "wanda", workdir=tmp_path, **{**options, "reconstruct": Reconstruct(epochs=1)})


def test_low_precision_ends_where_solvers_begin():
    def score(w: Tensor, stats: dict[str, Tensor]) -> Tensor:
        assert not torch.is_autocast_enabled("cpu") and stats["gram"].dtype == torch.float32
        asked.append((w @ stats["gram"]).dtype)
        return w.abs()

    asked: list[torch.dtype] = []
    sparsifier = replace(gossamer.get_method("wanda")(density=0.5), score=score, needs=("gram",))
    prune(llama(), sparsifier, data=tokens(3), reconstruct=Reconstruct(epochs=1))
    assert set(asked) == {torch.float32} and len(asked) == 14


def test_half_types_and_modes_are_given_back():
    model = llama().to(torch.bfloat16).train()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    prune(model, "magnitude", density=0.5, data=tokens(3), reconstruct=Reconstruct(epochs=1))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and model.training
    assert not model.model.layers[0].mlp.up_proj.weight.requires_grad
    assert torch.is_grad_enabled()


def test_experts_that_no_token_reached_stay_dense_and_are_named():
    class Routed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.blocks[0].append(nn.Linear(16, 16))
            self.blocks[0][4].forward = lambda x: x

    net = Routed()
    kept = net.blocks[0][4].weight.clone()
    net.blocks[0].forward = lambda x: net.blocks[0][3](net.blocks[0][1](x))
    report = prune(net, "wanda", density=0.5, data=rows(3), reconstruct=EXACT)
    assert ("blocks.0.4", "no calibration batch reached it; left dense") in report.skipped
    assert torch.equal(net.blocks[0][4].weight, kept)


def test_what_cannot_be_done_is_said():
    with pytest.raises(BudgetError, match="Reconstruct"):
        Reconstruct(lr=0)
    for options, what in (
        (dict(method="snip", data=rows(2), loss=lambda y, t: y.sum()), "all layers together"),
        (dict(method="global_magnitude", data=rows(2)), "all layers together"),
        (dict(method="magnitude", data=rows(2), offload=True, workdir="nowhere"), "offload"),
    ):
        with pytest.raises(TargetError, match=what):
            prune(Net(), density=0.5, reconstruct=EXACT, **options)
    with pytest.raises(CalibrationError, match="data="):
        prune(Net(), "magnitude", density=0.5, reconstruct=EXACT)
    assert gossamer.Reconstruct is Reconstruct
