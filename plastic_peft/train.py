"""Fine-tuning from images to a saved adapter: what scripts, notebooks and the command line share.

`train` runs the whole of it; the steps are functions of their own. A run keeps in its output folder what it was asked
for, the report and the selection, each written whole before training starts, so the same call after a crash goes on from
the last whole checkpoint with the same selection and does not measure again.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import peft
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    EvalPrediction,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from . import hub
from .arguments import (
    TRAINING_DEFAULTS,
    DataArguments,
    MeasurementArguments,
    ModelArguments,
    PlasticityArguments,
    as_noted,
    deciding,
    training_arguments,
)
from .card import model_card
from .components import call, unwrap
from .data import class_counts, collate, digests, load_unlabelled, resize_to, transform_of, with_pixels
from .embedded import VIT_NANO, call_by_name, located, vit_nano_source_images
from .faults import explained
from .images import model_inputs
from .measure import measure_plasticity
from .metrics.scores import classification_scores
from .processors import accept_image_size
from .report import PlasticityReport, write_whole
from .run_folder import (
    RESULTS_NAME,
    SELECTION_NAME,
    WholeCheckpoints,
    check_run,
    given_report,
    last_whole_checkpoint,
    open_run,
    report_of_run,
    reserved,
    train_once,
)


logger = logging.getLogger(__name__)

METRICS = ("loss", "accuracy", "top5_accuracy", "macro_f1")
# what would break the promise that a run resumes with the same result
_BREAKS_RUNS = {
    "save_only_model": "a run resumes with the optimizer and the random state of its checkpoint",
    "enable_jit_checkpoint": "a run that it ends early looks like a finished one; the last whole checkpoint is resumed from anyhow",
    "bf16_full_eval": "it rounds the adapter before it is saved; bf16 evaluates in bfloat16 and keeps the weights",
    "fp16_full_eval": "it rounds the adapter before it is saved; fp16 evaluates in float16 and keeps the weights",
}


# --- steps -------------------------------------------------------------------------------------------------------------


def load_model(arguments: ModelArguments, labels: Sequence[str] | None = None) -> tuple[nn.Module, Any]:
    """The pretrained model with a head for `labels` (a new one where the pretrained head has others), and its processor.

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If it is no image classifier, has another head than `labels` and `ignore_mismatched_sizes` is off, or
            cannot take `image_size`.
    """
    name = arguments.model_name_or_path
    options: dict[str, Any] = {"revision": arguments.model_revision, **arguments.download_options()}
    options |= {"trust_remote_code": True} if arguments.trust_remote_code else {}
    head: dict[str, Any] = {}
    if labels is not None:
        head = hub.label_maps(labels)
    path = located(name)
    try:
        if arguments.config_name is not None:
            head = {"config": AutoConfig.from_pretrained(located(arguments.config_name), **head, **options)}
        with _no_loading_report():
            model, info = AutoModelForImageClassification.from_pretrained(
                path,
                ignore_mismatched_sizes=arguments.ignore_mismatched_sizes,
                dtype=torch.float32,
                output_loading_info=True,
                **head,
                **options,
            )
        call_by_name(model)
        processor = AutoImageProcessor.from_pretrained(located(arguments.image_processor_name or path), **options)
    except (OSError, HFValidationError) as error:
        raise FileNotFoundError(f"Model {name} cannot be loaded: {str(error).splitlines()[0]}") from error
    except RuntimeError as error:
        if arguments.ignore_mismatched_sizes:
            raise
        raise ValueError(
            f"Model {name} has other sizes than its configuration and the {len(labels or ())} labels ask for: leave "
            "ignore_mismatched_sizes on to give it a new head."
        ) from error
    _warn_of_untrained(model, info, name)
    if arguments.image_size is not None:
        resize_to(processor, arguments.image_size)
        accept_image_size(model, arguments.image_size)
    return model, processor


@contextlib.contextmanager
def _no_loading_report() -> Iterator[None]:
    """A new head is what fine-tuning needs, and no mistake; `_warn_of_untrained` says what is one."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def _warn_of_untrained(model: Any, info: Mapping[str, Any], name: str) -> None:
    # transformers 5 gives mismatched keys with their shapes
    mismatched = {entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"]}
    new = sorted({*info["missing_keys"], *mismatched})
    trunk = [key for key in new if key.startswith(f"{model.base_model_prefix}.")]
    if trunk:
        logger.warning(
            "%s has no fitting weights for %s (%d such): they are as initialised. Is it the right model?",
            name,
            trunk[0],
            len(trunk),
        )


def measure(
    model: nn.Module,
    images: datasets.Dataset,
    processor: Any,
    arguments: MeasurementArguments,
    *,
    source: str | None = None,
    reading: Mapping[str, Any] | None = None,
    state: Any = None,
    progress: bool = True,
) -> PlasticityReport:
    """Measure on raw `images` until the selection that `arguments` ask for is settled.

    Warns where there are no source images, and where the images run out before the intervals are as narrow as asked for.

    Args:
        source: Name of source images, as for `plastic_peft.data.load_unlabelled`, or `"vit_nano"` for those of vit_nano.
        reading: How to read the source images: `corrupt`, `token` and `cache_dir` of `plastic_peft.data.load_unlabelled`.
        state: `accelerate.PartialState` or `Accelerator`, to share the pairs among processes.
    """
    sources = None
    if source is not None:
        with main_first(state):
            if source == VIT_NANO.name:
                raw = vit_nano_source_images()
            else:
                raw = load_unlabelled(source, split="train", **(reading or {}))
        sources = with_pixels(raw, processor)
    report = measure_plasticity(
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
    if state is None or state.is_main_process:
        _warn_of_doubts(report, source)
    return report


@contextlib.contextmanager
def main_first(state: Any) -> Iterator[None]:
    """Let the main process go first, and the others after it also where it fails, so that all say what is wrong."""
    if state is not None and not state.is_main_process:
        state.wait_for_everyone()
    try:
        yield
    finally:
        if state is not None and state.is_main_process:
            state.wait_for_everyone()


def _warn_of_doubts(report: PlasticityReport, source: str | None) -> None:
    if source is None:
        logger.warning(
            "Without source images only raw plasticity is measured, which the comparison of methods found to be a poor guide to "
            "what is worth adapting: pass images like those of pretraining with source (--source_name; 'vit_nano' has its own, "
            "for vit_nano only)."
        )
    widest = max(((row.ci_high - row.mean) / row.mean for row in report.rows if row.mean > 0), default=math.nan)
    if report.stopped == "data exhausted" and widest > report.tolerance > 0:
        logger.warning(
            "The images ran out after %d pairs, with intervals up to ±%.0f %% where ±%.0f %% was asked for: the selection could "
            "be another with more images.",
            report.pairs,
            100 * widest,
            100 * report.tolerance,
        )


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy, top-5 accuracy and macro F1, for `Trainer(compute_metrics=...)`."""
    values = _metrics(prediction)
    return {name: value for name, value in values.items() if isinstance(value, float)}


def _metrics(prediction: Any) -> dict[str, Any]:
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return classification_scores(logits, prediction.label_ids)


def predicted_logits(model: Any, images: datasets.Dataset, batch_size: int = 32) -> Iterator[torch.Tensor]:
    """Logits of raw `images` by a loaded adapter, batch by batch, on the CPU.

    Args:
        model: As of `AutoPlasticModelForImageClassification.from_pretrained`, with its `image_processor`.

    Raises:
        ValueError: If the adapter came without an image processor, or `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    if model.image_processor is None:
        raise ValueError("Neither the adapter nor its base model has an image processor: set model.image_processor.")
    base = model.get_base_model()
    pixels = with_pixels(images.select_columns(["image"]), model.image_processor)
    for start in range(0, len(images), batch_size):
        batch = collate([pixels[index] for index in range(start, min(start + batch_size, len(images)))])
        with torch.inference_mode():
            logits = call(model, model_inputs(base, batch)).logits
        yield logits.float().cpu()


def evaluate(model: Any, images: datasets.Dataset, batch_size: int = 32) -> dict[str, Any]:
    """Accuracy, top-5 accuracy (of more than five classes), macro F1 and confusion matrix of a loaded adapter.

    Args:
        model: As of `AutoPlasticModelForImageClassification.from_pretrained`.
        images: Raw images with the columns `image` and `label`; labels are matched with the adapter's by name.

    Returns:
        The metrics, the number of `images`, and `labels`, the names of the confusion matrix's rows and columns.

    Raises:
        ValueError: If the images have a class that the adapter does not know, or as in `predicted_logits`.
    """
    labels = [str(model.config.id2label[index]) for index in range(len(model.config.id2label))]
    names = images.features["label"].names
    present = images.with_format(None)["label"][:]
    if unknown := sorted({names[index] for index in present} - {*labels}):
        raise ValueError(
            f"The images have the class {unknown[0]!r} ({len(unknown)} such), which the adapter does not know: its classes are "
            f"{', '.join(labels[:10])}{', ...' if len(labels) > 10 else ''}."
        )
    logits = torch.cat(list(predicted_logits(model, images, batch_size)))
    references = [labels.index(names[index]) for index in present]
    values = classification_scores(logits.numpy(), references)
    if len(labels) <= 5:
        del values["top5_accuracy"]
    return {**values, "images": len(images), "labels": labels}


class Epochs(TrainerCallback):
    """Tell the training images which epoch it is, so that each epoch augments anew and a resumed one as it would have."""

    def __init__(self, data: datasets.Dataset) -> None:
        self.transform = transform_of(data)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.transform is not None:
            self.transform.set_epoch(int(state.epoch or 0))


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
    if arguments.gradient_checkpointing and arguments.gradient_checkpointing_kwargs is None:
        # the reentrant way, transformers 4's default, gives no gradients behind frozen embeddings
        arguments.gradient_checkpointing_kwargs = {"use_reentrant": False}
    train_data = with_pixels(data["train"], processor, augment, arguments.seed)
    trainer: Any = Trainer(
        model=model,
        args=arguments,
        train_dataset=train_data,
        eval_dataset=with_pixels(data["validation"], processor),
        data_collator=collate,
        compute_metrics=compute_metrics,
        processing_class=processor,
        callbacks=[Epochs(train_data), WholeCheckpoints(), *callbacks],
    )
    # many vision models take further keywords and average over the batch all the same: a trainer that believes them to divide
    # by all images of a step would not divide by the number of its batches
    trainer.model_accepts_loss_kwargs = False
    shard_by_block(model, trainer.accelerator)
    result: Trainer = trainer
    return result


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


# --- what a run can be known to fail by --------------------------------------------------------------------------------


def check_training(arguments: TrainingArguments) -> None:
    """Raise a `ValueError` for what the trainer would find wrong with its arguments only after the measurement."""
    _check_trackers(arguments.report_to)
    for name, why in _BREAKS_RUNS.items():
        if getattr(arguments, name, False):
            raise ValueError(f"{name}=True (--{name}) cannot be: {why}.")
    by_metric = arguments.load_best_model_at_end or str(getattr(arguments.save_strategy, "value", "")) == "best"
    metric = arguments.metric_for_best_model
    if by_metric and (metric or "").removeprefix("eval_") not in METRICS:
        raise ValueError(
            f"metric_for_best_model={metric!r} says not which model is best: pass --metric_for_best_model with one of "
            f"{', '.join(METRICS)}."
        )
    checkpoint = arguments.resume_from_checkpoint
    if checkpoint and not Path(checkpoint, "trainer_state.json").is_file():
        raise ValueError(
            f"resume_from_checkpoint={checkpoint} is no folder of a checkpoint: leave it out to resume from the last whole one "
            "in output_dir."
        )


def _check_trackers(names: Any) -> None:
    from transformers.integrations import get_reporting_integration_callbacks

    for name in [names] if isinstance(names, str) else names or ():
        for tracker in get_reporting_integration_callbacks([name]):
            try:
                tracker()
            except (RuntimeError, ImportError) as error:
                package = {"azure_ml": "azureml-sdk", "comet_ml": "comet-ml", "flyte": "flytekit"}.get(name, name)
                raise ValueError(
                    f"--report_to {name} needs a package that is not installed: run `pip install {package}` ({error})."
                ) from None


def _check_launch(arguments: TrainingArguments) -> None:
    """Refuse processes that do not know of each other, before one of them locks the folder."""
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched > arguments.world_size:
        if torch.distributed.is_initialized():
            # one that ends while others still connect would end them with an error of the network
            torch.distributed.barrier()
        raise ValueError(
            f"{launched} processes were launched that do not know of each other, and would write to the same files: without GPUs, "
            "pass use_cpu=True (--use_cpu)."
        )


@dataclass(frozen=True)
class _Repository:
    """Where a run is pushed once it is whole."""

    name: str
    private: bool | None
    token: str | None

    def made(self) -> _Repository:
        """With its full name, made before the work: a missing right shows here, and not after hours."""
        try:
            made = HfApi(token=self.token).create_repo(self.name, private=self.private, exist_ok=True)
            return replace(self, name=made.repo_id)
        # the client lets the errors of its HTTP library pass
        except Exception as error:
            raise ConnectionError(
                f"The adapter could not be pushed to {self.name} after training ({str(error).splitlines()[-1]}): log in with "
                "`hf auth login`, correct --hub_token or --hub_model_id, or leave --push_to_hub out."
            ) from error

    def push(self, trainer: Trainer, card: Callable[..., Any]) -> None:
        """Push the trained adapter; all processes have to call it."""
        weights = _gathered_weights(trainer)
        if trainer.is_world_process_zero():
            commit = hub.push(
                trainer.accelerator.unwrap_model(trainer.model),
                self.name,
                image_processor=trainer.processing_class,
                card=card(repo_id=self.name),
                state_dict=weights,
                private=self.private,
                token=self.token,
            )
            logger.info("Pushed the adapter to %s.", commit.repo_url)


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
            other, or as `check_training` and the steps do.
        OSError: If the output folder cannot be written, its disk is full (`faults.DiskFullError`), memory is full
            (`faults.MemoryFullError`), or the Hub refuses a run that is to be pushed.
        faults.LostProcessError: If another process ended, or did not answer within `training_args.ddp_timeout` seconds.
    """
    _check_launch(training_args)
    check_training(training_args)
    folder = Path(str(training_args.output_dir))
    with (
        explained(folder, training_args.process_index),
        reserved(folder) if training_args.process_index == 0 else contextlib.nullcontext(),
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
    main = training_args.process_index == 0
    _heed_timeout(training_args)
    training_args, repository = _push_at_end(training_args, model_args.token)
    with training_args.main_process_first(local=False, desc="preparing the run"):
        noted = run_note(model_args, data_args, plasticity_args, training_args)
        if main and not start_over:
            check_run(folder, noted, plasticity_args.report)
        given = given_report(folder, plasticity_args.report, start_over and main)
        if main and repository is not None:
            repository = repository.made()
        data = data_args.load(**model_args.download_options())
        if main:
            open_run(folder, noted, digests(data), plasticity_args.report, start_over=start_over)

    adapted, processor, report = _adapted_model(
        folder, model_args, data_args, plasticity_args, training_args, data, given
    )
    callbacks = [*callbacks, *_tracking(data, processor, plasticity_args.track_every)]
    augment = data_args.augmentation(processor)
    trainer = make_trainer(adapted, data, processor, training_args, augment=augment, callbacks=callbacks)
    for callback in callbacks:
        if hasattr(callback, "trainer"):
            callback.trainer = trainer
    train_once(trainer, folder)
    metrics = _evaluated(trainer, data, processor)

    shown = {name: metrics[f"test_{name}"] for name in ("accuracy", "macro_f1")}
    named = data_args.dataset_name or data_args.train_dir
    card = functools.partial(model_card, adapted, report, metrics=shown, dataset=named)
    save_run(trainer, folder, card())
    selection = dict(adapted.peft_config["default"].selected_modules or {})
    trainable, parameters = adapted.get_nb_trainable_parameters()
    result = TrainResult(metrics, selection, report, trainable, parameters, trainer)
    if main:
        _write_results(folder, result, data)
    if repository is not None:
        repository.push(trainer, card)
    return result


def run_note(
    model_args: ModelArguments,
    data_args: DataArguments,
    plasticity_args: PlasticityArguments,
    training_args: TrainingArguments,
) -> dict[str, Any]:
    """What decides the result of a run with these arguments."""
    return as_noted(model_args, data_args, plasticity_args, deciding(training_args))


def _heed_timeout(arguments: TrainingArguments) -> None:
    if arguments.use_cpu and torch.distributed.is_initialized():
        # transformers heeds ddp_timeout on GPUs only, and gloo waits for half an hour
        torch.distributed.distributed_c10d._set_pg_timeout(arguments.ddp_timeout_delta)


def _push_at_end(arguments: TrainingArguments, token: str | None) -> tuple[TrainingArguments, _Repository | None]:
    """Take pushing from the trainer, which would push every checkpoint, and leave it to the end of the run."""
    if not arguments.push_to_hub:
        return arguments, None
    name = arguments.hub_model_id or Path(str(arguments.output_dir)).resolve().name
    repository = _Repository(name, arguments.hub_private_repo, arguments.hub_token or token)
    arguments = copy.copy(arguments)
    arguments.push_to_hub = False
    return arguments, repository


def _adapted_model(
    folder: Path,
    model_args: ModelArguments,
    data_args: DataArguments,
    plasticity_args: PlasticityArguments,
    training_args: TrainingArguments,
    data: Mapping[str, datasets.Dataset],
    given: PlasticityReport | None,
) -> tuple[Any, Any, PlasticityReport | None]:
    """The model with its adapter, its image processor, and the report that the modules were selected by."""
    set_seed(training_args.seed)
    model, processor = load_model(model_args, data["train"].features["label"].names)
    # what cannot be is known before anything is measured
    data_args.augmentation(processor)
    model.to(training_args.device)

    def measured() -> PlasticityReport:
        return measure_run(model, data["train"], processor, plasticity_args, data_args, model_args, training_args)

    with _gathered(model):
        report = None
        if plasticity_args.target_modules is None:
            report = report_of_run(folder, given, measured, training_args.process_index == 0)
        # the same start for adapter and head, whether or not anything was measured
        set_seed(training_args.seed)
        adapted = _adapted(folder, model, report, plasticity_args, training_args, model_args.model_revision)
    trainable, parameters = adapted.get_nb_trainable_parameters()
    logger.info(
        "Training %s of %s parameters (%.2f %%).", f"{trainable:,}", f"{parameters:,}", 100 * trainable / parameters
    )
    return adapted, processor, report


def measure_run(
    model: nn.Module,
    images: datasets.Dataset,
    processor: Any,
    arguments: MeasurementArguments,
    data_args: DataArguments,
    model_args: ModelArguments,
    training: TrainingArguments,
) -> PlasticityReport:
    """`measure` on the processes of a run, and say so."""
    state = training.distributed_state if training.world_size > 1 else None
    logger.info("Measuring on %d training images.", len(images))
    report = measure(
        model,
        images,
        processor,
        arguments,
        source=data_args.source_name,
        reading={"corrupt": data_args.corrupt_images, **model_args.download_options()},
        state=state,
        progress=not training.disable_tqdm,
    )
    logger.info("Measured %d pairs (%s).", report.pairs, report.stopped)
    return report


def _adapted(
    folder: Path,
    model: nn.Module,
    report: PlasticityReport | None,
    arguments: PlasticityArguments,
    training: TrainingArguments,
    revision: str,
) -> Any:
    """The model with its adapter, on the selection that the run made before where there is one."""
    note = folder / SELECTION_NAME
    settled = json.loads(note.read_text(encoding="utf-8")) if note.is_file() and report is not None else {}
    wanted = arguments.to_config(report, **settled)
    # the adapter belongs to the weights of this revision
    wanted.revision = None if revision == "main" else revision
    adapted = peft.get_peft_model(model, wanted)  # type: ignore[arg-type]
    config: Any = adapted.peft_config["default"]
    if training.process_index == 0 and not settled and config.selected_modules is not None:
        kept = ("selected_modules", "rank_pattern", "alpha_pattern", "modules_to_save")
        write_whole(note, json.dumps({name: getattr(config, name) for name in kept}, indent=1))
    return adapted


def _tracking(data: Mapping[str, datasets.Dataset], processor: Any, every: int) -> list[TrainerCallback]:
    if not every:
        return []
    from .callback import PlasticityCallback

    images = data["validation"]
    probe = images.shuffle(seed=0).select(range(min(64, len(images))))
    return [PlasticityCallback(with_pixels(probe, processor), every=every)]


def _evaluated(trainer: Trainer, data: Mapping[str, datasets.Dataset], processor: Any) -> dict[str, Any]:
    metrics = _validated(trainer)
    prediction = trainer.predict(with_pixels(data["test"], processor), metric_key_prefix="test")
    return {**metrics, **(prediction.metrics or {}), "confusion_matrix": _metrics(prediction)["confusion_matrix"]}


def _validated(trainer: Trainer) -> dict[str, Any]:
    """Metrics on the validation images: those of the last evaluation in training, where it was of the final weights."""
    if not trainer.args.load_best_model_at_end:
        for entry in reversed(trainer.state.log_history):
            if "eval_accuracy" in entry and entry["step"] == trainer.state.global_step:
                return {name: value for name, value in entry.items() if name != "step"}
    return trainer.evaluate()


def _write_results(folder: Path, result: TrainResult, data: Mapping[str, datasets.Dataset]) -> None:
    record = {
        "metrics": result.metrics,
        "selection": result.selection,
        "trainable_parameters": result.trainable,
        "parameters": result.parameters,
        "training_images": class_counts(data["train"]),
        "steps": result.trainer.state.global_step,
        "processes": result.trainer.args.world_size,
    }
    write_whole(folder / RESULTS_NAME, json.dumps(record, indent=1))


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
    "evaluate",
    "last_whole_checkpoint",
    "load_model",
    "make_trainer",
    "measure",
    "predicted_logits",
    "save_run",
    "shard_by_block",
    "train",
    "training_arguments",
]
