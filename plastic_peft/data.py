"""Images and labels from wherever a user keeps them, as train, validation and test splits with pixel values.

`load_images` brings any source to the two columns `image` and `label`; `with_pixels` puts an `ImageTransform` on a
split, which decodes, augments and preprocesses when rows are read, in workers too.
"""

from __future__ import annotations

import io
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
import torch
from PIL import Image, ImageOps

from .images import output_size


logger = logging.getLogger(__name__)

DIGITS = "digits"
SPLITS = ("train", "validation", "test")
CORRUPT = ("refuse", "skip", "unchecked")
AUGMENT = ("auto", "none", "flip", "crop")

_SPLIT_NAMES = {"valid": "validation", "val": "validation", "dev": "validation", "training": "train", "testing": "test"}
_IMAGE_NAMES = ("image", "img", "images", "picture", "image_path", "file_name", "filename", "path", "file")
_LABEL_NAMES = ("label", "labels", "class", "target", "category", "y")
_FILES = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".arrow": "arrow"}
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
    **load_options: Any,
) -> datasets.DatasetDict:
    """Load labelled images as the splits `train`, `validation` and `test` with the columns `image` and `label`.

    A missing split is cut from the training images: stratified by label, the same for the same seed. A split whose
    labels are hidden (-1 or missing) counts as missing. Counts per class are logged, with a warning where one class
    has 10 times as many training images as another, or none at all.

    Args:
        name: `"digits"` (scikit-learn's 1797 handwritten digits), an image folder, a folder written by
            `save_to_disk`, a parquet, CSV, TSV, JSON or arrow file, or else the id of a data set on the Hub.
        config: Configuration name of a Hub data set.
        train, validation, test: The same kinds of source, one per split, instead of `name`. In a CSV or JSON file
            the images are paths, relative to the file.
        image_column, label_column: Needed only where the columns cannot be told from their types and names.
        validation_share, test_share: Shares of the training images to cut off for a missing split.
        seed: Decides the cuts.
        corrupt: `"refuse"` decodes every image once and names those that cannot be decoded in an error, `"skip"`
            leaves them out and names them in a warning, `"unchecked"` saves the pass over the images.
        load_options: Passed on to `datasets.load_dataset`, such as `token`, `revision` and `cache_dir`.

    Raises:
        FileNotFoundError: If a path or data set does not exist.
        ValueError: If columns cannot be told, labels are no classes, images are corrupt, or a split would be empty.
    """
    if corrupt not in CORRUPT:
        raise ValueError(f"corrupt={corrupt!r} is unknown: choose one of {', '.join(map(repr, CORRUPT))}.")
    shares = {"validation": validation_share, "test": test_share}
    for split, share in shares.items():
        if not 0 < share < 1:
            raise ValueError(f"{split}_share={share} must lie between 0 and 1.")
    given = {"train": train, "validation": validation, "test": test}
    if (name is None) == (train is None):
        raise ValueError(
            "Say which images to load: either name (a data set or folder), or train (and validation, test)."
        )
    if name is not None:
        splits = _load(name, config, load_options)
    else:
        splits = {split: _only_split(_load(path, None, load_options), path) for split, path in given.items() if path}

    if "train" not in splits:
        raise ValueError(f"{name or train} has the splits {', '.join(splits)}, none of which is 'train'.")
    image_column = image_column or find_image_column(splits["train"])
    label_column = label_column or find_label_column(splits["train"])
    splits = {split: _named_columns(data, split, image_column, label_column) for split, data in splits.items()}
    splits = _class_labels(splits)
    if corrupt != "unchecked":
        splits = {split: _checked_images(data, split, corrupt) for split, data in splits.items()}
    splits = _cut_missing(splits, shares, seed)
    _report_balance(splits)
    return datasets.DatasetDict({split: splits[split] for split in SPLITS})


def load_unlabelled(path: str | os.PathLike[str], split: str = "test") -> datasets.Dataset:
    """Load images without their labels, for prediction: one image file, or any source of `load_images`.

    Args:
        split: The split to take where the source has it; otherwise its first.

    Returns:
        A data set with the column `image`, and `file` with the path or row of each image.

    Raises:
        FileNotFoundError, ValueError: As for `load_images`.
    """
    source = Path(path)
    if source.is_dir() and not _is_saved(source) and not _image_files(source):
        raise ValueError(f"{source} holds no image files: {', '.join(sorted(Image.registered_extensions())[:8])}, ...")
    if source.is_dir() and not _is_saved(source):
        files = _image_files(source)
    elif source.is_file() and source.suffix.lower() not in _FILES:
        files = [source]
    else:
        loaded = _load(path, None, {})
        data = loaded.get(split, next(iter(loaded.values())))
        data = _as_image_column(data.select_columns([find_image_column(data)]), find_image_column(data))
        data = data.rename_columns({data.column_names[0]: "image"})
        return data.add_column("file", [f"row {i}" for i in range(len(data))])
    names = [str(file) for file in files]
    data = datasets.Dataset.from_dict({"image": names, "file": names})
    return data.cast_column("image", datasets.Image(decode=False))


