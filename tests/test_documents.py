"""What users read first runs as printed: the README's example, the notebook, the demo."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]


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


@pytest.mark.timeout(600)
def test_the_demo_runs_and_says_what_it_did(tmp_path):
    """Without it the first command that a user types could fail or end without its summary."""
    done = subprocess.run(
        [sys.executable, "-m", "plastic_peft.demo", str(tmp_path / "out")], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-2000:]
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
    from plastic_peft.images import find_processor

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
