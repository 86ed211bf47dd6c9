"""Settling what a `PlasticityConfig` asks for, before the first module is touched: names, ranks, norms and head.

Whatever releases of transformers name modules, the config ends up with this model's names.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import PeftType
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..components import (
    BLOCK_ROLES,
    Structure,
    base_weight,
    named_leaves,
    own_parameters,
    parameter_count,
    trace,
    whole_shape,
)
from ..measure import measure_on_synthetic_images
from ..names import checkpoint_names, compact, elsewhere, renamings
from ..report import PlasticityReport, Row, default_signal, lora_cost_per_rank, nearest
from ..selection import Candidate, Selection, select
from .config import PlasticityConfig
from .layer import packed_dtype


logger = logging.getLogger(__name__)

# what peft saves whole for classification tasks, whether the model has it or not
USUAL_HEADS = ("classifier", "score")


def settle(config: PlasticityConfig, model: nn.Module) -> None:
    """Fill `target_modules`, `selected_modules`, ranks and `modules_to_save` of `config` in, measuring only if needed.

    Raises:
        ValueError: If the report describes another architecture, names are not in the model, nothing is selected, or what
            is to be saved whole is quantised.
    """
    modules = {name: module for name, module, _ in named_leaves(model)}
    structure: Structure | None = None
    found_norms: tuple[str, ...] = ()
    adopt_names(config, model)
    if config.selected_modules is not None:
        _check_names(config.selected_modules, modules, "selected_modules")
        config.target_modules = set(config.selected_modules)  # type: ignore[assignment]
    elif config.target_modules is not None or config.target_parameters:
        _warn_of_idle_options(config)
    else:
        report, structure = _report_for(config, model, modules)
        if isinstance(report, PlasticityReport):
            config.signal = config.signal or default_signal(report.rows)
            candidates = report.candidates(config.signal)
            total = report.base_parameters
            config.report = report
        else:
            candidates, total = report, _base_parameters(model)
        candidates = [
            replace(c, constant_cost=_constant_cost(config, modules[c.name])) for c in _allowed(config, candidates)
        ]
        options = config.selection_options()
        options.pop("signal")
        if not isinstance(report, PlasticityReport):
            # scores by name say nothing of roles and blocks
            options["granularity"] = "module"
        selection = select(candidates, base_parameters=total, **options)
        found_norms = selection.norms
        _apply(config, selection)
        config.plasticity = None
    if "auto" in (config.modules_to_save or ()):
        chosen = config.selected_modules or {}
        # a head that was asked for by name is adapted instead
        head = [name for name in _head(config, model, modules, structure) if name not in chosen]
        saved = [part for name in config.modules_to_save or () for part in (head if name == "auto" else [name])]
        _check_reach(head, modules)
        config.modules_to_save = list(dict.fromkeys(saved)) or None
        if head:
            logger.info("modules_to_save='auto' found the head: %s", ", ".join(head))
    _check_saved(config, modules)
    _check_reach(found_norms, modules)
    for name, module in modules.items():
        if name.endswith(tuple(config.modules_to_save or ())) and (packed := packed_dtype(module)):
            raise ValueError(
                f"modules_to_save trains whole weights, and those of {name} are quantised ({packed}): load the model with this "
                f"module left as it is, for bitsandbytes with BitsAndBytesConfig(..., llm_int8_skip_modules=[{name!r}])."
            )


def _check_saved(config: PlasticityConfig, modules: Mapping[str, nn.Module]) -> None:
    """Names of `modules_to_save` have to be there; those that peft adds for a task go by what most models have."""
    for name in config.modules_to_save or ():
        usual = config.task_type is not None and name in USUAL_HEADS
        if not usual and not any(other.endswith(name) for other in modules):
            raise ValueError(
                f"modules_to_save names {name!r}, which this model does not have.{nearest(name, modules)} 'auto' finds the head by "
                "itself."
            )


def _check_reach(names: Iterable[str], modules: Iterable[str]) -> None:
    """PEFT saves whole whatever name ends with one of `modules_to_save`: refuse names that reach further than themselves."""
    names = set(names)
    for name in sorted(names):
        further = next((other for other in modules if other.endswith(name) and other not in names), None)
        if further is not None:
            raise ValueError(
                f"{name} is to be trained whole, and peft, which goes by the ends of names, would train {further} as well: rename "
                f"one of the two, or pass modules_to_save=None (and train_norms=False) and adapt {name} as a target module."
            )


def _warn_of_idle_options(config: PlasticityConfig) -> None:
    names = ("plasticity", "budget", "top_k", "fraction", "threshold")
    idle = [name for name in names if getattr(config, name) is not None]
    if idle:
        warnings.warn(
            f"{', '.join(idle)} has no effect beside explicit target_modules, which win: leave one of them out.",
            UserWarning,
            stacklevel=2,
        )


def adopt_names(config: PlasticityConfig, model: nn.Module) -> None:
    """Put the module names of `config` into this model's names where another release of transformers chose them."""
    given: Any = config.target_modules
    patterns: list[dict[str, Any]] = [config.rank_pattern or {}, config.alpha_pattern or {}]
    exact = config.selected_modules or (() if isinstance(given, str) else given) or ()
    names = renamings([*exact, *patterns[0], *patterns[1]], model, config.checkpoint_names)
    if names:
        if config.selected_modules is not None:
            config.selected_modules = {names.get(name, name): score for name, score in config.selected_modules.items()}
        if given is not None and not isinstance(given, str):
            config.target_modules = {names.get(name, name) for name in given}  # type: ignore[assignment]
        config.rank_pattern, config.alpha_pattern = (
            {names.get(name, name): value for name, value in pattern.items()} for pattern in patterns
        )
    elif given and given != "all-linear" and config.selected_modules is None:
        _adopt_patterns(config, model)
    _adopt_saved(config, model)
    config._names_in_file = config.checkpoint_names
    config.checkpoint_names = compact(checkpoint_names(model)) or None
    labels = getattr(getattr(model, "config", None), "id2label", None)
    # what was filled in for one model is no wish for the next
    if labels and (config.labels is None or config.labels is config._found_labels):
        config.labels = config._found_labels = [str(labels[index]) for index in sorted(labels)]
        config.problem_type = getattr(model.config, "problem_type", None)


