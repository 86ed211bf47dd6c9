"""The small pretrained ViT that the package carries, so that everything can be tried without a network.

Adapters name it `vit_nano`, as its folder is another one on every machine.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedModel, ViTForImageClassification


NAME = "vit_nano"
VIT_NANO = Path(__file__).parent / "assets" / NAME
_INSTALLED = "/".join(VIT_NANO.parts[-3:])


def load_vit_nano(num_labels: int | None = None, **kwargs: Any) -> ViTForImageClassification:
    """Load vit_nano: 1.2 M parameters, 32 x 32 images, patches of 4, 6 blocks, pretrained on CIFAR-10.

    Args:
        num_labels: Labels of a new, untrained head; by default the head for the ten CIFAR-10 labels is kept.
        kwargs: For `from_pretrained`, such as `id2label`, `label2id` or `dtype` (float32 by default).
    """
    import torch
    from transformers import ViTForImageClassification

    if num_labels is not None:
        kwargs["num_labels"] = num_labels
    if {"num_labels", "id2label"} & kwargs.keys():
        kwargs.setdefault("ignore_mismatched_sizes", True)
    if "torch_dtype" not in kwargs:
        kwargs.setdefault("dtype", torch.float32)
    model: ViTForImageClassification = ViTForImageClassification.from_pretrained(VIT_NANO, **kwargs)
    call_by_name(model)
    return model


def located(name: str | os.PathLike[str]) -> str:
    """Where the model `name` lies: this package's folder for `vit_nano` and its folder in any installation, else `name`."""
    name = os.fspath(name)
    packaged = name == NAME or f"/{name}".replace("\\", "/").rstrip("/").endswith(f"/{_INSTALLED}")
    return str(VIT_NANO) if packaged else name


def portable_name(name: str) -> str:
    """`name` as others are to read it: `vit_nano` in the place of its folder."""
    return NAME if located(name) == str(VIT_NANO) else name


def call_by_name(model: PreTrainedModel) -> None:
    """Let reports and cards of a model that was loaded from the package's folder say `vit_nano`."""
    model.config.name_or_path = portable_name(model.config.name_or_path or "")


def vit_nano_source_images() -> datasets.Dataset:
    """One hundred CIFAR-10 training images, ten per label: source images for measuring vit_nano."""
    import datasets
    import pyarrow.parquet

    return datasets.Dataset(pyarrow.parquet.read_table(VIT_NANO / "source_images.parquet"))
