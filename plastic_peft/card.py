"""The model card of an adapter: what it was made from, why those modules, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel

from .embedded import NAME, portable_name
from .layout import layout
from .report import LABELS, PlasticityReport


TAGS = ("peft", "plasticity")
SHOWN_LABELS = 20


def model_card(
    peft_model: PeftModel,
    report: PlasticityReport | None = None,
    *,
    metrics: Mapping[str, float] | None = None,
    dataset: str | None = None,
    license: str | None = None,
    repo_id: str | None = None,
    adapter_name: str = "default",
    tags: Sequence[str] = (),
) -> ModelCard:
    """Write the README of an adapter's repository.

    Args:
        peft_model: The model with the adapter.
        report: Its plasticity report; defaults to the one that the selection was made from, if it is at hand.
        metrics: Results by name, such as `{"accuracy": 0.93}`; with `dataset` they become the card's evaluation results.
        dataset: Name of the data set: its id on the Hub (`user/name`), or a path, of which the card shows the last
            part.
        license: Licence of the adapter, as the Hub spells it; `None` leaves it open.
        repo_id: Where the adapter will be, for the code that loads it; `None` writes a placeholder.
        adapter_name: Which adapter of the model.
        tags: Further tags, after `peft` and `plasticity`.

    Returns:
        The card; `str(card)` is the text of the README.
    """
    config: Any = peft_model.peft_config[adapter_name]
    report = report if report is not None else getattr(config, "report", None)
    base_config = getattr(peft_model.get_base_model(), "config", None)
    base = portable_name(config.base_model_name_or_path or getattr(peft_model.get_base_model(), "name_or_path", ""))
    trained_on = _public_name(dataset)
    labels = getattr(base_config, "id2label", None)
    names = [str(labels[index]) for index in sorted(labels)] if labels else []
    title = (repo_id or "plasticity adapter").rpartition("/")[2]
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=trained_on if _is_hub_id(dataset) else "local",
            dataset_name=trained_on,
            metric_type=name,
            metric_value=float(value),
        )
        for name, value in (metrics or {}).items()
        if dataset
    ]
    data = ModelCardData(
        base_model=base if _is_hub_id(base) else None,
        datasets=dataset if _is_hub_id(dataset) else None,
        eval_results=results or None,
        library_name="peft",
        license=license,
        metrics=list(metrics) if metrics else None,
        model_name=title if results else None,
        pipeline_tag="image-classification",
        tags=list(dict.fromkeys([*TAGS, *tags])),
    )
    kind = "low-rank adapters" if config.adapter == "lora" else "the weights"
    whole = f", and the whole weights of {_saved(config)}" if config.modules_to_save else ""
    sections = [
        f"# {title}",
        f"An adapter for `{_public_name(base) or 'an image classifier'}`{f', trained on {trained_on}' if dataset else ''}. "
        f"It holds {kind} of {_choice(config)}{whole}. Made with `plastic_peft`.",
        _metrics(metrics, trained_on),
        _labels(names),
        _plasticity(report),
        _modules(config, _ranks(peft_model, adapter_name)),
        _usage(repo_id or "user/name", base, len(names), config.adapter),
    ]
    body = "\n\n".join(section for section in sections if section)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n", ignore_metadata_errors=True)


def _choice(config: Any) -> str:
    if not config.selected_modules:
        return "modules chosen by name"
    if config.order == "random":
        return "modules chosen at random"
    return f"modules selected by {config.signal or 'scores given by hand'}, the {config.order} first"


def _metrics(metrics: Mapping[str, float] | None, dataset: str | None) -> str:
    if not metrics:
        return ""
    rows = [f"| {_cell(name)} | {float(value):.4g} |" for name, value in metrics.items()]
    return "\n".join(
        [f"## Results{f' on {dataset}' if dataset else ''}\n", "| metric | value |", "| --- | ---: |", *rows]
    )


def _labels(names: list[str]) -> str:
    if not names:
        return ""
    more = f", and {len(names) - SHOWN_LABELS} more" if len(names) > SHOWN_LABELS else ""
    return f"## Labels\n\n{len(names)}: {', '.join(map(_cell, names[:SHOWN_LABELS]))}{more}"


def _plasticity(report: PlasticityReport | None) -> str:
    if report is None:
        return ""
    roles = report.by_role()
    if report.inputs == "bounds":
        text = "Upper bounds of the rate of change of each component over its blocks, computed from the weights alone."
    else:
        text = (
            "The mean rate of change of each component over its blocks; a high one means that the component reacts "
            f"strongly to its inputs. Measured with {report.inputs} inputs on {report.pairs} pairs."
        )
    columns = {"plasticity": "mean", "lowest": "lowest", "highest": "highest"}
    if roles["shift"].notna().all():
        text += " Shift is the rate between source and target images over the rate among source images."
        columns["shift"] = "shift"
    lines = [
        f"| {LABELS.get(str(role), str(role))} | {int(row.blocks)} | {int(row.parameters):,} | "
        + " | ".join(f"{row[column]:.4g}" for column in columns.values())
        + " |"
        for role, row in roles.iterrows()
    ]
    return "\n".join(
        [
            f"## Plasticity\n\n{text}\n",
            f"| component | blocks | parameters | {' | '.join(columns)} |",
            f"| --- {'| ---: ' * (2 + len(columns))}|",
            *lines,
            "\n![Plasticity over depth](plasticity.png)",
        ]
    )


def _ranks(peft_model: PeftModel, adapter_name: str) -> dict[str, int | None]:
    """The modules that the adapter sits on, with their ranks as they are in the model; whole weights have none."""
    config: Any = peft_model.peft_config[adapter_name]
    ranks, _ = layout(peft_model, adapter_name)
    return dict.fromkeys(ranks) if getattr(config, "adapter", "lora") == "full" else dict(ranks)


def _modules(config: Any, ranks: Mapping[str, int | None]) -> str:
    scores = config.selected_modules or {}
    used = sorted({rank for rank in ranks.values() if rank is not None})
    listed = []
    for name in scores or sorted(ranks):
        facts = [f"score {scores[name]:.4g}"] if name in scores else []
        facts += [f"rank {ranks[name]}"] if len(used) > 1 and name in ranks else []
        listed.append(f"- `{name}`" + (f" ({', '.join(facts)})" if facts else ""))
    head = "1 module" if len(listed) == 1 else f"{len(listed)} modules"
    if used:
        head += f" with an adapter of rank {used[0]}" + (f" to {used[-1]}" if len(used) > 1 else "")
    else:
        head += " with trained weights"
    if config.modules_to_save:
        head += f", and {_saved(config)} trained in full"
        listed += [f"- `{name}` (trained in full)" for name in config.modules_to_save]
    return "\n".join(["## Selected modules", "", f"<details><summary>{head}</summary>", "", *listed, "", "</details>"])


def _saved(config: Any) -> str:
    first, *others = config.modules_to_save
    more = f" and {len(others)} {'other' if len(others) == 1 else 'others'}" if others else ""
    return f"`{first}`{more}"


def _usage(repo_id: str, base: str, labels: int, adapter: str) -> str:
    public = base == NAME or _is_hub_id(base)
    source = base if public else f"path/to/{_public_name(base) or 'base_model'}"
    where = "" if public else f', base_model="{source}"'
    note = "" if public else "The base model is not on the Hub: `base_model` is the folder that holds it.\n\n"
    build = f'AutoModelForImageClassification.from_pretrained("{source}", num_labels={labels}, ignore_mismatched_sizes=True)'
    imports = (
        "import plastic_peft\nfrom peft import PeftModel\nfrom transformers import AutoModelForImageClassification"
    )
    if base == NAME:
        build = f"load_vit_nano(num_labels={labels})  # the base model comes with plastic_peft"
        imports = "from peft import PeftModel\nfrom plastic_peft import load_vit_nano"
    text = f"""## How to load it

