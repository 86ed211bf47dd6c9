"""The tuner as users meet it: get_peft_model, save, load, merge, and what it refuses."""

import copy
import itertools
import json
import pickle
import warnings
from collections import OrderedDict
from dataclasses import replace
from unittest.mock import patch

import models
import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from models import vit_name
from peft import PeftModel, PeftType, get_peft_model
from torch import nn

from plastic_peft import (
    AutoPlasticModelForImageClassification,
    PlasticityConfig,
    export_lora,
    measure_plasticity,
    save_adapter,
)
from plastic_peft.components import trace
from plastic_peft.report import PlasticityReport, lora_cost_per_rank
from plastic_peft.tuner import PlasticityModel
from plastic_peft.tuner.settle import _check_reach


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
    for options in ({"budget": 5000}, {"budget": 1000}, {"top_k": 1}, {"adapter": "full", "top_k": 1}):
        model = adapted(report, **options)
        trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        head = sum(n for name, n in trained.items() if "classifier.modules_to_save" in name)
        wanted = report.select(**options).parameters
        assert head == 32 * 5 + 5 and sum(trained.values()) - head == wanted


@pytest.mark.parametrize("extra", [{"use_dora": True}, {"lora_bias": True}, {"bias": "lora_only"}], ids=str)
@pytest.mark.parametrize("ranks", [{}, {"rank_allocation": "uniform", "r": 2}], ids=["proportional", "uniform"])
def test_a_budget_counts_what_is_trained_beside_the_ranks(report, extra, ranks):
    """Without it DoRA's magnitudes or trained biases would come on top of what the user allowed."""
    model = adapted(report, budget=3000, **extra, **ranks)
    trained = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" not in n)
    assert 2000 < trained <= 3000


def test_norms_are_trained_beside_lora_and_saved_with_it(report, tmp_path):
    """Without it the norms that a budget pays for would stay frozen, or get lost between sessions and in an export."""
    pixels = torch.randn(2, 3, 32, 32)
    model = adapted(report, budget=5000)
    norms = report.select(budget=5000).norms
    assert len(norms) == 8 and set(norms) < set(model.peft_config["default"].modules_to_save)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    changed = logits(model, pixels)
    model.save_pretrained(tmp_path / "adapter")
    export_lora(model, tmp_path / "plain")
    assert json.loads((tmp_path / "plain/adapter_config.json").read_text())["peft_type"] == "LORA"
    for folder in ("adapter", "plain"):
        again = PeftModel.from_pretrained(models.transformers_model("vit"), tmp_path / folder).eval()
        assert torch.allclose(logits(again, pixels), changed, atol=1e-6)
    assert torch.allclose(logits(model.merge_and_unload(), pixels), changed, atol=1e-5)


def test_ranks_and_alphas_given_by_pattern_win(report):
    """Without it what a user asks for by pattern would be covered by the ranks of the selection."""
    options = dict(fraction=1.0, rank_allocation="proportional", r=4)
    model = adapted(report, rank_pattern={FIRST: 5}, alpha_pattern={SECOND: 99}, **options)
    layers = dict(model.get_base_model().named_modules())
    assert layers[FIRST].r["default"] == 5 and layers[SECOND].lora_alpha["default"] == 99
    assert layers[SECOND].r["default"] != 5


def test_ranks_reach_no_module_whose_name_ends_alike(tmp_path):
    """PEFT matches ranks by the end of a name: without it `fc` would give its rank to `block.fc`, on loading too."""

    def model():
        torch.manual_seed(0)
        return nn.Sequential(OrderedDict(fc=nn.Linear(8, 8), a=nn.Sequential(OrderedDict(fc=nn.Linear(8, 8)))))

    def ranks(peft_model):
        layers = peft_model.get_base_model().named_modules()
        return {name: layer.r["default"] for name, layer in layers if hasattr(layer, "lora_A")}

    adapter = get_peft_model(model(), PlasticityConfig(plasticity={"fc": 3.0, "a.fc": 1.0}, budget=128))
    adapter.save_pretrained(tmp_path)
    assert ranks(adapter) == ranks(PeftModel.from_pretrained(model(), tmp_path)) == {"fc": 6, "a.fc": 2}


def test_many_targets_are_matched_exactly(report):
    """Without it PEFT's shortening of long lists could adapt modules that were not selected."""
    model = adapted(report, fraction=1.0, granularity="module")
    assert len(model.targeted_module_names) == 4 * 6
    assert set(model.peft_config["default"].target_modules) == set(model.targeted_module_names)


