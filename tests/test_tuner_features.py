"""Everything that a PeftModel offers, for both adapter modes; `feature_table` writes docs/features.md from these tests."""

import copy
import json
import pickle

import pytest
import torch
from accelerate import cpu_offload
from feature_table import PAGE, feature, page
from models import quantised_vit_nano, transformers_model, vit_name
from peft import (
    EvaConfig,
    PeftMixedModel,
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    initialize_lora_eva_weights,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import PeftType
from peft.utils.hotswap import hotswap_adapter
from torch import nn

from plastic_peft import PlasticityConfig, export_lora, measure_plasticity, save_adapter
from plastic_peft.tuner import FullLayer


NAMES = ("vit.layers.0.mlp.fc1", "vit.layers.1.mlp.fc2", "vit.layers.2.attention.q_proj")
FC1, FC2, QUERY = map(vit_name, NAMES)
EVERY_FC1 = vit_name("mlp.fc1")
pytestmark = pytest.mark.versions
EVERY = {"fraction": 1.0, "granularity": "module"}
HEADLESS = {"modules_to_save": None}
OTHER = {"lora": "full", "full": "lora"}


@pytest.fixture
def base():
    return transformers_model("vit").eval()


@pytest.fixture
def pixels():
    return torch.randn(2, 3, 32, 32)


def chosen(adapter, *names, **options):
    """A config that selects `names` by their scores and starts away from the base model."""
    scores = {name: 1.0 / place for place, name in enumerate(names or (FC1, FC2), 1)}
    return PlasticityConfig(
        **{"plasticity": scores, "adapter": adapter, "init_lora_weights": False, **EVERY, **options}
    )


def logits(model, pixels):
    with torch.no_grad():
        return model(pixel_values=pixels).logits


def trained(model):
    """As after training: every trainable weight, the head's among them, is another one."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def state(model):
    """Modules, flags and values of a model, for comparing."""
    modules = [(name, type(module)) for name, module in model.named_modules()]
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return modules, flags, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model, before):
    modules, flags, tensors = state(model)
    assert (modules, flags) == before[:2]
    assert all(torch.equal(tensors[name], tensor) for name, tensor in before[2].items())


# --- adapters on a model -----------------------------------------------------------------------------------------------


@feature("Several adapters with different selections (`add_adapter`, `set_adapter`)")
def test_several_adapters(base, pixels, adapter):
    """Switching between adapters would leave the other's weights in effect or in training."""
    model = get_peft_model(base, chosen(adapter, FC1), adapter_name="one").eval()
    one = logits(model, pixels)
    model.add_adapter("two", chosen(adapter, FC1, FC2))
    assert torch.equal(logits(model, pixels), one)
    model.set_adapter("two")
    two = logits(model, pixels)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all(".two." in name for name in trained)
    model.set_adapter("one")
    assert torch.equal(logits(model, pixels), one) and not torch.allclose(one, two)


@feature("LoRA and full adapters on one model, on different modules")
def test_both_modes_on_one_model(base, pixels, adapter):
    """A model could not carry adapters of both modes, or one would disturb the other."""
    model = get_peft_model(base, chosen(adapter, FC1, **HEADLESS), adapter_name="one").eval()
    one = logits(model, pixels)
    model.add_adapter("two", chosen(OTHER[adapter], FC2, **HEADLESS))
    assert torch.equal(logits(model, pixels), one)
    model.base_model.set_adapter(["one", "two"])
    both = logits(model, pixels)
    merged = copy.deepcopy(model).merge_and_unload()
    assert not torch.allclose(both, one) and torch.allclose(logits(merged, pixels), both, atol=1e-5)


SECOND = "already has an adapter of the other mode"


@feature("LoRA and full adapters on one module", lora=SECOND, full=SECOND)
def test_both_modes_on_one_module(base, pixels, adapter):
    """The second adapter would be ignored, or wrap the first."""
    model = get_peft_model(base, chosen(OTHER[adapter], FC1))
    before, names = state(model), list(model.peft_config)
    try:
        model.add_adapter("two", chosen(adapter, FC2, FC1))
    finally:
        assert_same_state(model, before)
        assert list(model.peft_config) == names


@feature("Several active adapters at once (without a saved head, of which PEFT allows one)")
def test_several_active_adapters(base, pixels, adapter):
    """The changes of two active adapters would not add up, or merging them would give something else."""
    model = get_peft_model(base, chosen(adapter, FC1, **HEADLESS), adapter_name="one").eval()
    model.add_adapter("two", chosen(adapter, FC1, **HEADLESS))
    model.base_model.set_adapter(["one", "two"])
    layer = model.get_submodule(f"base_model.model.{FC1}")
    x = torch.randn(3, layer.in_features)
    delta = layer.get_delta_weight("one") + layer.get_delta_weight("two")
    biases = sum(p["bias"] - layer.base_layer.bias for p in layer.lora_full.values()) if adapter == "full" else 0
    assert torch.allclose(layer(x) - layer.base_layer(x), x @ delta.T + biases, atol=1e-5)


@feature("`delete_adapter`")
def test_delete_adapter(base, pixels, adapter):
    """A deleted adapter would stay in the weights, or take another one with it."""
    before = logits(base, pixels)
    model = get_peft_model(base, chosen(adapter, FC1), adapter_name="one").eval()
    model.add_adapter("two", chosen(adapter, FC1, FC2))
    model.set_adapter("two")
    model.delete_adapter("two")
    assert not any(".two." in name for name in model.state_dict())
    model.set_adapter("one")
    assert not torch.allclose(logits(model, pixels), before)
    assert torch.equal(logits(model.unload(), pixels), before)


@feature("`disable_adapter`, `disable_adapter_layers`")
def test_disable_adapter(base, pixels, adapter):
    """The base model could not be seen through its adapter, bit for bit."""
    before = logits(base, pixels)
    model = get_peft_model(base, chosen(adapter)).eval()
    adapted = logits(model, pixels)
    with model.disable_adapter():
        assert torch.equal(logits(model, pixels), before)
    assert torch.equal(logits(model, pixels), adapted)
    model.base_model.disable_adapter_layers()
    assert torch.equal(logits(model, pixels), before)


@feature("`merge_adapter` and `unmerge_adapter`")
def test_merge_and_unmerge(base, pixels, adapter):
    """Merging would change what the model says, or unmerging would leave traces in the base weights."""
    model = get_peft_model(base, chosen(adapter)).eval()
    adapted = logits(model, pixels)
    before = state(model)
    model.merge_adapter()
    merged = logits(model, pixels)
    model.unmerge_adapter()
    if adapter == "full":
        assert torch.equal(merged, adapted)
        assert_same_state(model, before)
    assert torch.allclose(merged, adapted, atol=1e-5)
    assert torch.allclose(logits(model, pixels), adapted, atol=1e-5)


@feature("`merge_and_unload(safe_merge=True)`")
def test_merge_and_unload(base, pixels, adapter):
    """A merged model would differ from the adapted one, or a broken adapter would be merged without a word."""
    names = set(base.state_dict())
    model = get_peft_model(base, chosen(adapter)).eval()
    adapted = logits(model, pixels)
    broken = copy.deepcopy(model)
    merged = model.merge_and_unload(safe_merge=True)
    assert set(merged.state_dict()) == names and torch.allclose(logits(merged, pixels), adapted, atol=1e-5)
    assert not any(isinstance(module, BaseTunerLayer) for module in merged.modules())
    next(p for n, p in broken.named_parameters() if "lora_" in n and FC1 in n).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaNs detected"):
        broken.merge_and_unload(safe_merge=True)


@feature("Merging some of the adapters (`merge_adapter(adapter_names=...)`)")
def test_merge_by_name(base, pixels, adapter):
    """Merging one adapter would merge the others as well, or unmerging would leave one of them behind."""
    model = get_peft_model(base, chosen(adapter, FC1, **HEADLESS), adapter_name="one").eval()
    model.add_adapter("two", chosen(adapter, FC1, FC2, **HEADLESS))
    two = copy.deepcopy(model)
    two.set_adapter("two")
    model.merge_adapter(adapter_names=["two"])
    assert torch.allclose(logits(model, pixels), logits(two, pixels), atol=1e-5)
    model.unmerge_adapter()
    merged = model.merge_and_unload(adapter_names=["two"])
    assert torch.allclose(logits(merged, pixels), logits(two, pixels), atol=1e-5)


@feature("Merging an adapter that is not active, with its head")
def test_merge_an_inactive_adapter(base, pixels, adapter):
    """One adapter's weights would be merged with the head of another."""
    model = trained(get_peft_model(base, chosen(adapter, FC1), adapter_name="one"))
    model.add_adapter("two", chosen(adapter, FC1, FC2))
    model.set_adapter("two")
    two = logits(trained(model), pixels)
    model.set_adapter("one")
    one = logits(model, pixels)
    merged = copy.deepcopy(model).merge_and_unload(adapter_names=["two"])
    assert torch.allclose(logits(merged, pixels), two, atol=1e-5)
    model.merge_adapter(adapter_names=["two"])
    assert torch.allclose(logits(model, pixels), two, atol=1e-5)
    model.unmerge_adapter()
    assert torch.allclose(logits(model, pixels), one, atol=1e-5)
    with pytest.raises(ValueError, match="one and two each have classifier of their own"):
        model.merge_adapter(adapter_names=["one", "two"])
    assert torch.allclose(logits(model, pixels), one, atol=1e-5)
    # the head follows however the adapter is taken out again
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.merge_adapter(adapter_names=["two"])
    with pytest.raises(ValueError, match="two and one each have classifier of their own"):
        model.merge_adapter(adapter_names=["one"])
    with model.disable_adapter():
        logits(model, pixels)
    assert torch.allclose(logits(model, pixels), one, atol=1e-5)
    model.merge_adapter(adapter_names=["two"])
    model.set_adapter("two")
    assert torch.allclose(logits(model, pixels), two, atol=1e-5)
    model.set_adapter("one")
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.merge_adapter(adapter_names=["two"])
    model.delete_adapter("one")
    model.set_adapter("two")
    assert torch.allclose(logits(model, pixels), two, atol=1e-5)
    model.merge_adapter()
    assert torch.allclose(logits(model.unload(), pixels), logits(transformers_model("vit").eval(), pixels), atol=1e-5)


@feature("`unload`")
def test_unload(base, pixels, adapter):
    """Taking the adapter off would not give the base model back."""
    before = state(base)
    assert_same_state(trained(get_peft_model(base, chosen(adapter))).unload().requires_grad_(True), before)


@feature("One adapter per sample (`adapter_names=`)", full="adapter_names mixes adapters inside a batch")
def test_mixed_batch(base, pixels, adapter):
    """Samples of a mixed batch would get another adapter's output."""
    model = get_peft_model(base, chosen(adapter, FC1), adapter_name="one").eval()
    model.add_adapter("two", chosen(adapter, FC1, FC2))
    # a full adapter on the side must not reach samples that do not name it
    model.add_adapter("side", chosen(OTHER[adapter], QUERY))
    expected = []
    for name in ("one", "two"):
        model.set_adapter(name)
        expected.append(logits(model, pixels))
    model.set_adapter("side")
    with torch.no_grad():
        mixed = model(pixel_values=pixels, adapter_names=["one", "two"]).logits
    assert torch.allclose(mixed[0], expected[0][0], atol=1e-5) and torch.allclose(mixed[1], expected[1][1], atol=1e-5)


@feature("`add_weighted_adapter`", full="add_weighted_adapter combines LoRA weights")
def test_add_weighted_adapter(base, pixels, adapter):
    """A combination of adapters with different selections would lose modules of one of them."""
    model = get_peft_model(base, chosen(adapter, FC1, **HEADLESS), adapter_name="one").eval()
    model.add_adapter("two", chosen(adapter, FC1, FC2, **HEADLESS))
    model.base_model.set_adapter(["one", "two"])
    both = logits(model, pixels)
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    assert torch.allclose(logits(model, pixels), both, atol=1e-5)
    assert set(model.peft_config["sum"].selected_modules) == {FC1, FC2}
    assert set(model.peft_config["one"].selected_modules) == {FC1}


@feature("`add_weighted_adapter` with heads and ranks of their own", full="add_weighted_adapter combines LoRA weights")
def test_add_weighted_adapter_with_heads(base, pixels, adapter, tmp_path):
    """The combination would have an untrained head, or ranks that its file does not have."""
    options = dict(r=4, rank_allocation="proportional" if adapter == "lora" else None)
    model = trained(get_peft_model(base, chosen(adapter, FC1, FC2, **options), adapter_name="one"))
    one = logits(model, pixels)
    model.add_weighted_adapter(["one"], [1.0], "same", combination_type="linear")
    model.set_adapter("same")
    assert torch.allclose(logits(model, pixels), one, atol=1e-5)
    model.save_pretrained(tmp_path, selected_adapters=["same"])
    save_adapter(model, tmp_path / "whole", adapter_name="same")
    export_lora(model, tmp_path / "export", adapter_name="same")
    for folder in ("same", "whole", "export"):
        loaded = PeftModel.from_pretrained(transformers_model("vit"), tmp_path / folder).eval()
        assert torch.allclose(logits(loaded, pixels), one, atol=1e-5)
    model.add_weighted_adapter(["one"], [0.5], "same", combination_type="linear")
    assert torch.allclose(logits(model, pixels), one, atol=1e-5)
    model.add_adapter("headless", chosen(adapter, FC1, **HEADLESS, **options))
    model.add_weighted_adapter(["headless", "one"], [0.5, 0.5], "later", combination_type="svd", svd_rank=2)
    assert "later" in model.base_model.model.classifier.modules_to_save
    model.add_adapter("two", chosen(adapter, FC1, FC2, **options))
    model.add_weighted_adapter(["one"], [0.5], "less", combination_type="linear")
    heads = model.base_model.model.classifier.modules_to_save
    mean = (heads["one"].weight + base.classifier.original_module.weight) / 2
    assert torch.allclose(heads["less"].weight, mean, atol=1e-6)
    with pytest.raises(ValueError, match="the same module with modules_to_save"):
        model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "both", combination_type="linear")


