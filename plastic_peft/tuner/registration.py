"""Make PEFT know the method: a member of its closed `PeftType` enum, and entries in its tables."""

from __future__ import annotations

from typing import Any

from peft.utils import PeftType, register_peft_method
from peft.utils.hotswap import CONFIG_KEYS_TO_CHECK


NAME = "PLASTICITY"


def add_peft_type() -> PeftType:
    """Return `PeftType.PLASTICITY`, adding it to the enum the first time.

    The member answers like those that PEFT defines itself: by value, attribute, item, iteration, pickle and JSON.
    """
    if NAME in PeftType.__members__:
        return PeftType(NAME)
    member: Any = str.__new__(PeftType, NAME)
    member._name_ = NAME
    member._value_ = NAME
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    # the enum's own __setattr__ refuses members, and up to Python 3.12 attribute look-up reads the map below
    type.__setattr__(PeftType, NAME, member)
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    return member


def register(config_cls: type, model_cls: type) -> None:
    """Register config and tuner with PEFT; a second call changes nothing."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    peft_type = add_peft_type()
    if peft_type in PEFT_TYPE_TO_TUNER_MAPPING:
        return
    register_peft_method(name="plasticity", config_cls=config_cls, model_cls=model_cls, prefix="lora_")
    # hotswap fills the weights of modules that the new adapter lacks with zeros, which is wrong for whole weights
    CONFIG_KEYS_TO_CHECK[peft_type] = [*CONFIG_KEYS_TO_CHECK[PeftType.LORA], "adapter", "target_modules"]
