"""Cost and figures of the measurement, against a bare forward pass and against the paper's protocol.

    python benchmarks/measurement.py overhead [--model DIR --source source.parquet --target target.parquet]
    python benchmarks/measurement.py scaling
    python benchmarks/measurement.py bounds
    python benchmarks/measurement.py pairs --model DIR --source source.parquet --target target.parquet --name cifar10
    python benchmarks/measurement.py reference --model DIR --source ... --target ... --reference reference.json

Each writes benchmarks/results/measurement_<what>.json; `python benchmarks/table.py` makes docs/benchmarks.md of them.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import datasets
import numpy as np
import torch
from common import peak_memory, ratio, save, side_by_side
from PIL import Image
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from plastic_peft import find_components, load_vit_nano, measure_plasticity, plasticity_bounds
from plastic_peft import measure as engine
from plastic_peft.bounds import attention_bound, spectral_norm
from plastic_peft.report import Row, candidates
from plastic_peft.selection import select


MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def pixels(rows: datasets.Dataset, size: int = 224) -> torch.Tensor:
    """The preprocessing that the reference figures were made with: bilinear PIL resize, ImageNet mean and deviation."""

    def one(image: Image.Image) -> torch.Tensor:
        array = np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)) / 255
        return torch.from_numpy((array - MEAN) / STD).permute(2, 0, 1).float()

    return torch.stack([one(row["image"]) for row in rows])


def load(path: str) -> datasets.Dataset:
    return datasets.load_dataset("parquet", data_files=path, split="train")


@torch.no_grad()
def reference_protocol(model: ViTForImageClassification, sources: torch.Tensor, targets: torch.Tensor) -> None:
    """What the paper describes: the embedding through every component of every block, all activations to the host."""

    def activations(part: torch.Tensor) -> list[torch.Tensor]:
        e = model.vit.embeddings(part)
        kept = [e]
        for layer in model.vit.layers:
            padded = torch.cat(
                [e, torch.zeros_like(e).repeat(1, 1, layer.mlp.fc2.in_features // e.shape[-1] - 1)], dim=-1
            )
            kept += [layer.layernorm_before(e), layer.attention(e)[0], layer.layernorm_after(e), layer.mlp.fc1(e)]
            kept.append(layer.mlp.fc2(padded))
        return [tensor.cpu().clone() for tensor in kept]

    for x, y in zip(activations(sources), activations(targets), strict=True):
        ((x - y) ** 2).flatten(1).sum(-1).sqrt()


def vit(depth: int = 12, width: int = 192) -> ViTForImageClassification:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=depth, num_attention_heads=width // 64
    )
    return ViTForImageClassification(config).eval()


def cost(
    model: ViTForImageClassification,
    pairs: int,
    per_batch: int,
    rounds: int,
    images: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> dict[str, Any]:
    """Time and memory of a whole call, tracing included, over bare forward passes of the same images; and of the tracing."""
    size = model.config.image_size
    noise = torch.randn(2, pairs, 3, size, size, generator=torch.Generator().manual_seed(0))
    sources, targets = noise if images is None else images
    parts = [torch.cat(both) for both in zip(sources.split(per_batch), targets.split(per_batch), strict=True)]

    @torch.no_grad()
    def bare() -> None:
        for part in parts:
            model(pixel_values=part)

    def measured(inputs: str) -> Callable[[], Any]:
        options = dict(inputs=inputs, batch_size=per_batch, tolerance=0, progress=False)
        return lambda: measure_plasticity(model, targets, sources, **options)

    def reference() -> None:
        for both in zip(sources.split(per_batch), targets.split(per_batch), strict=True):
            reference_protocol(model, *both)

    ways = {"bare": bare, "hidden": measured("hidden"), "embedding": measured("embedding"), "reference": reference}
    ways["trace"] = lambda: find_components(model, sources[:2])
    seconds = side_by_side(ways, rounds)
    memory = {way: round(peak_memory(call), 1) for way, call in ways.items()}
    row = {"pairs": pairs, "pairs_per_batch": per_batch, "bare_seconds": round(fmean(seconds["bare"]), 3)}
    row |= {f"{way}_over_bare": ratio(seconds, way, "bare") for way in ways if way != "bare"}
    return {**row, "peak_mib": memory}


def overhead(arguments: argparse.Namespace) -> None:
    """On a small, a middling and a large model; the middling one and its images are those given, where they are."""

    def tiny() -> ViTForImageClassification:
        return AutoModelForImageClassification.from_pretrained(arguments.model) if arguments.model else vit()

    makers = {"vit_nano": load_vit_nano, "DeiT-tiny": tiny, "ViT-B/16": lambda: vit(width=768)}
    plan = [("vit_nano", 256, 8), ("vit_nano", 256, 32), ("DeiT-tiny", 32, 8), ("DeiT-tiny", 128, 16)]
    results = []
    for name, pairs, per_batch in [*plan, ("ViT-B/16", 16, 8), ("ViT-B/16", 32, 16)]:
        images = None
        if name == "DeiT-tiny" and arguments.model:
            images = tuple(pixels(load(path).select(range(pairs))) for path in (arguments.source, arguments.target))
        row = cost(makers[name]().eval(), pairs, per_batch, 2 if name == "ViT-B/16" else arguments.rounds, images)
        weights = "trained" if images is not None or name == "vit_nano" else "random"
        results.append({"model": name, "weights": weights, **row})
        print(json.dumps(results[-1]), flush=True)
        save("measurement_overhead", results, rounds=arguments.rounds, note="tracing of the structure included")


def scaling(arguments: argparse.Namespace) -> None:
    """How the cost grows with depth, width and pairs: the ratio to the forward pass should not."""
    results = []
    for depth, width, pairs in [(6, 192, 32), (12, 192, 32), (24, 192, 32), (6, 384, 32), (6, 768, 32), (6, 192, 128)]:
        row = cost(vit(depth, width), pairs, 8, min(3, arguments.rounds))
        results.append({"depth": depth, "width": width, **row})
        print(json.dumps(results[-1]), flush=True)
    save("measurement_scaling", results, note="tracing of the structure included")


def bounds(arguments: argparse.Namespace) -> None:
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig()).eval()
    linears = [m.weight.detach() for m in model.vit.layers.modules() if isinstance(m, torch.nn.Linear)]
    attentions = [[getattr(layer.attention, f"{x}_proj").weight.detach() for x in "qkvo"] for layer in model.vit.layers]
    tokens, radius, size = 197, 10.0, model.vit.layers[0].attention.head_dim

    def ours() -> list[float]:
        heads = [attention_bound(*weights, size, n=tokens, r=radius) for weights in attentions]
        return [spectral_norm(w) for w in linears] + heads

    def largest(matrix: torch.Tensor) -> torch.Tensor:
        return torch.linalg.svdvals(matrix)[0]

    def full_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor) -> float:
        bound = 0.0
        for first in range(0, len(q), size):
            head = slice(first, first + size)
            a = largest(q[head].T @ k[head]) / size**0.5
            factor = torch.sqrt(3 * tokens + (12 * tokens + 3) * radius**4 * a**2)
            bound += float(largest(o[:, head]) * largest(v[head]) * factor)
        return bound

    def full() -> list[float]:
        return [float(largest(w)) for w in linears] + [full_attention(*weights) for weights in attentions]

    error = max(abs(a / b - 1) for a, b in zip(ours(), full(), strict=True))
    seconds = side_by_side({"ours": ours, "full_svd": full}, rounds=3)
    row = {"model": "vit_b", "linears": len(linears), "attentions": len(attentions), "largest_relative_error": error}
    row["full_svd_over_ours"] = ratio(seconds, "full_svd", "ours")
    row["all_bounds_seconds"] = round(side_by_side({"all": lambda: plasticity_bounds(model)}, 2)["all"][0], 2)
    print(json.dumps(row))
    save("measurement_bounds", [row])


def reference(arguments: argparse.Namespace) -> None:
    wanted = json.loads(Path(arguments.reference).read_text())["rows"]
    model = AutoModelForImageClassification.from_pretrained(arguments.model)
    count = next(iter(next(iter(wanted.values())).values()))["n"]
    sources, targets = (pixels(load(path).select(range(count))) for path in (arguments.source, arguments.target))
    report = measure_plasticity(model, targets, sources, inputs="embedding", tolerance=0, batch_size=16)
    rows = [r for r in report.select_rows("component") if r.role in wanted]
    error = dict.fromkeys(wanted, 0.0)
    for r in rows:
        error[r.role] = max(error[r.role], abs(r.mean / wanted[r.role][str(r.block)]["mean"] - 1))
    result = {
        "components": len(rows),
        "largest_relative_difference": error,
        "by_role": report.by_role()["mean"].to_dict(),
    }
    print(json.dumps(result))
    save("measurement_reference", [result], pairs=count)


POLICIES = {
    "default: budget of 1 %, LoRA": {},
    "best role, LoRA": dict(top_k=1),
    "best role by raw plasticity, LoRA": dict(top_k=1, signal="plasticity"),
    "best role by raw plasticity, full": dict(top_k=1, signal="plasticity", adapter="full"),
    "12 modules": dict(top_k=12, granularity="module"),
    "12 modules by raw plasticity": dict(top_k=12, granularity="module", signal="plasticity"),
    "12 modules by raw plasticity within roles": dict(
        top_k=12, granularity="module", within="role", signal="plasticity"
    ),
}


class Recorded(engine.Moments):
    """The moments of a measurement, with the sums that each batch added."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.batches: list[torch.Tensor] = []

    def add(self, sums: torch.Tensor) -> None:
        super().add(sums)
        self.batches.append(sums)


