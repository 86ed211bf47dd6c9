"""The command `plastic-peft`: measure, select, train, compare, predict, export, inspect.

Results go to standard output, everything else to standard error. Exit codes: 0 for success, 2 for what the caller can
mend (a wrong flag, file or image; one line says what), 1 for anything unexpected, with a traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Optional, get_origin

from .faults import explained


if TYPE_CHECKING:
    from .report import PlasticityReport


PROGRAM = "plastic-peft"
_CONFIG_SUFFIXES = (".yaml", ".yml", ".json")


# --- arguments of the subcommands --------------------------------------------------------------------------------------


@dataclass
class Output:
    """How results are shown."""

    json: bool = field(default=False, metadata={"help": "Print the result as JSON, for machines."})


@dataclass
class MeasureOutput(Output):
    """Where the measurement goes."""

    output: str = field(default="plasticity_report.json", metadata={"help": "File of the report."})
    plot: Optional[str] = field(default=None, metadata={"help": "Also draw it, as .png, .svg or .pdf."})


@dataclass
class SelectOutput(Output):
    """Where the selection goes."""

    output: Optional[str] = field(default=None, metadata={"help": "Also write the selection to this JSON file."})


@dataclass
class Run(Output):
    """How the run is started."""

    start_over: bool = field(
        default=False, metadata={"help": "Remove an earlier run from output_dir, instead of resuming it."}
    )


@dataclass
class Comparison(Output):
    """What is compared."""

    methods: list[str] = field(
        default_factory=lambda: ["highest", "random", "all-linear"],
        metadata={
            "help": "highest, lowest or random plasticity, a role such as attention, all-linear, or module names joined by "
            "commas. The others are compared with the first."
        },
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of training."})
    learning_rates: list[float] = field(
        default_factory=lambda: [1e-3], metadata={"help": "Learning rates; each method gets its best on validation."}
    )


@dataclass
class Prediction(Output):
    """What is predicted."""

    adapter: str = field(default="", metadata={"help": "Folder or Hub id of the adapter."})
    images: str = field(default="", metadata={"help": "An image, a folder of images, a data file, or a data set."})
    base_model: Optional[str] = field(default=None, metadata={"help": "Another base model than the adapter names."})
    output: Optional[str] = field(default=None, metadata={"help": "Write to this .csv or .json file."})
    top: int = field(default=3, metadata={"help": "How many labels to give per image."})
    batch_size: int = field(default=32, metadata={"help": "Images per forward pass."})
    device: Optional[str] = field(default=None, metadata={"help": "Such as cuda or cpu; by default a GPU if any."})


@dataclass
class Export(Output):
    """What is exported."""

    adapter: str = field(default="", metadata={"help": "Folder or Hub id of the adapter."})
    output_dir: str = field(default="", metadata={"help": "Folder to write to."})
    format: Literal["lora", "merged"] = field(
        default="lora",
        metadata={"help": "A plain LoRA adapter for peft alone, or the model with the adapter merged in."},
    )
    base_model: Optional[str] = field(default=None, metadata={"help": "Another base model than the adapter names."})


@dataclass
class Inspection(Output):
    """What is inspected."""

    adapter: str = field(default="", metadata={"help": "Folder or Hub id of the adapter."})


# --- subcommands -------------------------------------------------------------------------------------------------------


def measure(argv: Sequence[str], parser: argparse.ArgumentParser) -> str:
    import torch
    from accelerate import PartialState

    from . import train
    from .data import load_unlabelled

    model_args, data_args, plasticity_args, output = _parse(
        parser, argv, train.ModelArguments, train.DataArguments, train.PlasticityArguments, MeasureOutput
    )
    name = data_args.dataset_name or data_args.train_dir
    if not name:
        raise ValueError("Say which images to measure on: --dataset_name or --train_dir.")
    _check_writable("--output", Path(output.output).parent)
    state = PartialState(cpu=not torch.accelerator.is_available())
    with state.main_process_first():
        images = load_unlabelled(name, split="train")
    model, processor = train.load_model(model_args)
    model.to(state.device)
    report = train.measure(model, images, processor, plasticity_args, source=data_args.source_name, state=state)
    if not state.is_main_process:
        return ""
    path = report.save(output.output)
    if output.plot:
        report.plot(output.plot)
    roles = report.by_role()
    if output.json:
        return _json({"report": str(path), **_facts(report), "roles": json.loads(roles.to_json(orient="index"))})
    lines = [roles.to_string(float_format=lambda value: f"{value:.4g}"), ""]
    lines += [f"{report.pairs} pairs ({report.stopped}); written to {path}"]
    return "\n".join(lines + [f"note: {note}" for note in report.notes])


def select(argv: Sequence[str], parser: argparse.ArgumentParser) -> str:
    from . import train
    from .report import PlasticityReport, write_whole

    plasticity_args, output = _parse(parser, argv, train.PlasticityArguments, SelectOutput)
    if plasticity_args.report is None:
        raise ValueError("Say which report to select from: --report plasticity_report.json.")
    report = PlasticityReport.load(plasticity_args.report)
    selection = report.select(**plasticity_args.selection_options())
    record = {
        "base_model": report.base_model,
        "parameters": selection.parameters,
        "share": selection.parameters / report.base_parameters,
        "units": list(selection.units),
        "modules": {n: {"score": s, "rank": selection.ranks.get(n)} for n, s in selection.scores.items()},
    }
    if output.output:
        write_whole(Path(output.output), json.dumps(record, indent=1))
    if output.json:
        return _json(record)
    share = f"{record['share']:.2%} of {report.base_model}"
    return f"{_modules(record)}\n\n{selection.parameters:,} trainable parameters without the head, {share}"


def train(argv: Sequence[str], parser: argparse.ArgumentParser) -> str:
    from . import train as steps

    model_args, data_args, plasticity_args, training_args, run = _parse_training(parser, argv, Run)
    result = steps.train(model_args, data_args, plasticity_args, training_args, start_over=run.start_over)
    if training_args.process_index != 0:
        return ""
    if run.json:
        return (Path(str(training_args.output_dir)) / steps.RESULTS_NAME).read_text(encoding="utf-8")
    modules = len(result.selection) or "the given"
    lines = [f"Adapted {modules} modules, {result.trainable:,} trainable parameters with the head."]
    for split, title in (("eval", "validation"), ("test", "test")):
        names = ("accuracy", "top5_accuracy", "macro_f1", "loss")
        lines.append(f"{title}: " + ", ".join(f"{name} {result.metrics[f'{split}_{name}']:.4f}" for name in names))
    return "\n".join([*lines, f"The adapter is in {training_args.output_dir}"])


def compare(argv: Sequence[str], parser: argparse.ArgumentParser) -> str:
    from . import runs

    model_args, data_args, plasticity_args, training_args, what = _parse_training(parser, argv, Comparison)
    _check_writable("--output_dir", Path(training_args.output_dir))
    table = runs.compare(
        what.methods, what.seeds, what.learning_rates, model_args, data_args, plasticity_args, training_args
    )
    if training_args.process_index != 0:
        return ""
    if what.json:
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
    return "\n".join([*lines, "", f"Test images, {len(what.seeds)} seeds, 95 % t intervals; written to {where}"])


def predict(argv: Sequence[str], parser: argparse.ArgumentParser) -> str:
    from .report import write_whole

    (what,) = _parse(parser, argv, Prediction)
    _require(what, "adapter", "images")
    if what.output and Path(what.output).suffix not in (".csv", ".json"):
        raise ValueError(f"--output {what.output} must end in .csv or .json.")
    if what.output:
        _check_writable("--output", Path(what.output).parent)
    rows = _predictions(what)
    if what.output:
        write_whole(Path(what.output), _csv(rows) if what.output.endswith(".csv") else _json(rows))
    if what.json:
        return _json(rows)
    if what.output:
        return f"{len(rows)} predictions written to {what.output}"
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


def _predictions(what: Prediction) -> list[dict[str, Any]]:
    import torch

    from .data import collate, load_unlabelled, with_pixels
    from .hub import AutoPlasticModelForImageClassification

    model: Any = AutoPlasticModelForImageClassification.from_pretrained(what.adapter, base_model=what.base_model)
    images = load_unlabelled(what.images)
    device = what.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    labels, top = model.config.id2label, min(what.top, len(model.config.id2label))
    pixels = with_pixels(images.select_columns(["image"]), model.image_processor)
    rows = []
    names = images["file"][:]
    for start in range(0, len(images), what.batch_size):
        batch = collate([pixels[i] for i in range(start, min(start + what.batch_size, len(images)))])
        with torch.inference_mode():
            best = model(batch["pixel_values"].to(device)).logits.float().softmax(-1).topk(top)
        for offset, (values, indices) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            found = {"labels": [labels[i] for i in indices], "probabilities": [round(v, 6) for v in values]}
            rows.append({"file": names[start + offset], **found})
    return rows


def export(argv: Sequence[str], parser: argparse.ArgumentParser) -> str:
    from .export import export_lora, export_merged
    from .hub import AutoPlasticModelForImageClassification

    (what,) = _parse(parser, argv, Export)
    _require(what, "adapter", "output_dir")
    _check_writable("--output_dir", Path(what.output_dir))
    model = AutoPlasticModelForImageClassification.from_pretrained(what.adapter, base_model=what.base_model)
    path = (export_lora if what.format == "lora" else export_merged)(model, what.output_dir)
    return _json({"path": str(path), "format": what.format}) if what.json else f"Written to {path}"


def inspect(argv: Sequence[str], parser: argparse.ArgumentParser) -> str:
    (what,) = _parse(parser, argv, Inspection)
    _require(what, "adapter")
    record = _inspected(what.adapter)
    if what.json:
        return _json(record)
    lines = [
        f"base model    {record['base_model']}",
        f"adapter       {record['adapter']}, modules selected by {record['selected_by']}",
        f"trained too   {', '.join(record['modules_to_save']) or 'nothing'}",
    ]
    if "report" in record:
        facts = record["report"]
        lines += [f"measured      {facts['pairs']} pairs, {facts['inputs']} inputs, stopped: {facts['stopped']}", ""]
        lines += ["role            adapted  of   mean score"]
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


def _inspected(adapter: str) -> dict[str, Any]:
    """What an adapter adapts and why, from its JSON files alone."""
    from .components import BLOCK_ROLES
    from .report import REPORT_NAME, PlasticityReport
    from .untrusted import read_json, validate_adapter_config

    files = {name: _adapter_file(adapter, name) for name in ("adapter_config.json", REPORT_NAME)}
    path = files["adapter_config.json"]
    if path is None:
        raise FileNotFoundError(f"{adapter} holds no adapter_config.json: pass the folder or Hub id of an adapter.")
    config = validate_adapter_config(read_json(path))
    lora = config.get("adapter", "lora") == "lora"
    scores = config.get("selected_modules")
    ranks, rank = config.get("rank_pattern") or {}, config.get("r", 8)
    targets = config.get("target_modules") or []
    record: dict[str, Any] = {
        "base_model": config.get("base_model_name_or_path"),
        "adapter": config.get("adapter", "lora"),
        "selected_by": f"{config.get('order', 'highest')} {config.get('signal') or 'plasticity'}" if scores else "name",
        "modules_to_save": config.get("modules_to_save") or [],
        "modules": {
            name: {"rank": ranks.get(name, rank) if lora else None, "score": (scores or {}).get(name)}
            for name in (scores or ([targets] if isinstance(targets, str) else sorted(targets)))
        },
    }
    saved = files[REPORT_NAME]
    if saved is not None:
        report = PlasticityReport.load(saved)
        record["report"] = _facts(report)
        record["roles"] = {}
        for role in BLOCK_ROLES:
            rows = report.select_rows("module", role)
            if rows:
                components = [row.mean for row in report.select_rows("component", role)]
                adapted = sum(row.name in record["modules"] for row in rows)
                score = sum(components) / len(components)
                record["roles"][role] = {"adapted": adapted, "modules": len(rows), "score": score}
    return record


# --- shared ------------------------------------------------------------------------------------------------------------


def _facts(report: PlasticityReport) -> dict[str, Any]:
    names = ("base_model", "base_parameters", "inputs", "pairs", "dropped", "stopped", "confidence", "tolerance")
    return {name: getattr(report, name) for name in names}


def _adapter_file(adapter: str, name: str) -> Path | None:
    folder = Path(adapter)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(adapter, name))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(f"{adapter} is neither a folder nor an id on the Hub: {reason}") from None
    except EntryNotFoundError:
        return None
    except HfHubHTTPError as error:
        raise FileNotFoundError(f"{adapter} cannot be had from the Hub: {str(error).splitlines()[0]}") from None


def _require(arguments: Any, *names: str) -> None:
    for name in names:
        if not getattr(arguments, name):
            raise ValueError(f"--{name} is needed.")


def _check_writable(flag: str, folder: Path) -> None:
    """Fail before hours of work, not after them."""
    folder = folder.absolute()
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        what = "read-only" if existing.is_dir() else "no folder"
        raise OSError(f"{folder} cannot be written, as {existing} is {what}: choose another place with {flag}.")


def _json(value: Any) -> str:
    return json.dumps(value, indent=1)


def _parse_training(parser: argparse.ArgumentParser, argv: Sequence[str], extra: type) -> tuple[Any, ...]:
    from transformers import TrainingArguments

    from . import train as steps

    return _parse(
        parser,
        argv,
        steps.ModelArguments,
        steps.DataArguments,
        steps.PlasticityArguments,
        TrainingArguments,
        extra,
        defaults=steps.TRAINING_DEFAULTS,
    )


def _parse(
    parser: argparse.ArgumentParser, argv: Sequence[str], *kinds: type, defaults: dict[str, Any] | None = None
) -> tuple[Any, ...]:
    """Dataclasses from flags, and from a YAML or JSON file as the first argument, over which flags win."""
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            _fail(message, f"{parser.prog} --help")

    formatter = type("Help", (argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter), {})
    # a dataclass's docstring is the title of its flags in --help
    for kind in kinds:
        if kind.__module__.startswith("plastic_peft"):
            kind._argument_group_name = (kind.__doc__ or "").strip().rstrip(".")  # type: ignore[attr-defined]
    full = Parser(
        list(kinds),  # type: ignore[arg-type]
        prog=parser.prog,
        usage=f"{parser.prog} [config.yaml] [--flag value ...]",
        description=parser.description,
        epilog=parser.epilog,
        formatter_class=formatter,
        allow_abbrev=False,
    )
    for action in full._actions:
        # transformers 4 has flags of type dict, which reads no text
        if get_origin(action.type) is dict:
            action.type = json.loads
    if defaults:
        full.set_defaults(**defaults)
        # the many flags of TrainingArguments are in the general group: show it last
        full._optionals.title = "How it is trained (transformers.TrainingArguments)"
        full._action_groups.append(full._action_groups.pop(full._action_groups.index(full._optionals)))
    given = list(argv)
    if given and not given[0].startswith("-"):
        given = [*_config_flags(Path(given[0])), *given[1:]]
    namespace, unknown = full.parse_known_args(given)
    if unknown:
        from .report import nearest

        flag = unknown[0].partition("=")[0]
        known = [option for action in full._actions for option in action.option_strings]
        full.error(f"{flag} is no flag of {parser.prog}.{nearest(flag, known)}")
    del namespace
    return tuple(full.parse_args_into_dataclasses(given, look_for_args_file=False))


def _config_flags(path: Path) -> list[str]:
    if path.suffix not in _CONFIG_SUFFIXES:
        raise ValueError(
            f"{path} is no config file: its name must end in {', '.join(_CONFIG_SUFFIXES)}; the rest are flags."
        )
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no valid YAML or JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold flags with their values, such as 'learning_rate: 0.001'.")
    flags = []
    for key, value in content.items():
        if value is None:
            continue
        flags.append(f"--{key}")
        if isinstance(value, dict):
            flags.append(json.dumps(value))
        else:
            flags += [str(entry) for entry in (value if isinstance(value, list) else [value])]
    return flags


def _fail(message: str, advice: str = "") -> NoReturn:
    line = " ".join(message.split())
    print(f"{PROGRAM}: {line}" + (f" (see {advice})" if advice else ""), file=sys.stderr)
    raise SystemExit(2)


@dataclass(frozen=True)
class _Command:
    run: Callable[[Sequence[str], argparse.ArgumentParser], str]
    summary: str
    examples: str


COMMANDS = {
    "measure": _Command(
        measure,
        "measure the plasticity of every component of a model on your images",
        """  plastic-peft measure --model_name_or_path google/vit-base-patch16-224 --train_dir photos/ --plot plasticity.png
  plastic-peft measure --dataset_name digits --max_pairs 256 --json
  accelerate launch --num_processes 4 -m plastic_peft measure --train_dir photos/     # each process takes its share""",
    ),
    "select": _Command(
        select,
        "choose modules and ranks from a report; needs neither model nor images",
        """  plastic-peft select --report plasticity_report.json --budget 0.01
  plastic-peft select --report plasticity_report.json --adapter full --top_k 1 --json
  plastic-peft select --report plasticity_report.json --budget 200000 --granularity module --rank_allocation proportional""",
    ),
    "train": _Command(
        train,
        "measure or reuse a report, fine-tune the selected modules, evaluate, save; the same command resumes",
        """  plastic-peft train --dataset_name digits --output_dir runs/digits
  plastic-peft train --model_name_or_path google/vit-base-patch16-224 --train_dir photos/train --validation_dir photos/val \\
      --budget 0.01 --learning_rate 1e-3 --num_train_epochs 5 --output_dir runs/photos --push_to_hub
  plastic-peft train config.yaml --learning_rate 5e-4        # flags win over the file
  accelerate launch --num_processes 2 -m plastic_peft train config.yaml

Flags after the first groups are those of transformers.TrainingArguments.""",
    ),
    "compare": _Command(
        compare,
        "train with several selections at the same number of parameters, over seeds and learning rates",
        """  plastic-peft compare --dataset_name digits --output_dir runs/compare --budget 20000 \\
      --methods highest lowest random q_proj,v_proj all-linear --seeds 0 1 2 --learning_rates 1e-3 3e-3""",
    ),
    "predict": _Command(
        predict,
        "labels and probabilities for images",
        """  plastic-peft predict --adapter runs/photos --images new_photos/ --output labels.csv
  plastic-peft predict --adapter user/adapter --images cat.jpg --top 1 --json""",
    ),
    "export": _Command(
        export,
        "a plain LoRA adapter that peft loads alone, or a merged model that transformers loads alone",
        """  plastic-peft export --adapter runs/photos --output_dir plain_lora
  plastic-peft export --adapter runs/photos --output_dir merged --format merged""",
    ),
    "inspect": _Command(
        inspect,
        "what an adapter adapts, and why; reads its JSON files only",
        """  plastic-peft inspect --adapter runs/photos
  plastic-peft inspect --adapter user/adapter --json""",
    ),
}


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    return f"""usage: {PROGRAM} COMMAND [config.yaml] [--flag value ...]

Fine-tune vision transformers where a measurement on your images says that it pays.

commands:
{lines}

A day's work:
  plastic-peft measure --model_name_or_path google/vit-base-patch16-224 --train_dir photos/
  plastic-peft select  --report plasticity_report.json --budget 0.01
  plastic-peft train   --report plasticity_report.json --train_dir photos/ --budget 0.01 --output_dir runs/photos \\
                       --model_name_or_path google/vit-base-patch16-224
  plastic-peft predict --adapter runs/photos --images new_photos/ --output labels.csv

`{PROGRAM} COMMAND --help` explains the flags of a command. Any command takes a YAML or JSON file of flags as its first
argument. Exit codes: 0 success, 2 something to mend in the call or the data, 1 anything unexpected."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    Args:
        argv: Arguments without the program's name, by default those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from . import __version__

        print(__version__)
        return 0
    command = COMMANDS.get(arguments[0])
    try:
        if command is None:
            _fail(f"{arguments[0]!r} is no command: choose {', '.join(COMMANDS)}.", f"{PROGRAM} --help")
        parser = argparse.ArgumentParser(
            prog=f"{PROGRAM} {arguments[0]}",
            description=f"{command.summary[0].upper()}{command.summary[1:]}.",
            epilog=f"examples:\n{command.examples}",
        )
        logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
        logging.getLogger("plastic_peft").setLevel(logging.INFO)
        helping = "-h" in arguments or "--help" in arguments
        # trainers and progress bars print too, and would get between the results
        with explained(), contextlib.nullcontext() if helping else contextlib.redirect_stdout(sys.stderr):
            result = command.run(arguments[1:], parser)
        if result:
            print(result, flush=True)
    except BrokenPipeError:
        # the reader, such as head, has seen enough; Python would complain again when it closes standard output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as stop:
        return int(stop.code or 0) if not isinstance(stop.code, str) else 2
    except KeyboardInterrupt:
        resumes = "; the same command resumes" if arguments[0] in ("train", "compare") else ""
        print(f"{PROGRAM}: interrupted{resumes}", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        if os.environ.get("PLASTIC_PEFT_DEBUG"):
            traceback.print_exc()
        with contextlib.suppress(SystemExit):
            _fail(str(error))
        return 2
    except Exception:
        traceback.print_exc()
        return 1
    return 0