def test_without_anything_it_measures_and_says_so():
    """Without it a config without report would adapt nothing, or measure without a word."""
    with pytest.warns(UserWarning, match="measuring on synthetic images"):
        model = get_peft_model(models.transformers_model("vit"), PlasticityConfig(budget=0.1))
    assert model.targeted_module_names and model.peft_config["default"].modules_to_save[0] == "classifier"


def test_explicit_targets_win():
    """Without it a user's own choice of modules would be overruled by a measurement."""
    model = get_peft_model(models.transformers_model("vit"), PlasticityConfig(target_modules=[vit_name("q_proj")]))
    assert len(model.targeted_module_names) == 4 and model.peft_config["default"].selected_modules is None


@pytest.mark.parametrize("family", ["vit", "clip", "siglip"])
def test_the_head_is_found_beside_explicit_targets(family):
    """Without it models that keep the image size in a vision config would train with a frozen, random head."""
    model = models.transformers_model(family)
    names = [name for name, _ in model.named_modules() if name.endswith(("fc1", "intermediate.dense"))]
    config = PlasticityConfig(target_modules=names, modules_to_save=["auto", "layernorm"])
    get_peft_model(model, config)
    assert config.modules_to_save == ["classifier", "layernorm"]


def test_options_beside_explicit_targets_are_said_to_be_idle(report):
    """Without it a user could take modules chosen by name for a selection by the report."""
    config = PlasticityConfig(target_modules=[vit_name("q_proj")], plasticity=report, top_k=1)
    with pytest.warns(UserWarning, match="plasticity, top_k has no effect beside explicit target_modules"):
        get_peft_model(models.transformers_model("vit"), config)


def test_an_adapter_that_is_trained_on_keeps_its_report(report, tmp_path):
    """Without it saving an adapter that was loaded by PEFT would drop the report that lies beside it."""
    save_adapter(adapted(report, top_k=1), tmp_path)
    again = PeftModel.from_pretrained(models.transformers_model("vit"), tmp_path, is_trainable=True)
    save_adapter(again, tmp_path)
    assert PlasticityReport.load(tmp_path) == report and (tmp_path / "plasticity.png").is_file()
    (tmp_path / "plasticity_report.json").write_text("{}")
    with pytest.warns(UserWarning, match="loaded without its report"):
        PeftModel.from_pretrained(models.transformers_model("vit"), tmp_path)


def test_a_settled_config_does_not_take_another_report(report):
    """Without it `replace(config, plasticity=other)` would keep the first report's modules and say nothing."""
    config = PlasticityConfig(plasticity=report, top_k=1)
    get_peft_model(models.transformers_model("vit"), config)
    with pytest.raises(ValueError, match="selected_modules.*make a new PlasticityConfig"):
        replace(config, plasticity=report)


def test_a_config_used_again_takes_the_next_model_s_labels():
    """Without it an adapter would be saved with the label names of a model that it was not made for."""
    config = PlasticityConfig(target_modules=[vit_name("mlp.fc1")])
    for names in ("ABCDE", "VWXYZ"):
        model = models.transformers_model("vit")
        model.config.id2label = dict(enumerate(names))
        get_peft_model(model, config)
        assert config.labels == list(names)
    own = PlasticityConfig(target_modules=[vit_name("mlp.fc1")], labels=list("abcde"))
    get_peft_model(models.transformers_model("vit"), own)
    assert own.labels == list("abcde")


def test_a_head_that_cannot_be_looked_for_is_missed_aloud():
    """Without it a head would stay frozen and unsaved without a word, the commonest mistake with PEFT and ViTs."""
    model = models.hand_written("pre_norm")
    config = PlasticityConfig(target_modules=["qkv"])
    with pytest.warns(UserWarning, match="cannot look for the head.*modules_to_save"):
        get_peft_model(model, config)
    assert config.modules_to_save is None


def test_logits_without_a_head_are_missed_aloud():
    """Without it the new head of a segmentation model would stay as it is at random, and nobody would know."""
    model = models.hand_written("pre_norm")
    plain = model.forward
    model.forward = lambda pixels: plain(pixels)[:, None].expand(-1, 4, -1)
    with pytest.warns(UserWarning, match="no linear puts out one row"):
        settle_on(model, PlasticityConfig(target_modules=["fc1"]))


def settle_on(model, config):
    """The tuner's settling, on a model whose structure its images show."""
    with patch("plastic_peft.tuner.settle.trace", lambda model: trace(model, torch.randn(2, 3, 32, 32))):
        return get_peft_model(model, config)