def _adopt_patterns(config: PlasticityConfig, model: nn.Module) -> None:
    """Where suffixes or a regular expression match no module here but do in another release's names, follow those."""
    probe = LoraMatch(config.target_modules)
    known = [name for name, _, _ in named_leaves(model)]
    if any(probe.matches(name) for name in known):
        return
    others = elsewhere(model, config.checkpoint_names)
    found = {name: other for name, other in others.items() if probe.matches(other)}
    if not found:
        return
    config.target_modules = set(found)  # type: ignore[assignment]
    for pattern in ("rank_pattern", "alpha_pattern"):
        values = getattr(config, pattern) or {}
        keys = {name: get_pattern_key(list(values), other) for name, other in found.items()}
        setattr(config, pattern, {name: values[key] for name, key in keys.items() if key in values})


def _adopt_saved(config: PlasticityConfig, model: nn.Module) -> None:
    """Where `modules_to_save` names no module here, or the end of its name, but does in another release, follow that one."""
    here = [name for name, _, _ in named_leaves(model)]
    unknown = [end for end in config.modules_to_save or () if not any(name.endswith(end) for name in here)]
    others = elsewhere(model, config.checkpoint_names) if unknown else {}
    # the modules named and those inside them: releases group modules differently
    moved = {end: _innermost([name for name, other in others.items() if f"{end}." in f"{other}."]) for end in unknown}
    config._moved_to_save = [name for names in moved.values() for name in names]
    if config._moved_to_save:
        config.modules_to_save = [name for end in config.modules_to_save or () for name in moved.get(end) or [end]]


def _innermost(names: list[str]) -> list[str]:
    return [name for name in names if not any(other.startswith(f"{name}.") for other in names)]


def _apply(config: PlasticityConfig, selection: Selection) -> None:
    config.selected_modules = dict(selection.scores)
    config.target_modules = set(selection.scores)  # type: ignore[assignment]
    if selection.norms:
        config.modules_to_save = [*(config.modules_to_save or ()), *selection.norms]
    scaling = math.sqrt if config.use_rslora else float
    alphas = {name: config.lora_alpha * scaling(rank) / scaling(config.r) for name, rank in selection.ranks.items()}
    # what the user gave by pattern wins over what the selection says
    ranks = {name: _given(config.rank_pattern, name, rank) for name, rank in selection.ranks.items()}
    alphas = {name: _given(config.alpha_pattern, name, alpha) for name, alpha in alphas.items()}
    config.rank_pattern = exact_pattern(ranks, config.r)
    config.alpha_pattern = exact_pattern(alphas, config.lora_alpha)


def _given(pattern: Any, name: str, default: Any) -> Any:
    return (pattern or {}).get(get_pattern_key(list(pattern or {}), name), default)


def exact_pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Values that differ from the default, by name; all of them where peft's matching of suffixes would mix them up."""
    changed = {name: value for name, value in values.items() if value != default}
    if all(_given(changed, name, default) == value for name, value in values.items()):
        return changed
    # peft takes the first entry that a module's name ends with
    return dict(sorted(values.items(), key=lambda item: -len(item[0])))


