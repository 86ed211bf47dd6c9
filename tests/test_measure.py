"""The measurement against definitions worked out by hand, and what it promises about model, data and processes."""

import copy
import os
import signal
import sys
import threading
from dataclasses import replace

import datasets
import models
import numpy as np
import pytest
import torch
import transformers
from accelerate import cpu_offload
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from PIL import Image
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils.data import DataLoader, TensorDataset

from plastic_peft import PlasticityConfig, PlasticityReport, measure_plasticity, plasticity_bounds
from plastic_peft.components import BLOCK_ROLES, find_components, trace
from plastic_peft.measure import Moments, _from_differences, _from_products, _plan_rows, _selection_is_settled, _Taps
from plastic_peft.report import Row, default_signal


def quick(model, target, source=None, **options):
    return measure_plasticity(model, target, source, **{"progress": False, "tolerance": 0, **options})


def rates(report, level="component"):
    return {(row.name, row.role): row.mean for row in report.select_rows(level)}


def row(report, name, level="module"):
    return next(r for r in report.rows if r.name == name and r.level == level)


def kept_activations(model, name, pixels):
    """Input and output of one module in an ordinary forward pass, flattened per image, in float64."""
    kept = {}

    def hook(module, args, kwargs, output):
        x = args[0] if args else next(iter(kwargs.values()))
        kept["x"], kept["y"] = x, output[0] if isinstance(output, tuple) else output

    handle = model.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad():
        model(pixels)
    handle.remove()
    return (kept[key].double().reshape(len(pixels), -1) for key in ("x", "y"))


def rate_by_definition(model, name, sources, targets):
    xs, ys = kept_activations(model, name, sources)
    xt, yt = kept_activations(model, name, targets)
    return (ys - yt).norm(dim=1) / (xs - xt).norm(dim=1)


# --- the figures -----------------------------------------------------------------------------------------------------


def test_hidden_rates_are_those_of_the_definition(tiny_vit, images):
    """Without it the hooks could pair, split or average the activations wrongly."""
    sources, targets = images
    report = quick(tiny_vit, targets, sources, batch_size=20)
    assert report.pairs == 48 and report.stopped == "data exhausted"
    for name, level in (
        ("vit.layers.0.layernorm_before", "module"),
        ("vit.layers.1.attention", "component"),
        ("vit.layers.1.attention.o_proj", "module"),
        ("vit.layers.3.mlp.fc2", "module"),
        ("vit.layers.2.mlp.fc1", "component"),
        ("vit.embeddings.patch_embeddings.projection", "module"),
        ("classifier", "module"),
    ):
        by_hand = rate_by_definition(tiny_vit, name, sources, targets)
        measured = row(report, name, level)
        assert measured.mean == pytest.approx(float(by_hand.mean()), rel=1e-5), name
        assert measured.std == pytest.approx(float(by_hand.std()), rel=1e-3), name
        assert measured.ci_low < measured.mean < measured.ci_high


def test_embedding_rates_are_those_of_the_reference_protocol(tiny_vit, images):
    """Without it `inputs="embedding"` would no longer reproduce the paper's protocol."""
    sources, targets = images
    report = quick(tiny_vit, targets, sources, inputs="embedding", batch_size=16)
    with torch.no_grad():
        e = [tiny_vit.vit.embeddings(part) for part in (sources, targets)]
    for index, layer in enumerate(tiny_vit.vit.layers):
        padded = [nn.functional.pad(part, (0, 32)) for part in e]
        with torch.no_grad():
            outputs = {
                "norm_attention": [layer.layernorm_before(part) for part in e],
                "attention": [layer.attention(part)[0] for part in e],
                "norm_mlp": [layer.layernorm_after(part) for part in e],
                "mlp_in": [layer.mlp.fc1(part) for part in e],
                "mlp_out": [layer.mlp.fc2(part) for part in padded],
            }
        below = (e[0] - e[1]).double().flatten(1).norm(dim=1)
        for role, (a, b) in outputs.items():
            by_hand = float(((a - b).double().flatten(1).norm(dim=1) / below).mean())
            measured = next(r for r in report.select_rows("component", role) if r.block == index)
            assert measured.mean == pytest.approx(by_hand, rel=1e-5), (index, role)
    assert not [r for r in report.rows if r.block is None]


