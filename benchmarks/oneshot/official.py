"""The official SparseGPT procedure at any density or N:M, in both of its orders, resumable after every block.

As in `benchmarks/smollm/official.py`: by default each block's statistics are taken while all of it is dense, and
"sequential" is the official code's --true-sequential: attention's inputs, its output, the MLP's inputs, its output.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.smollm.official import _add_gram, _adder, _catch, _first
from gossamer.core.files import whole_file
from tests.oracles.sparsegpt_naive import naive_sparsegpt

GROUPS = (("k_proj", "v_proj", "q_proj"), ("o_proj",), ("up_proj", "gate_proj"), ("down_proj",))


def prune_blocks(
    model: nn.Module,
    windows: Tensor,
    folder: Path,
    *,
    density: float = 0.5,
    group: tuple[int, int] | None = None,
    damping: float = 0.01,
    sequential: bool = False,
) -> float:
    """Prune a Llama-style model in place; processor seconds of all blocks, earlier runs' included."""
    began = time.process_time()
    blocks, (inputs, kwargs) = model.model.layers, _catch(model, windows)
    spent = time.process_time() - began
    for index, block in enumerate(blocks):
        file = folder / f"block{index}.pt"
        if file.exists():
            held = torch.load(file)
            block.load_state_dict(held["weights"])
            spent += held["seconds"]
            inputs = held.get("inputs", inputs)
            continue
        began = time.process_time()
        layers = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
        parts = [[n for n in layers if n.endswith(g)] for g in GROUPS] if sequential else [list(layers)]
        for part in parts:
            sums: dict[str, list] = {n: [0.0, 0] for n in part}
            hooks = [layers[n].register_forward_pre_hook(_adder(sums[n], _add_gram)) for n in part]
            for x in inputs:
                block(x, **kwargs)
            for hook in hooks:
                hook.remove()
            for n in part:
                w, gram = layers[n].weight.data, sums[n][0] / sums[n][1]
                options = {"density": density, "group": group, "damping": damping, "threshold": group is None}
                layers[n].weight.data = naive_sparsegpt(w, 2 * gram, **options)
        inputs = [_first(block(x, **kwargs)) for x in inputs]
        seconds = time.process_time() - began
        spent += seconds
        with whole_file(file) as draft:
            torch.save({"weights": block.state_dict(), "seconds": seconds, "inputs": inputs}, draft)
        if index:
            _without_inputs(folder / f"block{index - 1}.pt")
    return spent


def _without_inputs(file: Path) -> None:
    """Only the last finished block needs what goes into the next one."""
    held = torch.load(file)
    held.pop("inputs", None)
    with whole_file(file) as draft:
        torch.save(held, draft)
