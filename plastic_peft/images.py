"""From whatever holds images to model inputs: data sets and tensors by index, loaders and iterables through a buffer."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import DataLoaderAdapter, IterableDatasetShard
from PIL import Image, ImageOps
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler

from .components import as_input, main_input_name
from .processors import ModelProcessor, Processor


Batch = dict[str, torch.Tensor]

_CACHE_BYTES = 2**30
# what a stream is shuffled in: so many images, or fewer if they would fill so much memory
BUFFER_IMAGES = 1000
BUFFER_BYTES = 2**29
_COMPANIONS = ("pixel_attention_mask", "pixel_mask", "spatial_shapes", "bool_masked_pos")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


# --- where images come from -------------------------------------------------------------------------------------------


class Indexed:
    """Images of a data set or tensor, read by index."""

    def __init__(self, data: Any, processor: Processor | None, what: str) -> None:
        self.data, self.processor, self.what = data, processor, what
        self.cache: dict[int, Batch] | None = None
        self.cached_bytes = 0

    def __len__(self) -> int:
        return len(self.data)

    def first(self, count: int) -> list[int]:
        """References to the first images, for `take`."""
        return list(range(min(count, len(self))))

    def shuffled(self, generator: torch.Generator) -> Iterator[int]:
        """References to all images once, in random order."""
        return iter(torch.randperm(len(self), generator=generator, device="cpu").tolist())

    def endlessly(self, generator: torch.Generator) -> Iterator[int]:
        if len(self) <= BUFFER_IMAGES:
            self.cache = {}
        while True:
            yield from self.shuffled(generator)

    def take(self, indices: Sequence[int], pool: concurrent.futures.Executor) -> Batch:
        if isinstance(self.data, torch.Tensor) and self.data.is_floating_point():
            return {"pixel_values": self.data[torch.as_tensor(indices, device=self.data.device)]}
        return _stack(list(pool.map(self._one, indices)), self.what)

    def _one(self, index: int) -> Batch:
        if self.cache is not None and index in self.cache:
            return self.cache[index]
        image = _row_to_inputs(self.data[int(index)], self.processor, self.what)
        if self.cache is not None and self.cached_bytes < _CACHE_BYTES:
            self.cached_bytes += sum(t.nbytes for t in image.values())
            self.cache[index] = image
        return image

    def digest(self) -> str:
        """What two processes compare to see whether they hold the same images."""
        # data sets may augment at random, so only what lies in memory is compared by content
        in_memory = isinstance(self.data, (torch.Tensor, np.ndarray, list))
        return _digest([self.data[i] for i in self.first(8)] if in_memory else [], len(self))


class Stream:
    """Images of a loader or iterable, one by one; a reference for `take` is the image itself, not yet decoded."""

    def __init__(self, data: Iterable[Any], processor: Processor | None, what: str) -> None:
        self.processor, self.what = processor, what
        self.buffer: collections.deque[Any] = collections.deque()
        self._ended: bool | None = None
        self._rest = self._read(data)

    @staticmethod
    def _read(data: Iterable[Any]) -> Iterator[Any]:
        # a copy, as one image of a loader's batch would keep the whole batch in memory
        for item in data:
            yield from map(_copied, _rows(item))

    def ends_in_buffer(self) -> bool:
        """Fill the buffer; is that the whole stream?"""
        if self._ended is None:
            size = 0
            for row in self._rest:
                self.buffer.append(row)
                size += _nbytes(row)
                if len(self.buffer) > BUFFER_IMAGES or size > BUFFER_BYTES:
                    self._ended = False
                    return False
            self._ended = True
        return self._ended

    def __iter__(self) -> Iterator[Any]:
        while self.buffer:
            yield self.buffer.popleft()
        yield from self._rest

    def first(self, count: int) -> list[Any]:
        return list(itertools.islice(self.buffer, count))

    def shuffled(self, generator: torch.Generator) -> Iterator[Any]:
        return through_buffer(iter(self), len(self.buffer), generator)

    def take(self, rows: Sequence[Any], pool: concurrent.futures.Executor) -> Batch:
        decode = functools.partial(_row_to_inputs, processor=self.processor, what=self.what)
        return _stack(list(pool.map(decode, rows)), self.what)

    def digest(self) -> str:
        return _digest(self.first(8), None)


class _Collated:
    """The data set of a loader, read one image at a time as the loader's `collate_fn` hands it on."""

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any], indices: Sequence[int]) -> None:
        self.dataset, self.collate, self.indices = dataset, collate, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return next(_rows(self.collate([self.dataset[self.indices[index]]])))