def test_shift_is_the_rate_across_over_the_rate_inside(images):
    """Without it `shift` could divide by the wrong pairs, or depend on where a norm's scale sits."""
    sources, targets = images
    model = models.transformers_model("vit")
    before = quick(model, targets, sources)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        layer = moved.vit.layers[1]
        layer.layernorm_after.weight.mul_(3)
        layer.layernorm_after.bias.mul_(3)
        layer.mlp.fc1.weight.div_(3)
    after = quick(moved, targets, sources)
    for name in ("vit.layers.1.layernorm_after", "vit.layers.1.mlp.fc1"):
        a, b = row(before, name), row(after, name)
        assert a.shift == pytest.approx(a.mean / a.source_source, rel=1e-9)
        assert b.shift == pytest.approx(a.shift, rel=1e-4)
        assert abs(b.mean / a.mean - 1) > 0.5


@settings(max_examples=10, deadline=None)
@given(scale=st.floats(0.01, 100), bias=st.floats(-5, 5))
def test_a_scaled_identity_has_its_scale_as_rate(scale, bias):
    """Without it the measurement could be off by a factor or see a bias, which moves no distance."""
    model = models.hand_written("pre_norm")
    fc = model.blocks[1].attn.proj
    with torch.no_grad():
        fc.weight.copy_(scale * torch.eye(32))
        fc.bias.fill_(bias)
    report = quick(model, torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(3)))
    assert row(report, "blocks.1.attn.proj").mean == pytest.approx(scale, rel=1e-4)


def test_batch_size_and_seed_do_not_matter(tiny_vit, images):
    """Without it the figures could depend on how the same pairs are cut into batches or ordered."""
    sources, targets = images
    base = rates(quick(tiny_vit, targets, sources, batch_size=48), "module")
    for options in ({"batch_size": 7}, {"batch_size": 1}, {"seed": 5, "batch_size": 16}):
        other = rates(quick(tiny_vit, targets, sources, **options), "module")
        for key, value in base.items():
            assert other[key] == pytest.approx(value, rel=1e-5), (key, options)


def test_without_source_no_image_meets_itself(tiny_vit, images):
    """Without it pairs of one image with itself would enter, or the report claim a shift that was not measured."""
    report = quick(tiny_vit, images[1])
    assert report.pairs == 24 and report.dropped == 0
    assert all(r.shift is None and r.source_source is None for r in report.rows)


def test_a_gated_mlp_counts_both_projections(images):
    """Without it a gated MLP's component would be measured at one of its two input projections only."""
    model = models.transformers_model("dinov2_swiglu")
    sources, targets = images
    report = quick(model, targets, sources)
    component = next(r for r in report.select_rows("component", "mlp_in") if r.block == 0)
    gate, up = (row(report, f"dinov2.encoder.layer.0.mlp.{name}_proj") for name in ("gate", "up"))
    assert max(gate.mean, up.mean) < component.mean < (gate.mean**2 + up.mean**2) ** 0.5 * 1.01


@pytest.mark.parametrize("family", ["swin", "hiera", "pvt", "clip", "siglip", "dinov2_swiglu", "vit_mae"])
def test_every_component_of_a_family_gets_a_rate(family):
    """Without it windows, token reduction or masking could leave components of real models without a row."""
    model = models.transformers_model(family)
    size = model.config.image_size if hasattr(model.config, "image_size") else model.config.vision_config.image_size
    size = size if isinstance(size, int) else size[0]
    report = quick(model, torch.randn(8, 3, size, size), torch.randn(8, 3, size, size))
    wanted = {(c.name, c.role) for c in find_components(model) if c.role in BLOCK_ROLES}
    assert wanted <= rates(report).keys()
    assert all(r.mean > 0 for r in report.rows if r.role in BLOCK_ROLES)


