"""Several ways to choose modules, compared by real runs at the same number of trainable parameters."""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists
from transformers import TrainingArguments

from .components import BLOCK_ROLES
from .report import REPORT_NAME, PlasticityReport, write_whole
from .selection import ORDERS, Candidate
from .train import RESULTS_NAME, DataArguments, ModelArguments, PlasticityArguments, load_model, measure, train
from .tuner.model import LoraMatch


logger = logging.getLogger(__name__)

COMPARISON_NAME = "comparison.json"


def compare(
    methods: Sequence[str],
    seeds: Sequence[int],
    learning_rates: Sequence[float],
    model_args: ModelArguments,
    data_args: DataArguments,
    plasticity_args: PlasticityArguments,
    training_args: TrainingArguments,
) -> list[dict[str, Any]]:
    """Train with every method, seed and learning rate, and put the results side by side.

    The learning rate of a method is the one with the best mean validation accuracy over seeds; the test accuracy at that
    learning rate is what is compared. Runs lie in folders of their own below the output folder, and those that are
    finished are not repeated, so a comparison resumes like a single run.

    Args:
        methods: `"highest"`, `"lowest"` or `"random"` plasticity; a role such as `"attention"`; `"all-linear"`; or names or
            suffixes of modules joined by commas, such as `"q_proj,v_proj"`. The first is what the others are compared
            with. Where modules are fixed, the rank is the highest that costs no more parameters than the first of the
            plasticity methods spends.
        seeds: Seeds of training.
        learning_rates: Learning rates to choose among.

    Returns:
        One record per method: `method`, `trainable_parameters`, `learning_rate`, `accuracy` (mean over seeds on the test
        images), `accuracy_half_width` (95 % t interval over seeds, `None` for one seed), `difference` to the first method,
        paired by seed, with `difference_half_width`, and `runs`.

    Raises:
        ValueError: If a method is unknown or costs more than the budget at rank 1.
    """
    folder = Path(str(training_args.output_dir))
    main = training_args.process_index == 0
    if not (folder / REPORT_NAME).is_file():
        report = _report(model_args, data_args, plasticity_args, training_args)
        if main:
            report.save(folder / REPORT_NAME)
    report = PlasticityReport.load(folder) if (folder / REPORT_NAME).is_file() else report
    plasticity_args = replace(plasticity_args, report=str(folder / REPORT_NAME))
    ways = {method: way_of(method, report, plasticity_args) for method in methods}

    records: list[dict[str, Any]] = []
    for method, way in ways.items():
        runs = []
        for rate in learning_rates:
            for seed in seeds:
                run = copy.deepcopy(training_args)
                run.output_dir = str(folder / method.replace(",", "+") / f"lr{rate:g}-seed{seed}")
                run.learning_rate, run.seed = rate, seed
                runs.append({"learning_rate": rate, "seed": seed, **_result(run, model_args, data_args, way)})
        best = max(learning_rates, key=lambda rate: fmean(r["validation"] for r in runs if r["learning_rate"] == rate))
        chosen = {run["seed"]: run["test"] for run in runs if run["learning_rate"] == best}
        records.append({"method": method, "learning_rate": best, "chosen": chosen, "runs": runs})
    first = records[0]["chosen"]
    table = [_summary(record, first) for record in records]
    if main:
        write_whole(folder / COMPARISON_NAME, json.dumps(table, indent=1))
    return table


def way_of(method: str, report: PlasticityReport, arguments: PlasticityArguments) -> PlasticityArguments:
    """The arguments under which a method trains no more parameters than selection by plasticity; see `compare`."""
    selection = report.select(**arguments.selection_options())
    if method in ORDERS:
        return arguments if method == arguments.order else replace(arguments, order=method)  # type: ignore[arg-type]
    if arguments.adapter != "lora":
        raise ValueError(f"Method {method!r} fixes the modules and fits the rank, which adapter='full' does not have.")
    fixed = _fixed(method, report.candidates())
    cost = sum(candidate.cost_per_rank for candidate in fixed)
    rank = selection.parameters // cost
    if rank < 1:
        raise ValueError(
            f"Method {method!r} costs {cost:,} parameters at rank 1, more than the {selection.parameters:,} that selection by "
            "plasticity spends: raise the budget."
        )
    alpha = max(1, round(arguments.lora_alpha * rank / arguments.r))
    names = [candidate.name for candidate in fixed]
    return replace(arguments, report=None, target_modules=names, r=rank, lora_alpha=alpha)


def _fixed(method: str, candidates: Sequence[Candidate]) -> list[Candidate]:
    able = [candidate for candidate in candidates if candidate.cost_per_rank > 0]
    if method == "all-linear":
        return able
    if method in BLOCK_ROLES:
        found = [candidate for candidate in able if candidate.role == method]
    else:
        match = LoraMatch(method.split(","))
        found = [candidate for candidate in able if check_target_module_exists(match, candidate.name)]
    if not found:
        raise ValueError(
            f"Method {method!r} is unknown: choose {', '.join(ORDERS)}, all-linear, a role ({', '.join(BLOCK_ROLES)}), or names of "
            f"modules that can take LoRA, such as {able[0].name.rsplit('.', 1)[-1]!r}."
        )
    return found


def _report(
    model_args: ModelArguments,
    data_args: DataArguments,
    plasticity_args: PlasticityArguments,
    training_args: TrainingArguments,
) -> PlasticityReport:
    if plasticity_args.report is not None:
        return PlasticityReport.load(plasticity_args.report)
    with training_args.main_process_first(local=False):
        data = data_args.load()
    model, processor = load_model(model_args, data["train"].features["label"].names)
    model.to(training_args.device)
    state = training_args.distributed_state if training_args.world_size > 1 else None
    return measure(model, data["train"], processor, plasticity_args, source=data_args.source_name, state=state)


def _result(
    run: TrainingArguments, model_args: ModelArguments, data_args: DataArguments, way: PlasticityArguments
) -> dict[str, Any]:
    done = Path(str(run.output_dir)) / RESULTS_NAME
    if not done.is_file():
        logger.info("Training %s.", run.output_dir)
        result = train(model_args, data_args, way, run)
        metrics, trainable = result.metrics, result.trainable
    else:
        record = json.loads(done.read_text(encoding="utf-8"))
        metrics, trainable = record["metrics"], record["trainable_parameters"]
    return {
        "validation": metrics["eval_accuracy"],
        "test": metrics["test_accuracy"],
        "test_macro_f1": metrics["test_macro_f1"],
        "trainable_parameters": trainable,
    }


def _summary(record: dict[str, Any], first: dict[int, float]) -> dict[str, Any]:
    chosen = record["chosen"]
    differences = [accuracy - first[seed] for seed, accuracy in chosen.items()]
    return {
        "method": record["method"],
        "trainable_parameters": record["runs"][0]["trainable_parameters"],
        "learning_rate": record["learning_rate"],
        "accuracy": fmean(chosen.values()),
        "accuracy_half_width": half_width(list(chosen.values())),
        "difference": fmean(differences),
        "difference_half_width": half_width(differences),
        "runs": record["runs"],
    }


def half_width(values: Sequence[float], confidence: float = 0.95) -> float | None:
    """Half-width of the t interval of the mean, `None` for fewer than two values."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    return float(t.ppf((1 + confidence) / 2, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