def test_two_heads_of_which_one_s_name_ends_the_other_s_are_both_saved():
    """Without it models with a second head, such as DeiT's for distillation, could be refused."""
    _check_reach(["head", "dist_head"], ["head", "dist_head", "blocks.0.fc"])
    with pytest.raises(ValueError, match="my_head as well"):
        _check_reach(["head"], ["head", "my_head"])


@pytest.mark.parametrize("name", ["torch_encoder_pre", "torch_attention"])
def test_attention_of_torch_takes_lora_from_a_report(name):
    """Without it the attention role of such models would never be selected, or its adapter be passed over in evaluation."""
    model, pixels = models.hand_written(name), torch.randn(2, 48, 3, 32, 32)
    found = measure_plasticity(model, *pixels, progress=False)
    config = PlasticityConfig(plasticity=found, fraction=1.0, modules_to_save=None, init_lora_weights=False)
    assert {row.role for row in found.select_rows("module") if row.block is not None} >= {"attention", "mlp_in"}
    with torch.no_grad():
        base = model(pixels[0, :2])
        adapted = get_peft_model(model, config).eval()
        roles = {row.name: row.role for row in found.select_rows("module")}
        assert {roles[module] for module in config.selected_modules} >= {"attention", "mlp_in", "mlp_out"}
        with_adapter = adapted(pixels[0, :2])
        assert not torch.allclose(with_adapter, base, atol=1e-3)
        assert torch.allclose(adapted.merge_and_unload()(pixels[0, :2]), with_adapter, atol=1e-4)


def test_grouped_convolutions_are_left_out_of_lora():
    """Without it models with depthwise projections, such as CvT, would fail at the default config."""
    found = measure_plasticity(models.hand_written("conv_mlp"), torch.randn(8, 3, 32, 32), progress=False)
    (deep,) = (row for row in found.select_rows("module") if row.name == "blocks.0.mlp.dw")
    assert deep.kind == "GroupedConv2d" and lora_cost_per_rank(deep.kind, deep.shape) == 0
    model = nn.ModuleDict({"a": nn.Conv2d(4, 4, 1, groups=4), "b": nn.Conv2d(4, 4, 1)})
    config = PlasticityConfig(plasticity={"a": 2.0, "b": 1.0}, fraction=1.0, modules_to_save=None)
    get_peft_model(model, config)
    assert list(config.selected_modules) == ["b"]


def test_a_head_whose_name_ends_others_is_refused():
    """Without it peft, which goes by the ends of names, would train modules in full that no budget counts."""
    model = models.hand_written("pre_norm")
    for block in model.blocks:
        block.mlp.head = block.mlp.fc2
        del block.mlp.fc2
        block.mlp.forward = lambda x, mlp=block.mlp: mlp.head(nn.functional.gelu(mlp.fc1(x)))
    report = measure_plasticity(model, torch.randn(8, 3, 32, 32), progress=False)
    with pytest.raises(ValueError, match=r"head is to be trained whole.*blocks\.0\.mlp\.head as well"):
        get_peft_model(model, PlasticityConfig(plasticity=report, top_k=1))
    assert not any(hasattr(module, "lora_A") for module in model.modules())


def test_what_is_saved_whole_by_the_end_of_its_name_is_not_selected(report):
    """Without it a module would be selected that peft wraps as a whole, and the config would fail half-way."""
    model = adapted(report, budget=5000, modules_to_save=[vit_name("mlp.fc1"), "classifier"])
    assert not any(name.endswith("fc1") for name in model.targeted_module_names)


def test_a_config_saved_before_its_use_selects_by_the_same_report(report, tmp_path):
    """Without it a config from disk would measure on synthetic images what the user had measured on real ones."""
    PlasticityConfig(plasticity=report, top_k=1).save_pretrained(tmp_path)
    config = PlasticityConfig.from_pretrained(tmp_path)
    model = get_peft_model(models.transformers_model("vit"), config)
    assert sorted(config.selected_modules) == sorted(adapted(report, top_k=1).targeted_module_names)
    assert model.peft_config["default"].report == report


def test_scores_by_name_are_ranked_module_by_module(report):
    """Without roles there is one component only: `top_k=1` would adapt every module that has a score."""
    scores = {FIRST: 2.0, SECOND: 3.0}
    for number in (1, 1.0, np.int64(1)):
        assert adapted(scores, top_k=number).targeted_module_names == [SECOND]
    assert len(adapted({k: np.float32(v) for k, v in scores.items()}, budget=np.int64(5000)).targeted_module_names) == 2