class Replay:
    """One long measurement, of which parts are measured again from the sums of their batches."""

    def __init__(self, model: Any, sources: torch.Tensor, targets: Any, step: int, inputs: str) -> None:
        held, rows = engine.Moments, engine._rows
        seen: list[Any] = []
        engine.Moments = lambda *a, **k: seen.append(Recorded(*a, **k)) or seen[0]  # type: ignore[assignment,misc]
        engine._rows = lambda *a: seen.append(a[:2]) or rows(*a)  # type: ignore[func-returns-value]
        try:
            options = dict(batch_size=step, tolerance=0, max_pairs=len(targets), inputs=inputs)
            self.whole = measure_plasticity(model, targets, sources, **options)
        finally:
            engine.Moments, engine._rows = held, rows
        self.batches, self.plans, self.structure = seen[0].batches, *seen[1]

    def moments(self) -> Any:
        return engine.Moments(len(self.plans), 0.95)

    def rows(self, moments: Any) -> list[Row]:
        return engine._rows(self.plans, self.structure, moments, True)

    def selected(self, rows: list[Row], options: dict[str, Any]) -> set[str]:
        options = dict(options)
        scored = candidates(rows, options.pop("signal", None))
        return set(select(scored, base_parameters=self.structure.parameters, **options).modules)

    def run(self, first: int, count: int, options: dict[str, Any], final: set[str]) -> dict[str, Any]:
        """From batch `first` on: pairs until the selection stays the final one, and where the stopping rule stops."""
        moments, right = self.moments(), []
        stopped: dict[str, Any] = {"stopped_at": None, "right_when_stopped": None}
        for sums in self.batches[first : first + count]:
            moments.add(sums)
            rows = self.rows(moments)
            right.append(self.selected(rows, options) == final)
            if stopped["stopped_at"] is None and moments.look_is_due() and moments.widest() < 0.05:
                rows = self.rows(moments)
                if engine._selection_is_settled(rows, self.structure.parameters, options):
                    stopped = {"stopped_at": moments.pairs(), "right_when_stopped": right[-1]}
        wrong = [k for k, same in enumerate(right) if not same]
        pairs = max((w + 2 for w in wrong), default=1)
        return {"needed": pairs if pairs <= count else None, **stopped}


