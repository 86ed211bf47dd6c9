"""Cost of training and loading: plasticity adapters against peft's LoRA and against plain `requires_grad` tuning.

    python benchmarks/training.py --rounds 15

Both sides of every comparison adapt the same modules of the same model (random weights) on the same images, in turn.
Writes benchmarks/results/training.json.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import peak_memory, ratio, save, side_by_side
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import ViTConfig, ViTForImageClassification

from plastic_peft import PlasticityConfig, find_components


SIZES = {
    "DeiT-tiny": dict(hidden_size=192, intermediate_size=768, num_hidden_layers=12, num_attention_heads=3),
    "ViT-B/16": {},
}


def model(size: str) -> ViTForImageClassification:
    torch.manual_seed(0)
    made = ViTForImageClassification(ViTConfig(num_labels=10, **SIZES[size]))
    return made.to("cuda" if torch.cuda.is_available() else "cpu")


def step_of(adapted: Any, batch: int) -> tuple[Callable[[], None], Callable[[], float]]:
    """A training step, and the MiB that weights and optimizer hold between steps."""
    device = next(adapted.parameters()).device
    pixels = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(1)).to(device)
    labels = torch.arange(batch, device=device) % 10
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-3)
    adapted.train()

    def step() -> None:
        adapted(pixel_values=pixels, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def held() -> float:
        state = [t for values in optimizer.state.values() for t in values.values() if isinstance(t, torch.Tensor)]
        return sum(t.nbytes for t in [*adapted.parameters(), *state]) / 2**20

    return step, held


def training(size: str, batch: int, rounds: int) -> list[dict[str, Any]]:
    base = model(size)
    blocks = [c for c in find_components(base) if c.block is not None]
    linears = [name for c in blocks if c.role in ("attention", "mlp_in") for name in c.modules]
    tuned = [name for c in blocks if c.role in ("attention", "norm_mlp") for name in c.modules]

    def plain() -> Any:
        whole = model(size).requires_grad_(False)
        for name in [*tuned, "classifier"]:
            whole.get_submodule(name).requires_grad_(True)
        return whole

    lora = {"target_modules": linears, "r": 8, "modules_to_save": ["classifier"]}
    full = PlasticityConfig(adapter="full", target_modules=tuned, modules_to_save=["classifier"])
    pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "LoRA over peft's LoRA": (
            lambda: get_peft_model(model(size), PlasticityConfig(**lora)),
            lambda: get_peft_model(model(size), LoraConfig(**lora)),
        ),
        "full adapters over requires_grad": (lambda: get_peft_model(model(size), full), plain),
    }
    results = []
    for name, (ours, theirs) in pairs.items():
        sides = {"ours": step_of(ours(), batch), "theirs": step_of(theirs(), batch)}
        ways = {key: step for key, (step, _) in sides.items()}
        seconds = side_by_side(ways, rounds)
        peak = {key: peak_memory(way) for key, way in ways.items()}
        memory = {key: peak[key] + held() for key, (_, held) in sides.items()}
        results.append(
            {
                "comparison": name,
                "model": size,
                "batch": batch,
                "time": ratio(seconds, "ours", "theirs"),
                "peak_mib": {key: round(value, 1) for key, value in memory.items()},
                "memory_of_a_step": round(peak["ours"] / peak["theirs"], 4),
                "memory": round(memory["ours"] / memory["theirs"], 4),
            }
        )
    return results


def loading(size: str, rounds: int) -> dict[str, Any]:
    """Loading a saved LoRA adapter onto a model in memory."""
    names = [name for c in find_components(model(size)) if c.role == "attention" for name in c.modules]
    with tempfile.TemporaryDirectory() as folder:
        for kind, config in (("ours", PlasticityConfig), ("theirs", LoraConfig)):
            get_peft_model(model(size), config(target_modules=names, modules_to_save=["classifier"])).save_pretrained(
                str(Path(folder) / kind)
            )
        ways = {
            kind: lambda kind=kind: PeftModel.from_pretrained(model(size), str(Path(folder) / kind))
            for kind in ("ours", "theirs")
        }
        ways["bare model"] = lambda: model(size)
        seconds = side_by_side(ways, rounds)
    for kind in ("ours", "theirs"):
        seconds[kind] = [a - b for a, b in zip(seconds[kind], seconds["bare model"], strict=True)]
    return {"comparison": "loading over peft's", "model": size, "time": ratio(seconds, "ours", "theirs")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    warnings.simplefilter("ignore")
    results = [*training("DeiT-tiny", 16, rounds), *training("ViT-B/16", 4, max(3, rounds // 3))]
    # full adapters hold the original weights too: what that weighs depends on the activations beside them
    results += training("ViT-B/16", 16, 3)
    results += [loading(size, rounds) for size in SIZES]
    print(save("training", results, rounds=rounds))


if __name__ == "__main__":
    main()