def test_windowed_attention_has_no_embedding_row_and_the_report_says_so():
    """Without it a component that cannot take the embedding would get a made-up figure."""
    report = quick(models.transformers_model("swin"), torch.randn(8, 3, 32, 32), inputs="embedding")
    assert not report.select_rows("component", "attention")
    assert any("attention has no row: it takes" in note for note in report.notes)
    assert report.select_rows("component", "norm_attention")


# --- when it stops ---------------------------------------------------------------------------------------------------


def test_it_stops_when_settled_and_says_so(tiny_vit):
    """Without it the measurement would always use up its pairs, or stop without a reason."""
    pixels = torch.randn(600, 3, 32, 32)
    report = measure_plasticity(tiny_vit, pixels, tolerance=0.2, batch_size=16, progress=False)
    assert report.stopped == "settled" and report.pairs < 300
    assert all(r.ci_high - r.mean <= 0.2 * r.mean + 1e-12 for r in report.rows)
    assert quick(tiny_vit, pixels, max_pairs=20).stopped == "max_pairs"


def test_it_measures_on_until_the_selection_cannot_change(tiny_vit):
    """Without it a selection could be handed out that a few more pairs would turn."""
    pixels = torch.randn(1200, 3, 32, 32)
    loose = measure_plasticity(tiny_vit, pixels, tolerance=0.5, batch_size=16, progress=False)
    sure = measure_plasticity(
        tiny_vit, pixels, tolerance=0.5, batch_size=16, progress=False, selection={"top_k": 1, "adapter": "full"}
    )
    assert sure.pairs >= loose.pairs
    chosen = sure.select(top_k=1, adapter="full").units
    means = sure.by_role()["mean"]
    assert chosen == (means.index[0],)


def stopped_moments(generator, ready, rows=1):
    """Moments of simulated rates, 8 pairs a batch, when `ready(moments)` holds at a look, or after 25 batches."""
    moments = Moments(rows, 0.95)
    for _ in range(25):
        rates = torch.empty(3, 8).exponential_(1.0, generator=generator).double().sqrt()
        kinds = torch.zeros(rows + 1, 3, 4, dtype=torch.float64)
        for kind, x in enumerate((rates[0], rates[1, :4], rates[2, :4])):
            kinds[:rows, kind] = torch.tensor([x.sum(), (x**2).sum(), len(x), 0])
        moments.add(kinds)
        if moments.look_is_due() and ready(moments):
            return moments
    moments.last_look()
    return moments


def test_intervals_cover_at_whatever_look_they_stop():
    """Without it stopping early could make the stated confidence a false one, for means or for shifts."""
    generator = torch.Generator().manual_seed(0)
    runs, missed_mean, missed_shift = 300, 0, 0
    for _ in range(runs):
        moments = stopped_moments(generator, lambda m: m.widest() < 0.15)
        missed_mean += not abs(float(moments.mean()[0]) - 0.886227) <= float(moments.half_width()[0])
        # stopping when the shift looks unlike 1 is what fools intervals that do not pay for looks
        moments = stopped_moments(generator, lambda m: abs(float(m.mean(0) / m.mean(1)) - 1) > 0.3)
        low, high = moments.shift_interval()
        missed_shift += not float(low) <= 1 <= float(high)
    assert missed_mean / runs <= 0.05 and missed_shift / runs <= 0.05


def test_intervals_are_no_wider_than_they_have_to_be():
    """Without it intervals could cover by being far too wide, and a measurement would need many times the pairs."""
    generator = torch.Generator().manual_seed(0)
    fixed, looked = Moments(1, 0.95, fixed=True), Moments(1, 0.95)
    for _ in range(25):
        x = torch.empty(8).exponential_(1.0, generator=generator).double().sqrt()
        kinds = torch.zeros(2, 3, 4, dtype=torch.float64)
        kinds[0, 0] = torch.tensor([x.sum(), (x**2).sum(), len(x), 0])
        fixed.add(kinds), looked.add(kinds), looked.look_is_due()
    fixed.last_look(), looked.last_look()
    plain = 1.972 * float(fixed.std()[0]) / 200**0.5
    assert float(fixed.half_width()[0]) == pytest.approx(plain, rel=1e-3)
    assert plain < float(looked.half_width()[0]) < 2 * plain


