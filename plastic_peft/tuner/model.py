from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Optional

import torch
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, _ExcludedModule, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..components import named_leaves, public_name
from ..embedded import portable_name
from ..names import renamed_keys
from .config import PlasticityConfig
from .layer import FullLayer, trainable_names
from .saved import SavedModule, cast_saved, combine, holders, put_in_place, saved_whole
from .settle import exact_pattern, settle
from .undo import undone_on_error


_TWICE = "would be trained whole in two ways, by an adapter's modules_to_save and by one with adapter='full'"


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
        with undone_on_error(config, model, adapter_name):
            settle(config, model)
            self._check_targets(config, model)
            selected = None if config.selected_modules is None else set(config.selected_modules)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        for name, wrapper in saved_whole(model):
            if name in config._moved_to_save:
                SavedModule.of(wrapper).moved = True
        for module in model.modules():
            parts = (BaseTunerLayer, AuxiliaryTrainingWrapper)
            if isinstance(module, nn.TransformerEncoderLayer) and any(
                isinstance(part, parts) for part in module.modules()
            ):
                # torch's fast path in evaluation reads the weights of the parts without calling them
                module.activation_relu_or_gelu = 0
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
            if isinstance(module, FullLayer) and name.endswith(tuple(config.modules_to_save or ())):
                raise ValueError(f"{name} {_TWICE}: leave it out of modules_to_save (train_norms=False for norms).")
            if not name or not self._check_target_module_exists(config, name):
                continue
            if config.adapter == "full" and isinstance(module, AuxiliaryTrainingWrapper):
                raise ValueError(f"{name} {_TWICE}: select other modules, or leave it out of modules_to_save there.")
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

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        cast_saved(self.model, adapter_name, upcast=autocast_adapter_dtype)

    def _merged(self) -> list[str]:
        layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        return list(dict.fromkeys(name for layer in layers for name in getattr(layer, "merged_adapters", ())))

    def merge_adapter(self, adapter_names: Optional[list[str]] = None, safe_merge: bool = False) -> None:
        """As for LoRA; modules saved whole, such as the head and norms, become those of the merged adapters.

        Raises:
            ValueError: If two of the adapters have the same module saved whole.
        """
        self._check_merge_allowed()
        saved = holders(self.model, [*self._merged(), *(adapter_names or self.active_adapters)])
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)
        put_in_place(saved)

    def unmerge_adapter(self) -> None:
        """As for LoRA; modules saved whole become again those of the active adapters."""
        super().unmerge_adapter()
        put_in_place(holders(self.model, self.active_adapters))

    def _unmerge_what_is_not_active(self) -> None:
        merged = self._merged()
        if merged and set(merged) != set(self.active_adapters):
            self.unmerge_adapter()

    def disable_adapter_layers(self) -> None:
        # layers unmerge as soon as they run disabled, and the head goes with them
        self._unmerge_what_is_not_active()
        super().disable_adapter_layers()

    def delete_adapter(self, adapter_name: str) -> None:
        self._unmerge_what_is_not_active()
        super().delete_adapter(adapter_name)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = True,
        safe_merge: bool = False,
        adapter_names: Optional[list[str]] = None,
    ) -> Any:
        # peft would keep the active adapter's copies, whichever adapter is merged, and if none is
        if merge:
            self._check_merge_allowed()
            put_in_place(holders(self.model, [*self._merged(), *(adapter_names or self.active_adapters)]))
        else:
            if self._merged():
                self.unmerge_adapter()
            put_in_place(holders(self.model, []))
        return super()._unload_and_optionally_merge(
            merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        if getattr(config, "selected_modules", None):
            # an initialisation may have dropped modules to which it gives no rank
            whole: Any = model
            base = whole.get_base_model() if hasattr(model, "get_base_model") else model
            base = base.model if isinstance(base, PlasticityModel) else base
            held = {
                public_name(name)
                for name, module in base.named_modules()
                if isinstance(module, BaseTunerLayer) and adapter_name in module._all_available_adapter_names()
            }
            kept = {name: score for name, score in config.selected_modules.items() if name in held}
            config.selected_modules = kept or config.selected_modules
        return super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)

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
            if isinstance(module, SavedModule) and module.moved:
                for key, place in module.adapter_state_dict_load_map(adapter_name).items():
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

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """As for LoRA; modules saved whole, such as the head and norms, change by the weighted change.

        Raises:
            ValueError: If one of the adapters is a full one, or two of them have the same module saved whole.
        """
        full = [name for name in adapters if getattr(self.peft_config.get(name), "adapter", "lora") == "full"]
        if full:
            raise ValueError(f"add_weighted_adapter combines LoRA weights; {', '.join(full)} has adapter='full'.")
        if adapter_name in self.peft_config or any(name not in self.peft_config for name in adapters):
            # peft leaves an adapter that is there alone, and refuses those that are not there
            super().add_weighted_adapter(adapters, weights, adapter_name, *args, **kwargs)
            return
        # peft copies the first config and unites the targets; exact names and what is saved whole have to be united likewise
        configs: list[Any] = [self.peft_config[name] for name in adapters]
        first, scores = configs[0], [getattr(config, "selected_modules", None) for config in configs]
        held = first.selected_modules, first.modules_to_save
        if any(given is not None for given in scores):
            named = [name for name, module in self.model.named_modules() if isinstance(module, LoraLayer)]
            first.selected_modules = {
                public_name(name): max((given.get(public_name(name), 0.0) for given in scores if given), default=0.0)
                for name in named
                if any(self._check_target_module_exists(self.peft_config[adapter], name) for adapter in adapters)
            }
        saved = [part for config in configs for part in config.modules_to_save or ()]
        first.modules_to_save = list(dict.fromkeys(saved)) or None
        try:
            super().add_weighted_adapter(adapters, weights, adapter_name, *args, **kwargs)
        finally:
            first.selected_modules, first.modules_to_save = held
        self._finish_weighted(adapters, weights, adapter_name)

    def _finish_weighted(self, adapters: list[str], weights: list[float], adapter_name: str) -> None:
        """Combine what is saved whole, and state the ranks that the combination has, which peft leaves out."""
        config: Any = self.peft_config[adapter_name]
        combine(self.model, adapters, weights, adapter_name)
        ranks, alphas = {}, {}
        for name, module in self.model.named_modules():
            if isinstance(module, LoraLayer) and adapter_name in module.r:
                held: Any = module
                embedded = adapter_name in held.lora_embedding_A
                first = held.lora_embedding_A[adapter_name] if embedded else held.lora_A[adapter_name].weight
                rank = first.shape[0]
                scale = math.sqrt(rank) if config.use_rslora else rank
                module.r[adapter_name], module.lora_alpha[adapter_name] = rank, module.scaling[adapter_name] * scale
                ranks[public_name(name)] = rank
                alphas[public_name(name)] = module.lora_alpha[adapter_name]
        if ranks:
            config.rank_pattern = exact_pattern(ranks, config.r)
            config.alpha_pattern = exact_pattern(alphas, config.lora_alpha)

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
