"""Fine-tune the packaged ViT on scikit-learn's digits with a plain Trainer: python examples/trainer_script.py [output]"""

import sys

from peft import get_peft_model
from transformers import AutoImageProcessor, Trainer, TrainingArguments

from plastic_peft import PlasticityCallback, PlasticityConfig, load_vit_nano, measure_plasticity, vit_nano_source_images
from plastic_peft.data import collate, load_images, with_pixels
from plastic_peft.embedded import VIT_NANO
from plastic_peft.train import compute_metrics


data = load_images("digits", seed=0)
processor = AutoImageProcessor.from_pretrained(VIT_NANO)
data = {split: with_pixels(images, processor) for split, images in data.items()}
model = load_vit_nano(num_labels=10)

report = measure_plasticity(model, data["train"], with_pixels(vit_nano_source_images(), processor))
model = get_peft_model(model, PlasticityConfig(plasticity=report, budget=0.03, lora_alpha=16))
model.print_trainable_parameters()

arguments = TrainingArguments(
    output_dir=sys.argv[1] if len(sys.argv) > 1 else "runs/digits",
    num_train_epochs=2,
    per_device_train_batch_size=32,
    learning_rate=5e-3,
    remove_unused_columns=False,  # or the trainer drops the images
    label_names=["labels"],  # or it finds no labels behind a PEFT model
)
trainer = Trainer(
    model, arguments, collate, data["train"], data["validation"], processor, compute_metrics=compute_metrics
)
trainer.add_callback(PlasticityCallback(data["validation"].select(range(64)), every=25))
trainer.train()
print(trainer.evaluate(data["test"], metric_key_prefix="test"))
trainer.save_model()