MIXED = "is not compatible with the `PeftMixedModel`"


@feature("`PeftMixedModel` (`get_peft_model(mixed=True)`)", lora=MIXED, full=MIXED)
def test_mixed_model(base, adapter):
    """Mixing with other methods would fail somewhere inside PEFT."""
    assert isinstance(get_peft_model(base, chosen(adapter), mixed=True), PeftMixedModel)


@feature("`inject_adapter_in_model`, `get_peft_model_state_dict`, `set_peft_model_state_dict`")
def test_inject_adapter(base, pixels, adapter):
    """Libraries that inject adapters without a PeftModel could not use the method."""
    fresh = copy.deepcopy(base)
    model = inject_adapter_in_model(chosen(adapter), base).eval()
    weights = get_peft_model_state_dict(model)
    other = inject_adapter_in_model(chosen(adapter), fresh).eval()
    assert not torch.allclose(logits(other, pixels), logits(model, pixels))
    assert not set_peft_model_state_dict(other, weights).unexpected_keys
    assert torch.equal(logits(other, pixels), logits(model, pixels))


@feature("`set_requires_grad`, `set_adapter(inference_mode=True)`")
def test_gradient_flags(base, adapter):
    """Adapters could not be frozen and thawed by name."""
    model = get_peft_model(base, chosen(adapter, FC1), adapter_name="one")
    model.add_adapter("two", chosen(adapter, FC2))

    def trained():
        names = [name.split(".") for name, parameter in model.named_parameters() if parameter.requires_grad]
        return {part for name in names for part in name if part in ("one", "two")}

    assert trained() == {"one"}
    model.set_requires_grad("two")
    assert trained() == {"one", "two"}
    model.set_requires_grad(["one", "two"], requires_grad=False)
    assert trained() == set()
    model.set_adapter("two")
    assert trained() == {"two"}
    model.set_adapter("one", inference_mode=True)
    assert trained() == set()