@pytest.mark.parametrize("signal", ["plasticity", "shift"])
def test_a_selection_is_settled_only_where_no_interval_can_change_it(signal):
    """Without it the measurement could stop while the second role may still overtake the first."""

    def row(role, low, high):
        middle = (low + high) / 2
        mean, shift = (middle, 1.0) if signal == "plasticity" else (1.0, middle)
        ends = {"ci_low": low, "ci_high": high} if signal == "plasticity" else {"ci_low": 0.9, "ci_high": 1.1}
        return Row(
            name=role, level="module", role=role, block=0, kind="Linear", component=role, parameters=64, shape=(8, 8),
            mean=mean, std=0.1, pairs=64, shift=shift, shift_low=low, shift_high=high, source_source=1.0, **ends,
        )  # fmt: skip

    def settled(*rows):
        both = [version for r in rows for version in (r, replace(r, level="component"))]
        return _selection_is_settled(both, 1000, {"top_k": 1, "signal": signal})

    assert settled(row("attention", 1.1, 1.3), row("mlp_in", 0.9, 1.05))
    assert not settled(row("attention", 1.1, 1.3), row("mlp_in", 0.9, 1.15))


@pytest.mark.parametrize(
    "selection",
    [
        # with fc1 first, which is dearer, this would pay for no module at all
        {"budget": 600, "granularity": "module", "rank_allocation": "uniform", "r": 8, "train_norms": False},
        # four source images bound no shift from above at first
        {"budget": 2000, "granularity": "module", "signal": "shift", "train_norms": False},
    ],
)
def test_scores_that_might_be_otherwise_end_no_measurement(tiny_vit, images, selection):
    """Without it the question whether a selection may still change would raise where another one is impossible."""
    report = measure_plasticity(
        tiny_vit, images[1], images[0][:4], progress=False, tolerance=0.9, batch_size=4, selection=selection
    )
    assert report.select(**selection).modules


def test_distances_from_products_are_those_of_differences():
    """Without it the quick way to take distances could lose digits, or find a distance between equal images."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 2, 3, 40_000, generator=generator) + 1
    exact = _from_differences(rows.double()).float()
    assert torch.allclose(_from_products(rows), exact, rtol=1e-5)
    nearly = rows.clone()
    nearly[1] = nearly[0] + 1e-3 * nearly[1]
    assert _from_products(nearly) is None
    assert _from_products(torch.where(rows > 4, torch.inf, rows)) is None
    equal = rows[:1].expand(2, -1, -1, -1)
    assert _from_products(equal) is None and (_from_differences(equal)[:6] == 0).all()


def test_a_zero_head_is_found_and_measured(images):
    """Heads may start with zeros: without it such a head would be left out, and not be trained."""
    model = models.transformers_model("vit")
    nn.init.zeros_(model.classifier.weight), nn.init.zeros_(model.classifier.bias)
    nn.init.zeros_(model.vit.layers[1].mlp.fc2.weight)
    report = quick(model, images[0], images[1])
    assert [r.name for r in report.select_rows("module", "head")] == ["classifier"]
    assert row(report, "vit.layers.1.mlp.fc2").mean == 0
    # what is the same for all images has moved by nothing, which is no reason to leave shift, and it, out
    report = quick(model, images[0], images[1])
    assert default_signal(report.rows) == "shift"
    scores = {c.name: c.score for c in report.candidates()}
    assert scores["vit.layers.1.mlp.fc2"] == 1.0 and len(set(scores.values())) > 10
    config = PlasticityConfig(plasticity=report)
    get_peft_model(model, config)
    assert config.modules_to_save == ["classifier"]


def test_models_that_draw_at_random_are_measured_the_same_each_time(images):
    """Without it masks drawn anew would give another report for the same seed."""
    model = models.transformers_model("vit_mae")
    first, second = (quick(model, images[0], images[1], seed=3) for _ in range(2))
    assert first == second


def test_loaders_leave_the_random_state_alone(tiny_vit, images):
    """A loader draws from the global state: without it measuring while training would change the training."""
    loader = DataLoader(TensorDataset(images[0]), batch_size=8, shuffle=True)
    before = torch.get_rng_state()
    quick(tiny_vit, loader, images[1])
    assert torch.equal(torch.get_rng_state(), before)


def test_running_out_of_memory_stays_what_it_is(tiny_vit, images):
    """accelerate's find_executable_batch_size looks for this error: without it it would not try a smaller batch."""

    def fail(*_):
        raise torch.OutOfMemoryError("out of memory")

    handle = tiny_vit.register_forward_pre_hook(fail)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            quick(tiny_vit, images[0], images[1])
    finally:
        handle.remove()


