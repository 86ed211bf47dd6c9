"""Images and labels from wherever a user keeps them, as train, validation and test splits with pixel values.

`load_images` brings any source to the two columns `image` and `label`; `with_pixels` puts an `ImageTransform` on a
split, which decodes, augments and preprocesses when rows are read, in workers too.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from .images import as_rgb
from .processors import output_size


logger = logging.getLogger(__name__)

DIGITS = "digits"
SPLITS = ("train", "validation", "test")
CORRUPT = ("refuse", "skip", "unchecked")
AUGMENT = ("auto", "none", "flip", "crop")

_SPLIT_NAMES = {"valid": "validation", "val": "validation", "dev": "validation", "training": "train", "testing": "test"}
_IMAGE_NAMES = ("image", "img", "images", "picture", "image_path", "file_name", "filename", "path", "file")
_LABEL_NAMES = ("label", "labels", "class", "target", "category")
_FILES = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".arrow": "arrow"}
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_WHERE_LABELS_ARE = (
    "Labels come from one folder per class, such as photos/cat/1.jpg and photos/dog/1.jpg, or from a table of images "
    "and labels (.csv, .parquet, ...)."
)
_NAMED = 5
_IMBALANCE = 10


# --- loading -----------------------------------------------------------------------------------------------------------


def load_images(
    name: str | os.PathLike[str] | None = None,
    config: str | None = None,
    *,
    train: str | os.PathLike[str] | None = None,
    validation: str | os.PathLike[str] | None = None,
    test: str | os.PathLike[str] | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    validation_share: float = 0.1,
    test_share: float = 0.1,
    seed: int = 0,
    corrupt: str = "refuse",
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    **load_options: Any,
) -> datasets.DatasetDict:
    """Load labelled images as the splits `train`, `validation` and `test` with the columns `image` and `label`.

    In an image folder the classes are folders (`photos/cat/1.jpg`), inside folders named after splits if there are any
    (`photos/train/cat/1.jpg`); other files among the images do not matter. A missing split is cut from the training
    images: stratified by label, the same for the same seed. A split all of whose labels are hidden (-1 or missing) counts
    as missing. Counts per class are logged, with a warning where one class has 10 times as many training images as
    another, or none at all.

    Args:
        name: `"digits"` (scikit-learn's 1797 handwritten digits), an image folder, a folder written by
            `save_to_disk`, a parquet, CSV, TSV, JSON or arrow file, or else the id of a data set on the Hub. Paths of
            images inside a file are relative to the file.
        config: Configuration name of a data set that has several.
        train, validation, test: The same kinds of source, one per split, instead of `name`.
        image_column, label_column: Needed only where the columns cannot be told from their types and names.
        validation_share, test_share: Shares of the training images to cut off for a missing split.
        seed: Decides the cuts.
        corrupt: `"refuse"` decodes every image once and names those that cannot be decoded in an error, `"skip"`
            leaves them out and names them in a warning, `"unchecked"` saves the pass over the images.
        token: For a private or gated data set on the Hub; by default the stored login.
        cache_dir: Where data sets are kept; by default where `datasets` keeps them.
        load_options: Passed on to `datasets.load_dataset`, such as `revision`.

    Raises:
        FileNotFoundError: If a path or data set does not exist.
        ValueError: If columns cannot be told, labels are no classes or fewer than two, images are corrupt, or a split
            would be empty.
    """
    _check_corrupt(corrupt)
    shares = {"validation": validation_share, "test": test_share}
    for split, share in shares.items():
        if not 0 < share < 1:
            raise ValueError(f"{split}_share={share} must lie between 0 and 1.")
    given = {"train": train, "validation": validation, "test": test}
    if (name is None) == (train is None):
        raise ValueError(
            "Say which images to load: either name (a data set or folder), or train (and validation, test)."
        )
    options = {"token": token, "cache_dir": cache_dir, **load_options}
    if name is not None:
        splits = _load(name, config, image_column, options)
    else:
        splits = {
            split: _only_split(_load(path, config, image_column, options), path)
            for split, path in given.items()
            if path
        }

    if "train" not in splits:
        raise ValueError(f"{name or train} has the splits {', '.join(splits)}, none of which is 'train'.")
    columns = {
        "image": image_column or find_image_column(splits["train"]),
        "label": label_column or find_label_column(splits["train"]),
    }
    splits = {split: _named_columns(data, split, columns) for split, data in splits.items()}
    splits = _class_labels(splits)
    _check_classes(splits["train"])
    if corrupt != "unchecked":
        splits = {split: checked_images(data, split, corrupt) for split, data in splits.items()}
    splits = _cut_missing(splits, shares, seed)
    _report_balance(splits)
    return datasets.DatasetDict({split: splits[split] for split in SPLITS})


def load_labelled(
    name: str | os.PathLike[str],
    *,
    config: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    corrupt: str = "refuse",
    **load_options: Any,
) -> datasets.Dataset:
    """Load one set of labelled images that is not to be split: a source of `load_images` with one split.

    Args:
        name: The image folder, data file or data set.
        config, image_column, label_column, corrupt, load_options: As for `load_images`.

    Returns:
        A data set with the columns `image` and `label`.

    Raises:
        FileNotFoundError, ValueError: As for `load_images`, and if there is more than one split.
    """
    _check_corrupt(corrupt)
    images = _only_split(_load(name, config, image_column, load_options), name)
    columns = {
        "image": image_column or find_image_column(images),
        "label": label_column or find_label_column(images),
    }
    images = _class_labels({"train": _named_columns(images, "train", columns)})["train"]
    return images if corrupt == "unchecked" else checked_images(images, "test", corrupt)


def load_unlabelled(
    name: str | os.PathLike[str],
    split: str | None = None,
    *,
    config: str | None = None,
    image_column: str | None = None,
    corrupt: str = "refuse",
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> datasets.Dataset:
    """Load images without their labels, to measure on or to predict: one image file, or any source of `load_images`.

    Args:
        name: The image file, folder, data file or data set; folders need no class folders.
        split: The split to take where the source has it, otherwise its first; by default all images, split after split.
        config, image_column, corrupt, token, cache_dir: As for `load_images`.

    Returns:
        A data set with the column `image`, and `file` with what `image_names` calls each image.

    Raises:
        FileNotFoundError, ValueError: As for `load_images`.
    """
    _check_corrupt(corrupt)
    splits = _load(name, config, image_column, {"token": token, "cache_dir": cache_dir})
    if split is not None:
        split = split if split in splits else next(iter(splits))
        splits = {split: splits[split]}
    parts = []
    for part, data in splits.items():
        images = _named_columns(data, part, {"image": image_column or find_image_column(data)})
        names = image_names(images)
        if len(splits) > 1:
            names = [f"{part} {name}" if name.startswith("row ") else name for name in names]
        images = images.add_column("file", names)
        parts.append(images if corrupt == "unchecked" else checked_images(images, part, corrupt))
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def image_names(data: datasets.Dataset, image_column: str = "image") -> list[str]:
    """What to call each image: its path or file name where the data has one, else `row N`; nothing is decoded."""
    images = _as_image_column(data.select_columns([image_column]), image_column).with_format("arrow")
    paths: list[str | None] = []
    for batch in images.iter(1000):
        paths += pyarrow.compute.struct_field(batch.column(0), "path").to_pylist()
    return [path or f"row {index}" for index, path in enumerate(paths)]


def digests(splits: Mapping[str, datasets.Dataset]) -> dict[str, str]:
    """How many images each split has, and a digest of their file names and labels; nothing is decoded."""
    found = {}
    for split, data in splits.items():
        names = [os.path.basename(name) for name in image_names(data)]
        content = json.dumps([names, data.with_format(None)["label"][:]])
        found[split] = f"{len(data)} images, {hashlib.sha256(content.encode()).hexdigest()[:12]}"
    return found


def class_counts(data: datasets.Dataset) -> dict[str, int]:
    """How many images each class has, by label name, classes without any included."""
    counts = Counter(data.with_format(None)["label"][:])
    return {name: counts[index] for index, name in enumerate(data.features["label"].names)}


def _load(
    name: str | os.PathLike[str], config: str | None, image_column: str | None, options: dict[str, Any]
) -> dict[str, datasets.Dataset]:
    """The splits of any source, under their usual names and with the source's own columns."""
    path = Path(name).expanduser()
    loaded: Any
    if str(name) == DIGITS:
        loaded = _digits()
    elif path.is_dir():
        loaded = _load_folder(path, config, options)
    elif path.is_file():
        loaded = _load_file(path, image_column, options)
    elif looks_like_path(str(name)):
        raise FileNotFoundError(f"{name} does not exist: there is no such file or folder of images.")
    else:
        loaded = _load_dataset(name, str(name), config, **options)
    if isinstance(loaded, datasets.Dataset):
        loaded = {"train": loaded}
    splits = {_SPLIT_NAMES.get(split, split): data for split, data in loaded.items() if len(data)}
    if not splits:
        raise ValueError(f"{name} holds no images.")
    return splits


def _load_dataset(name: Any, builder: str, *arguments: Any, **options: Any) -> Any:
    """`datasets.load_dataset` with errors that name the source and say what to do."""
    try:
        return datasets.load_dataset(builder, *arguments, **options)
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{name} is neither here nor on the Hub as far as it can be reached: {error} A private data set needs "
            "token (--token) or `hf auth login`."
        ) from None
    except (datasets.exceptions.DatasetGenerationError, datasets.exceptions.DataFilesNotFoundError) as error:
        raise ValueError(f"{name} cannot be read as images: {error.__cause__ or error}") from error
    except ValueError as error:
        if "config" not in str(error).lower():
            raise
        reason = " ".join(str(error).partition("Example of usage")[0].split())
        raise ValueError(f"{name}: {reason}. Say which with config (--dataset_config_name).") from None