@feature("`rescale_adapter_scale`", full="scaling is only supported for models with `LoraLayer`s")
def test_rescale(base, pixels, adapter):
    """The strength of an adapter could not be turned down for a call."""
    model = get_peft_model(base, chosen(adapter)).eval()
    with model.disable_adapter():
        before = logits(model, pixels)
    adapted = logits(model, pixels)
    with rescale_adapter_scale(model, 0.0):
        assert torch.allclose(logits(model, pixels), before, atol=1e-6)
    assert torch.equal(logits(model, pixels), adapted)


@feature("`copy.deepcopy`, `torch.save` of the whole model")
def test_whole_model_is_copied_and_saved(base, pixels, adapter, tmp_path):
    """Averages of weights and plain checkpoints, which copy or pickle the model, would fail."""
    model = get_peft_model(base, chosen(adapter)).eval()
    torch.save(model, tmp_path / "model.pt")
    for again in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(logits(again, pixels), logits(model, pixels))
        assert again.peft_config["default"].to_dict() == model.peft_config["default"].to_dict()


# --- saving and loading ------------------------------------------------------------------------------------------------


@feature("`save_pretrained`, `from_pretrained`, `load_adapter`")
def test_save_and_load(base, pixels, adapter, tmp_path):
    """A loaded adapter would say something else, or sit on other modules, than the one that was saved."""
    fresh = copy.deepcopy(base)
    model = get_peft_model(base, chosen(adapter)).eval()
    with torch.no_grad():
        model.classifier.modules_to_save["default"].weight.normal_()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh, tmp_path).eval()
    assert torch.equal(logits(loaded, pixels), logits(model, pixels))
    assert loaded.peft_config["default"].selected_modules == {FC1: 1.0, FC2: 0.5}
    loaded.load_adapter(tmp_path, "again")
    loaded.set_adapter("again")
    assert torch.equal(logits(loaded, pixels), logits(model, pixels))