# --- what it takes ---------------------------------------------------------------------------------------------------


def test_all_kinds_of_data_give_the_same_figures(tiny_vit, images):
    """Without it a loader, a data set or plain batches could be paired differently from the same tensor."""
    sources, targets = images
    base = rates(quick(tiny_vit, targets, sources))
    as_set = [
        datasets.Dataset.from_dict({"pixel_values": part.numpy().tolist()}).with_format("torch") for part in images
    ]
    forms = {
        "dataset": (as_set[1], as_set[0]),
        "loader": (DataLoader(TensorDataset(targets), batch_size=5), DataLoader(TensorDataset(sources), batch_size=7)),
        "dicts": (
            [{"pixel_values": p, "labels": torch.zeros(len(p))} for p in targets.split(9)],
            list(sources.split(4)),
        ),
        "mixed": (iter(targets.split(10)), sources),
    }
    for name, (target, source) in forms.items():
        other = rates(quick(tiny_vit, target, source, batch_size=16))
        for key, value in base.items():
            assert other[key] == pytest.approx(value, rel=1e-4), (name, key)


def test_raw_images_go_through_the_processor(tiny_vit):
    """Without it grey and differently sized pictures of a data set would need preparation by hand."""
    from transformers import ViTImageProcessor

    pictures = [
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (20 + i, 30)).astype("uint8")) for i in range(10)
    ]
    data = datasets.Dataset.from_dict({"label": [0] * 10, "image": pictures}).cast_column("image", datasets.Image())
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    assert quick(tiny_vit, data, image_processor=processor).pairs == 5
    with pytest.raises(ValueError, match="raw images.*image_processor"):
        quick(tiny_vit, data)


def test_a_saved_model_brings_its_processor(tiny_vit, tmp_path):
    """Without it every user would have to find and pass the processor that lies beside the weights."""
    from transformers import ViTForImageClassification, ViTImageProcessor

    tiny_vit.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    pictures = [Image.new("RGB", (40, 40), (25 * i, 100, 255 - 25 * i)) for i in range(10)]
    data = datasets.Dataset.from_dict({"image": pictures}).cast_column("image", datasets.Image())
    assert quick(ViTForImageClassification.from_pretrained(tmp_path), data).pairs == 5


def test_a_shorter_source_starts_again(tiny_vit, images):
    """Without it a small source set would cut the target set short."""
    report = quick(tiny_vit, images[1], images[0][:7])
    assert report.pairs == 48


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "source", "options", "message"),
    [
        (lambda: torch.zeros(0, 3, 32, 32), None, {}, "target holds no images"),
        (lambda: iter([]), None, {}, "target holds no images"),
        (lambda: torch.randn(1, 3, 32, 32), None, {}, "at least two, or a source"),
        (
            lambda: torch.randn(4, 3, 28, 28),
            None,
            {},
            r"cannot take the first images \(pixel_values \(2, 3, 28, 28\)\)",
        ),
        (lambda: torch.randn(4, 1, 32, 32), None, {}, "cannot take the first images"),
        (lambda: torch.ones(6, 3, 32, 32), None, {}, "0 of 3 pairs have two images that differ"),
        (lambda: torch.randn(3, 3, 32, 32), None, {}, "1 pairs give no interval"),
        (lambda: torch.randn(4, 3, 32, 32), None, {"selection": {"topk": 1}}, "selection has no option 'topk'"),
        (lambda: torch.randn(4, 3, 32, 32), None, {"selection": {"top_k": 0}}, "top_k=0"),
        (lambda: torch.randn(4, 3, 32, 32), lambda: torch.randn(4, 3, 16, 16), {}, "bring both to one size"),
        (lambda: torch.randn(4), None, {}, r"tensor of shape \(4,\)"),
        (lambda: "images/", None, {}, "target is a str"),
        (lambda: [{"text": "a"}, {"text": "b"}], None, {}, "none holds images"),
        (lambda: torch.randn(4, 3, 32, 32), None, {"inputs": "raw"}, "inputs='raw' is unknown"),
        (lambda: torch.randn(4, 3, 32, 32), None, {"confidence": 95}, "confidence=95"),
        (lambda: torch.randn(4, 3, 32, 32), None, {"batch_size": 0}, "batch_size=0"),
    ],
)
def test_bad_input_is_named(tiny_vit, target, source, options, message):
    """Without it unfit data would end in a stack trace from deep inside the model."""
    with pytest.raises((ValueError, TypeError), match=message):
        quick(tiny_vit, target(), source() if source else None, **options)