def _unprepared(loader: Any) -> _Collated | DataLoader[Any]:
    """The images of a loader from `accelerator.prepare`, whole, since it would give each process its own ones."""
    dataset = loader.dataset
    if isinstance(dataset, IterableDatasetShard):
        dataset = dataset.dataset
    if isinstance(dataset, IterableDataset):
        return DataLoader(
            dataset, batch_size=loader.batch_size, collate_fn=loader.collate_fn, num_workers=loader.num_workers
        )
    sampler: Any = loader.batch_sampler
    while hasattr(sampler, "batch_sampler"):
        sampler = sampler.batch_sampler
    sampler = getattr(sampler, "sampler", None)
    everything = sampler is None or isinstance(sampler, (SequentialSampler, RandomSampler))
    indices = range(len(dataset)) if everything else sorted(set(sampler))
    return _Collated(dataset, loader.collate_fn, indices)


def as_images(data: Any, processor: Processor | None, what: str) -> Indexed | Stream:
    """Read `data` by index where it can be, else in order.

    Args:
        data: A data set, loader, iterable, tensor, array, list of images or batches, or one batch.
        processor: Turns raw images into inputs; `None` if there is none.
        what: What errors call the data.

    Raises:
        TypeError: If it is none of these.
        ValueError: If it is empty or a tensor of the wrong rank.
    """
    if isinstance(data, (Indexed, Stream)):
        return data
    if isinstance(data, DataLoaderAdapter):
        data = _unprepared(data)
    if isinstance(data, (torch.Tensor, np.ndarray)) and data.dtype != object and data.ndim < 3:
        raise ValueError(
            f"{what} is a tensor of shape {tuple(data.shape)}: pass images as (n, channels, height, width)."
        )
    if isinstance(data, Mapping) and _image_key(data) is not None:
        data = list(_rows(data))
    elif isinstance(data, (list, tuple)):
        data = _flat(data)
    indexed = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    if indexed and not isinstance(data, (Mapping, str, IterableDataset)):
        if len(data) == 0:
            raise ValueError(f"{what} holds no images: pass at least one.")
        return Indexed(data, processor, what)
    if isinstance(data, Iterable) and not isinstance(data, (Mapping, str)):
        return Stream(data, processor, what)
    keys = f" with the keys {', '.join(map(repr, data))}" if isinstance(data, Mapping) else ""
    raise TypeError(
        f"{what} is a {type(data).__name__}{keys}: pass a datasets.Dataset (one split), a DataLoader, an iterable of "
        "batches, one batch, or one tensor of images."
    )


def opened(data: Any, processor: Processor | None, what: str) -> Indexed | Stream:
    """`as_images` with the buffer filled; a stream that ends in it is a set like any other, read by index."""
    images = as_images(data, processor, what)
    if isinstance(images, Indexed) or not images.ends_in_buffer():
        return images
    if not images.buffer:
        raise ValueError(f"{what} holds no images: the loader is empty.")
    return Indexed(list(images.buffer), processor, what)


def through_buffer(items: Iterator[Any], size: int, generator: torch.Generator) -> Iterator[Any]:
    """The items in random order, as far as a buffer of `size` allows."""
    buffer = list(itertools.islice(items, size))
    for item in items:
        place = int(torch.randint(size, (), generator=generator, device="cpu"))
        yield buffer[place]
        buffer[place] = item
    yield from (buffer[place] for place in torch.randperm(len(buffer), generator=generator, device="cpu").tolist())


# --- what images look like --------------------------------------------------------------------------------------------


def _is_array(value: Any) -> bool:
    return isinstance(value, (torch.Tensor, np.ndarray))


def _is_raw(value: Any) -> bool:
    """Is it an image as a file holds it, which a processor has yet to scale and normalise?"""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return bool(value.dtype == (torch.uint8 if isinstance(value, torch.Tensor) else np.uint8))
    return isinstance(value, Image.Image)


def _is_float(array: Any) -> bool:
    return array.is_floating_point() if isinstance(array, torch.Tensor) else np.issubdtype(array.dtype, np.floating)


def _holds_images(value: Any) -> bool:
    if isinstance(value, Image.Image):
        return True
    if _is_array(value):
        return value.ndim >= 3 and (_is_float(value) or _is_raw(value))
    if isinstance(value, Mapping):
        return _image_key(value) is not None
    return isinstance(value, (list, tuple)) and any(map(_holds_images, value))


