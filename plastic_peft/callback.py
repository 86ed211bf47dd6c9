"""Plasticity over training steps, measured on a fixed batch while the model trains."""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DistributedType
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .components import BLOCK_ROLES, NotFiniteError, public_name, unwrap
from .measure import measure_plasticity
from .report import LABELS, PlasticityReport, Row, write_whole


if TYPE_CHECKING:
    from matplotlib.figure import Figure


CURVE_NAME = "plasticity_curve.json"
PICTURE_NAME = "plasticity_curve.png"


class PlasticityCallback(TrainerCallback):
    """Measure plasticity on a fixed probe batch during training, with gradient norms, and save the curve with the run.

    The model stays as it is: training goes on exactly as without the callback. `plasticity_curve.json` in the output
    folder holds for each step that was measured the plasticity of every component (`plasticity`), the norm of the gradients of its trainable parameters (`gradient_norm`, after clipping; 0
    where none is trained, `null` before the first step and under DeepSpeed, which does not keep them), and whether it is adapted
    (`selected`); where a model that diverged puts out NaN or infinity, either is `null`; `plasticity_curve.png` draws the means over depth. A resumed run carries the curve on.

    Cost: one measurement calls the model `1 + ceil(pairs / batch_size)` times (with `batch_size` at least 2) without gradients, on every process: once with
    three images, to read its structure, then with the two images of each pair (in a batch of oddly many, one pair comes
    twice). Reading the structure also repeats one attention of each make: in a ViT of six blocks or more, less than two
    further images' arithmetic. The distances read every activation once. On a CPU all of it took 1.1 (ViT-B) to 1.5 (128
    features) times as long as the probe's bare forward passes (docs/benchmarks.md); GPUs were not timed. With 64 images every 100
    steps of batch size 32 that is up to 3 % of the forward passes of training, whose backward passes come on top. The file says how
    long each measurement took (`seconds`).

    Args:
        probe: The images, as for the target of `measure_plasticity`: a tensor (n, channels, height, width) or a data
            set that can be read again; not an iterator.
        every: Steps between two measurements; the first is before training starts.
        source: Source images; by default pairs are drawn inside the probe.
        pairs: Measure this many pairs, by default as many as the probe holds: two images make one, or with `source` one.
        batch_size: Pairs per forward pass.
        output_dir: Where the curve is saved, by default the trainer's output folder.
        image_processor: Turns raw images into pixel values.

    Attributes:
        trainer: Set it to the trainer, and the means go to its logs and trackers as well.
        curve: What is saved, after the first measurement.

    Raises:
        ValueError: If `every` is below 1.
    """

    def __init__(
        self,
        probe: Any,
        every: int = 100,
        *,
        source: Any = None,
        pairs: int | None = None,
        batch_size: int = 32,
        output_dir: str | os.PathLike[str] | None = None,
        image_processor: Any = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"every={every} must be at least 1 step.")
        self.probe, self.source, self.every = probe, source, every
        self.pairs = pairs or (len(probe) if source is not None else max(1, len(probe) // 2))
        self.batch_size, self.output_dir, self.image_processor = batch_size, output_dir, image_processor
        self.trainer: Trainer | None = None
        self.curve: dict[str, Any] = {}
        self._norms: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        path = self._folder(args) / CURVE_NAME
        if state.global_step == 0:
            # a trainer can train again, and another model
            self.curve, self._norms = {}, {}
        elif path.is_file():
            self.curve = _until(json.loads(path.read_text(encoding="utf-8")), state.global_step)
        if not self.curve:
            self._measure(kwargs["model"], args, state)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # DeepSpeed steps inside its backward pass, and has no gradients left by now
        deepspeed = is_initialized() and AcceleratorState().distributed_type == DistributedType.DEEPSPEED
        if (state.global_step + 1) % self.every == 0 and not deepspeed:
            modules = {key: entry["modules"] for key, entry in self.curve["components"].items()}
            self._norms = gradient_norms(kwargs["model"], modules)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self._measure(kwargs["model"], args, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and self.curve:
            self.plot(self._folder(args) / PICTURE_NAME)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw plasticity and gradient norms over steps, mean over depth per role: adapted solid, frozen dashed."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.6), layout="constrained")
        for axes, key, title in zip(
            figure.subplots(1, 2),
            ("plasticity", "gradient_norm"),
            ("Plasticity", "Gradient norm (trained parameters)"),
            strict=True,
        ):
            for color, role in enumerate(BLOCK_ROLES):
                for selected in (True, False):
                    values = _mean_over_depth(self.curve, key, role, selected)
                    if values is None or (key == "gradient_norm" and not selected):
                        continue
                    style, kind = ("-", "adapted") if selected else ("--", "frozen")
                    label = f"{LABELS[role]}, {kind}"
                    axes.plot(
                        self.curve["steps"], values, style, color=f"C{color}", label=label, marker="o", markersize=3
                    )
            axes.set(xlabel="step", title=title, yscale="log")
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
            if axes.lines:
                axes.legend(fontsize=7, frameon=False, handlelength=4)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def _folder(self, args: TrainingArguments) -> Path:
        return Path(self.output_dir or str(args.output_dir))

    def _measure(self, model: nn.Module, args: TrainingArguments, state: TrainerState) -> None:
        start = time.perf_counter()
        measured: dict[str, float] = {}
        try:
            report = measure_plasticity(
                model,
                self.probe,
                self.source,
                max_pairs=self.pairs,
                tolerance=0,
                batch_size=self.batch_size,
                progress=False,
                image_processor=self.image_processor,
            )
            rows = [row for row in report.select_rows("component") if row.block is not None]
            measured = {_key(row): row.mean for row in rows}
        except NotFiniteError as error:
            if not self.curve:
                raise
            # a run that diverges goes on as it would without the callback
            warnings.warn(f"No plasticity at step {state.global_step}: {error}", UserWarning, stacklevel=2)
        if not self.curve:
            adapted = _adapted_names(model)
            self.curve = {"format": "plastic_peft.curve", "version": 1, "steps": [], "seconds": [], "components": {}}
            for row in rows:
                modules = _modules_of(report, row)
                selected = any(f"{name}.".startswith(f"{module}.") for module in modules for name in adapted)
                head = {"role": row.role, "block": row.block, "modules": modules, "selected": selected}
                self.curve["components"][_key(row)] = {**head, "plasticity": [], "gradient_norm": []}
        self.curve["steps"].append(state.global_step)
        self.curve["seconds"].append(round(time.perf_counter() - start, 4))
        for key, entry in self.curve["components"].items():
            entry["plasticity"].append(measured.get(key))
            norm = self._norms.get(key, math.nan)
            entry["gradient_norm"].append(norm if math.isfinite(norm) else None)
        if state.is_world_process_zero:
            write_whole(self._folder(args) / CURVE_NAME, json.dumps(self.curve, allow_nan=False))
        if self.trainer is not None:
            self.trainer.log(self._means())

    def _means(self) -> dict[str, float]:
        logs = {}
        for role in BLOCK_ROLES:
            for selected in (True, False):
                kind = "adapted" if selected else "frozen"
                for key in ("plasticity", "gradient_norm"):
                    values = _mean_over_depth(self.curve, key, role, selected)
                    if values is not None and not math.isnan(values[-1]) and (selected or key == "plasticity"):
                        logs[f"{key}_{kind}/{role}"] = values[-1]
        return logs


def gradient_norms(model: nn.Module, modules: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Norm of the gradients that groups of modules hold now, 0 where there are none.

    Args:
        model: The trained model, wrapped or not.
        modules: Key of a group to the names of its modules in the base model.
    """
    squares = [
        (public_name(name), parameter.grad.detach().float().square().sum())
        for name, parameter in unwrap(model).named_parameters()
        if parameter.grad is not None
    ]
    norms = {}
    for key, names in modules.items():
        own = [square for name, square in squares if any(name.startswith(f"{module}.") for module in names)]
        norms[key] = float(torch.stack(own).sum().sqrt()) if own else 0.0
    return norms


def _key(row: Row) -> str:
    return f"{row.role} {row.name}"


def _modules_of(report: PlasticityReport, component: Row) -> list[str]:
    return [
        row.name
        for row in report.select_rows("module", component.role)
        if row.component == component.name and row.block == component.block
    ]


def _adapted_names(model: nn.Module) -> list[str]:
    """Modules in which anything is trained."""
    return [public_name(name).rpartition(".")[0] for name, p in unwrap(model).named_parameters() if p.requires_grad]


def _mean_over_depth(curve: dict[str, Any], key: str, role: str, selected: bool) -> list[float] | None:
    entries = [
        entry[key] for entry in curve["components"].values() if entry["role"] == role and entry["selected"] == selected
    ]
    if not entries:
        return None
    return [math.nan if None in values else sum(values) / len(values) for values in zip(*entries, strict=True)]


def _until(curve: dict[str, Any], step: int) -> dict[str, Any]:
    """What a curve held at a step: a run that resumes there will measure the later ones again."""
    count = sum(at <= step for at in curve["steps"])
    cut = {
        name: {**entry, "plasticity": entry["plasticity"][:count], "gradient_norm": entry["gradient_norm"][:count]}
        for name, entry in curve["components"].items()
    }
    return {**curve, "steps": curve["steps"][:count], "seconds": curve["seconds"][:count], "components": cut}
