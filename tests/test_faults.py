"""Runs that are killed, lose a process, a disk or a port: they go on as if nothing had been, or say what to do."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from hub_server import HubServer
from models import transformers_model
from ranks import Ranks
from safetensors.torch import load_file
from transformers import ViTImageProcessor

from plastic_peft.faults import LostProcessError, MemoryFullError, explained


OPTIONS = {
    "dataset_name": "digits",
    "max_train_samples": 160,
    "max_eval_samples": 48,
    "augment": "crop",
    "max_pairs": 64,
    "tolerance": 0,
    "measure_batch_size": 4,
    "budget": 0.1,
    "r": 2,
    "lora_dropout": 0.1,
    "num_train_epochs": 2,
    "save_strategy": "steps",
    "save_steps": 3,
    "use_cpu": True,
    "disable_tqdm": True,
    "hub_model_id": "ada/digits",
    "hub_token": "secret",
}
RESUMES = "The same command resumes from the last whole checkpoint."


@pytest.fixture(scope="module")
def hub():
    """A Hub on loopback, which the runs of this file take for the real one."""
    with HubServer({"secret": "ada"}) as server:
        yield server


@pytest.fixture(scope="module")
def train(tmp_path_factory, hub):
    """Function that starts `plastic-peft train` on a tiny model in some folder; further arguments are those of `Ranks`."""
    base = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    transformers_model("vit").save_pretrained(base)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(base)
    config = base / "run.yaml"
    config.write_text(json.dumps({"model_name_or_path": str(base), **OPTIONS}))

    def start(folder, *flags, world=1, log=None, **options):
        each = ["--output_dir", folder, "--per_device_train_batch_size", 16 // world]
        return Ranks(["train", config, *each, *flags], log or f"{folder}.log", world, hub=hub.url, **options)

    assert Ranks(["--version"], base / "log").codes() == [0]
    return start


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """Folders of uninterrupted runs on one process and on two, and how many seconds they took."""
    runs = {}
    for world in (1, 2):
        start, folder = time.monotonic(), tmp_path_factory.mktemp("whole") / "run"
        ranks = train(folder, world=world)
        assert ranks.codes() == [0] * world, ranks.said()
        runs[world] = folder, time.monotonic() - start
    return runs


def same_result(folder, other):
    for name in ("plasticity_report.json", "plasticity_selection.json"):
        assert (folder / name).read_text() == (other / name).read_text(), name
    found, expected = (load_file(path / "adapter_model.safetensors") for path in (folder, other))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    results = [json.loads((path / "results.json").read_text()) for path in (folder, other)]
    for key in ("eval_loss", "test_loss", "test_accuracy", "confusion_matrix"):
        assert results[0]["metrics"][key] == results[1]["metrics"][key], key


def checkpoint(folder, step):
    return (folder / f"checkpoint-{step}" / "whole.json").exists


@pytest.mark.parametrize("world", [1, 2])
def test_runs_killed_at_random_end_as_if_they_had_not_been(train, whole, tmp_path, world):
    """Without it there could be moments, beside those that somebody thought of, after which a run goes on differently."""
    (expected, seconds), folder, killed = whole[world], tmp_path / "run", 0
    for seed in range(4):
        ranks = train(folder, world=world)
        ranks.processes[0].join(seconds * random.Random(seed).uniform(0.1, 0.9))
        killed += ranks.alive()
        ranks.kill(signal.SIGKILL)
        ranks.codes()
    ranks = train(folder, world=world)
    assert ranks.codes() == [0] * world, ranks.said()
    assert killed > 0
    assert "Measured" not in ranks.logs[0].read_text().partition("Using the report")[2]
    same_result(folder, expected)
    assert not list(folder.glob(".saving*"))


def test_a_killed_run_without_checkpoints_trains_again_by_the_same_report(train, whole, tmp_path):
    """Without it a run that saves nothing on its way could not be repeated, or would measure and select anew."""
    folder = tmp_path / "run"
    ranks = train(folder, "--save_strategy", "no")
    assert ranks.wait_for((folder / "plasticity_selection.json").exists)
    ranks.kill(signal.SIGKILL)
    ranks.codes()
    again = train(folder, "--save_strategy", "no")
    assert again.codes() == [0], again.said()
    assert "Using the report" in again.said() and not list(folder.glob("checkpoint-*"))
    same_result(folder, whole[1][0])


@pytest.mark.parametrize("moment", ["POST .*/preupload/", "PUT /lfs/", "POST .*/commit/"])
def test_a_run_killed_while_it_pushes_pushes_whole_when_started_again(train, whole, hub, tmp_path, moment):
    """Without it a kill could leave a part of an adapter on the Hub, or the restart could refuse or train again."""
    hub.repositories.clear(), hub.objects.clear()
    folder = tmp_path / "run"
    ranks = train(folder, "--push_to_hub", start=False)

    class Deadly(list):
        def append(self, request):
            super().append(request)
            if re.match(moment, request):
                ranks.kill(signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub, "requests", Deadly())
        ranks.start()
        assert ranks.codes() == [-signal.SIGKILL], ranks.said()
    # a commit arrives as a whole, or not at all
    before = {name for repository in hub.repositories.values() for name in repository.files}
    assert not before or {"adapter_config.json", "adapter_model.safetensors"} <= before
    again = train(folder, "--push_to_hub")
    assert again.codes() == [0], again.said()
    log = again.logs[0].read_text().partition("Using the report")[2]
    assert "Training has ended before" in log and "Measured" not in log
    same_result(folder, whole[1][0])
    files = hub.repositories["ada/digits"].files
    assert files["adapter_model.safetensors"] == (folder / "adapter_model.safetensors").read_bytes()
    assert {"README.md", "adapter_config.json", "plasticity_report.json", "preprocessor_config.json"} <= set(files)


def test_a_push_that_will_be_refused_is_refused_before_the_work(train, tmp_path):
    """Without it a wrong token would show after hours of training."""
    for number, flags in enumerate((["--hub_token", "stolen"], ["--hub_model_id", "someone/digits"])):
        ranks = train(tmp_path / f"run{number}", "--push_to_hub", *flags)
        assert ranks.codes() == [2], ranks.said()
        last = ranks.said().strip().splitlines()[-1]
        assert "could not be pushed" in last and "--hub_token" in last and "Measur" not in ranks.said()


@pytest.mark.parametrize("stage, lost", [("measure", 1), ("train", 0), ("save", 1)])
def test_a_lost_process_ends_the_other_with_a_message_and_the_run_resumes(train, whole, tmp_path, stage, lost):
    """Without it the survivor would wait for the dead one, and nobody would know why nor what to do."""
    folder = tmp_path / "run"
    ranks = train(folder, world=2)
    reached = {
        "measure": lambda: "Measuring on 160 training images" in ranks.said(0),
        "train": checkpoint(folder, 3),
        "save": (folder / "checkpoint-6").exists,
    }
    assert ranks.wait_for(reached[stage])
    ranks.kill(signal.SIGKILL, rank=lost)
    assert (folder / "plasticity_report.json").exists() == (stage != "measure")
    codes = ranks.codes()
    assert codes[lost] == -signal.SIGKILL and codes[1 - lost] == 1
    last = ranks.said(1 - lost).strip().splitlines()[-1]
    assert f"Process {1 - lost}" in last and "log" in last
    again = train(folder, world=2)
    assert again.codes() == [0, 0], again.said()
    same_result(folder, whole[2][0])


def test_a_process_that_hangs_ends_the_other_after_the_timeout(train, tmp_path):
    """Without it a machine that stalls would hold all others for half an hour, whatever `--ddp_timeout` says."""
    folder = tmp_path / "run"
    ranks = train(folder, "--ddp_timeout", "3", world=2)
    assert ranks.wait_for(checkpoint(folder, 3))
    ranks.kill(signal.SIGSTOP, rank=1)
    ranks.processes[0].join(60)
    ranks.kill(signal.SIGKILL, rank=1)
    assert ranks.codes() == [1, -signal.SIGKILL]
    assert "Process 0 got no answer from another one" in ranks.said(0) and RESUMES in ranks.said(0)


@pytest.mark.parametrize("largest", [10_000, 40_000])
def test_a_file_that_cannot_grow_stops_the_run_with_advice_and_the_run_resumes(train, whole, tmp_path, largest):
    """Without it a full disk would look like a bug of torch, and the half-written checkpoint could be read."""
    folder = tmp_path / "run"
    ranks = train(folder, largest_file=largest)
    assert ranks.codes() == [2], ranks.said()
    last = ranks.said().strip().splitlines()[-1]
    assert last.startswith("plastic-peft: A file could not be written whole") and str(folder) in last
    assert "make room" in last and RESUMES in last and "Traceback" not in ranks.said()
    again = train(folder)
    assert again.codes() == [0], again.said()
    same_result(folder, whole[1][0])


def test_a_full_disk_stops_the_run_with_advice_and_the_run_resumes(train, whole, tmp_path, tmp_path_factory):
    """Without it the limit on files above could differ from what a disk that is really full does."""
    disk, log = tmp_path / "disk", tmp_path_factory.mktemp("log") / "log"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk can be mounted by root only")
    try:
        # the output folder is the disk itself, and what is around it cannot be written
        tmp_path.chmod(0o555)
        ranks = train(disk, log=log, mortal=True)
        assert ranks.codes() == [2], ranks.said()
        assert "MiB free: make room" in ranks.said()
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        again = train(disk, log=log, mortal=True)
        assert again.codes() == [0], again.said()
        same_result(disk, whole[1][0])
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_what_cannot_be_written_is_said_before_the_work(train, whole, tmp_path, tmp_path_factory):
    """Without it hours of measuring or training would end in a read-only folder."""
    shutil.copytree(whole[1][0], tmp_path / "run")
    for folder in (tmp_path / "run", tmp_path):
        folder.chmod(0o555)
    adapter, digits = ["--adapter", whole[1][0]], ["--dataset_name", "digits"]
    commands = [
        ["train", *digits, "--output_dir", tmp_path / "new"],
        ["compare", *digits, "--output_dir", tmp_path / "new"],
        ["export", *adapter, "--output_dir", tmp_path / "new"],
        ["measure", *digits, "--output", tmp_path / "report.json"],
        ["predict", *adapter, "--images", "digits", "--output", tmp_path / "labels.csv"],
    ]
    logs = tmp_path_factory.mktemp("logs")
    attempts = [Ranks(command, logs / command[0], mortal=True) for command in commands]
    # a run to resume, in a folder that has become read-only
    attempts.append(train(tmp_path / "run", log=logs / "resume", mortal=True))
    for attempt in attempts:
        assert attempt.codes() == [2], attempt.said()
        last = attempt.said().strip().splitlines()[-1]
        assert "cannot be written" in last and re.search(r"with --output(_dir)?\.$", last), last
        assert "Measur" not in attempt.said()


def test_what_the_machine_says_is_told_with_a_remedy(tmp_path):
    """Without it a full GPU would be a traceback, and a PyTorch without NCCL would be taken for a lost process."""

    def wrapped():
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        except RuntimeError as error:
            raise ValueError("The model cannot take batch 0: pass images of the size that it expects.") from error

    with (
        pytest.raises(MemoryFullError, match="Tried to allocate.*--gradient_checkpointing.*--measure_batch_size"),
        explained(),
    ):
        wrapped()
    with pytest.raises(OSError, match="--ddp_backend gloo.*--use_cpu"), explained():
        raise RuntimeError("Distributed package doesn't have NCCL built in")
    with pytest.raises(LostProcessError, match="Process 1"), explained(tmp_path, 1):
        raise RuntimeError("NCCL error: remote process exited")


def test_several_processes_say_things_once(train, tmp_path):
    """Without it every message and warning would come as often as there are processes."""
    ranks = train(tmp_path / "run", "--max_steps", "2", world=2)
    assert ranks.codes() == [0, 0], ranks.said()
    assert "Measuring on" in ranks.said(0) and "Measuring on" not in ranks.said(1)
    assert ranks.said(1).strip() == ""
    assert "Warning" not in ranks.said(0) and "find_unused" not in ranks.said(0)


def test_processes_that_do_not_know_of_each_other_are_refused(train, tmp_path):
    """Without it each of them would run alone, and all would write to the same files at the same time."""
    ranks = train(tmp_path / "run", "--use_cpu", "false", world=2)
    assert ranks.codes() == [2, 2], ranks.said()
    assert "--use_cpu" in ranks.said(1).strip().splitlines()[-1]


def test_a_folder_in_which_a_run_is_under_way_is_left_to_it(train, whole, tmp_path):
    """Without it a command given twice, or again while processes of a killed launcher live on, would mix two runs."""
    folder = tmp_path / "run"
    first = train(folder)
    assert first.wait_for(checkpoint(folder, 3))
    second = train(folder, "--start_over", log=tmp_path / "second.log")
    assert second.codes() == [2], second.said()
    assert "Another run is under way" in second.said().strip().splitlines()[-1]
    assert first.codes() == [0], first.said()
    same_result(folder, whole[1][0])


def test_a_port_that_is_taken_is_named(train, tmp_path):
    """Without it two runs on one machine would fail in ways that say nothing of ports."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        ranks = train(tmp_path / "run", world=2, port=port)
        ranks.processes[0].join(60)
        ranks.kill(signal.SIGKILL, rank=1)
        assert ranks.codes()[0] == 2, ranks.said()
        assert f"{port}" in ranks.said(0) and "MASTER_PORT" in ranks.said(0).strip().splitlines()[-1]
        # accelerate's launcher takes another one by itself
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", str(port), "--multi_gpu"]
        launch += ["--num_machines", "1", "--num_processes", "2", "-m", "plastic_peft", "--version"]
        done = subprocess.run(launch, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        assert f"Port `{port}` is already in use" in done.stderr
