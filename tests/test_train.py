"""Training from images to adapter: runs that resume after any kill, on one process and several, and plasticity curves."""

from __future__ import annotations

import copy
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from models import transformers_model
from peft import get_peft_model
from ranks import Ranks
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerControl, TrainerState, ViTImageProcessor, pipeline

from plastic_peft import PlasticityConfig, load_vit_nano
from plastic_peft.callback import CURVE_NAME, PlasticityCallback, gradient_norms
from plastic_peft.data import collate, load_images, with_pixels
from plastic_peft.runs import compare, half_width, way_of
from plastic_peft.train import (
    DataArguments,
    ModelArguments,
    PlasticityArguments,
    last_whole_checkpoint,
    load_model,
    make_trainer,
    predicted_logits,
    train,
    training_arguments,
)


EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder of a saved tiny model with its image processor."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    transformers_model("vit").save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


def asked(base, **options):
    data = DataArguments("digits", max_train_samples=160, max_eval_samples=48, augment="crop")
    plasticity = PlasticityArguments(max_pairs=32, **{"budget": "0.1", "r": 2, "lora_dropout": 0.1, **options})
    return ModelArguments(base), data, plasticity


def run_options(folder, **options):
    return training_arguments(
        str(folder),
        **{
            "num_train_epochs": 2,
            "per_device_train_batch_size": 16,
            "save_strategy": "steps",
            "save_steps": 3,
            "use_cpu": True,
            "disable_tqdm": True,
            **options,
        },
    )


def in_a_process(function, log: Path):
    """Start `function` in a process of its own, with this one's imports; its output goes to `log`."""

    def start():
        sys.stdout = sys.stderr = open(log, "a", buffering=1)  # noqa: SIM115 - open as long as the process lives
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, force=True)
        function()

    process = multiprocessing.get_context("fork").Process(target=start)
    process.start()
    return process


def wait_for(condition, process):
    while process.is_alive() and not condition():
        time.sleep(0.001)


@pytest.mark.parametrize(
    "options", [{"adapter": "lora"}, {"adapter": "full", "lora_dropout": 0.0}], ids=["lora", "full"]
)
@pytest.mark.versions
def test_runs_killed_at_any_moment_end_as_if_they_had_not_been(base, tmp_path, options):
    """A cluster kills jobs: the restarted one must neither measure again, nor read half a file, nor train differently."""

    def run(folder):
        return lambda: train(*asked(base, **options), run_options(folder, logging_steps=1))

    whole = in_a_process(run(tmp_path / "whole"), tmp_path / "whole.log")
    whole.join()
    assert whole.exitcode == 0, (tmp_path / "whole.log").read_text()[-2000:]

    broken, log = tmp_path / "broken", tmp_path / "broken.log"
    chance = random.Random(1)
    moments = [
        lambda: broken.exists(),
        lambda: (broken / "plasticity_report.json").exists(),
        lambda: (broken / "checkpoint-3").exists(),
        lambda: (broken / "checkpoint-9" / "optimizer.pt").exists(),
        lambda: (broken / "checkpoint-15" / "whole.json").exists(),
        lambda: (broken / "adapter_model.safetensors").exists(),
    ]
    killed = 0
    for moment in moments:
        process = in_a_process(run(broken), log)
        wait_for(moment, process)
        time.sleep(chance.uniform(0, 0.03))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            killed += 1
        process.join()
    last = in_a_process(run(broken), log)
    last.join()
    assert last.exitcode == 0, log.read_text()[-2000:]
    assert killed >= 4
    # with the report there, nothing is measured again
    assert "Measured" not in log.read_text().partition("Using the report")[2]
    assert "Resuming from" in log.read_text()
    for name in ("plasticity_report.json", "plasticity_selection.json"):
        assert (broken / name).read_text() == (tmp_path / "whole" / name).read_text()
    expected = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    found = load_file(broken / "adapter_model.safetensors")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    results = [json.loads((folder / "results.json").read_text()) for folder in (tmp_path / "whole", broken)]
    for key in ("eval_loss", "test_loss", "test_accuracy", "confusion_matrix"):
        assert results[0]["metrics"][key] == results[1]["metrics"][key]
    assert results[0]["selection"] == results[1]["selection"]