def _image_key(row: Mapping[str, Any]) -> str | None:
    """The column with the images of a row or batch, `None` if none has any."""
    if "pixel_values" in row:
        return "pixel_values"
    # `with_format("numpy")` gives grey images as (height, width)
    if "image" in row and (_holds_images(row["image"]) or (_is_raw(row["image"]) and row["image"].ndim == 2)):
        return "image"
    return next((key for key, value in row.items() if _holds_images(value)), None)


def _rank(value: Any) -> int:
    """Number of dimensions of an array or of nested lists."""
    if _is_array(value):
        return int(value.ndim)
    return 1 + _rank(value[0]) if isinstance(value, (list, tuple)) and value else 0


def _is_batch(item: Mapping[str, Any], key: str) -> bool:
    if isinstance(item[key], (list, tuple)) and _holds_images(item[key]):
        return True
    if "spatial_shapes" in item:
        return _rank(item["spatial_shapes"]) == 2
    return _rank(item[key]) >= 4


def _rows(item: Any) -> Iterator[Any]:
    """The single images in what a stream yields: an image, a batch, images with labels in any order, lists of these."""
    if isinstance(item, Mapping) and (key := _image_key(item)) is not None and _is_batch(item, key):
        columns = [name for name in (key, *_COMPANIONS) if name in item]
        for index in range(len(item[key])):
            yield {name: item[name][index] for name in columns}
    elif _is_array(item) and item.ndim >= 4:
        yield from item
    elif isinstance(item, (list, tuple)) and (holding := [part for part in item if _holds_images(part)]):
        for part in holding if len(holding) == len(item) else holding[:1]:
            yield from _rows(part)
    else:
        yield item


def _flat(items: Sequence[Any]) -> list[Any]:
    """The single images of a list of images or batches, or of one (images, labels) batch."""
    holding = [item for item in items if _holds_images(item)]
    if len(holding) == 1 < len(items):
        return list(_rows(holding[0]))
    return [row for item in items for row in _rows(item)]


def _copied(row: Any) -> Any:
    if isinstance(row, torch.Tensor):
        return row.detach().to("cpu", copy=True)
    if isinstance(row, np.ndarray):
        return row.copy()
    if isinstance(row, Mapping):
        return {key: _copied(value) for key, value in row.items()}
    if isinstance(row, Image.Image):
        # an image that is not yet decoded keeps its file open, and there may be fewer files than images in a buffer
        row.load()
    return [_copied(value) for value in row] if isinstance(row, (list, tuple)) else row


def _nbytes(row: Any) -> int:
    if _is_array(row):
        return int(row.nbytes)
    if isinstance(row, Image.Image):
        return row.width * row.height * len(row.getbands())
    parts = row.values() if isinstance(row, Mapping) else row if isinstance(row, list) else ()
    return sum(map(_nbytes, parts))


def _digest(rows: list[Any], length: int | None) -> str:
    content = hashlib.sha256(repr(length).encode())
    for row in rows:
        value = _image_of(_without_labels(row))
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu().double().numpy()
        content.update(value.tobytes() if isinstance(value, (np.ndarray, Image.Image)) else repr(value).encode())
    return content.hexdigest()


def _without_labels(row: Any) -> Any:
    """What holds the image in a row of a data set that may be a tuple of an image and labels, in any order."""
    if isinstance(row, (list, tuple)) and row:
        return next((value for value in row if _holds_images(value)), row[0])
    return row


def _image_of(row: Any) -> Any:
    """The image in a row without labels, `None` if its columns hold none."""
    if not isinstance(row, Mapping):
        return row
    key = _image_key(row)
    return None if key is None else row[key]


def _row_to_inputs(row: Any, processor: Processor | None, what: str) -> Batch:
    """Model inputs of one image, from one row of a data set: an image, a dict, or a tuple of one of these and labels.

    Raises:
        ValueError: If the row holds no image, raw images have no processor, or pixels are integers.
    """
    row = _without_labels(row)
    image = _image_of(row)
    if isinstance(row, Mapping) and image is None:
        raise ValueError(
            f"{what} has the columns {', '.join(map(repr, row))}, of which none holds images: name an image column "
            "'image' (cast_column('image', datasets.Image())) or give ready 'pixel_values'."
        )
    ready = isinstance(row, Mapping) and "pixel_values" in row
    if isinstance(image, Image.Image) or (_is_raw(image) and not ready):
        return _processed(_as_picture(image, what), processor, what)
    if not (_is_array(image) or (ready and isinstance(image, (list, tuple)))):
        raise ValueError(f"{what} yields {type(image).__name__} objects: images must be tensors, arrays or PIL images.")
    pixels = _as_tensor(image)
    if not pixels.is_floating_point():
        raise ValueError(
            f"{what} holds pixel values of {pixels.dtype}: scale and normalise them to floats as the model's image "
            "processor does, or pass raw images (uint8, in a column 'image') with an image processor."
        )
    companions = {key: _as_tensor(row[key]) for key in _COMPANIONS if key in row} if isinstance(row, Mapping) else {}
    return {"pixel_values": pixels, **companions}


