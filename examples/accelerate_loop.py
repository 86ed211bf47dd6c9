"""The same fine-tuning as a loop written by hand; on several processes: accelerate launch examples/accelerate_loop.py"""

import sys

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor

from plastic_peft import PlasticityConfig, load_vit_nano, measure_plasticity, save_adapter, vit_nano_source_images
from plastic_peft.data import collate, load_images, transform_of, with_pixels
from plastic_peft.embedded import VIT_NANO
from plastic_peft.train import shard_by_block


def main(output: str = "runs/digits-loop", epochs: int = 2) -> float:
    # `--cpu` on the command line, because accelerate's own --cpu starts one process only
    accelerator = Accelerator(cpu="--cpu" in sys.argv)
    set_seed(0)
    with accelerator.main_process_first():
        data = load_images("digits", seed=0)
    processor = AutoImageProcessor.from_pretrained(VIT_NANO)
    splits = {split: with_pixels(images, processor) for split, images in data.items()}
    train = DataLoader(splits["train"], batch_size=32, shuffle=True, collate_fn=collate)
    test = DataLoader(splits["test"], batch_size=64, collate_fn=collate)

    model = load_vit_nano(num_labels=10).to(accelerator.device)
    # every process measures its share, and all get the same report; before `prepare`, so that the selection is settled
    # when the optimizer is made
    source = with_pixels(vit_nano_source_images(), processor)
    report = measure_plasticity(model, splits["train"], source, accelerator=accelerator)
    model = get_peft_model(model, PlasticityConfig(plasticity=report, budget=0.03, lora_alpha=16))

    shard_by_block(model, accelerator)  # does nothing unless the launch is configured for FSDP
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3, weight_decay=0.0)
    model, optimizer, train, test = accelerator.prepare(model, optimizer, train, test)
    for epoch in range(epochs):
        model.train()
        transform_of(splits["train"]).set_epoch(epoch)
        for batch in train:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()

    model.eval()
    right = total = 0
    for batch in test:
        with torch.no_grad():
            predicted = model(pixel_values=batch["pixel_values"]).logits.argmax(-1)
        predicted, labels = accelerator.gather_for_metrics((predicted, batch["labels"]))
        right, total = right + int((predicted == labels).sum()), total + len(labels)
    accelerator.print(f"test accuracy {right / total:.4f} on {accelerator.num_processes} process(es)")
    weights = accelerator.get_state_dict(model)  # on every process: each may hold a part of the weights
    if accelerator.is_main_process:
        save_adapter(accelerator.unwrap_model(model), output, image_processor=processor, state_dict=weights)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return right / total


if __name__ == "__main__":
    main(*[argument for argument in sys.argv[1:] if not argument.startswith("--")][:1])
