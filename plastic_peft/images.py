"""From whatever holds images to batches of pairs, the same pairs on any number of processes.

Data sets and tensors are read by index, loaders and iterables in their own order. Images are decoded in threads ahead of
the model, and no image twice.
"""

from __future__ import annotations

import collections
import concurrent.futures
import inspect
import itertools
import math
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from .embedded import located


Batch = dict[str, torch.Tensor]
Processor = Callable[..., Any]

_CACHE_BYTES = 2**30


@dataclass
class PairBatch:
    """One process's share of a batch of pairs.

    Attributes:
        inputs: Model inputs of 2n images: n sources, then their n targets.
        weights: (n,) 1.0 for a pair that counts, 0.0 for one that only fills the share up.
        first, last: Place of the whole batch (over all processes) in the sequence of pairs, `last` excluded.
    """

    inputs: Batch
    weights: torch.Tensor
    first: int
    last: int


def find_processor(model: nn.Module) -> Processor | None:
    """The image processor saved with the model, `None` if the model does not come from a saved one."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or ""
    if not name:
        return None
    from transformers import AutoImageProcessor

    try:
        processor: Processor = AutoImageProcessor.from_pretrained(located(name))
    except (OSError, ValueError):
        return None
    return processor


def output_size(processor: Any) -> tuple[int, int]:
    """(width, height) of the images that an image processor puts out.

    Raises:
        ValueError: If it does not say.
    """
    crop = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
    size = crop or getattr(processor, "size", None) or {}
    if "height" in size:
        return size["width"], size["height"]
    if "shortest_edge" in size:
        return size["shortest_edge"], size["shortest_edge"]
    raise ValueError(f"{type(processor).__name__} states no output size: use augment='flip' or 'none'.")


def accept_image_size(model: nn.Module, size: int) -> None:
    """Let a model take square images of another size than it was pretrained on, by interpolating its position embeddings.

    The weights stay as they are: a hook asks for the interpolation in every forward pass, so an adapter trained this way
    belongs to the unchanged base model.

    Raises:
        ValueError: If the model cannot interpolate.
    """
    if size == getattr(getattr(model, "config", None), "image_size", None):
        return
    if "interpolate_pos_encoding" not in inspect.signature(model.forward).parameters:
        raise ValueError(
            f"{type(model).__name__} takes images of {getattr(cast(Any, model).config, 'image_size', '?')} pixels and cannot "
            f"interpolate its position embeddings to {size}: leave --image_size out."
        )
    model.register_forward_pre_hook(_ask_for_interpolation, with_kwargs=True)


def _ask_for_interpolation(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "interpolate_pos_encoding": True}


class Indexed:
    """Images of a data set or tensor, read by index."""

    def __init__(self, data: Any, processor: Processor | None, what: str) -> None:
        self.data, self.processor, self.what = data, processor, what
        self.cache: dict[int, Batch] | None = None
        self.cached_bytes = 0

    def __len__(self) -> int:
        return len(self.data)

    def take(self, indices: Sequence[int], pool: concurrent.futures.Executor) -> Batch:
        if isinstance(self.data, torch.Tensor):
            return {"pixel_values": self.data[torch.as_tensor(indices)]}
        return _stack(list(pool.map(self._one, indices)), self.what)

    def _one(self, index: int) -> Batch:
        if self.cache is not None and index in self.cache:
            return self.cache[index]
        image = _row_to_inputs(self.data[int(index)], self.processor, self.what)
        if self.cache is not None and self.cached_bytes < _CACHE_BYTES:
            self.cached_bytes += sum(t.nbytes for t in image.values())
            self.cache[index] = image
        return image


class Stream:
    """Images of a loader or iterable, in its own order."""

    def __init__(self, data: Iterable[Any], processor: Processor | None, what: str) -> None:
        self.what = what
        self.images = self._images(data, processor)

    def _images(self, data: Iterable[Any], processor: Processor | None) -> Iterator[Batch]:
        for item in data:
            batch = item
            if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], torch.Tensor):
                batch = batch[0]
            if isinstance(batch, torch.Tensor):
                batch = {"pixel_values": batch if batch.ndim == 4 else batch[None]}
            if isinstance(batch, Mapping) and any(isinstance(v, torch.Tensor) and v.ndim >= 3 for v in batch.values()):
                tensors = {
                    k: v for k, v in batch.items() if isinstance(v, torch.Tensor) and k not in ("labels", "label")
                }
                if (
                    tensors.get("pixel_values", next(iter(tensors.values()))).ndim == 3
                    and "spatial_shapes" not in tensors
                ):
                    tensors = {k: v[None] for k, v in tensors.items()}
                for index in range(len(next(iter(tensors.values())))):
                    yield {k: v[index] for k, v in tensors.items()}
            else:
                yield _row_to_inputs(item, processor, self.what)

    def take_next(self, count: int) -> list[Batch]:
        return list(itertools.islice(self.images, count))


def as_images(data: Any, processor: Processor | None, what: str) -> Indexed | Stream:
    """Read `data` by index where it can be, else in order.

    Raises:
        TypeError: If it is none of a data set, loader, iterable or tensor.
        ValueError: If it is empty or a tensor of the wrong rank.
    """
    if isinstance(data, torch.Tensor):
        if data.ndim < 3:
            raise ValueError(
                f"{what} is a tensor of shape {tuple(data.shape)}: pass images as (n, channels, height, width)."
            )
        if len(data) == 0:
            raise ValueError(f"{what} holds no images: pass at least one.")
        return Indexed(data, processor, what)
    indexed = hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, (Mapping, str))
    batches = isinstance(data, (list, tuple)) and len(data) > 0 and _is_batch(data[0])
    if indexed and not batches:
        if len(data) == 0:
            raise ValueError(f"{what} holds no images: pass a data set with at least one.")
        return Indexed(data, processor, what)
    if isinstance(data, Iterable) and not isinstance(data, (Mapping, str)):
        return Stream(data, processor, what)
    raise TypeError(
        f"{what} is a {type(data).__name__}: pass a datasets.Dataset, a DataLoader, an iterable of batches, or one tensor of images."
    )


def _is_batch(item: Any) -> bool:
    if isinstance(item, (tuple, list)) and item:
        item = item[0]
    if isinstance(item, Mapping):
        item = item.get("pixel_values", item)
    return isinstance(item, torch.Tensor) and item.ndim == 4


def _row_to_inputs(row: Any, processor: Processor | None, what: str) -> Batch:
    """Model inputs of one image, from one row of a data set: a dict, an (image, label) tuple, or an image."""
    value = row
    if isinstance(row, Mapping):
        if "pixel_values" in row:
            ready = {
                k: torch.as_tensor(v)
                for k, v in row.items()
                if k in ("pixel_values", "pixel_attention_mask", "spatial_shapes")
            }
            return ready
        pictures = [v for v in row.values() if hasattr(v, "convert") and hasattr(v, "size")]
        if not pictures:
            raise ValueError(
                f"{what} has the columns {', '.join(map(repr, row))}, of which none holds images: name an image column "
                "'image' (cast_column('image', datasets.Image())) or give ready 'pixel_values'."
            )
        value = pictures[0]
    elif isinstance(row, (tuple, list)) and row:
        value = row[0]
    if isinstance(value, torch.Tensor):
        return {"pixel_values": value}
    if not hasattr(value, "convert"):
        raise ValueError(f"{what} yields {type(value).__name__} objects: images must be tensors or PIL images.")
    if processor is None:
        raise ValueError(
            f"{what} holds raw images, and the model names no saved image processor: pass image_processor=..., or ready pixel_values."
        )
    processed = processor(images=[value.convert("RGB")], return_tensors="pt")
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
    """Keywords for a transformers model, or the pixels alone for any other module."""
    name = getattr(model, "main_input_name", None)
    if not (isinstance(name, str) and hasattr(model, "config")):
        return (batch.get("pixel_values", next(iter(batch.values()))),)
    if name not in batch and "pixel_values" in batch:
        batch = {**{k: v for k, v in batch.items() if k != "pixel_values"}, name: batch["pixel_values"]}
    return {key: value for key, value in batch.items() if key not in ("labels", "label")}


def first_pair(target: Any, source: Any, processor: Processor | None) -> tuple[Batch, Any, Any]:
    """Two images to trace the model with, the same on every process, and the data still whole."""
    images = as_images(target, processor, "target")
    if isinstance(images, Indexed):
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            return images.take([0, min(1, len(images) - 1)], pool), target, source
    head = images.take_next(2)
    if not head:
        raise ValueError("target holds no images: the loader is empty.")
    rest: Iterable[Any] = itertools.chain(head, images.images)
    return _stack(head, "target"), rest, source


def most_pairs(target: Any, source: Any, limit: int) -> int:
    """How many pairs there can be, at most `limit`, which a stream of unknown length gets."""
    images = [as_images(data, None, "data") for data in (target, source) if data is not None]
    if any(isinstance(data, Stream) for data in images):
        return limit
    lengths = [len(data) for data in images if isinstance(data, Indexed)]
    return min(limit, max(lengths) if len(lengths) > 1 else lengths[0] // 2)


def pair_batches(
    target: Any,
    source: Any,
    processor: Processor | None,
    *,
    batch_size: int,
    max_pairs: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
) -> Generator[PairBatch, None, None]:
    """Yield this process's share of every batch of pairs.

    The pairs are (source[i], target[i]), in a seeded random order where both can be read by index; the shorter set
    starts again when it ends. Without a source, a random order of the target is cut into pairs. Neither the pairs nor
    their grouping into batches of `batch_size` depend on `world`.
    """
    targets = as_images(target, processor, "target")
    sources = None if source is None else as_images(source, processor, "source")
    workers = max(2, min(8, os.cpu_count() or 2))
    with concurrent.futures.ThreadPoolExecutor(workers) as pool, concurrent.futures.ThreadPoolExecutor(1) as ahead:
        if isinstance(targets, Indexed) and not isinstance(sources, Stream):
            plan = _indexed_shares(targets, sources, pool, batch_size, max_pairs, seed, rank, world)
        else:
            plan = _streamed_shares(targets, sources, pool, batch_size, max_pairs, rank, world)
        waiting: collections.deque[concurrent.futures.Future[PairBatch | None]] = collections.deque()
        for _ in range(2):
            waiting.append(ahead.submit(next, plan, None))
        try:
            while (batch := waiting.popleft().result()) is not None:
                waiting.append(ahead.submit(next, plan, None))
                yield batch
        finally:
            for future in waiting:
                future.cancel()


def _share(size: int, rank: int, world: int) -> tuple[list[int], list[float]]:
    """Positions of a batch that a process takes, and their weights.

    Position i of the first half goes with position i + half: the two give the source-source and target-target rates, so
    they stay on one process. Every process gets equally many, since sharded models must run in step.
    """
    half = math.ceil(size / 2)
    count = math.ceil(half / world)
    firsts = [rank * count + i for i in range(count)]
    wanted = [p if p < half else size for p in firsts] + [half + p if p < half else size for p in firsts]
    return [p if p < size else 0 for p in wanted], [float(p < size) for p in wanted]


def _indexed_shares(
    targets: Indexed,
    sources: Indexed | None,
    pool: concurrent.futures.Executor,
    batch_size: int,
    max_pairs: int,
    seed: int,
    rank: int,
    world: int,
) -> Iterator[PairBatch]:
    generator = torch.Generator().manual_seed(seed)
    n = len(targets)
    if sources is None:
        if n < 2:
            raise ValueError("target holds one image, which makes no pair: pass at least two, or a source.")
        order = torch.randperm(n, generator=generator).tolist()
        pairs = [(order[i], order[i + 1]) for i in range(0, n - 1, 2)]
        sources = targets
    else:
        m = len(sources)
        if m != n:
            (sources if m < n else targets).cache = {}
        pairs = [(i % m, i % n) for i in torch.randperm(max(m, n), generator=generator).tolist()]
    pairs = pairs[:max_pairs]
    for first in range(0, len(pairs), batch_size):
        whole = pairs[first : first + batch_size]
        positions, weights = _share(len(whole), rank, world)
        left = sources.take([whole[p][0] for p in positions], pool)
        right = targets.take([whole[p][1] for p in positions], pool)
        yield PairBatch(_join(left, right), torch.tensor(weights), first, first + len(whole))


def _streamed_shares(
    targets: Indexed | Stream,
    sources: Indexed | Stream | None,
    pool: concurrent.futures.Executor,
    batch_size: int,
    max_pairs: int,
    rank: int,
    world: int,
) -> Iterator[PairBatch]:
    first = 0

    def following(images: Indexed | Stream, count: int, start: int) -> list[Batch]:
        if isinstance(images, Stream):
            return images.take_next(count)
        indices = range(start, min(start + count, len(images)))
        taken = images.take(indices, pool) if indices else {}
        return [{key: value[i] for key, value in taken.items()} for i in range(len(indices))]

    while first < max_pairs:
        size = min(batch_size, max_pairs - first)
        if sources is None:
            both = following(targets, 2 * size, 0)
            lefts, rights = both[: len(both) // 2 * 2 : 2], both[1::2]
        else:
            lefts, rights = following(sources, size, first), following(targets, size, first)
        size = min(len(lefts), len(rights))
        if size == 0:
            return
        positions, weights = _share(size, rank, world)
        left = _stack([lefts[p] for p in positions], "source" if sources is not None else "target")
        right = _stack([rights[p] for p in positions], "target")
        yield PairBatch(_join(left, right), torch.tensor(weights), first, first + size)
        first += size


def _join(left: Batch, right: Batch) -> Batch:
    shapes = {key: (tuple(left[key].shape[1:]), tuple(right[key].shape[1:])) for key in right if key in left}
    for key, (a, b) in shapes.items():
        if a != b:
            raise ValueError(f"A source image has {key} of shape {a} and a target image {b}: bring both to one size.")
    return {key: torch.cat([left[key], right[key].to(left[key].dtype)]) for key in shapes}
