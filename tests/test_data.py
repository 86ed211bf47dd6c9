"""Loading images from every kind of source, splits, odd image modes and augmentation."""

from __future__ import annotations

import io
import json
import logging
import pickle
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from plastic_peft.data import (
    ImageTransform,
    as_rgb,
    class_counts,
    collate,
    find_label_column,
    image_names,
    load_images,
    load_unlabelled,
    resize_to,
    stratified_cut,
    transform_of,
    with_pixels,
)
from plastic_peft.metrics import load_metric
from plastic_peft.processors import accept_image_size


pytestmark = pytest.mark.versions


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def picture(seed: int, size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def image_folder(root, counts: dict[str, int]):
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            picture(i).save(root / name / f"{i}.png")
    return root


def image_set(count: int = 20) -> datasets.Dataset:
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"]))
    rows = {"image": [picture(i) for i in range(count)], "label": [i % 2 for i in range(count)]}
    return datasets.Dataset.from_dict(rows, features=features)


def test_digits_need_nothing_and_are_cut_by_class():
    """The built-in digits are what works without a network; a class missing from a split would spoil every figure."""
    data = load_images("digits", validation_share=0.1, test_share=0.2)
    assert [len(data[s]) for s in ("train", "validation", "test")] == pytest.approx([1258, 180, 359], abs=8)
    assert sum(len(split) for split in data.values()) == 1797
    for split in data.values():
        counts = class_counts(split)
        assert list(counts) == [str(i) for i in range(10)]
        assert max(counts.values()) - min(counts.values()) <= 8
    again = load_images("digits", validation_share=0.1, test_share=0.2)
    other = load_images("digits", validation_share=0.1, test_share=0.2, seed=1)
    assert again["test"]["label"][:] == data["test"]["label"][:]
    assert [np.asarray(i).sum() for i in other["test"]["image"][:50]] != [
        np.asarray(i).sum() for i in data["test"]["image"][:50]
    ]


@pytest.mark.parametrize(
    "kind", ["folder", "split folder", "parquet", "arrow", "save_to_disk", "csv", "tsv", "json", "jsonl"]
)
def test_every_kind_of_source_gives_the_same_columns(kind, tmp_path):
    """Users keep images in all of these forms; each must arrive as image and label with readable class names."""
    if kind == "folder":
        source = image_folder(tmp_path / "images", {"cat": 10, "dog": 10})
    elif kind == "split folder":
        source = tmp_path / "images"
        image_folder(source / "train", {"cat": 8, "dog": 8})
        image_folder(source / "test", {"cat": 2, "dog": 2})
    elif kind == "parquet":
        source = tmp_path / "images.parquet"
        image_set().rename_columns({"image": "img", "label": "labels"}).to_parquet(source)
    elif kind in ("save_to_disk", "arrow"):
        source = tmp_path / "saved"
        image_set().save_to_disk(source)
        if kind == "arrow":
            (source,) = source.glob("*.arrow")
    else:
        folder = image_folder(tmp_path / "images", {"cat": 10, "dog": 10})
        rows = [(f"{name}/{i}.png", name) for name in ("cat", "dog") for i in range(10)]
        source = folder / f"list.{kind}"
        records = [{"path": path, "class": name} for path, name in rows]
        if kind == "json":
            source.write_text(json.dumps(records))
        elif kind == "jsonl":
            source.write_text("".join(f"{json.dumps(record)}\n" for record in records))
        else:
            separator = "," if kind == "csv" else "\t"
            source.write_text("".join(f"{a}{separator}{b}\n" for a, b in [("path", "class"), *rows]))
    data = load_images(source)
    assert set(data) == {"train", "validation", "test"}
    for split in data.values():
        assert set(split.column_names) == {"image", "label"}
        assert split.features["label"].names == ["cat", "dog"]
        assert split[0]["image"].size == (8, 8)
    assert sum(len(split) for split in data.values()) == 20


def test_splits_given_one_by_one_agree_on_the_classes(tmp_path):
    """A validation folder that lacks a class would number the others anew, and every accuracy would be wrong."""
    train = image_folder(tmp_path / "a", {"ant": 4, "bee": 4, "cow": 4})
    validation = image_folder(tmp_path / "b", {"bee": 2, "cow": 2})
    data = load_images(train=train, validation=validation)
    assert data["validation"].features["label"].names == ["ant", "bee", "cow"]
    assert class_counts(data["validation"]) == {"ant": 0, "bee": 2, "cow": 2}
    with pytest.raises(ValueError, match="'dodo', which the training images lack"):
        load_images(train=train, validation=image_folder(tmp_path / "c", {"dodo": 2}))


def test_number_labels_are_ordered_as_numbers_and_hidden_labels_are_not_used(tmp_path):
    """Sorted as text, class 10 would come before 2; test sets with hidden labels (-1) would score at random."""
    rows = {"image": [picture(i) for i in range(48)], "target": [i % 12 for i in range(48)]}
    train = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    hidden = train.remove_columns(["target"]).add_column("target", [-1] * 48)
    datasets.DatasetDict(train=train, test=hidden).save_to_disk(tmp_path / "d")
    data = load_images(tmp_path / "d")
    assert data["train"].features["label"].names == [str(i) for i in range(12)]
    assert -1 not in data["test"]["label"][:]


def test_a_cut_leaves_no_class_without_training_images():
    """Rounding a rare class away from training would make it unlearnable without a word."""
    labels = [0] * 50 + [1] * 2 + [2]
    rest, part = stratified_cut(labels, 0.1, seed=0)
    assert sorted(rest + part) == list(range(53))
    assert [labels[i] for i in part].count(0) == 5
    assert [labels[i] for i in part].count(1) == 1
    assert 52 in rest


def test_corrupt_images_are_named_and_skipped_or_refused(tmp_path, caplog):
    """One broken file must neither stop a run in its fifth epoch nor vanish without its name."""
    folder = image_folder(tmp_path / "images", {"cat": 10, "dog": 10})
    broken = folder / "dog" / "3.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"1 of 20 train images cannot be decoded: .*3\.png"):
        load_images(folder)
    with caplog.at_level(logging.WARNING, logger="plastic_peft"):
        data = load_images(folder, corrupt="skip")
    assert sum(len(split) for split in data.values()) == 19
    assert "3.png" in caplog.text
    data = load_images(folder, corrupt="unchecked")
    rows = with_pixels(datasets.concatenate_datasets(list(data.values())), ViTImageProcessor())
    with pytest.raises(ValueError, match=r"3\.png cannot be decoded"):
        rows[:]


def test_a_table_may_hold_nothing_but_paths(tmp_path):
    """Without it a plain list of images could not be predicted or measured on."""
    image_folder(tmp_path / "images", {"cat": 3})
    files = [f"images/cat/{i}.png" for i in range(3)]
    datasets.Dataset.from_dict({"image": files}).to_csv(tmp_path / "list.csv")
    assert len(load_unlabelled(tmp_path / "list.csv")) == 3


def test_images_that_a_table_lists_are_named_by_their_files(tmp_path, caplog):
    """Rows of a CSV or parquet file would have to be counted to find the broken image, or after a gap miscounted."""
    image_folder(tmp_path / "images", {"cat": 3, "dog": 3})
    (tmp_path / "images" / "cat" / "1.png").write_bytes(b"no image")
    files = [f"images/{name}/{i}.png" for name in ("cat", "dog") for i in range(3)]
    table = datasets.Dataset.from_dict({"photo": files, "label": ["cat"] * 3 + ["dog"] * 3})
    table.to_csv(tmp_path / "list.csv")
    table.to_parquet(tmp_path / "list.parquet")
    for source in (tmp_path / "list.csv", tmp_path / "list.parquet"):
        with pytest.raises(
            ValueError, match=r"1 of 6 .* decoded: .*images/cat/1\.png \(row 1 of train: no image format"
        ):
            load_images(source, image_column="photo")
        data = load_unlabelled(source, image_column="photo", corrupt="skip")
        assert data["file"][:] == [str(tmp_path / file) for file in files if file != files[1]]
    bare = image_set(3).cast_column("image", datasets.Image(decode=False))
    bytes_only = [{"path": None, "bytes": row["image"]["bytes"] if i != 1 else b"no"} for i, row in enumerate(bare)]
    datasets.Dataset.from_dict({"image": bytes_only}, features=bare.select_columns("image").features).to_parquet(
        tmp_path / "bare.parquet"
    )
    with caplog.at_level(logging.WARNING, logger="plastic_peft"):
        data = load_unlabelled(tmp_path / "bare.parquet", corrupt="skip")
    assert data["file"][:] == ["row 0", "row 2"]
    assert "row 1 of train (no image format" in caplog.text


def test_names_of_images_follow_the_rows_and_need_no_decoding(tmp_path):
    """Predictions would be put to the wrong files after a selection, or wait for every image to be decoded."""
    folder = image_folder(tmp_path / "images", {"cat": 3})
    files = [str(folder / "cat" / f"{i}.png") for i in range(3)]
    for file in files:
        Path(file).write_bytes(b"no image")
    data = load_unlabelled(folder, corrupt="unchecked")
    assert image_names(data.select([2, 0])) == [files[2], files[0]]
    assert image_names(with_pixels(data, ViTImageProcessor())) == files
    assert image_names(datasets.Dataset.from_dict({"path": files}), "path") == files
    assert image_names(image_set(2)) == ["row 0", "row 1"]


def test_fewer_than_two_classes_are_refused(tmp_path):
    """A classifier of one class learns nothing, and transformers would train a regression without a word."""
    one = image_folder(tmp_path / "one", {"cat": 4})
    image_set().filter(lambda row: row["label"] == 1).to_parquet(tmp_path / "one.parquet")
    for source, name in ((one, "cat"), (tmp_path / "one.parquet", "dog")):
        with pytest.raises(ValueError, match=rf"images are of one class, '{name}'.*photos/cat/1\.jpg"):
            load_images(source)
    with pytest.raises(ValueError, match=r"4 of 4 training images have no label, .*0\.png.*photos/cat/1\.jpg"):
        load_images(one / "cat")
    two = image_folder(tmp_path / "two", {"cat": 2, "dog": 2})
    picture(0).save(two / "cover.png")
    with pytest.raises(ValueError, match=r"1 of 5 training images have no label, such as .*cover\.png"):
        load_images(two)


@pytest.mark.parametrize("layout", ["", "train"])
def test_other_files_among_the_images_do_not_matter(layout, tmp_path):
    """Cameras, annotation tools and macOS leave files beside images, which would be read in the place of the images."""
    folder = image_folder(tmp_path / "images" / layout, {"cat": 4, "dog": 4})
    for image in list(folder.rglob("*.png")):
        image.with_suffix(".json").write_text('{"shapes": []}')
        image.with_suffix(".csv").write_text("x,y\n1,2\n")
        (image.parent / f"._{image.name}").write_bytes(b"no image")
    image_folder(folder / "__MACOSX", {"cat": 1})
    image_folder(folder / ".thumbnails", {"cow": 1})
    (folder / "features.parquet").write_bytes(b"no table")
    data = load_images(tmp_path / "images")
    assert sum(len(split) for split in data.values()) == 8
    assert data["train"].features["label"].names == ["cat", "dog"]
    assert len(load_unlabelled(tmp_path / "images")) == 8


def test_folders_are_splits_only_if_all_are_named_so(tmp_path):
    """A class called train would take the others' images for no split, and measuring would see the test images."""
    vehicles = image_folder(tmp_path / "vehicles", {"car": 4, "train": 4})
    assert load_images(vehicles)["train"].features["label"].names == ["car", "train"]
    image_folder(tmp_path / "split" / "Train", {"cat": 4, "dog": 4})
    image_folder(tmp_path / "split" / "val", {"cat": 1, "dog": 2})
    assert len(load_images(tmp_path / "split")["validation"]) == 3
    assert len(load_unlabelled(tmp_path / "split", "train")) == 8


def test_linked_class_folders_are_followed(tmp_path):
    """Subsets of large data sets are folders of links, which would look empty."""
    whole = image_folder(tmp_path / "whole", {"ant": 3, "bee": 3, "cow": 3})
    (tmp_path / "part").mkdir()
    for name in ("ant", "cow"):
        (tmp_path / "part" / name).symlink_to(whole / name)
    assert load_images(tmp_path / "part")["train"].features["label"].names == ["ant", "cow"]


def test_folders_of_tables_and_metadata_are_no_image_folders(tmp_path):
    """A logo beside parquet files, or metadata beside images, must not hide the labels."""
    image_folder(tmp_path / "tables", {"assets": 1})
    image_set().to_parquet(tmp_path / "tables" / "data" / "train.parquet")
    assert sum(len(split) for split in load_images(tmp_path / "tables").values()) == 20
    assert len(load_unlabelled(tmp_path / "tables")) == 20
    listed = image_folder(tmp_path / "listed", {"all": 6})
    rows = [f"all/{i}.png,{'odd' if i % 2 else 'even'}\n" for i in range(6)]
    (listed / "metadata.csv").write_text("file_name,label\n" + "".join(rows))
    assert load_images(listed)["train"].features["label"].names == ["even", "odd"]


def test_a_data_set_with_configurations_asks_for_one(tmp_path):
    """Measuring would fail on data sets that training reads, or advise a call that the user does not make."""
    for name, count in (("small", 4), ("large", 6)):
        image_set(count).to_parquet(tmp_path / name / "train.parquet")
    configs = "".join(f"- config_name: {n}\n  data_files: {n}/train.parquet\n" for n in ("small", "large"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert len(load_unlabelled(tmp_path, config="small")) == 4
    assert len(load_unlabelled(tmp_path, config="large")) == 6
    for load in (load_images, load_unlabelled):
        with pytest.raises(ValueError, match=r"'small', 'large'\]\. Say which with config \(--dataset_config_name\)"):
            load(tmp_path)


def test_token_and_cache_reach_the_hub(tmp_path, monkeypatch):
    """Private data sets could be trained on but not measured, and downloads would fill the home folder."""
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return datasets.DatasetDict(train=image_set())

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    load_images("ann/private", "small", token="secret", cache_dir=tmp_path, revision="v1")
    load_unlabelled("ann/private", config="small", token="secret", cache_dir=tmp_path)
    options = {"token": "secret", "cache_dir": tmp_path}
    assert asked == [(("ann/private", "small"), {**options, "revision": "v1"}), (("ann/private", "small"), options)]


def test_imbalance_is_reported(tmp_path, caplog):
    """Accuracy on nine tenths of one class says little, and the user should hear so."""
    with caplog.at_level(logging.WARNING, logger="plastic_peft"):
        load_images(image_folder(tmp_path / "images", {"cat": 40, "dog": 3}))
    assert "'cat' has" in caplog.text and "macro F1" in caplog.text


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda p: load_images(p / "nowhere"), "does not exist"),
        (lambda p: load_images("digits", train="x"), "either name"),
        (lambda p: load_images("digits", label_column="colour"), "no column 'colour' but image, label"),
        (lambda p: load_images("digits", corrupt="ignore"), "'refuse', 'skip'"),
        (lambda p: load_images("digits", test_share=1.5), "between 0 and 1"),
    ],
)
def test_what_cannot_be_loaded_says_why(call, message, tmp_path):
    """A user who mistypes a path or a column needs its name back, not a traceback from a library."""
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        call(tmp_path)


