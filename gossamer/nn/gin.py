"""Sparse graph network between attention and what follows it: tokens are nodes, strong attention makes the edges.

Shape suffixes: B sequences, H heads, T tokens, D width, G width of the graph network.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

STEEP, MIDDLE, FLOOR = 10.0, 0.1, 0.6  # of the official configuration


def adjacency(attention_BHTT: Tensor, *, causal: bool) -> Tensor:
    """A = σ(10·(min(Σ_h attention_h, 1) − 0.1)) where that is above 0.6, else 0.

    [B, T, T]; row i receives from column j. So an edge stands where the heads together give more than
    0.1 + ln(1.5)/10 ≈ 0.14, and weighs 0.6 to 1.

    Args:
        attention_BHTT: probabilities; each row adds up to 1 in every head.
        causal: no edges from later tokens.
    """
    a_BTT = torch.sigmoid(STEEP * (attention_BHTT.sum(1).clamp(max=1) - MIDDLE))
    a_BTT = a_BTT * (a_BTT > FLOOR)
    return a_BTT.tril() if causal else a_BTT


class SparseGIN(nn.Module):
    """y = x + s·norm(up(act(z + MLP(z)))), z_i = ε·x'_i + Σ_j A_ij·x'_j, x' = down(x).

    The scale s is trained, and so is ε, from 0; the MLP is G → G → G with a PReLU, the norm is an RMS norm.

    Args:
        width: D.
        hidden: G, at least 1; 155 in the official configuration.
        scale: s at the start; 0 in the first layer to 0.5 in the last, in even steps, in the official configuration.
        causal: no edges from later tokens.
        dropout: share of the graph network's output dropped in training.
    """

    def __init__(
        self, width: int, hidden: int = 155, *, scale: float = 0.5, causal: bool = True, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.causal, self.dropout = causal, dropout
        self.down, self.up = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.first, self.second = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.activation, self.norm = nn.PReLU(), nn.RMSNorm(width, eps=1e-5)
        self.epsilon, self.scale = nn.Parameter(torch.zeros(())), nn.Parameter(torch.tensor(float(scale)))

    def forward(self, x_BTD: Tensor, attention_BHTT: Tensor) -> Tensor:
        return x_BTD + self.branch(x_BTD, attention_BHTT)

    def branch(self, x_BTD: Tensor, attention_BHTT: Tensor) -> Tensor:
        """What is added to x."""
        x_BTG = self.down(x_BTD)
        z_BTG = self.epsilon * x_BTG + adjacency(attention_BHTT, causal=self.causal) @ x_BTG
        z_BTG = z_BTG + self.second(self.activation(self.first(z_BTG)))
        out_BTG = functional.dropout(self.activation(z_BTG), self.dropout, self.training)
        return self.scale * self.norm(self.up(out_BTG))

    @staticmethod
    def numbers(width: int, hidden: int) -> int:
        """How many parameters it has: 2DG + 2G² + 3G + 2D + 3."""
        return 2 * width * hidden + 2 * hidden**2 + 3 * hidden + 2 * width + 3


def widest(width: int, budget: int) -> int:
    """The largest G whose network has at most `budget` parameters; 0 where none has."""
    linear, rest = 2 * width + 3, 2 * width + 3 - budget
    room = linear**2 - 8 * rest
    return max(int((math.sqrt(room) - linear) // 4), 0) if room > 0 else 0
