"""The command line: results, exit codes, config files and messages."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from models import transformers_model
from PIL import Image
from transformers import AutoModelForImageClassification, ViTImageProcessor

from plastic_peft import PlasticityReport
from plastic_peft.cli import COMMANDS, main


pytestmark = pytest.mark.versions


@pytest.fixture(scope="module")
def day(tmp_path_factory):
    """A user's day up to training: a base model, a report measured on the digits, and an adapter trained by it."""
    folder = tmp_path_factory.mktemp("day")
    torch.manual_seed(0)
    transformers_model("vit").save_pretrained(folder / "base")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "base")
    model = ["--model_name_or_path", str(folder / "base"), "--dataset_name", "digits"]
    report = str(folder / "report.json")
    assert main(["measure", *model, "--max_pairs", "32", "--output", report, "--plot", str(folder / "p.png")]) == 0
    config = {
        "model_name_or_path": str(folder / "base"),
        "dataset_name": "digits",
        "report": report,
        "budget": 2000,
        "r": 2,
        "max_train_samples": 64,
        "max_eval_samples": 32,
        "max_steps": 5,
        "use_cpu": True,
        "disable_tqdm": True,
        "lr_scheduler_kwargs": {},
    }
    (folder / "train.yaml").write_text(json.dumps(config))
    assert main(["train", str(folder / "train.yaml"), "--max_steps", "2", "--output_dir", str(folder / "run")]) == 0
    return folder


def test_measuring_writes_a_report_and_a_picture(day):
    """The report is what all other commands start from."""
    report = PlasticityReport.load(day / "report.json")
    assert report.pairs == 32 and report.base_model == str(day / "base")
    assert (day / "p.png").stat().st_size > 1000


