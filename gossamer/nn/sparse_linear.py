"""SparseLinear: a linear layer that is sparse from its first step of training to its last.

Shapes: T tokens (any leading axes), M output features, K input features, E kept weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from gossamer.core.errors import BudgetError, FormatError
from gossamer.core.support import Support
from gossamer.formats import CSR
from gossamer.formats.checks import index_dtype, owners, pointer
from gossamer.kernels.csr_op import csr_linear

_SUPPORTED = (torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class Move:
    """How a support changed: where each entry of the new one was in the old one.

    Args:
        origin_E: int64 [E], the place among the old entries; -1 for an entry that is new.
        before: number of old entries.
    """

    origin_E: Tensor
    before: int

    @property
    def grown(self) -> int:
        """Entries that are new."""
        return int((self.origin_E < 0).sum())

    @property
    def dropped(self) -> int:
        """Old entries that are gone."""
        return self.before - (self.origin_E.numel() - self.grown)

    def apply(self, old_E: Tensor, fresh: float | Tensor = 0.0) -> Tensor:
        """What was kept per old entry, per new entry; `fresh` (a number, or one per new entry in order) elsewhere."""
        if old_E.shape != (self.before,):
            raise FormatError(f"the old support had {self.before} entries, got a tensor of shape {tuple(old_E.shape)}")
        is_new_E, new_E = self.origin_E < 0, old_E.new_zeros(self.origin_E.shape)
        new_E[~is_new_E] = old_E[self.origin_E[~is_new_E]]
        new_E[is_new_E] = torch.as_tensor(fresh, dtype=old_E.dtype, device=old_E.device)
        return new_E


def carry(optimizer: torch.optim.Optimizer, param: Tensor, move: Move) -> None:
    """Take an optimizer's state across a change of support: kept entries keep theirs, new entries start at zero.

    Every state tensor with one number per old entry (momentum, both moments of Adam) is moved; step counts stay.

    Args:
        optimizer: any torch optimizer; one that does not know the parameter is left as it is.
        param: the layer's values.
        move: what `SparseLinear.set_support` returned.

    Example:
        >>> layer = SparseLinear(8, 4, density=0.5)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
        >>> layer(torch.ones(2, 8)).sum().backward()
        >>> optimizer.step()
        >>> carry(optimizer, layer.values, layer.set_support(torch.arange(8)))
        >>> optimizer.state[layer.values]["momentum_buffer"].shape
        torch.Size([8])
    """
    state = optimizer.state.get(param, {})
    for name, old in state.items():
        if isinstance(old, Tensor) and old.shape == (move.before,):
            state[name] = move.apply(old)


class SparseLinear(nn.Module):
    """y = x Wᵀ + b with E kept weights, stored and trained as one vector of E values.

    Forward, both gradients and the optimizer's state take time and memory in proportion to E; nothing of size
    [M, K] is made. Any torch optimizer trains `values` as an ordinary parameter. The layer computes in float32 (inside
    autocast too); on other devices than the CPU, and in float64, it is correct but unpacks W at each call.

    Args:
        in_features: K.
        out_features: M.
        bias: whether there is a bias.
        density: fraction of the M x K weights that is kept, 0 to 1; drawn uniformly, an exact count.
        support: what is kept instead of a random draw, as in `set_support`.
        generator: for the draw of the support.

    Raises:
        BudgetError: neither or both of density and support, or a density outside 0 to 1.
        FormatError: the support does not fit [M, K].

    Example:
        >>> layer = SparseLinear(784, 4096, density=0.01)
        >>> layer.values.shape, layer(torch.zeros(2, 784)).shape
        (torch.Size([32113]), torch.Size([2, 4096]))

    Departs from: `nn.Linear` draws weights uniformly within 1/sqrt(K); here K is the mean number kept in a row, so
    that outputs start out as large as those of a dense layer.
    """

    values: nn.Parameter
    indptr: Tensor
    indices: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        density: float | None = None,
        support: Support | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        if (density is None) == (support is None):
            raise BudgetError("say how much is kept (density=0.01) or what is kept (support=mask), one of them")
        flat_E = _drawn(out_features * in_features, density, generator) if support is None else self._flat(support)
        self._lay_out(flat_E)
        self.values = nn.Parameter(torch.empty(flat_E.numel()))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.reset_parameters()

    @classmethod
    def from_dense(cls, linear: nn.Linear, support_mask: Support | Tensor | None = None) -> Self:
        """Take the kept weights, and the bias, of a dense layer, which is not changed.

        Args:
            linear: its weight is float32 or float64.
            support_mask: as in `set_support`; None keeps what is not zero.

        Raises:
            FormatError: the support does not fit, or the weight is of another dtype.
        """
        if linear.weight.dtype not in _SUPPORTED:
            raise FormatError(f"SparseLinear trains float32, the layer is {linear.weight.dtype}; call .float() first")
        mask = linear.weight.detach() != 0 if support_mask is None else support_mask
        layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, support=mask)
        layer = layer.to(linear.weight.device, linear.weight.dtype)
        with torch.no_grad():
            layer.values.copy_(linear.weight.reshape(-1)[layer.positions()])
            if layer.bias is not None:
                layer.bias.copy_(linear.bias)
        return layer.train(linear.training)

    @classmethod
    def from_support(cls, support: Support | Tensor, *, bias: bool = True) -> Self:
        """A new layer over a mask [M, K], drawn as the constructor draws its weights."""
        mask = support.kept if isinstance(support, Support) else support
        if mask.dim() != 2:
            raise FormatError(
                f"from_support needs a mask [M, K], got shape {tuple(mask.shape)}; with flat places call "
                "SparseLinear(in_features, out_features, support=places)"
            )
        return cls(mask.shape[1], mask.shape[0], bias=bias, support=mask)

    def reset_parameters(self) -> None:
        """Draw values and bias anew, uniformly within 1/sqrt(mean number of weights kept in a row)."""
        bound = 1 / math.sqrt(max(1.0, self.values.numel() / max(self.out_features, 1)))
        nn.init.uniform_(self.values, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor) -> Tensor:
        x = input  # the name that nn.Linear gives it
        if self.values.dtype not in _SUPPORTED:
            raise FormatError(f"SparseLinear computes in float32, its values are {self.values.dtype}; call .float()")
        if x.dtype != self.values.dtype and torch.is_autocast_enabled(x.device.type):
            x = x.to(self.values.dtype)
        return csr_linear(x, self.indptr, self.indices, self.values, self.bias, self.in_features)

    @property
    def stored(self) -> CSR:
        """The weight as a format over the layer's own tensors."""
        return CSR(self.out_features, self.in_features, self.indptr, self.indices, self.values)

    @property
    def density(self) -> float:
        """Fraction of the weights that is kept."""
        return self.values.numel() / max(1, self.out_features * self.in_features)

    @property
    def weight(self) -> Tensor:
        """The dense weight [M, K], unpacked afresh at every look."""
        return self.stored.to_dense()

    def positions(self) -> Tensor:
        """Flat place row * K + column of every value, ascending: int64 [E]."""
        return self.stored.slots()

    def to_dense(self) -> nn.Linear:
        """A dense layer of the same weights, zeros elsewhere."""
        dense = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        dense.weight = nn.Parameter(self.weight.detach())
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().clone())
        return dense.train(self.training)

    @torch.no_grad()
    def set_support(self, support: Support | Tensor, fresh_values: float | Tensor = 0.0) -> Move:
        """Keep other weights from now on: entries in both supports keep their values, gradients are dropped.

        The parameter stays the same object, so optimizers go on with it; hand the returned move to `carry` so that
        their state follows.

        Args:
            support: a mask [M, K], or the flat places row * K + column of all kept weights (any order, no doubles).
            fresh_values: of new weights: a number, or one per new weight in ascending place.

        Raises:
            FormatError: a mask of another shape, or places outside the weight, doubled, or not integers.

        Example:
            >>> layer = SparseLinear.from_support(torch.eye(3, dtype=torch.bool))
            >>> move = layer.set_support(torch.tensor([0, 1, 8]))
            >>> move.dropped, move.grown, layer.density
            (1, 1, 0.3333333333333333)
        """
        old_E, new_E = self.positions(), self._flat(support).to(self.values.device)
        place_E = torch.searchsorted(old_E, new_E).clamp(max=max(old_E.numel() - 1, 0))
        found_E = old_E[place_E] == new_E if old_E.numel() else torch.zeros_like(new_E, dtype=torch.bool)
        move = Move(torch.where(found_E, place_E, -1), old_E.numel())
        values = move.apply(self.values.detach(), fresh_values)
        self._lay_out(new_E)
        self._resize(values)
        return move

    def _flat(self, support: Support | Tensor) -> Tensor:
        """The kept places in ascending order."""
        given, size = support.kept if isinstance(support, Support) else support, (self.out_features, self.in_features)
        if given.dtype == torch.bool:
            if tuple(given.shape) != size:
                raise FormatError(f"the support must be a mask {list(size)} like the weight, got {tuple(given.shape)}")
            return given.reshape(-1).nonzero().squeeze(1)
        if given.dim() != 1 or given.dtype not in (torch.int32, torch.int64):
            raise FormatError(
                f"a support is a bool mask {list(size)} or flat int64 places, got {given.dtype} {tuple(given.shape)}"
            )
        return _places(given, size[0] * size[1])

    def _lay_out(self, flat_E: Tensor) -> None:
        """Store ascending places as row pointers and columns, in new tensors: plans of the old ones stay their own."""
        rows_E = flat_E // max(self.in_features, 1)
        columns_E = (flat_E - rows_E * self.in_features).to(index_dtype(self.in_features))
        self.register_buffer("indptr", pointer(torch.bincount(rows_E, minlength=self.out_features)))
        self.register_buffer("indices", columns_E)

    def _resize(self, values_E: Tensor) -> None:
        """Other values in the same parameter, however many."""
        self.values.grad = None
        # While any graph of an earlier step lives, the parameter expects gradients of the old size; a change of type
        # makes torch forget that.
        self.values.data = values_E.new_empty(0, dtype=torch.float16)
        self.values.data = values_E

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Take the support that was saved, checked, whatever this layer was built with."""
        parts = {name: state.get(prefix + name) for name in CSR.PARTS}
        if all(isinstance(part, Tensor) for part in parts.values()):
            meta = {"rows": self.out_features, "cols": self.in_features}
            stored, here = CSR.from_parts(parts, meta), self.values.device
            flat_E = owners(stored.indptr, stored.indices.numel()) * self.in_features + stored.indices.long()
            self._lay_out(_places(flat_E, self.out_features * self.in_features).to(here))
            self._resize(self.values.detach().new_empty(stored.values.shape))
        super()._load_from_state_dict(state, prefix, *rest)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"kept={self.values.numel()}, density={self.density:.3g}"
        )


def _places(flat: Tensor, size: int) -> Tensor:
    """Flat places in ascending order, refused when doubled or outside the weight."""
    flat_E, _ = flat.long().sort()
    if flat_E.numel() and (int(flat_E[0]) < 0 or int(flat_E[-1]) >= size):
        raise FormatError(f"places must lie in 0..{size - 1}, got {int(flat_E[0])}..{int(flat_E[-1])}")
    if bool((flat_E.diff() == 0).any()):
        raise FormatError("a support names each place once; call .unique() first")
    return flat_E


def _drawn(size: int, density: float | None, generator: torch.Generator | None) -> Tensor:
    """So many places out of `size` at random, ascending, in memory that follows their number."""
    if density is None or not 0 <= density <= 1:
        raise BudgetError(f"density must lie in 0..1, got {density}")
    count = round(density * size)
    if 4 * count > size:
        return torch.randperm(size, generator=generator)[:count].sort().values
    found_E = torch.empty(0, dtype=torch.int64)
    while found_E.numel() < count:
        more = torch.randint(size, (count + count // 2 + 16,), generator=generator)
        found_E = torch.cat([found_E, more]).unique()
    return found_E[torch.randperm(found_E.numel(), generator=generator)[:count].sort().values]
