"""Calibration: one paused pass per batch, on every kind of model users bring."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from gossamer.attach import Collector, find, stream
from gossamer.attach.blocks import blocks_of
from gossamer.attach.statistics import columns
from gossamer.core.errors import CalibrationError, NonFiniteError, TargetError

transformers = pytest.importorskip("transformers")

SMALL = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
TOKENS = torch.arange(24).view(2, 12) % 30


def bert() -> tuple[nn.Module, dict[str, Tensor]]:
    return transformers.BertModel(transformers.BertConfig(vocab_size=32, **SMALL)), {"input_ids": TOKENS}


def llama() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.LlamaConfig(vocab_size=32, num_key_value_heads=1, **SMALL)
    return transformers.LlamaForCausalLM(config), {"input_ids": TOKENS}


def gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config), {"input_ids": TOKENS}


def opt() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.OPTConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=32, word_embed_proj_dim=16
    )
    return transformers.OPTForCausalLM(config), {"input_ids": TOKENS}


def t5() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config), {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :7]}


def vit() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.ViTConfig(image_size=16, patch_size=8, **SMALL)
    return transformers.ViTModel(config), {"pixel_values": torch.randn(2, 3, 16, 16)}


def plain() -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 5))
    return net, torch.randn(2, 3, 8, 8)


MODELS = [bert, llama, gpt2, opt, t5, vit, plain]


def run(model: nn.Module, batch: object) -> Tensor:
    out = model(**batch) if isinstance(batch, dict) else model(batch)
    return out if isinstance(out, Tensor) else out[0]


def recorded_inputs(model: nn.Module, batches: list[object], names: list[str]) -> dict[str, list[Tensor]]:
    """What an ordinary forward feeds each layer."""
    seen: dict[str, list[Tensor]] = {n: [] for n in names}
    hooks = [
        model.get_submodule(n).register_forward_pre_hook(lambda m, args, n=n: seen[n].append(args[0])) for n in names
    ]
    with torch.no_grad():
        for batch in batches:
            run(model.eval(), batch)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("make", MODELS, ids=lambda f: f.__name__)
def test_every_layer_sees_what_an_ordinary_forward_feeds_it(make) -> None:
    torch.manual_seed(0)
    model, batch = make()
    batches = [batch, batch, batch]
    targets = find(model).targets
    want = recorded_inputs(model, batches, [t.name for t in targets])
    got: dict[str, list[Tensor]] = {}
    unreached = stream(model, batches, targets, lambda a: got.__setitem__(a.target.name, list(a.inputs)))
    assert set(got) | set(unreached) == set(want)
    assert {n for n in unreached} == {n for n, xs in want.items() if not xs}  # ViT's pooler, say
    for name, xs in got.items():
        for a, b in zip(xs, want[name], strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("make", MODELS, ids=lambda f: f.__name__)
def test_later_layers_see_the_effect_of_pruning_earlier_ones(make) -> None:
    """Zeroing each layer when reached leaves exactly the inputs that the finished model feeds its layers."""
    torch.manual_seed(0)
    model, batch = make()
    targets = find(model).targets
    got: dict[str, Tensor] = {}

    def visit(arrival) -> None:
        got[arrival.target.name] = arrival.inputs[0].clone()
        arrival.target.write(model, arrival.target.weight(model) * 0.5)

    stream(model, [batch], targets, visit)
    want = recorded_inputs(model, [batch], list(got))
    assert len(got) > 1
    for name, x in got.items():
        torch.testing.assert_close(x, want[name][0])


def test_hooks_are_gone_and_mode_is_restored_afterwards() -> None:
    model, batch = plain()
    model.train()
    stream(model, [batch], find(model).targets, lambda a: None)
    assert model.training
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_interrupt_leaves_no_hook_and_no_pass_behind() -> None:
    model, batch = plain()

    def visit(arrival) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream(model, [batch, batch], find(model).targets, visit)
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert run(model, batch).shape == (2, 5)


def test_padding_does_not_enter_statistics() -> None:
    torch.manual_seed(0)
    model, _ = bert()
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 5:] = 0
    stats: dict[str, dict[str, Tensor]] = {}
    collect = Collector(("input_norm", "gram"))
    target = next(t for t in find(model).targets if t.name.endswith("layer.0.attention.self.query"))

    def visit(arrival) -> None:
        stats["got"] = dict(collect(arrival, target.module(model)))
        stats["x"] = {"x": arrival.inputs[0]}

    stream(model, [{"input_ids": TOKENS, "attention_mask": mask}], [target], visit)
    x = stats["x"]["x"][mask.bool()].double()
    assert int(stats["got"]["tokens"]) == 17
    torch.testing.assert_close(stats["got"]["input_norm"].double(), x.square().mean(0).sqrt(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats["got"]["gram"].double(), x.T @ x / 17, rtol=1e-4, atol=1e-5)


def test_statistics_of_several_batches_add_up() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 3)
    xs = [torch.randn(n, 6) + 1000 for n in (4, 1, 9)]  # a large mean, beside which a variance is small
    held = {}
    collect = Collector(("input_norm", "input_mean", "input_var", "gram"))
    stream(layer_net := nn.Sequential(layer), xs, find(layer_net).targets, lambda a: held.update(collect(a, layer)))
    x = torch.cat(xs).double()
    torch.testing.assert_close(held["gram"].double(), x.T @ x / 14, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(held["input_norm"].double(), x.square().mean(0).sqrt(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(held["input_mean"].double(), x.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(held["input_var"].double(), x.var(0, unbiased=False), rtol=1e-5, atol=0)


def test_layers_fed_by_one_tensor_share_its_gram_and_others_do_not() -> None:
    model, batch = llama()
    collect, grams = Collector(("gram",)), {}
    targets = find(model).targets
    stream(
        model, [batch], targets, lambda a: grams.__setitem__(a.target.name, collect(a, a.target.module(model))["gram"])
    )
    layer = "model.layers.0.self_attn."
    assert grams[layer + "q_proj"] is grams[layer + "k_proj"]
    assert grams[layer + "q_proj"] is not grams[layer + "o_proj"]


@pytest.mark.parametrize("conv", [nn.Conv2d(3, 4, 3, 2, 1, dilation=2), nn.Conv1d(3, 4, 5, 2, 2)], ids=["2d", "1d"])
def test_conv_columns_are_what_the_flat_weight_multiplies(conv: nn.Module) -> None:
    x = torch.randn(2, 3, 11, 12) if isinstance(conv, nn.Conv2d) else torch.randn(2, 3, 11)
    want = conv(x)
    got = (columns(x, conv) @ conv.weight.flatten(1).T + conv.bias).view(2, -1, 4).transpose(1, 2).view_as(want)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_errors_say_what_and_how() -> None:
    model, batch = plain()
    targets = find(model).targets
    with pytest.raises(CalibrationError, match="no calibration batch"):
        stream(model, [], targets, lambda a: None)
    with pytest.raises(CalibrationError, match="forward failed"):
        stream(model, [torch.randn(2, 5)], targets, lambda a: None)
    bad = batch.clone()
    bad[0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="layer '0'"):
        stream(model, [bad], targets, lambda a: Collector(("input_norm",))(a, a.target.module(model)))
    with pytest.raises(TargetError, match=r"matches none.*'3'"):
        find(model, ["33"])
    with pytest.raises(TargetError, match="no linear, convolution or recurrent"):
        find(nn.Sequential(nn.ReLU()))


def test_output_head_is_left_out_unless_named_and_tied_weights_count_once() -> None:
    model, _ = gpt2()
    found = find(model)
    assert "lm_head" in dict(found.skipped)
    assert [t.name for t in find(model, ["lm_head"]).targets] == ["lm_head"]
    twin = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    twin[1].weight = twin[0].weight
    found = find(twin)
    assert [t.name for t in found.targets] == ["0"]
    assert "tied with 0" in dict(found.skipped)["1"]


def test_experts_no_batch_visits_are_named() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
            self.out = nn.Linear(4, 2)

        def forward(self, x: Tensor, which: int) -> Tensor:
            return self.out(self.experts[which](x))

    model, seen = Routed(), []
    batches = [(torch.randn(3, 4), 0), (torch.randn(5, 4), 2), (torch.randn(7, 4), 0)]
    unreached = stream(model, batches, find(model).targets, lambda a: seen.append((a.target.name, len(a.inputs))))
    assert unreached == ["experts.1"]
    assert seen == [("experts.0", 2), ("experts.2", 1), ("out", 3)]


def test_parallel_convolutions_with_other_geometry_do_not_share_statistics() -> None:
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.near, self.far = nn.Conv2d(3, 2, 3, padding=1), nn.Conv2d(3, 2, 3, padding=3, dilation=3)

        def forward(self, x: Tensor) -> Tensor:
            return self.near(x) + self.far(x)

    model, collect, grams = Parallel(), Collector(("gram",)), {}
    x = torch.randn(2, 3, 9, 9)
    stream(model, [x], find(model).targets, lambda a: grams.update({a.target.name: collect(a, a.target.module(model))}))
    for name in ("near", "far"):
        cols = columns(x, model.get_submodule(name))
        torch.testing.assert_close(grams[name]["gram"], cols.T @ cols / len(cols), rtol=1e-4, atol=1e-5)


def test_every_module_comes_back_in_the_mode_it_was_in() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    model[1].eval()
    stream(model, [torch.randn(5, 4)], find(model).targets, lambda a: None)
    assert [m.training for m in model] == [True, False, True] and model.training


def test_autocast_inside_a_forward_stays_inside_it() -> None:
    class Halved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                x = self.first(x)
                x = self.second(x)
            return x

    model, seen = Halved(), []
    batches = [torch.randn(3, 4) for _ in range(3)]

    def visit(arrival) -> None:
        seen.append((arrival.inputs[0].dtype, torch.is_autocast_enabled("cpu")))

    stream(model, batches, find(model).targets, visit)
    assert seen == [(torch.float32, False), (torch.bfloat16, False)]
    assert not torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()


def test_inference_mode_in_a_forward_is_refused_and_does_not_leak() -> None:
    class Sealed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Sealed(4, 4)

        @torch.inference_mode()
        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    model = Model()
    with pytest.raises(CalibrationError, match="no_grad"):
        stream(model, [torch.randn(3, 4)] * 2, find(model).targets, lambda a: None)
    assert not torch.is_inference_mode_enabled()


def test_cross_attention_counts_the_encoders_tokens_and_the_decoder_its_own() -> None:
    torch.manual_seed(0)
    model, _ = t5()
    source, target = torch.ones(2, 12, dtype=torch.long), torch.ones(2, 7, dtype=torch.long)
    source[0, 9:], target[1, 4:] = 0, 0
    batch = {
        "input_ids": TOKENS,
        "attention_mask": source,
        "decoder_input_ids": TOKENS[:, :7],
        "decoder_attention_mask": target,
    }
    counted: dict[str, int] = {}
    collect = Collector(("input_norm",))

    def visit(arrival) -> None:
        counted[arrival.target.name] = int(collect(arrival, arrival.target.module(model))["tokens"])

    stream(model, [batch], find(model).targets, visit)
    assert counted["encoder.block.0.layer.0.SelfAttention.q"] == 21
    assert counted["decoder.block.0.layer.0.SelfAttention.k"] == 11
    assert counted["decoder.block.0.layer.1.EncDecAttention.k"] == 21
    assert counted["decoder.block.0.layer.1.EncDecAttention.q"] == 11


BLOCKS = [bert, llama, gpt2, opt, t5, vit]


@pytest.mark.parametrize("make", BLOCKS, ids=lambda f: f.__name__)
def test_by_blocks_each_layer_sees_its_own_block_unchanged_and_those_before_it_changed(make) -> None:
    """The usual procedure, written plainly: for each block, an ordinary forward, then all of its layers change."""
    torch.manual_seed(0)
    model, batch = make()
    model.eval()
    plain_twin = copy.deepcopy(model)
    targets = find(model).targets
    blocks = blocks_of(model, targets)
    inside = {name: names for names in blocks.values() for name in names}
    assert len(inside) >= len(targets) - 2  # ViT has a patch embedding and a pooler outside
    groups = dict.fromkeys(inside.get(t.name, (t.name,)) for t in targets)  # in the order the model runs them
    expected: dict[str, list[Tensor]] = {}
    for group in groups:
        expected |= recorded_inputs(plain_twin, [batch], list(group))
        with torch.no_grad():
            for name in group:
                plain_twin.get_submodule(name).weight.mul_(0.5)
    seen: dict[str, list[Tensor]] = {}

    def leave(done) -> None:
        for t in done:
            t.write(model, t.weight(model) * 0.5)

    stream(model, [batch], targets, lambda a: seen.setdefault(a.target.name, a.inputs), leave, sequential="block")
    for name, inputs in expected.items():
        torch.testing.assert_close(seen[name][0], inputs[0])
    for name, w in model.state_dict().items():
        assert torch.equal(w, plain_twin.state_dict()[name])


def test_blocks_are_the_entries_of_the_outermost_lists() -> None:
    config = transformers.MixtralConfig(vocab_size=32, num_key_value_heads=1, num_local_experts=2, **SMALL)
    model = transformers.MixtralForCausalLM(config)
    assert list(blocks_of(model, find(model).targets)) == ["model.layers.0", "model.layers.1"]
    assert blocks_of(plain()[0], find(plain()[0]).targets) == {}


def test_a_block_that_writes_into_its_inputs_cannot_run_twice() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x.add_(self.inner(x))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([Writes()])

        def forward(self, x: Tensor) -> Tensor:
            return self.parts[0](x * 1)

    model = Net()
    run_it = lambda order: stream(model, [torch.ones(2, 4)], find(model).targets, lambda a: None, sequential=order)
    assert run_it("layer") == []
    with pytest.raises(CalibrationError, match=r"'parts.0' writes into its own inputs.*sequential='layer'"):
        run_it("block")


def test_the_cache_setting_of_a_model_is_given_back() -> None:
    model, batch = llama()
    stream(model, [batch], find(model).targets, lambda a: None, sequential="block")
    assert model.config.use_cache
    with pytest.raises(CalibrationError, match="key-value cache"):
        stream(model, [{**batch, "use_cache": True}], find(model).targets, lambda a: None, sequential="block")
