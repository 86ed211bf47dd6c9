"""Small vision transformers of many families, from transformers' configs and written by hand."""

import pytest
import torch
import transformers as T
from torch import nn

from plastic_peft import load_vit_nano


SMALL = dict(
    hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8
)
TEXT = dict(
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=4,
    intermediate_size=64,
    vocab_size=100,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
)
LABELS = dict(num_labels=5)

FAMILIES = {
    "vit": lambda: T.ViTForImageClassification(T.ViTConfig(**SMALL, **LABELS)),
    "deit": lambda: T.DeiTForImageClassificationWithTeacher(T.DeiTConfig(**SMALL, **LABELS)),
    "beit": lambda: T.BeitForImageClassification(T.BeitConfig(**SMALL, **LABELS, use_relative_position_bias=True)),
    "data2vec": lambda: T.Data2VecVisionForImageClassification(T.Data2VecVisionConfig(**SMALL, **LABELS)),
    "dinov2": lambda: T.Dinov2ForImageClassification(T.Dinov2Config(**SMALL, **LABELS, mlp_ratio=2)),
    "dinov2_swiglu": lambda: T.Dinov2ForImageClassification(T.Dinov2Config(**SMALL, **LABELS, use_swiglu_ffn=True)),
    "dinov2_registers": lambda: T.Dinov2WithRegistersForImageClassification(
        T.Dinov2WithRegistersConfig(**SMALL, **LABELS, mlp_ratio=2)
    ),
    "dinov3": lambda: T.DINOv3ViTModel(T.DINOv3ViTConfig(**SMALL)),
    "dinov3_gated": lambda: T.DINOv3ViTModel(T.DINOv3ViTConfig(**SMALL, use_gated_mlp=True)),
    "vit_mae": lambda: T.ViTMAEModel(T.ViTMAEConfig(**SMALL)),
    "vit_msn": lambda: T.ViTMSNForImageClassification(T.ViTMSNConfig(**SMALL, **LABELS)),
    "clip": lambda: T.CLIPForImageClassification(T.CLIPConfig(vision_config=SMALL, text_config=TEXT, **LABELS)),
    "clip_vision": lambda: T.CLIPVisionModel(T.CLIPVisionConfig(**SMALL)),
    "siglip": lambda: T.SiglipForImageClassification(T.SiglipConfig(vision_config=SMALL, text_config=TEXT, **LABELS)),
    "siglip2": lambda: T.Siglip2VisionModel(
        T.Siglip2VisionConfig(**{k: v for k, v in SMALL.items() if k != "image_size"}, num_patches=16, num_channels=3)
    ),
    "swin": lambda: T.SwinForImageClassification(
        T.SwinConfig(
            image_size=32, patch_size=2, embed_dim=16, depths=[2, 1, 2], num_heads=[2, 2, 4], window_size=4, **LABELS
        )
    ),
    "swinv2": lambda: T.Swinv2ForImageClassification(
        T.Swinv2Config(
            image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, **LABELS
        )
    ),
    "ijepa": lambda: T.IJepaForImageClassification(T.IJepaConfig(**SMALL, **LABELS)),
    "hiera": lambda: T.HieraForImageClassification(
        T.HieraConfig(
            image_size=[128, 128],
            embed_dim=16,
            depths=[1, 2, 1],
            num_heads=[1, 2, 4],
            masked_unit_size=[8, 8],
            masked_unit_attention=[True, True, False],
            num_query_pool=2,
            mlp_ratio=2.0,
            **LABELS,
        )
    ),
    "pvt": lambda: T.PvtForImageClassification(
        T.PvtConfig(
            image_size=64,
            hidden_sizes=[16, 32, 32, 64],
            depths=[1, 1, 1, 1],
            num_attention_heads=[1, 2, 2, 4],
            sequence_reduction_ratios=[4, 2, 2, 1],
            **LABELS,
        )
    ),
    # in its first stage all queries meet one key, so that noise on them shows nowhere
    "pvt_v2": lambda: T.PvtV2ForImageClassification(
        T.PvtV2Config(
            image_size=32,
            num_encoder_blocks=3,
            hidden_sizes=[16, 32, 32],
            depths=[1, 2, 1],
            num_attention_heads=[1, 2, 2],
            mlp_ratios=[2, 2, 2],
            sr_ratios=[8, 2, 1],
            patch_sizes=[7, 3, 3],
            strides=[4, 2, 2],
            **LABELS,
        )
    ),
    # its norms receive values far below their epsilon
    "blip": lambda: T.BlipVisionModel(T.BlipVisionConfig(**SMALL)),
}


def transformers_model(family: str) -> nn.Module:
    torch.manual_seed(0)
    return FAMILIES[family]().eval()


def quantised_vit_nano(bits: int, skipped: tuple[str, ...] = ("classifier",)) -> nn.Module:
    """vit_nano in 8 or 4 bits, but for the modules `skipped`."""
    pytest.importorskip("bitsandbytes", reason="quantised models need bitsandbytes")
    how = {"load_in_8bit": True} if bits == 8 else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    return load_vit_nano(quantization_config=T.BitsAndBytesConfig(**how, llm_int8_skip_modules=list(skipped)))


