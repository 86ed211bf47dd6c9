"""Run by `accelerate launch` or `torchrun`: measures in one of several ways and writes one report per process."""

import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader, IterableDataset, TensorDataset


sys.path.insert(0, str(Path(__file__).parents[1]))
import models

from plastic_peft import measure_plasticity, plasticity_bounds


def main(way: str, output: str) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(
        cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=way == "dispatched loaders")
    )
    generator = torch.Generator().manual_seed(2)
    sources, targets = torch.randn(2, 45, 3, 32, 32, generator=generator)
    model = models.transformers_model("vit")
    if way == "prepared":
        model = accelerator.prepare(model)
    elif way.startswith("sharded") and not way.endswith("loaders"):
        from torch.distributed.fsdp import fully_shard

        before = plasticity_bounds(model)
        for layer in model.vit.layers:
            fully_shard(layer)
        # accelerate shards what it is given, with its wrapper
        model = get_peft_model(model, LoraConfig(target_modules=["fc1"])) if way == "sharded adapter" else model
        fully_shard(model)
        assert [row.name for row in plasticity_bounds(model).rows] == [row.name for row in before.rows]
    elif way == "zero3":
        model = _split_by_zero3(model)
    elif way == "dies":
        sources = _DiesAt([*sources[:20], *[None] * 25] if accelerator.process_index == 1 else sources)
    elif way.endswith("loaders"):
        loaders = DataLoader(TensorDataset(targets), batch_size=3, shuffle=True), DataLoader(_Streamed(sources))
        targets, sources = accelerator.prepare(*loaders)
    elif way == "different streams":
        targets = iter(targets[accelerator.process_index :])
    report = measure_plasticity(
        model, targets, sources, accelerator=accelerator, batch_size=16, tolerance=0, progress=False
    )
    report.save(Path(output) / f"rank{accelerator.process_index}.json")


def _split_by_zero3(model):
    """DeepSpeed's engine, which holds a part of every weight and lets go of the others after each module."""
    import deepspeed

    stage = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0}
    optimizer = {"type": "Adam", "params": {"torch_adam": True}}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": stage, "optimizer": optimizer}
    before = plasticity_bounds(model)
    engine = deepspeed.initialize(
        model=model, model_parameters=list(model.parameters()), config={**config, "zero_force_ds_cpu_optimizer": False}
    )[0]
    assert all(parameter.numel() == 0 for parameter in model.parameters())
    assert plasticity_bounds(engine) == before
    return engine


class _Streamed(IterableDataset):
    def __init__(self, images):
        self.images = images

    def __iter__(self):
        return iter(self.images)


class _DiesAt:
    """A data set at whose missing image the process is gone, as if the machine had failed."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        if self.images[index] is None:
            os._exit(7)
        return {"pixel_values": self.images[index]}


if __name__ == "__main__":
    main(*sys.argv[1:])