def test_a_checkpoint_counts_only_when_all_of_it_was_written(tmp_path):
    """The trainer writes checkpoints file by file; after a kill the newest folder may hold half of one."""
    assert last_whole_checkpoint(tmp_path) is None
    for step in (5, 10, 15, 20):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").write_text("1234")
    for step in (5, 10, 15):
        (tmp_path / f"checkpoint-{step}" / "whole.json").write_text('{"weights": 4}')
    (tmp_path / "checkpoint-15" / "weights").write_text("12")
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    (tmp_path / "checkpoint-10" / "whole.json").write_text('{"weights"')
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-5"


def test_another_run_in_the_folder_is_neither_resumed_nor_overwritten(base, tmp_path):
    """Resuming under other arguments would mix two runs; overwriting would destroy one."""
    train(*asked(base), run_options(tmp_path, max_steps=2))
    with pytest.raises(ValueError, match="holds a run with other arguments.*budget '0.1' -> '0.2'.*--start_over"):
        train(*asked(base, budget="0.2"), run_options(tmp_path, max_steps=2))
    # what an earlier release did not know of is no other argument
    note = json.loads((tmp_path / "plasticity_run.json").read_text())
    del note["within"]
    (tmp_path / "plasticity_run.json").write_text(json.dumps(note))
    assert train(*asked(base), run_options(tmp_path, max_steps=2)).trainable > 0
    result = train(*asked(base, budget="0.2"), run_options(tmp_path, max_steps=2), start_over=True)
    assert result.trainable > 0
    assert json.loads((tmp_path / "plasticity_run.json").read_text())["budget"] == "0.2"


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"learning_rate": 0.5}, "learning_rate 0.001 -> 0.5"),
        ({"lr_scheduler_type": "linear"}, "lr_scheduler_type 'cosine' -> 'linear'"),
        ({"max_steps": 3}, "max_steps 2 -> 3"),
        ({"gradient_accumulation_steps": 2}, "images_per_step 16 -> 32"),
        ({"seed": 7, "weight_decay": 0.1}, "weight_decay 0.0 -> 0.1; seed 42 -> 7"),
        ({"bf16": True}, "bf16 False -> True"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_run_is_not_resumed_under_another_training(base, tmp_path, changed, said):
    """Without it a folder would hold a result that belongs to no set of arguments, and a new learning rate would do nothing."""
    train(*asked(base, target_modules=["fc1"]), run_options(tmp_path, max_steps=2))
    with pytest.raises(ValueError, match=f"other arguments .{said}.*--start_over"):
        train(*asked(base, target_modules=["fc1"]), run_options(tmp_path, **{"max_steps": 2, **changed}))


def test_what_decides_nothing_may_change_when_a_run_is_resumed(base, tmp_path):
    """Without it nobody could log more often, or share the same images per step among other batches."""
    train(*asked(base, target_modules=["fc1"]), run_options(tmp_path, max_steps=2))
    other = {"logging_steps": 1, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    train(*asked(base, target_modules=["fc1"]), run_options(tmp_path, max_steps=2, **other))


def test_a_report_in_the_folder_is_the_runs_own_or_refused(base, tmp_path):
    """Without it a run would select by whatever report lies in its folder, and not by the one that it was given."""
    train(*asked(base), run_options(tmp_path / "run", max_steps=1))
    own, other = tmp_path / "run" / "plasticity_report.json", tmp_path / "other.json"
    other.write_text(own.read_text().replace('"seed": 0', '"seed": 1'))
    train(*asked(base, report=str(other)), run_options(tmp_path / "given", max_steps=1))
    with pytest.raises(ValueError, match="another report than .*run.plasticity_report.json"):
        train(*asked(base, report=str(own)), run_options(tmp_path / "given", max_steps=1))
    # the run has a copy of what it was given
    other.unlink()
    train(*asked(base, report=str(other)), run_options(tmp_path / "given", max_steps=1))

    (tmp_path / "bare").mkdir()
    bare = tmp_path / "bare" / "plasticity_report.json"
    bare.write_text(own.read_text())
    with pytest.raises(ValueError, match="holds a report, but no run"):
        train(*asked(base), run_options(tmp_path / "bare", max_steps=1))
    again = {"max_steps": 1}
    train(*asked(base, report=str(bare)), run_options(tmp_path / "bare", **again), start_over=True)
    assert bare.read_text() == own.read_text()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train(*asked(base, report="nowhere.json"), run_options(tmp_path / "none", max_steps=1))


def test_the_last_evaluation_of_training_is_not_repeated(base, tmp_path, monkeypatch):
    """Without it every run would evaluate the same weights on the same images twice."""
    from transformers import Trainer

    calls, plain = [], Trainer.evaluate
    monkeypatch.setattr(Trainer, "evaluate", lambda self, *a, **k: calls.append(1) or plain(self, *a, **k))
    arguments = asked(base, target_modules=["fc1"])
    once = train(*arguments, run_options(tmp_path / "a", max_steps=2))
    assert len(calls) == 1
    later = train(*arguments, run_options(tmp_path / "b", max_steps=2, eval_strategy="no"))
    assert len(calls) == 2
    for name in ("eval_loss", "eval_accuracy", "eval_macro_f1"):
        assert once.metrics[name] == later.metrics[name]
    best = {"load_best_model_at_end": True, "metric_for_best_model": "accuracy"}
    train(*arguments, run_options(tmp_path / "c", max_steps=2, save_strategy="epoch", **best))
    assert len(calls) == 4


def test_a_comparison_in_a_folder_of_another_is_refused(base, tmp_path):
    """Without it the numbers of other data, budgets or steps would be printed as those of this comparison."""
    model, data, plasticity = asked(base, budget="2000", lora_dropout=0.0)
    options = {"max_steps": 1, "save_strategy": "no", "eval_strategy": "no"}

    def compared(data=data, plasticity=plasticity, methods=("highest",), start_over=False, **more):
        training = run_options(tmp_path, **{**options, **more})
        return compare(methods, [0], [1e-3], model, data, plasticity, training, start_over=start_over)

    first = compared()
    for change, said in (
        ({"data": replace(data, max_train_samples=80)}, "max_train_samples 160 -> 80"),
        ({"plasticity": replace(plasticity, budget="3000")}, "budget '2000' -> '3000'"),
        ({"max_steps": 2}, "max_steps 1 -> 2"),
        ({"plasticity": replace(plasticity, report=str(tmp_path / "nowhere.json"))}, "given_report False -> True"),
    ):
        with pytest.raises(ValueError, match=f"{said}.*--start_over"):
            compared(**change)
    assert compared(methods=("highest", "lowest"))[0] == first[0]
    # a single run of it may have been made by hand
    note = next(tmp_path.glob("lowest/*/plasticity_run.json"))
    note.write_text(note.read_text().replace('"max_steps": 1', '"max_steps": 5'))
    with pytest.raises(ValueError, match="max_steps 5 -> 1"):
        compared(methods=("highest", "lowest"))
    again = compared(plasticity=replace(plasticity, budget="3000"), start_over=True)
    assert again[0]["trainable_parameters"] > first[0]["trainable_parameters"]
    assert not list(tmp_path.glob("lowest/*/results.json"))


def test_what_cannot_be_run_says_so_before_any_work(base, tmp_path):
    """A run that fails to save after hours, or for want of data, is the dearest kind of error."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OSError, match="cannot be written.*--output_dir"):
        train(*asked(base), run_options(blocked / "run"))
    model, _, plasticity = asked(base)
    with pytest.raises(FileNotFoundError, match="/nowhere does not exist"):
        train(model, DataArguments("/nowhere"), plasticity, run_options(tmp_path / "a"))
    with pytest.raises(FileNotFoundError, match="Model /no/model cannot be loaded"):
        train(ModelArguments("/no/model"), DataArguments("digits"), plasticity, run_options(tmp_path / "b"))
    with pytest.raises(ValueError, match="budget='much' is no number"):
        PlasticityArguments(budget="much")


def test_a_pretrained_model_learns_and_the_saved_adapter_predicts_the_same(tmp_path):
    """The whole path with real weights: if pixels, labels or head went wrong anywhere, accuracy would show it."""
    from plastic_peft import AutoPlasticModelForImageClassification

    data = DataArguments("digits", max_train_samples=320, max_eval_samples=96)
    options = run_options(tmp_path, num_train_epochs=3, save_strategy="no", eval_strategy="no", learning_rate=5e-3)
    result = train(ModelArguments("vit_nano"), data, PlasticityArguments(max_pairs=32, budget="0.03"), options)
    assert result.metrics["test_accuracy"] > 0.7
    model = AutoPlasticModelForImageClassification.from_pretrained(tmp_path).eval()
    rows = with_pixels(data.load()["test"], model.image_processor)[:]
    with torch.no_grad():
        predicted = model(rows["pixel_values"]).logits.argmax(-1)
    accuracy = (predicted == torch.tensor(rows["labels"])).float().mean().item()
    assert accuracy == pytest.approx(result.metrics["test_accuracy"])
    assert sum(sum(row) for row in result.metrics["confusion_matrix"]) == 96
    assert not list(tmp_path.glob("*.bin"))


def test_two_processes_select_and_train_like_one(base, tmp_path):
    """With more processes the selection must stay, and the adapter must load in one process afterwards."""
    flags = ["--model_name_or_path", base, "--dataset_name", "digits", "--max_train_samples", "160", "--budget", "0.1"]
    flags += ["--max_eval_samples", "48", "--max_pairs", "32", "--r", "2", "--max_steps", "4", "--save_steps", "2"]
    flags += ["--save_strategy", "steps", "--use_cpu", "--disable_tqdm", "true", "--per_device_train_batch_size", "8"]
    config = EXAMPLES / "accelerate" / "ddp_cpu.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    launch += ["--num_cpu_threads_per_process", "1", "-m", "plastic_peft", "train", "--output_dir", str(tmp_path)]
    done = subprocess.run([*launch, *flags, "--json"], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads(done.stdout)
    assert two["processes"] == 2

    model, data, plasticity = asked(base, lora_dropout=0.0)
    data.augment = "auto"
    one = train(model, data, plasticity, run_options(tmp_path / "one", max_steps=4))
    assert list(one.selection) == list(two["selection"])
    assert one.metrics["test_loss"] == pytest.approx(two["metrics"]["test_loss"], abs=0.02)
    checkpoint = last_whole_checkpoint(tmp_path)
    assert checkpoint is not None and checkpoint.name == "checkpoint-4"
    from plastic_peft import AutoPlasticModelForImageClassification

    loaded = AutoPlasticModelForImageClassification.from_pretrained(checkpoint)
    assert set(loaded.peft_config["default"].selected_modules) == set(one.selection)


def test_a_sharded_run_is_tracked_resumes_saves_and_pushes_like_any(base, tmp_path):
    """Each process holds a part of the weights: what it saved or pushed by itself would be parts that nothing can load."""
    flags = ["--model_name_or_path", base, "--dataset_name", "digits", "--max_train_samples", "160", "--budget", "0.1"]
    flags += [
        "--max_eval_samples",
        "48",
        "--max_pairs",
        "32",
        "--r",
        "2",
        "--max_steps",
        "4",
        "--save_strategy",
        "steps",
    ]
    flags += ["--save_steps", "2", "--track_every", "2", "--use_cpu", "--disable_tqdm", "true"]
    flags += ["--per_device_train_batch_size", "8", "--hub_model_id", "ada/shards", "--hub_token", "secret"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_cpu_threads_per_process", "1"]
    launch += ["--config_file", str(EXAMPLES / "accelerate" / "fsdp_full_shard.yaml"), "--mixed_precision", "no"]
    launch += [str(Path(__file__).parent / "workers" / "sharded.py"), "train", "--output_dir", str(tmp_path / "run")]
    replicas = Ranks(["train", "--output_dir", tmp_path / "replicas", *flags], tmp_path / "replicas.log", 2)
    assert replicas.codes() == [0, 0], replicas.said()
    expected = load_file(tmp_path / "replicas" / "adapter_model.safetensors")

    def run(*more, **environment):
        environment = {**os.environ, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", **environment}
        done = subprocess.run([*launch, *flags, *more], capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        found = load_file(tmp_path / "run" / "adapter_model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in expected)
        return done.stderr

    run()
    checkpoint = tmp_path / "run" / "checkpoint-4"
    # what the trainer writes for sharded models only, and that its checkpoint is an adapter all the same
    assert (checkpoint / "pytorch_model_fsdp.bin").is_file()
    from plastic_peft import AutoPlasticModelForImageClassification

    tensors = AutoPlasticModelForImageClassification.from_pretrained(checkpoint).state_dict()
    for name, tensor in load_file(tmp_path / "run" / "adapter_model.safetensors").items():
        (found,) = (
            tensors[key] for key in tensors if key.replace(".default", "").replace(".modules_to_save", "") == name
        )
        assert torch.equal(found, tensor), name
    norms = [
        [
            entry["gradient_norm"][1:]
            for entry in json.loads((tmp_path / run / CURVE_NAME).read_text())["components"].values()
        ]
        for run in ("run", "replicas")
    ]
    assert torch.allclose(*map(torch.tensor, norms), rtol=1e-4) and any(map(any, norms[0]))

    (checkpoint / "whole.json").unlink()
    with HubServer({"secret": "ada"}) as hub:
        said = run("--push_to_hub", HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0")
        files = hub.repositories["ada/shards"].files
    assert "Resuming from" in said and "checkpoint-2" in said
    for name in ("adapter_model.safetensors", "plasticity.png"):
        assert files[name] == (tmp_path / "run" / name).read_bytes()
    # the base model is a folder here, which is nobody else's concern
    pushed = json.loads(files["adapter_config.json"])
    own = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert pushed == {**own, "base_model_name_or_path": None} and base.encode() not in b"".join(files.values())


def test_the_callback_follows_plasticity_and_changes_nothing(base, tmp_path):
    """A curve that disturbed the training it watches, or forgot its past on resuming, would be worth nothing."""
    arguments = asked(base, track_every=4, train_norms=False)
    watched = train(*arguments, run_options(tmp_path / "a", max_steps=8))
    plain = train(*asked(base, train_norms=False), run_options(tmp_path / "b", max_steps=8))
    assert watched.metrics["test_loss"] == plain.metrics["test_loss"]
    curve = json.loads((tmp_path / "a" / "plasticity_curve.json").read_text())
    assert curve["steps"] == [0, 4, 8]
    adapted = {key: entry for key, entry in curve["components"].items() if entry["selected"]}
    assert adapted and len(adapted) < len(curve["components"])
    for entry in curve["components"].values():
        assert len(entry["plasticity"]) == len(entry["gradient_norm"]) == 3
        assert entry["gradient_norm"][0] is None
        assert (entry["gradient_norm"][1] > 0) == entry["selected"]
    assert any(entry["plasticity"][0] != entry["plasticity"][2] for entry in adapted.values())
    assert (tmp_path / "a" / "plasticity_curve.png").stat().st_size > 1000
    logged = [entry for entry in watched.trainer.state.log_history if "plasticity_frozen/norm_mlp" in entry]
    assert [entry["step"] for entry in logged] == [0, 4, 8]

    # a run that resumes at step 6 keeps what was measured up to there, and measures at 8 again
    (tmp_path / "a" / "checkpoint-8" / "whole.json").unlink()
    train(*arguments, run_options(tmp_path / "a", max_steps=8))
    again = json.loads((tmp_path / "a" / "plasticity_curve.json").read_text())
    assert again["steps"] == curve["steps"] and again["components"] == curve["components"]


@pytest.mark.parametrize(
    "options, passes",
    [
        ({}, [3, 64]),
        ({"batch_size": 8}, [3, 16, 16, 16, 16]),
        ({"pairs": 21, "batch_size": 16}, [3, 32, 12]),
        ({"source": torch.randn(64, 3, 32, 32)}, [3, 64, 64]),
    ],
    ids=["default", "small batches", "odd batch", "source"],
)
def test_a_measurement_costs_what_its_docstring_says(tmp_path, options, passes):
    """People choose how often to measure by what it costs; the arithmetic must not hide behind few calls."""
    model, probe, calls = load_vit_nano(), torch.randn(64, 3, 32, 32), []
    with FlopCounterMode(display=False) as one, torch.no_grad():
        model(probe[:1])
    handle = model.register_forward_hook(lambda module, inputs, output: calls.append(len(output.logits)))
    callback = PlasticityCallback(probe, **options)
    with FlopCounterMode(display=False) as all_of_it:
        callback.on_train_begin(run_options(tmp_path), TrainerState(), TrainerControl(), model=model)
    handle.remove()
    assert calls == passes
    assert len(calls) == 1 + -(-callback.pairs // callback.batch_size)
    images = all_of_it.get_total_flops() / one.get_total_flops()
    assert sum(passes) <= images < 1.05 * sum(passes) + 2


@pytest.mark.versions
@pytest.mark.parametrize("keep_best", [False, True])
def test_a_finished_run_that_is_repeated_trains_no_further(base, tmp_path, keep_best):
    """A push that failed is repeated; without it every repetition would take one more step at a live learning rate."""
    best = dict(load_best_model_at_end=True, eval_strategy="steps", eval_steps=1) if keep_best else {}
    options = dict(max_steps=4, save_steps=1, lr_scheduler_type="constant", **best)
    options |= dict(metric_for_best_model="loss") if keep_best else {}
    first = train(*asked(base), run_options(tmp_path, **options))
    weights = load_file(tmp_path / "adapter_model.safetensors")
    again = train(*asked(base), run_options(tmp_path, **options))
    assert again.trainer.state.global_step == 4 and again.metrics["test_loss"] == first.metrics["test_loss"]
    assert all(torch.equal(weights[name], t) for name, t in load_file(tmp_path / "adapter_model.safetensors").items())


def test_a_run_refuses_to_go_on_with_other_images(base, tmp_path):
    """Images added later move the cut, and what was trained on would be among what is tested on."""
    (model, data, plasticity), options = asked(base), run_options(tmp_path, max_steps=1)
    train(model, data, plasticity, options)
    note = json.loads((tmp_path / "plasticity_run.json").read_text())
    note["images"]["test"] = "47 images, 0123456789ab"
    (tmp_path / "plasticity_run.json").write_text(json.dumps(note))
    with pytest.raises(ValueError, match=r"other images \(test: 47 images.*--start_over"):
        train(model, data, plasticity, options)


@pytest.mark.versions
def test_an_adapter_names_the_revision_that_it_was_trained_on(base, tmp_path):
    """Without it the adapter would load onto the weights of another revision, and nothing would show."""
    model, data, plasticity = asked(base)
    train(replace(model, model_revision="v1.0"), data, plasticity, run_options(tmp_path, max_steps=1))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["revision"] == "v1.0"


@pytest.mark.versions
def test_gradient_checkpointing_reaches_what_is_adapted(base, tmp_path):
    """The reentrant way, which transformers 4 takes by itself, trains nothing but the head behind frozen embeddings."""
    options = run_options(tmp_path, max_steps=1, gradient_checkpointing=True)
    adapted = train(*asked(base, train_norms=False), options).trainer.model
    first = [p for name, p in adapted.named_parameters() if ".0." in name and "lora_B" in name]
    assert first and all(bool(p.any()) for p in first)


@pytest.mark.parametrize("flag", ["save_only_model", "bf16_full_eval"])
def test_flags_that_break_a_run_are_refused(base, tmp_path, flag):
    """Without it such a run could not resume as it was, or would save rounded weights."""
    with pytest.raises(ValueError, match=flag):
        train(*asked(base), run_options(tmp_path, **{flag: True}))


def test_a_second_training_starts_a_curve_of_its_own(tmp_path):
    """A search over settings trains with one callback many times; its curves would run into each other."""
    callback, control = PlasticityCallback(torch.randn(4, 3, 32, 32)), TrainerControl()
    for labels in (3, 5):
        callback.on_train_begin(run_options(tmp_path), TrainerState(), control, model=load_vit_nano(num_labels=labels))
    assert callback.curve["steps"] == [0] and len(next(iter(callback.curve["components"].values()))["plasticity"]) == 1


def test_the_curve_outlives_a_model_that_diverges(tmp_path):
    """Training ends as it would without the callback, also where the weights have become NaN."""
    callback, model = PlasticityCallback(torch.randn(4, 3, 32, 32), every=1), load_vit_nano()
    callback.on_train_begin(run_options(tmp_path), TrainerState(), TrainerControl(), model=model)
    model.vit.layers[2].mlp.fc1.weight.data.fill_(torch.nan)
    model(torch.randn(2, 3, 32, 32)).logits.sum().backward()
    callback.on_pre_optimizer_step(run_options(tmp_path), TrainerState(), TrainerControl(), model=model)
    with pytest.warns(UserWarning, match="No plasticity at step 1"):
        callback.on_step_end(run_options(tmp_path), TrainerState(global_step=1), TrainerControl(), model=model)
    saved = json.loads((tmp_path / CURVE_NAME).read_text())
    assert saved["steps"] == [0, 1]
    assert all(e["plasticity"][1] is e["gradient_norm"][1] is None for e in saved["components"].values())
    callback.plot(tmp_path / "curve.png")


def test_the_curve_reaches_tensorboard(base, tmp_path, monkeypatch):
    """People watch a tracker while a run lasts; a curve that is only in its own file comes too late."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    arguments = asked(base, track_every=2, train_norms=False)
    train(*arguments, run_options(tmp_path / "run", max_steps=4, report_to="tensorboard"))
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    curve = json.loads((tmp_path / "run" / CURVE_NAME).read_text())
    for key, first in (("plasticity", 0), ("gradient_norm", 1)):
        for role in {entry["role"] for entry in curve["components"].values() if entry["selected"]}:
            rows = [e[key] for e in curve["components"].values() if e["role"] == role and e["selected"]]
            expected = [sum(values) / len(values) for values in list(zip(*rows, strict=True))[first:]]
            events = board.Scalars(f"train/{key}_adapted/{role}")
            assert [event.step for event in events] == curve["steps"][first:] == [0, 2, 4][first:]
            assert [event.value for event in events] == pytest.approx(expected, rel=1e-5)
    assert {"train/plasticity_frozen/norm_mlp", "eval/accuracy"} <= set(board.Tags()["scalars"])


def test_gradient_norms_are_those_of_the_parameters(base):
    """The paper's figure plots them per component; a name that matches too much would add up neighbours."""
    model, _ = load_model(ModelArguments(base))
    model(torch.randn(2, 3, 32, 32)).logits.sum().backward()
    layer = model.vit.layers[1].mlp
    expected = torch.cat([p.grad.flatten() for p in layer.fc1.parameters()]).norm()
    found = gradient_norms(model, {"a": ["vit.layers.1.mlp.fc1"], "none": ["vit.layers.1.mlp.fc"]})
    assert found["a"] == pytest.approx(float(expected), rel=1e-5)
    assert found["none"] == 0.0
    # what wrappers of activation checkpointing put into names is not part of them
    model.vit.layers[1] = checkpoint_wrapper(model.vit.layers[1])
    assert gradient_norms(model, {"a": ["vit.layers.1.mlp.fc1"]})["a"] == found["a"]
    with pytest.raises(ValueError, match="every=0"):
        PlasticityCallback(torch.randn(4, 3, 32, 32), every=0)


def test_a_plain_trainer_on_these_parts_evaluates(base, tmp_path):
    """Without label_names a trainer finds no labels behind a PEFT model and reports no accuracy at all."""
    data = load_images("digits")
    model, processor = load_model(ModelArguments(base, image_size=64), data["train"].features["label"].names)
    import peft

    adapted = peft.get_peft_model(model, PlasticityArguments(target_modules=["fc1"], r=2).to_config())
    data["validation"] = data["validation"].select(range(16))
    trainer = make_trainer(adapted, data, processor, run_options(tmp_path, max_steps=1, remove_unused_columns=True))
    trainer.train()
    assert 0 <= trainer.evaluate()["eval_accuracy"] <= 1
    assert trainer.eval_dataset[0]["pixel_values"].shape == (3, 64, 64)


def test_an_adapter_trained_at_another_image_size_takes_that_size_wherever_it_is_loaded(base, tmp_path):
    """Whoever loads it gets its image processor as well; a model that refuses what that puts out would be of no use."""
    from plastic_peft import AutoPlasticModelForImageClassification

    data, plasticity = DataArguments("digits", max_train_samples=32, max_eval_samples=16), asked(base)[2]
    result = train(ModelArguments(base, image_size=48), data, plasticity, run_options(tmp_path, max_steps=1))
    model = AutoPlasticModelForImageClassification.from_pretrained(tmp_path)
    classify = pipeline("image-classification", model=model, image_processor=model.image_processor, device="cpu")
    images = data.load()["test"]
    right = [
        answer[0]["label"] == str(label)
        for answer, label in zip(classify(list(images["image"])), images["label"], strict=True)
    ]
    assert sum(right) / len(right) == pytest.approx(result.metrics["test_accuracy"])


def test_a_comparison_spends_equal_parameters_and_resumes(base, tmp_path):
    """A method that may train more than the others would win unfairly, and a killed comparison is hours of work."""
    model, data, plasticity = asked(base, budget="2000", lora_dropout=0.0)
    methods = ["highest", "q_proj,v_proj", "all-linear"]
    options = run_options(tmp_path, max_steps=2, save_strategy="no", eval_strategy="no")
    table = compare(methods, [0, 1], [1e-3], model, data, plasticity, options)
    assert [record["method"] for record in table] == methods
    head = 10 * 32 + 10
    assert all(0 < record["trainable_parameters"] - head <= 2000 for record in table)
    assert table[0]["difference"] == 0 and table[0]["difference_half_width"] == 0
    assert table[1]["accuracy_half_width"] == half_width([run["test"] for run in table[1]["runs"]])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("results.json")}
    assert len(before) == 6
    assert compare(methods, [0, 1], [1e-3], model, data, plasticity, options) == table
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("results.json")} == before

    from plastic_peft import PlasticityReport

    report = PlasticityReport.load(tmp_path)
    with pytest.raises(ValueError, match="'sideways' is unknown: choose highest"):
        way_of("sideways", report, plasticity)
    with pytest.raises(ValueError, match="raise the budget"):
        way_of("all-linear", report, PlasticityArguments(budget="500", r=1))


