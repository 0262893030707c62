"""A Llama of random weights as a checkpoint of one shard per layer, written without ever being whole in memory."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

VOCABULARY = 256


@dataclass(frozen=True)
class Size:
    """Of the model; float32."""

    width: int = 1024
    inner: int = 2816
    layers: int = 60


def write(folder: Path, size: Size) -> int:
    """The checkpoint, unless it is there; its size in bytes."""
    from transformers import LlamaConfig

    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        generator, where = torch.Generator().manual_seed(0), {}
        for part in range(size.layers + 1):
            held = _layer(part, size, generator) if part < size.layers else _ends(size, generator)
            name = f"model-{part + 1:05d}-of-{size.layers + 1:05d}.safetensors"
            save_file(held, folder / name, metadata={"format": "pt"})
            where |= dict.fromkeys(held, name)
        index = {"metadata": asdict(size), "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        shape = {"hidden_size": size.width, "intermediate_size": size.inner, "num_hidden_layers": size.layers}
        heads = {"num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": VOCABULARY}
        LlamaConfig(**shape, **heads, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def _layer(layer: int, size: Size, generator: torch.Generator) -> dict[str, torch.Tensor]:
    shapes = {f"self_attn.{n}_proj": (size.width, size.width) for n in "qkvo"}
    shapes |= {"mlp.gate_proj": (size.inner, size.width), "mlp.up_proj": (size.inner, size.width)}
    shapes |= {"mlp.down_proj": (size.width, size.inner)}
    held = {n: torch.randn(s, generator=generator) / s[1] ** 0.5 for n, s in shapes.items()}
    held |= {n: torch.ones(size.width) for n in ("input_layernorm", "post_attention_layernorm")}
    return {f"model.layers.{layer}.{n}.weight": w for n, w in held.items()}


def _ends(size: Size, generator: torch.Generator) -> dict[str, torch.Tensor]:
    held = {
        f"{n}.weight": torch.randn(VOCABULARY, size.width, generator=generator)
        for n in ("model.embed_tokens", "lm_head")
    }
    return held | {"model.norm.weight": torch.ones(size.width)}
