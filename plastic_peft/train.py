"""Fine-tuning from images to a saved adapter: what scripts, notebooks and the command line share.

`train` runs the whole of it; the steps are functions of their own. A run keeps in its output folder what it was asked
for, the report and the selection, each written whole before training starts, so the same call after a crash goes on from
the last whole checkpoint with the same selection and does not measure again.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Optional

import datasets
import numpy as np
import peft
import torch
from filelock import FileLock, Timeout
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    EvalPrediction,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from . import hub
from .card import model_card
from .components import unwrap
from .data import (
    DIGITS,
    class_counts,
    collate,
    load_images,
    load_unlabelled,
    resize_to,
    transform_of,
    with_pixels,
)
from .embedded import VIT_NANO, call_by_name, located, vit_nano_source_images
from .faults import explained
from .images import accept_image_size
from .measure import measure_plasticity
from .metrics import load_metric
from .report import REPORT_NAME, PlasticityReport, write_whole
from .selection import check_options
from .tuner import PlasticityConfig


logger = logging.getLogger(__name__)

RUN_NAME = "plasticity_run.json"
SELECTION_NAME = "plasticity_selection.json"
RESULTS_NAME = "results.json"
WHOLE_NAME = "whole.json"
LOCK_NAME = ".lock"

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
    # without it, several processes on a machine without GPUs do not know of each other
    "use_cpu": not torch.accelerator.is_available(),
}
"""Where the command line and `training_arguments` differ from the defaults of `transformers.TrainingArguments`."""


# --- arguments ---------------------------------------------------------------------------------------------------------


@dataclass
class ModelArguments:
    """Which model is fine-tuned."""

    model_name_or_path: str = field(
        default="vit_nano",
        metadata={
            "help": "Pretrained model: a folder, an id on the Hub, or 'vit_nano', the small one in this package."
        },
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a model on the Hub."})
    cache_dir: Optional[str] = field(default=None, metadata={"help": "Where downloads are kept."})
    token: Optional[str] = field(default=None, metadata={"help": "Token for the Hub; by default the stored login."})
    image_size: Optional[int] = field(
        default=None,
        metadata={"help": "Side of the images in pixels, if another than in pretraining; positions are interpolated."},
    )


@dataclass
class DataArguments:
    """Which images it is fine-tuned on."""

    dataset_name: Optional[str] = field(
        default=None,
        metadata={
            "help": "A data set on the Hub, an image folder, a parquet, CSV or JSON file, a save_to_disk folder, or 'digits'."
        },
    )
    dataset_config_name: Optional[str] = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    train_dir: Optional[str] = field(default=None, metadata={"help": "Folder or file of the training images."})
    validation_dir: Optional[str] = field(default=None, metadata={"help": "Folder or file of the validation images."})
    test_dir: Optional[str] = field(default=None, metadata={"help": "Folder or file of the test images."})
    image_column_name: Optional[str] = field(default=None, metadata={"help": "Column of the images, if not obvious."})
    label_column_name: Optional[str] = field(default=None, metadata={"help": "Column of the labels, if not obvious."})
    train_val_split: float = field(default=0.1, metadata={"help": "Share cut off for a missing validation split."})
    test_split: float = field(default=0.1, metadata={"help": "Share cut off for a missing test split."})
    split_seed: int = field(default=0, metadata={"help": "Seed of these cuts."})
    max_train_samples: Optional[int] = field(default=None, metadata={"help": "Train on this many random images."})
    max_eval_samples: Optional[int] = field(default=None, metadata={"help": "Evaluate on this many random images."})
    corrupt_images: Literal["refuse", "skip", "unchecked"] = field(
        default="refuse",
        metadata={"help": "Stop at images that cannot be decoded, leave them out, or do not look for them."},
    )
    augment: Literal["auto", "none", "flip", "crop"] = field(
        default="auto",
        metadata={"help": "Mirror images at random, and crop them; 'auto' is 'crop', and 'none' for digits."},
    )
    source_name: Optional[str] = field(
        default=None,
        metadata={
            "help": "Images like those of pretraining, to pair with the training images; needed for --signal shift."
        },
    )

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
        for split, limit in limits.items():
            if limit is not None and limit < len(data[split]):
                data[split] = data[split].shuffle(seed=self.split_seed).select(range(limit))
        return data

    @property
    def augmentation(self) -> str:
        if self.augment != "auto":
            return self.augment
        return "none" if self.dataset_name == DIGITS else "crop"


@dataclass
class PlasticityArguments:
    """How plasticity is measured, and which modules are adapted in which way."""

    report: Optional[str] = field(default=None, metadata={"help": "A saved report to select by, instead of measuring."})
    inputs: Literal["hidden", "embedding"] = field(
        default="hidden", metadata={"help": "Measure components on what they receive, or all on the embedding."}
    )
    max_pairs: int = field(default=12_800, metadata={"help": "Measure at most this many pairs of images."})
    tolerance: float = field(default=0.05, metadata={"help": "Stop when every interval is this narrow (relative)."})
    confidence: float = field(default=0.95, metadata={"help": "Confidence of the intervals."})
    measure_batch_size: int = field(default=32, metadata={"help": "Pairs per batch over all processes."})
    measure_seed: int = field(default=0, metadata={"help": "Seed of the pairs."})
    adapter: Literal["lora", "full"] = field(
        default="lora", metadata={"help": "LoRA on the selected modules, or training of their own weights."}
    )
    budget: Optional[str] = field(
        default=None, metadata={"help": "Trainable parameters: a number, or a share of the model such as 0.01."}
    )
    top_k: Optional[int] = field(default=None, metadata={"help": "Adapt this many units instead."})
    fraction: Optional[float] = field(default=None, metadata={"help": "Adapt this share of the units instead."})
    threshold: Optional[float] = field(default=None, metadata={"help": "Adapt the units with this score instead."})
    granularity: Literal["component", "block", "module"] = field(
        default="component", metadata={"help": "A unit: a role over all depths, a component of a block, a module."}
    )
    within: Literal["model", "role"] = field(
        default="model", metadata={"help": "Rank all units together, or the best of every role first."}
    )
    signal: Optional[str] = field(
        default=None, metadata={"help": "What to rank by: 'plasticity' or 'shift' (the default with source images)."}
    )
    order: Literal["highest", "lowest", "random"] = field(
        default="highest", metadata={"help": "Which units come first; 'lowest' and 'random' are controls."}
    )
    selection_seed: int = field(default=0, metadata={"help": "Seed of --order random."})
    rank_allocation: Optional[Literal["uniform", "proportional"]] = field(
        default=None, metadata={"help": "Rank r everywhere, or ranks in proportion to scores (default for a budget)."}
    )
    r: int = field(default=8, metadata={"help": "LoRA rank, where no budget decides the ranks."})
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

    def __post_init__(self) -> None:
        if isinstance(self.budget, str):
            text = self.budget.replace("_", "")
            try:
                self._budget: int | float | None = int(text) if text.isdigit() else float(text)
            except ValueError:
                raise ValueError(
                    f"budget={self.budget!r} is no number: pass parameters such as 20000, or a share such as 0.01."
                ) from None
        else:
            self._budget = self.budget
        # before anything is measured
        options = self.selection_options()
        check_options(**{name: options[name] for name in inspect.signature(check_options).parameters})

    def selection_options(self) -> dict[str, Any]:
        """Options of `PlasticityReport.select`."""
        names = ("top_k", "fraction", "threshold", "granularity", "within", "signal", "order", "rank_allocation")
        options = {name: getattr(self, name) for name in (*names, "adapter", "r")}
        return {**options, "budget": self._budget, "seed": self.selection_seed}

    def to_config(self, report: PlasticityReport | None = None, **settled: Any) -> PlasticityConfig:
        """The adapter's config; `settled` are fields of a selection made before."""
        options = self.selection_options()
        for name in ("lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules"):
            options[name] = getattr(self, name)
        return PlasticityConfig(plasticity=report, **{**options, **settled})


