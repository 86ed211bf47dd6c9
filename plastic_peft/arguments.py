"""What is said about a run, as dataclasses: model, images, measurement, selection, adapter.

The command line makes its flags of them; scripts and notebooks construct them. Each command takes those that it honours.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Optional

import datasets
import torch
from transformers import TrainingArguments

from .data import DIGITS, load_images, load_labelled
from .processors import output_size
from .report import PlasticityReport
from .selection import check_options
from .tuner import PlasticityConfig


LEARNING_RATES = {"lora": 4e-3, "full": 1e-3}
"""Of the command line where none is given: fine-tuning on a few images takes few steps."""

TRAINING_DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 3,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "logging_steps": 50,
    "remove_unused_columns": False,
    "report_to": "none",
    # early stopping goes on counting where a run resumes
    "restore_callback_states_from_checkpoint": True,
    # all that is trained takes part in every pass, and looking for what does not costs time
    "ddp_find_unused_parameters": False,
    # without it, several processes on a machine without GPUs do not know of each other
    "use_cpu": not torch.accelerator.is_available(),
}
"""Where the command line and `training_arguments` differ from the defaults of `transformers.TrainingArguments`."""

# those of transformers.TrainingArguments that decide what a run results in; releases differ in which they have
_DECIDING = (
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "warmup_ratio",
    "optim",
    "optim_args",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "fp16",
    "bf16",
    "seed",
    "data_seed",
    "dataloader_drop_last",
    "load_best_model_at_end",
)


class TrainingFlags(TrainingArguments):
    """`transformers.TrainingArguments` under a title of their own in --help."""

    _argument_group_name = "How it is trained (transformers.TrainingArguments)"


def training_arguments(output_dir: str, **options: Any) -> TrainingArguments:
    """`TrainingArguments` with the defaults of this package (`TRAINING_DEFAULTS`)."""
    return TrainingArguments(output_dir=output_dir, **{**TRAINING_DEFAULTS, **options})


def deciding(arguments: TrainingArguments) -> dict[str, Any]:
    """The training arguments that decide what a run results in; of batch sizes, the images per step over all processes."""
    values = {name: getattr(arguments, name) for name in _DECIDING if hasattr(arguments, name)}
    per_step = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    return {**values, "images_per_step": per_step}


# --- model -------------------------------------------------------------------------------------------------------------


@dataclass
class ModelArguments:
    """Which model is fine-tuned."""

    _argument_group_name = "Which model"

    model_name_or_path: str = field(
        default="vit_nano",
        metadata={
            "help": "Pretrained model: a folder, an id on the Hub, or 'vit_nano', the small one in this package."
        },
    )
    config_name: Optional[str] = field(default=None, metadata={"help": "Configuration, if not the model's own."})
    image_processor_name: Optional[str] = field(
        default=None, metadata={"help": "Image processor, if not the model's own."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a model on the Hub."})
    cache_dir: Optional[str] = field(default=None, metadata={"help": "Where downloads are kept."})
    token: Optional[str] = field(default=None, metadata={"help": "Token for the Hub; by default the stored login."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the code of a model on the Hub: only of repositories that you trust."}
    )
    ignore_mismatched_sizes: bool = field(
        default=True, metadata={"help": "Give the model a new head where its own has other labels."}
    )
    image_size: Optional[int] = field(
        default=None,
        metadata={"help": "Side of the images in pixels, if another than in pretraining; positions are interpolated."},
    )

    def download_options(self) -> dict[str, Any]:
        """How to read from the Hub, for models and data sets."""
        given = {"cache_dir": self.cache_dir, "token": self.token}
        return {name: value for name, value in given.items() if value}


# --- images ------------------------------------------------------------------------------------------------------------


@dataclass
class DatasetArguments:
    """Which data set."""

    dataset_name: Optional[str] = field(
        default=None,
        metadata={
            "help": "A data set on the Hub, an image folder, a parquet, CSV or JSON file, a save_to_disk folder, or 'digits'."
        },
    )
    dataset_config_name: Optional[str] = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    image_column_name: Optional[str] = field(default=None, metadata={"help": "Column of the images, if not obvious."})
    split_seed: int = field(default=0, metadata={"help": "Seed of splits that are cut, and of samples."})
    corrupt_images: Literal["refuse", "skip", "unchecked"] = field(
        default="refuse",
        metadata={"help": "Stop at images that cannot be decoded, leave them out, or do not look for them."},
    )


@dataclass
class ImageArguments(DatasetArguments):
    """Which images are measured."""

    _argument_group_name = "Which images"

    train_dir: Optional[str] = field(default=None, metadata={"help": "Folder or file of the training images."})
    max_train_samples: Optional[int] = field(default=None, metadata={"help": "Take this many random training images."})
    source_name: Optional[str] = field(
        default=None,
        metadata={
            "help": "Images like those of pretraining, to pair with the training images; needed for --signal shift. "
            "'vit_nano' has its own."
        },
    )

    def __post_init__(self) -> None:
        _check_counts(self, "max_train_samples")


@dataclass
class LabelledArguments(DatasetArguments):
    """Which images are evaluated on."""

    test_dir: Optional[str] = field(default=None, metadata={"help": "Folder or file of the test images."})
    label_column_name: Optional[str] = field(default=None, metadata={"help": "Column of the labels, if not obvious."})
    train_val_split: float = field(default=0.1, metadata={"help": "Share cut off for a missing validation split."})
    test_split: float = field(default=0.1, metadata={"help": "Share cut off for a missing test split."})
    max_eval_samples: Optional[int] = field(default=None, metadata={"help": "Evaluate on this many random images."})

    def __post_init__(self) -> None:
        _check_counts(self, "max_eval_samples")
        _check_shares(self, "train_val_split", "test_split")


@dataclass
class DataArguments(LabelledArguments, ImageArguments):
    """Which images it is fine-tuned on."""

    _argument_group_name = "Which images"

    validation_dir: Optional[str] = field(default=None, metadata={"help": "Folder or file of the validation images."})
    augment: Literal["auto", "none", "flip", "crop"] = field(
        default="auto",
        metadata={
            "help": "Mirror images at random, and crop them; 'auto' is 'crop' ('flip' for models of patches), and 'none' for digits."
        },
    )

    def __post_init__(self) -> None:
        LabelledArguments.__post_init__(self)
        ImageArguments.__post_init__(self)

    def load(self, **options: Any) -> datasets.DatasetDict:
        """The splits; arguments and errors as in `plastic_peft.data.load_images`."""
        data = load_images(
            self.dataset_name,
            self.dataset_config_name,
            train=self.train_dir,
            validation=self.validation_dir,
            test=self.test_dir,
            image_column=self.image_column_name,
            label_column=self.label_column_name,
            validation_share=self.train_val_split,
            test_share=self.test_split,
            seed=self.split_seed,
            corrupt=self.corrupt_images,
            **options,
        )
        limits = {"train": self.max_train_samples, "validation": self.max_eval_samples, "test": self.max_eval_samples}
        return datasets.DatasetDict(
            {split: at_most(limit, data[split], self.split_seed) for split, limit in limits.items()}
        )

    def augmentation(self, processor: Any) -> str:
        """How training images are augmented for this image processor.

        Raises:
            ValueError: If they are to be cropped, and the processor does not say to which size.
        """
        if self.augment == "auto" and self.dataset_name == DIGITS:
            return "none"
        try:
            output_size(processor)
        except ValueError:
            if self.augment == "crop":
                raise
            return "flip" if self.augment == "auto" else self.augment
        return "crop" if self.augment == "auto" else self.augment


@dataclass
class EvaluationArguments(LabelledArguments):
    """Which images an adapter is evaluated on."""

    _argument_group_name = "Which images"

    split: Literal["train", "validation", "test"] = field(
        default="test", metadata={"help": "Which split of --dataset_name; one that is missing is cut as in training."}
    )

    def load(self, **options: Any) -> datasets.Dataset:
        """The images with their labels; arguments and errors as in `plastic_peft.data.load_images`."""
        if (self.dataset_name is None) == (self.test_dir is None):
            raise ValueError("Say which images to evaluate on: either --dataset_name or --test_dir.")
        if self.test_dir is not None:
            images = load_labelled(
                self.test_dir,
                config=self.dataset_config_name,
                image_column=self.image_column_name,
                label_column=self.label_column_name,
                corrupt=self.corrupt_images,
                **options,
            )
        else:
            # all images are looked at: those that training left out before a split was cut would make another cut
            values = {f.name: getattr(self, f.name) for f in fields(LabelledArguments)}
            images = DataArguments(**{**values, "max_eval_samples": None}).load(**options)[self.split]
        return at_most(self.max_eval_samples, images, self.split_seed)


def at_most(limit: int | None, images: datasets.Dataset, seed: int) -> datasets.Dataset:
    """This many of the images, drawn by the seed; all of them where they are no more, or without a limit."""
    if limit is None or limit >= len(images):
        return images
    return images.shuffle(seed=seed).select(range(limit))


def _check_counts(arguments: Any, *names: str) -> None:
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} (--{name}) must be at least 1.")


def _check_shares(arguments: Any, *names: str) -> None:
    for name in names:
        value = getattr(arguments, name)
        if not 0 < value < 1:
            raise ValueError(f"{name}={value} (--{name}) must lie between 0 and 1, such as 0.1.")


# --- measurement, selection and adapter --------------------------------------------------------------------------------


@dataclass
class ReportArguments:
    """Which measurement is selected by."""

    _argument_group_name = "By which measurement"

    report: Optional[str] = field(default=None, metadata={"help": "A saved report to select by, instead of measuring."})


@dataclass
class SelectionArguments:
    """Which modules are selected."""

    _argument_group_name = "Which modules are selected"

    adapter: Literal["lora", "full"] = field(
        default="lora", metadata={"help": "LoRA on the selected modules, or training of their own weights."}
    )
    budget: Optional[str] = field(
        default=None, metadata={"help": "Trainable parameters: a number, or a share of the model such as 0.01."}
    )
    top_k: Optional[int] = field(default=None, metadata={"help": "Adapt this many units instead."})
    fraction: Optional[float] = field(default=None, metadata={"help": "Adapt this share of the units instead."})
    threshold: Optional[float] = field(
        default=None, metadata={"help": "Adapt the units with at least this score instead."}
    )
    granularity: Literal["component", "block", "module"] = field(
        default="component", metadata={"help": "A unit: a role over all depths, a component of a block, a module."}
    )
    within: Literal["model", "role"] = field(
        default="model", metadata={"help": "Rank all units together, or the best of every role first."}
    )
    signal: Optional[Literal["plasticity", "shift"]] = field(
        default=None, metadata={"help": "What to rank by; by default 'shift' with source images, else 'plasticity'."}
    )
    order: Literal["highest", "lowest", "random"] = field(
        default="highest", metadata={"help": "Which units come first; 'lowest' and 'random' are controls."}
    )
    selection_seed: int = field(default=0, metadata={"help": "Seed of --order random."})
    rank_allocation: Optional[Literal["uniform", "proportional"]] = field(
        default=None, metadata={"help": "Rank r everywhere, or ranks in proportion to scores (default for a budget)."}
    )
    r: int = field(default=8, metadata={"help": "LoRA rank, where no budget decides the ranks."})
    train_norms: Optional[bool] = field(
        default=None,
        metadata={
            "help": "Train the norms in full beside LoRA; by default where they cost at most a quarter of the budget."
        },
    )

    def __post_init__(self) -> None:
        # before anything is measured
        options = self.selection_options()
        check_options(**{name: options[name] for name in inspect.signature(check_options).parameters})

    def selection_options(self) -> dict[str, Any]:
        """Options of `PlasticityReport.select`."""
        names = ("top_k", "fraction", "threshold", "granularity", "within", "signal", "order", "rank_allocation")
        options = {name: getattr(self, name) for name in (*names, "adapter", "r", "train_norms")}
        return {**options, "budget": _number(self.budget), "seed": self.selection_seed}


@dataclass
class MeasurementArguments(SelectionArguments):
    """How plasticity is measured, and until which selection is settled."""

    _argument_group_name = "How plasticity is measured, and until which selection is settled"

    inputs: Literal["hidden", "embedding"] = field(
        default="hidden", metadata={"help": "Measure components on what they receive, or all on the embedding."}
    )
    max_pairs: int = field(default=12_800, metadata={"help": "Measure at most this many pairs of images."})
    tolerance: float = field(default=0.05, metadata={"help": "Stop when every interval is this narrow (relative)."})
    confidence: float = field(default=0.95, metadata={"help": "Confidence of the intervals."})
    measure_batch_size: int = field(default=32, metadata={"help": "Pairs per batch over all processes."})
    measure_seed: int = field(default=0, metadata={"help": "Seed of the pairs."})


@dataclass
class PlasticityArguments(MeasurementArguments, ReportArguments):
    """How plasticity is measured, and which modules are adapted in which way."""

    _argument_group_name = "How plasticity is measured, and which modules are adapted in which way"

    lora_alpha: int = field(default=16, metadata={"help": "LoRA scaling is lora_alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the LoRA inputs."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(r)."})
    use_dora: bool = field(default=False, metadata={"help": "Weight-decomposed LoRA."})
    target_modules: Optional[list[str]] = field(
        default=None, metadata={"help": "Adapt exactly these modules (names or suffixes) and measure nothing."}
    )
    track_every: int = field(
        default=0, metadata={"help": "Measure plasticity on a fixed batch every so many training steps; 0 for never."}
    )

    def to_config(self, report: PlasticityReport | None = None, **settled: Any) -> PlasticityConfig:
        """The adapter's config; `settled` are fields of a selection made before."""
        options = self.selection_options()
        for name in ("lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules"):
            options[name] = getattr(self, name)
        if self.target_modules == ["all-linear"]:
            options["target_modules"] = "all-linear"
        config = PlasticityConfig(plasticity=None if settled else report, **{**options, **settled})
        config.report = report
        return config


def _number(budget: str | float | None) -> int | float | None:
    """A budget as a number: a whole one above 1 counts parameters, however it is written."""
    if not isinstance(budget, str):
        return budget
    text = budget.replace("_", "")
    try:
        number: int | float = int(text) if text.isdigit() else float(text)
    except ValueError:
        raise ValueError(
            f"budget={budget!r} is no number: pass parameters such as 20000, or a share such as 0.01."
        ) from None
    return int(number) if number > 1 and number == number // 1 else number


def as_noted(*arguments: Any) -> dict[str, Any]:
    """What decides the result of a run, ready for JSON.

    Args:
        arguments: Dataclasses of this module, and mappings such as that of `deciding`.
    """
    values: dict[str, Any] = {}
    for argument in arguments:
        values |= argument if isinstance(argument, Mapping) else vars(argument)
    # the run keeps a copy of a report, which counts and not where it came from
    values["given_report"] = values.pop("report", None) is not None
    beside = ("cache_dir", "token", "track_every")
    return dict(json.loads(json.dumps({name: value for name, value in values.items() if name not in beside})))
