"""Saving, loading, exporting and pushing adapters: in this process, in fresh ones, and over a Hub on loopback."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import warnings
from importlib.util import find_spec

import pytest
import torch
from hub_server import HubServer, Repository
from models import vit_name
from peft import PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageClassification,
    BeitConfig,
    DeiTConfig,
    Dinov2Config,
    SwinConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

from plastic_peft import PlasticityConfig, PlasticityReport, load_vit_nano, measure_plasticity
from plastic_peft.card import model_card
from plastic_peft.embedded import VIT_NANO
from plastic_peft.export import export_lora, export_merged
from plastic_peft.hub import AutoPlasticModelForImageClassification, save_adapter
from plastic_peft.names import checkpoint_names, compact, renamings


pytestmark = pytest.mark.versions
renames = pytest.mark.skipif(
    find_spec("transformers.conversion_mapping") is None, reason="transformers 4 has the names of the checkpoint files"
)
FC1, QUERY = vit_name("mlp.fc1"), vit_name("q_proj")
LABELS = ["cat", "dog", "cow"]
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
MODES = {
    "lora": {"adapter": "lora", "budget": 0.2, "r": 2, "rank_allocation": "proportional"},
    "dora": {"adapter": "lora", "top_k": 1, "r": 4, "use_dora": True},
    "full": {"adapter": "full", "top_k": 2},
}


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    """A pretrained ViT with seven labels, and its image processor, as a folder."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(1)
    ViTForImageClassification(ViTConfig(**TINY, num_labels=7)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def load_base(folder):
    return AutoModelForImageClassification.from_pretrained(
        folder,
        id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
        ignore_mismatched_sizes=True,
    ).eval()


@pytest.fixture(scope="module")
def report(base_folder):
    return measure_plasticity(load_base(base_folder), torch.randn(8, 3, 32, 32), max_pairs=8, progress=False)


def trained(base_folder, **options):
    """An adapted model whose adapter differs from its initial state."""
    model = get_peft_model(load_base(base_folder), PlasticityConfig(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def logits(model, seed=0):
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(pixel_values=pixels).logits


def run(script, **environment):
    """Run a script in a fresh process and return the JSON of its last line."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


# --- loading from a folder ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_saved_adapter_alone_gives_the_model_back(mode, base_folder, report, tmp_path):
    """Without it, a saved adapter could come back with another head, other labels, or other outputs."""
    model = trained(base_folder, plasticity=report, **MODES[mode])
    folder = save_adapter(model, tmp_path / "adapter")
    loaded = AutoPlasticModelForImageClassification.from_pretrained(folder)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.config.id2label == dict(enumerate(LABELS))
    assert loaded.config.label2id == {"cat": 0, "dog": 1, "cow": 2}
    assert loaded.targeted_module_names == model.targeted_module_names
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert loaded.image_processor.size == {"height": 32, "width": 32}
    assert loaded.peft_config["default"].report.rows == report.rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_model_loads_in_the_dtype_asked_for(base_folder, report, tmp_path, dtype):
    """Without it the head and norms would keep the dtype of the file, and the model could not run."""
    model = trained(base_folder, plasticity=report, budget=3000)
    saved = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    folder = save_adapter(model.to(saved), tmp_path)
    loaded = AutoPlasticModelForImageClassification.from_pretrained(folder, dtype=dtype)
    heads = {p.dtype for name, p in loaded.named_parameters() if "modules_to_save" in name}
    assert heads == {torch.float32}
    with torch.no_grad():
        assert loaded(pixel_values=torch.randn(2, 3, 32, 32, dtype=dtype)).logits.dtype == dtype


def test_plain_save_pretrained_is_enough(base_folder, report, tmp_path):
    """Without it, checkpoints written by PEFT or a Trainer would come back with the base model's labels."""
    model = trained(base_folder, plasticity=report, top_k=1)
    model.save_pretrained(tmp_path)
    loaded = AutoPlasticModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert list(loaded.config.id2label.values()) == LABELS


def test_pipeline_takes_the_loaded_model(base_folder, report, tmp_path):
    """Without it, a loaded adapter could not be used the way every other image classifier is."""
    folder = save_adapter(trained(base_folder, plasticity=report, top_k=1), tmp_path)
    loaded = AutoPlasticModelForImageClassification.from_pretrained(folder)
    classify = pipeline("image-classification", model=loaded, image_processor=loaded.image_processor)
    answers = classify(Image.new("RGB", (50, 40), "red"))
    assert sorted(answer["label"] for answer in answers) == sorted(LABELS)


def test_own_image_processor_is_saved_and_preferred(base_folder, report, tmp_path):
    """Without it, an adapter trained with another preprocessing would be fed the base model's."""
    processor = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3])
    folder = save_adapter(trained(base_folder, plasticity=report, top_k=1), tmp_path, image_processor=processor)
    loaded = AutoPlasticModelForImageClassification.from_pretrained(folder)
    assert list(loaded.image_processor.image_mean) == [0.1, 0.2, 0.3]


def test_base_model_can_be_given(base_folder, report, tmp_path):
    """Without it, an adapter could not load where its base model lies elsewhere, or is already in memory."""
    model = trained(base_folder, plasticity=report, top_k=1)
    folder = save_adapter(model, tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = None
    (folder / "adapter_config.json").write_text(json.dumps(config))
    load = AutoPlasticModelForImageClassification.from_pretrained
    assert torch.equal(logits(load(folder, base_model=base_folder)), logits(model))
    module = load_base(base_folder)
    module.config.id2label = {0: "x", 1: "y", 2: "z"}
    loaded = load(folder, base_model=module)
    assert torch.equal(logits(loaded), logits(model)) and list(loaded.config.id2label.values()) == LABELS
    with pytest.raises(ValueError, match="pass base_model="):
        load(folder)
    with pytest.raises(ValueError, match="has 7 labels and the adapter 3"):
        load(folder, base_model=ViTForImageClassification.from_pretrained(base_folder))


def test_loaded_for_training_trains_what_was_trained(base_folder, report, tmp_path):
    """Without it, training could not go on from a saved adapter, or would train other parameters."""
    model = trained(base_folder, plasticity=report, **MODES["full"])
    folder = save_adapter(model, tmp_path)
    loaded = AutoPlasticModelForImageClassification.from_pretrained(folder, is_trainable=True)
    names = [{name for name, p in m.named_parameters() if p.requires_grad} for m in (model, loaded)]
    assert names[0] == names[1] and names[0]


def test_another_base_model_is_refused(base_folder, report, tmp_path):
    """Without it, an adapter would silently run on a base model that lacks its modules."""
    folder = save_adapter(trained(base_folder, plasticity=report, top_k=1), tmp_path / "adapter")
    ViTForImageClassification(ViTConfig(**{**TINY, "hidden_size": 16})).save_pretrained(tmp_path / "narrow")
    with pytest.raises(ValueError, match="does not fit its config and base model"):
        AutoPlasticModelForImageClassification.from_pretrained(folder, base_model=tmp_path / "narrow")


def test_weights_that_no_file_holds_are_named(base_folder, report, tmp_path):
    """Without it, an adapter on an incomplete base model would give other outputs each time, and nobody would know."""
    folder = save_adapter(trained(base_folder, plasticity=report, top_k=1), tmp_path / "adapter")
    base = shutil.copytree(base_folder, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    del tensors["vit.embeddings.cls_token"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="no weights for vit.embeddings.cls_token"):
        AutoPlasticModelForImageClassification.from_pretrained(folder, base_model=base)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The base model")
        AutoPlasticModelForImageClassification.from_pretrained(folder)


def test_patterns_are_saved_as_exact_names(base_folder, tmp_path):
    """Without it, an adapter given by regular expressions would be saved with them, and not load as untrusted data."""
    model = trained(base_folder, target_modules=rf".*\.({FC1}|{QUERY})", rank_pattern={FC1: 3}, r=2)
    folder = save_adapter(model, tmp_path, adapter_name="default")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(model.targeted_module_names)
    assert config["rank_pattern"] == {vit_name(f"vit.layers.{block}.mlp.fc1"): 3 for block in range(3)}
    loaded = AutoPlasticModelForImageClassification.from_pretrained(folder)
    assert torch.equal(logits(loaded), logits(model))


def test_an_adapter_of_another_name_and_changed_labels(base_folder, report, tmp_path):
    """Without it, only the adapter called default could be saved, with the labels of the day it was made."""
    model = trained(base_folder, plasticity=report, top_k=1)
    model.add_adapter("second", PlasticityConfig(plasticity=report, top_k=1, order="lowest", r=2))
    model.set_adapter("second")
    model.config.id2label = {0: "a", 1: "b", 2: "c"}
    folder = save_adapter(model, tmp_path, adapter_name="second")
    loaded = AutoPlasticModelForImageClassification.from_pretrained(folder, adapter_name="mine")
    assert torch.equal(logits(loaded), logits(model))
    assert list(loaded.config.id2label.values()) == ["a", "b", "c"]
    assert not (folder / "second").exists()
    with pytest.raises(ValueError, match="no plasticity adapter 'third'"):
        save_adapter(model, tmp_path / "third", adapter_name="third")


def test_saving_is_whole_and_leaves_nothing_of_an_older_adapter(base_folder, report, tmp_path):
    """Without it, a folder could pair one adapter's weights with another's report, or be left half-written."""
    target = tmp_path / "adapter"
    save_adapter(trained(base_folder, plasticity=report, top_k=1), target)
    assert {"plasticity_report.json", "plasticity.png", "README.md"} <= set(os.listdir(target))
    save_adapter(trained(base_folder, target_modules=[FC1]), target)
    assert not {"plasticity_report.json", "plasticity.png"} & set(os.listdir(target))
    before = (target / "adapter_config.json").read_bytes()

    class Broken:
        def save_pretrained(self, folder):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_adapter(trained(base_folder, target_modules=[QUERY]), target, image_processor=Broken())
    assert (target / "adapter_config.json").read_bytes() == before
    assert os.listdir(tmp_path) == ["adapter"]


@pytest.mark.parametrize("save", [save_adapter, lambda model, folder: model.save_pretrained(folder)])
def test_the_order_of_the_selection_is_kept_on_disk(save, base_folder, report, tmp_path):
    """Without it, a saved adapter would list its modules by name, and nobody could tell the first choice from the last."""
    model = trained(base_folder, plasticity=report, top_k=6, granularity="module", order="random")
    wanted = list(model.peft_config["default"].selected_modules)
    save(model, tmp_path)
    assert (
        list(json.loads((tmp_path / "adapter_config.json").read_text())["selected_modules"]) == wanted != sorted(wanted)
    )
    for loaded in (
        AutoPlasticModelForImageClassification.from_pretrained(tmp_path),
        PeftModel.from_pretrained(load_base(base_folder), tmp_path),
    ):
        assert list(loaded.peft_config["default"].selected_modules) == wanted


# --- the model that the package carries --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nano():
    """An adapted vit_nano whose adapter differs from its initial state."""
    model = get_peft_model(
        load_vit_nano(num_labels=3), PlasticityConfig(target_modules=[FC1], r=1, init_lora_weights=False)
    )
    return model.eval()


def named(folder):
    return json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]


def test_the_packaged_model_has_the_same_name_everywhere(nano, tmp_path):
    """Without it, an adapter for vit_nano would name a folder of its author's machine, and load on no other."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        nano.save_pretrained(tmp_path / "plain")
    save_adapter(nano, tmp_path / "adapter")
    export_lora(nano, tmp_path / "lora")
    for folder in tmp_path.iterdir():
        assert named(folder) == "vit_nano"
        assert not any(str(VIT_NANO).encode() in file.read_bytes() for file in folder.iterdir())
    # an older release stored the folder, which may be gone or be another installation's
    for old in (str(VIT_NANO), "/gone/plastic_peft/assets/vit_nano", r"C:\gone\plastic_peft\assets\vit_nano"):
        shutil.copytree(tmp_path / "adapter", tmp_path / "old", dirs_exist_ok=True)
        config = json.loads((tmp_path / "old" / "adapter_config.json").read_text())
        (tmp_path / "old" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": old}))
        loaded = AutoPlasticModelForImageClassification.from_pretrained(tmp_path / "old")
        torch.testing.assert_close(logits(loaded), logits(nano), rtol=0, atol=1e-5)
        assert loaded.image_processor.size["height"] == 32
    save_adapter(loaded, tmp_path / "again")
    assert named(tmp_path / "again") == "vit_nano"
    given = AutoPlasticModelForImageClassification.from_pretrained(tmp_path / "adapter", base_model="vit_nano")
    torch.testing.assert_close(logits(given), logits(nano), rtol=0, atol=1e-5)


def test_another_installation_loads_an_adapter_of_the_packaged_model(nano, tmp_path):
    """Without it, the command line of another machine could not predict with an adapter for vit_nano, or export it."""
    save_adapter(nano, tmp_path / "adapter")
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    shutil.copytree(
        VIT_NANO.parents[1], tmp_path / "site" / "plastic_peft", ignore=shutil.ignore_patterns("__pycache__")
    )
    answers = run(
        f"""
        import contextlib, io, json, os
        os.chdir({str(tmp_path)!r})
        import plastic_peft
        from plastic_peft.cli import main
        assert plastic_peft.__file__.startswith(os.getcwd())
        def ask(*arguments):
            with contextlib.redirect_stdout(io.StringIO()) as out:
                assert main([*arguments, "--adapter", "adapter", "--json"]) == 0
            return json.loads(out.getvalue())
        print(json.dumps([
            ask("inspect"), ask("predict", "--images", "red.png", "--top", "1"),
            ask("export", "--output_dir", "merged", "--format", "merged"),
        ]))
        """,
        PYTHONPATH=str(tmp_path / "site"),
    )
    assert answers[0]["base_model"] == "vit_nano"
    pixels = ViTImageProcessor.from_pretrained(VIT_NANO)(Image.open(tmp_path / "red.png"), return_tensors="pt")
    with torch.no_grad():
        best = nano(**pixels).logits.softmax(-1).max(-1)
    assert answers[1][0]["labels"] == [nano.config.id2label[best.indices.item()]]
    assert answers[1][0]["probabilities"] == pytest.approx(best.values.tolist(), abs=1e-4)
    merged = AutoModelForImageClassification.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged), logits(nano), rtol=0, atol=1e-4)


# --- export ------------------------------------------------------------------------------------------------------------


def test_exported_lora_loads_without_this_package(base_folder, report, tmp_path):
    """Without it, nobody could use an adapter unless plastic_peft is installed."""
    cases = {
        "proportional": trained(base_folder, plasticity=report, **MODES["lora"]),
        "dora": trained(base_folder, plasticity=report, **MODES["dora"]),
        "patterns": trained(
            base_folder, target_modules=rf".*\.({FC1}|{QUERY})", alpha_pattern={FC1: 3}, use_rslora=True
        ),
    }
    for name, model in cases.items():
        export_lora(model, tmp_path / name)
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA" and "selected_modules" not in config
    answers = run(
        f"""
        import json, sys
        sys.modules["plastic_peft"] = None  # importing it raises ImportError
        import torch
        from peft import PeftModel
        from transformers import AutoModelForImageClassification
        answers = {{}}
        for name in {list(cases)}:
            base = AutoModelForImageClassification.from_pretrained(
                {str(base_folder)!r}, id2label=dict(enumerate("abc")), ignore_mismatched_sizes=True
            )
            model = PeftModel.from_pretrained(base, {str(tmp_path)!r} + "/" + name).eval()
            pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                answers[name] = [model(pixel_values=pixels).logits.tolist(), sorted(model.targeted_module_names)]
        print(json.dumps(answers))
        """
    )
    for name, model in cases.items():
        torch.testing.assert_close(torch.tensor(answers[name][0]), logits(model), rtol=0, atol=1e-6)
        assert answers[name][1] == sorted(model.targeted_module_names)


def test_export_never_widens_by_suffix(tmp_path):
    """Without it, peft's matching by suffix would adapt modules that were never selected, with ranks of others."""

    def nested():
        torch.manual_seed(0)
        inner = torch.nn.Sequential()
        inner.add_module("fc", torch.nn.Linear(4, 4))
        model = torch.nn.Sequential()
        model.add_module("fc", torch.nn.Linear(4, 4))
        model.add_module("block", inner)
        model.add_module("last", torch.nn.Linear(4, 4))
        return model

    scores = {"fc": 1.0, "last": 2.0}
    model = get_peft_model(
        nested(),
        PlasticityConfig(
            plasticity=scores,
            r=2,
            budget=32,
            rank_allocation="proportional",
            granularity="module",
            modules_to_save=None,
        ),
    )
    assert set(model.targeted_module_names) == {"fc", "last"}
    export_lora(model, tmp_path)
    loaded = PeftModel.from_pretrained(nested(), tmp_path)
    assert set(loaded.targeted_module_names) == {"fc", "last"}
    ranks = [{name: m.r["default"] for name, m in x.named_modules() if hasattr(m, "lora_A")} for x in (model, loaded)]
    assert ranks[0] == ranks[1] and set(ranks[0].values()) == {1, 3}


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_merged_export_is_a_plain_model(mode, base_folder, report, tmp_path):
    """Without it, full adapters could not leave this package, or exporting would change the model in hand."""
    model = trained(base_folder, plasticity=report, **MODES[mode])
    before = logits(model)
    merged = AutoModelForImageClassification.from_pretrained(export_merged(model, tmp_path)).eval()
    torch.testing.assert_close(logits(merged), before, rtol=0, atol=0 if mode == "full" else 1e-5)
    assert torch.equal(logits(model), before)
    assert list(merged.config.id2label.values()) == LABELS


def test_full_adapter_is_not_exported_as_lora(base_folder, report, tmp_path):
    """Without it, a full adapter would be written as a LoRA adapter that computes something else."""
    with pytest.raises(ValueError, match=r"Use export_merged"):
        export_lora(trained(base_folder, plasticity=report, **MODES["full"]), tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


# --- names of other releases -------------------------------------------------------------------------------------------


FAMILIES = {
    "vit": ViTConfig(**TINY),
    "deit": DeiTConfig(**TINY, architectures=["DeiTForImageClassification"]),
    "beit": BeitConfig(**TINY),
    "dinov2": Dinov2Config(**TINY),
    "swin": SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4),
}


@renames
@pytest.mark.parametrize("family", FAMILIES)
def test_names_lead_to_the_checkpoint_and_back(family, tmp_path):
    """Without it, adapters would lose or confuse modules between releases that name them differently."""
    model = AutoModelForImageClassification.from_config(FAMILIES[family])
    model.save_pretrained(tmp_path)
    filed, own = (
        {key.removesuffix(".weight") for key in keys if key.endswith(".weight")}
        for keys in (load_file(tmp_path / "model.safetensors"), model.state_dict())
    )
    names = checkpoint_names(model)
    assert {names.get(name, name) for name in own} == filed
    assert renamings(filed, model) == {names[name]: name for name in own if name in names}
    assert names and len(compact(names)) < len(names)


def rewritten(folder, target, names):
    """A copy of an adapter folder with modules under other names everywhere."""

    def replaced(value):
        if isinstance(value, dict):
            return {names.get(key, key): replaced(item) for key, item in value.items()}
        if isinstance(value, list):
            return [replaced(item) for item in value]
        return names.get(value, value) if isinstance(value, str) else value

    target.mkdir()
    for name in ("adapter_config.json", "plasticity_report.json"):
        if (folder / name).exists():
            (target / name).write_text(json.dumps(replaced(json.loads((folder / name).read_text()))))
    config = json.loads((target / "adapter_config.json").read_text())
    config["checkpoint_names"] = None
    (target / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        stem = key.removeprefix("base_model.model.")
        owner = max((name for name in names if stem.startswith(f"{name}.")), key=len, default="")
        tensors["base_model.model." + names.get(owner, owner) + stem[len(owner) :]] = tensor
    save_file(tensors, target / "adapter_model.safetensors")
    return target


@renames
@pytest.mark.parametrize("mode", MODES)
def test_adapters_with_transformers_4_names_load(mode, base_folder, report, tmp_path):
    """Without it, adapters made under transformers 4 would be lost under transformers 5."""
    model = trained(
        base_folder, plasticity=report, **MODES[mode], modules_to_save=["classifier", "vit.layers.2.mlp.fc2"], seed=1,
        exclude_modules=["vit.layers.2.mlp.fc2"],
    )  # fmt: skip
    older = rewritten(save_adapter(model, tmp_path / "new"), tmp_path / "old", checkpoint_names(model.get_base_model()))
    assert "vit.encoder.layer.2.output.dense" in (older / "adapter_config.json").read_text()
    loaded = AutoPlasticModelForImageClassification.from_pretrained(older)
    assert torch.equal(logits(loaded), logits(model))
    config = loaded.peft_config["default"]
    assert config.selected_modules == model.peft_config["default"].selected_modules
    assert config.report.rows == report.rows


@renames
def test_peft_itself_loads_adapters_with_transformers_4_names(base_folder, report, tmp_path):
    """Without it, PeftModel.from_pretrained and load_adapter would not find the modules of older adapters."""
    model = trained(base_folder, plasticity=report, top_k=2, r=2)
    older = rewritten(save_adapter(model, tmp_path / "new"), tmp_path / "old", checkpoint_names(model.get_base_model()))
    loaded = PeftModel.from_pretrained(load_base(base_folder), older)
    assert torch.equal(logits(loaded), logits(model))
    loaded.load_adapter(older, "again")
    loaded.set_adapter("again")
    assert torch.equal(logits(loaded), logits(model))


@renames
@pytest.mark.parametrize(
    ("saved", "named"),
    [("vit.layers.2.mlp.fc2", None), ("layers.2.mlp.fc2", "layer.2.output"), ("vit.layers.2", "vit.encoder.layer.2")],
)
def test_peft_itself_loads_modules_saved_whole_under_transformers_4_names(saved, named, base_folder, tmp_path):
    """Without it, PeftModel.from_pretrained would end in a KeyError, or leave modules of the blocks as the base has them."""
    model = trained(base_folder, target_modules=["vit.layers.1.mlp.fc1"], r=2, modules_to_save=["classifier", saved])
    names = checkpoint_names(load_base(base_folder))
    older = rewritten(save_adapter(model, tmp_path / "new"), tmp_path / "old", names)
    config = json.loads((older / "adapter_config.json").read_text())
    config["modules_to_save"] = ["classifier", named or names[saved]]
    (older / "adapter_config.json").write_text(json.dumps(config))
    loaded = PeftModel.from_pretrained(load_base(base_folder), older)
    assert torch.equal(logits(loaded), logits(model))
    loaded.load_adapter(older, "again")
    loaded.set_adapter("again")
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "saved", selected_adapters=["default"])
    again = PeftModel.from_pretrained(load_base(base_folder), tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(AutoPlasticModelForImageClassification.from_pretrained(older)), logits(model))


@renames
def test_a_moved_module_takes_weights_of_every_release_but_no_missing_ones(base_folder, tmp_path):
    """Without it, an adapter beside an older one could not load, or a file that lacks weights would pass unnoticed."""
    model = trained(base_folder, target_modules=["fc1"], r=2, modules_to_save=["classifier", "vit.layers.2.mlp.fc2"])
    older = rewritten(save_adapter(model, tmp_path / "new"), tmp_path / "old", checkpoint_names(model.get_base_model()))
    loaded = PeftModel.from_pretrained(load_base(base_folder), older)
    loaded.load_adapter(tmp_path / "new", "newer")
    loaded.set_adapter("newer")
    assert torch.equal(logits(loaded), logits(model))
    tensors = load_file(older / "adapter_model.safetensors")
    del tensors["base_model.model.vit.encoder.layer.2.output.dense.bias"]
    save_file(tensors, older / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"vit.layers.2.mlp.fc2, and the adapter's file has no bias"):
        PeftModel.from_pretrained(load_base(base_folder), older)


@renames
def test_short_targets_of_transformers_4_find_their_modules(base_folder):
    """Without it, target_modules such as query and value, which most examples use, would match nothing."""
    model = trained(base_folder, target_modules=["query", "output.dense"], rank_pattern={"query": 3}, r=2)
    assert set(model.targeted_module_names) == {
        f"vit.layers.{block}.{name}"
        for block in range(3)
        for name in ("attention.q_proj", "attention.o_proj", "mlp.fc2")
    }
    layers = model.get_base_model().vit.layers
    assert layers[0].attention.q_proj.r["default"] == 3 and layers[0].mlp.fc2.r["default"] == 2


def test_a_release_without_a_table_follows_the_recorded_names():
    """Without it, adapters saved under transformers 5 would not load under transformers 4, which has no table."""
    recorded = compact({"vit.layers.0.mlp.fc1": "encoder.0.first", "vit.layers.1.mlp.fc1": "encoder.1.first"})
    assert recorded == {"vit.layers.*.mlp.fc1": "encoder.*.first"}
    model = torch.nn.Module()
    model.encoder = torch.nn.ModuleList([torch.nn.ModuleDict({"first": torch.nn.Linear(2, 2)}) for _ in range(2)])
    names = renamings(["vit.layers.1.mlp.fc1", "encoder.0.first", "vit.layers.5.mlp.fc1"], model, recorded)
    assert names == {"vit.layers.1.mlp.fc1": "encoder.1.first"}


# --- card --------------------------------------------------------------------------------------------------------------


def test_card_tells_what_a_reader_needs(base_folder, report):
    """Without it, a pushed adapter would not say what it is, how good it is, or how to load it."""
    model = trained(base_folder, plasticity=report, top_k=1)
    model.peft_config["default"].base_model_name_or_path = "user/base"
    card = model_card(
        model, metrics={"accuracy": 0.875}, dataset="user/animals", license="apache-2.0", repo_id="ann/pets"
    )
    data = card.data
    assert (
        data.base_model == "user/base" and data.license == "apache-2.0" and data.pipeline_tag == "image-classification"
    )
    assert data.datasets == "user/animals" and data.tags[:2] == ["peft", "plasticity"] and data.metrics == ["accuracy"]
    assert (data.eval_results[0].metric_type, data.eval_results[0].metric_value) == ("accuracy", 0.875)
    text = str(card)
    best = report.by_role().iloc[0]
    assert f"| {best['mean']:.4g} |" in text and "0.875" in text
    assert all(f"`{name}`" in text for name in model.peft_config["default"].selected_modules)
    assert 'from_pretrained("ann/pets")' in text and "export_lora" in text and "cat, dog, cow" in text
    assert 'AutoModelForImageClassification.from_pretrained("user/base", num_labels=3' in text


def test_card_says_where_the_packaged_model_comes_from(nano):
    """Without it, readers would look for vit_nano on the Hub, or be told a path of the author's machine."""
    card = model_card(nano)
    assert card.data.base_model is None
    assert "base = load_vit_nano(num_labels=3)" in str(card) and str(VIT_NANO) not in str(card)


# --- the Hub -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub():
    with HubServer({"ann-token": "ann", "bob-token": "bob"}) as server:
        yield server


def hub_environment(hub, tmp_path, token=""):
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path),
        "HF_TOKEN": token,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }


