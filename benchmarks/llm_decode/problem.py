"""SmolLM2-135M, the token after 128: real weights in bfloat16, linear layers of all blocks pruned row by row.

Speed and bytes only. What the zeros cost in quality is measured in benchmarks/smollm.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.harness import Case

NAME, TITLE = "llm_decode", "SmolLM2-135M, one token after 128, bfloat16"
# bfloat16 through thirty blocks, against float32; a 4-bit head on top of that.
TOLERANCE, TOLERANCES = 0.1, {"ours_head4": 0.2, "ours_dense_head4": 0.2}
CONTEXT = 128
CASES = [Case(f"smollm2-{z}", {"density": round(1 - z, 2)}, quick=z == 0.5) for z in (0.0, 0.5, 0.7)]
GROUPS = {"best dense engine": ("torch_eager", "ours_dense"), "dense, 4-bit head": ("ours_dense_head4",)}
MEASURES = {"bytes": "bytes read a token"}


@dataclass(frozen=True)
class Task:
    """A model in float32 and the tokens that it reads; the last one is timed."""

    model: nn.Module
    ids_S: Tensor


def dense_case(case):
    """Dense engines run the model as it was trained."""
    return "smollm2-0.0"


def build(case):
    from gossamer import prune
    from gossamer.data import load_model

    model = load_model("smollm2-135m").eval()
    if case.labels["density"] < 1:
        prune(model, "magnitude", density=case.labels["density"], pattern="o [i]")
    draw = torch.Generator().manual_seed(7)
    return Task(model, torch.randint(1000, model.config.vocab_size, (CONTEXT + 1,), generator=draw))


@torch.no_grad()
def exact(case, data):
    return data.model(data.ids_S[None]).logits[0, -1].double()