def training_arguments(output_dir: str, **options: Any) -> TrainingArguments:
    """`TrainingArguments` with the defaults of this package (`TRAINING_DEFAULTS`)."""
    return TrainingArguments(output_dir=output_dir, **{**TRAINING_DEFAULTS, **options})


# --- steps -------------------------------------------------------------------------------------------------------------


def load_model(arguments: ModelArguments, labels: Sequence[str] | None = None) -> tuple[nn.Module, Any]:
    """The pretrained model with a head for `labels` (a new one where the pretrained head has others), and its processor.

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If it is no image classifier, or cannot take `image_size`.
    """
    name = arguments.model_name_or_path
    where: dict[str, Any] = {"revision": arguments.model_revision, "cache_dir": arguments.cache_dir}
    where |= {"token": arguments.token} if arguments.token else {}
    head: dict[str, Any] = {}
    if labels is not None:
        head = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    path = located(name)
    try:
        model = AutoModelForImageClassification.from_pretrained(
            path, ignore_mismatched_sizes=True, dtype=torch.float32, **head, **where
        )
        call_by_name(model)
        processor = AutoImageProcessor.from_pretrained(path, **where)
    except (OSError, HFValidationError) as error:
        raise FileNotFoundError(f"Model {name} cannot be loaded: {str(error).splitlines()[0]}") from error
    if arguments.image_size is not None:
        resize_to(processor, arguments.image_size)
        accept_image_size(model, arguments.image_size)
    return model, processor


