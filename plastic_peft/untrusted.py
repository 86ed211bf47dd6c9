"""Reading files that strangers wrote: strict JSON, and an `adapter_config.json` that can only say what an adapter needs.

PEFT's own config reader takes whatever a file says: regular expressions, modules to import, paths. What comes from the Hub
passes through here first, so that a file can neither run code, nor hang, nor reach for what is not its own.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
import warnings
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from .selection import ADAPTERS, GRANULARITIES, ORDERS, RANK_ALLOCATIONS, WITHIN
from .tuner.config import MAX_NAMES, PlasticityConfig


MAX_BYTES = 64 * 2**20
MAX_RANK = 65_536
_MODULE = re.compile(r"\w[\w-]*(\.\w[\w-]*)*")
_FILED = re.compile(r"\w[\w-]*(\.(\w[\w-]*|\*))*")
_INITIAL = re.compile(r"gaussian|eva|orthogonal|olora|pissa|pissa_niter_\d{1,2}")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FileNotFoundError: If the file is not there.
        ValueError: If it is larger than 64 MiB, no JSON object, nested too deeply, holds a key twice, or NaN or infinity.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"it holds the key {_short(key)} twice")
            found[key] = value
        return found

    def refuse(constant: str) -> Any:
        raise ValueError(f"it holds {constant}, which is no JSON number")

    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} is larger than {MAX_BYTES // 2**20} MiB, which no such file is.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError:
        raise ValueError(f"{path} cannot be read: it is nested too deeply.") from None
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}.") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} cannot be read: it holds a {type(data).__name__} in place of a JSON object.")
    return data


def validate_adapter_config(data: Any) -> dict[str, Any]:
    """Check a parsed `adapter_config.json` of a plasticity adapter, and return the options that loading may use.

    Only the adapter's own facts pass: plain module names, finite numbers, known words. Fields that loading does not need
    (`task_type`, `auto_mapping`, ...) are left out; so are fields of newer releases, with a warning.

    Args:
        data: The parsed JSON.

    Returns:
        Keyword arguments of `PlasticityConfig`, which have been accepted by it.

    Raises:
        ValueError: If anything is not as an adapter's config has it; the message names the field and shows its value.
    """
    if not isinstance(data, dict):
        raise ValueError(f"adapter_config.json holds a {type(data).__name__} in place of an object.")
    if data.get("peft_type") != "PLASTICITY":
        raise ValueError(
            f"adapter_config.json has peft_type {_short(data.get('peft_type'))}, and only PLASTICITY adapters load here: "
            "load others with peft.PeftModel.from_pretrained."
        )
    known = {field.name: field for field in fields(PlasticityConfig) if field.init}
    if unknown := [name for name in data if name not in known]:
        warnings.warn(
            f"adapter_config.json has fields that this release does not know: {_short(unknown)}.", stacklevel=2
        )
    checked: dict[str, Any] = {}
    for name, field in known.items():
        if name not in data or name in _UNUSED:
            continue
        value = data[name]
        if name in _RULES:
            allowed, meaning = _RULES[name]
            if not allowed(value):
                raise ValueError(f"adapter_config.json: {name} is {_short(value)}, and it must be {meaning}.")
            checked[name] = value
        elif value != (field.default_factory() if field.default_factory is not MISSING else field.default):
            raise ValueError(
                f"adapter_config.json: {name} is {_short(value)}, which is not loaded from files of others. If you trust "
                "this adapter, load it with peft.PeftModel.from_pretrained."
            )
    if checked.get("selected_modules") is None and not checked.get("target_modules"):
        raise ValueError("adapter_config.json names no modules: selected_modules and target_modules are both missing.")
    try:
        PlasticityConfig(**checked)
    except (TypeError, ValueError) as error:
        raise ValueError(f"adapter_config.json: {error}") from None
    return checked


def is_module_name(value: Any, pattern: re.Pattern[str] = _MODULE) -> bool:
    """Whether `value` is a dotted module name, with nothing in it that a regular expression would interpret."""
    return isinstance(value, str) and 0 < len(value) <= 500 and pattern.fullmatch(value) is not None


def _short(value: Any) -> str:
    return reprlib.repr(value)[:120]


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _number(value: Any) -> bool:
    return (isinstance(value, float) and math.isfinite(value)) or _integer(value)


def _rank(value: Any) -> bool:
    return _integer(value) and 1 <= value <= MAX_RANK


def _names(value: Any) -> bool:
    return isinstance(value, list) and 0 < len(value) <= MAX_NAMES and all(map(is_module_name, value))


def _mapping(key: Callable[[Any], bool], item: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        return isinstance(value, dict) and len(value) <= MAX_NAMES and all(key(k) and item(v) for k, v in value.items())

    return check


def _filed(value: Any) -> bool:
    return is_module_name(value, _FILED)


def _text(limit: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and len(value) <= limit and value.isprintable()


def _one_of(*choices: Any) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in choices


def _maybe(rule: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or rule(value)


_FLAG = (lambda value: isinstance(value, bool), "true or false")
_PLAIN = "plain module names, not regular expressions (save_adapter writes them so)"

# what a file may say, and the words for it; any other field of the config must be at its default
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "peft_type": (_one_of("PLASTICITY"), "PLASTICITY"),
    "base_model_name_or_path": (_maybe(_text(4096)), "a name or path, or null"),
    "revision": (_maybe(lambda v: _text(200)(v) and re.fullmatch(r"\w[\w./-]*", v) is not None), "a revision or null"),
    "inference_mode": _FLAG,
    "r": (_rank, f"a whole number from 1 to {MAX_RANK}"),
    "target_modules": (_maybe(lambda v: v == "all-linear" or _names(v)), f"'all-linear' or a list of {_PLAIN}"),
    "exclude_modules": (_maybe(_names), f"a list of {_PLAIN}, or null"),
    "lora_alpha": (_number, "a finite number"),
    "lora_dropout": (lambda v: _number(v) and 0 <= v < 1, "a number from 0 to 1"),
    "fan_in_fan_out": _FLAG,
    "bias": (_one_of("none", "all", "lora_only"), "'none', 'all' or 'lora_only'"),
    "use_rslora": _FLAG,
    "use_dora": _FLAG,
    "lora_bias": _FLAG,
    "modules_to_save": (_maybe(lambda v: v == [] or _names(v)), f"a list of {_PLAIN}, or null"),
    "init_lora_weights": (
        lambda v: isinstance(v, bool) or (isinstance(v, str) and _INITIAL.fullmatch(v) is not None),
        "a way of initialising that needs no data",
    ),
    "layers_to_transform": (
        _maybe(lambda v: _integer(v) or (isinstance(v, list) and len(v) <= MAX_NAMES and all(map(_integer, v)))),
        "block numbers or null",
    ),
    "layers_pattern": (_maybe(lambda v: is_module_name(v) or v == [] or _names(v)), f"{_PLAIN}, or null"),
    "rank_pattern": (_maybe(_mapping(is_module_name, _rank)), f"ranks by {_PLAIN}"),
    "alpha_pattern": (_maybe(_mapping(is_module_name, _number)), f"finite numbers by {_PLAIN}"),
    "adapter": (_one_of(*ADAPTERS), "'lora' or 'full'"),
    "budget": (_maybe(_number), "a number or null"),
    "top_k": (_maybe(_integer), "a whole number or null"),
    "fraction": (_maybe(_number), "a number or null"),
    "threshold": (_maybe(_number), "a number or null"),
    "granularity": (_one_of(*GRANULARITIES), "a known word"),
    "within": (_one_of(*WITHIN), "a known word"),
    "signal": (_maybe(_text(40)), "a known word or null"),
    "order": (_one_of(*ORDERS), "a known word"),
    "rank_allocation": (_maybe(_one_of(*RANK_ALLOCATIONS)), "a known word or null"),
    "train_norms": (_maybe(_FLAG[0]), "true, false or null"),
    "seed": (_integer, "a whole number"),
    "selected_modules": (
        _maybe(lambda v: v != {} and _mapping(is_module_name, _number)(v)),
        "finite scores by plain module names",
    ),
    "labels": (
        _maybe(lambda v: isinstance(v, list) and 0 < len(v) <= MAX_NAMES and all(map(_text(1000), v))),
        "a list of label names, or null",
    ),
    "problem_type": (
        _maybe(_one_of("regression", "single_label_classification", "multi_label_classification")),
        "a kind of classification as transformers has it, or null",
    ),
    "checkpoint_names": (_maybe(_mapping(_filed, _filed)), "plain module names by plain module names, or null"),
}
# facts for readers and for other loaders; they take no part in loading
_UNUSED = {
    "auto_mapping",
    "eva_config",
    "megatron_core",
    "peft_version",
    "plasticity",
    "runtime_config",
    "task_type",
    "velora_config",
}