# what transformers 5 calls parts of a ViT, and what transformers 4 called them
RENAMED = {
    "vit.layers": "vit.encoder.layer",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "o_proj": "output.dense",
    "q_proj": "attention.query",
    "k_proj": "attention.key",
    "v_proj": "attention.value",
}


def vit_name(name: str) -> str:
    """A name, or a part of one, in transformers 5's ViT as the running release has it."""
    for later, earlier in RENAMED.items() if T.__version__ < "5" else ():
        name = name.replace(later, earlier)
    return name


def example_inputs(family: str):
    """Inputs for the one family whose images are cut into patches beforehand; `None` lets the config speak."""
    if family != "siglip2":
        return None
    return {
        "pixel_values": torch.randn(2, 16, 192),
        "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
    }


# --- written by hand -------------------------------------------------------------------------------------------------

WIDTH = 32


class FusedAttention(nn.Module):
    """Attention with one fused input projection, as timm writes it."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.qkv, self.proj, self.heads = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), heads

    def forward(self, x):
        n, length, width = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(n, length, width))


class FunctionalAttention(FusedAttention):
    """Attention that uses its input projection's weight without calling it, as timm's BEiT does."""

    def forward(self, x):
        n, length, width = x.shape
        fused = nn.functional.linear(x, self.qkv.weight, self.qkv.bias)
        q, k, v = fused.reshape(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(n, length, width))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, x):
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class GatedMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w12, self.w3 = nn.Linear(WIDTH, 128), nn.Linear(64, WIDTH)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, -1)
        return self.w3(nn.functional.silu(gate) * value)


class PreNorm(nn.Module):
    mlp_class = Mlp

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(WIDTH), FusedAttention(), nn.LayerNorm(WIDTH)
        self.mlp = self.mlp_class()

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Gated(PreNorm):
    mlp_class = GatedMlp


class PostNorm(PreNorm):
    def forward(self, x):
        x = self.norm1(x + self.attn(x))
        return self.norm2(x + self.mlp(x))


class Parallel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn, self.mlp = nn.LayerNorm(WIDTH), FusedAttention(), Mlp()

    def forward(self, x):
        normed = self.norm(x)
        return x + self.attn(normed) + self.mlp(normed)


class ParallelMlpFirst(Parallel):
    def forward(self, x):
        normed = self.norm(x)
        return x + self.mlp(normed) + self.attn(normed)


class TorchAttention(nn.Module):
    """A block around `nn.MultiheadAttention`, with tokens in the first or second dimension."""

    batch_first = True

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, 4, batch_first=self.batch_first)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))

    def forward(self, x):
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class TorchAttentionTokensFirst(TorchAttention):
    batch_first = False


class Inline(nn.Module):
    """All in one module, attention included, with RMS norms."""

    def __init__(self) -> None:
        super().__init__()
        self.n1, self.n2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.a, self.b = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, x):
        n = self.n1(x)
        x = x + self.o(nn.functional.scaled_dot_product_attention(self.q(n), self.k(n), self.v(n)))
        return x + self.b(nn.functional.gelu(self.a(self.n2(x))))


class ConvMlp(nn.Module):
    """An MLP whose depthwise convolution lets tokens meet, which is no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)
        self.dw = nn.Conv2d(64, 64, 3, padding=1, groups=64)

    def forward(self, x):
        x = self.fc1(x)
        side = int(x.shape[1] ** 0.5)
        grid = x.transpose(1, 2).reshape(x.shape[0], -1, side, side)
        return self.fc2(nn.functional.gelu(self.dw(grid).flatten(2).transpose(1, 2)))


class ConvMlpBlock(PreNorm):
    mlp_class = ConvMlp


class Vit(nn.Module):
    """Patch embedding, blocks, final norm, head; no positions, no config."""

    def __init__(self, block=PreNorm, depth: int = 3, tokens_first: bool = False, conv_stem: bool = False) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 8, 8)
        if conv_stem:
            self.patch = nn.Sequential(
                nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, WIDTH, 4, 4)
            )
        self.blocks = nn.ModuleList([block() for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 7)
        self.tokens_first = tokens_first

    def forward(self, pixels):
        x = self.patch(pixels).flatten(2).transpose(1, 2)
        if self.tokens_first:
            x = x.transpose(0, 1)
        for block in self.blocks:
            x = block(x)
        if self.tokens_first:
            x = x.transpose(0, 1)
        return self.head(self.norm(x).mean(1))


class NormedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(WIDTH), FusedAttention()

    def forward(self, x):
        return self.attn(self.norm(x))


def normed_mlp():
    return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, WIDTH))


