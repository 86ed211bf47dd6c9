"""Adapters from strangers: whatever their files say, loading ends with a clear error, runs nothing and does not hang."""

import json
import os
import pickle
import re
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import vit_name
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from plastic_peft import PlasticityConfig, measure_plasticity
from plastic_peft.hub import AutoPlasticModelForImageClassification, save_adapter
from plastic_peft.untrusted import read_json, validate_adapter_config


pytestmark = pytest.mark.versions
TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
BOMB = "(a|a?)+" * 10 + "$"
MODULE = vit_name("vit.layers.0.mlp.fc1")


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """The folder of an honest adapter, beside its base model."""
    root = tmp_path_factory.mktemp("honest")
    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(**TINY, num_labels=2)).save_pretrained(root / "base")
    model = AutoModelForImageClassification.from_pretrained(root / "base")
    report = measure_plasticity(model, torch.randn(4, 3, 32, 32), max_pairs=4, progress=False)
    return save_adapter(get_peft_model(model, PlasticityConfig(plasticity=report, top_k=2, r=2)), root / "adapter")


@pytest.fixture(scope="module")
def honest_config(honest):
    return json.loads((honest / "adapter_config.json").read_text())


@pytest.fixture
def folder(honest, tmp_path):
    """A copy of the honest adapter, to be spoiled."""
    return shutil.copytree(honest, tmp_path / "adapter")


def load(folder):
    return AutoPlasticModelForImageClassification.from_pretrained(folder)


