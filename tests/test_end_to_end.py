"""A user's whole day in real processes, from a measurement to predictions where only `peft` is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from hub_server import HubServer

from plastic_peft.data import load_images
from plastic_peft.embedded import VIT_NANO


DDP = Path(__file__).parents[1] / "examples" / "accelerate" / "ddp_cpu.yaml"
COMMAND = ["-m", "plastic_peft"]
UPLOAD = """
import sys
from huggingface_hub import create_repo, upload_folder

create_repo("ada/digits-lora")
upload_folder(repo_id="ada/digits-lora", folder_path=sys.argv[1])
"""
PLAIN = """
import json, sys
sys.modules["plastic_peft"] = None  # importing it fails from here on
import torch
from huggingface_hub import hf_hub_download
from peft import PeftModel
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

base, folder = sys.argv[1:]
model = AutoModelForImageClassification.from_pretrained(base, num_labels=10, ignore_mismatched_sizes=True)
model = PeftModel.from_pretrained(model, "ada/digits-lora").eval()
labels = json.loads(open(hf_hub_download("ada/digits", "adapter_config.json")).read())["labels"]
processor, rows = AutoImageProcessor.from_pretrained(base), {}
for index in range(24):
    image = Image.open(f"{folder}/{index:02}.png").convert("RGB")
    with torch.no_grad():
        best = model(**processor(image, return_tensors="pt")).logits.softmax(-1)[0].max(-1)
    rows[f"{index:02}.png"] = [labels[int(best.indices)], float(best.values)]
assert not any(name.startswith("plastic_peft.") for name in sys.modules)
print(json.dumps(rows))
"""


def run(*arguments, **environment):
    """Run Python with these arguments to its end; returns standard output."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.timeout(600)
def test_from_measurement_to_predictions_with_plain_peft(tmp_path):
    """Without it each step could work alone and the day as a whole fail, at whatever the next step expects of the last."""
    report, folder, images = tmp_path / "report.json", tmp_path / "run", tmp_path / "images"
    measured = run(*COMMAND, "measure", "--dataset_name", "digits", "--source_name", "vit_nano", "--output", report)
    assert "mlp_in" in measured
    options = ["--report", report, "--budget", "0.03", "--signal", "shift"]
    selection = json.loads(run(*COMMAND, "select", *options, "--json"))

    train = ["-m", "accelerate.commands.launch", "--config_file", DDP, "--num_cpu_threads_per_process", "1", *COMMAND]
    train += ["train", "--dataset_name", "digits", "--output_dir", folder, *options, "--learning_rate", "5e-3"]
    train += ["--max_train_samples", "480", "--per_device_train_batch_size", "16", "--push_to_hub"]
    train += ["--hub_model_id", "ada/digits", "--hub_token", "secret", "--disable_tqdm", "true", "--json"]
    with HubServer({"secret": "ada"}) as hub:
        online = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        online["HF_HOME"] = str(tmp_path / "home")
        first = psutil.Popen(
            [sys.executable, *map(str, train)],
            env={**os.environ, **online},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while first.poll() is None and not (folder / "checkpoint-15" / "whole.json").exists():
            time.sleep(0.01)
        # the ranks would outlive their launcher
        killed = [first, *first.children(recursive=True)]
        for process in killed:
            process.kill()
        psutil.wait_procs(killed)
        assert len(killed) == 3 and not hub.repositories["ada/digits"].files
        results = json.loads(run(*train, **online))
        assert results["processes"] == 2 and results["steps"] == 45
        assert set(results["selection"]) == set(selection["modules"])
        assert results["metrics"]["test_accuracy"] > 0.7

        images.mkdir()
        digits = load_images("digits")["test"].select(range(24))
        for index, row in enumerate(digits):
            row["image"].save(images / f"{index:02}.png")
        predicted = json.loads(
            run(*COMMAND, "predict", "--adapter", "ada/digits", "--images", images, "--top", "1", "--json", **online)
        )
        ours = {Path(row["file"]).name: [row["labels"][0], row["probabilities"][0]] for row in predicted}
        right = [ours[f"{index:02}.png"][0] == str(row["label"]) for index, row in enumerate(digits)]
        assert sum(right) > 12

        run(*COMMAND, "export", "--adapter", "ada/digits", "--output_dir", tmp_path / "lora", **online)
        run("-c", UPLOAD, tmp_path / "lora", **online, HF_TOKEN="secret")
        plain = json.loads(run("-c", PLAIN, VIT_NANO, images, **online).splitlines()[-1])
    assert {name: label for name, (label, _) in plain.items()} == {name: label for name, (label, _) in ours.items()}
    assert [p for _, p in plain.values()] == pytest.approx([p for _, p in ours.values()], abs=1e-4)
