"""From flags, and from a file of them, to the dataclasses of a command."""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn


if TYPE_CHECKING:
    from transformers import HfArgumentParser, TrainingArguments


About = Mapping[str, str]
"""What `--help` says about a command: its `prog`, `description` and `epilog`."""

_CONFIG_SUFFIXES = (".yaml", ".yml", ".json")
# what transformers' scripts call it
_ALIASES = {"overwrite_output_dir": "start_over"}

# training arguments of which one value only is honoured, and why
_FIXED: dict[str, tuple[Any, str]] = {
    "do_train": (True, "to evaluate an adapter without training it, use plastic-peft evaluate"),
    "do_eval": (True, "validation images are always evaluated on"),
    "do_predict": (True, "test images are always evaluated on"),
    "remove_unused_columns": (False, "the trainer would drop the images"),
    "label_names": (None, "the labels are in the column that --label_column_name says"),
    "prediction_loss_only": (False, "accuracies need the predictions"),
    "batch_eval_metrics": (False, "metrics are those of all images together"),
    "eval_do_concat_batches": (True, "metrics are those of all images together"),
    "hub_strategy": ("every_save", "the adapter is pushed once, when it is whole"),
    "hub_always_push": (False, "the adapter is pushed once, when it is whole"),
    "hub_revision": (None, "the adapter is pushed to the main branch"),
}


def parse_training(
    about: About, argv: Sequence[str], kind: type, refused: Mapping[str, str] | None = None
) -> tuple[Any, ...]:
    """Model, data, plasticity and training arguments, and one of `kind`, which says how the run is started.

    Args:
        refused: Flags that this command does not take, and why.
    """
    from . import arguments

    always = {name: value for name, (value, _) in _FIXED.items() if name.startswith("do_")}
    parsed = parse(
        about,
        argv,
        kind,
        arguments.ModelArguments,
        arguments.DataArguments,
        arguments.PlasticityArguments,
        arguments.TrainingFlags,
        defaults={**arguments.TRAINING_DEFAULTS, **always, "output_dir": "", "learning_rate": None},
        refused=refused,
    )
    run, *others, training_args = parsed
    if training_args.learning_rate is None:
        (adapter,) = (other.adapter for other in others if isinstance(other, arguments.PlasticityArguments))
        training_args.learning_rate = arguments.LEARNING_RATES[adapter]
    _check_fixed(training_args)
    if not training_args.output_dir:
        raise ValueError("--output_dir is needed: the folder of the run, which the same command resumes.")
    return (*others, training_args, run)


def _check_fixed(arguments: TrainingArguments) -> None:
    for name, (value, why) in _FIXED.items():
        if getattr(arguments, name, value) != value:
            raise ValueError(f"--{name} can only be {value} here: {why}.")


def parse(
    about: About,
    argv: Sequence[str],
    *kinds: type,
    defaults: Mapping[str, Any] | None = None,
    refused: Mapping[str, str] | None = None,
) -> tuple[Any, ...]:
    """Dataclasses from flags, and from a YAML or JSON file as the first argument, over which flags win."""
    given = list(argv)
    if given and not given[0].startswith("-"):
        given = [*_config_flags(Path(given[0])), *given[1:]]
    given = [_renamed(argument) for argument in given]
    for flag in filter(None, map(_flag_name, given)):
        if refused and flag in refused:
            raise ValueError(f"--{flag} is no flag of {about['prog']}: {refused[flag]}.")
    parser = _parser(about, kinds)
    parser.set_defaults(**(defaults or {}))
    *parsed, unknown = parser.parse_args_into_dataclasses(
        given, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        _fail_on_unknown(about["prog"], unknown, [f.name for kind in kinds for f in fields(kind)])
    return tuple(parsed)


def _renamed(argument: str) -> str:
    name, equals, value = argument.partition("=")
    alias = _ALIASES.get(_flag_name(name))
    return f"--{alias}{equals}{value}" if alias else argument


def _flag_name(argument: str) -> str:
    """`train_dir` of `--train-dir=photos`, and nothing of what is no flag."""
    return argument.partition("=")[0][2:].replace("-", "_") if argument.startswith("--") else ""


def _fail_on_unknown(program: str, unknown: Sequence[str], known: Sequence[str]) -> NoReturn:
    from .report import nearest

    name = _flag_name(unknown[0])
    if name in ("config", "config_file") or unknown[0].endswith(_CONFIG_SUFFIXES):
        raise ValueError(f"A config file comes first and without a flag: {program} config.yaml --flag value ...")
    hint = nearest(f"--{name}", [f"--{other}" for other in known]) if name else ""
    raise ValueError(f"{unknown[0].partition('=')[0]} is no flag of {program}.{hint} (see {program} --help)")


def _parser(about: About, kinds: Sequence[type]) -> HfArgumentParser:
    from transformers import HfArgumentParser
    from transformers.hf_argparser import string_to_bool

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ValueError(f"{message} (see {self.prog} --help)")

    parser = Parser(
        list(kinds),  # type: ignore[arg-type]
        usage=f"{about['prog']} [config.yaml] [--flag value ...]",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
        **about,
    )
    # a flag that may be true, false or neither is true by itself too
    for action in parser._actions:
        if action.type is string_to_bool and action.nargs is None:
            action.nargs, action.const = "?", True
    # transformers has flags of type dict, which reads no text
    for kind in (dict, dict[str, Any], dict[str, bool]):
        parser.register("type", kind, json.loads)
    return parser


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Each flag once, though `--train-dir` is read like `--train_dir`, and defaults where there are any."""

    def add_argument(self, action: argparse.Action) -> None:
        # --flag False says what --no_flag does
        if not (action.nargs == 0 and action.const is False):
            super().add_argument(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = copy.copy(action)
        shown.option_strings = [name for name in action.option_strings if "-" not in name[2:]]
        return super()._format_action_invocation(shown)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, "", []) else super()._get_help_string(action)


def _config_flags(path: Path) -> list[str]:
    if path.suffix not in _CONFIG_SUFFIXES:
        raise ValueError(
            f"{path} is no config file: its name must end in {', '.join(_CONFIG_SUFFIXES)}; the rest are flags."
        )
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML in which `no` is a word, such as that of `eval_strategy: no`, and `yes` likewise; on and off are truth values."""

    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool" or first in "tTfFoO"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)
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