def test_push_and_pull_with_the_real_client(hub, base_folder, report, tmp_path):
    """Without it, an adapter might not survive the way to the Hub and back, or leak to those without rights."""
    hub.repositories["ann/base"] = Repository("ann", files={p.name: p.read_bytes() for p in base_folder.iterdir()})
    model = trained(base_folder, plasticity=report, **MODES["lora"])
    model.peft_config["default"].base_model_name_or_path = "ann/base"
    save_adapter(model, tmp_path / "adapter")
    pushed = run(
        f"""
        import json
        import torch
        from huggingface_hub.errors import HfHubHTTPError
        from plastic_peft.hub import AutoPlasticModelForImageClassification, push
        model = AutoPlasticModelForImageClassification.from_pretrained({str(tmp_path / "adapter")!r})
        commit = push(model, "ann/pets", private=True)
        again = push(model, "pets", commit_message="Once more")
        try:
            push(model, "bob/pets")
        except HfHubHTTPError as error:
            refused = error.response.status_code
        model.push_to_hub("ann/plain")
        print(json.dumps([commit.oid, again.oid, refused]))
        """,
        **hub_environment(hub, tmp_path / "ann", "ann-token"),
    )
    repository = hub.repositories["ann/pets"]
    assert repository.private and pushed[1] == repository.sha and pushed[2] == 403
    assert set(repository.files) == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "plasticity.png",
        "plasticity_report.json",
        "preprocessor_config.json",
    }
    assert repository.files["plasticity.png"].startswith(b"\x89PNG")
    assert b'from_pretrained("ann/pets")' in repository.files["README.md"]
    assert PlasticityReport.from_dict(json.loads(repository.files["plasticity_report.json"])).rows == report.rows
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(hub.repositories["ann/plain"].files)
    assert "bob/pets" not in hub.repositories

    hub.repositories["ann/gated"] = Repository("ann", gated=True, files=dict(repository.files))
    pickled = {**repository.files, "adapter_model.bin": b"pickle"}
    del pickled["adapter_model.safetensors"]
    hub.repositories["ann/pickled"] = Repository("ann", files=pickled)
    astray = json.loads(repository.files["adapter_config.json"]) | {"base_model_name_or_path": str(base_folder)}
    hub.repositories["ann/astray"] = Repository(
        "ann", files={**repository.files, "adapter_config.json": json.dumps(astray).encode()}
    )
    pulled = run(
        """
        import json
        import torch
        from plastic_peft.hub import AutoPlasticModelForImageClassification
        load = AutoPlasticModelForImageClassification.from_pretrained
        def refusal(name, **options):
            try:
                load(name, **options)
            except Exception as error:
                return f"{type(error).__name__}: {error}"
        refused = [
            refusal("ann/pets"), refusal("ann/pets", token="bob-token"), refusal("ann/pets", token="wrong"),
            refusal("ann/nothing"), refusal("ann/gated"), refusal("ann/plain", revision="v9"),
            refusal("ann/pickled"), refusal("ann/astray"),
        ]
        model = load("ann/pets", token="ann-token")
        plain = load("ann/plain")
        pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            outputs = [m(pixel_values=pixels).logits.tolist() for m in (model, plain)]
        print(json.dumps([outputs, model.config.id2label, model.image_processor.size["height"], refused]))
        """,
        **hub_environment(hub, tmp_path / "stranger"),
    )
    for output in pulled[0]:
        torch.testing.assert_close(torch.tensor(output), logits(model), rtol=0, atol=1e-6)
    assert list(pulled[1].values()) == LABELS and pulled[2] == 32
    for answer in (*pulled[3][:4], pulled[3][5]):
        assert answer.startswith("FileNotFoundError") and "Check the name and revision" in answer
    assert pulled[3][4].startswith("PermissionError") and "restricted" in pulled[3][4]
    assert "adapter_model.bin is never read" in pulled[3][6] and "pass base_model=" in pulled[3][7]
    assert not any("adapter_model.bin" in request for request in hub.requests)
    assert [request for request in hub.unknown if not request.endswith("agent-harnesses")] == []


