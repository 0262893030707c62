"""transformers in torch's eager mode, bfloat16."""

import torch

SPARSE = False


def prepare(task, threads):
    torch.set_num_threads(threads)
    model = task.model.bfloat16()
    with torch.no_grad():
        cache = model(task.ids_S[None, :-1], use_cache=True).past_key_values

    @torch.no_grad()
    def again():
        logits = model(task.ids_S[None, -1:], past_key_values=cache, use_cache=True).logits[0, -1].float()
        cache.crop(-1)  # the token just read goes, so that the next call reads it after the same ones
        return logits

    return again
