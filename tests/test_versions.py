"""The same weights and images give the same structure, selection and adapters under every release, whatever modules are called.

`python tests/test_versions.py` writes what the running release gives into `tests/data`; run it under both lines of
transformers after a change that is meant to change these results.
"""

import json
from pathlib import Path

import models
import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from plastic_peft import (
    AutoPlasticModelForImageClassification,
    PlasticityConfig,
    load_vit_nano,
    measure_plasticity,
    save_adapter,
    vit_nano_source_images,
)
from plastic_peft.components import BLOCK_ROLES, trace
from plastic_peft.data import load_images
from plastic_peft.processors import find_processor


DATA = Path(__file__).parent / "data"
GOLDEN, STRUCTURES = DATA / "vit_nano_digits.json", DATA / "fingerprints.json"
RELEASES = ("transformers4", "transformers5")
OUTPUTS = "outputs.json"
pytestmark = pytest.mark.versions


LATER = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}


def places(report):
    """Module name to its place: block, role, and which projection it is, whatever the release calls it."""
    found = {}
    for row in report.select_rows("module"):
        if row.role in BLOCK_ROLES:
            last = row.name.rpartition(".")[2]
            part = LATER.get(last, last) if row.role == "attention" else ""
            found[row.name] = [row.block, row.role, "o_proj" if part == "dense" else part]
    return found


def outcome():
    model = load_vit_nano()
    digits = load_images("digits")["train"].select(range(40))
    sources = vit_nano_source_images().select(range(40))
    report = measure_plasticity(
        model, digits, sources, tolerance=0, progress=False, image_processor=find_processor(model)
    )
    where = places(report)
    selection = report.select(top_k=12, granularity="module", signal="plasticity")
    result = {
        "fingerprint": report.fingerprint,
        "means": sorted([*where[r.name], round(r.mean, 5)] for r in report.select_rows("module") if r.name in where),
        "selected": [where[name] for name in selection.modules],
    }
    return model, report, where, result


def test_the_selection_is_the_same_under_every_release():
    """Without it a release that renames or reorders modules could silently change what is adapted."""
    wanted = json.loads(GOLDEN.read_text())
    model, report, where, found = outcome()
    assert found["fingerprint"] == wanted["fingerprint"]
    assert [m[:3] for m in found["means"]] == [m[:3] for m in wanted["means"]]
    assert [m[3] for m in found["means"]] == pytest.approx([m[3] for m in wanted["means"]], rel=1e-3)
    assert found["selected"] == wanted["selected"]
    config = PlasticityConfig(plasticity=report, top_k=12, granularity="module", signal="plasticity")
    adapted = get_peft_model(model, config)
    assert sorted(where[name] for name in adapted.targeted_module_names) == sorted(wanted["selected"])


@pytest.mark.parametrize("family", models.FAMILIES)
def test_components_are_the_same_under_every_release(family):
    """Without it blocks, roles or shapes of a family could be read differently where its code is written differently.

    Two fingerprints mean that one release splits what the other fuses.
    """
    structure = trace(models.transformers_model(family), models.example_inputs(family))
    assert structure.fingerprint in json.loads(STRUCTURES.read_text())[family]


# --- adapters made under one release, loaded under another -------------------------------------------------------------


def pixels():
    return torch.linspace(-2, 2, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32).sin()


def outputs(model):
    with torch.no_grad():
        return model(pixel_values=pixels()).logits


def write_adapter(folder):
    """An adapter of vit_nano with ranks of its own, a report, and a module saved whole inside a block."""
    torch.manual_seed(0)
    model, report, _, _ = outcome()
    saved = ["classifier", next(row.name for row in report.select_rows("module", "norm_mlp") if row.block == 3)]
    options = {
        "signal": "plasticity",
        "granularity": "module",
        "top_k": 6,
        "within": "role",
        "r": 4,
        "rank_allocation": "proportional",
    }
    config = PlasticityConfig(plasticity=report, modules_to_save=saved, **options)
    model = get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    save_adapter(model, folder)
    for name in ("README.md", "plasticity.png"):
        (folder / name).unlink()
    ranks = sorted(model.get_submodule(f"base_model.model.{n}").r["default"] for n in model.targeted_module_names)
    (folder / OUTPUTS).write_text(json.dumps({"logits": outputs(model).tolist(), "ranks": ranks}))


def load_by_peft(folder):
    return PeftModel.from_pretrained(load_vit_nano(), folder).eval()


def load_by_transformers(folder):
    model = load_vit_nano()
    model.load_adapter(str(folder))
    return model.eval()


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize(
    "load", [AutoPlasticModelForImageClassification.from_pretrained, load_by_peft, load_by_transformers]
)
def test_adapters_of_every_release_load(release, load):
    """Without it an adapter made under transformers 4 would be lost under 5, or the other way round."""
    folder = DATA / release
    wanted = json.loads((folder / OUTPUTS).read_text())
    model = load(folder)
    torch.testing.assert_close(outputs(model), torch.tensor(wanted["logits"]), rtol=0, atol=1e-4)
    config = model.peft_config["default"]
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = {name: module for name, module in whole.named_modules() if isinstance(module, LoraLayer)}
    assert set(config.selected_modules) == set(layers)
    ranks = sorted(layer.r["default"] for layer in layers.values())
    assert ranks == wanted["ranks"] and len(set(ranks)) > 1


if __name__ == "__main__":
    DATA.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(outcome()[-1]) + "\n")
    known = json.loads(STRUCTURES.read_text()) if STRUCTURES.exists() else {}
    for name in models.FAMILIES:
        found = trace(models.transformers_model(name), models.example_inputs(name)).fingerprint
        known[name] = sorted({*known.get(name, ()), found})
    STRUCTURES.write_text(json.dumps(known, indent=1) + "\n")
    write_adapter(DATA / f"transformers{transformers.__version__.partition('.')[0]}")
