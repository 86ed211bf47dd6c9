from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Optional

import torch
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, _ExcludedModule, check_target_module_exists
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from ..components import named_leaves, public_name
from ..embedded import portable_name
from ..names import renamed_keys
from .config import PlasticityConfig
from .layer import FullLayer, trainable_names
from .settle import settle


class PlasticityModel(LoraModel):
    """
    A model with adapters on the modules that plasticity selects; see [`PlasticityConfig`].

    It is a [`LoraModel`], so that all of LoRA's features come with it. The selection is settled before the first module
    is touched, and matched by exact name.

    Args:
        model ([`torch.nn.Module`]): The model to be adapted.
        config ([`PlasticityConfig`]): The configuration of the adapter.
        adapter_name (`str`): The name of the adapter, defaults to `"default"`.
        low_cpu_mem_usage (`bool`, `optional`, defaults to `False`): Create empty adapter weights on meta device.

    Returns:
        `torch.nn.Module`: The model with adapters.
    """

    tuner_layer_cls = (LoraLayer, FullLayer)  # type: ignore[assignment]

    @property
    def name_or_path(self) -> str:
        """The base model's name in the tags of peft's model card."""
        return portable_name(self.model.name_or_path)  # type: ignore[arg-type]

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config: Any = self.peft_config[adapter_name]
        if not isinstance(config, PlasticityConfig):
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            return
        with _undone_on_error(config, model, adapter_name):
            settle(config, model)
            self._check_targets(config, model)
            selected = None if config.selected_modules is None else set(config.selected_modules)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        for name in config._moved_to_save:
            model.get_submodule(name).__class__ = MovedModule
        if selected is not None:
            # peft shortens long lists to common suffixes; what is saved stays exact
            config.target_modules = selected  # type: ignore[assignment]

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        selected = getattr(peft_config, "selected_modules", None)
        found = check_target_module_exists(peft_config, key)
        if selected is None:
            return found
        # what is excluded stays marked as such, or peft warns that nothing was
        return public_name(key) in selected or (found if isinstance(found, _ExcludedModule) else False)

    def _check_targets(self, config: PlasticityConfig, model: nn.Module) -> None:
        other = LoraLayer if config.adapter == "full" else FullLayer
        for name, module, _ in named_leaves(model):
            if not name or not self._check_target_module_exists(config, name):
                continue
            if isinstance(module, other):
                raise ValueError(
                    f"{name} already has an adapter of the other mode, and one module cannot carry both adapter='lora' and "
                    "adapter='full': select other modules, or load the second adapter on a fresh model."
                )
            if config.adapter == "full" and not isinstance(module, FullLayer):
                parent = model.get_submodule(name.rpartition(".")[0])
                if isinstance(parent, (nn.TransformerEncoderLayer, nn.MultiheadAttention)):
                    raise TypeError(
                        f'adapter="full" cannot adapt {name}: {type(parent).__name__} reads the weights of its parts without '
                        "calling them. Adapt it as a whole, or other modules."
                    )
                trainable_names(module)

    def _create_and_replace(  # type: ignore[override]
        self,
        lora_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        parameter_name: Optional[str] = None,
    ) -> None:
        if getattr(lora_config, "adapter", "lora") != "full":
            super()._create_and_replace(
                lora_config, adapter_name, target, target_name, parent, current_key, parameter_name=parameter_name
            )
            return
        if parameter_name is not None:
            raise ValueError('target_parameters applies to adapter="lora": full adapters train whole modules.')
        if isinstance(target, FullLayer):
            target.update_layer(adapter_name, lora_config)
            return
        layer = FullLayer(target, adapter_name, lora_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        super()._mark_only_adapters_as_trainable(model)
        for module in model.modules():
            if isinstance(module, FullLayer):
                # `bias` is about the biases that are in use: these have the adapter's in their place
                module.base_layer.requires_grad_(False)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        whole: Any = model
        base = whole.get_base_model() if hasattr(model, "get_base_model") else model
        keys = renamed_keys(state_dict, base, getattr(config, "_names_in_file", None))
        state_dict = {keys[key]: tensor for key, tensor in state_dict.items()}
        for name, module in model.named_modules():
            if isinstance(module, MovedModule):
                for key, place in ModulesToSaveWrapper.adapter_state_dict_load_map(module, adapter_name).items():
                    if f"{name}.{key}" not in state_dict:
                        raise ValueError(f"modules_to_save names {name}, and the adapter's file has no {key} for it.")
                    state_dict[f"{name}.{place}"] = state_dict.pop(f"{name}.{key}")
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        full = [
            n
            for n in set(names or ())
            if n in self.peft_config and getattr(self.peft_config[n], "adapter", "lora") == "full"
        ]
        if full:
            raise ValueError(
                f"adapter_names mixes adapters inside a batch, which adapter='full' ({', '.join(sorted(full))}) cannot: its weights "
                "are not a sum over samples. Use set_adapter and one batch per adapter."
            )
        layers = [module for module in self.modules() if isinstance(module, FullLayer)] if names is not None else []
        if any(layer.merged for layer in layers):
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        active = [layer._active_adapter for layer in layers]
        try:
            # none of the named adapters is a full one, so these modules are the base model's for every sample
            for layer in layers:
                layer._active_adapter = []
            with super()._enable_peft_forward_hooks(*args, **kwargs):
                yield
        finally:
            for layer, adapters in zip(layers, active, strict=True):
                layer._active_adapter = adapters

    def add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        full = [name for name in adapters if getattr(self.peft_config.get(name), "adapter", "lora") == "full"]
        if full:
            raise ValueError(f"add_weighted_adapter combines LoRA weights; {', '.join(full)} has adapter='full'.")
        # peft copies the first config and unites the targets; the exact names have to be united likewise
        first: Any = self.peft_config.get(adapters[0])
        scores = [getattr(self.peft_config.get(name), "selected_modules", None) for name in adapters]
        if all(given is None for given in scores):
            super().add_weighted_adapter(adapters, *args, **kwargs)
            return
        held = first.selected_modules
        named = [name for name, module in self.model.named_modules() if isinstance(module, LoraLayer)]
        first.selected_modules = {
            public_name(name): max((given.get(public_name(name), 0.0) for given in scores if given), default=0.0)
            for name in named
            if any(self._check_target_module_exists(self.peft_config[adapter], name) for adapter in adapters)
        }
        try:
            super().add_weighted_adapter(adapters, *args, **kwargs)
        finally:
            first.selected_modules = held

    @classmethod
    def _convert_state_dict_for_initial_model(
        cls, peft_model: Any, peft_config: Any, path_initial_model_for_weight_conversion: str, *args: Any
    ) -> dict[str, torch.Tensor]:
        # peft resets this field for its own LoRA type only, and would subtract the principal components again
        peft_config.init_lora_weights = True
        peft_config.save_pretrained(path_initial_model_for_weight_conversion)
        weights = dict(args[0])
        converted = super()._convert_state_dict_for_initial_model(
            peft_model, peft_config, path_initial_model_for_weight_conversion, *args
        )
        # peft's conversion drops what is saved whole, such as the head
        return {**{key: weight for key, weight in weights.items() if f".{cls.prefix}" not in key}, **converted}


class MovedModule(ModulesToSaveWrapper):
    """A module saved whole that an adapter's file may hold under another release's name.

    PEFT looks for its weights under this release's name, before the tuner can rename what the file holds; so it is told
    that there are none, and `PlasticityModel._remap_adapter_state_dict_for_load` puts them in their place.
    """

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        return {}


@contextmanager
def _undone_on_error(config: PlasticityConfig, model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Give config and model back their fields, modules and gradient flags if adding the adapter fails."""
    fields = dict(vars(config))
    children = [(module, dict(module._modules)) for module in model.modules()]
    layers = [(module, module._active_adapter) for module in model.modules() if isinstance(module, BaseTunerLayer)]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for layer, active in layers:
            if adapter_name in layer._all_available_adapter_names():
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    layer.delete_adapter(adapter_name)
                layer._active_adapter = active
        for module, held in children:
            module._modules.clear()
            module._modules.update(held)
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)
        vars(config).clear()
        vars(config).update(fields)
        raise
