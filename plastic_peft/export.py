"""Adapters for those who do not have `plastic_peft`: as a plain LoRA adapter, or merged into the model."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import nn

from .components import named_leaves
from .hub import CONFIG_NAME, whole_folder, write_adapter
from .layout import exact_facts, plasticity_config
from .report import write_whole
from .tuner.saved import saved_whole
from .tuner.settle import LoraMatch


def export_lora(peft_model: PeftModel, path: str | os.PathLike[str], adapter_name: str = "default") -> Path:
    """Write a plain LoRA adapter, which `peft` loads without `plastic_peft` and with equal outputs.

    Modules, ranks and alphas are stated exactly, so that loading adapts the same modules and no others; heads and
    other modules to save come along. The base model has to be loaded with the same number of labels.

    Args:
        peft_model: The model.
        path: Folder to write to, made if needed.
        adapter_name: Which adapter of the model.

    Returns:
        The folder.

    Raises:
        ValueError: If the adapter is not there, or is `adapter="full"`: whole weights are no low-rank update, and norms
            have no LoRA at all. `export_merged` writes such a model.
    """
    config = plasticity_config(peft_model, adapter_name)
    if config.adapter == "full":
        raise ValueError(
            f'{adapter_name!r} is adapter="full": its weights are no low-rank update, so that no LoRA adapter equals it. '
            "Use export_merged(peft_model, path), which writes a model that transformers loads alone."
        )
    base = peft_model.get_base_model()
    ours = {field.name for field in fields(config)} - {field.name for field in fields(LoraConfig)}
    with whole_folder(path) as folder:
        write_adapter(peft_model, adapter_name, folder)
        _cast_saved(folder / SAFETENSORS_WEIGHTS_NAME, base)
        facts = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        facts = {name: value for name, value in facts.items() if name not in ours}
        facts |= {"peft_type": "LORA", **exact_facts(peft_model, adapter_name, _pattern)}
        facts["target_modules"] = _targets(facts["target_modules"], base)
        write_whole(folder / CONFIG_NAME, json.dumps(facts, indent=2, sort_keys=True))
    return Path(path)


def export_merged(peft_model: PeftModel, path: str | os.PathLike[str], adapter_name: str = "default") -> Path:
    """Write the model with the adapter merged in, which `transformers` loads alone; the model itself is left as it is.

    Merging is exact for `adapter="full"`, and up to rounding for `adapter="lora"`. The image processor comes
    along if `peft_model.image_processor` is there. Needs memory for a second copy of the model.

    Args:
        peft_model: The model; its base has to be a transformers model.
        path: Folder to write to, made if needed.
        adapter_name: Which adapter of the model.

    Returns:
        The folder.

    Raises:
        ValueError: If the model has no such adapter, or the merged weights are not finite.
        TypeError: If the base model cannot save itself.
    """
    plasticity_config(peft_model, adapter_name)
    merged: Any = copy.deepcopy(peft_model)
    merged.set_adapter(adapter_name)
    merged = merged.merge_and_unload(safe_merge=True)
    if not hasattr(merged, "save_pretrained"):
        raise TypeError(
            f"{type(merged).__name__} has no save_pretrained: save merge_and_unload().state_dict() yourself."
        )
    with whole_folder(path) as folder:
        merged.save_pretrained(folder)
        processor = getattr(peft_model, "image_processor", None)
        if processor is not None:
            processor.save_pretrained(folder)
    return Path(path)


def _cast_saved(file: Path, base: nn.Module) -> None:
    """Give modules saved whole the dtype that the model computes with: peft alone runs them in the file's."""
    tensors = load_file(file)
    originals = {
        f"base_model.model.{name}.{part}": parameter.dtype
        for name, wrapper in saved_whole(base)
        for part, parameter in wrapper.original_module.named_parameters()
    }
    cast = {name: tensor.to(originals.get(name, tensor.dtype)) for name, tensor in tensors.items()}
    if any(cast[name].dtype != tensor.dtype for name, tensor in tensors.items()):
        save_file(cast, file, metadata={"format": "pt"})


def _targets(names: Any, base: nn.Module) -> Any:
    """The names as a list where peft, which also takes suffixes, finds just these; else as an anchored expression."""
    if not isinstance(names, list):
        return names
    listed = sorted(names)
    probe = LoraMatch(listed)
    if all(name in listed for name, _, _ in named_leaves(base) if probe.matches(name)):
        return listed
    return "|".join(map(re.escape, listed))


def _pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Values that differ from the default, by name; anchored where peft's matching would reach further."""
    changed = {name: value for name, value in sorted(values.items()) if value != default}
    if all(changed.get(get_pattern_key(list(changed), name), default) == value for name, value in values.items()):
        return changed
    return {f"^{re.escape(name)}": value for name, value in changed.items()}