@feature("Training on from a saved adapter (`is_trainable=True`)")
def test_train_on(base, pixels, adapter, tmp_path):
    """A loaded adapter would stay frozen, or train other parameters than before."""
    fresh = copy.deepcopy(base)
    model = get_peft_model(base, chosen(adapter))
    model.save_pretrained(tmp_path)
    frozen = PeftModel.from_pretrained(copy.deepcopy(fresh), tmp_path)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    loaded = PeftModel.from_pretrained(fresh, tmp_path, is_trainable=True)
    names = [{name for name, p in m.named_parameters() if p.requires_grad} for m in (model, loaded)]
    assert names[0] == names[1]
    loaded(pixel_values=pixels).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters() if parameter.requires_grad)


@feature("More than twenty target modules, kept exactly")
def test_many_targets(base, adapter, tmp_path):
    """PEFT's shortening of long lists would adapt modules that were not selected."""
    linears = [name for name, module in base.named_modules() if isinstance(module, nn.Linear) and name != "classifier"]
    wanted = set(linears) - {FC1}
    assert len(wanted) > 20
    model = get_peft_model(base, chosen(adapter, *sorted(wanted)))
    assert set(model.targeted_module_names) == wanted
    model.save_pretrained(tmp_path)
    assert set(json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]) == wanted


@feature("`low_cpu_mem_usage=True`")
def test_low_cpu_mem_usage(base, pixels, adapter, tmp_path):
    """Loading by way of the meta device would leave empty or random weights behind."""
    fresh = copy.deepcopy(base)
    model = get_peft_model(base, chosen(adapter)).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh, tmp_path, low_cpu_mem_usage=True).eval()
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    assert torch.equal(logits(loaded, pixels), logits(model, pixels))


@feature("Hot-swapping (`hotswap_adapter`) on the same modules (without a saved head, which PEFT cannot swap)")
def test_hotswap(base, pixels, adapter, tmp_path):
    """Swapping in place would leave weights of the old adapter, or zeros where the new one has none."""
    second = get_peft_model(copy.deepcopy(base), chosen(adapter, **HEADLESS)).eval()
    second.save_pretrained(tmp_path / "second")
    get_peft_model(copy.deepcopy(base), chosen(adapter, FC1, **HEADLESS)).save_pretrained(tmp_path / "fewer")
    model = get_peft_model(base, chosen(adapter, **HEADLESS)).eval()
    before = logits(model, pixels)
    with pytest.raises(ValueError, match="target_modules"):
        hotswap_adapter(model, tmp_path / "fewer", "default", torch_device="cpu")
    assert torch.equal(logits(model, pixels), before)
    hotswap_adapter(model, tmp_path / "second", "default", torch_device="cpu")
    assert torch.equal(logits(model, pixels), logits(second, pixels))


@feature('`modules_to_save="auto"`: the head')
def test_head_is_saved(base, adapter):
    """The new classification head would stay random, or be trained and then lost."""
    model = get_peft_model(base, chosen(adapter))
    assert model.peft_config["default"].modules_to_save == ["classifier"]
    assert any("classifier" in name for name in get_peft_model_state_dict(model))


# --- what the model says about itself ----------------------------------------------------------------------------------


@feature("`get_layer_status`, `get_model_status`")
def test_status(base, adapter):
    """PEFT's own diagnosis would not see the adapters."""
    model = get_peft_model(base, chosen(adapter))
    layers = {status.name: status for status in get_layer_status(model)}
    assert {f"model.{FC1}", f"model.{FC2}"} <= set(layers)
    assert layers[f"model.{FC1}"].requires_grad == {"default": True}
    status = get_model_status(model)
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
    assert status.peft_types == {"default": "PLASTICITY"} and status.trainable_params > 0
    model.merge_adapter()
    assert {status.name: status.merged_adapters for status in get_layer_status(model)}[f"model.{FC1}"] == ["default"]


@feature("`print_trainable_parameters`")
def test_print_trainable_parameters(base, adapter, capsys):
    """The user would be told a wrong number of trainable parameters."""
    total = sum(parameter.numel() for parameter in base.parameters())
    head = sum(parameter.numel() for parameter in base.classifier.parameters())
    model = get_peft_model(base, chosen(adapter, FC1, r=3))
    model.print_trainable_parameters()
    layer = base.get_submodule(FC1)
    own = layer.base_layer.weight.numel() + layer.base_layer.bias.numel()
    expected = head + (own if adapter == "full" else 3 * (layer.in_features + layer.out_features))
    assert f"trainable params: {expected:,} || all params: {total + expected:,}" in capsys.readouterr().out


# --- numbers and execution ---------------------------------------------------------------------------------------------


@feature("`autocast_adapter_dtype`")
def test_autocast_adapter_dtype(base, adapter):
    """Adapters of half-precision models would train in half precision, against the user's word."""
    for autocast, expected in ((True, torch.float32), (False, torch.bfloat16)):
        model = get_peft_model(copy.deepcopy(base).bfloat16(), chosen(adapter), autocast_adapter_dtype=autocast)
        kinds = {p.dtype for n, p in model.named_parameters() if "lora_" in n or "modules_to_save" in n}
        assert kinds == {expected}


@feature("bfloat16 and float16 models")
def test_half_precision(base, pixels, adapter):
    """Half-precision models would give another type, overflow, or fail in the backward pass."""
    for dtype in (torch.bfloat16, torch.float16):
        model = get_peft_model(copy.deepcopy(base).to(dtype), chosen(adapter)).eval()
        output = model(pixel_values=pixels.to(dtype)).logits
        output.float().sum().backward()
        assert output.dtype == dtype and output.isfinite().all()
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        assert grads and all(grad is not None and grad.isfinite().all() for grad in grads)
        merged = logits(model.merge_and_unload(), pixels.to(dtype))
        assert torch.allclose(merged, output, atol=0.05)


