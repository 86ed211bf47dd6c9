"""The command `plastic-peft`: measure, select, train, compare, evaluate, predict, export, inspect.

Results go to standard output, everything else to standard error. Exit codes: 0 for success, 2 for what the caller can
mend (a wrong flag, file or image; one line says what), 1 for anything unexpected, with a traceback.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from . import commands
from .faults import explained
from .flags import About


PROGRAM = "plastic-peft"


@dataclass(frozen=True)
class _Command:
    run: Callable[[Sequence[str], About], str]
    summary: str
    examples: str


COMMANDS = {
    "measure": _Command(
        commands.measure,
        "measure the plasticity of every component of a model on your images",
        """  plastic-peft measure --model_name_or_path google/vit-base-patch16-224 --train_dir photos/ --plot plasticity.png
  plastic-peft measure --dataset_name digits --max_pairs 256 --json
  accelerate launch --num_processes 4 -m plastic_peft measure --train_dir photos/     # each process takes its share""",
    ),
    "select": _Command(
        commands.select,
        "choose modules and ranks from a report; needs neither model nor images",
        """  plastic-peft select --report plasticity_report.json --budget 0.01
  plastic-peft select --report plasticity_report.json --adapter full --top_k 1 --json
  plastic-peft select --report plasticity_report.json --budget 200000 --granularity module --rank_allocation proportional""",
    ),
    "train": _Command(
        commands.train,
        "measure or reuse a report, fine-tune the selected modules, evaluate, save; the same command resumes",
        """  plastic-peft train --dataset_name digits --output_dir runs/digits
  plastic-peft train --model_name_or_path google/vit-base-patch16-224 --train_dir photos/train --validation_dir photos/val \\
      --budget 0.01 --learning_rate 2e-3 --num_train_epochs 5 --output_dir runs/photos --push_to_hub
  plastic-peft train config.yaml --learning_rate 2e-3        # flags win over the file
  accelerate launch --num_processes 2 -m plastic_peft train config.yaml

Flags after the first groups are those of transformers.TrainingArguments; without --learning_rate, LoRA takes 4e-3 and
full adapters take 1e-3.""",
    ),
    "compare": _Command(
        commands.compare,
        "train with several selections at the same number of parameters, over seeds and learning rates",
        """  plastic-peft compare --dataset_name digits --output_dir runs/compare --budget 20000 \\
      --methods highest lowest random q_proj,v_proj all-linear --seeds 0 1 2 --learning_rates 2e-3 4e-3""",
    ),
    "evaluate": _Command(
        commands.evaluate,
        "accuracy, macro F1 and confusions of an adapter on labelled images",
        """  plastic-peft evaluate --adapter runs/photos --test_dir photos/test
  plastic-peft evaluate --adapter runs/digits --dataset_name digits --split test --json""",
    ),
    "predict": _Command(
        commands.predict,
        "labels and probabilities for images",
        """  plastic-peft predict --adapter runs/photos --images new_photos/ --output labels.csv
  plastic-peft predict --adapter user/adapter --images cat.jpg dog.jpg --top 1 --json""",
    ),
    "export": _Command(
        commands.export,
        "a plain LoRA adapter that peft loads alone, or a merged model that transformers loads alone",
        """  plastic-peft export --adapter runs/photos --output_dir plain_lora
  plastic-peft export --adapter runs/photos --output_dir merged --format merged""",
    ),
    "inspect": _Command(
        commands.inspect,
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
argument. Exit codes: 0 success, 2 something to mend in the call or the data, 1 anything unexpected; PLASTIC_PEFT_DEBUG=1
shows where an error came from."""


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
    try:
        result = _run(arguments[0], arguments[1:])
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
        print(f"{PROGRAM}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _run(name: str, argv: Sequence[str]) -> str:
    command = COMMANDS.get(name)
    if command is None:
        raise ValueError(f"{name!r} is no command: choose {', '.join(COMMANDS)} (see {PROGRAM} --help)")
    about = {
        "prog": f"{PROGRAM} {name}",
        "description": f"{command.summary[0].upper()}{command.summary[1:]}.",
        "epilog": f"examples:\n{command.examples}",
    }
    if "-h" in argv or "--help" in argv:
        return command.run(argv, about)
    # trainers and progress bars print too, and would get between the results
    with _messages(int(os.environ.get("RANK", 0))), explained(), contextlib.redirect_stdout(sys.stderr):
        return command.run(argv, about)


@contextlib.contextmanager
def _messages(rank: int) -> Iterator[None]:
    """Show what this package and its dependencies have to say to users, once for all processes, and nothing to developers."""
    from transformers.utils import logging as transformers_logging

    level = logging.WARNING if rank == 0 else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    logging.getLogger("plastic_peft").setLevel(logging.INFO if rank == 0 else logging.ERROR)
    transformers_logging.disable_progress_bar()
    if rank != 0:
        transformers_logging.set_verbosity_error()
    with warnings.catch_warnings():
        if rank != 0:
            warnings.simplefilter("ignore")
        warnings.filterwarnings(
            "ignore", category=FutureWarning, module=r"(transformers|peft|accelerate|torch|datasets)\b"
        )
        yield