def test_two_candidate_columns_are_not_guessed():
    """With a fine and a coarse label, a silent guess would train the wrong task."""
    data = image_set().add_column("coarse", [0] * 20).cast_column("coarse", datasets.ClassLabel(names=["animal"]))
    data = data.rename_columns({"label": "fine"})
    with pytest.raises(ValueError, match="one of the columns fine, coarse"):
        find_label_column(data)


def test_odd_image_modes_become_plain_rgb():
    """16-bit images would clip to white, transparent pixels show whatever lies under them, and palettes their indices."""
    deep = Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16))
    assert np.asarray(as_rgb(deep))[0, :, 0].tolist() == [0, 128, 255]
    clear = Image.new("RGBA", (1, 1), (10, 20, 30, 0))
    assert as_rgb(clear).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (1, 1), 7)
    palette.putpalette([0, 0, 0] * 7 + [1, 2, 3])
    assert as_rgb(palette).getpixel((0, 0)) == (1, 2, 3)
    assert as_rgb(Image.new("L", (1, 1), 9)).getpixel((0, 0)) == (9, 9, 9)
    assert as_rgb(Image.fromarray(np.array([[0.5]], dtype=np.float32))).getpixel((0, 0)) == (128, 128, 128)
    turned = Image.new("RGB", (2, 3))
    turned.getexif()[0x0112] = 6
    assert as_rgb(turned).size == (3, 2)
    # a block that says nothing leaves the image as it is
    Image.new("RGB", (2, 3)).save(file := io.BytesIO(), "PNG", exif=b"broken")
    assert as_rgb(Image.open(file)).size == (2, 3)