def _load_folder(path: Path, config: str | None, options: dict[str, Any]) -> Any:
    if _is_saved(path):
        return datasets.load_from_disk(str(path))
    files = _visible_files(path)
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    images = [file for file in files if file.suffix.lower() in suffixes]
    tables = [file for file in files if file.suffix.lower() in _FILES]
    archives = [file for file in files if file.suffix.lower() == ".zip"]
    if (images and any(file.name in _METADATA for file in tables)) or (archives and not images and not tables):
        # the library drops the label of a folder with a single class unless told not to, and older releases prefer it to
        # the label that the metadata gives
        given = any("label" in _metadata_columns(file) for file in tables if file.name in _METADATA)
        return _load_dataset(path, "imagefolder", data_dir=str(path), drop_labels=given, **options)
    # CSV and JSON files among images are notes on them; a picture beside other tables is likely to be a logo
    noted = all(_FILES[file.suffix.lower()] in ("csv", "json") for file in tables)
    if images and (noted or len({file.parent for file in images}) > 1):
        return _load_image_folder(path, images)
    if not tables:
        raise ValueError(
            f"{path} holds no image files (.jpg, .png, ...) and no tables of images ({', '.join(_FILES)})."
        )
    return _load_dataset(path, str(path), config, **options)


def _metadata_columns(file: Path) -> list[str]:
    import pandas

    if file.suffix == ".csv":
        return list(map(str, pandas.read_csv(file, nrows=1).columns))
    table = pandas.read_json(file, lines=True, nrows=1) if file.suffix == ".jsonl" else pandas.read_parquet(file)
    return list(map(str, table.columns))


