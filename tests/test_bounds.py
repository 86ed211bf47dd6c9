"""Upper bounds against exact norms and against measured rates."""

import copy

import models
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from plastic_peft import find_components, measure_plasticity, plasticity_bounds
from plastic_peft.bounds import attention_bound, spectral_norm


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 10**6), st.sampled_from(["normal", "low rank", "equal"]))
def test_spectral_norm_is_exact_to_one_per_cent(rows, columns, seed, kind):
    """Without it Lanczos could stop too early, above all where singular values lie close together."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator)
    if kind == "low rank":
        matrix = matrix[:, :1] @ matrix[:1]
    if kind == "equal":
        matrix = torch.linalg.qr(matrix).Q
    exact = float(torch.linalg.svdvals(matrix.double())[0])
    assert spectral_norm(matrix) == pytest.approx(exact, rel=1e-2, abs=1e-6)


def test_heads_are_rows_of_qkv_and_columns_of_the_output():
    """Without it a bound could cut heads along the wrong dimension, as the paper's code does."""
    torch.manual_seed(0)
    q, k, v, o = (torch.randn(12, 12) for _ in range(4))
    n, r, size = 7, 1.5, 4
    by_hand = 0.0
    for h in range(3):
        part = slice(h * size, (h + 1) * size)
        a = torch.linalg.matrix_norm(q[part].T @ k[part] / size**0.5, ord=2)
        ov = torch.linalg.matrix_norm(o[:, part], ord=2) * torch.linalg.matrix_norm(v[part], ord=2)
        by_hand += float(ov * torch.sqrt(3 * n + (12 * n + 3) * r**4 * a**2))
    assert attention_bound(q, k, v, o, size, n=n, r=r) == pytest.approx(by_hand, rel=1e-5)


def test_grouped_heads_share_keys_and_values():
    """Without it models with fewer key and value heads could not be bounded, or wrongly."""
    torch.manual_seed(0)
    q, o, k, v = torch.randn(16, 16), torch.randn(16, 16), torch.randn(8, 16), torch.randn(8, 16)
    wide = [w.view(2, 4, 16).repeat_interleave(2, dim=0).reshape(16, 16) for w in (k, v)]
    shared = attention_bound(q, k, v, o, 4, n=5, r=1.0)
    assert shared == pytest.approx(attention_bound(q, *wide, o, 4, n=5, r=1.0), rel=1e-6)


@pytest.mark.parametrize("name", ["separate", "fused", "torch"])
def test_attention_weights_are_found_by_behaviour(name):
    """Without it q, k, v and the head width would have to be known by name."""
    torch.manual_seed(0)
    biases = (None, None)
    if name == "separate":
        model = models.transformers_model("vit")
        attention = model.vit.layers[0].attention
        weights = [getattr(attention, f"{x}_proj").weight for x in "qkvo"]
        size, where = 8, "vit.layers.0.attention"
    elif name == "fused":
        model = models.hand_written("pre_norm")
        attention = model.blocks[0].attn
        weights, size, where = [*attention.qkv.weight.chunk(3), attention.proj.weight], 8, "blocks.0.attn"
        biases = attention.qkv.bias.chunk(3)[:2]
    else:
        model = models.hand_written("torch_attention")
        attention = model.blocks[0].attn
        weights, size, where = [*attention.in_proj_weight.chunk(3), attention.out_proj.weight], 8, "blocks.0.attn"
    report = plasticity_bounds(model, radius=2.0, tokens=17, images=torch.randn(3, 3, 32, 32))
    bound = next(r for r in report.select_rows("component", "attention") if r.name == where)
    q, k, *others = weights
    ways = zip(((q, k), (k, q)), biases, strict=True)
    expected = max(attention_bound(*both, *others, size, n=17, r=2.0, q_bias=bias) for both, bias in ways)
    assert bound.mean == pytest.approx(expected, rel=1e-5)


def scaled_up(model):
    """Weights and biases as large as trained ones, so that bounds and rates are not near zero."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.weight.mul_(5)
                module.bias.normal_(0, 3)
    return model


def test_a_bias_of_the_queries_counts():
    """The theorem has no biases and models have: without it nearly equal tokens could move by more than the bound."""
    torch.manual_seed(0)
    attention = models.transformers_model("vit").vit.layers[0].attention
    with torch.no_grad():
        attention.q_proj.weight.mul_(1e-2)
        attention.q_proj.bias.normal_(0, 5000)
    inputs = torch.randn(40, 1, 4, 32)
    slopes = [torch.autograd.functional.jacobian(lambda x: attention(x)[0], x).reshape(128, 128) for x in inputs]
    # the rate of the worst pair of nearly equal inputs
    rate = max(float(torch.linalg.matrix_norm(slope, ord=2)) for slope in slopes)
    weights = [getattr(attention, f"{name}_proj").weight for name in "qkvo"]
    given = dict(n=4, r=float(inputs.norm(dim=-1).max()))
    assert attention_bound(*weights, 8, **given) < rate
    assert rate <= attention_bound(*weights, 8, **given, q_bias=attention.q_proj.bias)


def test_rotations_between_queries_and_keys_count():
    """Without it a model with rotated queries and keys would get a bound that its attention exceeds."""
    torch.manual_seed(0)
    model = models.transformers_model("dinov3")
    attention = next(m for name, m in model.named_modules() if name.endswith(".0.attention"))
    with torch.no_grad():
        for name in "qk":
            getattr(attention, f"{name}_proj").weight.zero_()
        # Q^T K is zero until a rotation turns the first feature of a head into its fifth
        attention.q_proj.weight[0, 0] = attention.k_proj.weight[4, 0] = 30.0
    received = {}
    handle = attention.register_forward_pre_hook(lambda m, args, kwargs: received.update(kwargs), with_kwargs=True)
    row = plasticity_bounds(model, radius=20.0).select_rows("component", "attention")[0]
    handle.remove()
    x = torch.randn(1, 17, 32)
    # to a query of zero all keys are alike, and where it goes from there decides between them
    x[0, 9, 0] = 0.0
    assert x.norm(dim=-1).max() < 20.0
    slope = torch.autograd.functional.jacobian(lambda x: attention(**{**received, "hidden_states": x})[0], x)
    rate = float(torch.linalg.matrix_norm(slope.reshape(x.numel(), x.numel()), ord=2))
    weights = [getattr(attention, f"{name}_proj").weight for name in "qkvo"]
    assert attention_bound(*weights, 8, n=17, r=20.0) < rate <= row.mean


def test_normalised_queries_are_outside_the_theorem():
    """Without it cosine attention, whose logits do not grow with its weights, would get a bound that means nothing."""
    report = plasticity_bounds(models.transformers_model("swinv2"))
    assert not report.select_rows("component", "attention")
    assert any("no bound is known" in note for note in report.notes)


def test_modules_saved_whole_count_as_they_are_now():
    """Without it the bounds of a trained model's norms would be those of the untrained ones."""
    model = models.transformers_model("vit")
    name = find_components(model)[0].modules[0]
    adapted = get_peft_model(model, LoraConfig(target_modules=["fc1"], modules_to_save=[name]))
    with torch.no_grad():
        model.get_submodule(name).modules_to_save["default"].weight.fill_(5.0)
    bounds = {row.name: row.mean for row in plasticity_bounds(adapted).select_rows("module")}
    assert bounds[name] == 5.0
    with adapted.disable_adapter():
        assert {row.name: row.mean for row in plasticity_bounds(adapted).select_rows("module")}[name] == 1.0


