"""slice against a twin in the model's own basis: deleting columns of a rotated stream is projecting the stream.

The twin keeps the dense model and its weights. At each place it runs the whole model anew, takes the stream there, and
projects it from then on on its first principal axes, by hooks: nothing is folded, rotated, streamed or deleted.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gossamer

transformers = pytest.importorskip("transformers")
WIDE, WIDTH, BLOCKS = 24, 16, 3
SIZES = {"hidden_size": WIDE, "num_hidden_layers": BLOCKS, "num_attention_heads": 3, "vocab_size": 50}


def _llama() -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, intermediate_size=40, num_key_value_heads=1, tie_word_embeddings=True)
    )


def _opt() -> nn.Module:
    return transformers.OPTForCausalLM(transformers.OPTConfig(**SIZES, ffn_dim=40, word_embed_proj_dim=WIDE))


def _bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, intermediate_size=40))


class Projected:
    """A dense model with a projection of its stream at each place that has one by now."""

    def __init__(self, model: nn.Module, blocks: nn.ModuleList, writer: str, centred: bool) -> None:
        self.model, self.centred = model, centred
        self.maps: list[Tensor | None] = [None] * (2 * len(blocks))
        self.seen: dict[int, list[Tensor]] = {}
        self.post = writer == "post-norm"
        if self.post:  # a sum is read by its norm only
            norms = [n for b in blocks for n in (b.attention.output.LayerNorm, b.output.LayerNorm)][:-1]
            for place, module in enumerate([blocks[0], *norms]):
                module.register_forward_pre_hook(self._enter(place), with_kwargs=True)
            return
        for i, block in enumerate(blocks):
            block.register_forward_pre_hook(self._enter(2 * i), with_kwargs=True)
            block.get_submodule(writer).register_forward_hook(self._attended(2 * i + 1))

    def _turn(self, place: int, h: Tensor) -> Tensor:
        h = h - h.mean(-1, keepdim=True) if self.centred or (self.post and place) else h
        self.seen.setdefault(place, []).append(h)
        return h if self.maps[place] is None else h @ self.maps[place]

    def _enter(self, place: int):
        def hook(block, args, kwargs):
            self.stream = self._turn(place, args[0])
            return (self.stream, *args[1:]), kwargs

        return hook

    def _attended(self, place: int):
        """The writer's output such that, added to the old stream, it gives the new one."""

        def hook(writer, args, out):
            return self._turn(place, self.stream + out) - self.stream

        return hook

    def fit(self, batches: list[Tensor]) -> None:
        for place in range(len(self.maps)):
            self.seen.clear()
            for ids in batches:
                self.model(input_ids=ids)
            h = torch.cat([h.reshape(-1, WIDE) for h in self.seen[place]]).double().numpy()
            gram = h.T @ h
            gram += 0.01 * gram.diagonal().mean() * np.eye(WIDE)  # the official code's damping
            _, axes = np.linalg.eigh(gram)
            kept = torch.from_numpy(axes[:, ::-1][:, :WIDTH].copy())
            self.maps[place] = (kept @ kept.T).float()


@pytest.mark.parametrize(
    ("make", "inner", "writer", "centred"),
    [
        (_llama, "model.layers", "self_attn.o_proj", False),
        (_opt, "model.decoder.layers", "self_attn.out_proj", True),
        (_bert, "bert.encoder.layer", "post-norm", False),
    ],
)
@torch.no_grad()
def test_deleting_is_projecting(make, inner, writer, centred):
    torch.manual_seed(0)
    model = make().eval()
    for p in model.parameters():
        p.mul_(4).add_(0.05 * torch.randn_like(p))
    batches = list(torch.randint(3, 50, (3, 2, 20), generator=torch.Generator().manual_seed(1)))
    sliced = make().eval()
    sliced.load_state_dict(model.state_dict())
    gossamer.slice(sliced, keep=WIDTH / WIDE, data=batches)
    dense = model(input_ids=batches[0]).logits
    twin = Projected(model, model.get_submodule(inner), writer, centred)
    twin.fit(batches)
    want, got = model(input_ids=batches[0]).logits, sliced(input_ids=batches[0]).logits
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert (want - dense).abs().max() > 0.1  # it was not for nothing
