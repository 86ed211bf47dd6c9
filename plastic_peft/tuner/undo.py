"""Adapters are added whole, or the model is left as it was."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .config import PlasticityConfig


@contextmanager
def undone_on_error(config: PlasticityConfig, model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Give config and model back their fields, modules, weights and gradient flags if adding the adapter fails."""
    fields = dict(vars(config))
    configs = vars(model).get("peft_config")
    registered = dict(configs or {})
    children = [(module, dict(module._modules), dict(module._parameters)) for module in model.modules()]
    layers = [(module, module._active_adapter) for module in model.modules() if isinstance(module, BaseTunerLayer)]
    weights = [(parameter, parameter.data, parameter.requires_grad) for parameter in model.parameters()]
    # this way of initialising takes its part out of the base weights in place; others put new ones there
    copies = [data.clone() for _, data, _ in weights] if str(config.init_lora_weights).lower() == "olora" else []
    try:
        yield
    except BaseException:
        for layer, active in layers:
            if adapter_name in layer._all_available_adapter_names():
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    layer.delete_adapter(adapter_name)
                layer._active_adapter = active
        for module, modules, parameters in children:
            _put_back(module._modules, modules)
            _put_back(module._parameters, parameters)
        with torch.no_grad():
            for (_, data, _), copy in zip(weights, copies, strict=False):
                data.copy_(copy)
        for parameter, data, flag in weights:
            parameter.data = data
            parameter.requires_grad_(flag)
        vars(model).pop("peft_config", None)
        if configs is not None:
            vars(model)["peft_config"] = configs
            _put_back(configs, registered)
        _put_back(vars(config), fields)
        raise


def _put_back(held: Any, former: dict[str, Any]) -> None:
    held.clear()
    held.update(former)