def _load_image_folder(path: Path, files: list[Path]) -> dict[str, datasets.Dataset]:
    """Labels from the folder of each image, and splits from the folders in `path` if all are named after splits."""
    splits: dict[str, list[Path]] = {}
    for file in files:
        top = file.relative_to(path).parts[0].lower()
        splits.setdefault(_SPLIT_NAMES.get(top, top), []).append(file)
    depth = 1 if splits.keys() <= {*SPLITS} else 0
    return {
        split: _image_rows(found, [_class_of(file.relative_to(path).parts[depth:]) for file in found])
        for split, found in (splits if depth else {"train": files}).items()
    }


def _class_of(parts: Sequence[str]) -> str | None:
    return parts[-2] if len(parts) > 1 else None


def _image_rows(files: Sequence[Path], labels: Sequence[str | None]) -> datasets.Dataset:
    features = datasets.Features(image=datasets.Value("string"), label=datasets.Value("string"))
    data = datasets.Dataset.from_dict({"image": [str(file) for file in files], "label": labels}, features=features)
    return data.cast_column("image", datasets.Image())


def _load_file(path: Path, image_column: str | None, options: dict[str, Any]) -> datasets.Dataset:
    kind = _FILES.get(path.suffix.lower())
    if kind is None:
        return _image_rows([path], [None])
    extra = {"sep": "\t"} if path.suffix.lower() == ".tsv" else {}
    data: datasets.Dataset = _load_dataset(path, kind, data_files=str(path), **extra, **options)["train"]
    column = image_column or find_image_column(data)
    if column not in data.column_names or not _is_text(data.features[column]):
        return data
    # paths inside a file are meant relative to it
    files = [value and str(path.parent / value) for value in data[column][:]]
    missing = [file for file in files if file and not Path(file).is_file()]
    if missing:
        raise FileNotFoundError(f"{path} names {len(missing)} images that do not exist, such as {missing[0]}.")
    rest = data.remove_columns([column])
    # a table without columns has no rows to add a column to
    data = rest.add_column(column, files) if rest.column_names else datasets.Dataset.from_dict({column: files})
    return data.cast_column(column, datasets.Image())