@feature("Heads and norms of bfloat16 models: trained in float32, merged and exported exactly")
def test_saved_modules_train_in_float32(base, pixels, tmp_path, adapter):
    """Steps of an optimizer vanish in bfloat16 near 1, where norms' scales lie: the budget would pay for nothing."""
    half = copy.deepcopy(base).bfloat16()
    model = get_peft_model(copy.deepcopy(half), chosen(adapter, modules_to_save=["layernorm", "classifier"]))
    held = {n: p for n, p in model.named_parameters() if "modules_to_save" in n and p.requires_grad}
    before = {name: weight.detach().clone() for name, weight in held.items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model(pixel_values=pixels.bfloat16()).logits.float().square().sum().backward()
    optimizer.step()
    assert any("norm" in name for name in held) and all((held[n] != before[n]).any() for n in held)

    wanted = logits(model.eval(), pixels.bfloat16())
    model.save_pretrained(tmp_path / "own")
    again = PeftModel.from_pretrained(copy.deepcopy(half), tmp_path / "own").eval()
    assert torch.equal(logits(again, pixels.bfloat16()), wanted)
    assert all(torch.equal(p, held[n]) for n, p in again.named_parameters() if n in held)
    if adapter == "lora":
        export_lora(model, tmp_path / "plain")
        plain = PeftModel.from_pretrained(copy.deepcopy(half), tmp_path / "plain").eval()
        assert torch.equal(logits(plain, pixels.bfloat16()), wanted)
        # which rounds LoRA's weights, and keeps the file's dtype for the others
        plain = PeftModel.from_pretrained(copy.deepcopy(half), tmp_path / "plain", low_cpu_mem_usage=True).eval()
        assert torch.allclose(logits(plain, pixels.bfloat16()), wanted, atol=0.05)
    merged = model.merge_and_unload()
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    assert torch.allclose(logits(merged, pixels.bfloat16()), wanted, atol=0.05)


def test_half_precision_runs_with_what_the_model_reads_from_saved_modules():
    """Models ask their patch embedding for its dtype, and batch norms for statistics: either would meet another dtype."""
    half = transformers_model("vit").bfloat16()
    model = get_peft_model(half, chosen("lora", modules_to_save=["auto", "patch_embeddings"]))
    assert logits(model, torch.randn(2, 3, 32, 32).bfloat16()).dtype == torch.bfloat16
    normed = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).bfloat16()
    model = get_peft_model(normed, PlasticityConfig(target_modules=["0"], modules_to_save=["1", "2"]))
    assert model(torch.randn(3, 4).bfloat16()).dtype == torch.bfloat16


@feature("`torch.autocast`")
def test_autocast(base, pixels, adapter):
    """Mixed-precision training, the usual way, would fail or drop gradients."""
    model = get_peft_model(base, chosen(adapter))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(pixel_values=pixels).logits.float().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@feature("`torch.compile` in one graph")
def test_compile(base, pixels, adapter):
    """Compiled models would break into pieces or compute something else."""
    model = get_peft_model(base, chosen(adapter)).eval()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(logits(compiled, pixels), logits(model, pixels), atol=1e-5)


@feature("Gradient checkpointing")
def test_gradient_checkpointing(base, pixels, adapter):
    """Checkpointed training would compute other gradients, or none."""
    model = get_peft_model(base, chosen(adapter)).train()

    def gradients():
        model.zero_grad()
        model(pixel_values=pixels).logits.square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = gradients()
    assert set(plain) == set(again) and any(FC1 in name for name in plain)
    assert all(torch.allclose(plain[name], again[name], atol=1e-6) for name in plain)


# --- LoRA's options ----------------------------------------------------------------------------------------------------


@feature("DoRA (`use_dora`)", full='use_dora applies to adapter="lora"')
def test_dora(base, pixels, adapter):
    """DoRA would be switched off without a word."""
    model = get_peft_model(base, chosen(adapter, use_dora=True)).eval()
    assert any("lora_magnitude_vector" in name for name, _ in model.named_parameters())
    adapted = logits(model, pixels)
    assert torch.allclose(logits(model.merge_and_unload(), pixels), adapted, atol=1e-5)


@feature("rsLoRA (`use_rslora`)", full='use_rslora applies to adapter="lora"')
def test_rslora(base, adapter):
    """The scaling of rsLoRA would not be applied."""
    model = get_peft_model(base, chosen(adapter, FC1, r=4, lora_alpha=8, use_rslora=True))
    assert model.get_submodule(f"base_model.model.{FC1}").scaling["default"] == 8 / 2


@feature('PiSSA (`init_lora_weights="pissa"`) and its conversion to LoRA', full="init_lora_weights='pissa' applies to")
def test_pissa(base, pixels, adapter, tmp_path):
    """PiSSA would not start as the base model, or its conversion would not load on the untouched base."""
    fresh, before = copy.deepcopy(base), logits(base, pixels)
    model = get_peft_model(base, chosen(adapter, init_lora_weights="pissa")).eval()
    assert torch.allclose(logits(model, pixels), before, atol=1e-4)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    trained = logits(model, pixels)
    model.save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "lora").eval()
    assert torch.allclose(logits(loaded, pixels), trained, atol=1e-4)


@feature('`init_lora_weights="gaussian"`, `"orthogonal"`, `"olora"`', full="init_lora_weights='gaussian' applies to")
def test_other_starts(base, pixels, adapter):
    """LoRA's other ways to start would be refused, or not start as the base model."""
    before = logits(base, pixels)
    for start in ("gaussian", "orthogonal", "olora"):
        model = get_peft_model(copy.deepcopy(base), chosen(adapter, init_lora_weights=start, r=4)).eval()
        assert torch.allclose(logits(model, pixels), before, atol=1e-4)


@feature('`bias="all"`, `"lora_only"`')
def test_biases(base, pixels, adapter, tmp_path):
    """Trained biases would be lost on saving, or biases without any effect would be among the trained ones."""
    for bias, count in (("all", sum(name.endswith("bias") for name, _ in base.named_parameters())), ("lora_only", 2)):
        model = get_peft_model(copy.deepcopy(base), chosen(adapter, bias=bias, **HEADLESS)).eval()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert sum(name.endswith("bias") for name in trained) == count
        model(pixel_values=pixels).logits.sum().backward()
        assert all(p.grad is not None for p in trained.values())
        with torch.no_grad():
            for p in trained.values():
                p += torch.randn_like(p)
        model.save_pretrained(tmp_path / bias)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / bias).eval()
        assert torch.equal(logits(loaded, pixels), logits(model, pixels))