def measure(
    model: nn.Module,
    images: datasets.Dataset,
    processor: Any,
    arguments: PlasticityArguments,
    *,
    source: str | None = None,
    state: Any = None,
    progress: bool = True,
) -> PlasticityReport:
    """Measure on raw `images` until the selection that `arguments` ask for is settled.

    Args:
        source: Name of source images, as for `plastic_peft.data.load_unlabelled`, or `"vit_nano"` for those of vit_nano.
        state: `accelerate.PartialState` or `Accelerator`, to share the pairs among processes.
    """
    sources = None
    if source is not None:
        raw = vit_nano_source_images() if source == VIT_NANO.name else load_unlabelled(source, split="train")
        sources = with_pixels(raw, processor)
    return measure_plasticity(
        model,
        with_pixels(images, processor),
        sources,
        inputs=arguments.inputs,
        max_pairs=arguments.max_pairs,
        tolerance=arguments.tolerance,
        confidence=arguments.confidence,
        batch_size=arguments.measure_batch_size,
        seed=arguments.measure_seed,
        accelerator=state,
        progress=progress,
        selection=arguments.selection_options(),
    )


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy, top-5 accuracy and macro F1, for `Trainer(compute_metrics=...)`."""
    values = _metrics(prediction)
    return {name: value for name, value in values.items() if isinstance(value, float)}


def _metrics(prediction: Any) -> dict[str, Any]:
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    result = load_metric().compute(predictions=logits.astype(np.float32), references=prediction.label_ids)
    return dict(result)


class Epochs(TrainerCallback):
    """Tell the training images which epoch it is, so that each epoch augments anew and a resumed one as it would have."""

    def __init__(self, data: datasets.Dataset) -> None:
        self.transform = transform_of(data)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.transform is not None:
            self.transform.set_epoch(int(state.epoch or 0))


class WholeCheckpoints(TrainerCallback):
    """Mark a checkpoint once all processes have written it, so that a half-written one is never resumed from."""

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        args.distributed_state.wait_for_everyone() if args.distributed_state is not None else None
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            write_whole(folder / WHOLE_NAME, json.dumps(_sizes(folder)))


def _sizes(folder: Path) -> dict[str, int]:
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != WHOLE_NAME)
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}


def last_whole_checkpoint(output_dir: str | Path) -> Path | None:
    """The latest checkpoint of which every file was written, `None` if there is none."""
    found = {}
    for folder in Path(output_dir).glob("checkpoint-*"):
        number = folder.name.removeprefix("checkpoint-")
        with contextlib.suppress(OSError, ValueError):
            if number.isdigit() and json.loads((folder / WHOLE_NAME).read_text()) == _sizes(folder):
                found[int(number)] = folder
    return found[max(found)] if found else None


def make_trainer(
    model: nn.Module,
    data: Mapping[str, datasets.Dataset],
    processor: Any,
    arguments: TrainingArguments,
    *,
    augment: str = "none",
    callbacks: Sequence[TrainerCallback] = (),
) -> Trainer:
    """A `Trainer` on raw splits: pixels, labels, metrics and checkpoints that can be resumed are set up.

    It sets `remove_unused_columns=False`, without which the trainer drops the images, and `label_names=["labels"]`, without
    which it finds no labels behind a PEFT model and evaluates nothing.
    """
    arguments.remove_unused_columns = False
    arguments.label_names = ["labels"]
    train_data = with_pixels(data["train"], processor, augment, arguments.seed)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=train_data,
        eval_dataset=with_pixels(data["validation"], processor),
        data_collator=collate,
        compute_metrics=compute_metrics,
        processing_class=processor,
        callbacks=[Epochs(train_data), WholeCheckpoints(), *callbacks],
    )
    shard_by_block(model, trainer.accelerator)
    return trainer


def shard_by_block(model: nn.Module, accelerator: Any) -> None:
    """Have FSDP shard a transformers model block by block, if `accelerator` shards at all; call it before `prepare`.

    By default accelerate takes the classes that transformers names as not to be split. Among those of many vision models is
    the one that holds the patch embedding, which accelerate also shards alone; torch refuses to do both.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None and os.environ.get("ACCELERATE_USE_FSDP") == "true" and accelerator.is_main_process:
        logger.warning(
            "FSDP is configured, but accelerate shards on GPUs only: here every process holds the whole model."
        )
    if plugin is None or plugin.transformer_cls_names_to_wrap:
        return
    core: Any = unwrap(model)
    embedding = core.get_input_embeddings()
    holders = {type(module).__name__ for module in core.modules() if embedding in list(module.modules())[1:]}
    plugin.transformer_cls_names_to_wrap = [name for name in core._no_split_modules or () if name not in holders]