def test_the_shipped_accelerate_configs_are_ones_that_accelerate_reads():
    """A key that accelerate does not know stops the launch before anything of ours runs."""
    from accelerate.commands.config.config_args import load_config_from_file

    kinds = {
        path.stem: load_config_from_file(str(path)).distributed_type
        for path in (EXAMPLES / "accelerate").glob("*.yaml")
    }
    assert kinds == {
        "ddp_cpu": "MULTI_GPU",
        "ddp_gpu": "MULTI_GPU",
        "fsdp_full_shard": "FSDP",
        "deepspeed_zero3": "DEEPSPEED",
    }


@pytest.mark.parametrize("family", ["vit", "beit"])
def test_a_step_is_the_same_however_its_images_are_divided(family, tmp_path):
    """Without it models that average their loss would take steps larger by the number of batches or processes."""
    config = dict(hidden_dropout_prob=0.0, drop_path_rate=0.0, attention_probs_dropout_prob=0.0)
    model = transformers_model(family)
    for name, value in config.items():
        setattr(model.config, name, value)
    model = type(model)(model.config)
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    data = DataArguments("digits", max_train_samples=32, max_eval_samples=8).load()
    few = {split: images.map(lambda row: {"label": row["label"] % 5}) for split, images in data.items()}
    logged = []
    for size, parts in ((16, 1), (4, 4)):
        options = {"max_steps": 1, "logging_steps": 1, "eval_strategy": "no", "use_cpu": True, "disable_tqdm": True}
        options |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts, "save_strategy": "no"}
        trainer = make_trainer(copy.deepcopy(model), few, processor, training_arguments(str(tmp_path), **options))
        trainer.train()
        logged.append([trainer.state.log_history[0][name] for name in ("loss", "grad_norm")])
    assert logged[1] == pytest.approx(logged[0], rel=1e-3)


