"""Names of modules across transformers releases.

transformers 5 renamed the modules of many vision models, while their checkpoint files keep the older names, which
are the module names of transformers 4. transformers' own table of renamings leads from one to the other, so the name in
the checkpoint file is the one that every release can find.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .components import named_leaves


_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def checkpoint_names(model: nn.Module) -> dict[str, str]:
    """Module name to name in the model's checkpoint files, for the modules where the two differ.

    Empty for models outside transformers, and under transformers 4, which names modules as the files do.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange, WeightRenaming, rename_source_key
    except ImportError:
        return {}
    if not isinstance(model, PreTrainedModel):
        return {}
    # a prefix that loading drops cannot be told from one that was never there, so transformers skips those as well
    forward = [
        entry
        for entry in get_model_conversion_mapping(model, add_legacy=False)
        if isinstance(entry, WeightRenaming) and not isinstance(entry, PrefixChange)
    ]
    backward: list[Any] = [entry.reverse_transform() for entry in reversed(forward)]
    names = [name for name, module, _ in named_leaves(model) if name and next(module.parameters(), None) is not None]
    filed = {name: rename_source_key(f"{name}.weight", backward, [])[0].removesuffix(".weight") for name in names}
    return {name: other for name, other in filed.items() if other != name}


def compact(names: Mapping[str, str]) -> dict[str, str]:
    """The mapping with `*` in the place of block numbers where they agree: one entry for all blocks."""
    short = {}
    for name, other in names.items():
        if _NUMBER.findall(name) == _NUMBER.findall(other):
            name, other = _NUMBER.sub("*", name), _NUMBER.sub("*", other)
        short[name] = other
    return short


def elsewhere(model: nn.Module, recorded: Mapping[str, str] | None = None) -> dict[str, str]:
    """Name of each module of `model` to its name in another release: the one of `recorded`, or the checkpoint file's."""
    inverse = {filed: name for name, filed in (recorded or {}).items()}
    named = {name: _filed(name, inverse) for name, _, _ in named_leaves(model) if name}
    return checkpoint_names(model) or {name: other for name, other in named.items() if other != name}


def renamings(names: Iterable[str], model: nn.Module, recorded: Mapping[str, str] | None = None) -> dict[str, str]:
    """Which of `names` this model has under another name: given name to the model's.

    Args:
        names: Full module names, as another release of transformers has them; others are left out.
        model: The model that they are to be found in; it may carry adapters.
        recorded: `compact(checkpoint_names(...))` of the model that the names come from.
    """
    known = {name for name, _, _ in named_leaves(model)}
    unknown = [name for name in dict.fromkeys(names) if name and name not in known]
    if not unknown:
        return {}
    current = {filed: name for name, filed in checkpoint_names(model).items()}
    found = {}
    for name in unknown:
        filed = _filed(name, recorded or {})
        here = current.get(filed, filed)
        if here in known:
            found[name] = here
    return found


def renamed_keys(
    keys: Iterable[str], model: nn.Module, recorded: Mapping[str, str] | None = None, prefix: str = "base_model.model."
) -> dict[str, str]:
    """State dict key of an adapter file to the same key in this model's module names."""
    owners = {}
    for key in keys:
        owner = key.removeprefix(prefix).partition(".lora_")[0]
        owners[key] = owner if ".lora_" in key else owner.rpartition(".")[0]
    found = renamings(owners.values(), model, recorded)
    moved = {}
    for key, owner in owners.items():
        start = prefix if key.startswith(prefix) else ""
        moved[key] = start + found[owner] + key[len(start) + len(owner) :] if owner in found else key
    return moved


def _filed(name: str, recorded: Mapping[str, str]) -> str:
    if name in recorded:
        return recorded[name]
    pattern = recorded.get(_NUMBER.sub("*", name))
    if pattern is None:
        return name
    numbers = iter(_NUMBER.findall(name))
    return re.sub(r"\*", lambda _: next(numbers, "*"), pattern)
