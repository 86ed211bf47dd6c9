"""The report as a file, a table, a picture and a basis of selection."""

import json
from dataclasses import asdict

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plastic_peft import PlasticityReport, measure_plasticity


pytestmark = pytest.mark.versions


@pytest.fixture(scope="module")
def report():
    import models

    torch.manual_seed(0)
    targets, sources = torch.randn(2, 16, 3, 32, 32)
    return measure_plasticity(models.transformers_model("vit"), targets, sources, progress=False)


def test_a_report_survives_its_file(report, tmp_path):
    """Without it a measurement could not be made once and used later."""
    assert PlasticityReport.load(report.save(tmp_path / "a.json")) == report
    assert report.save(tmp_path).name == "plasticity_report.json"
    assert PlasticityReport.load(tmp_path) == report
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "plasticity_report.json"]


def test_an_interrupted_save_keeps_the_old_file(report, tmp_path, monkeypatch):
    """Without it a full disk in the middle of saving would destroy the previous report."""
    path = report.save(tmp_path / "r.json")
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        report.save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "is not valid JSON"),
        (lambda text: "[1, 2]", "is no plasticity report"),
        (lambda text: text.replace('"version": 1', '"version": 7'), "format version 7"),
        (lambda text: text.replace('"role": "attention"', '"role": "mixer"', 1), "role 'mixer' is unknown"),
        (lambda text: text.replace('"rows": [', '"rows": [{"name": 3}, ', 1), "row 0: field"),
        (lambda text: text.replace('"pairs": 16', '"pairs": -1', 1), "field 'pairs' is '-1'"),
        (lambda text: text.replace('"inputs": "hidden"', '"inputs": "hidden", "extra": 1'), "unknown fields: extra"),
    ],
)
def test_a_corrupt_report_is_refused(report, tmp_path, damage, message):
    """Without it a damaged file would be selected from, or fail later with an error that names no file."""
    path = report.save(tmp_path / "r.json")
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match=message) as caught:
        PlasticityReport.load(path)
    assert str(path) in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_of_a_field_is_read_or_refused(report, data):
    """Without it some malformed value would get through and surface as a crash somewhere else."""
    whole = _as_json(report)
    place = data.draw(st.sampled_from([whole, whole["rows"][0], whole["rows"][-1]]))
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(JSON)
    try:
        loaded = PlasticityReport.from_dict(whole)
    except ValueError:
        return
    loaded.to_pandas()
    assert PlasticityReport.from_dict(_as_json(loaded)) == loaded


def _as_json(report):
    return json.loads(json.dumps({"format": "plastic_peft.report", "version": 1, **asdict(report)}))


def test_tables_hold_what_the_rows_hold(report):
    """Without it the table that users look at could differ from what is selected by."""
    table = report.to_pandas("module")
    assert len(table) == len(report.select_rows("module"))
    assert {"name", "level", "role", "block", "kind", "parameters", "mean", "std", "pairs", "ci_low", "ci_high",
            "source_source", "target_target", "shift"} <= set(table.columns)  # fmt: skip
    roles = report.by_role()
    rows = report.select_rows("component", "mlp_in")
    assert roles.loc["mlp_in", "mean"] == pytest.approx(sum(r.mean for r in rows) / len(rows))
    assert list(roles["mean"]) == sorted(roles["mean"], reverse=True)


def test_the_picture_shows_every_role_and_block(report, tmp_path):
    """Without it the picture could lose a role or a block, or not be written."""
    figure = report.plot(tmp_path / "p.png", signal="shift")
    lines = figure.axes[0].get_lines()
    assert len(lines) == 5 and all(list(line.get_xdata()) == [0, 1, 2, 3] for line in lines)
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert len(figure.axes[1].patches) == 5


def test_shift_needs_a_source(report):
    """Without it a report measured without source images would be ranked by nothing."""
    import models

    plain = measure_plasticity(models.transformers_model("vit"), torch.randn(16, 3, 32, 32), progress=False)
    with pytest.raises(ValueError, match="needs source images"):
        plain.select(signal="shift", top_k=1)
    assert report.select(signal="shift", top_k=1).units
    with pytest.raises(ValueError, match="signal='speed' is unknown"):
        report.select(signal="speed", top_k=1)


def test_a_report_is_frozen(report):
    """Without it a report could be changed between its measurement and its use."""
    with pytest.raises(AttributeError):
        report.seed = 1
    with pytest.raises(AttributeError):
        report.rows[0].mean = 2.0