def _base_parameters(model: nn.Module) -> int:
    """Parameters of the model itself, without the adapters that it may already carry."""
    return sum(
        parameter_count(parameter)
        for name, parameter in model.named_parameters()
        if f".{LoraModel.prefix}" not in name and ".modules_to_save." not in name
    )


def _report_for(
    config: PlasticityConfig, model: nn.Module, modules: dict[str, nn.Module]
) -> tuple[PlasticityReport | list[Candidate], Structure | None]:
    given: Any = config.plasticity
    if isinstance(given, str):
        given = PlasticityReport.load(given)
    if given is None:
        warnings.warn(
            "Neither a plasticity report nor target_modules was given: measuring on synthetic images of the model's input "
            "size. Pass plasticity=measure_plasticity(model, images) to choose modules for your data.",
            UserWarning,
            stacklevel=2,
        )
        try:
            return measure_on_synthetic_images(model, seed=config.seed), None
        except ValueError as error:
            raise ValueError(
                f"Please specify `target_modules` or `plasticity`: {type(model).__name__} cannot be measured on synthetic "
                f"images. {error}"
            ) from error
    if isinstance(given, PlasticityReport):
        return _fitted(given, model, modules)
    if config.signal is not None:
        raise ValueError(
            f"signal={config.signal!r} chooses among what a report holds, and plasticity is a mapping with one score per "
            "module: leave signal out, or pass a PlasticityReport."
        )
    _check_names(given, modules, "plasticity")
    return [_candidate(name, score, modules[name]) for name, score in given.items()], None


def _candidate(name: str, score: float, module: nn.Module) -> Candidate:
    layer: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    weight = layer.in_proj_weight if isinstance(layer, nn.MultiheadAttention) else base_weight(layer)
    shape = None if weight is None else (getattr(layer, "out_features", weight.shape[0]), *whole_shape(weight)[1:])
    able = isinstance(
        layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.MultiheadAttention, Conv1D)
    ) or isinstance(module, LoraLayer)
    able = able and getattr(layer, "groups", 1) == 1
    return Candidate(
        name=name,
        role="module",
        block=0,
        component=name,
        score=score,
        component_score=score,
        cost_per_rank=lora_cost_per_rank(type(layer).__name__, shape) if able else 0,
        parameters=sum(map(parameter_count, own_parameters(module))),
    )


def _constant_cost(config: PlasticityConfig, module: nn.Module) -> int:
    """Trainable parameters that LoRA with this config has on a module beside its ranks."""
    if config.adapter == "full":
        return 0
    layer: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    bias = getattr(layer, "bias", None)
    width = next((getattr(layer, name) for name in ("out_features", "out_channels") if hasattr(layer, name)), 0)
    owned = parameter_count(bias) if config.bias == "lora_only" and isinstance(bias, torch.Tensor) else 0
    return owned + int(width) * (bool(config.use_dora) + bool(config.lora_bias))


def _fitted(
    report: PlasticityReport, model: nn.Module, modules: dict[str, nn.Module]
) -> tuple[PlasticityReport, Structure | None]:
    """The report in this model's names: as it is, or translated where the same architecture is named otherwise."""
    report = in_names_of(report, model)
    rows = [row for row in report.select_rows("module") if row.role in BLOCK_ROLES]
    odd = next((row for row in rows if not fits(row, modules.get(row.name))), None)
    if odd is None:
        return report, None
    structure = trace(model)
    what = "is not in this model" if odd.name not in modules else f"has another shape than {odd.shape} in this model"
    near = nearest(odd.name, modules) if odd.name not in modules else ""
    remedy = f"{odd.name} {what}.{near} Measure this model, or pass the report that belongs to it."
    if structure.fingerprint != report.fingerprint:
        raise ValueError(
            f"The report describes another architecture ({report.base_model}, fingerprint {report.fingerprint}; this model has "
            f"{structure.fingerprint}): {remedy}"
        )
    # equal fingerprints mean equal roles, blocks and shapes in equal order, so places translate names
    here = [leaf for component in structure.components if component.role in BLOCK_ROLES for leaf in component.modules]
    if len(here) != len(rows):
        raise ValueError(
            f"The report has rows for {len(rows)} of the {len(here)} modules in blocks, too few to translate its names into this "
            f"model's: {remedy}"
        )
    names = dict(zip((row.name for row in rows), here, strict=True))
    parts = dict(
        zip(
            dict.fromkeys((row.component, row.role) for row in rows),
            (component.name for component in structure.components if component.role in BLOCK_ROLES),
            strict=True,
        )
    )

    def renamed(row: Row) -> Row:
        component = parts.get((row.component, row.role), row.component)
        return replace(
            row, name=component if row.level == "component" else names.get(row.name, row.name), component=component
        )

    kept = [row for row in report.rows if row.role in BLOCK_ROLES]
    return replace(report, rows=tuple(renamed(row) for row in kept)), structure


