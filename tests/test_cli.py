"""The command line: results, exit codes, config files and messages."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from models import transformers_model
from PIL import Image
from transformers import AutoModelForImageClassification, ViTImageProcessor

from plastic_peft import PlasticityReport, flags
from plastic_peft.arguments import DataArguments, EvaluationArguments
from plastic_peft.cli import COMMANDS, main
from plastic_peft.commands import Run
from plastic_peft.data import image_names


pytestmark = pytest.mark.versions
DIGITS = ["--dataset_name", "digits", "--output_dir", "run"]


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
    full = PlasticityReport.load(day / "report.json").select(adapter="full")
    assert json.loads((day / "s.json").read_text())["units"] == list(full.units)


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
    head, *norms = found["modules_to_save"]
    assert head == "classifier" and all("norm" in name for name in norms) and found["report"]["pairs"] == 32
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
        (["train", "--dataset_name", "digits"], "--output_dir is needed"),
        (["compare", "--dataset_name", "digits"], "--output_dir is needed"),
        (["train", *DIGITS, "--do_train", "False"], "plastic-peft evaluate"),
        (["train", *DIGITS, "--label_names", "x"], "--label_names can only be None here"),
        (["train", *DIGITS, "--train_val_split", "0"], "train_val_split=0.0 (--train_val_split) must lie between"),
        (["train", *DIGITS, "--max_train_samples", "0"], "--max_train_samples) must be at least 1"),
        (["train", *DIGITS, "--report", "none.json"], "none.json"),
        (["train", *DIGITS, "--report_to", "wandb"], "pip install wandb"),
        (["train", *DIGITS, "--report_to", "comet_ml"], "pip install comet-ml"),
        (["train", *DIGITS, "--save_strategy", "best"], "--metric_for_best_model"),
        (["train", *DIGITS, "--load_best_model_at_end", "--metric_for_best_model", "f1"], "accuracy, top5_accuracy"),
        (["train", *DIGITS, "--resume_from_checkpoint", "nowhere"], "resume_from_checkpoint=nowhere is no folder"),
        (["compare", *DIGITS, "--seed", "1"], "--seed is no flag of plastic-peft compare: pass --seeds"),
        (["compare", *DIGITS, "--push_to_hub"], "repeat the best run with plastic-peft train"),
        (["train", *DIGITS, "--config", "c.yaml"], "A config file comes first"),
        (["train", *DIGITS, "c.yaml"], "A config file comes first"),
        (["measure", "--dataset_name", "digits", "--report", "r.json"], "--report is no flag of plastic-peft measure"),
        (["select", "--report", "r.json", "--target_modules", "x"], "--target_modules is no flag"),
        (["select", "--report", "r.json", "--signal", "noise"], "invalid choice: 'noise'"),
        (["predict", "--adapter", "x", "--images", "y", "--device", "abacus"], "--device abacus cannot be used here"),
        (["predict", "--adapter", "x", "--images", "y", "--top", "0"], "--top 0 must be at least 1"),
        (["predict", "--adapter", "x", "--images", "y", "--batch_size", "0"], "--batch_size 0 must be at least 1"),
        (["evaluate", "--adapter", "x"], "either --dataset_name or --test_dir"),
        (["evaluate", "--dataset_name", "digits"], "--adapter is needed"),
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
    assert "Traceback" not in err and "Measuring" not in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_a_mistake(capsys):
    """Without it whoever copies a command from a machine with a GPU would read a traceback."""
    assert main(["predict", "--adapter", "x", "--images", "y", "--device", "cuda"]) == 2
    assert "--device cuda cannot be used here" in capsys.readouterr().err


def test_the_place_of_a_one_line_error_is_shown_on_request(monkeypatch, capsys):
    """Whoever reports a bug that is told in one line has to be able to say where it came from."""
    assert main(["--help"]) == 0
    assert "PLASTIC_PEFT_DEBUG=1" in capsys.readouterr().out
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


def test_an_image_that_cannot_be_decoded_is_named_and_can_be_left_out(day, tmp_path, capsys, caplog):
    """One broken file among thousands must be easy to find, and must not keep the others from being predicted."""
    Image.new("L", (8, 8)).save(tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "._good.png").write_bytes(b"what some systems leave beside files")
    flags = ["predict", "--adapter", str(day / "run"), "--images", str(tmp_path), "--json"]
    assert main(flags) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "broken.png" in said and "--corrupt_images skip" in said and "._good" not in said
    assert main([*flags, "--corrupt_images", "skip"]) == 0
    assert [Path(row["file"]).name for row in json.loads(capsys.readouterr().out)] == ["good.png"]
    assert "broken.png" in caplog.text


def test_several_sources_are_predicted_and_rows_of_tables_are_called_by_their_images(day, tmp_path, capsys):
    """A shell turns `*.png` into many files; and `row 17` of a table says nothing to a person."""
    for name in ("a.png", "b.png", "c.png"):
        Image.new("L", (8, 8)).save(tmp_path / name)
    (tmp_path / "table.csv").write_text("image,note\nc.png,none\n")
    images = [str(tmp_path / name) for name in ("b.png", "a.png", "table.csv")]
    assert main(["predict", "--adapter", str(day / "run"), "--json", "--images", *images]) == 0, capsys.readouterr().err
    files = [Path(row["file"]).name for row in json.loads(capsys.readouterr().out)]
    assert files == ["b.png", "a.png", "c.png"]


def test_evaluating_gives_what_training_gave(day, tmp_path, capsys):
    """Whoever loads an adapter has to be able to check its accuracy, on the same images and on new ones."""
    trained = json.loads((day / "run" / "results.json").read_text())["metrics"]
    flags = ["evaluate", "--adapter", str(day / "run"), "--json"]
    assert main([*flags, "--dataset_name", "digits", "--max_eval_samples", "32"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 32 and found["labels"] == list("0123456789")
    for name in ("accuracy", "top5_accuracy", "macro_f1"):
        assert found[name] == pytest.approx(trained[f"test_{name}"])
    assert found["confusion_matrix"] == trained["confusion_matrix"]
    # labels are matched by name, in whatever order a folder has them
    for label in ("7", "3"):
        (tmp_path / "test" / label).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "test" / label / "x.png")
    assert main([*flags[:-1], "--test_dir", str(tmp_path / "test"), "--output", str(tmp_path / "e.json")]) == 0
    assert capsys.readouterr().out.startswith("2 images: accuracy ")
    matrix = json.loads((tmp_path / "e.json").read_text())["confusion_matrix"]
    assert [sum(row) for row in matrix] == [0, 0, 0, 1, 0, 0, 0, 1, 0, 0]
    (tmp_path / "test" / "7").rename(tmp_path / "test" / "seven")
    assert main([*flags, "--test_dir", str(tmp_path / "test")]) == 2
    assert "class 'seven' (1 such), which the adapter does not know" in capsys.readouterr().err


def test_the_roles_of_an_inspection_are_scored_by_what_selected_them(day, tmp_path, capsys):
    """A table of one signal beside a selection by another would explain the selection wrongly."""
    base, report = ["--model_name_or_path", str(day / "base"), "--dataset_name", "digits"], tmp_path / "shift.json"
    assert main(["measure", *base, "--max_pairs", "16", "--source_name", "vit_nano", "--output", str(report)]) == 0
    run = ["--report", str(report), "--output_dir", str(tmp_path / "run"), "--max_steps", "1"]
    assert main(["train", str(day / "train.yaml"), *run]) == 0
    capsys.readouterr()
    assert main(["inspect", "--adapter", str(tmp_path / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["signal"] == "shift" and found["selected_by"] == "highest shift"
    table = PlasticityReport.load(report).by_role()["shift"]
    assert {role: entry["score"] for role, entry in found["roles"].items()} == pytest.approx(table.to_dict())


class Reads:
    """Notes which fields of a command's arguments anything has looked at."""

    def __init__(self, monkeypatch):
        self.unread, parse = {}, flags.parse

        def watched(*arguments, **options):
            return tuple(self.watch(parsed) for parsed in parse(*arguments, **options))

        monkeypatch.setattr(flags, "parse", watched)

    def watch(self, parsed):
        kind = type(parsed)
        if kind.__name__ == "TrainingFlags":
            return parsed
        unread = {f.name for f in fields(parsed)}
        self.unread = {kind.__name__: unread & self.unread.get(kind.__name__, unread)} | {
            name: left for name, left in self.unread.items() if name != kind.__name__
        }
        mine = self.unread[kind.__name__]

        def read(self, name):
            mine.discard(name)
            return kind.__getattribute__(self, name)

        parsed.__class__ = type(kind.__name__, (kind,), {"__getattribute__": read})
        return parsed


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_takes_a_flag_that_it_ignores(command, day, tmp_path, monkeypatch, capsys):
    """A flag that does nothing is worse than none: its user believes that it did."""
    adapter, report = ["--adapter", str(day / "run")], ["--report", str(day / "report.json")]
    Image.new("L", (8, 8)).save(tmp_path / "x.png")
    (tmp_path / "x").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "x" / "3.png")
    train = [str(day / "train.yaml"), "--max_steps", "1", "--output_dir", str(tmp_path / "run")]
    calls = {
        "measure": [["--dataset_name", "digits", "--max_pairs", "8", "--output", str(tmp_path / "r.json")]],
        "select": [[*report, "--budget", "2000"]],
        "train": [train],
        "compare": [[*train, "--methods", "highest", "--seeds", "0", "--save_strategy", "no"]],
        "evaluate": [[*adapter, "--dataset_name", "digits", "--max_eval_samples", "8"]],
        "predict": [[*adapter, "--images", str(tmp_path / "x.png")]],
        "export": [[*adapter, "--output_dir", str(tmp_path / "export")]],
        "inspect": [adapter],
    }
    reads = Reads(monkeypatch)
    for call in calls[command]:
        assert main([command, *call]) == 0, capsys.readouterr().err
    # a report in the place of a measurement, and the other way round
    if command in ("train", "compare"):
        again = [*train[:1], "--max_steps", "1", "--output_dir", str(tmp_path / "again"), "--methods", "highest"]
        config = json.loads((day / "train.yaml").read_text())
        del config["report"]
        (tmp_path / "measured.yaml").write_text(json.dumps({**config, "max_pairs": 8}))
        again = again[: None if command == "compare" else -2]
        assert main([command, str(tmp_path / "measured.yaml"), *again[1:]]) == 0, capsys.readouterr().err
    assert not {name: left for name, left in reads.unread.items() if left}