class PairedLists(Vit):
    """A list of [attention, MLP] lists, so that no module is a block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleList([NormedAttention(), normed_mlp()]) for _ in range(3)])

    def forward(self, pixels):
        x = self.patch(pixels).flatten(2).transpose(1, 2)
        for attention, mlp in self.blocks:
            x = x + attention(x)
            x = x + mlp(x)
        return self.head(self.norm(x).mean(1))


class FlatList(PairedLists):
    """Attention and MLP in turn in one list."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([module for pair in self.blocks for module in pair])

    def forward(self, pixels):
        x = self.patch(pixels).flatten(2).transpose(1, 2)
        for module in self.blocks:
            x = x + module(x)
        return self.head(self.norm(x).mean(1))


class NormsInList(PairedLists):
    """Norm, attention, norm and MLP in turn in one list, as a flat `nn.Sequential` has them."""

    def __init__(self) -> None:
        super().__init__()
        parts = [part for _ in range(3) for part in (nn.LayerNorm(WIDTH), FusedAttention(), nn.LayerNorm(WIDTH), Mlp())]
        self.blocks = nn.ModuleList(parts)

    def forward(self, pixels):
        x = self.patch(pixels).flatten(2).transpose(1, 2)
        for first in range(0, len(self.blocks), 4):
            norm1, attention, norm2, mlp = self.blocks[first : first + 4]
            x = x + attention(norm1(x))
            x = x + mlp(norm2(x))
        return self.head(self.norm(x).mean(1))


class ListsSideBySide(PairedLists):
    """All norms in one list, all attentions in another, all MLPs in a third."""

    def __init__(self) -> None:
        super().__init__()
        makers = {"norms1": lambda: nn.LayerNorm(WIDTH), "attns": FusedAttention}
        makers |= {"norms2": makers["norms1"], "mlps": Mlp}
        del self.blocks
        for name, make in makers.items():
            setattr(self, name, nn.ModuleList([make() for _ in range(3)]))

    def forward(self, pixels):
        x = self.patch(pixels).flatten(2).transpose(1, 2)
        for norm1, attention, norm2, mlp in zip(self.norms1, self.attns, self.norms2, self.mlps, strict=True):
            x = x + attention(norm1(x))
            x = x + mlp(norm2(x))
        return self.head(self.norm(x).mean(1))


class NamedNorms(PreNorm):
    """Norms that are called by keyword, with an epsilon far above the variance of what they receive."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1.eps = self.norm2.eps = 1.0

    def forward(self, x):
        x = x + self.attn(self.norm1(input=1e-3 * x))
        return x + self.mlp(self.norm2(input=1e-3 * x))


class Other(PreNorm):
    """The same as a `PreNorm`, of another class."""


class Experts(nn.Module):
    """Three MLPs: all weigh in on every token, or each gets the tokens that a router sends it."""

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(WIDTH, 3), nn.ModuleList([Mlp() for _ in range(3)])
        self.sparse = sparse

    def forward(self, x):
        gates = self.router(x).softmax(-1)
        if not self.sparse:
            return sum(gates[..., i, None] * expert(x) for i, expert in enumerate(self.experts))
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            sent = gates.argmax(-1) == i
            out[sent] = expert(x[sent])
        return out


class DenseExperts(PreNorm):
    mlp_class = Experts


class SparseExperts(PreNorm):
    mlp_class = staticmethod(lambda: Experts(sparse=True))


def one_block_of_another_class():
    model = Vit(PreNorm)
    model.blocks[0] = Other()
    return model


def encoder_layer(norm_first: bool):
    return lambda: nn.TransformerEncoderLayer(WIDTH, 4, 64, batch_first=True, norm_first=norm_first)


HAND_WRITTEN = {
    "pre_norm": lambda: Vit(PreNorm),
    "post_norm": lambda: Vit(PostNorm),
    "gated": lambda: Vit(Gated),
    "parallel": lambda: Vit(Parallel),
    "parallel_mlp_first": lambda: Vit(ParallelMlpFirst),
    "torch_attention": lambda: Vit(TorchAttention),
    "torch_attention_tokens_first": lambda: Vit(TorchAttentionTokensFirst, tokens_first=True),
    "inline": lambda: Vit(Inline),
    "conv_mlp": lambda: Vit(ConvMlpBlock),
    "conv_stem": lambda: Vit(PreNorm, conv_stem=True),
    "paired_lists": PairedLists,
    "flat_list": FlatList,
    "norms_in_list": NormsInList,
    "lists_side_by_side": ListsSideBySide,
    "named_norms": lambda: Vit(NamedNorms),
    "one_of_another_class": one_block_of_another_class,
    "dense_experts": lambda: Vit(DenseExperts),
    "sparse_experts": lambda: Vit(SparseExperts),
    "single_block": lambda: Vit(PreNorm, depth=1),
    "torch_encoder_pre": lambda: Vit(encoder_layer(True)),
    "torch_encoder_post": lambda: Vit(encoder_layer(False)),
}


def hand_written(name: str) -> nn.Module:
    torch.manual_seed(0)
    return HAND_WRITTEN[name]().eval()
