"""What an adapter sits on, read from the model that carries it: modules, ranks and alphas."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from peft import PeftModel

from .components import named_leaves
from .tuner import PlasticityConfig


def plasticity_config(peft_model: PeftModel, adapter_name: str) -> PlasticityConfig:
    """The config of one adapter; a `ValueError` if there is none of that name, or it is not PLASTICITY."""
    config = getattr(peft_model, "peft_config", {}).get(adapter_name)
    if not isinstance(config, PlasticityConfig):
        raise ValueError(
            f"The model has no plasticity adapter {adapter_name!r}; its adapters are "
            f"{sorted(getattr(peft_model, 'peft_config', {}))}: pass adapter_name=."
        )
    return config


def layout(peft_model: PeftModel, adapter_name: str) -> tuple[dict[str, int], dict[str, float]]:
    """Exact names of the modules that an adapter sits on, with their ranks and alphas as they are in the model.

    The ranks of a full adapter are the config's, as it has none of its own.
    """
    config: Any = peft_model.peft_config[adapter_name]
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, module, opaque in named_leaves(peft_model.get_base_model()):
        held: Any = module
        # a parameter adapted by itself is not its module adapted
        if not opaque or not (hasattr(held, "lora_A") or hasattr(held, "lora_full")) or hasattr(held, "parameter_name"):
            continue
        if hasattr(held, "lora_full"):
            if adapter_name in held.lora_full:
                ranks[name], alphas[name] = config.r, config.lora_alpha
        elif adapter_name in held.r:
            ranks[name], alphas[name] = held.r[adapter_name], held.lora_alpha[adapter_name]
    return ranks, alphas


def exact_facts(
    peft_model: PeftModel, adapter_name: str, pattern: Callable[[Mapping[str, Any], Any], dict[str, Any]]
) -> dict[str, Any]:
    """The fields of a config file that say what is adapted, by exact names, whatever patterns they were given by.

    Args:
        pattern: From values by module name, and the default, to a `rank_pattern` or `alpha_pattern` that says them.
    """
    config = plasticity_config(peft_model, adapter_name)
    ranks, alphas = layout(peft_model, adapter_name)
    facts: dict[str, Any] = {
        "target_modules": sorted(ranks) or config.target_modules,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    for name, wrapper in _adapted_parameters(peft_model):
        if adapter_name in wrapper.r:
            ranks[name], alphas[name] = wrapper.r[adapter_name], wrapper.lora_alpha[adapter_name]
    facts["rank_pattern"], facts["alpha_pattern"] = pattern(ranks, config.r), pattern(alphas, config.lora_alpha)
    return facts


def _adapted_parameters(peft_model: PeftModel) -> Iterator[tuple[str, Any]]:
    """Names of the parameters that are adapted by themselves, and their wrappers, of which a module may have several."""
    for name, module, _ in named_leaves(peft_model.get_base_model()):
        wrapper: Any = module
        while hasattr(wrapper, "parameter_name"):
            yield f"{name}.{wrapper.parameter_name}", wrapper
            wrapper = wrapper.base_layer