def save_run(trainer: Trainer, folder: str | Path, card: Any = None) -> None:
    """Save adapter, report and image processor; a reader finds the old files or the new ones, never a part of one.

    Args:
        card: The README; by default the one that `plastic_peft.hub.save_adapter` writes.
    """
    weights = _gathered_weights(trainer)
    if trainer.is_world_process_zero():
        model: Any = trainer.accelerator.unwrap_model(trainer.model)
        hub.save_adapter(model, folder, image_processor=trainer.processing_class, card=card, state_dict=weights)
    trainer.accelerator.wait_for_everyone()


def _gathered_weights(trainer: Trainer) -> dict[str, Any] | None:
    """On the main process all weights, where each process holds a part of them; all processes have to call it."""
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        return None
    weights: dict[str, Any] | None = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return weights


# --- the run -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainResult:
    """What `train` leaves behind.

    Attributes:
        metrics: `eval_*` on the validation and `test_*` on the test images, and the test's `confusion_matrix`.
        selection: Exact names of the adapted modules with their scores; empty where `target_modules` were given.
        report: The report selected by, `None` where `target_modules` were given.
        trainable, parameters: Trainable and all parameters, head included.
        trainer: The trainer with the trained model.
    """

    metrics: dict[str, Any]
    selection: dict[str, float]
    report: PlasticityReport | None
    trainable: int
    parameters: int
    trainer: Trainer


def train(
    model_args: ModelArguments,
    data_args: DataArguments,
    plasticity_args: PlasticityArguments,
    training_args: TrainingArguments,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    start_over: bool = False,
) -> TrainResult:
    """Measure or reuse a report, fine-tune, evaluate and save the adapter in `training_args.output_dir`.

    Called again with the same arguments it resumes from the last whole checkpoint, with the same selection and without
    measuring again.

    Args:
        callbacks: Further callbacks of the trainer.
        start_over: Remove an earlier run from the output folder first.

    Raises:
        ValueError: If the output folder holds a run with other arguments, several processes run without knowing of each
            other, or as the steps do.
        OSError: If the output folder cannot be written, its disk is full (`faults.DiskFullError`), or the Hub refuses a
            run that is to be pushed.
        faults.LostProcessError: If another process ended, or did not answer within `training_args.ddp_timeout` seconds.
    """
    # before the folder is locked, which only one of them could do
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched > training_args.world_size:
        if torch.distributed.is_initialized():
            # one that ends while others still connect would end them with an error of the network
            torch.distributed.barrier()
        raise ValueError(
            f"{launched} processes were launched that do not know of each other, and would write to the same files: without GPUs, "
            "pass use_cpu=True (--use_cpu)."
        )
    main = training_args.process_index == 0
    with (
        explained(training_args.output_dir, training_args.process_index),
        _reserved(Path(str(training_args.output_dir))) if main else contextlib.nullcontext(),
    ):
        return _train(model_args, data_args, plasticity_args, training_args, callbacks, start_over)