def _as_tensor(value: Any) -> torch.Tensor:
    # arrays of data sets are often read-only, which tensors cannot be
    return torch.tensor(value) if isinstance(value, np.ndarray) else torch.as_tensor(value)


def _as_picture(image: Any, what: str) -> Image.Image:
    """A PIL image from one as files hold it; where both are possible, tensors have channels first and arrays last."""
    if isinstance(image, Image.Image):
        return image
    array = np.asarray(image.cpu() if isinstance(image, torch.Tensor) else image)
    if array.ndim == 2:
        return Image.fromarray(array)
    axes = [axis for axis in (0, -1) if array.ndim == 3 and array.shape[axis] in _MODES]
    if not axes:
        raise ValueError(
            f"{what} holds uint8 images of shape {array.shape}: the first or last dimension must be 1, 3 or 4 channels."
        )
    array = np.moveaxis(array, axes[0] if isinstance(image, torch.Tensor) else axes[-1], -1)
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[-1] == 1 else array))


def as_rgb(image: Image.Image) -> Image.Image:
    """Bring any PIL image to upright 8-bit RGB.

    Integers of more than 8 bits (modes `I;16` and `I`) are scaled from 0..65535 and floats (mode `F`) from 0..1,
    whatever values an image has: scaled by its own, dark and bright images would look alike. Transparent pixels show
    white.

    Raises:
        ValueError: If such integers or floats lie outside their range.
    """
    name = getattr(image, "filename", "") or "An image"
    # which PIL refuses in nearly any way where it is broken, though the image is whole
    with contextlib.suppress(Exception):
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        try:
            return _deep_as_rgb(image)
        except ValueError as error:
            raise ValueError(
                f"{name} cannot be converted to 8 bits ({error}): scale its values to that range, or save it with 8 "
                "bits."
            ) from error
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image.convert("RGB")


def _deep_as_rgb(image: Image.Image) -> Image.Image:
    values, white = np.asarray(image).astype(np.float64), 1 if image.mode == "F" else 65535
    # not-a-number is outside too
    if not ((values >= 0) & (values <= white)).all():
        found = f"{values.min():g} to {values.max():g}"
        raise ValueError(f"values from {found}, where mode {image.mode} goes from 0 to {white}")
    return Image.fromarray((values * (255 / white)).round().astype(np.uint8)).convert("RGB")


def _processed(picture: Image.Image, processor: Processor | None, what: str) -> Batch:
    channels = 3
    if isinstance(processor, ModelProcessor):
        channels, processor = processor.channels, processor.processor
    if processor is None:
        raise ValueError(
            f"{what} holds raw images, and the model names no saved image processor: pass image_processor=..., or "
            "ready pixel_values (scaled and normalised floats)."
        )
    image: Any = picture.convert("RGBA") if channels == 4 else as_rgb(picture)
    if channels == 1:
        # not every processor finds the channels of an image that has no dimension for them
        image = np.asarray(image.convert("L"))[..., None]
    processed = processor(images=[image], return_tensors="pt")
    return {key: tensor[0] for key, tensor in processed.items() if isinstance(tensor, torch.Tensor)}


def _stack(images: list[Batch], what: str) -> Batch:
    try:
        return {key: torch.stack([image[key] for image in images]) for key in images[0]}
    except (RuntimeError, KeyError):
        shapes = sorted({tuple(next(iter(image.values())).shape) for image in images})
        raise ValueError(
            f"{what} holds images of unequal shapes {shapes[:4]}: resize them to the model's input size."
        ) from None


def model_inputs(model: nn.Module, batch: Batch) -> Batch | tuple[torch.Tensor, ...]:
    """Keywords for a transformers model, or the pixels alone for any other module, where and as the model takes them."""
    batch = {key: as_input(model, value) for key, value in batch.items()}
    name = main_input_name(model)
    if name is None:
        return (batch.get("pixel_values", next(iter(batch.values()))),)
    if name not in batch and "pixel_values" in batch:
        batch = {**{k: v for k, v in batch.items() if k != "pixel_values"}, name: batch["pixel_values"]}
    return {key: value for key, value in batch.items() if key not in ("labels", "label")}
