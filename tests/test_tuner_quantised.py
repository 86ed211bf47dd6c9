"""Quantised models: read and measured like the float model, and a head that can be trained."""

import pytest
from models import quantised_vit_nano
from peft import get_peft_model

from plastic_peft import PlasticityConfig, load_vit_nano, measure_plasticity, vit_nano_source_images
from plastic_peft.data import load_images
from plastic_peft.processors import find_processor


pytestmark = pytest.mark.versions


def measured(model):
    digits, sources = load_images("digits")["train"].select(range(24)), vit_nano_source_images().select(range(24))
    return measure_plasticity(
        model, digits, sources, tolerance=0, progress=False, image_processor=find_processor(model)
    )


@pytest.fixture(scope="module")
def exact():
    return measured(load_vit_nano())


@pytest.mark.parametrize(("bits", "close"), [(8, 0.005), (4, 0.1)])
def test_a_quantised_model_ranks_as_the_float_model_does(bits, close, exact):
    """Without it quantised models could be read as another structure, or have other modules selected, or other budgets."""
    model = quantised_vit_nano(bits)
    report = measured(model)
    assert report.fingerprint == exact.fingerprint and report.base_parameters == exact.base_parameters
    assert list(report.by_role().index) == list(exact.by_role().index)
    for row, wanted in zip(report.rows, exact.rows, strict=True):
        assert (row.name, row.role, row.parameters, row.shape) == (
            wanted.name, wanted.role, wanted.parameters, wanted.shape,
        )  # fmt: skip
        assert row.mean == pytest.approx(wanted.mean, rel=close)
    for options in ({"top_k": 12, "granularity": "module"}, {"budget": 0.05}):
        selections = [set(r.select(**options).modules) for r in (report, exact)]
        assert selections[0] == selections[1]
    if bits == 8:
        # reading the structure sets the treatment of outliers aside, and has to bring it back
        assert {m.state.threshold for m in model.modules() if hasattr(m, "state")} == {6.0}
    # a share of the base model is the same share, also where only scores are given
    scores = {row.name: row.mean for row in report.select_rows("module", "mlp_in")}
    adapted = [
        get_peft_model(m, PlasticityConfig(plasticity=scores, budget=0.003, granularity="module", r=2))
        for m in (model, load_vit_nano())
    ]
    assert adapted[0].targeted_module_names == adapted[1].targeted_module_names != []


def test_a_quantised_head_is_refused_with_the_remedy():
    """Without it the copy of the head that is to be trained would fail as a number that takes no gradients."""
    model = quantised_vit_nano(8, skipped=("nothing",))
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(
        ValueError, match=r"classifier are quantised \(torch.int8\).*llm_int8_skip_modules=\['classifier'\]"
    ):
        get_peft_model(model, PlasticityConfig(target_modules=["fc1"], modules_to_save=["classifier"]))
    assert [name for name, _ in model.named_modules()] == before
