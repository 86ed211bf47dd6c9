"""The model card of an adapter: what it was made from, why those modules, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel

from .embedded import NAME, portable_name
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
        dataset: Name of the data set, on the Hub or else.
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
    labels = getattr(base_config, "id2label", None)
    names = [str(labels[index]) for index in sorted(labels)] if labels else []
    title = (repo_id or "plasticity adapter").rpartition("/")[2]
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type=name,
            metric_value=float(value),
        )
        for name, value in (metrics or {}).items()
        if dataset
    ]
    data = ModelCardData(
        base_model=base if base != NAME and _is_repo_id(base) else None,
        datasets=dataset if _is_repo_id(dataset) else None,
        eval_results=results or None,
        library_name="peft",
        license=license,
        metrics=list(metrics) if metrics else None,
        model_name=title if results else None,
        pipeline_tag="image-classification",
        tags=list(dict.fromkeys([*TAGS, *tags])),
    )
    kind = "low-rank adapters" if config.adapter == "lora" else "the weights"
    sections = [
        f"# {title}",
        f"An adapter for `{base or 'an image classifier'}`{f', trained on {dataset}' if dataset else ''}. It holds {kind} of "
        "the modules that a measurement of plasticity selected, and the classification head. Made with `plastic_peft`.",
        _metrics(metrics, dataset),
        _labels(names),
        _plasticity(report),
        _modules(config),
        _usage(repo_id or "user/name", base or "base/model", len(names), config.adapter),
    ]
    body = "\n\n".join(section for section in sections if section)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n", ignore_metadata_errors=True)


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
    lines = [
        "## Plasticity",
        "",
        "The mean rate of change of each component over its blocks; a high one means that the component reacts strongly "
        f"to its inputs. Measured with {report.inputs} inputs on {report.pairs} pairs.",
        "",
        "| component | blocks | parameters | plasticity | lowest | highest |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for role, row in report.by_role().iterrows():
        name = LABELS.get(str(role), str(role))
        lines.append(
            f"| {name} | {int(row.blocks)} | {int(row.parameters):,} | {row['mean']:.4g} | {row.lowest:.4g} | {row.highest:.4g} |"
        )
    return "\n".join([*lines, "", "![Plasticity over depth](plasticity.png)"])


def _modules(config: Any) -> str:
    chosen = config.selected_modules
    targets = config.target_modules
    listed = (
        [f"- `{name}` ({score:.4g})" for name, score in chosen.items()]
        if chosen
        else [f"- `{name}`" for name in ([targets] if isinstance(targets, str) else sorted(targets or ()))]
    )
    saved = ", ".join(f"`{name}`" for name in config.modules_to_save or ())
    rank = f" of rank {config.r}" if config.adapter == "lora" else ""
    head = f"{len(listed)} modules with an adapter{rank}" + (f", and {saved} trained in full" if saved else "")
    return "\n".join(["## Selected modules", "", f"<details><summary>{head}</summary>", "", *listed, "", "</details>"])


def _usage(repo_id: str, base: str, labels: int, adapter: str) -> str:
    build = (
        f'AutoModelForImageClassification.from_pretrained("{base}", num_labels={labels}, ignore_mismatched_sizes=True)'
    )
    imports = (
        "import plastic_peft\nfrom peft import PeftModel\nfrom transformers import AutoModelForImageClassification"
    )
    if base == NAME:
        build = f"load_vit_nano(num_labels={labels})  # the base model comes with plastic_peft"
        imports = "from peft import PeftModel\nfrom plastic_peft import load_vit_nano"
    text = f"""## How to load it

```python
from transformers import pipeline
from plastic_peft import AutoPlasticModelForImageClassification

model = AutoPlasticModelForImageClassification.from_pretrained("{repo_id}")
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


def _is_repo_id(name: str | None) -> bool:
    try:
        validate_repo_id(name or "/")
    except HFValidationError:
        return False
    return True