{note}```python
from transformers import pipeline
from plastic_peft import AutoPlasticModelForImageClassification

model = AutoPlasticModelForImageClassification.from_pretrained("{repo_id}"{where})
classify = pipeline("image-classification", model=model, image_processor=model.image_processor)
```

`peft` loads it onto a base model of yours once `plastic_peft` is imported:

```python
{imports}

base = {build}
model = PeftModel.from_pretrained(base, "{repo_id}")
```

"""
    if adapter == "lora" and base != NAME:
        return (
            text
            + 'Where `plastic_peft` is not installed, `peft` alone loads what `plastic_peft.export_lora(model, "folder")` '
            'writes: `PeftModel.from_pretrained(base, "folder")`.'
        )
    return (
        text + "Where `plastic_peft` is not installed, `transformers` alone loads what\n"
        '`plastic_peft.export_merged(model, "folder")` writes: `AutoModelForImageClassification.from_pretrained("folder")`.'
    )


def _cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


def _is_hub_id(name: str | None) -> bool:
    """Is it `user/name`, and not a folder here that is called so?"""
    try:
        validate_repo_id(name or "/")
    except HFValidationError:
        return False
    return "/" in str(name) and not Path(str(name)).exists()


def _public_name(name: str | None) -> str:
    """A name as others are to read it: of paths of the author's machine, the last part only."""
    if not name or _is_hub_id(name):
        return name or ""
    return Path(name).resolve().name
