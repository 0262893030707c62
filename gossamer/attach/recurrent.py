"""Recurrent layers: which weights they have, and how their forward pass comes to see masks."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils import parametrize

RECURRENT = (nn.RNNBase, nn.RNNCellBase)


def recurrent_weights(module: nn.Module) -> tuple[str, ...]:
    """Names of a recurrent layer's weight matrices, in the order of its layers and directions.

    weight_ih [gates·H, inputs] and weight_hh [gates·H, H or P], and weight_hr [P, H] where it projects its state; the
    rows of the gates lie one block after the other (1 of RNN, 3 of GRU: r, z, n; 4 of LSTM: i, f, g, o).
    """
    names = module._flat_weights_names if isinstance(module, nn.RNNBase) else ("weight_ih", "weight_hh")
    return tuple(name for name in names if name.startswith("weight"))


def states_width(module: nn.Module) -> int:
    """Numbers per time step and sample in what a recurrent layer puts out."""
    if not isinstance(module, nn.RNNBase):
        return module.hidden_size  # type: ignore[return-value]
    return (2 if module.bidirectional else 1) * (module.proj_size or module.hidden_size)


def put_behind(mask: nn.Module, module: nn.Module, tensor: str) -> None:
    """The layer's weight of this name is seen through `mask` from now on."""
    parametrize.register_parametrization(module, tensor, mask)
    if isinstance(module, nn.RNNBase):
        _read_at_each_look(module)


def let_go(module: nn.Module, tensor: str) -> None:
    """What was seen through the mask is the weight from now on; the parameter is the same, and in its old place."""
    parametrize.remove_parametrizations(module, tensor, leave_parametrized=True)
    _put_in_order(module)
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()


def _put_in_order(module: nn.Module) -> None:
    """The layer's parameters as they were when it was built: states of optimizers know them by their number."""
    first = module._flat_weights_names if isinstance(module, nn.RNNBase) else ("weight", "weight_ih", "weight_hh")
    here = module._parameters
    for name in [*(n for n in first if n in here), *(n for n in here if n not in first)]:
        here[name] = here.pop(name)


def _read_at_each_look(module: nn.RNNBase) -> None:
    """Let a parametrized layer's forward pass take its weights by name whenever it runs.

    It reads a list of its own, `_flat_weights`. torch makes that list anew when a weight is another tensor than it was,
    as every masked weight is, but then keeps it, and with it the last pass's graph: such a layer cannot be copied.
    parametrize has given the layer a class of its own, which takes a property in the list's place; once the last
    parametrization goes, torch's class is back and makes its list anew.
    """
    own = type(module)
    own._flat_weights = property(_by_name, _keep_nothing)
    own._update_flat_weights = _nothing_to_update
    module._init_flat_weights()


def _by_name(self: nn.RNNBase) -> list[Tensor | None]:
    return [getattr(self, name, None) for name in self._flat_weights_names]


def _keep_nothing(self: nn.RNNBase, value: list[Tensor | None]) -> None:
    self.__dict__["_flat_weights"] = []


def _nothing_to_update(self: nn.RNNBase) -> None:
    pass