def _only_split(splits: dict[str, datasets.Dataset], path: Any) -> datasets.Dataset:
    if len(splits) != 1:
        raise ValueError(
            f"{path} holds the splits {', '.join(splits)}, where one was expected: pass the folder of a single split, or "
            "name the whole data set instead."
        )
    return next(iter(splits.values()))


def looks_like_path(name: str) -> bool:
    """Is this meant as a path rather than as an id on the Hub?"""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix.lower() in _FILES


def _is_saved(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _visible_files(folder: Path) -> list[Path]:
    """Files at any depth, in a fixed order, without what systems hide (`._1.png`, `__MACOSX`)."""
    found = []
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        found += [Path(place, name) for name in files if not name.startswith(".")]
    return sorted(found)


def _check_corrupt(corrupt: str) -> None:
    if corrupt not in CORRUPT:
        raise ValueError(f"corrupt={corrupt!r} is unknown: choose one of {', '.join(map(repr, CORRUPT))}.")


def _digits() -> datasets.Dataset:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = (bunch.images * (255 / 16)).round().astype(np.uint8)
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=[str(i) for i in range(10)]))
    rows = {"image": [Image.fromarray(image) for image in pixels], "label": bunch.target.tolist()}
    return datasets.Dataset.from_dict(rows, features=features)


# --- columns -----------------------------------------------------------------------------------------------------------


def find_image_column(data: datasets.Dataset) -> str:
    """The column that holds images, or paths to them.

    Raises:
        ValueError: If there is none or more than one.
    """
    typed = [name for name, feature in data.features.items() if isinstance(feature, datasets.Image)]
    likely = [name for name, feature in data.features.items() if _is_text(feature) or _is_binary(feature)]
    found = typed or [name for name in likely if name.lower() in _IMAGE_NAMES][:1]
    if len(found) != 1:
        raise ValueError(
            f"The images are in {'one of' if found else 'none of'} the columns {', '.join(found or data.column_names)}: say "
            "which with image_column (--image_column_name)."
        )
    return found[0]


def find_label_column(data: datasets.Dataset) -> str:
    """The column that holds class labels: the one of that type, else one with a usual name, `label` before others.

    Raises:
        ValueError: If there is none or more than one.
    """
    found = [name for name, feature in data.features.items() if isinstance(feature, datasets.ClassLabel)]
    if len(found) != 1:
        named = [name for name in found or data.column_names if name.lower() in _LABEL_NAMES]
        found = [name for name in named if name.lower() in _LABEL_NAMES[:2]] or named or found
    if len(found) != 1:
        raise ValueError(
            f"The labels are in {'one of' if found else 'none of'} the columns {', '.join(found or data.column_names)}: say "
            "which with label_column (--label_column_name)."
        )
    return found[0]


def _is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", "") in ("string", "large_string")


def _is_binary(feature: Any) -> bool:
    """Bytes of image files, by themselves or beside their paths, as in files that lost the types of their columns."""
    if isinstance(feature, dict):
        return feature.keys() == {"bytes", "path"}
    return getattr(feature, "dtype", "") in ("binary", "large_binary")


