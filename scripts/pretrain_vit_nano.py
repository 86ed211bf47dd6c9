"""Pretrain the embedded `vit_nano` on CIFAR-10, from random weights to the files under `plastic_peft/assets/vit_nano`.

    python scripts/pretrain_vit_nano.py --train_file cifar10/train.parquet --test_file cifar10/test.parquet

Three things make a small ViT learn from 50,000 images within an hour or two of two CPU cores: a "mimetic" start
(Trockman & Kolter 2023, arXiv 2305.09828: heads begin as near-identities, positions as sine waves), training most
epochs on a random half of the patches, and Muon for the matrices. The run is deterministic for a seed and a thread
count, and resumes from its last finished epoch when started again with the same command.
"""

from __future__ import annotations

import io
import json
import math
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from PIL import Image
from torch import nn
from tqdm.auto import tqdm
from transformers import HfArgumentParser, ViTConfig, ViTForImageClassification


MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-classification
datasets: [cifar10]
---

# vit_nano

A small Vision Transformer for trying things out without a network: 32 x 32 images, patches of 4, 6 pre-norm blocks,
width 128, 4 heads, {parameters:,} parameters, float16 weights.

- **Trained** from scratch on the 50,000 CIFAR-10 training images by `scripts/pretrain_vit_nano.py`: {epochs} epochs, the
  first {sparse} on a random half of the patches, {hours:.1f} hours on two shared CPU cores. `training_log.json` has every epoch.
- **CIFAR-10 test accuracy: {accuracy:.2%}** (10,000 images, these float16 weights, one run). The test images were looked
  at for the log only; nothing was chosen by them.
- **Not for** anything but demonstrations, tests and teaching: larger models from the Hub are far better.
- `source_images.parquet` holds 100 CIFAR-10 training images (ten per label, JPEG as distributed) to measure plasticity with.
"""


@dataclass
class Arguments:
    train_file: str = field(
        metadata={"help": "Parquet file with `image` and `label` columns, the 50,000 training images."}
    )
    test_file: str = field(metadata={"help": "Parquet file of the 10,000 test images; looked at for the log only."})
    output_dir: str = field(default="plastic_peft/assets/vit_nano", metadata={"help": "Where the model is written."})
    work_dir: str = field(default="runs/vit_nano", metadata={"help": "Where the checkpoint and the log are written."})
    sparse_epochs: int = field(default=18, metadata={"help": "Epochs on a random half of the patches."})
    dense_epochs: int = field(default=5, metadata={"help": "Epochs on all patches, after the sparse ones."})
    batch_size: int = 256
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    seed: int = 0
    threads: int = 2


def read_images(path: str) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Return all images as uint8 (n, 3, 32, 32), their labels (n,) and the label names."""
    data = datasets.load_dataset("parquet", data_files=path, split="train")
    names = data.features["label"].names
    raw = data.cast_column("image", datasets.Image(decode=False))
    pixels = [
        np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("RGB"))
        for row in tqdm(raw["image"], desc=f"decode {path}")
    ]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), torch.tensor(raw["label"]), names


def write_sample(path: str, output: Path, per_label: int = 10) -> None:
    """Write the first images of every label as they are (JPEG), to serve as source images of a measurement."""
    data = datasets.load_dataset("parquet", data_files=path, split="train")
    taken: list[int] = []
    for label in range(data.features["label"].num_classes):
        taken += np.flatnonzero(np.asarray(data["label"]) == label)[:per_label].tolist()
    data.select(sorted(taken)).to_parquet(output / "source_images.parquet")


def normalize(images: torch.Tensor) -> torch.Tensor:
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (images.float() / 255 - mean) / std


