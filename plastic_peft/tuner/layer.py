from __future__ import annotations

from typing import Any, Optional

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.func import functional_call

from .config import PlasticityConfig


class FullLayer(nn.Module, BaseTunerLayer):
    """A module of which each adapter trains its own copy of the weights.

    The original weights stay frozen in `base_layer`; the active adapter's weights take their place during the forward
    pass, so there is one forward pass, and disabling or switching moves no data. With several active adapters their
    differences from the original add up.
    """

    adapter_layer_names: tuple[str, ...] = ("lora_full",)
    other_param_names: tuple[str, ...] = ()

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: PlasticityConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_full = nn.ModuleDict({})
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._originals: dict[str, torch.Tensor] = {}
        self._active_adapter = adapter_name
        self.in_features = getattr(base_layer, "in_features", None)
        self.out_features = getattr(base_layer, "out_features", None)
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: PlasticityConfig) -> None:
        """Give `adapter_name` a copy of the base weights; `init_lora_weights=False` perturbs it, for tests."""
        copies = {}
        for name, parameter in self._base_parameters().items():
            if not parameter.is_floating_point():
                raise TypeError(
                    f'adapter="full" trains the weights themselves, and those of {type(self.base_layer).__name__} are quantised '
                    f'({parameter.dtype}): use adapter="lora" on quantised models.'
                )
            original = self._originals.get(name, parameter.detach())
            copy = original.clone()
            if config.init_lora_weights is False:
                copy += 0.1 * torch.randn_like(copy)
            copies[name.replace(".", "__")] = nn.Parameter(copy)
        if not copies:
            raise TypeError(
                f'adapter="full" has nothing to train in {type(self.base_layer).__name__}: it holds no parameters.'
            )
        self.lora_full[adapter_name] = nn.ParameterDict(copies)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _base_parameters(self) -> dict[str, torch.Tensor]:
        return dict(self.get_base_layer().named_parameters())

    def _weights(self, adapters: list[str], originals: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The weights that the named adapters give, by parameter name of the base module, in its dtype."""
        held: list[Any] = [self.lora_full[name] for name in adapters if name in self.lora_full]
        weights = {}
        for name, original in originals.items() if held else ():
            first, *others = [copy[name.replace(".", "__")] for copy in held]
            weight = first.to(original.dtype)
            for other in others:
                weight = weight + (other.to(original.dtype) - original)
            weights[name] = weight
        return weights

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(*args, **kwargs)
        if self.merged:
            return self.base_layer(*args, **kwargs)
        weights = self._weights(self.active_adapters, self._base_parameters())
        if not weights:
            return self.base_layer(*args, **kwargs)
        return functional_call(self.base_layer, weights, args, kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: Optional[list[str]] = None) -> None:
        """Put the adapters' weights into the base module; the originals are kept aside for `unmerge`.

        Raises:
            ValueError: With `safe_merge`, if a merged weight is not finite; nothing is changed then.
        """
        adapters = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_full]
        if not adapters:
            return
        parameters = self._base_parameters()
        originals = self._originals or {name: parameter.data for name, parameter in parameters.items()}
        with torch.no_grad():
            merged = self._weights(self.merged_adapters + adapters, originals)
        if safe_merge and not all(torch.isfinite(weight).all() for weight in merged.values()):
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {', '.join(adapters)} seems to be broken"
            )
        for name, weight in merged.items():
            parameters[name].data = weight.detach().clone()
        self._originals = originals
        self.merged_adapters = self.merged_adapters + adapters

    def unmerge(self) -> None:
        """Put the original weights back, bit for bit."""
        for name, parameter in self._base_parameters().items():
            if name in self._originals:
                parameter.data = self._originals[name].to(parameter.device)
        self._originals = {}
        self.merged_adapters = []

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """What the adapter adds to the base module's `weight`, in its shape."""
        original = self._originals.get("weight", self.get_base_layer().weight)
        held: Any = self.lora_full[adapter]
        return (held["weight"].to(original.dtype) - original).detach()

    def __repr__(self) -> str:
        return "plasticity." + super().__repr__()