def test_offloaded_modules_refuse_full_adapters(report):
    """Accelerate puts the original weights back just before a module runs: the adapter would have no effect at all."""
    model = cpu_offload(adapted(report, adapter="full", top_k=1), execution_device="cpu")
    with pytest.raises(ValueError, match="offloaded"):
        model(pixel_values=torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("make", "target", "message"),
    [
        (lambda: nn.TransformerEncoderLayer(16, 2, 32), "norm1", "reads the weights of its parts without"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), "1", "running statistics"),
    ],
)
def test_modules_that_full_adapters_cannot_follow_are_refused(make, target, message):
    """Without it the adapter would silently do nothing, or change the base model's statistics."""
    with pytest.raises(TypeError, match=message):
        get_peft_model(make(), PlasticityConfig(target_modules=[target], adapter="full"))


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
        (lambda r: PlasticityConfig(plasticity={FIRST: 1.0}, signal="shift"), "a mapping with one score per module"),
        (lambda r: PlasticityConfig(plasticity={vit_name("vit.layers.0.layernorm_before"): 1.0}), "layernorm_before"),
        (
            lambda r: PlasticityConfig(plasticity=r, budget=0.1, rank_pattern={"fc1": 3}),
            "ranks that the budget decides",
        ),
        (lambda r: PlasticityConfig(plasticity=r, budget=0.1, bias="all"), "no budget for these covers"),
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
    part = replace(report, rows=tuple(row for row in report.rows if row.block != 1))
    # the same architecture under another prefix
    longer = nn.Module()
    longer.inner, longer.config = models.transformers_model("vit"), models.transformers_model("vit").config
    longer.forward = lambda pixel_values: longer.inner(pixel_values=pixel_values)
    with pytest.raises(ValueError, match=r"too few to translate .*Measure this model"):
        get_peft_model(longer, PlasticityConfig(plasticity=part, top_k=1))
    with pytest.raises(ValueError, match=r"describes another architecture .*vit\..*\.0\..* is not in this model"):
        get_peft_model(other, PlasticityConfig(plasticity=report, top_k=1))


@pytest.mark.parametrize("init", ["pissa", "OLoRA"])
def test_base_weights_survive_an_initialisation_that_fails(init, monkeypatch):
    """Without it a model would have lost its principal components to an adapter that it does not carry."""
    model = models.transformers_model("vit")
    before, modules = copy.deepcopy(model.state_dict()), [name for name, _ in model.named_modules()]
    real, calls = PlasticityModel._create_and_replace, itertools.count()

    def interrupted(*args, **kwargs):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(PlasticityModel, "_create_and_replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        get_peft_model(model, PlasticityConfig(target_modules="all-linear", init_lora_weights=init))
    assert not hasattr(model, "peft_config")
    assert [name for name, _ in model.named_modules()] == modules
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    fc1 = vit_name("mlp.fc1")
    adapted = get_peft_model(model, PlasticityConfig(target_modules=[fc1]), adapter_name="one")
    with pytest.raises(ValueError, match="not supported"):
        adapted.add_adapter("two", PlasticityConfig(target_modules=[fc1, "dropout"]))
    assert list(adapted.peft_config) == list(model.peft_config) == ["one"]


def test_what_is_to_be_saved_has_to_be_there(tmp_path):
    """Without it a head of another name would stay untrained, and the adapter could not be loaded."""
    with pytest.raises(ValueError, match="modules_to_save names 'classifer'.*Did you mean 'classifier'"):
        get_peft_model(
            models.transformers_model("vit"),
            PlasticityConfig(target_modules=["fc1", "dense"], modules_to_save=["classifer"]),
        )
    # peft itself adds names for this task, also where the head is called otherwise
    other = nn.Sequential(OrderedDict(fc1=nn.Linear(4, 4), head=nn.Linear(4, 2)))
    get_peft_model(other, PlasticityConfig(target_modules=["fc1"], task_type="SEQ_CLS", modules_to_save=None))
    config = PlasticityConfig(target_modules=["fc1", "dense"], task_type="SEQ_CLS")
    adapted = get_peft_model(models.transformers_model("vit"), config)
    save_adapter(adapted, tmp_path)
    base = models.transformers_model("vit")
    loaded = AutoPlasticModelForImageClassification.from_pretrained(tmp_path, base_model=base)
    assert [n for n, p in loaded.named_parameters() if "modules_to_save" in n] == [
        n for n, p in adapted.named_parameters() if "modules_to_save" in n
    ]