@pytest.mark.parametrize("top", [254, 255, 256, 257, 65535])
@pytest.mark.parametrize("kind", [np.uint16, ">u2", np.int32])
def test_the_brightness_of_deep_images_does_not_depend_on_their_brightest_pixel(kind, top):
    """A dark 16-bit image would become white or black according to one pixel, and the classes with it."""
    image = Image.fromarray(np.array([[0, 200, top]]).astype(kind))
    assert np.asarray(as_rgb(image))[0, :, 0].tolist() == [0, 1, round(top / 257)]


@pytest.mark.parametrize("values", [[0, 255.0], [-0.5, 1.0], [0, float("nan")]])
def test_floats_outside_0_to_1_are_refused_by_name(values, tmp_path):
    """Floats that go to 255 and floats that go to 1 look alike where they are dark: guessing turns some white."""
    folder = image_folder(tmp_path / "images", {"cat": 3, "dog": 3})
    Image.fromarray(np.array([values], dtype=np.float32)).save(folder / "cat" / "deep.tiff")
    with pytest.raises(
        ValueError, match=r"deep\.tiff cannot be converted .*mode F goes from 0 to 1\): scale its values"
    ):
        as_rgb(Image.open(folder / "cat" / "deep.tiff"))
    with pytest.raises(
        ValueError, match=r"1 of 7 .*deep\.tiff \(row 3 of train: values from .*mode F goes from 0 to 1"
    ):
        load_images(folder)


