"""The commands of `plastic-peft`: each takes its flags and returns what it prints.

What `--json` prints is for machines; the rest is for people.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Optional

from . import flags
from .faults import check_writable


if TYPE_CHECKING:
    from .report import PlasticityReport


_SHOWN_CLASSES = 20
_NOT_OF_COMPARE = {
    "seed": "pass --seeds",
    "order": "name orders in --methods",
    "target_modules": "name modules in --methods",
    "resume_from_checkpoint": "the same command resumes by itself",
    "push_to_hub": "repeat the best run with plastic-peft train, and push that",
    "hub_model_id": "nothing is pushed",
    "hub_token": "nothing is pushed",
    "hub_private_repo": "nothing is pushed",
}


# --- arguments of the subcommands --------------------------------------------------------------------------------------


@dataclass
class Output:
    """How results are shown."""

    json: bool = field(default=False, metadata={"help": "Print the result as JSON, for machines."})


@dataclass
class MeasureOutput(Output):
    """Where the measurement goes."""

    _argument_group_name = "Where the measurement goes"

    output: str = field(default="plasticity_report.json", metadata={"help": "File of the report."})
    plot: Optional[str] = field(default=None, metadata={"help": "Also draw it, as .png, .svg or .pdf."})


@dataclass
class SelectOutput(Output):
    """Where the selection goes."""

    _argument_group_name = "Where the selection goes"

    output: Optional[str] = field(default=None, metadata={"help": "Also write the selection to this JSON file."})


@dataclass
class Run(Output):
    """How the run is started."""

    _argument_group_name = "How the run is started"

    start_over: bool = field(
        default=False,
        metadata={
            "help": "Remove an earlier run from output_dir, instead of resuming it (--overwrite_output_dir does so too)."
        },
    )


@dataclass
class Comparison(Run):
    """What is compared."""

    _argument_group_name = "What is compared"

    methods: list[str] = field(
        default_factory=lambda: ["highest", "random", "all-linear"],
        metadata={
            "help": "highest, lowest or random plasticity, a role such as attention, all-linear, or module names joined by "
            "commas. The others are compared with the first."
        },
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of training."})
    learning_rates: Optional[list[float]] = field(
        default=None,
        metadata={"help": "Learning rates; each method gets its best on validation. By default --learning_rate."},
    )


@dataclass
class Adapter(Output):
    """Which adapter."""

    adapter: str = field(default="", metadata={"help": "Folder or Hub id of the adapter."})
    base_model: Optional[str] = field(default=None, metadata={"help": "Another base model than the adapter names."})
    token: Optional[str] = field(default=None, metadata={"help": "Token for the Hub; by default the stored login."})

    def load(self) -> Any:
        from .hub import AutoPlasticModelForImageClassification

        _require(self, "adapter")
        return AutoPlasticModelForImageClassification.from_pretrained(
            self.adapter, base_model=self.base_model, token=self.token
        )


@dataclass
class Inference(Adapter):
    """Which adapter, and where it runs."""

    batch_size: int = field(default=32, metadata={"help": "Images per forward pass."})
    device: Optional[str] = field(default=None, metadata={"help": "Such as cuda or cpu; by default a GPU if any."})

    def load(self) -> Any:
        if self.batch_size < 1:
            raise ValueError(f"--batch_size {self.batch_size} must be at least 1.")
        device = _usable_device(self.device)
        return super().load().to(device)


@dataclass
class Evaluation(Inference):
    """What is evaluated."""

    _argument_group_name = "Which adapter"

    output: Optional[str] = field(default=None, metadata={"help": "Also write the result to this JSON file."})


@dataclass
class Prediction(Inference):
    """What is predicted."""

    _argument_group_name = "What is predicted"

    images: list[str] = field(
        default_factory=list,
        metadata={"help": "Images, folders of images, data files, or data sets on the Hub; one or several."},
    )
    split: Optional[str] = field(default=None, metadata={"help": "Only this split; by default all images."})
    dataset_config_name: Optional[str] = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    image_column_name: Optional[str] = field(default=None, metadata={"help": "Column of the images, if not obvious."})
    corrupt_images: Literal["refuse", "skip"] = field(
        default="refuse", metadata={"help": "Stop at images that cannot be decoded, or leave them out."}
    )
    output: Optional[str] = field(default=None, metadata={"help": "Write to this .csv or .json file."})
    top: int = field(default=3, metadata={"help": "How many labels to give per image."})


@dataclass
class Export(Adapter):
    """What is exported."""

    _argument_group_name = "What is exported"

    output_dir: str = field(default="", metadata={"help": "Folder to write to."})
    format: Literal["lora", "merged"] = field(
        default="lora",
        metadata={"help": "A plain LoRA adapter for peft alone, or the model with the adapter merged in."},
    )


@dataclass
class Inspection(Output):
    """What is inspected."""

    _argument_group_name = "What is inspected"

    adapter: str = field(default="", metadata={"help": "Folder or Hub id of the adapter."})
    token: Optional[str] = field(default=None, metadata={"help": "Token for the Hub; by default the stored login."})


# --- subcommands -------------------------------------------------------------------------------------------------------


def measure(argv: Sequence[str], about: flags.About) -> str:
    import torch
    from accelerate import PartialState

    from . import arguments, train
    from .data import load_unlabelled

    model_args, image_args, measurement, output = flags.parse(
        about, argv, arguments.ModelArguments, arguments.ImageArguments, arguments.MeasurementArguments, MeasureOutput
    )
    name = image_args.dataset_name or image_args.train_dir
    if not name or (image_args.dataset_name and image_args.train_dir):
        raise ValueError("Say which images to measure on: either --dataset_name or --train_dir.")
    check_writable(Path(output.output).parent, "--output")
    state = PartialState(cpu=not torch.accelerator.is_available())
    with train.main_first(state):
        images = load_unlabelled(
            name,
            split="train",
            config=image_args.dataset_config_name,
            image_column=image_args.image_column_name,
            corrupt=image_args.corrupt_images,
            **model_args.download_options(),
        )
    images = arguments.at_most(image_args.max_train_samples, images, image_args.split_seed)
    model, processor = train.load_model(model_args)
    model.to(state.device)
    reading = {"corrupt": image_args.corrupt_images, **model_args.download_options()}
    report = train.measure(
        model, images, processor, measurement, source=image_args.source_name, reading=reading, state=state
    )
    if not state.is_main_process:
        return ""
    path = report.save(output.output)
    if output.plot:
        report.plot(output.plot)
    # without source images there is no shift to show
    roles = report.by_role().dropna(axis="columns", how="all")
    if output.json:
        return _json({"report": str(path), **_facts(report), "roles": json.loads(roles.to_json(orient="index"))})
    lines = [roles.to_string(float_format=lambda value: f"{value:.4g}"), ""]
    lines += [f"{report.pairs} pairs ({report.stopped}); written to {path}"]
    return "\n".join(lines + [f"note: {note}" for note in report.notes])


def select(argv: Sequence[str], about: flags.About) -> str:
    from . import arguments
    from .report import PlasticityReport, write_whole

    source, options, output = flags.parse(
        about, argv, arguments.ReportArguments, arguments.SelectionArguments, SelectOutput
    )
    if source.report is None:
        raise ValueError("Say which report to select from: --report plasticity_report.json.")
    report = PlasticityReport.load(source.report)
    selection = report.select(**options.selection_options())
    record = {
        "base_model": report.base_model,
        "parameters": selection.parameters,
        "share": selection.parameters / report.base_parameters,
        "units": list(selection.units),
        "modules": {n: {"score": s, "rank": selection.ranks.get(n)} for n, s in selection.scores.items()},
        "norms": list(selection.norms),
    }
    if output.output:
        write_whole(Path(output.output), json.dumps(record, indent=1))
    if output.json:
        return _json(record)
    share = f"{record['share']:.2%} of {report.base_model}"
    norms = f", with {len(selection.norms)} norms in full" if selection.norms else ""
    return f"{_modules(record)}\n\n{selection.parameters:,} trainable parameters{norms}, without the head: {share}"


def train(argv: Sequence[str], about: flags.About) -> str:
    from . import train as steps

    model_args, data_args, plasticity_args, training_args, run = flags.parse_training(about, argv, Run)
    result = steps.train(model_args, data_args, plasticity_args, training_args, start_over=run.start_over)
    if training_args.process_index != 0:
        return ""
    if run.json:
        return (Path(str(training_args.output_dir)) / steps.RESULTS_NAME).read_text(encoding="utf-8")
    modules = len(result.selection) or "the given"
    lines = [f"Adapted {modules} modules, {result.trainable:,} trainable parameters with the head."]
    names = ["accuracy", "top5_accuracy", "macro_f1", "loss"]
    if len(result.metrics["confusion_matrix"]) <= 5:
        names.remove("top5_accuracy")
    for split, title in (("eval", "validation"), ("test", "test")):
        lines.append(f"{title}: " + ", ".join(f"{name} {result.metrics[f'{split}_{name}']:.4f}" for name in names))
    return "\n".join([*lines, f"The adapter is in {training_args.output_dir}"])


def compare(argv: Sequence[str], about: flags.About) -> str:
    from . import runs

    model_args, data_args, plasticity_args, training_args, comparison = flags.parse_training(
        about, argv, Comparison, _NOT_OF_COMPARE
    )
    table = runs.compare(
        comparison.methods,
        comparison.seeds,
        comparison.learning_rates or [training_args.learning_rate],
        model_args,
        data_args,
        plasticity_args,
        training_args,
        start_over=comparison.start_over,
    )
    if training_args.process_index != 0:
        return ""
    if comparison.json:
        return _json(table)

    def interval(mean: float, half: float | None) -> str:
        return f"{100 * mean:.2f}" + (f" ± {100 * half:.2f}" if half is not None else "")

    width = max(len(record["method"]) for record in table) + 2
    lines = [f"{'method':<{width}}{'parameters':>12}{'rate':>10}{'accuracy %':>18}{'against the first':>20}"]
    for record in table:
        lines.append(
            f"{record['method']:<{width}}{record['trainable_parameters']:>12,}{record['learning_rate']:>10g}"
            f"{interval(record['accuracy'], record['accuracy_half_width']):>18}"
            f"{interval(record['difference'], record['difference_half_width']):>20}"
        )
    where = f"{training_args.output_dir}/{runs.COMPARISON_NAME}"
    return "\n".join([*lines, "", f"Test images, {len(comparison.seeds)} seeds, 95 % t intervals; written to {where}"])


def evaluate(argv: Sequence[str], about: flags.About) -> str:
    from . import arguments
    from . import train as steps
    from .report import write_whole

    evaluation, image_args = flags.parse(about, argv, Evaluation, arguments.EvaluationArguments)
    _require(evaluation, "adapter")
    if evaluation.output:
        check_writable(Path(evaluation.output).parent, "--output")
    images = image_args.load(**({"token": evaluation.token} if evaluation.token else {}))
    result = steps.evaluate(evaluation.load(), images, evaluation.batch_size)
    if evaluation.output:
        write_whole(Path(evaluation.output), _json(result))
    if evaluation.json:
        return _json(result)
    names = [name for name in ("accuracy", "top5_accuracy", "macro_f1") if name in result]
    shown = ", ".join(f"{name} {result[name]:.4f}" for name in names)
    return f"{result['images']} images: {shown}\n\n{_confusion(result['labels'], result['confusion_matrix'])}"


def _confusion(labels: Sequence[str], matrix: Sequence[Sequence[int]]) -> str:
    """A table of the confusions, or the most frequent ones where there are too many classes for a table."""
    if len(labels) <= _SHOWN_CLASSES:
        cell = max(len(str(count)) for row in matrix for count in row) + 2
        cell, width = max(cell, *(min(len(label), 10) + 2 for label in labels)), max(map(len, labels))
        lines = ["Rows: true classes; columns: predicted ones."]
        lines.append(" " * width + "".join(f"{label[:10]:>{cell}}" for label in labels))
        for label, row in zip(labels, matrix, strict=True):
            lines.append(f"{label:<{width}}" + "".join(f"{count:>{cell}}" for count in row))
        return "\n".join(lines)
    wrong = [
        (count, true, predicted)
        for true, row in zip(labels, matrix, strict=True)
        for predicted, count in zip(labels, row, strict=True)
        if count and true != predicted
    ]
    lines = ["Most frequent confusions (--json has the whole matrix):"]
    return "\n".join(
        lines + [f"{count:>6}  {true} taken for {predicted}" for count, true, predicted in sorted(wrong)[:-11:-1]]
    )


def predict(argv: Sequence[str], about: flags.About) -> str:
    from .report import write_whole

    (prediction,) = flags.parse(about, argv, Prediction)
    _require(prediction, "adapter", "images")
    if prediction.top < 1:
        raise ValueError(f"--top {prediction.top} must be at least 1.")
    if prediction.output and Path(prediction.output).suffix not in (".csv", ".json"):
        raise ValueError(f"--output {prediction.output} must end in .csv or .json.")
    if prediction.output:
        check_writable(Path(prediction.output).parent, "--output")
    rows = _predictions(prediction)
    if prediction.output:
        write_whole(Path(prediction.output), _csv(rows) if prediction.output.endswith(".csv") else _json(rows))
    if prediction.json:
        return _json(rows)
    if prediction.output:
        return f"{len(rows)} predictions written to {prediction.output}"
    lines = []
    for row in rows:
        pairs = zip(row["labels"], row["probabilities"], strict=True)
        lines.append(f"{row['file']}: " + ", ".join(f"{label} {probability:.3f}" for label, probability in pairs))
    return "\n".join(lines)


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    ranks = range(1, len(rows[0]["labels"]) + 1)
    writer.writerow(["file", *(f"{kind}_{rank}" for rank in ranks for kind in ("label", "probability"))])
    for row in rows:
        pairs = zip(row["labels"], row["probabilities"], strict=True)
        writer.writerow([row["file"], *(value for pair in pairs for value in pair)])
    return text.getvalue()


def _predictions(prediction: Prediction) -> list[dict[str, Any]]:
    from .data import load_unlabelled
    from .train import predicted_logits

    model = prediction.load()
    sources = [
        load_unlabelled(
            name,
            prediction.split,
            config=prediction.dataset_config_name,
            image_column=prediction.image_column_name,
            corrupt=prediction.corrupt_images,
            token=prediction.token,
        )
        for name in prediction.images
    ]
    labels, top = model.config.id2label, min(prediction.top, len(model.config.id2label))
    rows: list[dict[str, Any]] = []
    for images in sources:
        names = iter(images["file"][:])
        for logits in predicted_logits(model, images, prediction.batch_size):
            best = logits.softmax(-1).topk(top)
            for values, indices in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                found = {"labels": [labels[i] for i in indices], "probabilities": [round(v, 6) for v in values]}
                rows.append({"file": next(names), **found})
    return rows


def _usable_device(name: str | None) -> str:
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--device {name} cannot be used here ({reason}): pass cpu, or leave it out.") from error
    return name


def export(argv: Sequence[str], about: flags.About) -> str:
    from .export import export_lora, export_merged

    (wanted,) = flags.parse(about, argv, Export)
    _require(wanted, "adapter", "output_dir")
    check_writable(Path(wanted.output_dir))
    path = (export_lora if wanted.format == "lora" else export_merged)(wanted.load(), wanted.output_dir)
    return _json({"path": str(path), "format": wanted.format}) if wanted.json else f"Written to {path}"


def inspect(argv: Sequence[str], about: flags.About) -> str:
    (wanted,) = flags.parse(about, argv, Inspection)
    _require(wanted, "adapter")
    record = _inspected(wanted.adapter, wanted.token)
    if wanted.json:
        return _json(record)
    lines = [
        f"base model    {record['base_model']}",
        f"adapter       {record['adapter']}, modules selected by {record['selected_by']}",
        f"trained too   {', '.join(record['modules_to_save']) or 'nothing'}",
    ]
    if "report" in record:
        facts = record["report"]
        lines += [f"measured      {facts['pairs']} pairs, {facts['inputs']} inputs, stopped: {facts['stopped']}", ""]
        lines += [f"role            adapted  of   mean {record['signal']}"]
        for role, entry in record["roles"].items():
            lines.append(f"{role:<15} {entry['adapted']:>7}  {entry['modules']:<4} {entry['score']:.4g}")
    return "\n".join([*lines, "", _modules(record)])


def _modules(record: dict[str, Any]) -> str:
    width = max(map(len, [*record["modules"], "module"]))
    lines = [f"{'module':<{width}}  {'score':>9}  rank"]
    for name, entry in record["modules"].items():
        score = "" if entry["score"] is None else f"{entry['score']:.4g}"
        lines.append(f"{name:<{width}}  {score:>9}  {entry['rank'] or 'full'!s:>4}")
    return "\n".join(lines)


def _inspected(adapter: str, token: str | None = None) -> dict[str, Any]:
    """What an adapter adapts and why, from its JSON files alone."""
    from .hub import CONFIG_NAME, adapter_folder
    from .report import REPORT_NAME, PlasticityReport, default_signal
    from .untrusted import read_json, validate_adapter_config

    folder, _ = adapter_folder(adapter, files=(CONFIG_NAME, REPORT_NAME), token=token)
    if not (folder / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"{adapter} holds no {CONFIG_NAME}: pass the folder or Hub id of an adapter.")
    config = validate_adapter_config(read_json(folder / CONFIG_NAME))
    report = PlasticityReport.load(folder) if (folder / REPORT_NAME).is_file() else None
    signal = config.get("signal") or (default_signal(report.rows) if report is not None else "plasticity")
    lora = config.get("adapter", "lora") == "lora"
    scores = config.get("selected_modules")
    ranks, rank = config.get("rank_pattern") or {}, config.get("r", 8)
    targets = config.get("target_modules") or []
    record: dict[str, Any] = {
        "base_model": config.get("base_model_name_or_path"),
        "adapter": config.get("adapter", "lora"),
        "selected_by": f"{config.get('order', 'highest')} {signal}" if scores else "name",
        "modules_to_save": config.get("modules_to_save") or [],
        "modules": {
            name: {"rank": ranks.get(name, rank) if lora else None, "score": (scores or {}).get(name)}
            for name in (scores or ([targets] if isinstance(targets, str) else sorted(targets)))
        },
    }
    if report is not None:
        record |= {"report": _facts(report), "signal": signal, "roles": _roles(report, signal, record["modules"])}
    return record


def _roles(report: PlasticityReport, signal: str, adapted: Mapping[str, Any]) -> dict[str, Any]:
    """How many modules of each role are adapted, and the role's mean of the signal that selected them."""
    from statistics import fmean

    candidates = report.candidates(signal)
    roles = {}
    for role in dict.fromkeys(candidate.role for candidate in candidates):
        members = [candidate for candidate in candidates if candidate.role == role]
        score = fmean({(c.component, c.block): c.component_score for c in members}.values())
        roles[role] = {
            "adapted": sum(candidate.name in adapted for candidate in members),
            "modules": len(members),
            "score": score,
        }
    return roles


# --- shared ------------------------------------------------------------------------------------------------------------


def _facts(report: PlasticityReport) -> dict[str, Any]:
    names = ("base_model", "base_parameters", "inputs", "pairs", "dropped", "stopped", "confidence", "tolerance")
    return {name: getattr(report, name) for name in names}


def _require(arguments: Any, *names: str) -> None:
    for name in names:
        if not getattr(arguments, name):
            raise ValueError(f"--{name} is needed.")


def _json(value: Any) -> str:
    return json.dumps(value, indent=1)
