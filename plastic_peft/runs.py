"""Several ways to choose modules, compared by real runs at the same number of trainable parameters."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists
from transformers import TrainingArguments

from .arguments import DataArguments, ModelArguments, PlasticityArguments
from .components import BLOCK_ROLES
from .data import digests
from .report import REPORT_NAME, PlasticityReport, write_whole
from .run_folder import RESULTS_NAME, RUN_NAME, check_note, check_run, given_report, open_run, report_of_run, reserved
from .selection import ORDERS, Candidate
from .train import check_training, load_model, measure_run, run_note, train
from .tuner.settle import LoraMatch


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
    *,
    start_over: bool = False,
) -> list[dict[str, Any]]:
    """Train with every method, seed and learning rate, and put the results side by side.

    The learning rate of a method is the one with the best mean validation accuracy over seeds; the test accuracy at that
    learning rate is what is compared. Runs lie in folders of their own below the output folder, and those that are
    finished are not repeated, so a comparison resumes like a single run, and methods, seeds and learning rates can be added.

    Args:
        methods: `"highest"`, `"lowest"` or `"random"` plasticity; a role such as `"attention"`; `"all-linear"`; or names or
            suffixes of modules joined by commas, such as `"q_proj,v_proj"`. The first is what the others are compared
            with. Where modules are fixed, the rank is the highest that costs no more parameters than the first of the
            plasticity methods spends.
        seeds: Seeds of training.
        learning_rates: Learning rates to choose among.
        start_over: Remove an earlier comparison from the output folder first.

    Returns:
        One record per method: `method`, `trainable_parameters`, `learning_rate`, `accuracy` (mean over seeds on the test
        images), `accuracy_half_width` (95 % t interval over seeds, `None` for one seed), `difference` to the first method,
        paired by seed, with `difference_half_width`, and `runs`.

    Raises:
        ValueError: If a method is unknown or costs more than the budget at rank 1, the output folder holds runs with other
            arguments, or as `train` does.
        OSError: As `train` does.
    """
    check_training(training_args)
    folder = Path(str(training_args.output_dir))
    main = training_args.process_index == 0
    with reserved(folder) if main else contextlib.nullcontext():
        report = _report(folder, model_args, data_args, plasticity_args, training_args, start_over)
        plasticity_args = replace(plasticity_args, report=str(folder / REPORT_NAME))
        ways = {method: way_of(method, report, plasticity_args) for method in methods}
        table = _compared(ways, seeds, learning_rates, model_args, data_args, training_args)
        if main:
            write_whole(folder / COMPARISON_NAME, json.dumps(table, indent=1))
    return table


def _compared(
    ways: dict[str, PlasticityArguments],
    seeds: Sequence[int],
    learning_rates: Sequence[float],
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for method, way in ways.items():
        runs = []
        for rate in learning_rates:
            for seed in seeds:
                run = copy.deepcopy(training_args)
                run.output_dir = str(_run_folder(training_args, method, rate, seed))
                run.learning_rate, run.seed = rate, seed
                runs.append({"learning_rate": rate, "seed": seed, **_result(run, model_args, data_args, way)})
        best = max(learning_rates, key=lambda rate: fmean(r["validation"] for r in runs if r["learning_rate"] == rate))
        chosen = {run["seed"]: run["test"] for run in runs if run["learning_rate"] == best}
        records.append({"method": method, "learning_rate": best, "chosen": chosen, "runs": runs})
    first = records[0]["chosen"]
    return [_summary(record, first) for record in records]


def _run_folder(training_args: TrainingArguments, method: str, rate: float, seed: int) -> Path:
    return Path(str(training_args.output_dir)) / method.replace(",", "+") / f"lr{rate:g}-seed{seed}"


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
    amounts = dict.fromkeys(("budget", "top_k", "fraction", "threshold", "train_norms"))
    return replace(arguments, report=None, target_modules=names, r=rank, lora_alpha=alpha, **amounts)  # type: ignore[arg-type]


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
    folder: Path,
    model_args: ModelArguments,
    data_args: DataArguments,
    plasticity_args: PlasticityArguments,
    training_args: TrainingArguments,
    start_over: bool,
) -> PlasticityReport:
    """The report that all methods select by: that of the folder's comparison if there is one, the given or a measured one."""
    main = training_args.process_index == 0
    with training_args.main_process_first(local=False):
        noted = run_note(model_args, data_args, plasticity_args, training_args)
        # these are what a comparison runs through, each run with a note of its own
        noted = {name: value for name, value in noted.items() if name not in ("seed", "learning_rate")}
        if main and not start_over:
            check_run(folder, noted, plasticity_args.report)
        given = given_report(folder, plasticity_args.report, start_over and main)
        data = data_args.load(**model_args.download_options())
        if main:
            if start_over:
                for run in folder.glob(f"*/*/{RUN_NAME}"):
                    shutil.rmtree(run.parent)
                (folder / COMPARISON_NAME).unlink(missing_ok=True)
            open_run(folder, noted, digests(data), plasticity_args.report, start_over=start_over)

    def measured() -> PlasticityReport:
        model, processor = load_model(model_args, data["train"].features["label"].names)
        model.to(training_args.device)
        return measure_run(model, data["train"], processor, plasticity_args, data_args, model_args, training_args)

    return report_of_run(folder, given, measured, main)


def _result(
    run: TrainingArguments, model_args: ModelArguments, data_args: DataArguments, way: PlasticityArguments
) -> dict[str, Any]:
    folder = Path(str(run.output_dir))
    if (folder / RESULTS_NAME).is_file():
        check_note(folder, run_note(model_args, data_args, way, run))
        record = json.loads((folder / RESULTS_NAME).read_text(encoding="utf-8"))
        metrics, trainable = record["metrics"], record["trainable_parameters"]
    else:
        logger.info("Training %s.", run.output_dir)
        result = train(model_args, data_args, way, run)
        metrics, trainable = result.metrics, result.trainable
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
