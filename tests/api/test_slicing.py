"""slice: computational invariance, real shapes, save and load, resumption, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch

import gossamer
from gossamer.core.errors import BudgetError, CalibrationError, DispatchError, NonFiniteError, TargetError
from gossamer.nn.sliced import is_sliced

transformers = pytest.importorskip("transformers")

WIDE, WORDS = 32, 64
SIZES = {"hidden_size": WIDE, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMAS = {**SIZES, "vocab_size": WORDS, "num_key_value_heads": 2, "max_position_embeddings": 64}


def _opt(**options):
    return transformers.OPTConfig(
        **{k: v for k, v in SIZES.items() if k != "intermediate_size"},
        **{"ffn_dim": 48, "word_embed_proj_dim": WIDE, "vocab_size": WORDS, "max_position_embeddings": 64, **options},
    )


def build(kind: str):
    t = transformers
    made = {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**LLAMAS, tie_word_embeddings=True, rms_norm_eps=1e-3)),
        "llama-untied": lambda: t.LlamaForCausalLM(t.LlamaConfig(**LLAMAS, tie_word_embeddings=False)),
        "llama-body": lambda: t.LlamaModel(t.LlamaConfig(**LLAMAS)),
        "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**LLAMAS, head_dim=8)),
        "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**LLAMAS)),
        "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**LLAMAS, head_dim=8)),
        "smollm3": lambda: t.SmolLM3ForCausalLM(t.SmolLM3Config(**LLAMAS, pad_token_id=0)),
        "gemma": lambda: t.GemmaForCausalLM(t.GemmaConfig(**LLAMAS, head_dim=8)),
        "phi3": lambda: t.Phi3ForCausalLM(t.Phi3Config(**LLAMAS, pad_token_id=0)),
        "starcoder2": lambda: t.Starcoder2ForCausalLM(t.Starcoder2Config(**LLAMAS)),
        "opt": lambda: t.OPTForCausalLM(_opt()),
        "opt-untied": lambda: t.OPTForCausalLM(_opt(tie_word_embeddings=False)),
        "gpt2": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(n_embd=WIDE, n_layer=2, n_head=4, vocab_size=WORDS, n_positions=64)
        ),
        "bert": lambda: t.BertForMaskedLM(t.BertConfig(**SIZES, vocab_size=WORDS)),
        "roberta": lambda: t.RobertaModel(t.RobertaConfig(**SIZES, vocab_size=WORDS)),
    }
    torch.manual_seed(0)
    model = made[kind]().eval()
    with torch.no_grad():  # norms that have been trained, and means that are not zero
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.add_(torch.randn_like(p) * 0.3)
            elif "emb" in name or "wte" in name:
                p.add_(0.3)
            p.mul_(1.5)
    return model


KINDS = (
    *("llama", "llama-untied", "llama-body", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "phi3", "starcoder2"),
    *("opt", "opt-untied", "gpt2", "bert", "roberta"),
)


def batches(count=4, length=16, seed=1):
    ids = torch.randint(3, WORDS, (count, 2, length), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": part} for part in ids]


def output(model, **inputs):
    inputs = inputs or batches(1, seed=9)[0]
    with torch.no_grad():
        return model(**inputs)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_rotating_without_deleting_changes_nothing(kind):
    model = build(kind)
    before, counted = output(model), sum(p.numel() for p in model.parameters())
    report = gossamer.slice(model, keep=1.0, data=batches())
    assert is_sliced(model) and report.width == WIDE and report.parameters > counted
    torch.testing.assert_close(output(model), before, rtol=1e-4, atol=1e-4)
    *_, last = [m for m in model.modules() if hasattr(m, "feed_joint")]
    assert (last.feed_joint.shortcut.weight - torch.eye(WIDE)).abs().max() > 0.1  # it was turned, and back


@pytest.mark.parametrize("kind", KINDS)
def test_sliced_models_are_smaller_run_train_and_come_back_from_disk(kind, tmp_path):
    model = build(kind)
    before = output(model)
    report = gossamer.slice(model, keep=0.5, data=batches())
    after = output(model)
    assert (
        report.width == 16 and report.products < report.products_before and report.parameters < report.parameters_before
    )
    assert after.shape == before.shape and not torch.equal(after, before)
    assert not any(p.dim() == 2 and p.shape[1] == WIDE and "q_proj" in n for n, p in model.named_parameters())
    gossamer.save(model, tmp_path / "sliced")
    loaded = gossamer.load(tmp_path / "sliced")
    torch.testing.assert_close(output(loaded), after, rtol=0, atol=0)
    assert {n: p.shape for n, p in loaded.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    torch.testing.assert_close(output(copy.deepcopy(model)), after, rtol=0, atol=0)
    model.train()
    model(**batches(1)[0])[0].square().mean().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "pooler" not in n)


def test_generation_with_a_cache_and_recorded_states_work_as_before():
    model = build("llama")
    want = model.generate(**batches(1)[0], max_new_tokens=5, do_sample=False, pad_token_id=0)
    gossamer.slice(model, keep=1.0, data=batches())
    assert torch.equal(model.generate(**batches(1)[0], max_new_tokens=5, do_sample=False, pad_token_id=0), want)
    gossamer.slice(narrow := build("gpt2"), keep=0.5, data=batches())
    out = narrow(**batches(1)[0], output_hidden_states=True)
    assert [h.shape[-1] for h in out.hidden_states] == [WIDE, 16, WIDE]
    with_cache = narrow.generate(**batches(1)[0], max_new_tokens=5, do_sample=False, pad_token_id=0)
    without = narrow.generate(**batches(1)[0], max_new_tokens=5, do_sample=False, pad_token_id=0, use_cache=False)
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_each_place_keeps_what_holds_the_energy_asked_for(kind, tmp_path):
    fractions, places = (0.9, 0.97, 0.99, 0.997), []
    for energy in fractions:
        model = build(kind)
        report = gossamer.slice(model, energy=energy, data=batches())
        widths = [p.width for p in report.places]
        assert report.width == max(widths) and report.keep == pytest.approx(sum(widths) / len(widths) / WIDE)
        assert all(p.energy >= energy and p.width % 8 == 0 for p in report.places)
        places.append(widths)
    assert any(len(set(widths)) > 1 for widths in places)
    assert all(sum(fewer) <= sum(more) for fewer, more in zip(places, places[1:])) and sum(places[0]) < sum(places[-1])
    gossamer.save(model, tmp_path / "ragged")
    assert torch.equal(output(gossamer.load(tmp_path / "ragged")), output(model))
    whole = build(kind)
    before = output(whole)
    assert gossamer.slice(whole, energy=1.0, data=batches()).width == WIDE
    torch.testing.assert_close(output(whole), before, rtol=1e-4, atol=1e-4)


def test_a_vision_transformer_is_sliced_too(tmp_path):
    sizes = {**SIZES, "image_size": 16, "patch_size": 4, "num_labels": 5}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes)).eval()
    pictures = [{"pixel_values": part} for part in torch.randn(3, 2, 3, 16, 16)]
    before = output(model, **pictures[0])
    narrow = copy.deepcopy(model)
    gossamer.slice(model, keep=1.0, data=pictures)
    torch.testing.assert_close(output(model, **pictures[0]), before, rtol=1e-4, atol=1e-4)
    report = gossamer.slice(narrow, keep=0.75, data=pictures)
    assert report.width == 24 and report.tokens == 3 * 2 * 17 and report.parameters < report.parameters_before
    gossamer.save(narrow, tmp_path / "vit")
    loaded = gossamer.load(tmp_path / "vit")
    assert torch.equal(output(loaded, **pictures[0]), output(narrow, **pictures[0]))


def test_padding_does_not_enter_the_axes():
    short = [{"input_ids": b["input_ids"][:, :12]} for b in batches()]
    padded = []
    for b in short:
        ids = torch.cat([b["input_ids"], torch.full((2, 4), 1)], 1)
        padded.append({"input_ids": ids, "attention_mask": torch.ones_like(ids).index_fill(1, torch.arange(12, 16), 0)})
    one, other = build("llama"), build("llama")
    gossamer.slice(one, keep=0.5, data=short)
    report = gossamer.slice(other, keep=0.5, data=padded)
    assert report.tokens == 4 * 2 * 12
    torch.testing.assert_close(output(one), output(other), rtol=1e-3, atol=1e-3)


def test_a_killed_run_goes_on_and_ends_alike(tmp_path):
    whole = build("opt")
    full = gossamer.slice(whole, keep=0.5, data=batches())

    class Killed(Exception):
        pass

    def kill(name, done, total):
        if done == 3:
            raise Killed

    broken = build("opt")
    with pytest.raises(Killed):
        gossamer.slice(broken, keep=0.5, data=batches(), workdir=tmp_path, progress=kill)
    assert output(broken).isfinite().all()  # sliced as far as it got, and it runs
    again = build("opt")
    report = gossamer.slice(again, keep=0.5, data=batches(), workdir=tmp_path)
    assert report.resumed == 3 and full.resumed == 0
    assert [p.energy for p in report.places] == [p.energy for p in full.places]
    torch.testing.assert_close(output(again), output(whole), rtol=0, atol=0)
    with pytest.raises(TargetError, match="data"):
        gossamer.slice(build("opt"), keep=0.5, data=batches(seed=2), workdir=tmp_path)
    other = build("opt")
    with torch.no_grad():
        other.model.decoder.layers[0].fc2.weight.mul_(2)
    with pytest.raises(TargetError, match="other weights"):
        gossamer.slice(other, keep=0.5, data=batches(), workdir=tmp_path)


def test_half_precision_stays_half_precision():
    model = build("llama").bfloat16()
    before = output(model)
    gossamer.slice(model, keep=1.0, data=batches())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert (output(model) - before).abs().max() < 0.1 * before.abs().max()


def _crossed():
    config = transformers.BertConfig(**SIZES, vocab_size=WORDS, is_decoder=True, add_cross_attention=True)
    return transformers.BertModel(config)


def _gemma2():
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**LLAMAS, head_dim=8))


def _masked():
    model = build("llama")
    gossamer.attach(
        model, "set", density=0.5, every=3, total_steps=9, optimizer=torch.optim.SGD(model.parameters(), 0.1)
    )
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.nn.Linear(3, 3), "blocks of no kind"),
        (_crossed, "cross-attention reads"),
        (_gemma2, "norms scale what"),
        (lambda: transformers.OPTForCausalLM(_opt(word_embed_proj_dim=16)), "project_in"),
        (lambda: transformers.OPTForCausalLM(_opt(do_layer_norm_before=False)), "block 0"),
        (_masked, "not a plain linear layer"),
    ],
)
def test_models_that_cannot_be_sliced_are_told_why(make, words):
    with pytest.raises(TargetError, match=words):
        gossamer.slice(make(), data=batches())


def test_bad_input_is_refused_before_anything_changes():
    model = build("llama")
    before = output(model)
    for keep in (0.0, 1.1, 0.1):
        with pytest.raises(BudgetError, match="keep"):
            gossamer.slice(model, keep=keep, data=batches())
    for both in ({"energy": 0.0}, {"energy": 1.5}, {"keep": 0.5, "energy": 0.9}):
        with pytest.raises(BudgetError, match="energy"):
            gossamer.slice(model, **both, data=batches())
    with pytest.raises(CalibrationError, match="pass data="):
        gossamer.slice(model, data=[])
    with pytest.raises(CalibrationError, match="32 calibration tokens"):
        gossamer.slice(model, data=batches(1))
    assert torch.equal(output(model), before) and not is_sliced(model)
    assert type(model.model.layers[0]) is type(build("llama").model.layers[0])
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"down_proj\.weight"):
        gossamer.slice(model, data=batches())
    gossamer.slice(sliced := build("llama"), data=batches())
    with pytest.raises(TargetError, match="already"):
        gossamer.slice(sliced, data=batches())
    with pytest.raises(DispatchError, match="sliced"):
        gossamer.Decoder(sliced)


def test_a_stream_that_overflows_is_named():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(3e38)
        model.model.layers[0].mlp.up_proj.weight.mul_(1e6)
    with pytest.raises(NonFiniteError, match=r"layers\.0\.feed_joint"):
        gossamer.slice(model, data=batches())


def test_sliced_models_are_pruned_and_packed_like_others():
    model = build("llama")
    gossamer.slice(model, keep=0.5, data=batches())
    gossamer.prune(model, "magnitude", density=0.25)
    want = output(model)
    packed = gossamer.pack(model, batches(1)[0], repeats=1)
    torch.testing.assert_close(output(packed), want, rtol=1e-4, atol=1e-4)