def _as_image_column(data: datasets.Dataset, column: str) -> datasets.Dataset:
    feature = data.features[column]
    if isinstance(feature, datasets.Image):
        return data
    if not _is_text(feature) and not _is_binary(feature):
        raise ValueError(f"Column {column!r} holds {feature}, not images: say which column does with image_column.")
    return data.cast_column(column, datasets.Image())


def _named_columns(data: datasets.Dataset, split: str, columns: Mapping[str, str]) -> datasets.Dataset:
    """Keep the columns that `columns` maps `image` and, unless labels do not matter, `label` to, under these names."""
    for name, column in columns.items():
        if column not in data.column_names and not (name == "label" and split == "test"):
            raise ValueError(
                f"The {split} split has no column {column!r} but {', '.join(data.column_names)}: correct {name}_column "
                f"(--{name}_column_name)."
            )
    kept = {column: name for name, column in columns.items() if column in data.column_names}
    data = _as_image_column(data.select_columns([*kept]), columns["image"])
    renamed = {column: name for column, name in kept.items() if column != name}
    return data.rename_columns(renamed) if renamed else data


def _class_labels(splits: dict[str, datasets.Dataset]) -> dict[str, datasets.Dataset]:
    """Give all splits the same `ClassLabel`, and drop a split whose labels are hidden."""
    values: dict[str, list[Any]] = {}
    # classes are those of the training images, whatever the order of the splits
    splits = {split: splits[split] for split in sorted(splits, key=lambda split: split != "train")}
    for split, data in splits.items():
        column = data.with_format(None)["label"][:] if "label" in data.column_names else [None] * len(data)
        feature = data.features.get("label")
        # -1 hides the class of a `ClassLabel`, and of a whole column of numbers; beside other numbers it is one of them
        hides = isinstance(feature, datasets.ClassLabel) or set(column) <= {-1, None}
        hidden = [index for index, value in enumerate(column) if value is None or (hides and value == -1)]
        if len(hidden) == len(column) and split != "train":
            logger.warning("The labels of the %d %s images are hidden: that split is not used.", len(column), split)
            continue
        if hidden:
            raise ValueError(
                f"{len(hidden)} of {len(column)} {'training' if split == 'train' else split} images have no label, such as "
                f"{image_names(data)[hidden[0]]}: label or remove them. {_WHERE_LABELS_ARE}"
            )
        values[split] = [feature.int2str(v) for v in column] if isinstance(feature, datasets.ClassLabel) else column
    first = splits["train"].features["label"]
    if all(splits[split].features["label"] == first for split in values) and isinstance(first, datasets.ClassLabel):
        return {split: splits[split] for split in values}

    # by their names, since a class may be a number in one split and its name in another
    known = list(first.names) if isinstance(first, datasets.ClassLabel) else []
    for split, column in values.items():
        odd = next((v for v in column if not isinstance(v, (str, int)) or isinstance(v, bool)), None)
        if odd is not None:
            raise ValueError(
                f"The {split} split has the label {str(odd)[:60]!r}: labels must be names or whole numbers."
            )
        new = {v for v in set(column) if str(v) not in known}
        if new and known and split != "train":
            raise ValueError(
                f"The {split} split has the class {sorted(map(str, new))[0]!r}, which the training images lack."
            )
        known += dict.fromkeys(str(v) for v in sorted(new, key=lambda v: (isinstance(v, str), v)))
    place = {name: index for index, name in enumerate(known)}
    label = datasets.ClassLabel(names=known)
    encoded = {}
    for split, column in values.items():
        data = splits[split].remove_columns(["label"]).add_column("label", [place[str(v)] for v in column])
        encoded[split] = data.cast_column("label", label)
    return encoded


def _check_classes(train: datasets.Dataset) -> None:
    present = [name for name, count in class_counts(train).items() if count]
    if len(present) < 2:
        raise ValueError(
            f"All {len(train)} training images are of one class, {present[0]!r}, and there is nothing to tell apart: "
            f"pass images of two classes or more. {_WHERE_LABELS_ARE}"
        )


# --- images ------------------------------------------------------------------------------------------------------------


