"""Import this, and `from_pretrained` of transformers reads folders that `save_pretrained(..., format="packed")` wrote.

    import gossamer.integrations.transformers
    model = transformers.AutoModelForCausalLM.from_pretrained("folder")

Without it transformers warns of the quantisation type "gossamer.integrations.transformers", which is what to import,
and stops, as the packed weights have other shapes than its own. The model that comes back is dense, and
saves as any other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.errors import need
from ..formats.layouts import BITMASK
from . import shards
from .neighbours import METHOD


def register() -> None:
    """Tell transformers how to read packed folders; more than once does nothing.

    Raises:
        MissingDependency: transformers is not installed, or is older than 5.
    """
    auto = need("transformers.quantizers.auto", "text")
    if METHOD in auto.AUTO_QUANTIZER_MAPPING:
        return
    config, quantizer = _classes()
    auto.register_quantization_config(METHOD)(config)
    auto.register_quantizer(METHOD)(quantizer)


def _classes() -> tuple[type, type]:
    quantizers = need("transformers.quantizers.base", "text")
    loading = need("transformers.core_model_loading", "text")
    configs = need("transformers.utils.quantization_config", "text")

    class GossamerConfig(configs.QuantizationConfigMixin):
        """The entry `quantization_config` of a packed folder."""

        def __init__(self, quant_method: str = METHOD, layout: str = BITMASK.name, **_: Any) -> None:
            self.quant_method, self.layout, self.dequantize = quant_method, layout, True

    class Unpack(loading.ConversionOps):
        """A weight's tensors to the weight; a weight that was not packed passes."""

        def __init__(self, quantizer: Any = None) -> None:
            self.quantizer = quantizer

        def convert(self, input_dict: dict[str, Any], full_layer_name: str = "", **_: Any) -> dict[str, Any]:
            return _unpacked(input_dict, full_layer_name)

        @property
        def reverse_op(self) -> Any:
            return loading._IdentityOp()

    class GossamerQuantizer(quantizers.HfQuantizer):
        """Reads weights whose zeros were left out; the model itself is dense."""

        serialized_names = {"weight": list(BITMASK.names("weight"))}  # noqa: RUF012 - transformers' own form
        is_trainable = True

        def get_load_operations(self) -> dict[str, type]:
            return {"dequantize": Unpack}

        def is_serializable(self) -> bool:
            return True

        def _process_model_before_weight_loading(
            self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
        ) -> Any:
            for folder in {Path(file).parent for file in checkpoint_files or ()}:
                shards.verify(folder)
            return model

        def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
            # Ours do not run backwards; when saving, transformers finds the model's own again.
            model._weight_conversions = None
            return model

    return GossamerConfig, GossamerQuantizer


def _unpacked(found: dict[str, Any], full_name: str) -> dict[str, Any]:
    """Weights by their patterns, whose parts lie beside them; a lone weight gets its full name."""
    lists = {key: value if isinstance(value, list) else [value] for key, value in found.items()}
    weights = {key: values for key, values in lists.items() if not key.endswith(("_bitmask", "_shape"))}
    done = {key: _each(key, values, lists) for key, values in weights.items()}
    if len(done) == 1 and "*" not in full_name:
        return {full_name: next(iter(done.values()))}
    return done


def _each(key: str, values: list[Tensor], lists: dict[str, list[Tensor]]) -> list[Tensor]:
    names = BITMASK.names(key)
    if not all(name in lists for name in names):
        return values
    columns = zip(*(lists[name] for name in names), strict=True)
    return [BITMASK.weight(key, dict(zip(names, parts))) for parts in columns]


register()
