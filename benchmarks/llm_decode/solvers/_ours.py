"""The decoder, standing after the context: every call reads the last token again."""

import torch

from benchmarks.harness import Prepared


def prepare(task, threads, head=None):
    from gossamer.runtime.decoder import Decoder

    torch.set_num_threads(threads)
    decoder = Decoder(task.model.bfloat16(), max_tokens=256, head=head)
    decoder.prefill(task.ids_S[:-1])
    context, last = decoder.position, int(task.ids_S[-1])

    def again():
        decoder.position = context
        return decoder.step(last)

    return Prepared(again, measures=lambda: {"bytes": decoder.nbytes})