def test_augmentation_depends_on_image_seed_and_epoch_alone():
    """A resumed run, or one with workers, must see the images that the uninterrupted run would have seen."""
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    data = with_pixels(image_set(), processor, "crop", seed=3)
    transform = transform_of(data)
    first = torch.stack([data[i]["pixel_values"] for i in range(20)])
    backwards = torch.stack([data[i]["pixel_values"] for i in reversed(range(20))]).flip(0)
    assert torch.equal(first, backwards)
    loader = torch.utils.data.DataLoader(
        data, batch_size=7, num_workers=1, collate_fn=collate, persistent_workers=True, multiprocessing_context="fork"
    )
    assert torch.equal(torch.cat([batch["pixel_values"] for batch in loader]), first)
    transform.set_epoch(1)
    second = torch.cat([batch["pixel_values"] for batch in loader])
    assert not torch.equal(second, first)
    assert torch.equal(second, torch.stack([data[i]["pixel_values"] for i in range(20)]))
    copy = pickle.loads(pickle.dumps(ImageTransform(processor, "crop", 3)))
    copy.set_epoch(1)
    assert torch.equal(copy({"image": [image_set()[0]["image"]]})["pixel_values"][0], second[0])


def test_without_augmentation_pixels_are_the_processors():
    """Training pixels that differ from those at inference would cost accuracy unnoticed."""
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    data = image_set()
    row = with_pixels(data, processor)[4]
    expected = processor(images=data[4]["image"], return_tensors="pt")["pixel_values"][0]
    assert torch.equal(row["pixel_values"], expected)
    assert row["labels"] == 0
    flipped = {with_pixels(data, processor, "flip", seed=s)[4]["pixel_values"].equal(expected) for s in range(12)}
    assert flipped == {True, False}