@feature('EVA (`init_lora_weights="eva"`)', full="init_lora_weights='eva' applies to")
def test_eva(base, pixels, adapter):
    """EVA's data-driven start would be refused, or leave LoRA's matrices random."""
    model = get_peft_model(base, chosen(adapter, init_lora_weights="eva", r=2))
    batches = [{"pixel_values": torch.randn(8, 3, 32, 32)} for _ in range(4)]
    initialize_lora_eva_weights(
        model, batches, prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None, show_progress_bar=False
    )
    first = model.get_submodule(f"base_model.model.{FC1}").lora_A["default"].weight
    assert torch.allclose(first @ first.T, torch.eye(len(first)), atol=1e-4)


@feature("Saving after EVA gave some modules no rank", full="init_lora_weights='eva' applies to")
def test_eva_that_drops_modules(base, pixels, adapter, tmp_path):
    """Modules that EVA dropped would come back on loading, without weights."""
    scores = {name: 1.0 for name, module in base.vit.named_modules(prefix="vit") if isinstance(module, nn.Linear)}
    eva = dict(init_lora_weights="eva", eva_config=EvaConfig(rho=2.0), r=1)
    model = get_peft_model(base, PlasticityConfig(plasticity=scores, adapter=adapter, **EVERY, **eva)).eval()
    batches = [{"pixel_values": torch.randn(8, 3, 32, 32)} for _ in range(4)]
    initialize_lora_eva_weights(
        model, batches, prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None, show_progress_bar=False
    )
    adapted = {name for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    assert len(adapted) < len(scores)
    model.save_pretrained(tmp_path / "plain")
    save_adapter(model, tmp_path / "whole")
    for folder in ("plain", "whole"):
        loaded = PeftModel.from_pretrained(transformers_model("vit"), tmp_path / folder)
        held = {name for name, m in loaded.get_base_model().named_modules() if isinstance(m, LoraLayer)}
        assert held == adapted == set(loaded.peft_config["default"].selected_modules)
        assert torch.equal(logits(loaded.eval(), pixels), logits(model, pixels))


@feature("`rank_pattern`, `alpha_pattern`", full="rank_pattern, alpha_pattern applies to")
def test_rank_and_alpha_pattern(base, adapter):
    """Ranks that the user sets for single modules would be ignored."""
    model = get_peft_model(base, chosen(adapter, r=4, rank_pattern={FC1: 2}, alpha_pattern={FC1: 6}))
    layer = model.get_submodule(f"base_model.model.{FC1}")
    assert (layer.r["default"], layer.scaling["default"]) == (2, 3.0)
    assert model.get_submodule(f"base_model.model.{FC2}").r["default"] == 4


@feature("`target_parameters`", full='target_parameters applies to adapter="lora"')
def test_target_parameters(base, pixels, adapter, tmp_path):
    """Parameters that are targeted by name would be dropped in favour of a selection."""
    before = logits(base, pixels)
    config = PlasticityConfig(
        adapter=adapter, target_parameters=[f"{FC1}.weight"], init_lora_weights=False, rank_pattern={f"{FC1}.weight": 2}
    )
    model = get_peft_model(base, config).eval()
    assert model.targeted_parameter_names == [f"{FC1}.weight"]
    after = logits(model, pixels)
    assert not torch.allclose(after, before)
    model.save_pretrained(tmp_path / "plain")
    save_adapter(model, tmp_path / "whole")
    export_lora(model, tmp_path / "export")
    for folder in ("plain", "whole", "export"):
        loaded = PeftModel.from_pretrained(transformers_model("vit"), tmp_path / folder).eval()
        assert torch.allclose(logits(loaded, pixels), after, atol=1e-6)


# --- which modules -----------------------------------------------------------------------------------------------------


@feature("`exclude_modules`")
def test_exclude_modules(base, adapter):
    """Excluded modules would be adapted, or the budget would be spent on them."""
    model = get_peft_model(base, chosen(adapter, FC1, FC2, QUERY, exclude_modules=[EVERY_FC1]))
    assert set(model.targeted_module_names) == {FC2, QUERY}
    model = get_peft_model(
        transformers_model("vit"), chosen(adapter, FC1, FC2, QUERY, exclude_modules=f".*({FC1}|{FC2})")
    )
    assert model.targeted_module_names == [QUERY]


@feature("`layers_to_transform`, with a report, with scores and with `target_modules`")
def test_layers_to_transform(base, pixels, adapter):
    """Layers that the user rules out would be adapted."""
    scored = get_peft_model(copy.deepcopy(base), chosen(adapter, FC1, FC2, QUERY, layers_to_transform=[1, 2]))
    assert set(scored.targeted_module_names) == {FC2, QUERY}
    named = PlasticityConfig(adapter=adapter, target_modules=[EVERY_FC1], layers_to_transform=[0])
    assert get_peft_model(copy.deepcopy(base), named).targeted_module_names == [FC1]
    report = measure_plasticity(base, torch.randn(4, 3, 32, 32), max_pairs=4, progress=False)
    config = PlasticityConfig(plasticity=report, adapter=adapter, top_k=4, granularity="module", layers_to_transform=3)
    names = get_peft_model(base, config).targeted_module_names
    assert names and all(name.startswith(vit_name("vit.layers.3.")) for name in names)


@feature("`modules_to_save` beside a selection that holds them")
def test_modules_to_save_win(base, adapter):
    """A module would be adapted and trained whole at once."""
    explicit = get_peft_model(copy.deepcopy(base), chosen(adapter, FC1, "classifier", modules_to_save=["classifier"]))
    assert explicit.targeted_module_names == [FC1]
    model = get_peft_model(base, chosen(adapter, FC1, "classifier"))
    assert set(model.targeted_module_names) == {FC1, "classifier"} and not model.peft_config["default"].modules_to_save


@feature("Norms as targets", lora="can take adapter='lora'")
def test_norms(base, pixels, adapter):
    """The paper's LN components could not be trained, or a LoRA user would get something else without a word."""
    model = get_peft_model(base, chosen(adapter, vit_name("vit.layers.0.layernorm_before"))).eval()
    adapted = logits(model, pixels)
    assert torch.equal(logits(model.merge_and_unload(), pixels), adapted)


@feature("Norms in full beside the selection (`train_norms`)", full='train_norms applies to adapter="lora"')
def test_train_norms(base, pixels, adapter):
    """The cheapest parameters of a model would stay frozen, or be trained without being switched off with the rest."""
    before = logits(base, pixels)
    report = measure_plasticity(base, torch.randn(8, 3, 32, 32), progress=False)
    model = get_peft_model(base, PlasticityConfig(plasticity=report, adapter=adapter, top_k=1, train_norms=True)).eval()
    norms = [p for name, p in model.named_parameters() if p.requires_grad and "layernorm" in name]
    assert len(norms) == 2 * 2 * base.config.num_hidden_layers
    with torch.no_grad():
        norms[0].mul_(2)
    assert not torch.equal(logits(model, pixels), before)
    with model.disable_adapter():
        assert torch.equal(logits(model, pixels), before)


TWICE = "would be trained whole in two ways"


@feature("Full adapters on what another adapter saves whole, and the other way round", full=TWICE, lora=TWICE)
def test_whole_in_two_ways(base, adapter):
    """Each of the two adapters would train and save the other's copies as well."""
    configs = {"lora": chosen("lora", FC1), "full": chosen("full", "classifier", **HEADLESS)}
    model = get_peft_model(base, configs.pop(adapter), adapter_name="one")
    before = state(model)
    try:
        model.add_adapter("two", *configs.values())
    finally:
        assert_same_state(model, before)


@feature("Modules offloaded to CPU or disk after injection", full="is offloaded to CPU or disk")
def test_offloading(base, pixels, adapter):
    """Accelerate puts the original weights back before a module runs, over an adapter's."""
    model = get_peft_model(base, chosen(adapter, vit_name("vit.layers.0.mlp.fc1"))).eval()
    adapted = logits(model, pixels)
    assert torch.equal(logits(cpu_offload(model, execution_device="cpu"), pixels), adapted)


@feature("`nn.MultiheadAttention` as target")
def test_multihead_attention(adapter):
    """Models with PyTorch's own attention could not be adapted."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.mha = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.mha(x, x, x)[0]

    x, base = torch.randn(2, 5, 8), Model().eval()
    before = base(x)
    model = get_peft_model(base, chosen(adapter, "mha")).eval()
    adapted = model(x)
    adapted.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert not torch.allclose(adapted, before)
    assert torch.allclose(model.merge_and_unload()(x), adapted, atol=1e-5)


@feature("Tied weights: the adapter changes the module it is on")
def test_tied_weights(adapter):
    """An adapter on one of two modules that share a weight would change the other one too."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode, self.decode = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
            self.decode.weight = self.encode.weight

        def forward(self, x):
            return self.decode(torch.tanh(self.encode(x)))

    x, base = torch.randn(3, 6), Tied()
    before = base(x)
    model = get_peft_model(base, chosen(adapter, "encode"))
    adapted = model(x)
    assert torch.equal(base.decode(x), x @ base.encode.base_layer.weight.T) and not torch.allclose(adapted, before)
    with model.disable_adapter():
        assert torch.equal(model(x), before)
    if adapter == "full":
        model.merge_adapter()
        assert torch.equal(model(x), adapted)
        model.unmerge_adapter()
        assert base.decode.weight is base.encode.base_layer.weight


class Int8Linear(nn.Module):
    """A quantised linear of the kind that adapters cannot see through."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randint(-8, 8, (4, 4), dtype=torch.int8), requires_grad=False)

    def forward(self, x):
        return x @ self.weight.to(x.dtype).T


@feature("Quantised layers that PEFT's LoRA does not know", lora="is not supported", full="are quantised (torch.int8)")
def test_quantised_layer(adapter):
    """Integer weights would be trained as numbers, or the model would be left half adapted."""
    base = nn.Sequential(nn.Linear(4, 4), Int8Linear())
    before = state(base)
    try:
        get_peft_model(base, PlasticityConfig(adapter=adapter, target_modules=["0", "1"]))
    finally:
        assert_same_state(base, before)


@feature("8-bit models of bitsandbytes", full="are quantised (torch.int8)")
def test_8_bit(pixels, adapter, tmp_path):
    """8-bit models could not be adapted, or a full adapter would train integers."""
    assert_quantised_model_trains(8, adapter, pixels, tmp_path)


@feature("4-bit models of bitsandbytes (QLoRA)", full="are quantised (torch.uint8)")
def test_4_bit(pixels, adapter, tmp_path):
    """4-bit models could not be adapted, or a full adapter would train packed integers."""
    assert_quantised_model_trains(4, adapter, pixels, tmp_path)


def assert_quantised_model_trains(bits, adapter, pixels, folder):
    base = prepare_model_for_kbit_training(quantised_vit_nano(bits), use_gradient_checkpointing=False)
    # what measures must not leave weights that only inference can use
    measure_plasticity(base, torch.randn(4, 3, 32, 32), max_pairs=4, progress=False)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = get_peft_model(base, chosen(adapter)).train()
    layer = model.get_submodule(f"base_model.model.{FC1}")
    assert isinstance(layer, LoraLayer) and type(layer).__module__ == "peft.tuners.lora.bnb"
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(3):
        loss = model(pixel_values=pixels, labels=torch.tensor([0, 1])).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]
    after = model.state_dict()
    kept = [name for name in before if (here := f"base_model.model.{name}") in after and ".base_layer" not in here]
    assert kept and all(torch.equal(after[f"base_model.model.{name}"], before[name]) for name in kept)
    model.eval().save_pretrained(folder)
    loaded = PeftModel.from_pretrained(quantised_vit_nano(bits), folder).eval()
    assert torch.allclose(logits(loaded, pixels), logits(model, pixels), atol=1e-4)


# --- full adapters -----------------------------------------------------------------------------------------------------

LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), lambda: torch.randn(3, 6)),
    "layer_norm": (lambda: nn.LayerNorm(6), lambda: torch.randn(3, 6)),
    "rms_norm": (lambda: nn.RMSNorm(6), lambda: torch.randn(3, 6)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 2, groups=1), lambda: torch.randn(2, 3, 6, 6)),
    "grouped_conv2d": (lambda: nn.Conv2d(4, 4, 2, groups=2), lambda: torch.randn(2, 4, 6, 6)),
    "embedding": (lambda: nn.Embedding(7, 5), lambda: torch.tensor([[0, 3], [6, 6]])),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_full_adapter_merges_exactly(kind, dtype):
    """Merging would round, or unmerging would not restore the original bits."""
    build, inputs = LAYERS[kind]
    x = inputs()
    x = x.to(dtype) if x.is_floating_point() else x
    base = nn.Sequential(build()).to(dtype)
    original = base.state_dict()
    model = get_peft_model(base, PlasticityConfig(adapter="full", target_modules=["0"], init_lora_weights=False))
    adapted = model(x)
    model.merge_adapter(safe_merge=True)
    assert torch.equal(model(x), adapted)
    model.unmerge_adapter()
    assert all(torch.equal(base[0].base_layer.state_dict()[k.partition(".")[2]], v) for k, v in original.items())
    assert torch.equal(model(x), adapted)


def test_full_adapter_starts_as_the_base_and_trains_like_it():
    """Training a full adapter would differ from training the module's own weights, or run the module twice."""
    base = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 2))
    plain, x, calls = copy.deepcopy(base), torch.randn(16, 6), []
    model = get_peft_model(base, PlasticityConfig(adapter="full", target_modules=["0", "2"]))
    assert torch.equal(model(x), plain(x))
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name.startswith(("0.", "2.")))
    base[0].base_layer.register_forward_hook(lambda *_: calls.append(1))
    for trained in (plain, model):
        optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            trained(x).square().sum().backward()
            optimizer.step()
    assert len(calls) == 3
    assert torch.equal(model(x), plain(x))
    held = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert held == sum(p.numel() for p in plain.parameters() if p.requires_grad)


