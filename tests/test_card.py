"""The model card says what the adapter really is, and nothing of the machine that it was made on."""

import pytest
import torch
from models import vit_name
from peft import get_peft_model
from transformers import ViTConfig, ViTForImageClassification

from plastic_peft import PlasticityConfig, measure_plasticity, plasticity_bounds
from plastic_peft.card import model_card


pytestmark = pytest.mark.versions
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
QUERY = vit_name("q_proj")


def vit():
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**TINY, num_labels=3)).eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def report(images):
    return measure_plasticity(vit(), images, max_pairs=8, progress=False)


@pytest.fixture(scope="module")
def report_with_source(images):
    return measure_plasticity(vit(), images, images.flip(0) * 0.5, max_pairs=8, progress=False)


def card_of(base="", card_options=None, **options):
    model = get_peft_model(vit(), PlasticityConfig(**options))
    model.peft_config["default"].base_model_name_or_path = base
    return model_card(model, **(card_options or {}))


def test_card_states_the_ranks_that_the_modules_have(report):
    """A budget sets ranks of its own, and the card would print the rank that was asked for and that no module has."""
    spent = card_of(plasticity=report, budget=0.1, r=8, rank_allocation="proportional")
    model = get_peft_model(vit(), PlasticityConfig(plasticity=report, budget=0.1, r=8, rank_allocation="proportional"))
    ranks = {module.r["default"] for module in model.modules() if getattr(module, "lora_A", None)}
    assert len(ranks) > 1 and ranks != {8}
    assert f"modules with an adapter of rank {min(ranks)} to {max(ranks)}, and `classifier`" in str(spent)
    pattern = model.peft_config["default"].rank_pattern
    assert all(
        f"rank {rank})" in next(r for r in str(spent).splitlines() if name in r) for name, rank in pattern.items()
    )
    lowest = card_of(target_modules=[QUERY], rank_pattern={QUERY: 1})
    assert "3 modules with an adapter of rank 1," in str(lowest) and "rank 1)" not in str(lowest)
    full = card_of(plasticity=report, adapter="full", top_k=1)
    assert "modules with trained weights, and" in str(full) and "rank" not in str(full)


@pytest.mark.parametrize(
    "options, said",
    [
        ({}, "modules selected by shift, the highest first"),
        ({"signal": "plasticity"}, "modules selected by plasticity, the highest first"),
        ({"order": "lowest"}, "modules selected by shift, the lowest first"),
        ({"order": "random"}, "modules chosen at random"),
    ],
)
def test_card_says_what_the_modules_were_selected_by(options, said, report_with_source):
    """Readers would take a selection by shift, a control or a choice by hand for one by plasticity."""
    text = str(card_of(plasticity=report_with_source, top_k=1, **options))
    assert f"holds low-rank adapters of {said}, and the whole weights of `classifier`. Made" in text
    assert "| plasticity | lowest | highest | shift |" in text


def test_card_names_what_is_trained_in_full_in_its_list(report):
    """With the norms of all blocks among them, the names would bury the sentence that they stand in."""
    norms = [row.name for row in report.select_rows("module") if "norm" in row.kind.lower() and row.block is not None]
    text = str(card_of(target_modules=[QUERY], modules_to_save=["classifier", *norms]))
    assert "3 modules with an adapter of rank 8, and `classifier` and 6 others trained in full<" in text
    assert all(f"- `{name}` (trained in full)\n" in text for name in ("classifier", *norms))
    two = str(card_of(target_modules=[QUERY], modules_to_save=["classifier", norms[0]]))
    assert "and the whole weights of `classifier` and 1 other. Made" in two


def test_card_does_not_call_a_choice_by_hand_a_measurement(report):
    """Somebody else's choice of modules would pass for the result of this method."""
    scores = {row.name: 1.0 for row in report.select_rows("module", "mlp_in")}
    assert "modules selected by scores given by hand, the highest first" in str(card_of(plasticity=scores, top_k=2))
    text = str(card_of(target_modules=[QUERY], modules_to_save=None))
    assert "adapters of modules chosen by name. Made" in text
    bounds = str(card_of(target_modules=[QUERY], card_options={"report": plasticity_bounds(vit())}))
    assert "Upper bounds" in bounds and "pairs" not in bounds
    assert "| shift |" not in str(card_of(plasticity=report, top_k=1))


def test_card_keeps_local_paths_to_itself(report, tmp_path, monkeypatch):
    """A pushed card would publish user names and folders, and link to strangers' repositories of the same name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "photos").mkdir(parents=True)
    (tmp_path / "models" / "base").mkdir(parents=True)
    (tmp_path / "photos").mkdir()
    for dataset in (str(tmp_path / "data" / "photos"), "data/photos", "photos", "./photos/"):
        for base in (str(tmp_path / "models" / "base"), "models/base"):
            options = {"dataset": dataset, "metrics": {"accuracy": 0.5}}
            card = card_of(base, options, plasticity=report, top_k=1)
            text = str(card)
            assert card.data.datasets is None and card.data.base_model is None
            assert card.data.eval_results[0].dataset_type == "local"
            assert "An adapter for `base`, trained on photos." in text and "## Results on photos" in text
            assert str(tmp_path) not in text and "data/" not in text and "models/base" not in text
            assert 'from_pretrained("user/name", base_model="path/to/base")' in text
            assert 'AutoModelForImageClassification.from_pretrained("path/to/base", num_labels=3' in text
    digits = card_of("user/base", {"dataset": "digits"}, plasticity=report, top_k=1)
    assert digits.data.datasets is None and "trained on digits" in str(digits)


def test_card_links_what_is_on_the_hub(report):
    """The Hub lists adapters under their base model and data set by these entries alone."""
    options = {"dataset": "user/animals", "metrics": {"accuracy": 0.5}}
    card = card_of("user/base", options, plasticity=report, top_k=1)
    assert card.data.base_model == "user/base" and card.data.datasets == "user/animals"
    assert card.data.eval_results[0].dataset_type == "user/animals"
    assert "base_model=" not in str(card)
