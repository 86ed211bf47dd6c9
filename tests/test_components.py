"""What `find_components` reads, family by family. The tables check the result; the package has none."""

import copy
from types import SimpleNamespace

import models
import pytest
import torch
import transformers
from torch import nn

from plastic_peft import find_components, measure_plasticity
from plastic_peft.components import BLOCK_ROLES, trace


QKVO = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj")
VIT_BLOCK = {
    "norm_attention": ("layernorm_before",),
    "attention": QKVO,
    "norm_mlp": ("layernorm_after",),
    "mlp_in": ("mlp.fc1",),
    "mlp_out": ("mlp.fc2",),
}
DINO_BLOCK = {**VIT_BLOCK, "norm_attention": ("norm1",), "norm_mlp": ("norm2",)}
GATED_DINO = {**DINO_BLOCK, "mlp_in": ("mlp.gate_proj", "mlp.up_proj"), "mlp_out": ("mlp.down_proj",)}
CLIP_BLOCK = {
    "norm_attention": ("layer_norm1",),
    "attention": tuple(f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")),
    "norm_mlp": ("layer_norm2",),
    "mlp_in": ("mlp.fc1",),
    "mlp_out": ("mlp.fc2",),
}
OLD_STYLE = {
    "norm_attention": ("layernorm_before",),
    "attention": (
        "attention.attention.query",
        "attention.attention.key",
        "attention.attention.value",
        "attention.output.dense",
    ),
    "norm_mlp": ("layernorm_after",),
    "mlp_in": ("intermediate.dense",),
    "mlp_out": ("output.dense",),
}
TIMM_BLOCK = {
    "norm_attention": ("norm1",),
    "attention": ("attn.qkv", "attn.proj"),
    "norm_mlp": ("norm2",),
    "mlp_in": ("mlp.fc1",),
    "mlp_out": ("mlp.fc2",),
}
TORCH_BLOCK = {
    "norm_attention": ("ln_1",),
    "attention": ("attn",),
    "norm_mlp": ("ln_2",),
    "mlp_in": ("mlp.0",),
    "mlp_out": ("mlp.2",),
}
ENCODER_LAYER = {
    "norm_attention": ("norm1",),
    "attention": ("self_attn",),
    "norm_mlp": ("norm2",),
    "mlp_in": ("linear1",),
    "mlp_out": ("linear2",),
}
PVT_ATTENTION = (
    "attention.self.query",
    "attention.self.sequence_reduction",
    "attention.self.layer_norm",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
)

# family: (blocks in order, modules of a block by role, modules of the head)
TRANSFORMERS = {
    "vit": (["vit.layers.{}"] * 4, VIT_BLOCK, ["classifier"]),
    "deit": (["deit.layers.{}"] * 4, VIT_BLOCK, ["cls_classifier", "distillation_classifier"]),
    "beit": (["beit.layers.{}"] * 4, VIT_BLOCK, ["classifier"]),
    "data2vec": (["data2vec_vision.encoder.layer.{}"] * 4, OLD_STYLE, ["classifier"]),
    "dinov2": (["dinov2.encoder.layer.{}"] * 4, DINO_BLOCK, ["classifier"]),
    "dinov2_swiglu": (["dinov2.encoder.layer.{}"] * 4, GATED_DINO, ["classifier"]),
    "dinov2_registers": (["dinov2_with_registers.encoder.layer.{}"] * 4, DINO_BLOCK, ["classifier"]),
    "dinov3": (
        ["model.layer.{}"] * 4,
        {**DINO_BLOCK, "mlp_in": ("mlp.up_proj",), "mlp_out": ("mlp.down_proj",)},
        [],
    ),
    "dinov3_gated": (["model.layer.{}"] * 4, GATED_DINO, []),
    "vit_mae": (["layers.{}"] * 4, VIT_BLOCK, []),
    "vit_msn": (["vit.layers.{}"] * 4, VIT_BLOCK, ["classifier"]),
    "clip": (["vision_model.encoder.layers.{}"] * 4, CLIP_BLOCK, ["classifier"]),
    "clip_vision": (["encoder.layers.{}"] * 4, CLIP_BLOCK, []),
    "siglip": (["vision_model.encoder.layers.{}"] * 4, CLIP_BLOCK, ["classifier"]),
    "siglip2": (["encoder.layers.{}"] * 4, CLIP_BLOCK, []),
    "swin": (
        [f"swin.encoder.layers.{s}.blocks.{b}" for s, b in ((0, 0), (0, 1), (1, 0), (2, 0), (2, 1))],
        VIT_BLOCK,
        ["classifier"],
    ),
    "swinv2": (
        [f"swinv2.encoder.layers.{s}.blocks.{b}" for s, b in ((0, 0), (0, 1), (1, 0), (1, 1))],
        {
            **OLD_STYLE,
            "attention": (
                "attention.self.query",
                "attention.self.key",
                "attention.self.value",
                "attention.output.dense",
            ),
        },
        ["classifier"],
    ),
    "ijepa": (["ijepa.layers.{}"] * 4, VIT_BLOCK, ["classifier"]),
    "hiera": (
        [f"hiera.encoder.stages.{s}.layers.{b}" for s, b in ((0, 0), (1, 0), (1, 1), (2, 0))],
        {**VIT_BLOCK, "attention": ("attn.qkv", "attn.proj")},
        ["classifier"],
    ),
    "pvt": (
        [f"pvt.encoder.block.{s}.0" for s in range(4)],
        {
            "norm_attention": ("layer_norm_1",),
            "attention": PVT_ATTENTION,
            "norm_mlp": ("layer_norm_2",),
            "mlp_in": ("mlp.dense1",),
            "mlp_out": ("mlp.dense2",),
        },
        ["classifier"],
    ),
}
TRANSFORMERS["pvt_v2"] = (
    [f"pvt_v2.encoder.layers.{s}.blocks.{b}" for s, b in ((0, 0), (1, 0), (1, 1), (2, 0))],
    {
        **TRANSFORMERS["pvt"][1],
        "attention": tuple(
            f"attention.{x}" for x in ("query", "spatial_reduction", "layer_norm", "key", "value", "proj")
        ),
    },
    ["classifier"],
)
TRANSFORMERS["blip"] = (
    ["encoder.layers.{}"] * 4,
    {**CLIP_BLOCK, "attention": ("self_attn.qkv", "self_attn.projection")},
    [],
)
BLOCKS = ["blocks.{}"] * 3
PARALLEL = {**TIMM_BLOCK, "norm_attention": ("norm",), "norm_mlp": ()}
PAIRED = {
    "norm_attention": ("0.norm",),
    "attention": ("0.attn.qkv", "0.attn.proj"),
    "norm_mlp": ("1.0",),
    "mlp_in": ("1.1",),
    "mlp_out": ("1.4",),
}
HAND_WRITTEN = {
    "pre_norm": (BLOCKS, TIMM_BLOCK),
    "post_norm": (BLOCKS, TIMM_BLOCK),
    "gated": (BLOCKS, {**TIMM_BLOCK, "mlp_in": ("mlp.w12",), "mlp_out": ("mlp.w3",)}),
    "parallel": (BLOCKS, PARALLEL),
    "parallel_mlp_first": (BLOCKS, PARALLEL),
    "torch_attention": (BLOCKS, TORCH_BLOCK),
    "torch_attention_tokens_first": (BLOCKS, TORCH_BLOCK),
    "inline": (
        BLOCKS,
        {
            "norm_attention": ("n1",),
            "attention": ("q", "k", "v", "o"),
            "norm_mlp": ("n2",),
            "mlp_in": ("a",),
            "mlp_out": ("b",),
        },
    ),
    "conv_mlp": (BLOCKS, TIMM_BLOCK),
    "conv_stem": (BLOCKS, TIMM_BLOCK),
    "paired_lists": (BLOCKS, PAIRED),
    "single_block": (BLOCKS[:1], TIMM_BLOCK),
    "torch_encoder_pre": (BLOCKS, ENCODER_LAYER),
    "torch_encoder_post": (BLOCKS, ENCODER_LAYER),
    "named_norms": (BLOCKS, TIMM_BLOCK),
    "one_of_another_class": (BLOCKS, TIMM_BLOCK),
    "dense_experts": (
        BLOCKS,
        {
            **TIMM_BLOCK,
            "mlp_in": ("mlp.router", *(f"mlp.experts.{i}.fc1" for i in range(3))),
            "mlp_out": tuple(f"mlp.experts.{i}.fc2" for i in range(3)),
        },
    ),
}


def found(components):
    """Modules by (block, role), and the head's modules."""
    blocks = {}
    for component in components:
        if component.role in BLOCK_ROLES:
            blocks.setdefault((component.block, component.role), []).extend(component.modules)
    return blocks, [name for component in components if component.role == "head" for name in component.modules]


def expected(block_names, roles):
    return {
        (index, role): [f"{name.format(index)}.{module}" for module in modules]
        for index, name in enumerate(block_names)
        for role, modules in roles.items()
        if modules
    }


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_transformers_families(family):
    """Without it a family's blocks, roles or head could be misread after a change of names or of the tracer."""
    block_names, roles, head = TRANSFORMERS[family]
    components = find_components(models.transformers_model(family), models.example_inputs(family))
    blocks, heads = found(components)
    # a convolution that reduces tokens is in some blocks of a PVT only
    wanted = expected(block_names, roles)
    present = {name for names in blocks.values() for name in names}
    for key, names in wanted.items():
        reducing = ("sequence_reduction", "self.layer_norm", "spatial_reduction", "attention.layer_norm")
        kept = [n for n in names if n in present or not any(part in n for part in reducing)]
        assert sorted(blocks.get(key, [])) == sorted(kept), key
    assert blocks.keys() == wanted.keys()
    assert heads == head


@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_hand_written_structures(name):
    """Without it fused, gated, parallel, post-norm, inline and list-built blocks of plain modules could be misread."""
    block_names, roles = HAND_WRITTEN[name]
    blocks, heads = found(find_components(models.hand_written(name), torch.randn(2, 3, 32, 32)))
    wanted = expected(block_names, roles)
    assert {k: sorted(v) for k, v in blocks.items()} == {k: sorted(v) for k, v in wanted.items()}
    assert heads == ["head"]


def test_an_mlp_belongs_to_the_attention_before_it():
    """Without it a flat list of attention and MLP modules would lose its MLPs."""
    blocks, _ = found(find_components(models.hand_written("flat_list"), torch.randn(2, 3, 32, 32)))
    assert blocks[(1, "attention")] == ["blocks.2.attn.qkv", "blocks.2.attn.proj"]
    assert blocks[(1, "mlp_in")] == ["blocks.3.1"] and blocks[(2, "mlp_out")] == ["blocks.5.4"]


def test_norms_and_mlps_of_lists_go_to_their_attention():
    """Without it every norm of a flat list would move on by one role, and lists side by side would lose their MLPs."""
    blocks, heads = found(find_components(models.hand_written("norms_in_list"), torch.randn(2, 3, 32, 32)))
    names = {role: [blocks[i, role] for i in range(3)] for role in BLOCK_ROLES}
    assert names["norm_attention"] == [["blocks.0"], ["blocks.4"], ["blocks.8"]]
    assert names["norm_mlp"] == [["blocks.2"], ["blocks.6"], ["blocks.10"]]
    assert names["mlp_in"] == [["blocks.3.fc1"], ["blocks.7.fc1"], ["blocks.11.fc1"]] and heads == ["head"]
    blocks, heads = found(find_components(models.hand_written("lists_side_by_side"), torch.randn(2, 3, 32, 32)))
    names = {role: [blocks[i, role] for i in range(3)] for role in BLOCK_ROLES}
    assert names["norm_attention"] == [[f"norms1.{i}"] for i in range(3)]
    assert names["norm_mlp"] == [[f"norms2.{i}"] for i in range(3)]
    assert names["mlp_out"] == [[f"mlps.{i}.fc2"] for i in range(3)] and heads == ["head"]


def test_experts_that_get_some_tokens_are_named():
    """Without it the experts of a routed model would be missing from a report without a word."""
    images = torch.randn(24, 3, 32, 32)
    model = models.hand_written("sparse_experts")
    report = measure_plasticity(model, images, progress=False)
    expected = {f"blocks.{b}.mlp.experts.{i}.fc{n}" for b in range(3) for i in range(3) for n in (1, 2)}
    measured = {row.name for row in report.select_rows("module")}
    note = next(note for note in report.notes if "whole images" in note)
    assert "experts" in note and expected - measured


def test_convolutions_after_which_channels_come_first_are_no_attention():
    """Without it a ConvNeXt, whose blocks put channels first, would be taken for a transformer."""
    config = transformers.ConvNextConfig(hidden_sizes=[16, 32], depths=[2, 2], num_stages=2, image_size=32)
    with pytest.raises(ValueError, match="No transformer blocks"):
        find_components(transformers.ConvNextForImageClassification(config))


@pytest.mark.parametrize("form", ["a dict", "features first", "a config of its own", "one label"])
def test_the_head_is_found_in_other_outputs(form):
    """Without it the head of a plain module that returns more than logits would stay untrained and unsaved."""
    model = models.hand_written("pre_norm")
    if form == "one label":
        model.head = nn.Linear(models.WIDTH, 1)
    elif form == "a config of its own":
        model.config = SimpleNamespace(depth=3)
    else:
        plain = model.forward
        extra = torch.randn(2, 3)

        def forward(pixels):
            logits = plain(pixels)
            features = pixels.mean((2, 3)) @ extra.T
            return {"features": features, "logits": logits} if form == "a dict" else (features, logits)

        model.forward = forward
    assert found(find_components(model, torch.randn(2, 3, 32, 32)))[1] == ["head"]


def test_names_do_not_decide():
    """Without it renaming every module of a model could change what is found."""
    model = models.hand_written("pre_norm")
    plain, _ = found(find_components(model, torch.randn(2, 3, 32, 32)))

    class Disguised(nn.Module):
        def __init__(self):
            super().__init__()
            self.x1, self.x2, self.x3, self.x4 = model.patch, model.blocks, model.norm, model.head

        def forward(self, pixels):
            x = self.x1(pixels).flatten(2).transpose(1, 2)
            for block in self.x2:
                x = block(x)
            return self.x4(self.x3(x).mean(1))

    disguised, heads = found(find_components(Disguised(), torch.randn(2, 3, 32, 32)))
    assert {k: [n.replace("x2", "blocks") for n in v] for k, v in disguised.items()} == plain
    assert heads == ["x4"]


def test_weights_that_only_their_wrapper_gathers_are_refused():
    """Without it FSDP 1 would run a model on a part of its weights, and blame the images."""
    wrapped = type("FullyShardedDataParallel", (nn.Sequential,), {})(models.transformers_model("vit"))
    with pytest.raises(ValueError, match="fsdp_version: 2"):
        find_components(wrapped)


def test_fingerprint_ignores_head_and_weights_but_not_structure():
    """Without it a report could be refused after a change of labels, or taken for another architecture."""
    first = trace(models.transformers_model("vit")).fingerprint
    relabelled = models.transformers_model("vit")
    relabelled.classifier = nn.Linear(32, 9)
    relabelled.config.num_labels = 9
    deeper = copy.deepcopy(models.transformers_model("vit"))
    deeper.vit.layers.append(copy.deepcopy(deeper.vit.layers[0]))
    assert trace(relabelled).fingerprint == first
    assert trace(deeper).fingerprint != first


def test_an_adapted_model_keeps_its_components(tiny_vit):
    """Without it the components of a model in training could not be measured, since adapters hide them."""
    from peft import LoraConfig, get_peft_model

    plain = find_components(tiny_vit)
    adapted = get_peft_model(tiny_vit, LoraConfig(target_modules=["q_proj", "fc1"], modules_to_save=["classifier"]))
    assert find_components(adapted) == plain


def test_a_compiled_model_is_seen_through(tiny_vit):
    """Without it torch.compile's wrapper would put its own prefix into every name."""
    plain = find_components(tiny_vit)
    assert find_components(torch.compile(tiny_vit)) == plain
    tiny_vit.vit.layers[1] = torch.compile(tiny_vit.vit.layers[1])
    for layer in tiny_vit.vit.layers[2:]:
        layer.attention = torch.compile(layer.attention)
    assert find_components(tiny_vit) == plain


def test_a_model_without_attention_says_what_was_found():
    """Without it a convolutional network would fail with a message that helps nobody."""
    conv = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 30 * 30, 5))
    with pytest.raises(ValueError, match=r"No transformer blocks found.*Conv2d, Linear.*target_modules"):
        find_components(conv, torch.randn(2, 3, 32, 32))


def test_an_attention_that_cannot_be_seen_is_not_taken_for_another():
    """Without it tokens that meet out of sight would make one block of a whole encoder."""

    class Unseen(models.PreNorm):
        def __init__(self):
            super().__init__()
            self.attn = models.FunctionalAttention()

    model = models.Vit(Unseen)
    model.blocks = nn.ModuleList([nn.Sequential(*model.blocks)])
    with pytest.raises(ValueError, match="No transformer blocks"):
        find_components(model, torch.randn(2, 3, 32, 32))


def test_a_model_without_image_size_asks_for_images():
    """Without it a plain module would fail deep inside with a shape error."""
    with pytest.raises(ValueError, match="no config.image_size.*example_inputs"):
        find_components(models.hand_written("pre_norm"))


def test_tracing_leaves_no_hooks_and_no_flags(tiny_vit):
    """Without it looking at a model could slow it down or change its dropout for good."""
    tiny_vit.train()
    tiny_vit.vit.layers[0].eval()
    flags = [module.training for module in tiny_vit.modules()]
    state = torch.random.get_rng_state()
    find_components(tiny_vit)
    assert [module.training for module in tiny_vit.modules()] == flags
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny_vit.modules())
    assert torch.equal(torch.random.get_rng_state(), state)