def test_full_adapter_stays_exact_when_the_merged_model_is_cast():
    """Unmerging after a change of dtype would put weights of the old dtype back."""
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), PlasticityConfig(adapter="full", target_modules=["0"]))
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_full_adapter_refuses_recurrent_layers():
    """Recurrent layers read their weights from a list, so a full adapter would train without any effect."""
    with pytest.raises(TypeError, match="recurrent"):
        get_peft_model(nn.Sequential(nn.GRU(4, 4)), PlasticityConfig(adapter="full", target_modules=["0"]))


# --- errors leave everything as it was ---------------------------------------------------------------------------------

FAILURES = {
    "unknown name": (lambda: chosen("lora", FC1, "vit.nothing"), "does not have"),
    "norm for LoRA, after a linear": (
        lambda: PlasticityConfig(target_modules=[FC1, vit_name("vit.layers.3.layernorm_after")]),
        "is not supported",
    ),
    "module without parameters": (
        lambda: PlasticityConfig(adapter="full", target_modules=[FC1, "vit.embeddings.dropout"]),
        "holds no parameters",
    ),
    "nothing left": (lambda: chosen("lora", FC1, exclude_modules=[EVERY_FC1]), "leave no measured module"),
    "budget too small": (lambda: chosen("lora", FC1, fraction=None, budget=3), "below the first module"),
    "no such target": (lambda: PlasticityConfig(target_modules=["nowhere"]), "target modules"),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("adapters", [0, 1])
def test_model_and_config_survive_errors(base, failure, adapters):
    """A failed call would leave half an adapter on the model, or half a selection in the config."""
    build, message = FAILURES[failure]
    config = build()
    fields = copy.deepcopy(config.to_dict())
    model = get_peft_model(base, chosen("lora", QUERY)) if adapters else base
    before = state(model)
    with pytest.raises(ValueError if "parameters" not in message else TypeError, match=message):
        if adapters:
            model.add_adapter("more", config)
        else:
            get_peft_model(model, config)
    assert_same_state(model, before)
    assert config.to_dict() == fields
    if adapters:
        assert list(model.peft_config) == ["default"] and isinstance(
            model.get_submodule(f"base_model.model.{QUERY}"), nn.Module
        )


def test_unmeasurable_model_is_told_what_to_pass():
    """A model that is no vision transformer would fail deep inside the measurement."""
    with (
        pytest.warns(UserWarning, match="synthetic"),
        pytest.raises(ValueError, match="Please specify `target_modules`"),
    ):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), PlasticityConfig())


