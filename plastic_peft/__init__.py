"""plastic_peft: PEFT adapters on the modules that a measurement of your images selects.

Importing the package registers the method with PEFT.
"""

from typing import TYPE_CHECKING, Any

from .bounds import plasticity_bounds
from .components import Component, find_components
from .measure import measure_plasticity
from .report import PlasticityReport
from .selection import Selection
from .tuner import PlasticityConfig, PlasticityModel


if TYPE_CHECKING:
    from .callback import PlasticityCallback
    from .card import model_card
    from .embedded import load_vit_nano, vit_nano_source_images
    from .export import export_lora, export_merged
    from .hub import AutoPlasticModelForImageClassification, push, save_adapter
    from .untrusted import validate_adapter_config


__version__ = "0.1.0"

# what needs the trainer or the Hub client loads when it is asked for
_LATER = {
    "AutoPlasticModelForImageClassification": "hub",
    "PlasticityCallback": "callback",
    "export_lora": "export",
    "export_merged": "export",
    "load_vit_nano": "embedded",
    "model_card": "card",
    "push": "hub",
    "save_adapter": "hub",
    "validate_adapter_config": "untrusted",
    "vit_nano_source_images": "embedded",
}

__all__ = [
    "AutoPlasticModelForImageClassification",
    "Component",
    "PlasticityCallback",
    "PlasticityConfig",
    "PlasticityModel",
    "PlasticityReport",
    "Selection",
    "export_lora",
    "export_merged",
    "find_components",
    "load_vit_nano",
    "measure_plasticity",
    "model_card",
    "plasticity_bounds",
    "push",
    "save_adapter",
    "validate_adapter_config",
    "vit_nano_source_images",
]


def __getattr__(name: str) -> Any:
    if name in _LATER:
        from importlib import import_module

        return getattr(import_module(f".{_LATER[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