def test_another_image_size_interpolates_positions_and_leaves_the_weights():
    """Users have images of other sizes than the pretraining; the adapter must still fit the unchanged base model."""
    config = ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    model = ViTForImageClassification(config).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    resize_to(processor, 24)
    pixels = processor(images=picture(0), return_tensors="pt")["pixel_values"]
    assert pixels.shape[-2:] == (24, 24)
    with pytest.raises(ValueError, match="doesn't match model"):
        model(pixels)
    accept_image_size(model, 24)
    assert torch.equal(model(pixels).logits, model(pixel_values=pixels, interpolate_pos_encoding=True).logits)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_images_without_labels_come_with_their_names(tmp_path):
    """Predictions are of no use without the file each belongs to."""
    folder = image_folder(tmp_path / "images", {"some": 2, "more": 1})
    data = load_unlabelled(folder)
    assert [name.rsplit("images/")[1] for name in data["file"]] == ["more/0.png", "some/0.png", "some/1.png"]
    assert len(load_unlabelled(folder / "some" / "1.png")) == 1
    image_set(3).to_parquet(tmp_path / "x.parquet")
    assert load_unlabelled(tmp_path / "x.parquet")["file"][:] == ["row 0", "row 1", "row 2"]
    for load in (load_unlabelled, load_images):
        with pytest.raises(ValueError, match="holds no image files"):
            (tmp_path / "empty").mkdir(exist_ok=True)
            load(tmp_path / "empty")