def test_share_of_the_base_ignores_adapters_on_it(base):
    """A second adapter's budget would grow with the adapters that are already there."""
    options = {"fraction": None, "budget": 0.02}
    names = [FC1, FC2, QUERY]
    first = get_peft_model(copy.deepcopy(base), chosen("lora", *names, **options)).targeted_module_names
    model = get_peft_model(
        base, PlasticityConfig(adapter="full", target_modules=[vit_name("k_proj"), vit_name("v_proj")])
    )
    model.add_adapter("second", chosen("lora", *names, **options))
    assert set(model.peft_config["second"].selected_modules) == set(first)


# --- registration ------------------------------------------------------------------------------------------------------


def test_enum_member_is_like_the_others():
    """Code that looks PEFT types up by value, name or text would not find this one."""
    member = PeftType("PLASTICITY")
    assert member is PeftType.PLASTICITY is PeftType["PLASTICITY"] and member in PeftType and member in list(PeftType)
    assert (member.value, member.name, json.dumps(member)) == ("PLASTICITY", "PLASTICITY", '"PLASTICITY"')
    assert pickle.loads(pickle.dumps(member)) is member and copy.deepcopy(member) is member
    assert {"PLASTICITY": 1}.get(member) == {"LORA": 1}.get(PeftType.LORA) and member == "PLASTICITY"
    assert str(member) == str(PeftType.LORA).replace("LORA", "PLASTICITY")
    with pytest.raises(ValueError):
        PeftType("NOTHING")


def test_table_of_features_is_current():
    """docs/features.md would promise what the tests do not show; `python tests/feature_table.py` writes it."""
    assert PAGE.read_text(encoding="utf-8") == page()


def test_full_layer_names_itself(base):
    """A printed model would not show which modules carry a full adapter."""
    model = get_peft_model(base, chosen("full", FC1))
    layer = model.get_submodule(f"base_model.model.{FC1}")
    assert isinstance(layer, FullLayer) and repr(layer).startswith("plasticity.FullLayer(")
