"""The same weights and images give the same selection under every supported release, whatever modules are called."""

import json
from pathlib import Path

import pytest

from plastic_peft import PlasticityConfig, load_vit_nano, measure_plasticity, vit_nano_source_images
from plastic_peft.components import BLOCK_ROLES
from plastic_peft.data import load_images
from plastic_peft.images import find_processor


GOLDEN = Path(__file__).parent / "data" / "vit_nano_digits.json"
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
    selection = report.select(top_k=12, granularity="module")
    result = {
        "fingerprint": report.fingerprint,
        "means": sorted([*where[r.name], round(r.mean, 5)] for r in report.select_rows("module") if r.name in where),
        "selected": [where[name] for name in selection.modules],
    }
    return model, report, where, result


def test_the_selection_is_the_same_under_every_release():
    """Without it a release that renames or reorders modules could silently change what is adapted."""
    from peft import get_peft_model

    wanted = json.loads(GOLDEN.read_text())
    model, report, where, found = outcome()
    assert found["fingerprint"] == wanted["fingerprint"]
    assert [m[:3] for m in found["means"]] == [m[:3] for m in wanted["means"]]
    assert [m[3] for m in found["means"]] == pytest.approx([m[3] for m in wanted["means"]], rel=1e-3)
    assert found["selected"] == wanted["selected"]
    adapted = get_peft_model(model, PlasticityConfig(plasticity=report, top_k=12, granularity="module"))
    assert sorted(where[name] for name in adapted.targeted_module_names) == sorted(wanted["selected"])


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(outcome()[-1]) + "\n")
