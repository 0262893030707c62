"""A handle for supports that are searched for: weights are frozen, their scores learn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import TargetError
from ..core.search import Search, searched
from ..core.sparsifier import require_finite
from ..core.support import Support
from .handle import Handle
from .masked import Masked
from .recurrent import put_behind
from .sharded import is_sharded
from .targets import Target, sharers


class Searched(Masked):
    """A mask over frozen weights, which are a buffer here: the parameter in their place holds the scores."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(torch.ones_like(weight, dtype=torch.bool))
        self.register_buffer("frozen", weight.detach().clone())

    def forward(self, original: Tensor) -> Tensor:
        return searched(original, self.frozen, Support(self.mask))


class SearchingHandle(Handle):
    """Nothing but the scores of the held layers learns. The optimizer's parameter stays, and holds scores meanwhile.

    So an optimizer built before trains scores without knowing it, checkpoints hold both, and momenta that belong to
    scores are thrown away with them.
    """

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        if any(isinstance(m, Searched) for m in model.modules()):
            raise TargetError(
                "the model is being searched already; name all layers in one call, or handle.remove() first"
            )
        self._at_rest = [name for name, p in model.named_parameters() if p.requires_grad]
        super().__init__(model, *args, **kwargs)
        self._only_scores()

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Look after this optimizer's slots from now on.

        Raises:
            TargetError: it does not train the scores, or FSDP2 has sharded them.
        """
        if any(is_sharded(self._original(t)) for t in self.targets):
            raise TargetError(f"{self.sparsifier.name!r} holds frozen weights whole; it cannot train sharded scores")
        super().follow(optimizer)
        if not self.steps:
            self._forget()

    def take(self, supports: Mapping[str, Support]) -> None:
        """Keep these supports from now on, and search on from them: the layers' scores start again.

        Raises:
            TargetError: a name is not that of a layer held, or a support has another shape than its weight.
        """
        super().take(supports)
        for t in self.targets:
            if t.name in supports:
                self._begin(t)

    def remove(self) -> nn.Module:
        """Write w on the support and 0 off it into the weights, let all learn that did, and return the model."""
        self._forget()
        model = super().remove()
        for name in self._at_rest:
            model.get_parameter(name).requires_grad_(True)
            model.get_parameter(name).grad = None
        return model

    def _hold(self, target: Target) -> None:
        mask = Searched(target.stored(self.model))
        for module, tensor in sharers(self.model, target):
            put_behind(mask, module, tensor)

    def _only_scores(self) -> None:
        """Frozen parameters have no gradient, so that optimizers pass them by."""
        for p in self.model.parameters():
            p.requires_grad_(False)
            p.grad = None
        for t in self.targets:
            self._original(t).requires_grad_(True)
        self._forget()

    def _forget(self) -> None:
        """What the optimizer has summed up for weights is of no use to scores, and the other way round."""
        for t in self.targets if self.optimizer is not None else ():
            self.optimizer.state.pop(self._original(t), None)

    @property
    def _search(self) -> Search:
        assert self.sparsifier.search is not None
        return self.sparsifier.search

    def _view(self, target: Target) -> Tensor:
        """Scores of methods are of weights, and those are here."""
        return target.turned(self._mask(target).frozen)

    def _change(self, supports: Iterable[tuple[Target, Support]]) -> None:
        super()._change(supports)
        if not self.steps:
            for t in self.targets:
                self._begin(t)

    def _begin(self, target: Target) -> None:
        with torch.no_grad():
            scores = self._original(target)
            scores.copy_(self._search.start(Support(self._mask(target).mask), scores))

    def _choose(self) -> Iterator[tuple[Target, Support]]:
        if not self.steps:
            yield from super()._choose()
            return
        for t in self.targets:
            scores = t.turned(self._original(t).detach())
            require_finite(scores, f"the scores of layer {t.name!r}")
            support = Support(t.turned(self._mask(t).mask))
            yield t, self._search.move(support, scores, self.sparsifier.pattern, self.steps)