def test_what_labels_mean_comes_back(base_folder, report, tmp_path):
    """Without it pipelines would squeeze several labels at once into one distribution."""
    model = trained(base_folder, plasticity=report, top_k=1)
    model.config.problem_type = "multi_label_classification"
    save_adapter(model, tmp_path)
    loaded = AutoPlasticModelForImageClassification.from_pretrained(tmp_path)
    assert loaded.config.problem_type == "multi_label_classification"
    onto = AutoPlasticModelForImageClassification.from_pretrained(tmp_path, base_model=load_base(base_folder))
    assert onto.config.problem_type == "multi_label_classification"


def test_no_adapter_adopts_the_report_of_an_earlier_one(base_folder, report, tmp_path):
    """Without it a folder that is used twice would show why modules were chosen that nobody chose."""
    trained(base_folder, plasticity=report, top_k=1).save_pretrained(tmp_path)
    assert PlasticityConfig.from_pretrained(str(tmp_path)).report == report
    scores = {vit_name("vit.layers.0.mlp.fc1"): 7.0}
    for options in ({"target_modules": [FC1]}, {"plasticity": scores, "top_k": 1}):
        trained(base_folder, **options).save_pretrained(tmp_path)
        assert PlasticityConfig.from_pretrained(str(tmp_path)).report is None


def test_an_adapter_keeps_its_digits_in_half_precision(base_folder, report, tmp_path):
    """Without it float32 adapters would be rounded to the dtype that the model is loaded in."""
    model = trained(base_folder, plasticity=report, top_k=1)
    save_adapter(model, tmp_path)
    loaded = AutoPlasticModelForImageClassification.from_pretrained(tmp_path, dtype=torch.bfloat16, is_trainable=True)
    mine, theirs = (dict(m.named_parameters()) for m in (model, loaded))
    lora = [name for name in mine if "lora_" in name]
    assert lora and all(torch.equal(mine[name], theirs[name]) for name in lora)
