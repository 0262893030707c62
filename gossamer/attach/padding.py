"""Padding: which rows of a layer's input are real tokens, as the batch's attention mask says."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

from torch import Tensor

from .passes import Pass

log = logging.getLogger(__name__)
# Keys and values of cross-attention in transformers' encoder-decoders: T5, BART and OPT-style, BERT.
_CROSS = re.compile(r"(encoder_attn|EncDecAttention|crossattention).*\.(k|v|k_proj|v_proj|key|value)$")


def real_tokens(p: Pass, layer: str) -> Tensor | None:
    """Real tokens of what a pass brings to a layer, flat; None if the batch does not say or its mask does not fit."""
    batch, x = p.batch, p.x
    if not isinstance(batch, Mapping) or x is None:
        return None
    # Cross-attention's keys and values read the encoder's states, whatever the decoder's own mask says.
    decodes = "decoder" in layer and "decoder_input_ids" in batch and not _CROSS.search(layer)
    mask = batch.get("decoder_attention_mask" if decodes else "attention_mask")
    if not isinstance(mask, Tensor):
        return None
    flat = x.ndim == 2 and x.shape[0] == mask.numel()
    if flat or mask.shape == x.shape[:-1]:
        return mask.reshape(-1).bool()
    if len(x) != len(mask) and not bool(mask.bool().all()):  # one row per text is a pooled state, not padding
        log.warning(
            "layer %r gets %s, of which no mask tells padding from tokens; calibrate without padding",
            *(layer, tuple(x.shape)),
        )
    return None