def test_nan_names_module_and_batch(tiny_vit, images):
    """Without it one bad image or weight would turn every figure into NaN without a word."""
    sources, targets = images[0].clone(), images[1]
    sources[40, 0, 5, 5] = float("nan")
    with pytest.raises(
        ValueError, match=r"projection and \d+ further ones put out NaN or infinity in batch \d \(pairs \d+ to \d+\)"
    ):
        quick(tiny_vit, targets, sources, batch_size=16)
    with torch.no_grad():
        tiny_vit.vit.layers[2].mlp.fc1.weight[0, 0] = float("inf")
    with pytest.raises(
        ValueError, match=r"vit.layers.2.mlp.fc1 puts out NaN or infinity from finite input on the first"
    ):
        quick(tiny_vit, targets, images[0])


def test_half_precision_overflow_is_named(images):
    """Without it float16 overflow would hide in a mean instead of telling to measure in bfloat16."""
    model = models.transformers_model("vit")
    with torch.no_grad():
        model.vit.layers[1].mlp.fc2.weight.mul_(1e8)
    with pytest.raises(ValueError, match=r"torch.float16.*bfloat16"):
        quick(model.half(), images[1].half(), images[0].half())


def test_equal_pairs_are_dropped_and_counted(tiny_vit, images):
    """Without it a duplicate across the sets would divide zero by zero."""
    sources, targets = images[0].clone(), images[1]
    sources[3], sources[10] = targets[3], targets[10]
    report = quick(tiny_vit, targets, sources)
    assert report.dropped == 2
    assert all(r.pairs == 46 for r in report.rows)


# --- the model is left as it was -------------------------------------------------------------------------------------


def snapshot(model):
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        [module.training for module in model.modules()],
        [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        torch.random.get_rng_state(),
    )


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@settings(max_examples=12, deadline=None)
@given(
    eval_blocks=st.sets(st.integers(0, 3)),
    frozen=st.sets(st.integers(0, 30)),
    inputs=st.sampled_from(["hidden", "embedding"]),
    fail_at=st.sampled_from([None, 0, 1, 2]),
    error=st.sampled_from([RuntimeError, KeyboardInterrupt]),
)
def test_the_model_is_left_as_it_was(eval_blocks, frozen, inputs, fail_at, error):
    """Without it measuring could change flags, hooks, gradients, weights or randomness, above all when it fails."""
    model = models.transformers_model("vit").train()
    for index in eval_blocks:
        model.vit.layers[index].eval()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index not in frozen)
    if not all(p.requires_grad is False for p in model.parameters()):
        model(torch.randn(2, 3, 32, 32)).logits.sum().backward()
    before = snapshot(model)

    def batches():
        for number in range(3):
            if number == fail_at:
                raise error("in the middle")
            yield torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(number))

    try:
        quick(model, batches(), inputs=inputs, batch_size=4)
    except (RuntimeError, KeyboardInterrupt) as failure:
        assert "in the middle" in str(failure) and fail_at is not None
    else:
        assert fail_at is None
    assert same(before, snapshot(model))