def class_counts(data: datasets.Dataset) -> dict[str, int]:
    """How many images each class has, by label name, classes without any included."""
    counts = Counter(data.with_format(None)["label"][:])
    return {name: counts[index] for index, name in enumerate(data.features["label"].names)}


def _load(name: str | os.PathLike[str], config: str | None, options: dict[str, Any]) -> dict[str, datasets.Dataset]:
    path = Path(name)
    if str(name) == DIGITS:
        return {"train": _digits()}
    loaded: Any
    try:
        if path.is_dir() and _is_saved(path):
            loaded = datasets.load_from_disk(str(path))
        elif path.is_dir() and not any(file.suffix.lower() in _FILES for file in path.rglob("*")):
            # the library drops the label of a folder with a single class unless told not to
            loaded = datasets.load_dataset("imagefolder", data_dir=str(path), drop_labels=False)
        elif path.is_dir():
            loaded = datasets.load_dataset(str(path), config)
        elif path.is_file():
            loaded = _load_file(path)
        elif looks_like_path(str(name)):
            raise FileNotFoundError(f"{name} does not exist: there is no such file or folder of images.")
        else:
            loaded = datasets.load_dataset(str(name), config, **options)
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(f"{name} is neither here nor on the Hub as far as it can be reached: {error}") from None
    except (datasets.exceptions.DatasetGenerationError, datasets.exceptions.DataFilesNotFoundError) as error:
        raise ValueError(f"{name} cannot be read as images: {error.__cause__ or error}") from error
    if isinstance(loaded, datasets.Dataset):
        return {"train": loaded}
    return {_SPLIT_NAMES.get(split, split): data for split, data in loaded.items() if len(data)}


def _load_file(path: Path) -> datasets.DatasetDict:
    kind = _FILES.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path} has a suffix that is not known: pass a folder, or one of {', '.join(_FILES)}.")
    extra = {"sep": "\t"} if path.suffix.lower() == ".tsv" else {}
    loaded = datasets.load_dataset(kind, data_files=str(path), **extra)
    if kind not in ("csv", "json"):
        return loaded
    # paths inside a file are meant relative to it
    column = find_image_column(loaded["train"])
    folder = path.parent.resolve()
    files = [str(folder / str(value)) for value in loaded["train"][column][:]]
    missing = [file for file in files if not Path(file).is_file()]
    if missing:
        raise FileNotFoundError(f"{path} names {len(missing)} images that do not exist, such as {missing[0]}.")
    data = loaded["train"].remove_columns([column]).add_column(column, files)
    return datasets.DatasetDict(train=data.cast_column(column, datasets.Image()))


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


def _image_files(folder: Path) -> list[Path]:
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in suffixes and file.is_file())


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
    texts = [
        name for name, feature in data.features.items() if getattr(feature, "dtype", "") in ("string", "large_string")
    ]
    found = typed or [name for name in texts if name.lower() in _IMAGE_NAMES][:1]
    if len(found) != 1:
        raise ValueError(
            f"The images are in {'one of' if found else 'none of'} the columns {', '.join(found or data.column_names)}: say "
            "which with image_column (--image_column_name)."
        )
    return found[0]


def find_label_column(data: datasets.Dataset) -> str:
    """The column that holds class labels.

    Raises:
        ValueError: If there is none or more than one.
    """
    found = [name for name, feature in data.features.items() if isinstance(feature, datasets.ClassLabel)]
    if len(found) != 1:
        found = [name for name in found or data.column_names if name.lower() in _LABEL_NAMES][:1] or found
    if len(found) != 1:
        raise ValueError(
            f"The labels are in {'one of' if found else 'none of'} the columns {', '.join(found or data.column_names)}: say "
            "which with label_column (--label_column_name)."
        )
    return found[0]


def _as_image_column(data: datasets.Dataset, column: str) -> datasets.Dataset:
    feature = data.features[column]
    if isinstance(feature, datasets.Image):
        return data
    if getattr(feature, "dtype", "") not in ("string", "large_string", "binary", "large_binary"):
        raise ValueError(f"Column {column!r} holds {feature}, not images: say which column does with image_column.")
    return data.cast_column(column, datasets.Image())