def test_selecting_prints_what_the_report_selects(day, capsys):
    """Scripts read the selection from here; it has to be the one that training would make."""
    assert main(["select", "--report", str(day / "report.json"), "--budget", "2000", "--r", "2", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    selection = PlasticityReport.load(day / "report.json").select(budget=2000, r=2)
    assert list(printed["modules"]) == selection.modules
    assert printed["parameters"] == selection.parameters <= 2000
    trained = json.loads((day / "run" / "results.json").read_text())["selection"]
    assert set(trained) == set(selection.modules)
    assert (
        main(["select", "--report", str(day / "report.json"), "--adapter", "full", "--output", str(day / "s.json")])
        == 0
    )
    assert "full" in capsys.readouterr().out
    assert json.loads((day / "s.json").read_text())["units"] == ["norm_attention"]


def test_flags_win_over_the_config_file_and_results_are_json(day, capsys):
    """People keep a file and vary one flag; and progress output between the results would break every reader."""
    run = ["train", str(day / "train.yaml"), "--output_dir", str(day / "run"), "--max_steps", "2", "--json"]
    assert main(run) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["steps"] == 2
    assert set(result["metrics"]) >= {"eval_accuracy", "test_accuracy", "test_macro_f1", "confusion_matrix"}


def test_predictions_name_files_labels_and_probabilities(day, tmp_path, capsys):
    """A prediction that cannot be put to its file, or whose labels are numbers of outputs, is no use."""
    for i, shade in enumerate((0, 255)):
        Image.new("L", (20, 30), shade).save(tmp_path / f"{i}.png")
    flags = ["predict", "--adapter", str(day / "run"), "--images", str(tmp_path), "--top", "2"]
    assert main([*flags, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [Path(row["file"]).name for row in rows] == ["0.png", "1.png"]
    for row in rows:
        assert len(row["labels"]) == 2 and set(row["labels"]) <= set("0123456789")
        assert 1 >= row["probabilities"][0] >= row["probabilities"][1] > 0
    assert main([*flags, "--output", str(tmp_path / "out.csv")]) == 0
    with open(tmp_path / "out.csv") as file:
        table = list(csv.DictReader(file))
    assert [row["label_1"] for row in table] == [row["labels"][0] for row in rows]
    assert float(table[0]["probability_2"]) == rows[0]["probabilities"][1]


def test_exports_and_inspection(day, tmp_path, capsys):
    """The exports are for those without this package; the inspection says what an adapter does before one runs it."""
    adapter = ["--adapter", str(day / "run")]
    assert main(["export", *adapter, "--output_dir", str(tmp_path / "lora")]) == 0
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert main(["export", *adapter, "--output_dir", str(tmp_path / "merged"), "--format", "merged"]) == 0
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "merged").config.id2label[7] == "7"
    capsys.readouterr()
    assert main(["inspect", *adapter, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["modules"]) == set(json.loads((day / "run" / "results.json").read_text())["selection"])
    assert found["modules_to_save"] == ["classifier"] and found["report"]["pairs"] == 32
    assert sum(entry["adapted"] for entry in found["roles"].values()) == len(found["modules"])
    assert main(["inspect", *adapter]) == 0
    assert "selected by highest plasticity" in capsys.readouterr().out


def test_a_comparison_is_a_table(day, tmp_path, capsys):
    """The table is what a paper or a decision quotes."""
    flags = [
        "--output_dir",
        str(tmp_path),
        "--methods",
        "highest",
        "all-linear",
        "--seeds",
        "0",
        "1",
        "--max_steps",
        "1",
    ]
    assert main(["compare", str(day / "train.yaml"), *flags, "--save_strategy", "no"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["method", "parameters"]
    assert [line.split()[0] for line in lines[1:3]] == ["highest", "all-linear"]
    assert "0.00 ± 0.00" in lines[1] and "2 seeds" in lines[-1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["trian"], "'trian' is no command: choose measure"),
        (["train", "--learning_rat", "1"], "Did you mean '--learning_rate'?"),
        (["train", "--r", "many"], "invalid int value: 'many'"),
        (["train", "no.yaml"], "No such file or directory: 'no.yaml'"),
        (["train", "notes.txt"], "notes.txt is no config file"),
        (["measure"], "Say which images to measure on"),
        (["measure", "--dataset_name", "./nowhere"], "nowhere does not exist"),
        (["measure", "--dataset_name", "digits", "--output", "/dev/null/x.json"], "cannot be written"),
        (["measure", "--dataset_name", "digits", "--model_name_or_path", "./no"], "Model ./no cannot be loaded"),
        (["select"], "--report plasticity_report.json"),
        (["select", "--report", "none.json"], "none.json"),
        (["predict", "--images", "x"], "--adapter is needed"),
        (["inspect", "--adapter", "/"], "holds no adapter_config.json"),
        (["train", "--dataset_name", "digits", "--output_dir", "/dev/null/run"], "--output_dir"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(arguments, message, capsys, tmp_path, monkeypatch):
    """A script has to tell a mistake from a crash, and a person should not have to read a traceback to find a typo."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    said = [line for line in err.splitlines() if line.startswith("plastic-peft: ")]
    assert out == "" and len(said) == 1
    assert message in said[0]
    assert "Traceback" not in err


def test_the_place_of_a_one_line_error_is_shown_on_request(monkeypatch, capsys):
    """Whoever reports a bug that is told in one line has to be able to say where it came from."""
    monkeypatch.setenv("PLASTIC_PEFT_DEBUG", "1")
    assert main(["select", "--report", "none.json"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_contradictions_are_told_before_anything_is_loaded_or_measured(capsys):
    """A measurement can take an hour; what cannot be selected by it should be said before, not after it."""
    call = ["train", "--dataset_name", "digits", "--budget", "0.1", "--top_k", "1", "--output_dir", "/dev/null/run"]
    assert main(call) == 2
    assert "budget and top_k say two different things" in capsys.readouterr().err


def test_an_interrupted_command_says_whether_it_resumes(monkeypatch, capsys, day):
    """Whoever stops a run by Ctrl-C should know that nothing is lost, and not be told so where it is."""

    def interrupted(*_):
        raise KeyboardInterrupt

    for command, end in (("train", "interrupted; the same command resumes\n"), ("select", "interrupted\n")):
        monkeypatch.setitem(COMMANDS, command, replace(COMMANDS[command], run=interrupted))
        assert main([command]) == 130
        assert capsys.readouterr().err.endswith(end)


def test_an_image_that_cannot_be_decoded_is_named_with_what_to_do(day, tmp_path, capsys):
    """One broken file among thousands must be easy to find."""
    Image.new("L", (8, 8)).save(tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    assert main(["predict", "--adapter", str(day / "run"), "--images", str(tmp_path)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "broken.png cannot be decoded" in said and said.endswith("repair or remove it.")


def test_a_config_file_that_is_none_is_refused(tmp_path, capsys):
    """A list or broken YAML must not be taken for flags."""
    for content, message in (
        ("- a\n- b\n", "must hold flags"),
        ("a: [1", "no valid YAML"),
        ("colour: red", "--colour is no"),
    ):
        (tmp_path / "c.yaml").write_text(content)
        assert main(["train", str(tmp_path / "c.yaml")]) == 2
        assert message in capsys.readouterr().err


def test_what_nobody_expected_is_a_crash_with_a_traceback(monkeypatch, capsys, day):
    """A bug reported as a user's mistake would never be found."""
    from plastic_peft import report

    monkeypatch.delattr(report.PlasticityReport, "select")
    assert main(["select", "--report", str(day / "report.json")]) == 1
    assert "AttributeError" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples_and_flags(command, capsys):
    """The help is where most people learn the command."""
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"plastic-peft {command} " in shown.partition("examples:")[2]
    assert "--json" in shown
    if command == "train":
        places = [shown.index(flag) for flag in ("--model_name_or_path", "--budget", "--weight_decay")]
        assert places == sorted(places)


def test_the_program_starts_as_a_module_and_a_closed_pipe_is_no_error(day):
    """`accelerate launch -m plastic_peft` needs the first, `plastic-peft ... | head` the second."""
    command = f"{sys.executable} -m plastic_peft select --report {day}/report.json --budget 30000 | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["module", "score", "rank"]
    assert "Traceback" not in done.stderr and "Broken" not in done.stderr


def test_a_trained_adapter_is_pushed_and_predicts_by_its_id(day, tmp_path):
    """Sharing is the last step of a user's day; the card and the report must arrive with the weights, and no pickle."""
    calls = [
        ["train", str(day / "train.yaml"), "--output_dir", str(day / "run"), "--max_steps", "2", "--push_to_hub"],
        ["inspect", "--adapter", "ada/digits", "--json"],
        [
            "predict",
            "--adapter",
            "ada/digits",
            "--images",
            str(tmp_path / "x.png"),
            "--base_model",
            str(day / "base"),
            "--json",
        ],
    ]
    calls[0] += ["--hub_model_id", "ada/digits", "--hub_token", "secret"]
    Image.new("RGB", (9, 9)).save(tmp_path / "x.png")
    script = f"from plastic_peft.cli import main\nfor call in {calls!r}:\n    assert main(call) == 0, call"
    with HubServer({"secret": "ada"}) as hub:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
            "HF_HOME": str(tmp_path / "home"),
        }
        done = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            timeout=240,
            env={**environment, "HF_HUB_DISABLE_XET": "1"},
        )
        assert done.returncode == 0, done.stderr[-2000:]
        files = set(hub.repositories["ada/digits"].files)
    expected = {"README.md", "adapter_config.json", "adapter_model.safetensors", "plasticity_report.json"}
    assert expected <= files and not any(name.endswith((".bin", ".pt", ".pth")) for name in files)
    assert '"labels"' in done.stdout and '"modules_to_save"' in done.stdout