def test_ctrl_c_leaves_the_model_as_it_was(tiny_vit):
    """Without it an interrupt from the keyboard would leave hooks behind that slow training down."""
    before = snapshot(tiny_vit)

    def endless():
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        while True:
            yield torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))

    # shells have processes in the background ignore the signal
    held = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            quick(tiny_vit, endless(), max_pairs=10**9)
    finally:
        signal.signal(signal.SIGINT, held)
    assert same(before, snapshot(tiny_vit))


# --- precision and wrappers ------------------------------------------------------------------------------------------


def ranking(report):
    return list(report.by_role().index)


def test_half_precision_and_autocast_keep_the_ranking(images):
    """Without it bf16 or fp16 models could be ranked by rounding, since their distances must be taken in float32."""
    sources, targets = images
    model = models.transformers_model("vit")
    wanted = quick(model, targets, sources)
    for dtype in (torch.bfloat16, torch.float16):
        half = quick(copy.deepcopy(model).to(dtype), targets.to(dtype), sources.to(dtype))
        assert ranking(half) == ranking(wanted)
        for key, value in rates(wanted).items():
            assert rates(half)[key] == pytest.approx(value, rel=0.05), (dtype, key)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = quick(model, targets, sources)
    assert ranking(cast) == ranking(wanted)


