"""A twin of the token panels in plain torch, with NaN wherever padding is, for the tests of the kernels on them."""

import torch

from gossamer.kernels.cpu.tokens import WIDTH, padded, panel_count


def to_panels(x_BSK):
    """Panels of [B, S, K] whose padding lanes are NaN."""
    batch, seq, features = x_BSK.shape
    positions = torch.full((batch, padded(seq), features), torch.nan)
    positions[:, :seq] = x_BSK
    whole = torch.full((panel_count(batch, seq) * WIDTH, features), torch.nan)
    whole[: batch * padded(seq)] = positions.flatten(0, 1)
    return whole.view(-1, WIDTH, features).transpose(1, 2).contiguous()


def to_rows(data_PKW, batch, seq):
    """The real positions of panels as [B, S, K]."""
    positions = data_PKW.transpose(1, 2).reshape(-1, data_PKW.shape[1])[: batch * padded(seq)]
    return positions.view(batch, padded(seq), -1)[:, :seq]


def poisoned_like(tensor):
    """A contiguous tensor of NaN inside a larger one, and its surroundings, which must still be NaN afterwards."""
    margin = 64
    whole = torch.full((tensor.numel() + 2 * margin,), torch.nan)
    return whole[margin:-margin].view(tensor.shape), (whole[:margin], whole[-margin:])
