"""The decoder against transformers' own Llama: logits, tokens, packed weights, refusals, one caller at a time."""

import threading
from functools import partial

import pytest
import torch

from gossamer.core.errors import DispatchError, FormatError
from gossamer.formats import Int4Groups, TileBitmask
from gossamer.kernels.cpu import decode, target
from gossamer.nn import PackedLinear

transformers = pytest.importorskip("transformers")
WHY = target.supports("bitmask_bfloat16") or target.supports("int4groups")
pytestmark = pytest.mark.skipif(WHY is not None, reason=str(WHY))


def llama(**changes):
    options = dict(
        vocab_size=160, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**options | changes)).eval()


def decoder(model, **options):
    from gossamer.runtime.decoder import Decoder

    return Decoder(model, **{"max_tokens": 40} | options)


def prompt(count=20):
    return torch.randint(0, 160, (1, count), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def wanted(model, ids):
    return model(ids).logits[0].float()


def zero_half(model):
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name:
                weight[torch.rand(weight.shape) < 0.5] = 0
    return model


SHAPES = [{}, {"head_dim": 32}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1, "head_dim": 8}]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_every_logit_matches_the_model(shape, threads, monkeypatch):
    monkeypatch.setattr(decode, "GRAIN", 1)
    model, ids = zero_half(llama(**shape)), prompt(33)
    made = decoder(model, threads=threads)
    got = torch.stack([made.step(int(i)) for i in ids[0]])
    torch.testing.assert_close(got, wanted(model, ids), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torch_s_default_dtype_has_no_say(dtype):
    model, ids = zero_half(llama()), prompt(12)
    want = wanted(model, ids)
    torch.set_default_dtype(dtype)
    try:
        made = decoder(model)
        got = torch.stack([made.step(int(i)) for i in ids[0]])
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_bfloat16_is_as_close_as_bfloat16_is():
    model, ids = zero_half(llama()), prompt()
    exact = wanted(model, ids)
    half = model.bfloat16()
    theirs = (wanted(half, ids) - exact).abs().max()
    made = decoder(half)
    ours = (torch.stack([made.step(int(i)) for i in ids[0]]) - exact).abs().max()
    assert float(ours) < 1.5 * float(theirs)


def test_generate_gives_the_model_s_tokens_and_prefill_its_last_logits():
    model, ids = llama(tie_word_embeddings=False), prompt(12)
    made = decoder(model)
    torch.testing.assert_close(made.prefill(ids), wanted(model, ids)[-1], atol=1e-5, rtol=1e-4)
    made.reset()
    theirs = model.generate(ids, max_new_tokens=10, do_sample=False, pad_token_id=0)[0, 12:].tolist()
    assert made.generate(ids[0].tolist(), len(theirs)) == theirs
    made.reset()
    assert made.generate(ids, 10, stop=[theirs[0]]) == theirs[:1]
    made.reset()
    assert made.generate(ids, 3, choose=lambda logits: 5) == [5, 5, 5]


@pytest.mark.parametrize("kind", ["llama3", "linear"])
def test_rotary_scalings_are_the_model_s(kind):
    bands = dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
    extra = bands if kind == "llama3" else {}
    model = llama(rope_parameters={"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, **extra})
    made, ids = decoder(model), prompt()
    torch.testing.assert_close(made.prefill(ids), wanted(model, ids)[-1], atol=1e-5, rtol=1e-4)


def test_packed_layers_run_as_they_are_stored():
    model, ids = zero_half(llama()).bfloat16(), prompt()
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, layer in list(part.named_children()):
                if isinstance(layer, torch.nn.Linear):
                    pick = TileBitmask if name == "o_proj" else partial(Int4Groups.from_dense, density=0.5)
                    setattr(part, name, PackedLinear.from_linear(layer, pick))
    made = decoder(model)
    torch.testing.assert_close(made.prefill(ids), wanted(model, ids)[-1], atol=0.05, rtol=0.05)
    assert isinstance(made._layers[0].qkv.stored, Int4Groups) and isinstance(made._layers[0].o.stored, TileBitmask)


def test_the_head_can_be_stored_otherwise():
    model, ids = llama().bfloat16(), prompt()
    plain, small = decoder(model), decoder(model, head=Int4Groups.from_dense)
    assert small.nbytes < plain.nbytes
    logits = plain.prefill(ids)
    assert float((small.prefill(ids) - logits).abs().max()) < 0.2 * float(logits.abs().max())


def test_a_full_cache_strange_tokens_and_an_empty_prompt_are_refused():
    made = decoder(llama(), max_tokens=16)
    with pytest.raises(ValueError, match="at least one"):
        made.prefill([])
    with pytest.raises(ValueError, match="vocabulary"):
        made.step(160)
    made.prefill(prompt(16))
    with pytest.raises(ValueError, match="max_tokens"):
        made.step(1)
    made.reset()
    assert made.step(1).isfinite().all() and made.position == 1


def test_one_caller_at_a_time():
    from gossamer.runtime.decoder import DecoderBusy

    made, inside, leave = decoder(llama()), threading.Event(), threading.Event()
    worker = threading.Thread(target=lambda: made._alone(lambda: (inside.set(), leave.wait(5))))
    worker.start()
    inside.wait(5)
    with pytest.raises(DecoderBusy, match="one decoder per sequence"):
        made.step(1)
    leave.set()
    worker.join()
    assert made.step(1).isfinite().all()


def test_what_is_not_served_is_said():
    with pytest.raises(DispatchError, match="LlamaForCausalLM"):
        decoder(torch.nn.Linear(2, 2))
    with pytest.raises(DispatchError, match="silu"):
        decoder(llama(hidden_act="gelu"))
    with pytest.raises(DispatchError, match="cast"):
        decoder(llama().half())
    with pytest.raises(DispatchError, match="biases"):
        decoder(llama(attention_bias=True))
    with pytest.raises(FormatError, match="multiple of 8"):
        decoder(llama(head_dim=4))
    with pytest.raises(FormatError, match="multiple of 16"):
        decoder(llama(intermediate_size=72))


def test_rewinding_forgets_what_came_after():
    model, ids = zero_half(llama()), prompt(12)
    made = decoder(model)
    want = made.prefill(ids)
    made.rewind(5)
    torch.testing.assert_close(made.prefill(ids[:, 5:]), want)
    for far in (-1, 13):
        with pytest.raises(ValueError, match="12 tokens were read"):
            made.rewind(far)
