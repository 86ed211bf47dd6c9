"""Which modules to adapt: plasticity against fixed rules and other methods, at equal numbers of trainable parameters.

    python benchmarks/method_comparison.py --task cifar10 --model DIR --train train.parquet --test test.parquet \
        --source source.parquet --image-size 96 --methods q+v all-linear select:signal=shift --seeds 5

Every finished run is one line of benchmarks/results/methods/<task>.jsonl; lines that are there are not run again, so the
command can be stopped at any moment and given again. `python benchmarks/method_report.py` makes table and picture of them.

Protocol: a seed draws the training images from a fixed pool, orders them and initialises head and adapters. 500 images
of the pool, the same for all, validate; the learning rate of a method is the one with the best validation accuracy for
the first seed, and the test images are looked at once per run, after its last step. AdamW without weight decay, batches
of 32, cosine schedule with a tenth of warm-up, mirrored images where that keeps the label.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from common import RESULTS, machine, peak_memory, ratio, save, side_by_side
from methods import Choice, Situation, choose, gradient_norms
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from PIL import Image
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModelForImageClassification, get_cosine_schedule_with_warmup

from plastic_peft import PlasticityReport, load_vit_nano, measure_plasticity, vit_nano_source_images
from plastic_peft.data import as_rgb, load_images
from plastic_peft.processors import accept_image_size


VALIDATION = 500
LORA_RATES = (2e-3, 4e-3, 8e-3)
FULL_RATES = (2e-4, 1e-3)
BATCH = 32


@dataclass(frozen=True)
class Run:
    method: str
    budget: int
    rate: float
    seed: int


class Task:
    """A pretrained model and images, decoded once."""

    def __init__(self, arguments: argparse.Namespace):
        self.model_name, self.size = arguments.model, arguments.image_size
        base, processor = self._base()
        self.size = self.size or base.config.image_size
        self.mean, self.std = (torch.tensor(v).view(1, 3, 1, 1) for v in (processor.image_mean, processor.image_std))
        self.mirror = arguments.train != "digits"
        if arguments.train == "digits":
            splits = load_images("digits")
            train, test = splits["train"], splits["test"]
        else:
            train, test = _parquet(arguments.train), _parquet(arguments.test)
        self.labels = train.features["label"].num_classes
        order = np.random.default_rng(0).permutation(len(train))
        self.validation = self._load(train.select(order[:VALIDATION]))
        pool = order[VALIDATION:][: arguments.pool]
        self.pool = self._load(train.select(pool))
        few = np.random.default_rng(0).permutation(len(test))[: arguments.test_images]
        self.test = self._load(test.select(few))
        source = vit_nano_source_images() if arguments.source is None else _parquet(arguments.source)
        self.source = self._pixels(self._decode(source)[:256])
        self.images, self.epochs, self.bf16 = arguments.train_images, arguments.epochs, arguments.bf16
        # one rank on every linear of the blocks is the unit of budgets
        self.unit = sum(c.cost_per_rank for c in self.report("hidden", 0).candidates())

    def _base(self) -> tuple[Any, Any]:
        if self.model_name == "vit_nano":
            model = load_vit_nano()
            processor = AutoImageProcessor.from_pretrained(model.name_or_path)
        else:
            model = AutoModelForImageClassification.from_pretrained(self.model_name)
            processor = AutoImageProcessor.from_pretrained(self.model_name)
        if self.size:
            accept_image_size(model, self.size)
        return model, processor

    def model(self, seed: int) -> Any:
        torch.manual_seed(seed)
        if self.model_name == "vit_nano":
            model = load_vit_nano(num_labels=self.labels)
        else:
            model = AutoModelForImageClassification.from_pretrained(
                self.model_name, num_labels=self.labels, ignore_mismatched_sizes=True
            )
            # a head of the same width would otherwise keep the pretrained classes
        nn.init.trunc_normal_(model.classifier.weight, std=0.02)
        nn.init.zeros_(model.classifier.bias)
        accept_image_size(model, self.size)
        return model

    def training(self, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        pixels, labels = self.pool
        chosen = torch.from_numpy(np.random.default_rng(1000 + seed).permutation(len(pixels))[: self.images])
        return pixels[chosen], labels[chosen]

    @functools.lru_cache(maxsize=32)  # noqa: B019
    def report(self, inputs: str, seed: int) -> PlasticityReport:
        pixels, _ = self.training(seed)
        return measure_plasticity(
            self._base()[0], self._pixels(pixels[:256]), self.source, inputs=inputs, max_pairs=256, tolerance=0,
            batch_size=16, seed=seed, progress=False,
        )  # fmt: skip

    @functools.lru_cache(maxsize=32)  # noqa: B019
    def gradients(self, seed: int) -> dict[str, float]:
        pixels, labels = self.training(seed)
        names = [c.name for c in self.report("hidden", seed).candidates() if c.cost_per_rank > 0]
        model = self.model(seed).eval()
        return gradient_norms(model, model.classifier, self._pixels(pixels), labels, names, seed)

    def _load(self, data: datasets.Dataset) -> tuple[torch.Tensor, torch.Tensor]:
        return self._decode(data), torch.tensor(data["label"])

    def _decode(self, data: datasets.Dataset) -> torch.Tensor:
        size = (self.size, self.size)
        arrays = [np.asarray(as_rgb(row["image"]).resize(size, Image.Resampling.BICUBIC)) for row in data]
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)

    def _pixels(self, images: torch.Tensor) -> torch.Tensor:
        return (images / 255 - self.mean) / self.std

    # --- one run -------------------------------------------------------------------------------------------------------

    def prepare(self, run: Run) -> tuple[Any, Choice, float]:
        """The model of a run with its adapters, what they are, and the seconds that choosing them took."""
        start = time.perf_counter()
        model = self.model(run.seed)
        situation = Situation(
            model, run.budget, run.seed, lambda inputs: self.report(inputs, run.seed), lambda: self.gradients(run.seed)
        )
        choice = choose(run.method, situation)
        if not choice.ranks:
            model.requires_grad_(False)
            for name in {*choice.full, "classifier"}:
                for parameter in model.get_submodule(name).parameters(recurse=False):
                    parameter.requires_grad_(True)
            if run.method == "full":
                model.requires_grad_(True)
            return model, choice, time.perf_counter() - start
        config = LoraConfig(
            target_modules="|".join(f"(?:{name})" for name in choice.ranks).replace(".", r"\."),
            r=max(choice.ranks.values()),
            rank_pattern={f"^{name}": rank for name, rank in choice.ranks.items()},
            # the same scaling on every module, whatever its rank
            alpha_pattern={f"^{name}": 2 * rank for name, rank in choice.ranks.items()},
            lora_alpha=2 * max(choice.ranks.values()),
            modules_to_save=["classifier", *choice.full],
        )
        if choice.init == "eva":
            config = LoraConfig(
                target_modules=config.target_modules, r=min(choice.ranks.values()), modules_to_save=["classifier"],
                lora_alpha=2 * min(choice.ranks.values()), init_lora_weights="eva", eva_config=EvaConfig(rho=2.0),
            )  # fmt: skip
        model = get_peft_model(model, config)
        if choice.init == "eva":
            pixels = self._pixels(self.training(run.seed)[0])
            initialize_lora_eva_weights(
                model, [{"pixel_values": part} for part in pixels.split(BATCH)], prepare_model_inputs_fn=None,
                prepare_layer_inputs_fn=lambda x, *_: (x[0] if isinstance(x, tuple) else x).flatten(0, -2),
                show_progress_bar=False,
            )  # fmt: skip
        return model, choice, time.perf_counter() - start

    def train(self, run: Run) -> dict[str, Any]:
        model, choice, choosing = self.prepare(run)
        head = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "classifier" in n)
        trained = [p for p in model.parameters() if p.requires_grad]
        pixels, labels = self.training(run.seed)
        steps = self.epochs * (len(pixels) // BATCH)
        step = self.stepper(model, run.rate, steps)
        generator = torch.Generator().manual_seed(run.seed)
        start, losses = time.perf_counter(), []
        for _ in range(self.epochs):
            for part in torch.randperm(len(pixels), generator=generator).split(BATCH):
                if len(part) < BATCH:
                    continue
                batch = self._pixels(pixels[part])
                if self.mirror:
                    flip = torch.rand(len(part), generator=generator) < 0.5
                    batch[flip] = batch[flip].flip(-1)
                losses.append(step(batch, labels[part]))
        seconds = time.perf_counter() - start
        return {
            **asdict(run),
            "validation": self.accuracy(model, *self.validation),
            "test": self.accuracy(model, *self.test),
            "parameters": sum(p.numel() for p in trained) - head,
            "modules": len(choice.ranks) + len(choice.full),
            "steps": steps,
            "loss": round(float(np.mean(losses[-10:])), 4),
            "choosing_seconds": round(choosing, 2),
            "training_seconds": round(seconds, 2),
            "ranks": self._by_role(choice),
        }

    def stepper(self, model: nn.Module, rate: float, steps: int) -> Callable[[torch.Tensor, torch.Tensor], float]:
        """A function that takes one optimizer step on a batch and returns the loss before it."""
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
        schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
        model.train()

        def step(batch: torch.Tensor, labels: torch.Tensor) -> float:
            loss = nn.functional.cross_entropy(self._logits(model, batch), labels)
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            return loss.item()

        return step

    def costs(self, methods: Sequence[str], budget: int, rounds: int = 5) -> dict[str, dict[str, float]]:
        """Step time of each method over that of head-only training, taken in turn, and peak memory, for a batch."""
        pixels, labels = self.training(0)
        batch, truth = self._pixels(pixels[:BATCH]), labels[:BATCH]
        ways = {}
        for method in dict.fromkeys(["head", *methods]):
            model = self.prepare(Run(method, budget, 1e-3, 0))[0]
            step = self.stepper(model, 1e-3, 1000)
            ways[method] = lambda step=step: step(batch, truth)
        seconds = side_by_side(ways, rounds)
        return {
            method: {
                "step_over_head": ratio(seconds, method, "head")["median"],
                "peak_mib": round(peak_memory(way), 1),
            }
            for method, way in ways.items()
        }

    def signals(self) -> dict[str, dict[str, float]]:
        """Mean of every signal over the blocks, by role."""
        found = {}
        for inputs in ("hidden", "embedding"):
            table = self.report(inputs, 0).by_role()
            for column, name in (("mean", "plasticity"), ("shift", "shift")):
                found[f"{inputs} {name}"] = table[column].astype(float).round(5).to_dict()
        return found

    def _by_role(self, choice: Choice) -> dict[str, int]:
        """Ranks summed over the blocks, by role."""
        sums: dict[str, int] = {}
        for candidate in self.report("hidden", 0).candidates():
            if candidate.name in choice.ranks:
                sums[candidate.role] = sums.get(candidate.role, 0) + choice.ranks[candidate.name]
        return sums

    def _logits(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            return model(pixel_values=batch).logits.float()

    @torch.no_grad()
    def accuracy(self, model: nn.Module, pixels: torch.Tensor, labels: torch.Tensor) -> float:
        model.eval()
        right = [
            (self._logits(model, self._pixels(part)).argmax(-1) == truth).sum().item()
            for part, truth in zip(pixels.split(100), labels.split(100), strict=True)
        ]
        return round(sum(right) / len(labels), 5)


def _parquet(path: str) -> datasets.Dataset:
    return datasets.load_dataset("parquet", data_files=path, split="train")


def plan(methods: Sequence[str], budgets: Sequence[int], seeds: int, done: Mapping[Run, dict[str, Any]], rates: Any):
    """The next run that is missing: first every learning rate for the first seed, then the best one for the others."""
    for seed in range(seeds):
        for budget in budgets:
            for method in methods:
                name, free = method, method.partition(":")[0] in ("head", "full", "layernorm", "only")
                size = 0 if free else budget
                mine = rates or (FULL_RATES if free else LORA_RATES)
                if seed:
                    first = [(done.get(Run(name, size, rate, 0)) or {}).get("validation", -1.0) for rate in mine]
                    mine = (mine[int(np.argmax(first))],)
                for rate in mine:
                    if (run := Run(name, size, rate, seed)) not in done:
                        return run
    return None


def read(path: Path) -> dict[Run, dict[str, Any]]:
    done = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        row = json.loads(line)
        if "method" in row:
            done[Run(row["method"], row["budget"], row["rate"], row["seed"])] = row
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, help="name of the results file")
    parser.add_argument("--model", default="vit_nano", help="folder or id of a ViT classifier, or vit_nano")
    parser.add_argument("--train", default="digits", help="parquet file with image and label, or digits")
    parser.add_argument("--test", help="parquet file with image and label")
    parser.add_argument("--source", help="parquet file of images like those of pretraining; vit_nano has its own")
    parser.add_argument("--image-size", type=int, help="the model's own by default")
    parser.add_argument("--methods", nargs="+", default=["q+v", "all-linear", "select:signal=plasticity"])
    parser.add_argument("--budgets", nargs="+", type=float, default=[2], help="in LoRA ranks over all linears")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rates", nargs="+", type=float, help="learning rates to choose among")
    parser.add_argument("--train-images", type=int, default=1000)
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--pool", type=int, default=4000, help="images that seeds draw from")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--costs", action="store_true", help="measure step time and memory of the methods instead")
    arguments = parser.parse_args()
    path = RESULTS / "methods" / f"{arguments.task}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    task = Task(arguments)
    if arguments.costs:
        costs = task.costs(arguments.methods, round(arguments.budgets[0] * task.unit))
        print(save(f"methods_cost_{arguments.task}", costs, batch=BATCH, signals=task.signals()))
        return
    settings = {k: v for k, v in vars(arguments).items() if k not in ("methods", "seeds", "budgets", "rates", "costs")}
    settings |= {"model": Path(arguments.model).name, "unit": task.unit, **machine()}
    for key in ("train", "test", "source"):
        settings[key] = settings[key] and Path(settings[key]).name
    header = json.dumps({"settings": settings}) + "\n"
    if not path.exists() or header not in path.read_text():
        with path.open("a") as file:
            file.write(header)
    with tqdm(desc=arguments.task) as bar:
        # the file is read again for every run, since several processes may work on one list in turn
        while run := plan(
            arguments.methods,
            [round(b * task.unit) for b in arguments.budgets],
            arguments.seeds,
            read(path),
            arguments.rates,
        ):
            result = task.train(run)
            with path.open("a") as file:
                file.write(json.dumps(result) + "\n")
            bar.set_postfix_str(f"{run.method} {run.rate:g} {result['validation']:.3f} {result['test']:.3f}")
            bar.update()


if __name__ == "__main__":
    main()