def _train(
    model_args: ModelArguments,
    data_args: DataArguments,
    plasticity_args: PlasticityArguments,
    training_args: TrainingArguments,
    callbacks: Sequence[TrainerCallback],
    start_over: bool,
) -> TrainResult:
    folder = Path(str(training_args.output_dir))
    if training_args.use_cpu and torch.distributed.is_initialized():
        # transformers heeds ddp_timeout on GPUs only, and gloo waits for half an hour
        torch.distributed.distributed_c10d._set_pg_timeout(training_args.ddp_timeout_delta)
    main = training_args.process_index == 0
    asked = _asked(model_args, data_args, plasticity_args)
    # the adapter is pushed once, when it is whole, and not by the trainer at every checkpoint
    training_args = copy.copy(training_args)
    push, training_args.push_to_hub = training_args.push_to_hub, False
    repository = training_args.hub_model_id or folder.resolve().name
    rights: dict[str, Any] = {
        "private": training_args.hub_private_repo,
        "token": training_args.hub_token or model_args.token,
    }
    with training_args.main_process_first(local=False, desc="preparing the run"):
        if main:
            _open_run(folder, asked, start_over)
        if main and push:
            _make_repository(repository, **rights)
        data = data_args.load(**({"token": model_args.token} if model_args.token else {}))
    resumed = last_whole_checkpoint(folder)

    set_seed(training_args.seed)
    labels = data["train"].features["label"].names
    model, processor = load_model(model_args, labels)
    model.to(training_args.device)
    with _gathered(model):
        report = _report_of_run(
            folder, model, data["train"], processor, plasticity_args, data_args.source_name, training_args
        )
        # the same start for adapter and head, whether or not anything was measured
        set_seed(training_args.seed)
        adapted = _adapted(folder, model, report, plasticity_args, training_args)
    trainable, parameters = adapted.get_nb_trainable_parameters()
    logger.info(
        "Training %s of %s parameters (%.2f %%).", f"{trainable:,}", f"{parameters:,}", 100 * trainable / parameters
    )
    if plasticity_args.track_every:
        from .callback import PlasticityCallback

        probe = with_pixels(
            data["validation"].shuffle(seed=0).select(range(min(64, len(data["validation"])))), processor
        )
        callbacks = [*callbacks, PlasticityCallback(probe, every=plasticity_args.track_every)]
    trainer = make_trainer(adapted, data, processor, training_args, augment=data_args.augmentation, callbacks=callbacks)
    for callback in callbacks:
        if hasattr(callback, "trainer"):
            callback.trainer = trainer

    resume = training_args.resume_from_checkpoint or (str(resumed) if resumed else None)
    if resume:
        logger.info("Resuming from %s.", resume)
    trainer.train(resume_from_checkpoint=resume)
    metrics = trainer.evaluate()
    prediction = trainer.predict(with_pixels(data["test"], processor), metric_key_prefix="test")
    metrics |= prediction.metrics or {}
    metrics["confusion_matrix"] = _metrics(prediction)["confusion_matrix"]
    selection = dict(adapted.peft_config["default"].selected_modules or {})
    named = data_args.dataset_name or data_args.train_dir
    shown = {name: metrics[f"test_{name}"] for name in ("accuracy", "macro_f1")}
    card = functools.partial(model_card, adapted, report, metrics=shown, dataset=named)
    save_run(trainer, folder, card())
    if main:
        record = {
            "metrics": metrics,
            "selection": selection,
            "trainable_parameters": trainable,
            "parameters": parameters,
            "training_images": class_counts(data["train"]),
            "steps": trainer.state.global_step,
            "processes": training_args.world_size,
        }
        write_whole(folder / RESULTS_NAME, json.dumps(record, indent=1))
    weights = _gathered_weights(trainer) if push else None
    if push and main:
        commit = hub.push(
            trainer.accelerator.unwrap_model(trainer.model),
            repository,
            image_processor=processor,
            card=card(repo_id=repository),
            state_dict=weights,
            **rights,
        )
        logger.info("Pushed the adapter to %s.", commit.repo_url)
    return TrainResult(metrics, selection, report, trainable, parameters, trainer)


def _asked(*arguments: Any) -> dict[str, Any]:
    """What decides the result of a run, besides the training arguments."""
    aside = ("cache_dir", "token", "track_every")
    values = {f.name: getattr(a, f.name) for a in arguments for f in fields(a) if f.name not in aside}
    return dict(json.loads(json.dumps(values)))