def test_autocast_takes_no_distance_in_half_precision(tiny_vit):
    """Without it float32 tensors inside autocast would have distances off by several per cent."""
    structure = trace(tiny_vit)
    taps = _Taps(tiny_vit, structure, _plan_rows(structure, "hidden"), "hidden")
    taps.images = 8
    tensor = 1 + 0.5 * torch.randn(8, 17, 32)
    exact = taps._distance(("any", "in"), tensor, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(taps._distance(("any", "in"), tensor.clone(), 0), exact)


def test_inference_mode_changes_nothing(tiny_vit, images):
    """Without it a measurement inside torch.inference_mode would fail with a message about the images."""
    sources, targets = images
    # an activation in place makes one tensor of two
    for layer in tiny_vit.vit.layers:
        layer.mlp.activation_fn = nn.ReLU(inplace=True)
    with torch.inference_mode():
        inside = rates(quick(tiny_vit, targets, sources), "module")
    assert inside == rates(quick(tiny_vit, targets, sources), "module")


def test_shift_is_measured_at_the_smallest_batch_too(tiny_vit, images):
    """Without it batch_size=1, which saves memory, would lose the better signal without a word."""
    sources, targets = images
    one, many = (quick(tiny_vit, targets, sources, batch_size=size) for size in (1, 48))
    for small, large in zip(one.select_rows("component"), many.select_rows("component"), strict=True):
        assert small.shift == pytest.approx(large.shift, rel=0.2)


def test_compiled_checkpointed_and_adapted_models_give_the_same(images):
    """Without it a model in the middle of training could not be measured as it is."""
    from peft import LoraConfig, get_peft_model

    sources, targets = images
    wanted = rates(quick(models.transformers_model("vit"), targets, sources), "module")
    compiled = torch.compile(models.transformers_model("vit"))
    checkpointed = models.transformers_model("vit").train()
    checkpointed.gradient_checkpointing_enable()
    adapted = get_peft_model(models.transformers_model("vit"), LoraConfig(target_modules=["q_proj", "fc2"]))
    for model in (compiled, checkpointed, adapted):
        other = rates(quick(model, targets, sources), "module")
        assert other.keys() == wanted.keys()
        for key, value in wanted.items():
            assert other[key] == pytest.approx(value, rel=1e-5), (type(model), key)


def test_the_report_states_how_it_was_obtained(tiny_vit, images, tmp_path):
    """Without it a figure could not be traced to its protocol, seed and versions."""
    report = quick(tiny_vit, images[1], images[0], seed=3)
    assert (report.inputs, report.seed, report.pairs, report.max_pairs) == ("hidden", 3, 48, 12_800)
    assert report.base_parameters == sum(p.numel() for p in tiny_vit.parameters())
    assert {"torch", "transformers", "peft", "python"} <= report.versions.keys()
    assert PlasticityReport.load(report.save(tmp_path / "r.json")) == report


def test_a_threshold_that_only_just_holds_is_measured_on(tiny_vit):
    """Without it a measurement would end in an error, and lose its pairs, because a bad end of an interval fails a threshold."""
    images = torch.randn(40, 3, 32, 32)
    highest = measure_plasticity(tiny_vit, images, progress=False, tolerance=0).by_role()["mean"].iloc[0]
    selection = {"threshold": 0.999 * highest, "adapter": "full", "signal": "plasticity"}
    report = measure_plasticity(tiny_vit, images, progress=False, tolerance=0.9, selection=selection)
    assert report.stopped == "data exhausted" and report.select(**selection).units


@pytest.mark.parametrize(("signal", "message"), [("speed", "signal='speed'"), ("shift", "pass source")])
def test_a_selection_by_a_signal_that_will_not_be_there_is_refused_at_once(tiny_vit, signal, message):
    """Without it a long measurement would end in this error."""
    with pytest.raises(ValueError, match=message):
        measure_plasticity(tiny_vit, torch.randn(4, 3, 32, 32), progress=False, selection={"signal": signal})


def test_offloaded_models_are_read_as_others(images):
    """Without it images would be sent to where offloaded weights are, which is nowhere."""
    model = models.transformers_model("vit")
    expected = quick(model, *images), plasticity_bounds(model, images=images[0])
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(model.parameters()).device.type == "meta"
    found = quick(model, *images), plasticity_bounds(model, images=images[0])
    for ours, theirs in zip(found, expected, strict=True):
        assert [(r.name, r.mean) for r in ours.rows] == [(r.name, pytest.approx(r.mean)) for r in theirs.rows]


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_offloaded_models_in_half_precision_have_bounds(dtype):
    """Without it what brings offloaded weights back would meet weights of another precision, and crash."""
    model = cpu_offload(models.transformers_model("vit").to(dtype), execution_device=torch.device("cpu"))
    report = plasticity_bounds(model)
    assert {row.role for row in report.select_rows("component")} == set(BLOCK_ROLES)


class Devices(TorchFunctionMode):
    """Notes where the package makes a tensor without saying on which device."""

    def __init__(self):
        self.unsaid = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        caller = sys._getframe(1)
        ours = caller.f_globals.get("__name__", "").startswith("plastic_peft")
        # what holds data already stays where it is, or comes to the model's device with the rest
        makes = func in _device_constructors() and func not in (torch.as_tensor, torch.tensor)
        if ours and makes and (kwargs or {}).get("device") is None:
            self.unsaid.append(f"{caller.f_code.co_filename}:{caller.f_lineno}")
        return func(*args, **(kwargs or {}))


def test_another_default_device_is_none_of_its_business(images):
    """Without it scripts that make all tensors on a GPU by default would mix devices in the measurement's own sums."""
    with Devices() as devices:
        torch.randn(2)
        quick(models.transformers_model("vit"), *images)
        plasticity_bounds(models.transformers_model("dinov3"))
    assert not devices.unsaid
    # a device without values finds what the package does not make itself
    model = models.transformers_model("vit")
    expected = quick(model, *images)
    with torch.device("meta"):
        assert quick(model, *images) == expected


def test_images_are_brought_to_the_type_of_any_model():
    """Without it a model in half precision would refuse what its own image processor gives."""
    model = models.transformers_model("beit").bfloat16()
    assert find_components(model, torch.randn(2, 3, 32, 32)) == find_components(model)


def test_a_model_of_text_and_images_says_which_part_to_pass(images):
    """Without it images would be handed over as text, and the message would be about anything but that."""
    model = transformers.CLIPModel(transformers.CLIPConfig(vision_config=models.SMALL, text_config=models.TEXT))
    for call in (lambda: find_components(model, images[0]), lambda: quick(model, images[0])):
        with pytest.raises(ValueError, match=r"CLIPModel takes text .* model.vision_model"):
            call()
