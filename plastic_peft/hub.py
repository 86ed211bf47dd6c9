"""Adapters as folders and Hub repositories: saved with all that loading needs, loaded with nothing taken on trust.

An adapter folder holds PEFT's two files (`adapter_config.json` and `adapter_model.safetensors`), the report with a
picture, the image processor and a model card. Only JSON and safetensors are ever read.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi, ModelCard, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification
from transformers.utils import logging as transformers_logging
from transformers.utils.peft_utils import find_adapter_config_file

from .card import model_card
from .components import BLOCK_ROLES, named_leaves
from .embedded import VIT_NANO, call_by_name, located
from .layout import exact_facts, plasticity_config
from .names import renamed_keys
from .processors import accept_image_size, output_size
from .report import REPORT_NAME, PlasticityReport, write_whole
from .tuner import PlasticityConfig
from .tuner.settle import USUAL_HEADS, adopt_names, exact_pattern, fits, in_names_of
from .tuner.undo import undone_on_error
from .untrusted import read_json, validate_adapter_config


CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PROCESSOR_NAME = "preprocessor_config.json"
PICTURE_NAME = "plasticity.png"
SAVING = ".saving."


class AutoPlasticModelForImageClassification:
    """Loads an image classifier from a plasticity adapter alone: base model, head, label names, image processor."""

    def __init__(self) -> None:
        raise TypeError(f"Use {type(self).__name__}.from_pretrained(adapter_id_or_path).")

    @classmethod
    def from_pretrained(
        cls,
        adapter_id_or_path: str | os.PathLike[str],
        *,
        base_model: nn.Module | str | os.PathLike[str] | None = None,
        adapter_name: str = "default",
        is_trainable: bool = False,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        **model_kwargs: Any,
    ) -> PeftModel:
        """Load an adapter with its base model, ready for use, in evaluation mode.

        Nothing of the adapter is trusted: weights come from safetensors only, its config may hold plain names and numbers
        only, and its tensors must be exactly those that the config implies. Code from repositories never runs,
        unless you pass `trust_remote_code=True` for the base model.

        Args:
            adapter_id_or_path: Folder, or repository on the Hub.
            base_model: In the place of the base model that the adapter names: a module, which is changed in place, or a
                folder or repository.
            adapter_name: Name of the adapter inside the model.
            is_trainable: Load it for further training; by default it is frozen.
            revision, subfolder: Where in the adapter's repository to look; `subfolder` also applies to folders.
            token, cache_dir, local_files_only: As in `huggingface_hub`, for adapter and base model.
            **model_kwargs: For `AutoModelForImageClassification.from_pretrained`: `dtype` (float32 by default, as in training,
                whatever the file holds), `device_map`, ...

        Returns:
            The `PeftModel`; its `image_processor` attribute is the adapter's own, else the base model's, else `None`.

        Raises:
            FileNotFoundError: If the adapter, one of its files or the repository is not there.
            PermissionError: If the repository is gated, or the token may not read it.
            ValueError: If the adapter is not what a plasticity adapter is, or does not fit the base model.
        """
        hub: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        folder, remote = adapter_folder(adapter_id_or_path, revision, subfolder, **hub)
        config = PlasticityConfig(**validate_adapter_config(read_json(_present(folder / CONFIG_NAME))))
        weights = _present(folder / WEIGHTS_NAME)
        report = folder / REPORT_NAME
        saved_report = PlasticityReport.from_dict(read_json(report), origin=str(report)) if report.is_file() else None

        unsettled: set[str] = set()
        if isinstance(base_model, nn.Module):
            base: Any = base_model
            source = getattr(base, "name_or_path", "")
            _check_labels(base, config.labels)
        else:
            source = located(base_model) if base_model is not None else _base_name(config, remote)
            base, unsettled = _load_base(source, config, base_model is None, hub, model_kwargs)
        recorded = config.checkpoint_names
        adopt_names(config, base)
        config.inference_mode = not is_trainable
        with undone_on_error(config, base, adapter_name):
            model = _load_adapter(base, config, recorded, adapter_name, weights)
            if saved_report is not None:
                config.report = _fitting(saved_report, base, recorded)
        _relabel(base, config)
        if missing := sorted(name for name in unsettled if not _replaced(name, config.modules_to_save or ())):
            warnings.warn(
                f"The base model {source} has no weights for {missing[0]} ({len(missing)} such), nor has the adapter: they are "
                "as initialised. If the adapter was made for another base model, pass it as base_model=.",
                stacklevel=2,
            )
        if not is_trainable:
            model.eval()
        model.image_processor = _image_processor(folder, source, _of_base(config, base_model is None, source, hub))  # type: ignore[assignment]
        # an adapter that was trained at another image size says so by its processor
        with suppress(ValueError):
            accept_image_size(base, output_size(model.image_processor)[0])
        return model


# --- saving ------------------------------------------------------------------------------------------------------------


def save_adapter(
    peft_model: PeftModel,
    path: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    report: PlasticityReport | None = None,
    image_processor: Any = None,
    card: ModelCard | None = None,
    state_dict: dict[str, Any] | None = None,
) -> Path:
    """Write an adapter with all that loading needs: weights, config with label names, report, picture, processor, card.

    `peft_model.save_pretrained(path)` also writes an adapter that loads with the right head and labels; this adds the
    rest, and states modules and ranks as exact names whatever patterns they were given by. Each file is
    written whole or not at all.

    Args:
        peft_model: The model.
        path: Folder to write to, made if needed.
        adapter_name: Which adapter of the model.
        report: Defaults to the report that the selection was made from, if it is at hand.
        image_processor: Defaults to `peft_model.image_processor`, if there is one.
        card: The README; defaults to `model_card(peft_model, report)`.
        state_dict: Weights of the model, where it does not hold them whole itself: `accelerator.get_state_dict(model)`,
            called on every process, for one that FSDP or DeepSpeed shards.

    Returns:
        The folder.

    Raises:
        ValueError: If the model has no such adapter, or it is no plasticity adapter.
    """
    config = plasticity_config(peft_model, adapter_name)
    report = report if report is not None else config.report
    image_processor = image_processor if image_processor is not None else getattr(peft_model, "image_processor", None)
    base_config = getattr(peft_model.get_base_model(), "config", None)
    labels = getattr(base_config, "id2label", None)
    # an older adapter in the same folder must not lend its report to this one
    with whole_folder(path, instead_of=(REPORT_NAME, PICTURE_NAME, PROCESSOR_NAME)) as folder:
        write_adapter(peft_model, adapter_name, folder, state_dict)
        facts = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        facts |= exact_facts(peft_model, adapter_name, exact_pattern)
        if labels:
            facts["labels"] = [str(labels[index]) for index in sorted(labels)]
        facts["problem_type"] = getattr(base_config, "problem_type", None)
        write_whole(folder / CONFIG_NAME, json.dumps(facts, indent=2))
        if report is not None:
            report.save(folder)
            report.plot(folder / PICTURE_NAME)
        if image_processor is not None:
            image_processor.save_pretrained(folder)
        readme = card if card is not None else model_card(peft_model, report, adapter_name=adapter_name)
        write_whole(folder / "README.md", str(readme))
    return Path(path)


def push(
    peft_model: PeftModel,
    repo_id: str,
    *,
    adapter_name: str = "default",
    report: PlasticityReport | None = None,
    image_processor: Any = None,
    card: ModelCard | None = None,
    state_dict: dict[str, Any] | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload plasticity adapter",
) -> CommitInfo:
    """Upload to the Hub what `save_adapter` writes, in one commit; the repository is made if needed.

    Args:
        repo_id: `"user/name"`.
        private: Whether a new repository is private; by default, as the account or organisation has it.
        token, revision, commit_message: As in `huggingface_hub.HfApi.upload_folder`.
        peft_model, adapter_name, report, image_processor, card, state_dict: As in `save_adapter`.

    Returns:
        The commit.

    Raises:
        ValueError: As `save_adapter`.
        huggingface_hub.errors.HfHubHTTPError: If the Hub refuses, for example for want of rights.
    """
    config = plasticity_config(peft_model, adapter_name)
    base = str(config.base_model_name_or_path or getattr(peft_model.get_base_model(), "name_or_path", ""))
    local = base != str(VIT_NANO) and (not _is_repo_id(base) or Path(base).is_dir())
    if local:
        warnings.warn(
            f"The base model {base!r} is not on the Hub, so that others have to pass base_model= to load {repo_id}.",
            stacklevel=2,
        )
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(
            peft_model,
            folder,
            adapter_name=adapter_name,
            report=report,
            image_processor=image_processor,
            card=card,
            state_dict=state_dict,
        )
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if card is None:
            used = report if report is not None else config.report
            card = model_card(peft_model, used, adapter_name=adapter_name, repo_id=repo_id)
            write_whole(Path(folder) / "README.md", str(card))
        if local:
            _leave_out_paths(Path(folder))
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            revision=revision,
            # what an earlier push has left and this one does not write
            delete_patterns=[REPORT_NAME, PICTURE_NAME, PROCESSOR_NAME],
        )


def _leave_out_paths(folder: Path) -> None:
    """A folder of the one who pushes is nobody else's concern, and may be the name of somebody else's repository."""
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = None
    write_whole(folder / CONFIG_NAME, json.dumps(config, indent=2))
    if (folder / REPORT_NAME).is_file():
        report = PlasticityReport.load(folder)
        replace(report, base_model=Path(report.base_model).name).save(folder)


# --- loading -----------------------------------------------------------------------------------------------------------


def adapter_folder(
    adapter: str | os.PathLike[str],
    revision: str | None = None,
    subfolder: str | None = None,
    files: Iterable[str] = (CONFIG_NAME, WEIGHTS_NAME, REPORT_NAME, PROCESSOR_NAME),
    **hub: Any,
) -> tuple[Path, bool]:
    """The folder that holds those of an adapter's `files` that there are, and whether it came from the Hub.

    Raises:
        FileNotFoundError: If there is no such folder or repository.
        PermissionError: If the repository is gated, or the token may not read it.
        ValueError: If `subfolder` leads out of the adapter's folder.
    """
    inside = Path(subfolder or "")
    if inside.is_absolute() or ".." in inside.parts:
        raise ValueError(f"subfolder={subfolder!r} leads out of the adapter's folder.")
    path = Path(adapter)
    if path.is_dir():
        return path / inside, False
    name = os.fspath(adapter)
    if not _is_repo_id(name):
        raise FileNotFoundError(f"{name} is neither a folder nor the name of a Hub repository (user/name).")
    try:
        found = snapshot_download(
            name, revision=revision, allow_patterns=[(inside / file).as_posix() for file in files], **hub
        )
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, GatedRepoError) or status == 403:
            raise PermissionError(
                f"Access to {name} is restricted: ask for it on its Hub page, then pass token= or run `hf auth login`."
            ) from error
        raise FileNotFoundError(
            f"{name} cannot be had: there is no such folder here, and the Hub answers: {str(error).strip().splitlines()[0]} "
            "Check the name and revision; a private repository needs token= or `hf auth login`."
        ) from error
    return Path(found) / inside, True


def _present(path: Path) -> Path:
    if not path.is_file():
        pickled = " A pickled adapter_model.bin is never read." if path.name == WEIGHTS_NAME else ""
        raise FileNotFoundError(f"There is no {path.name} in {path.parent}.{pickled}")
    return path


def _is_repo_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _base_name(config: PlasticityConfig, remote: bool) -> str:
    """The base model that the adapter names, if loading it by that name is sound."""
    name = config.base_model_name_or_path
    if not name:
        raise ValueError("The adapter does not say what its base model is: pass base_model=.")
    local = Path(name)
    if name == str(VIT_NANO):
        return name
    if not remote and local.is_dir():
        if not (local / "config.json").is_file():
            raise ValueError(f"The adapter's base model {name} is a folder without config.json: pass base_model=.")
    elif not _is_repo_id(name):
        raise ValueError(
            f"The adapter's base model {name[:200]!r} is neither the name of a Hub repository nor "
            f"{'allowed to be a path, as the adapter comes from the Hub' if remote else 'a folder here'}: pass base_model=."
        )
    return name


def _load_base(
    source: str, config: PlasticityConfig, named_by_adapter: bool, hub: dict[str, Any], kwargs: dict[str, Any]
) -> tuple[Any, set[str]]:
    """The base model with the adapter's head size and labels, and its weights that its files did not hold."""
    hub = _of_base(config, named_by_adapter, source, hub)
    if find_adapter_config_file(source, **hub) is not None:
        raise ValueError(f"The base model {source} is itself an adapter: pass the model that it adapts as base_model=.")
    if not {"dtype", "torch_dtype", "quantization_config"} & kwargs.keys():
        # files may be in half precision to be small, which is not what adapters are trained on
        kwargs["dtype"] = torch.float32
    kwargs = {"use_safetensors": True, "trust_remote_code": False, **kwargs, "output_loading_info": True}
    if config.problem_type is not None:
        kwargs["problem_type"] = config.problem_type
    if config.labels is not None:
        kwargs |= {**label_maps(config.labels), "ignore_mismatched_sizes": True}
    # the new head is about to be replaced by the adapter's, so advice to train it would mislead
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        base, info = AutoModelForImageClassification.from_pretrained(source, **hub, **kwargs)
    finally:
        transformers_logging.set_verbosity(verbosity)
    call_by_name(base)
    # transformers 5 gives mismatched keys with their shapes
    mismatched = (entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"])
    return base, {*info["missing_keys"], *mismatched} & {name for name, _ in base.named_parameters()}


def _of_base(config: PlasticityConfig, named_by_adapter: bool, source: str, hub: dict[str, Any]) -> dict[str, Any]:
    """How to read the base model from the Hub: at the revision that the adapter names, if it names the model."""
    return {**hub, "revision": config.revision if named_by_adapter and not Path(source).is_dir() else None}


def label_maps(labels: Sequence[str]) -> dict[str, Any]:
    """What a transformers config says about label names: `id2label` and `label2id`."""
    return {"id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)}}


def _check_labels(base: Any, labels: list[str] | None) -> None:
    config: Any = getattr(base, "config", None)
    if labels is not None and hasattr(config, "id2label") and config.num_labels != len(labels):
        raise ValueError(
            f"base_model has {config.num_labels} labels and the adapter {len(labels)}: load it with num_labels={len(labels)} and "
            "ignore_mismatched_sizes=True, or pass its name instead of the module."
        )


def _relabel(base: Any, adapter: PlasticityConfig) -> None:
    config: Any = getattr(base, "config", None)
    if adapter.labels is not None and hasattr(config, "id2label"):
        for name, labels in label_maps(adapter.labels).items():
            setattr(config, name, labels)
    if adapter.problem_type is not None and hasattr(config, "problem_type"):
        config.problem_type = adapter.problem_type


def _load_adapter(
    base: nn.Module, config: PlasticityConfig, recorded: dict[str, str] | None, adapter_name: str, weights: Path
) -> PeftModel:
    """Put the adapter into the model; its file must hold exactly the tensors that the config implies."""
    shapes = _shapes(weights)
    largest = max((size for shape in shapes.values() for size in shape), default=0)
    if config.adapter == "lora" and max([config.r, *(config.rank_pattern or {}).values()]) > largest:
        raise ValueError(f"{CONFIG_NAME} has ranks beyond {largest}, the largest size in {WEIGHTS_NAME}.")
    known = {name for name, _, _ in named_leaves(base) if name}
    for name in list(config.modules_to_save or ()):
        if any(other == name or other.endswith(f".{name}") for other in known):
            continue
        if name in USUAL_HEADS:
            config.modules_to_save = [other for other in config.modules_to_save or () if other != name]
        else:
            raise ValueError(f"{CONFIG_NAME}: modules_to_save names {name!r}, which this model does not have.")
    named = {*known, *(name for name, _ in base.named_parameters())}
    ends = {".".join(name.split(".")[first:]) for name in named for first in range(name.count(".") + 1)}
    for pattern in ("rank_pattern", "alpha_pattern"):
        if nowhere := next((key for key in getattr(config, pattern) or {} if key not in ends), None):
            # peft tries every key on every module, so that many idle ones take hours
            raise ValueError(f"{CONFIG_NAME}: {pattern} names {nowhere!r}, which this model does not have.")
    # initial values are about to be overwritten, except where the initialisation changes the base weights as well
    mutating = isinstance(config.init_lora_weights, str) and config.init_lora_weights.lower().startswith(
        ("pissa", "olora")
    )
    # peft would take weights that are in no memory yet in the model's dtype, in which they lose digits
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in base.parameters())
    unfilled = not mutating and not half
    model = PeftModel(base, config, adapter_name=adapter_name, low_cpu_mem_usage=unfilled)
    expected = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    keys = renamed_keys(shapes, base, recorded)
    wrong = {
        **{f"holds {key}, which the config does not imply": None for key in keys if keys[key] not in expected},
        **{f"lacks {key}": None for key in expected if key not in keys.values()},
        **{
            f"holds {key} in shape {shapes[key]}, where the model has {tuple(expected[keys[key]].shape)}": None
            for key in keys
            if keys[key] in expected and tuple(expected[keys[key]].shape) != shapes[key]
        },
    }
    if wrong:
        raise ValueError(
            f"{weights} does not fit its config and base model: it {next(iter(wrong))[:400]} ({len(wrong)} such differences)."
        )
    tensors = {keys[key]: tensor for key, tensor in load_file(weights).items()}
    set_peft_model_state_dict(model, tensors, adapter_name=adapter_name, low_cpu_mem_usage=unfilled)
    tuner: Any = model.base_model
    tuner._cast_adapter_dtype(adapter_name=adapter_name, autocast_adapter_dtype=True)
    return model


def _shapes(weights: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a safetensors file, from its header alone."""
    try:
        with safe_open(weights, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{weights} is no whole safetensors file: {error}.") from None


def _replaced(parameter: str, modules: Any) -> bool:
    return any(f".{name}." in f".{parameter}" for name in modules)


def _fitting(report: PlasticityReport, base: nn.Module, recorded: dict[str, str] | None) -> PlasticityReport:
    report = in_names_of(report, base, recorded)
    modules = {name: module for name, module, _ in named_leaves(base)}
    for row in report.select_rows("module"):
        if row.role in BLOCK_ROLES and not fits(row, modules.get(row.name)):
            raise ValueError(
                f"The adapter's report describes another architecture ({report.base_model}): {row.name} is not in this model or "
                f"has another shape than {row.shape}. Remove {REPORT_NAME}, or load the base model that it belongs to."
            )
    return report


def _image_processor(folder: Path, source: str, hub: dict[str, Any]) -> Any:
    own = folder / PROCESSOR_NAME
    if own.is_file():
        read_json(own)
        try:
            return AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
            raise ValueError(f"{own} describes no image processor that can be used: {str(error)[:400]}") from error
    try:
        return AutoImageProcessor.from_pretrained(source, trust_remote_code=False, **hub) if source else None
    except (OSError, ValueError):
        return None


# --- what saving and exporting share -----------------------------------------------------------------------------------


def write_adapter(
    peft_model: PeftModel, adapter_name: str, folder: Path, state_dict: dict[str, Any] | None = None
) -> None:
    """PEFT's files of one adapter, directly in `folder` whatever the adapter's name."""
    peft_model.save_pretrained(str(folder), selected_adapters=[adapter_name], state_dict=state_dict)
    inner = folder / adapter_name
    if adapter_name != "default":
        for file in inner.iterdir():
            os.replace(file, folder / file.name)
        inner.rmdir()


@contextmanager
def whole_folder(path: str | os.PathLike[str], instead_of: Iterable[str] = ()) -> Iterator[Path]:
    """A temporary folder inside `path` whose files move to `path` when the block ends well, and vanish otherwise.

    Files named in `instead_of` are removed from `path` if the block did not write new ones.
    """
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file: pass a folder.")
    new = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    try:
        # not beside it: the folder may be a mount, or in one where we must not write
        with tempfile.TemporaryDirectory(dir=target, prefix=SAVING) as name:
            folder = Path(name)
            yield folder
            for old in instead_of:
                if not (folder / old).exists():
                    (target / old).unlink(missing_ok=True)
            # the config comes last: with it the folder is an adapter
            for file in sorted(folder.iterdir(), key=lambda file: (file.name == CONFIG_NAME, file.name)):
                os.replace(file, target / file.name)
    except BaseException:
        if new:
            with suppress(OSError):
                target.rmdir()
        raise