def in_names_of(report: PlasticityReport, model: nn.Module, recorded: dict[str, str] | None = None) -> PlasticityReport:
    """The report with the names that this model has for modules which another release of transformers named."""
    names = renamings((name for row in report.rows for name in (row.name, row.component)), model, recorded)
    if not names:
        return report
    return replace(
        report,
        rows=tuple(
            replace(row, name=names.get(row.name, row.name), component=names.get(row.component, row.component))
            for row in report.rows
        ),
    )


def fits(row: Row, module: nn.Module | None) -> bool:
    if module is None:
        return False
    weight = base_weight(module)
    if row.shape is None or weight is None or not weight.is_floating_point() or weight.numel() == 0:
        return True
    return weight.numel() == math.prod(row.shape) or row.kind == "MultiheadAttention"


def _check_names(scores: dict[str, float], modules: dict[str, nn.Module], what: str) -> None:
    unknown = [name for name in scores if name not in modules or not name]
    if unknown:
        raise ValueError(
            f"{what} names {len(unknown)} modules that this model does not have, such as {unknown[0]!r}."
            f"{nearest(unknown[0], modules)} Load it on the model that it was made for."
        )


def _allowed(config: PlasticityConfig, candidates: list[Candidate]) -> list[Candidate]:
    """Leave out what `exclude_modules` and `layers_to_transform` rule out."""
    layers = config.layers_to_transform
    if layers is not None:
        layers = [layers] if isinstance(layers, int) else layers
        candidates = [c for c in candidates if (_in_layers(config, c) if c.role == "module" else c.block in layers)]
    if config.exclude_modules:
        probe = LoraMatch(config.exclude_modules)
        candidates = [c for c in candidates if not probe.matches(c.name)]
    if config.modules_to_save:
        candidates = [c for c in candidates if not _saved_whole(c.name, config.modules_to_save)]
    if not candidates:
        raise ValueError(
            "exclude_modules, layers_to_transform and modules_to_save leave no measured module to select from: loosen them."
        )
    return candidates


def _in_layers(config: PlasticityConfig, candidate: Candidate) -> bool:
    """Without a report nobody knows the module's block: its name says it, as for peft's own target modules."""
    probe = LoraMatch([candidate.name.rpartition(".")[2]])
    probe.layers_to_transform, probe.layers_pattern = config.layers_to_transform, config.layers_pattern
    return probe.matches(candidate.name)


def _saved_whole(name: str, modules_to_save: Any) -> bool:
    """Is the module trained in full as one of `modules_to_save`, which name the ends of names, or inside one of them?"""
    parts = name.split(".")
    around = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return any(outer.endswith(saved) for outer in around for saved in modules_to_save)


class LoraMatch:
    """PEFT's way of matching names: a string is a regular expression, a list holds exact names or suffixes."""

    def __init__(self, patterns: Any) -> None:
        self.target_modules = patterns
        self.peft_type = PeftType.LORA
        self.exclude_modules = None
        self.layers_to_transform: Any = None
        self.layers_pattern: Any = None

    def matches(self, name: str) -> bool:
        return bool(check_target_module_exists(self, name))


def _head(
    config: PlasticityConfig, model: nn.Module, modules: dict[str, nn.Module], structure: Structure | None
) -> list[str]:
    """Names of the classification head: as the report saw it, else from a trace, where the model can be traced."""
    if config.report is not None:
        names = [row.name for row in config.report.rows if row.role == "head" and row.level == "module"]
        if names and all(name in modules for name in names):
            return names
    if structure is None:
        if any(parameter.device.type == "meta" for parameter in model.parameters()):
            _warn_of_no_head("its weights are not in memory")
            return []
        try:
            structure = trace(model)
        except (ValueError, RuntimeError, TypeError) as error:
            # what states no image size or has no blocks may be no vision transformer, and PEFT adapts it as any model
            _warn_of_no_head(str(error))
            return []
    head = [leaf.name for leaf in structure.leaves.values() if leaf.role == "head"]
    if not head and structure.labels is not None:
        _warn_of_no_head("The model puts out logits, and no linear puts out one row of them per image.")
    return head


def _warn_of_no_head(why: str) -> None:
    warnings.warn(
        "modules_to_save='auto' cannot look for the head, which stays as it is: pass modules_to_save=['name of the head'], or None "
        f"if there is none to train. ({why})",
        UserWarning,
        stacklevel=2,
    )
