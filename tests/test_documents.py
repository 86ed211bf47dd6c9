"""What users read first runs as printed: the README's example, the notebook, the demo."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
LAUNCH = ["-m", "accelerate.commands.launch", "--num_cpu_threads_per_process", "1"]


def run_process(*arguments, timeout=500):
    """Run Python with these arguments; returns what it printed."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def accuracy_of_saved(adapter):
    """Accuracy of a saved adapter on the test digits of the examples, in this process."""
    import torch

    from plastic_peft import AutoPlasticModelForImageClassification
    from plastic_peft.data import load_images, with_pixels

    model = AutoPlasticModelForImageClassification.from_pretrained(adapter).eval()
    rows = with_pixels(load_images("digits", seed=0)["test"], model.image_processor)[:]
    with torch.no_grad():
        predicted = model(rows["pixel_values"]).logits.argmax(-1)
    return (predicted == torch.tensor(rows["labels"])).float().mean().item()


def test_the_readme_example_runs_as_printed(tmp_path, monkeypatch, capsys):
    """Without it the first thing that a user copies could fail."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    scope = {}
    for block in blocks:
        exec(block, scope)
    assert "trainable params" in capsys.readouterr().out
    saved = json.loads((tmp_path / "digits-adapter" / "adapter_config.json").read_text())
    assert sorted(saved["target_modules"]) == sorted(scope["again"].targeted_module_names)
    assert (tmp_path / "plasticity.png").exists()


def test_the_training_guide_runs_as_printed(tmp_path, monkeypatch):
    """Without it the guide could show steps that no longer fit together, or commands that nobody can start."""
    guide = (ROOT / "docs" / "training.md").read_text()
    monkeypatch.chdir(tmp_path)
    scope = {}
    for block in re.findall(r"```python\n(.*?)```", guide, flags=re.S):
        exec(block, scope)
    trainer, test = scope["trainer"], scope["with_pixels"](scope["data"]["test"], scope["processor"])
    accuracy = trainer.predict(test).metrics["test_accuracy"]
    assert accuracy > 0.8
    assert accuracy_of_saved("run") == pytest.approx(accuracy, abs=1e-4)

    shutil.rmtree("run")
    small = {"dataset_name": "digits", "output_dir": "shared", "budget": 0.05, "max_steps": 2, "max_train_samples": 64}
    Path("config.yaml").write_text(json.dumps(small))
    commands = "\n".join(re.findall(r"```bash\n(.*?)```", guide, flags=re.S)).splitlines()
    programs = Path(sys.executable).parent
    for start, more in {"plastic-peft train": "--max_train_samples 64 --max_steps 2", "torchrun": ""}.items():
        (command,) = (command for command in commands if command.startswith(start))
        done = subprocess.run(f"{programs}/{command} {more}", shell=True, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    assert [json.loads(Path(folder, "results.json").read_text())["processes"] for folder in ("run", "shared")] == [1, 2]


def test_the_notebook_runs_from_start_to_end(tmp_path):
    """Without it a cell of the notebook could fail after a change of the package."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))
    accuracy = float(re.search(r"test accuracy ([\d.]+)%", printed).group(1))
    assert accuracy > 60
    assert re.search(r"predicted (\d) written \d", printed)


def test_the_trainer_script_runs_as_printed(tmp_path):
    """Without it the script that people start from could have lost its images, its labels or its curve."""
    done = run_process(EXAMPLES / "trainer_script.py", tmp_path)
    accuracy = float(re.search(r"'test_accuracy': '?([\d.]+)", done.stdout).group(1))
    assert accuracy > 0.85
    assert accuracy_of_saved(tmp_path) == pytest.approx(accuracy, abs=1e-4)
    assert json.loads((tmp_path / "plasticity_curve.json").read_text())["steps"] == [0, 25, 50, 75]


@pytest.mark.parametrize("config", ["ddp_cpu", "fsdp_full_shard"])
def test_the_loop_runs_on_two_processes_and_its_adapter_loads_in_one(tmp_path, config):
    """Without it a sharded run could save parts of weights, or the shipped configurations could fail at the first step."""
    worker = [ROOT / "tests" / "workers" / "sharded.py"] if config == "fsdp_full_shard" else []
    launch = [*LAUNCH, "--config_file", EXAMPLES / "accelerate" / f"{config}.yaml", *worker]
    done = run_process(*launch, EXAMPLES / "accelerate_loop.py", tmp_path, "--cpu")
    accuracy, processes = re.search(r"test accuracy ([\d.]+) on (\d) process", done.stdout).groups()
    assert int(processes) == 2 and float(accuracy) > 0.85
    assert "every process holds the whole model" not in done.stderr
    assert accuracy_of_saved(tmp_path) == pytest.approx(float(accuracy), abs=0.01)
    assert (tmp_path / "plasticity_report.json").is_file()


@pytest.mark.timeout(600)
def test_the_demo_runs_and_says_what_it_did(tmp_path):
    """Without it the first command that a user types could fail or end without its summary."""
    done = run_process("-m", "plastic_peft.demo", tmp_path / "out")
    assert "Warning" not in done.stderr
    before, after = map(float, re.search(r"test accuracy +([\d.]+)% before, ([\d.]+)% after", done.stdout).groups())
    assert before < 30 < 90 < after
    assert {"adapter_model.safetensors", "adapter_config.json", "plasticity_report.json"} <= {
        path.name for path in (tmp_path / "out" / "adapter").iterdir()
    }
    assert (tmp_path / "out" / "plasticity.png").stat().st_size > 10_000


def test_vit_nano_is_what_its_card_says():
    """Without it the embedded model could be untrained, too large, or lose its labels."""
    import torch

    from plastic_peft import load_vit_nano, vit_nano_source_images
    from plastic_peft.embedded import VIT_NANO
    from plastic_peft.processors import find_processor

    model = load_vit_nano().eval()
    assert sum(p.numel() for p in model.parameters()) == 1_205_898
    assert (VIT_NANO / "model.safetensors").stat().st_size < 4_000_000
    images = vit_nano_source_images()
    pixels = find_processor(model)(images=[row["image"].convert("RGB") for row in images], return_tensors="pt")
    with torch.no_grad():
        predicted = model(**pixels).logits.argmax(-1).tolist()
    assert sum(p == row["label"] for p, row in zip(predicted, images, strict=True)) > 70
    assert model.config.id2label[0] == "airplane"
    assert load_vit_nano(num_labels=3).classifier.out_features == 3