def respell(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class Bomb:
    """Unpickling it leaves a file behind."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


# what is wrong, and the field that the error has to name
HOSTILE_FIELDS = {
    "another type": ("peft_type", "LORA"),
    "unknown type": ("peft_type", "__import__"),
    "r as text": ("r", "8"),
    "r as flag": ("r", True),
    "r negative": ("r", -1),
    "r huge": ("r", 10**12),
    "rank huge": ("rank_pattern", {MODULE: 10**9}),
    "rank beyond the file": ("rank_pattern", {MODULE: 60_000}),
    "alpha infinite": ("lora_alpha", 10**400),
    "dropout of two": ("lora_dropout", 2),
    "target bomb": ("target_modules", BOMB),
    "target list bomb": ("target_modules", [BOMB]),
    "exclude bomb": ("exclude_modules", BOMB),
    "rank bomb": ("rank_pattern", {BOMB: 2}),
    "alpha bomb": ("alpha_pattern", {BOMB: 2}),
    "layers bomb": ("layers_pattern", BOMB),
    "head bomb": ("modules_to_save", [BOMB]),
    "head everywhere": ("modules_to_save", [""]),
    "head as suffix of all": ("modules_to_save", ["r"]),
    "head outside": ("modules_to_save", ["classifier", "os.system"]),
    "head and dots": ("modules_to_save", ["..", "classifier"]),
    "no modules": ("selected_modules", {}),
    "scores as text": ("selected_modules", {MODULE: "high"}),
    "modules as list": ("selected_modules", [MODULE]),
    "modules as number": ("selected_modules", 7),
    "modules outside": ("selected_modules", {vit_name("vit.layers.9.mlp.fc1"): 1.0}),
    "other modules": ("selected_modules", {vit_name("vit.layers.1.attention.o_proj"): 1.0}),
    "modules that are paths": ("selected_modules", {"../../etc/passwd": 1.0}),
    "huge list": ("target_modules", ["a"] * 200_000),
    "huge selection": ("selected_modules", {f"m{i}": 1.0 for i in range(150_000)}),
    "deep value": ("labels", json.loads("[" * 300 + "]" * 300)),
    "label of control characters": ("labels", ["\x1b[2J", "dog"]),
    "labels as mapping": ("labels", {"0": "cat"}),
    "imported module": ("megatron_config", {"tensor_model_parallel_size": 1}),
    "replicated layers": ("layer_replication", [[0, 10_000]]),
    "initialisation that needs data": ("init_lora_weights", "corda"),
    "endless initialisation": ("init_lora_weights", "pissa_niter_1000000"),
    "quantised initialisation": ("init_lora_weights", "loftq"),
    "adapter of other kind": ("adapter", "full"),
    "unknown adapter": ("adapter", ["lora"]),
    "contradicting options": ("top_k", -3),
    "base outside": ("base_model_name_or_path", "../../../../etc"),
    "base is a file": ("base_model_name_or_path", "/etc/passwd"),
    "base is an address": ("base_model_name_or_path", "https://example.org/model"),
    "base is a share": ("base_model_name_or_path", r"\\example.org\share\model"),
    "base is a list": ("base_model_name_or_path", ["user/name"]),
    "base missing": ("base_model_name_or_path", None),
    "base with a null byte": ("base_model_name_or_path", "user\x00name"),
    "revision leads out": ("revision", "../main"),
    "names as patterns": ("checkpoint_names", {"(a+)+": "b"}),
    "bdlora": ("use_bdlora", {"a": 1}),
}


@pytest.mark.parametrize("case", HOSTILE_FIELDS)
def test_hostile_config_is_refused(case, folder):
    """Without it, a config from a stranger could hang a regular expression, exhaust memory, or import what it names."""
    field, value = HOSTILE_FIELDS[case]
    respell(folder, **{field: value})
    with pytest.raises(ValueError) as caught:
        load(folder)
    message = str(caught.value)
    assert len(message) < 1500
    named = {"base_model_name_or_path": "base_model", "adapter": "adapter", "rank_pattern": "rank"}.get(field, field)
    assert named in message or "does not fit its config" in message


HOSTILE_TEXTS = {
    "no JSON": "import os",
    "a list": "[]",
    "nothing": "",
    "deep nesting": '{"r": ' + "[" * 100_000,
    "deep objects": '{"a":' * 100_000,
    "NaN": '{"lora_alpha": NaN}',
    "infinity": '{"lora_alpha": -Infinity}',
    "long number": '{"r": ' + "9" * 10_000 + "}",
    "key twice": '{"peft_type": "PLASTICITY", "r": 8, "r": 9}',
    "broken text": '{"peft_type": "\ud800"}',
}


@pytest.mark.parametrize("name", ["adapter_config.json", "plasticity_report.json", "preprocessor_config.json"])
@pytest.mark.parametrize("case", HOSTILE_TEXTS)
def test_files_that_are_no_strict_json_are_refused(case, name, folder):
    """Without it, malformed files would end in a traceback from deep inside, or be read in two ways by two readers."""
    (folder / name).write_bytes(HOSTILE_TEXTS[case].encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=re.escape(name)):
        load(folder)


def test_pickled_weights_are_never_read(folder, tmp_path):
    """Without it, a pickle in the place of safetensors would run its author's code."""
    mark = tmp_path / "ran"
    weights = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"a": Bomb(mark)}))
    load(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="never read"):
        load(folder)
    (folder / "adapter_model.safetensors").write_bytes(pickle.dumps({"a": Bomb(mark)}))
    with pytest.raises(ValueError, match="no whole safetensors file"):
        load(folder)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    base = tmp_path / "base"
    ViTConfig(**TINY, num_labels=2).save_pretrained(base)
    torch.save({"a": Bomb(mark)}, base / "pytorch_model.bin")
    respell(folder, base_model_name_or_path=str(base))
    with pytest.raises((OSError, ValueError)):
        load(folder)
    assert not mark.exists()