def test_mistakes_in_a_call_cost_no_run_and_claim_no_folder(base, tmp_path):
    """Without it a typo beside start_over would delete hours of work, and one without would lock its folder."""
    model, data, plasticity = asked(base)
    wrong = replace(data, dataset_name=str(tmp_path / "phtos"))
    options = run_options(tmp_path / "run", max_steps=1)
    with pytest.raises(FileNotFoundError, match="phtos does not exist"):
        train(model, wrong, plasticity, options)
    with pytest.raises(FileNotFoundError, match="cannot be loaded"):
        train(ModelArguments(str(tmp_path / "modle")), data, plasticity, options)
    train(model, data, plasticity, options)
    left = {file.name for file in (tmp_path / "run").iterdir()}
    with pytest.raises(FileNotFoundError, match="phtos does not exist"):
        train(model, wrong, plasticity, options, start_over=True)
    assert {file.name for file in (tmp_path / "run").iterdir()} == left
    with pytest.raises(ValueError, match="holds a run with other arguments"):
        train(model, wrong, plasticity, options)
    # a report that was given is nothing that a run has left
    own = tmp_path / "own" / "plasticity_report.json"
    own.parent.mkdir()
    shutil.copy(tmp_path / "run" / own.name, own)
    given, options = replace(plasticity, report=str(own)), run_options(own.parent, max_steps=1)
    with pytest.raises(FileNotFoundError, match="cannot be loaded"):
        train(ModelArguments(str(tmp_path / "modle")), data, given, options)
    train(model, data, given, options)


def test_models_of_patches_are_evaluated_with_all_that_they_take():
    """Without it adapters of SigLIP 2 could be trained, and used for nothing."""
    from transformers import Siglip2Config, Siglip2ForImageClassification, Siglip2ImageProcessor

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = Siglip2ForImageClassification(
        Siglip2Config(vision_config={**small, "patch_size": 8, "num_patches": 16}, text_config=small, num_labels=10)
    )
    processor = Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
    data = DataArguments("digits", max_train_samples=8, max_eval_samples=8)
    assert data.augmentation(processor) == "none" and replace(data, dataset_name="x").augmentation(processor) == "flip"
    with pytest.raises(ValueError, match="states no output size"):
        replace(data, augment="crop").augmentation(processor)
    adapted = get_peft_model(model, PlasticityConfig(target_modules=["fc1"], modules_to_save=["classifier"])).eval()
    adapted.image_processor = processor
    images = data.load()["test"]
    (logits,) = predicted_logits(adapted, images)
    batch = collate([with_pixels(images, processor)[index] for index in range(len(images))])
    with torch.no_grad():
        expected = adapted(**{name: value for name, value in batch.items() if name != "labels"}).logits
    assert torch.allclose(logits, expected)
