"""The main job from start to end on what the package carries: measure, select, fine-tune, save, load again, predict.

A ViT pretrained on CIFAR-10 learns scikit-learn's handwritten digits. Run it with `make demo` or
`python -m plastic_peft.demo [output folder]`.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from . import PlasticityConfig, PlasticityReport

# peft asks transformers for a property under its older name
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

BUDGET = 0.05
PAIRS = 100
EPOCHS = 8


def main(output: str = "demo_output") -> None:
    """Run the demo; everything it writes lies in the folder `output`."""
    folder = Path(output)
    adapter, picture = folder / "adapter", folder / "plasticity.png"
    times: dict[str, float] = {}

    with step(1, "Load vit_nano and the digits", times):
        import transformers
        from peft import get_peft_model

        from . import PlasticityConfig, measure_plasticity
        from .data import with_pixels
        from .embedded import vit_nano_source_images
        from .train import DataArguments, ModelArguments, load_model, make_trainer, save_run, training_arguments

        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        transformers.set_seed(0)
        data = DataArguments(dataset_name="digits").load()
        model: Any
        model, processor = load_model(ModelArguments("vit_nano"), data["train"].features["label"].names)
        sizes = ", ".join(f"{len(split)} {name}" for name, split in data.items())
        print(f"{model.num_parameters():,} parameters; images: {sizes}")

    with step(2, "Measure plasticity: CIFAR-10 images (source) against digits (target)", times):
        target, source = with_pixels(data["train"], processor), with_pixels(vit_nano_source_images(), processor)
        report = measure_plasticity(model, target, source, max_pairs=PAIRS, batch_size=20)
        folder.mkdir(parents=True, exist_ok=True)
        report.plot(picture)
        print(f"{report.pairs} pairs ({report.stopped}), means over {report.by_role().blocks.max()} blocks:\n")
        table = report.by_role()[["mean", "shift"]].rename(columns={"mean": "plasticity"}).rename_axis(None)
        print(table.round(3).to_string(), "\n")
        print("plasticity: how far outputs move per move of the inputs, from a CIFAR-10 image to a digit")
        print("shift: plasticity over the same rate from one CIFAR-10 image to another")

    with step(3, f"Select modules for LoRA within {BUDGET:.0%} of the parameters", times):
        model = get_peft_model(model, PlasticityConfig(plasticity=report, budget=BUDGET))
        config = model.peft_config["default"]
        trainable, everything = model.get_nb_trainable_parameters()
        print(f"by {config.signal}, the {config.order} first:")
        for line in selected_by_role(report, config):
            print(f"  {line}")

    with step(4, f"Fine-tune with the Trainer for {EPOCHS} epochs", times):
        arguments = training_arguments(
            str(folder / "run"),
            num_train_epochs=EPOCHS,
            learning_rate=4e-3,
            warmup_steps=20,
            logging_strategy="no",
            eval_strategy="no",
            save_strategy="no",
            dataloader_pin_memory=False,
            disable_tqdm=False,
            use_cpu=True,
        )
        trainer = make_trainer(model, data, processor, arguments)
        trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
        test = with_pixels(data["test"], processor)

        def accuracy() -> float:
            return (trainer.predict(test).metrics or {})["test_accuracy"]

        before = accuracy()
        # the progress bar, on standard error, says all but the result
        with redirect_stdout(io.StringIO()):
            trainer.train()
        after = accuracy()
        print(f"test accuracy {before:.1%} before, {after:.1%} after; the head starts untrained")

    with step(5, "Save the adapter, load it in a fresh process, predict", times):
        save_run(trainer, adapter)
        report.save(adapter)
        sample = folder / "digits"
        sample.mkdir(exist_ok=True)
        for index in range(5):
            data["test"][index]["image"].save(sample / f"{index}.png")
        asked = subprocess.run(
            [sys.executable, "-m", "plastic_peft.demo", "--predict", str(adapter), str(sample)],
            check=True,
            capture_output=True,
            text=True,
        )
        predicted = json.loads(asked.stdout.splitlines()[-1])
        names = data["test"].features["label"].names
        truth = [names[data["test"][index]["label"]] for index in range(5)]
        print(f"predicted {', '.join(predicted)}; written were {', '.join(truth)}")

    adaptable = sum(candidate.cost_per_rank > 0 for candidate in report.candidates())
    print("\nSummary")
    rows = {
        "test accuracy": f"{before:.1%} before, {after:.1%} after ({len(data['test'])} images)",
        "trainable": f"{trainable:,} of {everything:,} parameters ({trainable / everything:.1%}, head included)",
        "selected": f"{len(config.selected_modules)} of the {adaptable} modules that LoRA can adapt",
        "times": ", ".join(f"{name} {seconds:.0f} s" for name, seconds in times.items()),
        "adapter": f"{adapter}  ({sum(f.stat().st_size for f in adapter.iterdir()) / 1000:.0f} kB)",
        "picture": str(picture),
    }
    for name, value in rows.items():
        print(f"  {name:14} {value}")


def selected_by_role(report: PlasticityReport, config: PlasticityConfig) -> list[str]:
    """One line per component: how many of its modules are adapted, with which ranks; and what is trained in full."""
    roles = {candidate.name: candidate.role for candidate in report.candidates(config.signal)}
    chosen, ranks_of = list(config.selected_modules or ()), config.rank_pattern or {}
    lines = []
    for role in dict.fromkeys(roles[name] for name in chosen):
        names = [name for name in chosen if roles[name] == role]
        ranks = sorted({ranks_of.get(name, config.r) for name in names})
        span = f"rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "")
        lines.append(f"{role:15} {len(names)} of {list(roles.values()).count(role)} modules, {span}")
    saved = config.modules_to_save or []
    norms = sum(name in roles for name in saved)
    head = ", ".join(name for name in saved if name not in roles)
    return [*lines, f"{'in full':15} the head ({head})" + (f" and {norms} norms" if norms else "")]


@contextmanager
def step(number: int, title: str, times: dict[str, float]) -> Iterator[None]:
    print(f"\n[{number}/5] {title}", flush=True)
    start = time.perf_counter()
    yield
    times[("load", "measure", "select", "train", "reload")[number - 1]] = time.perf_counter() - start


def predict(adapter: str, images: str) -> None:
    """Load the adapter anew and print the labels of the images in a folder, as a JSON list on the last line."""
    import transformers
    from PIL import Image

    from .hub import AutoPlasticModelForImageClassification

    transformers.logging.set_verbosity_error()
    model: Any = AutoPlasticModelForImageClassification.from_pretrained(adapter)
    classify: Any = transformers.pipeline(
        "image-classification", model=model, image_processor=model.image_processor, device="cpu"
    )
    pictures = [Image.open(path) for path in sorted(Path(images).iterdir())]
    print(json.dumps([answer[0]["label"] for answer in classify(pictures)]))


if __name__ == "__main__":
    arguments = sys.argv[1:]
    predict(*arguments[1:]) if arguments[:1] == ["--predict"] else main(*arguments)