def open_image(value: Any) -> Image.Image:
    """A decoded PIL image from a PIL image, a path, bytes, or a row of an undecoded `datasets.Image` column.

    Raises:
        ValueError: If it cannot be decoded; the message names the file where there is one.
    """
    if isinstance(value, Image.Image):
        return value
    path = value.get("path") if isinstance(value, Mapping) else (None if isinstance(value, bytes) else value)
    content = value.get("bytes") if isinstance(value, Mapping) else (value if isinstance(value, bytes) else None)
    where: Any = io.BytesIO(content) if content is not None else path
    try:
        image = Image.open(where)
        image.load()
    # PIL's decoders raise nearly anything on broken bytes
    except Exception as error:
        raise ValueError(f"{path or 'An image'} cannot be decoded ({_reason(error)}): repair or remove it.") from error
    return image


def _reason(error: BaseException) -> str:
    # PIL's words are the file's name once more, or the address of its bytes
    return "no image format that is known" if isinstance(error, UnidentifiedImageError) else str(error)


def checked_images(data: datasets.Dataset, split: str, corrupt: str) -> datasets.Dataset:
    """Decode every image once; `corrupt` says whether those that cannot be are refused or left out, as in `load_images`."""
    raw = data.cast_column("image", datasets.Image(decode=False)).select_columns(["image"]).with_format(None)

    def fault(index: int) -> str | None:
        value = raw[index]["image"] or {}
        try:
            as_rgb(open_image(value))
        except ValueError as error:
            row, reason = f"row {index} of {split}", _reason(error.__cause__ or error) if value else "no image"
            return f"{value['path']} ({row}: {reason})" if value.get("path") else f"{row} ({reason})"
        return None

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        faults = list(pool.map(fault, range(len(raw))))
    bad = [name for name in faults if name is not None]
    if not bad:
        return data
    named = ", ".join(bad[:_NAMED]) + (f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else "")
    if corrupt == "refuse":
        raise ValueError(
            f"{len(bad)} of {len(data)} {split} images cannot be decoded: {named}. Repair or remove them, or leave them out "
            "with corrupt='skip' (--corrupt_images skip)."
        )
    if len(bad) == len(data):
        raise ValueError(f"None of the {len(data)} {split} images can be decoded: {named}.")
    logger.warning(
        "%d of %d %s images cannot be decoded and are left out: %s", len(bad), len(data), split, ", ".join(bad)
    )
    return data.select([index for index, name in enumerate(faults) if name is None])


# --- splits ------------------------------------------------------------------------------------------------------------


