from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from typing import Any, Optional

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.integrations import gather_params_ctx
from torch import nn
from torch.func import functional_call

from .config import PlasticityConfig


class FullLayer(nn.Module, BaseTunerLayer):
    """A module of which each adapter trains its own copy of the weights.

    The original weights stay frozen in `base_layer`; the active adapter's weights take their place during the forward
    pass, so there is one forward pass, and disabling or switching moves no data. With several active adapters their
    differences from the original add up.

    Raises:
        TypeError: If the module has no parameters, or parameters that gradients cannot train.
    """

    adapter_layer_names: tuple[str, ...] = ("lora_full",)
    other_param_names: tuple[str, ...] = ("scaling",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: PlasticityConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_full = nn.ModuleDict({})
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._names = trainable_names(self.get_base_layer())
        self._originals: dict[str, nn.Parameter] = {}
        # peft's hotswap sets it as LoRA's; whole weights have no scale
        self.scaling: dict[str, float] = {}
        self._active_adapter = adapter_name
        self.in_features = getattr(base_layer, "in_features", None)
        self.out_features = getattr(base_layer, "out_features", None)
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: PlasticityConfig) -> None:
        """Give `adapter_name` a copy of the base weights; `init_lora_weights=False` perturbs it, for tests."""
        copies, base = {}, self._base_weights()
        # ZeRO-3 may have spread the weights as they were loaded
        with gather_params_ctx(list(base.values()), modifier_rank=None):
            for name, weight in base.items():
                copy = self._originals.get(name, weight).detach().clone()
                if config.init_lora_weights is False:
                    copy += 0.1 * torch.randn_like(copy)
                copies[_key(name)] = nn.Parameter(copy)
        self.lora_full[adapter_name] = nn.ParameterDict(copies)
        self.scaling[adapter_name] = 1.0
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _base_weights(self) -> dict[str, nn.Parameter]:
        base: Any = self.get_base_layer()
        return {name: reduce(getattr, name.split("."), base) for name in self._names}

    def _weights(self, adapters: list[str], originals: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
        """The weights that the named adapters give, by parameter name of the base module, in its dtype."""
        held: list[Any] = [self.lora_full[name] for name in adapters if name in self.lora_full]
        weights = {}
        for name, original in originals.items() if held else ():
            first, *others = [copy[_key(name)] for copy in held]
            weight: torch.Tensor = first.to(original.dtype)
            for other in others:
                weight = weight + (other.to(original.dtype) - original)
            weights[name] = weight
        return weights

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(*args, **kwargs)
        _refuse_offloading(self.base_layer)
        weights = self._weights(self.active_adapters, self._base_weights())
        if not weights:
            return self.base_layer(*args, **kwargs)
        with self._unshadowed():
            return functional_call(self.base_layer, weights, args, kwargs)

    @contextmanager
    def _unshadowed(self) -> Iterator[None]:
        """Set aside what FSDP puts in front of the base module's parameters, which would hide the adapter's weights."""
        base = self.get_base_layer()
        owners = [(base.get_submodule(path), name) for path, _, name in (n.rpartition(".") for n in self._names)]
        shadows = [(owner, name, vars(owner).pop(name)) for owner, name in owners if name in vars(owner)]
        try:
            yield
        finally:
            for owner, name, tensor in shadows:
                vars(owner)[name] = tensor

    def merge(self, safe_merge: bool = False, adapter_names: Optional[list[str]] = None) -> None:
        """Put the adapters' weights into the base module; the originals are kept aside for `unmerge`.

        Raises:
            ValueError: With `safe_merge`, if a merged weight is not finite; nothing is changed then.
        """
        adapters = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_full]
        if not adapters:
            return
        originals = self._originals or dict(self._base_weights())
        with torch.no_grad():
            merged = self._weights(self.merged_adapters + adapters, originals)
        if safe_merge and not all(torch.isfinite(weight).all() for weight in merged.values()):
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {', '.join(adapters)} seems to be broken"
            )
        for name, weight in merged.items():
            # a new parameter, not new data: the old one may be tied to another module, which this adapter leaves alone
            self._put(name, nn.Parameter(weight.detach().clone(), requires_grad=originals[name].requires_grad))
        self._originals = originals
        self.merged_adapters = self.merged_adapters + adapters

    def unmerge(self) -> None:
        """Put the original parameters back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        for name, merged in self._base_weights().items():
            original = self._originals[name]
            # the model may have been moved or cast in between
            original.data = original.data.to(merged)
            self._put(name, original)
        self._originals = {}
        self.merged_adapters = []

    def _put(self, name: str, parameter: nn.Parameter) -> None:
        path, _, attribute = name.rpartition(".")
        setattr(self.get_base_layer().get_submodule(path), attribute, parameter)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """What the adapter adds to the base module's `weight`, in its shape."""
        original = self._originals.get("weight", self.get_base_layer().weight)
        held: Any = self.lora_full[adapter]
        return (held["weight"].to(original.dtype) - original).detach()

    def __repr__(self) -> str:
        return "plasticity." + super().__repr__()


def trainable_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters that a full adapter of `module` trains.

    Raises:
        TypeError: If there are none, or if the module is quantised; the message says what to do instead.
    """
    kind = type(module).__name__
    parameters = dict(module.named_parameters())
    if packed := packed_dtype(module):
        raise TypeError(
            f'adapter="full" trains the weights themselves, and those of {kind} are quantised ({packed}): use '
            'adapter="lora" on quantised models.'
        )
    if any(isinstance(part, nn.RNNBase) for part in module.modules()):
        raise TypeError(
            f'adapter="full" cannot take the place of the weights in {kind}: recurrent layers keep a list of them.'
        )
    if any(getattr(part, "track_running_stats", False) for part in module.modules()):
        raise TypeError(
            f'adapter="full" cannot keep the running statistics in {kind} apart, which change with every training step: leave '
            "it out of target_modules."
        )
    if not parameters:
        raise TypeError(f'adapter="full" has nothing to train in {kind}: it holds no parameters.')
    return tuple(parameters)


def _refuse_offloading(module: nn.Module) -> None:
    """Accelerate's hook puts the original weights into an offloaded module just before it runs, over the adapter's."""
    hook = getattr(module, "_hf_hook", None)
    if any(getattr(part, "offload", False) for part in (hook, *getattr(hook, "hooks", ()))):
        raise ValueError(
            f'adapter="full" cannot take the place of the weights of a {type(module).__name__} that is offloaded to CPU or disk: '
            'merge the adapter before offloading (merge_and_unload), keep its modules on the device, or use adapter="lora".'
        )


def packed_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype of quantised weights in the module, `None` if it has none."""
    # a counter such as BatchNorm's is a number; whole arrays of integers are packed weights
    packed = [tensor.dtype for tensor in module.buffers() if tensor.ndim > 1 and not tensor.is_floating_point()]
    packed += [p.dtype for p in module.parameters() if not p.is_floating_point() or p.dtype.itemsize < 2]
    return packed[0] if packed else None


def _key(name: str) -> str:
    return name.replace(".", "__")
