"""Shared fixtures: tiny models and images, and one thread each, since test machines are small."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings


torch.set_num_threads(1)
# the same examples every time, and no time limits: machines are shared
settings.register_profile(
    "project", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.load_profile("project")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def images():
    """Forty-eight pairs of 32 x 32 images: sources, and targets that differ from them in contrast and noise."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(48, 3, 8, 8, generator=generator)
    sources = torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear")
    targets = 0.5 * sources.flip(0) + 0.3 * torch.randn(48, 3, 32, 32, generator=generator)
    return sources, targets


@pytest.fixture
def tiny_vit():
    """A ViT of four blocks, 32 wide, with five labels."""
    from models import transformers_model

    return transformers_model("vit")