def _named_columns(data: datasets.Dataset, split: str, image_column: str, label_column: str) -> datasets.Dataset:
    for column, flag in ((image_column, "image_column"), (label_column, "label_column")):
        if column not in data.column_names and not (column == label_column and split == "test"):
            raise ValueError(
                f"The {split} split has no column {column!r} but {', '.join(data.column_names)}: correct {flag} "
                f"(--{flag}_name)."
            )
    kept = [column for column in (image_column, label_column) if column in data.column_names]
    data = _as_image_column(data.select_columns(kept), image_column)
    renamed = {
        old: new for old, new in ((image_column, "image"), (label_column, "label")) if old in kept and old != new
    }
    return data.rename_columns(renamed) if renamed else data


def _class_labels(splits: dict[str, datasets.Dataset]) -> dict[str, datasets.Dataset]:
    """Give all splits the same `ClassLabel`, and drop a split whose labels are hidden."""
    values: dict[str, list[Any]] = {}
    for split, data in splits.items():
        column = data.with_format(None)["label"][:] if "label" in data.column_names else [None]
        hidden = sum(value is None or value == -1 for value in column)
        if hidden and split == "train":
            raise ValueError(f"{hidden} of {len(column)} training images have no label: remove or label them.")
        if hidden:
            logger.warning("The labels of %d %s images are hidden: that split is not used.", hidden, split)
            continue
        feature = data.features["label"]
        values[split] = [feature.int2str(v) for v in column] if isinstance(feature, datasets.ClassLabel) else column
    first = splits["train"].features["label"]
    if all(splits[split].features["label"] == first for split in values) and isinstance(first, datasets.ClassLabel):
        return {split: splits[split] for split in values}

    known = list(first.names) if isinstance(first, datasets.ClassLabel) else []
    for split, column in values.items():
        odd = next((v for v in column if not isinstance(v, (str, int)) or isinstance(v, bool)), None)
        if odd is not None:
            raise ValueError(
                f"The {split} split has the label {str(odd)[:60]!r}: labels must be names or whole numbers."
            )
        new = set(column) - set(known)
        if new and known and split != "train":
            raise ValueError(
                f"The {split} split has the class {sorted(map(str, new))[0]!r}, which the training images lack."
            )
        known += sorted(new, key=lambda v: (isinstance(v, str), v))
    place = {name: index for index, name in enumerate(known)}
    label = datasets.ClassLabel(names=[str(name) for name in known])
    encoded = {}
    for split, column in values.items():
        data = splits[split].remove_columns(["label"]).add_column("label", [place[v] for v in column])
        encoded[split] = data.cast_column("label", label)
    return encoded


# --- images ------------------------------------------------------------------------------------------------------------


def as_rgb(image: Image.Image) -> Image.Image:
    """Bring any PIL image to upright 8-bit RGB.

    16-bit and 32-bit integers are scaled from 0..65535 if any value is above 255; floats from 0..1 unless a value is
    above 1, then from 0..255. Transparent pixels show white.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image).astype(np.float64)
        top = values.max(initial=0.0)
        full = (1.0 if top <= 1 else 255.0) if image.mode == "F" else (65535.0 if top > 255 else 255.0)
        return Image.fromarray((values * (255 / full)).clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image.convert("RGB")


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
        raise ValueError(f"{path or 'An image'} cannot be decoded ({error}): repair or remove it.") from None
    return image


def _checked_images(data: datasets.Dataset, split: str, corrupt: str) -> datasets.Dataset:
    raw = data.cast_column("image", datasets.Image(decode=False)).select_columns(["image"]).with_format(None)

    def fault(index: int) -> str | None:
        value = raw[index]["image"]
        if value is None:
            return f"row {index} of {split} (no image)"
        try:
            open_image(value)
        except ValueError:
            name = value.get("path")
            return f"{name} (row {index} of {split})" if name else f"row {index} of {split}"
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
    logger.warning("%d of %d %s images cannot be decoded and are left out: %s", len(bad), len(data), split, named)
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
                f"{total} training images are too few to cut a {split} split from: at least one class needs two. Pass one."
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
    processor.size = (
        type(current)(**dict.fromkeys(dict(current), size)) if "height" in current else {"height": size, "width": size}
    )
    if getattr(processor, "crop_size", None):
        processor.crop_size = {"height": size, "width": size}