def augment(images: torch.Tensor, generator: torch.Generator, pad: int = 4) -> torch.Tensor:
    """Flip half of the uint8 images and shift each by up to `pad` pixels, reflecting at the border."""
    n, _, height, width = images.shape
    padded = nn.functional.pad(images.float(), (pad,) * 4, mode="reflect").to(torch.uint8)
    top, left = torch.randint(0, 2 * pad + 1, (2, n), generator=generator)
    flip = torch.rand(n, generator=generator) < 0.5
    columns = torch.arange(width).expand(n, -1)
    columns = torch.where(flip[:, None], columns.flip(1), columns) + left[:, None]
    rows = torch.arange(height)[None] + top[:, None]
    return padded[
        torch.arange(n)[:, None, None, None],
        torch.arange(3)[None, :, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]


@torch.no_grad()
def mimetic_init(model: ViTForImageClassification, generator: torch.Generator) -> None:
    """Start attention near the pattern that trained ViTs share: q·k near +identity, v then output near -identity."""
    width = model.config.hidden_size

    def factors(noise: float, identity: float, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        target = noise * torch.randn(width, width, generator=generator) / math.sqrt(width) + identity * torch.eye(width)
        u, s, vh = torch.linalg.svd(target)
        return u[:, :rank] * s[:rank].sqrt(), vh[:rank].T * s[:rank].sqrt()

    for layer in model.vit.layers:
        attention = layer.attention
        size = attention.head_dim
        for head in range(attention.num_attention_heads):
            q, k = factors(0.7, 0.7, size)
            attention.q_proj.weight[head * size : (head + 1) * size] = q.T
            attention.k_proj.weight[head * size : (head + 1) * size] = k.T
        v, o = factors(0.4, -0.4, width)
        attention.v_proj.weight.copy_(v.T)
        attention.o_proj.weight.copy_(o)

    side = model.config.image_size // model.config.patch_size
    frequency = 10_000 ** (-torch.arange(0, width // 4) / (width // 4))
    angle = torch.arange(side)[:, None] * frequency
    waves = torch.cat([angle.sin(), angle.cos()], dim=1)
    grid = torch.cat([waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)], dim=-1)
    model.vit.embeddings.position_embeddings[0, 1:] = grid.reshape(side * side, width)


def keep_half(module: nn.Module, inputs: tuple, tokens: torch.Tensor) -> torch.Tensor:
    """Forward hook for the embedding layer: the class token and a random half of each image's patches."""
    n, length, width = tokens.shape
    kept = torch.rand(n, length - 1).argsort(dim=1)[:, : (length - 1) // 2] + 1
    kept = torch.cat([torch.zeros(n, 1, dtype=torch.long), kept], dim=1)
    return tokens.gather(1, kept[..., None].expand(-1, -1, width))


@torch.no_grad()
def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    right = sum(
        int((model(pixel_values=normalize(x)).logits.argmax(-1) == y).sum())
        for x, y in zip(images.split(500), labels.split(500), strict=True)
    )
    model.train()
    return right / len(labels)


def export(model: ViTForImageClassification, args: Arguments, record: dict, test_accuracy: float) -> None:
    """Write weights in float16, processor, source images, log and model card."""
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(output)
    # the file is small in float16, but the model is for training: loading makes float32 of it
    config = json.loads((output / "config.json").read_text())
    (output / "config.json").write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n")
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": 32, "width": 32},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }
    (output / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    write_sample(args.train_file, output)
    (output / "training_log.json").write_text(json.dumps({**record, "test_accuracy": test_accuracy}, indent=1) + "\n")
    hours = sum(epoch["seconds"] for epoch in record["epochs"]) / 3600
    card = CARD.format(
        accuracy=test_accuracy,
        parameters=sum(p.numel() for p in model.parameters()),
        hours=hours,
        epochs=len(record["epochs"]),
        sparse=args.sparse_epochs,
    )
    (output / "README.md").write_text(card)
    print(f"wrote {output}; test accuracy in float16: {test_accuracy:.4f}")


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    work = Path(args.work_dir)
    work.mkdir(parents=True, exist_ok=True)
    images, labels, names = read_images(args.train_file)
    test_images, test_labels, _ = read_images(args.test_file)

    model = ViTForImageClassification(
        ViTConfig(
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=4,
            image_size=32,
            patch_size=4,
            id2label=dict(enumerate(names)),
            label2id={name: i for i, name in enumerate(names)},
        )
    )
    mimetic_init(model, torch.Generator().manual_seed(args.seed))
    matrices = [p for name, p in model.vit.layers.named_parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    decayed = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    optimizers = [
        torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **decayed),
        torch.optim.AdamW(
            [
                {"params": [p for p in rest if p.ndim > 1]},
                {"params": [p for p in rest if p.ndim == 1], "weight_decay": 0.0},
            ],
            betas=(0.9, 0.95),
            **decayed,
        ),
    ]
    epochs = args.sparse_epochs + args.dense_epochs
    steps = len(images) // args.batch_size

    def lr_scale(step: int) -> float:
        warmup = 2 * steps
        return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / (epochs * steps)))

    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, lr_scale) for optimizer in optimizers]
    log: list[dict] = []
    record: dict = {}
    checkpoint = work / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for holder, saved in zip([*optimizers, *schedulers], state["training"], strict=True):
            holder.load_state_dict(saved)
        record = json.loads((work / "log.json").read_text())
        log = record["epochs"][: state["epoch"]]
        print(f"resuming after epoch {state['epoch']} of {epochs}")

    model.train()
    for epoch in range(len(log), epochs):
        start, total = time.time(), 0.0
        sparse = epoch < args.sparse_epochs
        hook = model.vit.embeddings.register_forward_hook(keep_half) if sparse else None
        torch.manual_seed(args.seed * 10_007 + epoch)
        generator = torch.Generator().manual_seed(args.seed * 10_007 + epoch)
        order = torch.randperm(len(images), generator=generator)[: steps * args.batch_size]
        bar = tqdm(order.split(args.batch_size), desc=f"epoch {epoch + 1}/{epochs}", mininterval=10)
        for batch in bar:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model(pixel_values=normalize(augment(images[batch], generator))).logits
            loss = nn.functional.cross_entropy(logits.float(), labels[batch], label_smoothing=args.label_smoothing)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
            total += loss.item()
        if hook is not None:
            hook.remove()
        log.append(
            {
                "epoch": epoch + 1,
                "patches": "half" if sparse else "all",
                "train_loss": total / steps,
                "test_accuracy": accuracy(model, test_images, test_labels),
                "seconds": round(time.time() - start, 1),
            }
        )
        print(log[-1], flush=True)
        record = {
            "arguments": asdict(args),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "epochs": log,
        }
        (work / "log.json").write_text(json.dumps(record, indent=1))
        state = {
            "model": model.state_dict(),
            "training": [h.state_dict() for h in [*optimizers, *schedulers]],
            "epoch": epoch + 1,
        }
        torch.save(state, work / "checkpoint.tmp")
        os.replace(work / "checkpoint.tmp", checkpoint)

    export(model, args, record, accuracy(model.half().float(), test_images, test_labels))


if __name__ == "__main__":
    main()