def test_the_label_column_is_not_guessed(tmp_path):
    """Without it a model would be trained to tell coordinates apart, and say that all is well."""
    rows = {"file_name": ["a"], "y": [3], "class": ["cat"], "label": ["dog"]}
    assert find_label_column(datasets.Dataset.from_dict(rows)) == "label"
    with pytest.raises(ValueError, match="one of the columns class, target: say which"):
        find_label_column(datasets.Dataset.from_dict({"class": ["cat"], "target": [1]}))
    with pytest.raises(ValueError, match="none of the columns x, y"):
        find_label_column(datasets.Dataset.from_dict({"x": [1], "y": [2]}))


def test_classes_are_those_of_the_training_images_whatever_the_order_of_the_splits(tmp_path):
    """Without it a class of the test images alone would get an output that nothing can train."""
    image_folder(tmp_path / "photos" / "test", {"dog": 2, "zebra": 2})
    image_folder(tmp_path / "photos" / "train", {"cat": 8, "dog": 8})
    with pytest.raises(ValueError, match="test split has the class 'zebra', which the training images lack"):
        load_images(tmp_path / "photos")
    # numbers and their names are the same classes
    image_folder(tmp_path / "named", {"0": 8, "1": 8})
    rows = {"image": [str(tmp_path / "named" / name / "0.png") for name in "01"], "label": [0, 1]}
    datasets.Dataset.from_dict(rows).to_csv(tmp_path / "numbered.csv")
    data = load_images(train=tmp_path / "named", test=tmp_path / "numbered.csv")
    assert data["test"].features["label"].names == ["0", "1"] and data["test"]["label"][:] == [0, 1]


