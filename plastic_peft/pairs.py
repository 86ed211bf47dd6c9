"""From source and target images to batches of pairs, the same pairs on any number of processes.

Images are decoded in threads ahead of the model, each process its own share.
"""

from __future__ import annotations

import collections
import concurrent.futures
import itertools
import math
import os
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .images import Batch, Indexed, Stream, as_images, opened, through_buffer
from .processors import Processor


# from here on, repeated images make intervals too narrow to pass over it
_WORTH_A_NOTE = 2


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


def first_pair(target: Any, source: Any, processor: Processor | None) -> tuple[Batch, Any, Any]:
    """Two images to trace the model with, the same on every process, and both sets, opened and still whole."""
    targets = opened(target, processor, "target")
    sources = None if source is None else opened(source, processor, "source")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return targets.take((targets.first(2) * 2)[:2], pool), targets, sources


def most_pairs(target: Any, source: Any, limit: int) -> int:
    """How many pairs there can be, at most `limit`, which a stream of unknown length gets."""
    images = [as_images(data, None, "data") for data in (target, source) if data is not None]
    lengths = [len(data) for data in images if isinstance(data, Indexed)]
    if len(lengths) < len(images):
        return limit
    return min(limit, max(lengths) if len(lengths) > 1 else lengths[0] // 2)


def repetition_notes(target: Any, source: Any, pairs: int) -> list[str]:
    """What a report should say about sets so much smaller than the number of pairs that their images repeat.

    Args:
        target, source: The sets as `first_pair` returns them, `source` maybe `None`.
        pairs: Pairs measured.
    """
    if source is None:
        return []
    sets = [images for images in (target, source) if isinstance(images, Indexed)]
    return [
        f"{images.what} has {len(images)} images for {pairs} pairs, so each is in about {pairs / len(images):.0f} of "
        "them; the intervals count these as independent and are too narrow: they hold for these images rather than for "
        "others like them."
        for images in sets
        if pairs >= _WORTH_A_NOTE * len(images)
    ]


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

    Where both sets can be read by index, the pairs are (source[i], target[i]) in a seeded random order; the shorter set
    starts again when it ends. Without a source, a random order of the target is cut into pairs. A loader or iterable
    that ends within 1000 images (512 MiB if these are larger) is read into memory and counts as read by index.

    A longer stream passes through a seeded shuffle buffer of that size, as in `datasets.IterableDataset.shuffle`, which
    is filled before the first pair: an image drawn from the buffer at random makes room for the stream's next. This
    mixes images that lie no further apart than the buffer is long. It cannot bring forward what comes later, so a
    measurement that stops early has seen only the beginning of the stream, of one sorted by class only the first
    classes: shuffle such data where they are stored, or pass a data set. Two such streams keep their pairs
    (source[i], target[i]) and end with the shorter one; a set read by index beside such a stream is drawn in random
    order, again and again.

    Images that repeat count as new ones in the intervals; `repetition_notes` says where that matters. Neither the pairs
    nor their grouping into batches of `batch_size` depend on `world`.

    Raises:
        ValueError: If there are no images, they do not fit together, or the processes see different ones.
    """
    targets = opened(target, processor, "target")
    sources = None if source is None else opened(source, processor, "source")
    if world > 1:
        _refuse_unequal(targets, sources)
    workers = max(2, min(8, os.cpu_count() or 2))
    with concurrent.futures.ThreadPoolExecutor(workers) as pool, concurrent.futures.ThreadPoolExecutor(1) as ahead:
        pairs = itertools.islice(_pairs(targets, sources, torch.Generator().manual_seed(seed)), max_pairs)
        plan = _shares(pairs, targets if sources is None else sources, targets, pool, batch_size, rank, world)
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


def _refuse_unequal(targets: Indexed | Stream, sources: Indexed | Stream | None) -> None:
    """Raise on every process if any two of them see different images, since each takes its share of the same ones."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    from accelerate.utils import gather_object

    for images in (targets, sources):
        if images is not None and len(set(gather_object([images.digest()]))) > 1:
            raise ValueError(
                f"The processes see different {images.what} images, but each takes its share of the same ones: pass "
                "the data set, or a loader that gives every process the same images in the same order (not sharded, and "
                "unshuffled or seeded alike)."
            )


def _pairs(
    targets: Indexed | Stream, sources: Indexed | Stream | None, generator: torch.Generator
) -> Iterator[tuple[Any, Any]]:
    """References to the source and target images of all pairs, in order."""
    if sources is None:
        if isinstance(targets, Indexed) and len(targets) < 2:
            raise ValueError("target holds one image, which makes no pair: pass at least two, or a source.")
        order = targets.shuffled(generator)
        return zip(order, order, strict=False)
    if isinstance(sources, Indexed) and isinstance(targets, Indexed):
        m, n = len(sources), len(targets)
        if m != n:
            (sources if m < n else targets).cache = {}
        return ((i % m, i % n) for i in torch.randperm(max(m, n), generator=generator, device="cpu").tolist())
    if isinstance(sources, Stream) and isinstance(targets, Stream):
        size = min(len(sources.buffer), len(targets.buffer))
        return through_buffer(zip(sources, targets, strict=False), size, generator)
    left, right = (
        images.shuffled(generator) if isinstance(images, Stream) else images.endlessly(generator)
        for images in (sources, targets)
    )
    return zip(left, right, strict=False)


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


def _shares(
    pairs: Iterator[tuple[Any, Any]],
    sources: Indexed | Stream,
    targets: Indexed | Stream,
    pool: concurrent.futures.Executor,
    batch_size: int,
    rank: int,
    world: int,
) -> Iterator[PairBatch]:
    first = 0
    while whole := list(itertools.islice(pairs, batch_size)):
        positions, weights = _share(len(whole), rank, world)
        left = sources.take([whole[p][0] for p in positions], pool)
        right = targets.take([whole[p][1] for p in positions], pool)
        yield PairBatch(_join(left, right), torch.tensor(weights, device="cpu"), first, first + len(whole))
        first += len(whole)


def _join(left: Batch, right: Batch) -> Batch:
    shapes = {key: (tuple(left[key].shape[1:]), tuple(right[key].shape[1:])) for key in right if key in left}
    for key, (a, b) in shapes.items():
        if a != b:
            raise ValueError(f"A source image has {key} of shape {a} and a target image {b}: bring both to one size.")
    return {key: torch.cat([left[key], right[key].to(left[key])]) for key in shapes}
