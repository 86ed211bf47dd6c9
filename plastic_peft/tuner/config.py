from __future__ import annotations

import json
import math
import os
import warnings
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, Literal, Optional, Union

from peft import LoraConfig
from peft.utils import CONFIG_NAME

from ..embedded import located, portable_name
from ..report import REPORT_NAME, SIGNALS, PlasticityReport, write_whole
from ..selection import check_options
from .registration import add_peft_type


PEFT_TYPE = add_peft_type()
MAX_NAMES = 100_000
LORA_ONLY = (
    "use_dora",
    "use_rslora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "rank_pattern",
    "alpha_pattern",
    "target_parameters",
    "ensure_weight_tying",
    "alora_invocation_tokens",
    "arrow_config",
    "corda_config",
    "eva_config",
    "kasa_config",
    "loftq_config",
    "lora_ga_config",
    "megatron_config",
    "monteclora_config",
    "velora_config",
)
"""Fields of `LoraConfig` about low-rank weights, which full adapters refuse; they ignore `r`, `lora_alpha`, `lora_dropout`."""


@dataclass
class PlasticityConfig(LoraConfig):
    """
    Configuration of an adapter whose target modules are chosen by measured plasticity.

    All of [`LoraConfig`] applies; these fields come on top. Explicit `target_modules` win: then nothing is measured or
    selected.

    Args:
        plasticity (`PlasticityReport`, `dict[str, float]` or path, *optional*):
            What to choose by: a report, its file, or a score per module name (then each module is a unit of its own).
            Without it and without `target_modules`, the model is measured on synthetic images, with a warning.
        adapter (`"lora"` or `"full"`, defaults to `"lora"`):
            Low-rank adapters on the selected modules, or training of the selected modules' own weights, norms included.
            Full adapters ignore `r`, `lora_alpha` and `lora_dropout`, and refuse LoRA's other options.
        budget (`int` or `float`, *optional*):
            Trainable parameters to spend at most, the head not counted; DoRA's magnitudes and trained biases of the selected
            modules count. A float is a share of the base model. If none of `budget`, `top_k`, `fraction` and `threshold`
            is given: 0.01 for LoRA; for full adapters all units down to the first that holds weight matrices.
        top_k (`int`, *optional*): Number of units to adapt.
        fraction (`float`, *optional*): Share of units to adapt.
        threshold (`float`, *optional*): Score that a unit needs at least.
        granularity (`"component"`, `"block"` or `"module"`, defaults to `"component"`):
            What a unit is: a role over all depths, one component of one block, or a module.
        within (`"model"` or `"role"`, defaults to `"model"`):
            Rank all units together, or take the best of every role first.
        signal (`"plasticity"` or `"shift"`, *optional*):
            The rate of change, or that rate over the rate inside the source images. By default shift where the report was
            measured with source images, and plasticity otherwise; filled in when the selection is settled.
        order (`"highest"`, `"lowest"` or `"random"`, defaults to `"highest"`):
            Which end of the ranking to adapt; the others are controls.
        rank_allocation (`"uniform"` or `"proportional"`, *optional*):
            Rank `r` everywhere, or ranks in proportion to the scores: a budget then reaches as many modules as it pays
            one rank for, whatever `r` is. By default proportional for a budget and uniform otherwise. `lora_alpha`
            follows, so that every module keeps the same scaling.
        train_norms (`bool`, *optional*):
            Train the norms of the blocks in full beside LoRA, as `modules_to_save`; a budget pays for them first. By default
            for a budget of which they take at most a quarter: at equal trainable parameters it gains about a point of accuracy.
        seed (`int`, defaults to 0): Decides `order="random"`.
        modules_to_save (`list[str]` or `"auto"`, defaults to `"auto"`):
            Modules trained in full and saved with the adapter; `"auto"` finds the classification head.
        selected_modules (`dict[str, float]`, *optional*):
            Exact names and scores of the adapted modules. Filled in when the selection is settled, and saved with it, so
            that loading neither measures again nor adapts anything else.
        labels (`list[str]`, *optional*):
            Label names in the order of the head's outputs. Filled in from the model's config and saved, so that loading
            restores the head's size and names.
        problem_type (`str`, *optional*):
            What the labels mean, as in the model's config: `"multi_label_classification"` has pipelines use a sigmoid. Filled in
            and saved like the labels.
        checkpoint_names (`dict[str, str]`, *optional*):
            Module names to names in the base model's checkpoint files where they differ, `*` standing for block
            numbers. Filled in and saved, so that releases of transformers with other module names find the modules.

    Raises:
        ValueError: If options contradict each other or have no such value; the message names them.
    """

    plasticity: Optional[Union[PlasticityReport, dict[str, float], str]] = field(
        default=None,
        repr=False,
        metadata={"help": "Report, its path, or a mapping of module names to scores to select modules by."},
    )
    adapter: Literal["lora", "full"] = field(
        default="lora",
        metadata={"help": "'lora' for low-rank adapters, 'full' to train the selected modules' own weights."},
    )
    budget: Optional[Union[int, float]] = field(
        default=None, metadata={"help": "Trainable parameters (int), or their share of the base model (float)."}
    )
    top_k: Optional[int] = field(default=None, metadata={"help": "Number of units to adapt."})
    fraction: Optional[float] = field(default=None, metadata={"help": "Share of units to adapt."})
    threshold: Optional[float] = field(default=None, metadata={"help": "Score that a unit needs at least."})
    granularity: Literal["component", "block", "module"] = field(
        default="component",
        metadata={"help": "Unit of selection: a role over all depths, a component of a block, a module."},
    )
    within: Literal["model", "role"] = field(
        default="model", metadata={"help": "Rank over the model or inside each role."}
    )
    signal: Optional[str] = field(
        default=None, metadata={"help": "What to rank by: 'plasticity' or 'shift' (the default with source images)."}
    )
    order: Literal["highest", "lowest", "random"] = field(
        default="highest", metadata={"help": "Which units to adapt first."}
    )
    rank_allocation: Optional[Literal["uniform", "proportional"]] = field(
        default=None,
        metadata={"help": "Rank r everywhere, or ranks in proportion to scores (the default for a budget)."},
    )
    train_norms: Optional[bool] = field(
        default=None,
        metadata={"help": "Train the norms in full beside LoRA (the default for a budget that has room for them)."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of order='random'."})
    modules_to_save: Optional[Union[list[str], str]] = field(  # type: ignore[assignment]
        default="auto",
        metadata={"help": "Modules trained in full and saved with the adapter; 'auto' finds the classification head."},
    )
    selected_modules: Optional[dict[str, float]] = field(
        default=None,
        repr=False,
        metadata={"help": "Exact names and scores of the adapted modules, filled in by the selection."},
    )
    labels: Optional[list[str]] = field(
        default=None, metadata={"help": "Label names in the order of the head's outputs, filled in from the model."}
    )
    problem_type: Optional[str] = field(
        default=None, metadata={"help": "What the labels mean, as in the model's config, filled in from the model."}
    )
    checkpoint_names: Optional[dict[str, str]] = field(
        default=None,
        metadata={"help": "Module names to names in the base model's checkpoint files where they differ, filled in."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        if self.base_model_name_or_path:
            # files hold the name; peft looks at the base model's files before it saves, and would ask the Hub for a name
            self.base_model_name_or_path = located(self.base_model_name_or_path)
        if isinstance(self.modules_to_save, str):
            self.modules_to_save = [self.modules_to_save]
        check_options(
            budget=self.budget,
            top_k=self.top_k,
            fraction=self.fraction,
            threshold=self.threshold,
            granularity=self.granularity,
            within=self.within,
            order=self.order,
            rank_allocation=self.rank_allocation,
            adapter=self.adapter,
            train_norms=self.train_norms,
        )
        if self.signal is not None and self.signal not in SIGNALS:
            raise ValueError(f"signal={self.signal!r} is unknown: choose one of {', '.join(map(repr, SIGNALS))}.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed={self.seed!r} must be a whole number.")
        if self.adapter == "full":
            _refuse_lora_options(self)
        if self.selected_modules is None:
            self._check_budget()
        elif self.plasticity is not None:
            raise ValueError(
                "plasticity and selected_modules are both given, and selected_modules is what an earlier selection left "
                "in a config: make a new PlasticityConfig to select again, or leave plasticity out to keep that selection."
            )
        self._report: PlasticityReport | None = None
        self._found_labels: list[str] | None = None
        self._names_in_file: dict[str, str] | None = None
        self._moved_to_save: list[str] = []
        if isinstance(self.plasticity, PlasticityReport):
            self._report = self.plasticity
        elif isinstance(self.plasticity, os.PathLike):
            self.plasticity = os.fspath(self.plasticity)
        for name in ("plasticity", "selected_modules"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, (str, PlasticityReport)):
                setattr(self, name, _checked_scores(name, value))

    def _check_budget(self) -> None:
        """A budget decides ranks and counts what is trained: options that say otherwise would make it untrue."""
        if self.budget is None:
            return
        if self.rank_pattern:
            raise ValueError("rank_pattern fixes ranks that the budget decides: pass one of them.")
        if self.adapter == "lora" and self.bias == "all":
            raise ValueError(
                "bias='all' trains biases outside the selected modules, which no budget for these covers: pass "
                "bias='lora_only', which is counted, or top_k in the place of budget."
            )

    @property
    def report(self) -> PlasticityReport | None:
        """The report that the selection was made from, where it is at hand."""
        return self._report

    @report.setter
    def report(self, report: PlasticityReport | None) -> None:
        self._report = report

    def selection_options(self) -> dict[str, Any]:
        """The options of `PlasticityReport.select` that this config states."""
        names = (
            "budget",
            "top_k",
            "fraction",
            "threshold",
            "granularity",
            "within",
            "signal",
            "order",
            "rank_allocation",
            "train_norms",
        )
        return {name: getattr(self, name) for name in (*names, "adapter", "r", "seed")}

    def to_dict(self) -> dict[str, Any]:
        held, self.plasticity = (
            self.plasticity,
            None if isinstance(self.plasticity, PlasticityReport) else self.plasticity,
        )
        try:
            facts = super().to_dict()
        finally:
            self.plasticity = held
        if self.base_model_name_or_path:
            facts["base_model_name_or_path"] = portable_name(self.base_model_name_or_path)
        return facts

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: Optional[str] = None, **kwargs: Any) -> Any:
        """As for any PEFT config; a report that lies beside it in a local folder comes with it."""
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        beside = Path(pretrained_model_name_or_path, subfolder or "", REPORT_NAME)
        if isinstance(config, PlasticityConfig) and beside.is_file():
            try:
                report = PlasticityReport.load(beside)
            except ValueError as error:
                warnings.warn(f"The adapter is loaded without its report: {error}", UserWarning, stacklevel=2)
                return config
            if config.selected_modules is None and config.target_modules is None:
                config.plasticity = config._report = report
            elif config.selected_modules is not None and _made_the_selection(report, config):
                config._report = report
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, **kwargs)
        path = Path(save_directory) / CONFIG_NAME
        if self.selected_modules is not None:
            # peft sorts names, and their order counts: in the selection the best first, in patterns the longest
            ordered = ("selected_modules", "rank_pattern", "alpha_pattern")
            facts = json.loads(path.read_text(encoding="utf-8")) | {name: getattr(self, name) for name in ordered}
            write_whole(path, json.dumps(facts, indent=2))
        if self._report is not None:
            self._report.save(path.parent)


def _made_the_selection(report: PlasticityReport, config: PlasticityConfig) -> bool:
    """Whether the scores of a selection are this report's, and not those of an adapter that was in the folder before."""
    try:
        scores = {candidate.score for candidate in report.candidates(config.signal)}
    except ValueError:
        return False
    return scores.issuperset((config.selected_modules or {}).values())


def _refuse_lora_options(config: LoraConfig) -> None:
    given = [name for name in LORA_ONLY if getattr(config, name, None)]
    if not isinstance(config.init_lora_weights, bool):
        given.append(f"init_lora_weights={config.init_lora_weights!r}")
    if given:
        raise ValueError(
            f'{", ".join(given)} applies to adapter="lora": full adapters have no low-rank part. Leave it out, or use '
            'adapter="lora".'
        )


def _checked_scores(name: str, value: Any) -> dict[str, float]:
    if not isinstance(value, dict):
        raise TypeError(
            f"{name} is a {type(value).__name__}: pass a PlasticityReport, its path, or a dict of module names to scores. The "
            "options of a selection go beside it, as in PlasticityConfig(plasticity=report, top_k=1)."
        )
    if not value or len(value) > MAX_NAMES:
        raise ValueError(f"{name} names {len(value):,} modules: pass between 1 and {MAX_NAMES:,}.")
    for module, score in value.items():
        numeric = isinstance(score, Real) and not isinstance(score, bool)
        if not isinstance(module, str) or not numeric or not math.isfinite(score):
            raise ValueError(
                f"{name} gives {str(module)[:80]!r} the score {str(score)[:80]!r}: module names need finite scores."
            )
    return {module: float(score) for module, score in value.items()}