def test_adapters_count_as_what_they_add():
    """Without it the bounds of an adapted model would be those of its base model, which its rates exceed."""
    images = torch.randn(6, 3, 32, 32)
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False, lora_alpha=64)
    adapted = get_peft_model(models.transformers_model("vit"), config)
    merged = copy.deepcopy(adapted).merge_and_unload()
    found, expected = (plasticity_bounds(model, images=images).rows for model in (adapted, merged))
    assert [row.name for row in found] == [row.name for row in expected]
    assert [row.mean for row in found] == pytest.approx([row.mean for row in expected], rel=1e-2)
    with adapted.disable_adapter():
        assert plasticity_bounds(adapted, images=images).rows[2].mean != found[2].mean


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10**6))
def test_no_measured_rate_exceeds_its_bound(seed):
    """Without it a bound could be none: linear layers always, attention within its radius."""
    torch.manual_seed(seed)
    model = scaled_up(models.FAMILIES["vit"]().eval())
    images = torch.randn(24, 3, 32, 32)
    bounds = {(r.level, r.name): r.mean for r in plasticity_bounds(model, images=images).rows}
    measured = measure_plasticity(model, images, progress=False, tolerance=0)
    checked = 0
    for row in measured.rows:
        if row.role.startswith("norm") or (row.level, row.name) not in bounds:
            continue
        assert row.mean <= bounds[row.level, row.name] * (1 + 1e-4), row.name
        checked += 1
    assert checked == 4 * (4 + 2 + 1 + 2)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.floats(1.0, 20.0))
def test_a_norm_is_bounded_for_tokens_of_spread_one_or_more(seed, spread):
    """Without it the condition under which max |gamma| bounds a layer norm would be a guess."""
    torch.manual_seed(seed)
    norm = nn.LayerNorm(16, eps=0.0)
    with torch.no_grad():
        norm.weight.normal_()
    x, y = torch.randn(2, 10, 16, dtype=torch.double)
    x, y = (spread * (1 + torch.rand(10, 1)) * t / t.std(dim=-1, keepdim=True, correction=0) for t in (x, y))
    norm = norm.double()
    rate = (norm(x) - norm(y)).norm() / (x - y).norm()
    assert float(rate.detach()) <= float(norm.weight.detach().abs().max()) * (1 + 1e-9)


def test_an_attention_outside_the_theorem_is_named():
    """Without it an attention with norms inside would get a bound that does not hold."""
    torch.manual_seed(0)
    model = models.hand_written("inline")
    report = plasticity_bounds(model, images=torch.randn(3, 3, 32, 32))
    assert not report.select_rows("component", "attention")
    assert any("no bound is known" in note for note in report.notes)
    assert report.select_rows("component", "mlp_in")


@pytest.mark.parametrize("way", ["weights", "autocast", "prepared"])
def test_half_precision_does_not_look_like_position_terms(way):
    """Without it rounding would be taken for something between queries and keys, and give a larger bound."""
    images = torch.randn(6, 3, 32, 32)
    model = models.transformers_model("vit")
    expected = plasticity_bounds(model, images=images)
    if way == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            found = plasticity_bounds(model, images=images)
    elif way == "prepared":
        model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
        found = plasticity_bounds(model, images=images)
    else:
        found = plasticity_bounds(model.bfloat16(), images=images)
    assert [row.name for row in found.rows] == [row.name for row in expected.rows]
    assert [row.mean for row in found.rows] == pytest.approx([row.mean for row in expected.rows], rel=1e-2)


def test_position_terms_that_depend_on_the_query_are_outside_the_theorem():
    """Without it an attention whose logits do not come from its keys would get a bound that its rates exceed."""
    config = transformers.SamVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8, output_channels=16,
        window_size=2, global_attn_indexes=[1],
    )  # fmt: skip
    report = plasticity_bounds(transformers.SamVisionModel(config).eval())
    assert not report.select_rows("component", "attention")
    assert any("no bound is known" in note for note in report.notes)