def test_code_beside_a_base_model_or_processor_does_not_run(folder, honest, tmp_path):
    """Without it, an adapter could point to a folder whose Python files transformers would import."""
    mark = tmp_path / "ran"
    base = shutil.copytree(honest.parent / "base", tmp_path / "base")
    (base / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForImageClassification": "evil.M"}}
    (base / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text((base / "evil.py").read_text())
    own = folder / "preprocessor_config.json"
    own.write_text(json.dumps({"image_processor_type": "Evil", "auto_map": {"AutoImageProcessor": "evil.P"}}))
    with pytest.raises(ValueError, match=re.escape("preprocessor_config.json")):
        load(folder)
    own.unlink()
    respell(folder, base_model_name_or_path=str(base), auto_mapping={"parent_library": "evil", "base_model_class": "M"})
    with pytest.raises(ValueError):
        load(folder)
    assert not mark.exists()


def test_auto_mapping_and_megatron_are_not_imported(folder):
    """Without it, modules that a config names would be imported, and so run."""
    respell(
        folder, auto_mapping={"parent_library": "antigravity", "base_model_class": "x"}, megatron_core="antigravity"
    )
    assert load(folder).config.num_labels == 2


def test_base_that_is_an_adapter_is_refused(folder):
    """Without it, an adapter that names itself, or another, as its base could lead loading astray."""
    (folder / "config.json").write_text("{}")
    respell(folder, base_model_name_or_path=str(folder))
    with pytest.raises(ValueError, match="is itself an adapter"):
        load(folder)


def spoiled_tensors(tensors, case):
    first = next(iter(tensors))
    if case == "extra base weight":
        return {**tensors, "base_model.model.vit.embeddings.cls_token": torch.zeros(1, 1, 16)}
    if case == "missing":
        return {key: tensor for key, tensor in tensors.items() if key != first}
    if case == "wrong shape":
        return {**tensors, first: torch.zeros(3, 3)}
    return {}


@pytest.mark.parametrize("case", ["extra base weight", "missing", "wrong shape", "empty"])
def test_tensors_beyond_the_config_are_refused(case, folder):
    """Without it, a file could overwrite weights of the base model, or leave adapter weights at random."""
    path = folder / "adapter_model.safetensors"
    save_file(spoiled_tensors(load_file(path), case), path)
    with pytest.raises(ValueError, match=re.escape("adapter_model.safetensors")):
        load(folder)


def test_cut_weights_are_refused(folder):
    """Without it, a download that broke off would end in an error that does not say which file is at fault."""
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        load(folder)


@pytest.mark.parametrize("change", ["name", "shape", "score"])
def test_report_of_another_architecture_is_refused(change, folder):
    """Without it, a later selection would be made from a report that speaks of another model."""
    path = folder / "plasticity_report.json"
    report = json.loads(path.read_text())
    row = next(row for row in report["rows"] if row["level"] == "module" and row["role"] == "mlp_in")
    if change == "score":
        path.write_text(path.read_text().replace(f'"mean": {row["mean"]}', '"mean": 1e999'))
    else:
        row[change] = vit_name("vit.layers.77.mlp.fc1") if change == "name" else [99, 99]
        path.write_text(json.dumps(report))
    with pytest.raises(ValueError, match="another architecture|field 'mean'"):
        load(folder)


def test_paths_that_lead_out_are_refused(folder):
    """Without it, a subfolder taken from a file or a form could reach files outside the adapter."""
    with pytest.raises(ValueError, match="leads out"):
        AutoPlasticModelForImageClassification.from_pretrained(folder, subfolder="../../etc")
    for name in ("/no/such/folder", "../nothing", "a/b/c", "https://example.org/x", ""):
        with pytest.raises((FileNotFoundError, ValueError)):
            load(name)


def test_fields_of_newer_releases_are_left_out_with_a_warning(folder):
    """Without it, every new field of a later release would lock older ones out."""
    respell(folder, something_new={"a": 1})
    with pytest.warns(UserWarning, match="something_new"):
        assert load(folder).config.num_labels == 2


def test_large_files_are_not_parsed(tmp_path):
    """Without it, a file of gigabytes would fill the memory before anything looks at it."""
    path = tmp_path / "adapter_config.json"
    with path.open("wb") as file:
        file.truncate(64 * 2**20 + 1)
    with pytest.raises(ValueError, match="larger than 64 MiB"):
        read_json(path)


# --- fuzzing -----------------------------------------------------------------------------------------------------------

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from([BOMB, "(.*)*", "../x", "classifier", MODULE, "all-linear", "\\1", "(?P<a>", "*", "full", "pissa"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10) | st.just(MODULE), inner, max_size=3)
    ),
    max_leaves=8,
)
FIELDS = sorted({field for field in PlasticityConfig.__dataclass_fields__ if not field.startswith("_")})
MUTATIONS = st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=8), VALUES, min_size=1, max_size=4)