def test_measuring_takes_the_images_that_it_is_told_to_take(day, tmp_path, capsys):
    """A measurement on other images than those of training would select for other data."""
    for number in range(6):
        Image.effect_noise((16, 16), 40 + number).save(tmp_path / f"{number}.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "table.csv").write_text("before,after\n" + "".join(f"0.png,{i}.png\n" for i in range(6)))
    measure = ["measure", "--model_name_or_path", str(day / "base"), "--output", str(tmp_path / "r.json"), "--json"]
    assert main([*measure, "--train_dir", str(tmp_path / "table.csv"), "--max_train_samples", "4"]) == 2
    assert "--image_column_name" in capsys.readouterr().err
    columns = ["--train_dir", str(tmp_path / "table.csv"), "--image_column_name", "after"]
    assert main([*measure, *columns, "--max_train_samples", "4"]) == 0
    few = json.loads(capsys.readouterr().out)
    assert main([*measure, *columns]) == 0
    assert few["pairs"] < json.loads(capsys.readouterr().out)["pairs"]
    (tmp_path / "table.csv").unlink()
    assert main([*measure, "--train_dir", str(tmp_path)]) == 2
    assert "broken.png" in capsys.readouterr().err
    assert main([*measure, "--train_dir", str(tmp_path), "--corrupt_images", "skip"]) == 0


def test_a_run_says_what_matters_and_nothing_else(day, tmp_path, capfd, caplog):
    """Between bars, load reports and notices for developers nobody sees the one warning that counts."""
    run = ["train", str(day / "train.yaml"), "--output_dir", str(tmp_path / "run"), "--max_steps", "1"]
    assert main([*run, "--model_name_or_path", "vit_nano", "--source_name", "vit_nano", "--budget", "0.05"]) == 2
    config = json.loads((day / "train.yaml").read_text())
    del config["report"], config["model_name_or_path"]
    (tmp_path / "c.yaml").write_text(json.dumps({**config, "max_pairs": 16, "max_steps": 1}))
    capfd.readouterr()
    assert main(["train", str(tmp_path / "c.yaml"), "--output_dir", str(tmp_path / "nano")]) == 0
    out, err = capfd.readouterr()
    for noise in ("Loading weights", "MISMATCH", "FutureWarning", "find_unused", "%|"):
        assert noise not in out + err + caplog.text, noise
    assert caplog.text.count("Without source images") == 1 and "--source_name" in caplog.text
    assert err.count("'eval_loss'") == 1
    assert main(["measure", "--dataset_name", "digits", "--max_pairs", "8", "--output", str(tmp_path / "r.json")]) == 0
    out, err = capfd.readouterr()
    assert "shift" not in out and "NaN" not in out


def test_images_that_run_out_before_the_intervals_are_narrow_are_said_to(day, tmp_path, caplog):
    """A selection by four pairs looks like any other."""
    measure = ["measure", "--model_name_or_path", str(day / "base"), "--dataset_name", "digits"]
    assert main([*measure, "--max_train_samples", "6", "--output", str(tmp_path / "r.json")]) == 0
    assert "The images ran out after" in caplog.text


def test_flags_of_the_image_classification_script_are_read(day, tmp_path, capsys):
    """People come with the commands that transformers' example has taught them."""
    run = ["train", str(day / "train.yaml"), "--output_dir", str(tmp_path / "run"), "--max_steps", "1"]
    run += ["--do_train", "--do_eval", "--remove_unused_columns", "False", "--ignore_mismatched_sizes"]
    run += ["--image_processor_name", str(day / "base"), "--config_name", str(day / "base"), "--budget", "2e3"]
    run += ["--trust_remote_code", "False"]
    assert main(run) == 0
    assert main([*run, "--learning_rate", "0.5"]) == 2
    assert "learning_rate 0.004 -> 0.5" in capsys.readouterr().err
    assert main([*run, "--learning_rate", "0.5", "--overwrite_output_dir"]) == 0
    capsys.readouterr()
    assert main([*run, "--learning_rate", "0.5", "--no_ignore_mismatched_sizes", "--overwrite-output-dir"]) == 2
    assert "ignore_mismatched_sizes" in capsys.readouterr().err


def test_words_of_other_scripts_are_read_wherever_they_stand(tmp_path):
    """Without it flags of transformers' scripts would work on the command line only, and `no` would be a truth value."""
    path = tmp_path / "train.yaml"
    path.write_text("overwrite_output_dir: true\neval_strategy: no\nsave_strategy: no\ntarget_modules: all-linear\n")
    for given in ([str(path)], ["--overwrite_output_dir=True", "--eval_strategy", "no", "--train_norms"]):
        call = [*given, "--output_dir", "run", "--dataset_name", "digits"]
        _, _, plasticity, training, run = flags.parse_training({"prog": "plastic-peft train"}, call, Run)
        assert run.start_over and training.eval_strategy == "no"
        if given == [str(path)]:
            assert plasticity.to_config().target_modules == "all-linear" and plasticity.train_norms is None
        else:
            assert plasticity.train_norms is True
        assert training.learning_rate == 4e-3
    full = flags.parse_training({"prog": "plastic-peft train"}, [*call[:-5], *call[-4:], "--adapter", "full"], Run)
    assert full[3].learning_rate == 1e-3


def test_images_that_training_left_out_are_not_cut_anew(tmp_path, capsys):
    """Without it an adapter would be evaluated on images that it was trained on, where some cannot be decoded."""
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(20):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "photos" / name / f"{number}.png")
    (tmp_path / "photos" / "cat" / "5.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"1 of 40 train images cannot be decoded: .*5.png"):
        EvaluationArguments(dataset_name=str(tmp_path / "photos")).load()
    same = {"dataset_name": str(tmp_path / "photos"), "corrupt_images": "skip"}
    trained = DataArguments(**same).load()["test"]
    assert image_names(EvaluationArguments(**same).load()) == image_names(trained)


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
    flags = [line.split()[0] for line in shown.splitlines() if line.startswith("  --")]
    assert len(flags) == len(set(flags)) and not [flag for flag in flags if "-" in flag[2:]]
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