def stratified_cut(labels: Sequence[int], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Cut indices into (rest, part) with `share` of each class in `part`.

    A class of one image stays in the rest; of any other, at least one image goes to either side.
    """
    generator = np.random.default_rng(seed)
    column = np.asarray(labels)
    part = []
    for label in np.unique(column):
        places = generator.permutation(np.flatnonzero(column == label))
        count = min(max(1, round(share * len(places))), len(places) - 1)
        part += places[:count].tolist()
    chosen = set(part)
    return [i for i in range(len(column)) if i not in chosen], sorted(part)


def _cut_missing(
    splits: dict[str, datasets.Dataset], shares: dict[str, float], seed: int
) -> dict[str, datasets.Dataset]:
    splits = dict(splits)
    total = len(splits["train"])
    for split in ("test", "validation"):
        if split in splits:
            continue
        train = splits["train"]
        share = shares[split] * total / len(train)
        rest, part = stratified_cut(train.with_format(None)["label"][:], min(share, 0.9), seed)
        if not part:
            raise ValueError(
                f"{total} training images are too few to cut a {split} split from: a class needs an image for every "
                "split. Pass one."
            )
        splits["train"], splits[split] = train.select(rest), train.select(part)
        logger.info("Cut a %s split of %d images from the %d training images.", split, len(part), total)
    return splits


def _report_balance(splits: dict[str, datasets.Dataset]) -> None:
    counts = class_counts(splits["train"])
    logger.info("Images: %s.", ", ".join(f"{len(splits[split])} {split}" for split in SPLITS))
    fewest, most = min(counts, key=lambda c: counts[c]), max(counts, key=lambda c: counts[c])
    if counts[most] >= _IMBALANCE * max(counts[fewest], 1):
        logger.warning(
            "The classes are unbalanced: %r has %d training images and %r has %d. Read macro F1 beside accuracy.",
            most,
            counts[most],
            fewest,
            counts[fewest],
        )


# --- pixels ------------------------------------------------------------------------------------------------------------


class ImageTransform:
    """Turn rows with raw images into `pixel_values` and `labels`, for `datasets.Dataset.set_transform`.

    It can be pickled, and works in data loader workers. What augmentation does to an image depends on the image, the
    seed and the epoch alone, not on order, workers or processes: a resumed run sees the images that it would have seen.

    Args:
        processor: Image processor of the model.
        augment: `"none"`, `"flip"` (half of the images are mirrored), or `"crop"` (mirrored, and cut to a random part of
            40 to 100 % of the area with a side ratio between 3:4 and 4:3, resized to the processor's output size).
        seed: Decides the augmentation.

    Attributes:
        epoch: Set it (`set_epoch`) so that every epoch augments anew; workers that are already running see it.
    """

    def __init__(self, processor: Callable[..., Any], augment: str = "none", seed: int = 0) -> None:
        if augment not in AUGMENT[1:]:
            raise ValueError(f"augment={augment!r} is unknown: choose one of {', '.join(map(repr, AUGMENT[1:]))}.")
        self.processor, self.augment, self.seed = processor, augment, seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __call__(self, rows: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        images = [as_rgb(open_image(value)) for value in rows["image"]]
        options: dict[str, Any] = {}
        if self.augment != "none":
            images = [self._augmented(image) for image in images]
        if self.augment == "crop":
            options = {"do_resize": False, "do_center_crop": False}
        batch: dict[str, Any] = dict(self.processor(images=images, return_tensors="pt", **options))
        if "label" in rows:
            batch["labels"] = list(rows["label"])
        return batch

    def _augmented(self, image: Image.Image) -> Image.Image:
        generator = np.random.default_rng((self.seed, self.epoch, zlib.crc32(image.tobytes())))
        if generator.random() < 0.5:
            image = ImageOps.mirror(image)
        if self.augment == "flip":
            return image
        width, height = image.size
        area = width * height * generator.uniform(0.4, 1.0)
        ratio = np.exp(generator.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = min(width, round((area * ratio) ** 0.5)), min(height, round((area / ratio) ** 0.5))
        w, h = max(w, 1), max(h, 1)
        left, top = generator.integers(0, width - w + 1), generator.integers(0, height - h + 1)
        box = (float(left), float(top), float(left + w), float(top + h))
        return image.resize(output_size(self.processor), Image.Resampling.BICUBIC, box=box)


def with_pixels(
    data: datasets.Dataset, processor: Callable[..., Any], augment: str = "none", seed: int = 0
) -> datasets.Dataset:
    """A view of `data` (columns `image`, `label`) whose rows are `pixel_values` (channels, height, width) and `labels`."""
    raw = data.cast_column("image", datasets.Image(decode=False))
    return raw.with_transform(ImageTransform(processor, augment, seed))


def transform_of(data: Any) -> ImageTransform | None:
    """The `ImageTransform` of a data set made by `with_pixels`."""
    transform = getattr(data, "format", {}).get("format_kwargs", {}).get("transform")
    return transform if isinstance(transform, ImageTransform) else None


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Stack rows of `with_pixels` to `pixel_values` (n, channels, height, width) and `labels` (n,)."""
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0] if isinstance(rows[0][key], torch.Tensor)}
    if "labels" in rows[0]:
        batch["labels"] = torch.tensor([row["labels"] for row in rows])
    return batch


def resize_to(processor: Any, size: int) -> None:
    """Make an image processor put out images of `size` x `size` pixels."""
    current = processor.size
    crop = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
    if "height" in current:
        processor.size = type(current)(**dict.fromkeys(dict(current), size))
    elif crop and "shortest_edge" in current:
        # what is cut off stays the same share, and nothing is squeezed
        processor.size = {"shortest_edge": round(size * current["shortest_edge"] / crop["height"])}
    else:
        processor.size = {"height": size, "width": size}
    if getattr(processor, "crop_size", None):
        processor.crop_size = {"height": size, "width": size}