class Drawn:
    """Images of a data set in a drawn order, which starts anew when all have been drawn."""

    def __init__(self, data: datasets.Dataset, count: int, generator: torch.Generator) -> None:
        rounds = [torch.randperm(len(data), generator=generator) for _ in range(-(-count // len(data)))]
        self.data, self.order = data, torch.cat(rounds)[:count].tolist()

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": pixels(self.data.select([self.order[index]]))[0]}


def pairs(arguments: argparse.Namespace) -> None:
    """How many pairs a selection needs: 20 disjoint draws against all pairs together, and where the rule stops."""
    step, seeds, total = 32, 20, arguments.pairs
    model = AutoModelForImageClassification.from_pretrained(arguments.model).eval()
    generator = torch.Generator().manual_seed(0)
    sources, targets = (Drawn(load(path), total, generator) for path in (arguments.source, arguments.target))
    replay = Replay(model, sources, targets, step, arguments.inputs)
    each = len(replay.batches) // seeds
    results = []
    for policy, options in POLICIES.items():
        final = replay.selected(replay.whole.rows, options)
        runs = [replay.run(seed * each, each, options, final) for seed in range(seeds)]
        needed = [r["needed"] * step for r in runs if r["needed"]]
        stops = [r["stopped_at"] for r in runs if r["stopped_at"]]
        row = {
            "policy": policy,
            "needed_median": float(np.median(needed)) if needed else None,
            "needed_worst": max(needed, default=None),
            "not_within_draw": seeds - len(needed),
            "stopped": len(stops),
            "stopped_median": float(np.median(stops)) if stops else None,
            "wrong_when_stopped": sum(r["right_when_stopped"] is False for r in runs),
            "runs": runs,
        }
        results.append(row)
        print(json.dumps({k: v for k, v in row.items() if k != "runs"}), flush=True)
    ranking = replay.whole.by_role()[["mean", "shift"]].round(4).to_dict("index")
    save(
        f"measurement_pairs_{arguments.name}",
        results,
        pairs=total,
        seeds=seeds,
        pairs_per_seed=each * step,
        step=step,
        inputs=arguments.inputs,
        ranking=ranking,
    )


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["overhead", "scaling", "bounds", "reference", "pairs"])
    parser.add_argument("--model", help="folder or id of a ViT classifier")
    parser.add_argument("--source", help="parquet file of source images")
    parser.add_argument("--target", help="parquet file of target images")
    parser.add_argument("--reference", help="JSON of the reference implementation's figures")
    parser.add_argument("--name", default="target", help="name of the target set, for the result's file")
    parser.add_argument("--pairs", type=int, default=12_800)
    parser.add_argument("--inputs", default="hidden")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    globals()[given.what](given)
