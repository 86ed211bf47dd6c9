"""The tuner as users meet it: get_peft_model, save, load, merge, and what it refuses."""

import copy
import json
import pickle
import warnings

import models
import pytest
import torch
from models import vit_name
from peft import PeftModel, PeftType, get_peft_model

from plastic_peft import PlasticityConfig, measure_plasticity
from plastic_peft.report import PlasticityReport


FIRST, SECOND = vit_name("vit.layers.0.mlp.fc1"), vit_name("vit.layers.1.mlp.fc1")
pytestmark = pytest.mark.versions

OPTIONS = {
    "lora, one role": dict(top_k=1),
    "lora, budget": dict(budget=0.2),
    "lora, ranks by score": dict(fraction=1.0, granularity="module", rank_allocation="proportional", r=4),
    "full, norms": dict(adapter="full", top_k=2),
    "full, everything": dict(adapter="full", fraction=1.0),
}


@pytest.fixture(scope="module")
def report():
    torch.manual_seed(0)
    sources, targets = torch.randn(2, 24, 3, 32, 32)
    return measure_plasticity(models.transformers_model("vit"), targets, sources, progress=False)


def adapted(report, **options):
    return get_peft_model(
        models.transformers_model("vit"), PlasticityConfig(plasticity=report, init_lora_weights=False, **options)
    ).eval()


def logits(model, pixels):
    with torch.no_grad():
        return model(pixel_values=pixels).logits


def test_the_peft_type_is_a_member_like_peft_s_own():
    """Without it saving, copying or looking up the method by name would fail somewhere inside PEFT."""
    member = PeftType("PLASTICITY")
    assert member is PeftType["PLASTICITY"] is PeftType.PLASTICITY and member in list(PeftType)
    assert (member.value, member.name) == ("PLASTICITY", "PLASTICITY")
    assert pickle.loads(pickle.dumps(member)) is member and copy.deepcopy(member) is member
    assert json.dumps({"type": member}) == '{"type": "PLASTICITY"}' and {member: 1}["PLASTICITY"] == 1


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_an_adapter_survives_saving_switching_off_and_merging(report, tmp_path, options):
    """Without it a saved adapter could load other modules or weights, measure again, or merge wrongly."""
    pixels = torch.randn(4, 3, 32, 32)
    base = logits(models.transformers_model("vit"), pixels)
    model = adapted(report, **options)
    changed = logits(model, pixels)
    assert not torch.allclose(changed, base, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(logits(model, pixels), base)

    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert PlasticityReport.load(tmp_path) == report
    (tmp_path / "plasticity_report.json").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = PeftModel.from_pretrained(models.transformers_model("vit"), tmp_path).eval()
    selected = sorted(saved["selected_modules"])
    assert sorted(saved["target_modules"]) == selected
    assert sorted(again.targeted_module_names) == sorted(model.targeted_module_names) == selected
    assert torch.allclose(logits(again, pixels), changed, atol=1e-6)

    model.merge_adapter(safe_merge=True)
    assert torch.allclose(logits(model, pixels), changed, atol=1e-5)
    model.unmerge_adapter()
    assert torch.allclose(logits(model, pixels), changed, atol=1e-5)
    assert torch.allclose(logits(model.merge_and_unload(), pixels), changed, atol=1e-5)


def test_full_adapters_unmerge_bit_for_bit(report):
    """Without it switching a full adapter on and off could let the base model drift."""
    model = adapted(report, adapter="full", fraction=1.0)
    before = {k: v.clone() for k, v in model.state_dict().items() if "base_layer" in k}
    model.merge_adapter()
    model.unmerge_adapter()
    after = model.state_dict()
    assert before and all(torch.equal(after[k], v) for k, v in before.items())


def test_only_selection_and_head_are_trained(report):
    """Without it the budget would not be what is trained, or the new head would stay untrained."""
    for options in ({"budget": 5000}, {"adapter": "full", "top_k": 1}):
        model = adapted(report, **options)
        trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        head = sum(n for name, n in trained.items() if "classifier.modules_to_save" in name)
        wanted = report.select(**options).parameters
        assert head == 32 * 5 + 5 and sum(trained.values()) - head == wanted


def test_many_targets_are_matched_exactly(report):
    """Without it PEFT's shortening of long lists could adapt modules that were not selected."""
    model = adapted(report, fraction=1.0, granularity="module")
    assert len(model.targeted_module_names) == 4 * 6
    assert set(model.peft_config["default"].target_modules) == set(model.targeted_module_names)


def test_without_anything_it_measures_and_says_so():
    """Without it a config without report would adapt nothing, or measure without a word."""
    with pytest.warns(UserWarning, match="measuring on synthetic images"):
        model = get_peft_model(models.transformers_model("vit"), PlasticityConfig(budget=0.1))
    assert model.targeted_module_names and model.peft_config["default"].modules_to_save == ["classifier"]


def test_explicit_targets_win():
    """Without it a user's own choice of modules would be overruled by a measurement."""
    model = get_peft_model(models.transformers_model("vit"), PlasticityConfig(target_modules=[vit_name("q_proj")]))
    assert len(model.targeted_module_names) == 4 and model.peft_config["default"].selected_modules is None


def test_a_mapping_or_a_path_will_do(report, tmp_path):
    """Without it scores from elsewhere, or a report on disk, could not be selected by."""
    scores = {FIRST: 2.0, SECOND: 3.0, vit_name("vit.layers.2.attention.q_proj"): 1.0}
    model = adapted(scores, top_k=2, granularity="module")
    assert model.peft_config["default"].selected_modules == {SECOND: 3.0, FIRST: 2.0}
    path = report.save(tmp_path / "r.json")
    assert adapted(path, top_k=1).targeted_module_names == adapted(report, top_k=1).targeted_module_names


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda r: PlasticityConfig(plasticity=r, budget=0.1, top_k=2), "budget and top_k"),
        (lambda r: PlasticityConfig(plasticity=r, budget=3), "below the first module"),
        (
            lambda r: PlasticityConfig(plasticity={f"{FIRST}3": 1.0}),
            f"Did you mean '{FIRST}'",
        ),
        (lambda r: PlasticityConfig(plasticity={FIRST: float("nan")}), "finite scores"),
        (lambda r: PlasticityConfig(plasticity=r, signal="speed"), "signal='speed'"),
        (lambda r: PlasticityConfig(plasticity=r, adapter="full", use_dora=True), "use_dora"),
    ],
)
def test_bad_configs_are_refused_and_leave_the_model_alone(report, make, message):
    """Without it a mistake in the config would end in half an adapter."""
    model = models.transformers_model("vit")
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, make(report))
    assert [name for name, _ in model.named_modules()] == names
    assert all(p.requires_grad for p in model.parameters())


def test_a_report_of_another_architecture_is_refused(report):
    """Without it a report could be applied to a model that it does not describe."""
    other = models.transformers_model("dinov2")
    with pytest.raises(ValueError, match=r"describes another architecture .*vit\..*\.0\..* is not in this model"):
        get_peft_model(other, PlasticityConfig(plasticity=report, top_k=1))