@contextlib.contextmanager
def _reserved(folder: Path) -> Iterator[None]:
    """Keep other runs out of the folder until this one ends, in whatever way: the lock goes with the process."""
    lock = FileLock(folder / LOCK_NAME, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("it is read-only")
        # some network file systems have no locks
        with contextlib.suppress(NotImplementedError):
            lock.acquire()
        # what a run that was killed while it saved has left
        for unfinished in folder.glob(f"{hub.SAVING}*"):
            shutil.rmtree(unfinished)
    except Timeout:
        raise ValueError(
            f"Another run is under way in {folder}: wait for it or stop it (processes outlive a launcher that was killed), or "
            "choose another output_dir (--output_dir)."
        ) from None
    except OSError as error:
        raise _unwritable(folder, error) from None
    try:
        yield
    finally:
        lock.release()


def _unwritable(folder: Path, error: OSError) -> OSError:
    return OSError(f"The output folder {folder} cannot be written ({error}): choose another with --output_dir.")


def _make_repository(name: str, *, private: bool | None, token: str | None) -> None:
    """Make the repository of a run that will be pushed: a missing right shows before the work, and not after it."""
    try:
        HfApi(token=token).create_repo(name, private=private, exist_ok=True)
    # the client lets the errors of its HTTP library pass
    except Exception as error:
        raise ConnectionError(
            f"The adapter could not be pushed to {name} after training ({str(error).splitlines()[-1]}): log in with `hf auth login`, "
            "correct --hub_token or --hub_model_id, or leave --push_to_hub out."
        ) from error


def _open_run(folder: Path, asked: dict[str, Any], start_over: bool) -> None:
    """Note what was asked for, or check that it is what the folder's earlier run was asked for."""
    if start_over and folder.is_dir():
        for name in (RUN_NAME, SELECTION_NAME, RESULTS_NAME, REPORT_NAME):
            (folder / name).unlink(missing_ok=True)
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    note = folder / RUN_NAME
    if note.is_file():
        before = json.loads(note.read_text(encoding="utf-8"))
        # a release that wrote the note may not have had all arguments
        changed = [
            f"{key} {before[key]!r} -> {asked[key]!r}" for key in asked if before.get(key, asked[key]) != asked[key]
        ]
        if changed:
            raise ValueError(
                f"{folder} holds a run with other arguments ({'; '.join(changed)}): repeat them to resume it, choose another "
                "output_dir, or remove it with start_over (--start_over)."
            )
        return
    try:
        write_whole(note, json.dumps(asked, indent=1))
    except OSError as error:
        raise _unwritable(folder, error) from None


def _report_of_run(
    folder: Path,
    model: nn.Module,
    images: datasets.Dataset,
    processor: Any,
    arguments: PlasticityArguments,
    source: str | None,
    training: TrainingArguments,
) -> PlasticityReport | None:
    if arguments.target_modules is not None:
        return None
    if (folder / REPORT_NAME).is_file():
        logger.info("Using the report in %s.", folder)
        return PlasticityReport.load(folder)
    if arguments.report is not None:
        report = PlasticityReport.load(arguments.report)
    else:
        state = training.distributed_state if training.world_size > 1 else None
        logger.info("Measuring on %d training images.", len(images))
        report = measure(
            model, images, processor, arguments, source=source, state=state, progress=not training.disable_tqdm
        )
        logger.info("Measured %d pairs (%s).", report.pairs, report.stopped)
    if training.process_index == 0:
        report.save(folder)
    return report


def _adapted(
    folder: Path,
    model: nn.Module,
    report: PlasticityReport | None,
    arguments: PlasticityArguments,
    training: TrainingArguments,
) -> Any:
    """The model with its adapter, on the selection that the run made before where there is one."""
    note = folder / SELECTION_NAME
    settled = json.loads(note.read_text(encoding="utf-8")) if note.is_file() and report is not None else {}
    adapted = peft.get_peft_model(model, arguments.to_config(report, **settled))  # type: ignore[arg-type]
    config: Any = adapted.peft_config["default"]
    if training.process_index == 0 and not settled and config.selected_modules is not None:
        kept = ("selected_modules", "rank_pattern", "alpha_pattern", "modules_to_save")
        write_whole(note, json.dumps({name: getattr(config, name) for name in kept}, indent=1))
    return adapted


@contextlib.contextmanager
def _gathered(model: nn.Module) -> Iterator[None]:
    """Whole weights on every process, where DeepSpeed ZeRO-3 has split them while loading."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    if not is_deepspeed_zero3_enabled():
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        yield


__all__ = [
    "TRAINING_DEFAULTS",
    "DataArguments",
    "ModelArguments",
    "PlasticityArguments",
    "TrainResult",
    "compute_metrics",
    "last_whole_checkpoint",
    "load_model",
    "make_trainer",
    "measure",
    "save_run",
    "shard_by_block",
    "train",
    "training_arguments",
]