def test_one_image_without_a_label_does_not_hide_a_split(tmp_path):
    """Without it a stray file would have a model tested on four images of its own, in the place of the user's forty."""
    for split, count in (("train", 8), ("test", 4)):
        image_folder(tmp_path / "photos" / split, {"cat": count, "dog": count})
    picture(0).save(tmp_path / "photos" / "test" / "stray.png")
    with pytest.raises(ValueError, match=r"1 of 9 test images have no label, such as .*stray.png"):
        load_images(tmp_path / "photos")
    # beside other numbers, -1 is a class
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    rows = {"image": [picture(i) for i in range(20)], "label": [-1, 1] * 10}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "signs.parquet")
    assert load_images(tmp_path / "signs.parquet")["train"].features["label"].names == ["-1", "1"]


def test_unlabelled_images_are_those_of_all_splits(tmp_path):
    """Without it half of a folder would get no prediction, and nothing would say so."""
    for split in ("train", "test"):
        image_folder(tmp_path / split, {"cat": 2, "dog": 3})
    assert len(load_unlabelled(tmp_path)) == 10
    assert len(load_unlabelled(tmp_path, "test")) == 5
    for split in ("train", "test"):
        image_set(2).to_parquet(tmp_path / "tables" / f"{split}.parquet")
    names = load_unlabelled(tmp_path / "tables")["file"][:]
    assert names == ["train row 0", "train row 1", "test row 0", "test row 1"]


def test_columns_that_lost_their_type_hold_images_by_their_name(tmp_path):
    """Without it files that other tools wrote would be refused, which the datasets library reads after a cast."""
    content = io.BytesIO()
    picture(3).save(content, "png")
    for column in ([{"bytes": content.getvalue(), "path": "a.png"}], [content.getvalue()]):
        pyarrow.parquet.write_table(pyarrow.table({"image": column}), tmp_path / "untyped.parquet")
        data = load_unlabelled(tmp_path / "untyped.parquet")
        assert np.array_equal(data[0]["image"], picture(3))


def test_another_size_of_processors_that_crop_squeezes_nothing():
    """Without it a model would be evaluated on distorted images as soon as another size is asked for."""
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})
    wide = Image.new("RGB", (160, 80), "red")
    wide.paste(Image.new("RGB", (80, 80), "blue"), (40, 0))
    resize_to(processor, 64)
    pixels = processor(images=wide, return_tensors="pt")["pixel_values"][0]
    assert pixels.shape == (3, 64, 64) and processor.size["shortest_edge"] == 80
    # the centre only, which is blue
    assert (pixels[2] > pixels[0]).all()
    whole = CLIPImageProcessor(do_center_crop=False)
    resize_to(whole, 64)
    assert whole(images=[wide, picture(0)], return_tensors="pt")["pixel_values"].shape == (2, 3, 64, 64)


def test_the_shipped_metric_agrees_with_scikit_learn():
    """The metric decides which run is best, and nobody checks it again."""
    from sklearn.metrics import confusion_matrix, f1_score, top_k_accuracy_score

    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(200, 7)).astype(np.float32), rng.integers(0, 7, 200)
    got = load_metric().compute(predictions=logits, references=labels)
    assert got["accuracy"] == pytest.approx((logits.argmax(1) == labels).mean())
    assert got["top5_accuracy"] == pytest.approx(top_k_accuracy_score(labels, logits, k=5))
    assert got["macro_f1"] == pytest.approx(f1_score(labels, logits.argmax(1), average="macro"))
    assert got["confusion_matrix"] == confusion_matrix(labels, logits.argmax(1)).tolist()
    with pytest.raises(ValueError, match="not shipped|No metric"):
        load_metric("bleu")