@settings(max_examples=2000)
@given(mutation=MUTATIONS)
@pytest.mark.filterwarnings("ignore:adapter_config.json has fields")
def test_fuzzed_configs_are_refused_or_sound(honest_config, mutation):
    """Without it, some combination of fields that nobody thought of could pass validation, or crash it."""
    try:
        checked = validate_adapter_config(honest_config | mutation)
    except ValueError as error:
        assert len(str(error)) < 2000
        return
    names = [name for entry in ("selected_modules", "rank_pattern", "alpha_pattern") for name in checked[entry] or ()]
    for entry in ("target_modules", "exclude_modules", "modules_to_save"):
        value = checked.get(entry)
        names += [value] if isinstance(value, str) else value or []
    assert all(re.fullmatch(r"[\w.-]+", name) for name in names)
    json.dumps(checked, allow_nan=False)


@settings(max_examples=40)
@given(mutation=MUTATIONS)
@pytest.mark.filterwarnings("ignore")
def test_fuzzed_adapters_load_or_are_refused(honest, mutation):
    """Without it, a config that passes validation could still break or hang the loading that follows."""
    path = honest / "adapter_config.json"
    original = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(original) | mutation), encoding="utf-8")
        try:
            model = load(honest)
        except (ValueError, OSError) as error:
            assert str(error)
        else:
            assert torch.isfinite(model(pixel_values=torch.zeros(1, 3, 32, 32)).logits).all()
    finally:
        path.write_text(original)


def test_many_keys_take_no_time(folder):
    """Without it a small file could keep the loader busy for hours."""
    path = folder / "adapter_config.json"
    path.write_text("{" + ",".join(f'"a{number}": 1' for number in range(300_000)) + ', "a7": 2}')
    with pytest.raises(ValueError, match="holds the key 'a7' twice"):
        read_json(path)


@pytest.mark.parametrize("pattern", ["rank_pattern", "alpha_pattern"])
def test_patterns_for_no_module_are_refused(folder, pattern):
    """Without it peft would try each of 100,000 patterns on every module."""
    path = folder / "adapter_config.json"
    facts = json.loads(path.read_text())
    facts[pattern] = {**{f"a{number}": 2 for number in range(90_000)}, **facts[pattern]}
    path.write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=f"{pattern} names 'a0'"):
        load(folder)


def test_a_refused_adapter_leaves_the_model_as_it_was(folder, honest):
    """Without it a model that was passed would go on with layers that hold nothing, and with another's labels."""
    base = AutoModelForImageClassification.from_pretrained(honest.parent / "base")
    pixels = torch.randn(2, 3, 32, 32)
    before, labels, modules = (
        base(pixels).logits,
        dict(base.config.id2label),
        [name for name, _ in base.named_modules()],
    )
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "labels": ["one", "two"]}))
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({**weights, "more": torch.zeros(1)}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="does not fit"):
        AutoPlasticModelForImageClassification.from_pretrained(folder, base_model=base)
    assert [name for name, _ in base.named_modules()] == modules and not hasattr(base, "peft_config")
    assert torch.equal(base(pixels).logits, before) and base.config.id2label == labels
    save_file(weights, folder / "adapter_model.safetensors")
    loaded = AutoPlasticModelForImageClassification.from_pretrained(folder, base_model=base)
    assert loaded.config.id2label == {0: "one", 1: "two"}
