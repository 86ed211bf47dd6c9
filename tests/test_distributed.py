"""Measurement on several real processes, started as users start them."""

import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from plastic_peft import PlasticityReport


WORKER = Path(__file__).parent / "workers" / "measure.py"


def launch(processes, way, output, timeout=240):
    # accelerate starts several processes on one machine by its multi-GPU launcher, with gloo where there is no GPU
    several = ["--multi_gpu"] if processes > 1 else []
    command = [sys.executable, "-m", "accelerate.commands.launch", *several, "--num_processes", str(processes)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += ["--num_cpu_threads_per_process", "1", str(WORKER), way, str(output)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def reports(output):
    return [PlasticityReport.load(path) for path in sorted(Path(output).glob("rank*.json"))]


def close(a, b):
    assert replace(a, rows=()) == replace(b, rows=())
    assert [r.name for r in a.rows] == [r.name for r in b.rows]
    for x, y in zip(a.rows, b.rows, strict=True):
        for field in ("mean", "std", "source_source", "target_target"):
            assert getattr(x, field) == pytest.approx(getattr(y, field), rel=1e-4), (x.name, field)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    output = tmp_path_factory.mktemp("one")
    done = launch(1, "plain", output)
    assert done.returncode == 0, done.stderr[-2000:]
    return reports(output)[0]


@pytest.mark.parametrize(
    ("processes", "way"),
    [
        (2, "plain"),
        (4, "plain"),
        (2, "prepared"),
        (2, "sharded"),
        (2, "sharded adapter"),
        (2, "sharded loaders"),
        (2, "dispatched loaders"),
    ],
)
def test_every_process_returns_the_report_of_one_process(alone, tmp_path, processes, way):
    """Without it the pairs could depend on the number of processes, or the processes disagree about the selection."""
    done = launch(processes, way, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    found = reports(tmp_path)
    assert len(found) == processes
    assert all(report == found[0] for report in found)
    assert found[0].pairs == 45
    close(found[0], alone)


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed, a large optional package, is not installed")
def test_weights_that_zero3_has_split_are_measured_and_bounded_whole(alone, tmp_path, monkeypatch):
    """Without it models too large for one device would be read as models without weights."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    done = launch(2, "zero3", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    for report in reports(tmp_path):
        close(report, alone)


def test_processes_that_see_different_images_are_refused(tmp_path):
    """Without it each process would take its share of images that no other has, and the rest be measured by nobody."""
    done = launch(2, "different streams", tmp_path)
    assert done.returncode != 0
    assert "The processes see different target images" in done.stderr
    assert not reports(tmp_path)


def test_a_lost_process_ends_the_others_with_a_message(tmp_path):
    """Without it the survivors would wait for the dead one until somebody looks."""
    done = launch(2, "dies", tmp_path, timeout=120)
    assert done.returncode != 0
    assert "could not add up its rates with the others" in done.stderr or "exitcode  : 7" in done.stderr
    assert not reports(tmp_path)
