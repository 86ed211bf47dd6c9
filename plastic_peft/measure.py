"""The measurement: rates of change of all components from plain forward passes.

Source: arXiv 2602.06883, the average rate of change E[||f(x) - f(y)|| / ||x - y||]. Hooks note one distance per pair and
module; the activations themselves are never kept.

Intervals are Student t intervals of the mean rate over pairs. The measurement looks at them each time that the pairs have
grown by a quarter, and may stop at any look, so the k-th look spends only 1 / (k (k + 1)) of the error probability: over all
looks these shares add up to the whole, and the stated confidence holds at whichever look it stops. The interval of `shift`
takes the bad ends of both of its rates, each at half the error probability.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import platform
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from tqdm.auto import tqdm

from .components import (
    Component,
    NotFiniteError,
    Structure,
    UnknownStructureError,
    call,
    entry,
    first_tensor,
    kind_of,
    named_leaves,
    per_image,
    quiet,
    synthetic_images,
    trace,
    unwrap,
)
from .images import model_inputs
from .pairs import PairBatch, first_pair, most_pairs, pair_batches, repetition_notes
from .processors import Processor, find_processor
from .report import SIGNALS, PlasticityReport, Row, candidates
from .selection import check_options, select


if TYPE_CHECKING:
    from accelerate import Accelerator


INPUTS = ("hidden", "embedding")
_LEAST_PAIRS = 8
_GROWTH = 1.25
# from this many features on, four images at a time stay in a processor's cache while their four distances are taken
_WIDE = 2**17
# features that scalar products are taken of at a time
_LONGEST = 2**14
# a shift without a bound above: beyond all others, and finite, as ranks in proportion to it have to be
_UNBOUNDED = 1e9
# below this share of their squared norms, a squared distance of float32 vectors is not taken from scalar products
_CLOSE = 0.02


def measure_plasticity(
    model: nn.Module,
    target: Any,
    source: Any = None,
    *,
    inputs: str = "hidden",
    max_pairs: int = 12_800,
    tolerance: float = 0.05,
    confidence: float = 0.95,
    batch_size: int = 32,
    accelerator: Accelerator | None = None,
    seed: int = 0,
    progress: bool = True,
    image_processor: Processor | None = None,
    selection: Mapping[str, Any] | None = None,
) -> PlasticityReport:
    """Measure the plasticity of every component and module of a vision transformer.

    Args:
        model: The model, before or after `accelerator.prepare`. It is left as it was, also after an error.
        target: Downstream images: a `datasets.Dataset` (an image column, or ready `pixel_values`), a `DataLoader` (before or
            after `accelerator.prepare`), a list or iterable of images or batches, or one tensor (n, channels, height,
            width). What cannot be read by index is shuffled in a buffer; see `plastic_peft.pairs.pair_batches`.
        source: Images like the pretraining data, in any of these forms. Without it pairs are drawn inside the target,
            and the report has no `shift`.
        inputs: `"hidden"`: every component on the inputs that it really receives. `"embedding"`: every component of every
            block on the embedding layer's output, as in the paper's reference code.
        max_pairs: Stop here at the latest.
        tolerance: Stop when the relative half-width of every row's interval is below this, 0 to never.
        confidence: Confidence of the intervals, valid whenever the measurement stops.
        batch_size: Pairs per batch over all processes, at least two; one forward pass holds twice as many images.
        accelerator: With it every process takes its share of each batch, and all return the same report; without it,
            each process measures all pairs.
        seed: Decides the order of pairs.
        progress: Show a progress bar.
        image_processor: Turns raw images into `pixel_values`; by default the one saved with the model.
        selection: Options of `PlasticityReport.select`; measure on until this selection cannot change within the intervals.

    Raises:
        ValueError: If the model's structure cannot be read, the images do not fit it, no pair differs, or a module puts
            out NaN or infinity; the message names the module and the batch.
    """
    _check_arguments(inputs, max_pairs, tolerance, confidence, batch_size, selection, source is not None)
    # rates inside the source take two pairs at once
    batch_size = max(2, batch_size)
    # loaders draw from the global random state
    with torch.random.fork_rng(devices=[]):
        core = unwrap(model)
        processor = find_processor(core, image_processor)
        example, target, source = first_pair(target, source, processor)
        rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator is not None else (0, 1)

        with _naming_the_batch(core, example, None):
            structure = trace(model, model_inputs(core, example))
        plans = _plan_rows(structure, inputs)
        taps = _Taps(core, structure, plans, inputs)
        moments = Moments(len(plans), confidence, fixed=tolerance == 0)
        batches = pair_batches(
            target, source, processor, batch_size=batch_size, max_pairs=max_pairs, seed=seed, rank=rank, world=world
        )
        show = progress and (accelerator is None or accelerator.is_main_process)
        bar = tqdm(
            total=most_pairs(target, source, max_pairs), desc="plasticity", unit="pair", disable=not show, leave=False
        )

        def settled() -> bool:
            width = moments.widest()
            bar.set_postfix_str(f"widest interval ±{width:.1%}" if math.isfinite(width) else "")
            if width >= tolerance or selection is None:
                return width < tolerance
            rows = _rows(plans, structure, moments, source is not None)
            return _selection_is_settled(rows, structure.parameters, selection)

        stopped, total = "data exhausted", 0
        with quiet(core, seed), taps.attached(), contextlib.closing(batches), bar:
            for number, batch in enumerate(batches):
                with _naming_the_batch(core, batch.inputs, number):
                    call(entry(model), model_inputs(core, batch.inputs))
                moments.add(_reduce(taps.rates(batch), accelerator))
                moments.check(plans, number, batch, core)
                total = batch.last
                bar.update(batch.last - batch.first)
                if moments.look_is_due() and settled():
                    stopped = "settled"
                    break
            else:
                moments.last_look()
                if total >= max_pairs:
                    stopped = "max_pairs"
    if moments.pairs() < 2:
        raise ValueError(_too_few(total, moments.pairs()))
    missing = taps.missing(moments)
    kept = [
        row
        for row, plan in zip(_rows(plans, structure, moments, source is not None), plans, strict=True)
        if plan not in missing
    ]
    return PlasticityReport(
        rows=tuple(kept),
        inputs=inputs,
        pairs=total,
        dropped=moments.dropped,
        stopped=stopped,
        confidence=confidence,
        tolerance=tolerance,
        seed=int(seed),
        max_pairs=int(max_pairs),
        notes=(
            *(f"{p.level} {p.name} has no row: {why}" for p, why in missing.items()),
            *_structure_notes(structure),
            *repetition_notes(target, source, total),
        ),
        **origin(core, structure),
    )


def measure_on_synthetic_images(model: nn.Module, *, pairs: int = 64, **options: Any) -> PlasticityReport:
    """Measure on random images of the model's own input size: a stand-in where nobody has given images."""
    return measure_plasticity(model, synthetic_images(unwrap(model), 2 * pairs), progress=False, **options)


def origin(model: nn.Module, structure: Structure) -> dict[str, Any]:
    """The fields of a report that say which model was measured, with which versions."""
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    return {
        "base_model": getattr(getattr(model, "config", None), "_name_or_path", "") or kind_of(model),
        "base_parameters": structure.parameters,
        "fingerprint": structure.fingerprint,
        "versions": {"python": platform.python_version(), **versions},
    }


def _check_arguments(
    inputs: str,
    max_pairs: int,
    tolerance: float,
    confidence: float,
    batch_size: int,
    selection: Mapping[str, Any] | None,
    with_source: bool,
) -> None:
    if inputs not in INPUTS:
        raise ValueError(f"inputs={inputs!r} is unknown: choose 'hidden' or 'embedding'.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie between 0 and 1, such as 0.95.")
    if max_pairs < 1 or batch_size < 1:
        raise ValueError(f"max_pairs={max_pairs} and batch_size={batch_size} must be at least 1.")
    if not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance} must be 0 or more, such as 0.05.")
    if selection is not None:
        known = inspect.signature(select).parameters
        if unknown := sorted(set(selection) - {*known, "signal"}):
            raise ValueError(f"selection has no option {unknown[0]!r}: see PlasticityReport.select for what there is.")
        if (signal := selection.get("signal")) not in (*SIGNALS, None):
            raise ValueError(f"signal={signal!r} is unknown: choose one of {', '.join(map(repr, SIGNALS))}.")
        if signal == "shift" and not with_source:
            raise ValueError(
                "signal='shift' compares with the rate inside source images: pass source, or leave it out."
            )
        checked = inspect.signature(check_options).parameters
        check_options(**{name: selection.get(name, known[name].default) for name in checked})


def _structure_notes(structure: Structure) -> list[str]:
    """What a reader may miss among the blocks."""
    outside = [leaf.name for leaf in structure.leaves.values() if leaf.linear and leaf.block is None]
    heads = {name for component in structure.components if component.role == "head" for name in component.modules}
    left = {
        "no row, since its tensors hold no whole images": structure.unread,
        "a linear outside the blocks, which no selection takes": [name for name in outside if name not in heads],
    }
    return [
        f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}: {what}"
        for what, names in left.items()
        if names
    ]


def _too_few(total: int, different: int) -> str:
    if total < 2:
        return f"{total} pairs give no interval: pass at least two images of each set, or four of the target alone."
    return (
        f"{different} of {total} pairs have two images that differ, and a rate of change needs different images: check that "
        "source and target differ."
    )


@contextlib.contextmanager
def _naming_the_batch(model: nn.Module, batch: Mapping[str, torch.Tensor], number: int | None) -> Iterator[None]:
    """Turn what a model says about unfit images into an error that names batch and shape."""
    try:
        yield
    except NotFiniteError as error:
        raise NotFiniteError(f"{error} on the first images. {_precision_advice(model)}") from None
    except (UnknownStructureError, torch.OutOfMemoryError):
        raise
    except (ValueError, RuntimeError, IndexError, TypeError, AttributeError) as error:
        shapes = ", ".join(f"{key} {tuple(value.shape)}" for key, value in batch.items())
        where = "the first images" if number is None else f"batch {number}"
        raise ValueError(
            f"{kind_of(model)} cannot take {where} ({shapes}): {error} Pass images of the size and channels that the model expects."
        ) from error


def _precision_advice(model: nn.Module) -> str:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return f"The model is in {dtype}: check the images and weights; if the values overflow, measure in bfloat16 or float32."


# --- rows and taps -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """One row to be: what it is called, and where its inputs and outputs pass by."""

    name: str
    level: str
    component: Component
    inputs: str
    outputs: tuple[str, ...]
    start: int


def _plan_rows(structure: Structure, inputs: str) -> list[_Plan]:
    plans = []
    for component in structure.components:
        if inputs == "embedding" and component.block is None:
            continue
        start = {name: structure.leaves[name].start for name in component.modules}
        first = start[component.modules[0]]
        plans.append(_Plan(component.name, "component", component, component.inputs, component.outputs, first))
        plans += [_Plan(name, "module", component, name, (name,), start[name]) for name in component.modules]
    return plans


class _Taps:
    """Hooks that turn what passes a module into one distance per pair."""

    def __init__(self, model: nn.Module, structure: Structure, plans: list[_Plan], inputs: str) -> None:
        self.model, self.structure, self.plans = model, structure, plans
        self.read = {plan.inputs for plan in plans}
        self.written = {name for plan in plans for name in plan.outputs}
        self.embedding: torch.Tensor | None = None
        self.fed: set[str] = set()
        self.unfit: dict[str, str] = {}
        if inputs == "embedding":
            for component in structure.components:
                if component.block is None:
                    continue
                if component.role == "attention" and component.inputs != component.outputs[0]:
                    self.unfit[component.name] = "its attention is no module of its own that could take the embedding"
                else:
                    self.fed |= set(component.outputs)
        self.distances: dict[tuple[str, str], torch.Tensor] = {}
        self.seen: dict[int, tuple[Any, int, torch.Tensor]] = {}
        # where images lie too close together for scalar products
        self.close: set[tuple[str, str]] = set()
        self.images = 0

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        handles: list[Any] = []
        try:
            handles.append(self.model.register_forward_pre_hook(self._start, with_kwargs=True))
            for name, module, _ in named_leaves(self.model):
                if name in self.fed:
                    handles.append(module.register_forward_pre_hook(self._feed(name), with_kwargs=True))
                if name in self.read or name in self.written:
                    handles.append(module.register_forward_hook(self._note(name), with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.embedding = None
            self.seen.clear()

    def _start(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.distances.clear()
        self.seen.clear()
        self.embedding = None
        tensor = first_tensor(args, kwargs)
        self.images = 0 if tensor is None else tensor.shape[0]

    def _note(self, name: str) -> Any:
        in_dim, out_dim = self.structure.dims[name]

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if name in self.read:
                self._add((name, "in"), first_tensor(args, kwargs), in_dim)
            if name in self.written:
                self._add((name, "out"), first_tensor(output), out_dim)

        return hook

    def _feed(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            x = first_tensor(args, kwargs)
            if x is None:
                return None
            if self.embedding is None:
                self.embedding = x
            e = self.embedding
            if x.shape[:-1] != e.shape[:-1] or x.shape[-1] < e.shape[-1]:
                self.unfit[name] = f"it takes {tuple(x.shape[1:])} where the embedding is {tuple(e.shape[1:])}"
                return None
            fed = nn.functional.pad(e, (0, x.shape[-1] - e.shape[-1])) if x.shape[-1] > e.shape[-1] else e
            return (
                tuple(fed if value is x else value for value in args),
                {key: fed if value is x else value for key, value in kwargs.items()},
            )

        return hook

    def _add(self, key: tuple[str, str], tensor: torch.Tensor | None, dim: int) -> None:
        if tensor is None or self.images == 0 or tensor.ndim <= dim or tensor.shape[dim] % self.images:
            return
        distance = self._distance(key, tensor, dim)
        # a module that is called more than once has one long output: its distances add up in squares
        self.distances[key] = torch.hypot(self.distances[key], distance) if key in self.distances else distance

    def _distance(self, key: tuple[str, str], tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """Distances of one tensor: n source-target, then n/2 source-source and n/2 target-target ones."""
        # tensors of inference mode do not count their changes
        version = 0 if tensor.is_inference() else tensor._version
        known = self.seen.get(id(tensor))
        if known is not None and known[0]() is tensor and known[1] == version:
            return known[2]
        # (source or target, first or second half, image, features)
        rows = per_image(tensor.detach(), dim, self.images).unflatten(0, (2, 2, -1))
        distance = None
        # autocast would take products in half precision
        with torch.autocast(rows.device.type, enabled=False):
            if rows.dtype == torch.float32 and rows.device.type == "cpu" and key not in self.close:
                distance = _from_products(rows)
                if distance is None:
                    self.close.add(key)
            if distance is None:
                distance = _from_differences(rows)
        self.seen[id(tensor)] = (weakref.ref(tensor), version, distance)
        return distance

    def rates(self, batch: PairBatch) -> torch.Tensor:
        """Sums over this process's pairs, (rows + 1, 3 kinds, 4): rate, its square, count, non-finite count.

        The last row counts pairs whose two images are equal for some module.
        """
        n = len(batch.weights)
        half = n // 2
        weights = batch.weights.double()
        inside = weights[:half] * weights[half:]
        everywhere = torch.cat([weights, inside, inside])
        absent = torch.full((2 * n,), math.nan, device="cpu")
        pairs = []
        for plan in self.plans:
            x = self.distances.get((plan.inputs, "in"))
            outputs = [self.distances.get((name, "out")) for name in plan.outputs]
            if (
                x is None
                or any(y is None for y in outputs)
                or plan.name in self.unfit
                or set(plan.outputs) & set(self.unfit)
            ):
                pairs.append((absent, absent))
                continue
            y = outputs[0] if len(outputs) == 1 else torch.linalg.vector_norm(torch.stack(outputs), dim=0)  # type: ignore[arg-type]
            pairs.append((x, cast(torch.Tensor, y)))
        device = next((x.device for x, _ in pairs if x is not absent), torch.device("cpu"))
        x = torch.stack([x.to(device) for x, _ in pairs]).cpu().double()
        y = torch.stack([y.to(device) for _, y in pairs]).cpu().double()
        measured = torch.tensor([x_ is not absent for x_, _ in pairs], device="cpu")[:, None]
        counted = measured & (x != 0) & (everywhere > 0)
        rate = torch.where(counted, y / x, 0.0)
        bad = ~torch.isfinite(rate)
        rate = torch.where(bad, 0.0, rate)
        sums = torch.stack([rate, rate**2, counted.double(), bad.double()], dim=-1)
        parts = [sums[:, :n].sum(1), sums[:, n : n + half].sum(1), sums[:, n + half :].sum(1)]
        moments = torch.stack(parts, dim=1)
        equal = (measured & (x[:, :n] == 0) & (weights > 0)).any(dim=0).sum()
        last = torch.zeros(1, 3, 4, dtype=torch.float64, device="cpu")
        last[0, 0, 0] = equal
        return torch.cat([moments, last])

    def missing(self, moments: Moments) -> dict[_Plan, str]:
        """Rows that could not be measured, and why."""
        absent = {}
        for plan, pairs in zip(self.plans, moments.sums[:, 0, 2].tolist(), strict=True):
            names = [plan.name, *plan.outputs]
            why = next((self.unfit[name] for name in names if name in self.unfit), None)
            if why is None and pairs == 0:
                why = "nothing that depends on the image passed it"
            if why is not None:
                absent[plan] = why
        return absent


def _from_products(rows: torch.Tensor) -> torch.Tensor | None:
    """Distances by `_from_differences`, from the scalar products of each four images, which read every number once.

    `None` where that could be off by more than about 1e-5: images that are nearly alike, or not finite.
    """
    four = rows.flatten(0, 1).transpose(0, 1)
    # (image, part of the features, four, features): products of short rows run at the speed of reading them
    parts = four.unflatten(-1, (-1, _short(four.shape[-1]))).transpose(1, 2)
    squares, margins = ((parts @ parts.mT).sum(dim=1).flatten(1) @ _squares()).chunk(2, dim=1)
    return squares.sqrt().T.flatten() if bool((margins > 0).all()) else None


@functools.lru_cache
def _squares() -> torch.Tensor:
    """(16, 8): makes of four images' products their squared distances, and how far these are above what is too close."""
    sums, products = torch.zeros(2, 4, 4, 4, dtype=torch.float32, device="cpu")
    # source-target twice, source-source, target-target
    for kind, (a, b) in enumerate([(0, 2), (1, 3), (0, 1), (2, 3)]):
        sums[a, a, kind] = sums[b, b, kind] = 1
        products[a, b, kind] = 2
    return torch.cat([sums - products, (1 - _CLOSE) * sums - products], dim=-1).flatten(0, 1)


@functools.lru_cache
def _short(features: int) -> int:
    """A divisor of a number of features that is short enough, or the number itself."""
    return next((size for size in range(_LONGEST, _LONGEST // 16, -1) if features % size == 0), features)


def _from_differences(rows: torch.Tensor) -> torch.Tensor:
    """Distances of rows (source or target, first or second half, image, features): see `_Taps._distance`."""
    at_once = 1 if rows.device.type == "cpu" and rows.shape[-1] >= _WIDE else rows.shape[2]
    parts = [
        torch.stack([_norm(part[0], part[1]), _norm(part[:, 0], part[:, 1])]) for part in rows.split(at_once, dim=2)
    ]
    return torch.cat(parts, dim=-1).flatten()


def _norm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if a.dtype not in (torch.float32, torch.float64):
        return torch.linalg.vector_norm(a.float().sub_(b), dim=-1)
    return torch.linalg.vector_norm(a - b, dim=-1)


def _reduce(sums: torch.Tensor, accelerator: Accelerator | None) -> torch.Tensor:
    if accelerator is None or accelerator.num_processes == 1:
        return sums
    from accelerate.utils import reduce

    try:
        reduced: torch.Tensor = reduce(sums.to(accelerator.device), reduction="sum").cpu()
    except RuntimeError as error:
        raise RuntimeError(
            f"Process {accelerator.process_index} could not add up its rates with the others; one of them has probably died. "
            "See the first error among their logs."
        ) from error
    return reduced


# --- moments and stopping ----------------------------------------------------------------------------------------------


class Moments:
    """Running sums per row and kind of pair (source-target, source-source, target-target), with intervals of the means.

    Args:
        rows: How many rows.
        confidence: Confidence of the intervals at the look where the measurement stops.
        fixed: The number of pairs does not depend on what is seen, so that the only look gets the whole error probability.
    """

    def __init__(self, rows: int, confidence: float, fixed: bool = False) -> None:
        # sums of the rate and its square, and how many were finite and not
        self.sums = torch.zeros(rows, 3, 4, dtype=torch.float64, device="cpu")
        self.confidence, self.fixed, self.looks, self.dropped = confidence, fixed, 0, 0
        self.looked_at = 0

    def add(self, sums: torch.Tensor) -> None:
        # not in place: a tensor made in inference mode refuses that outside
        self.sums = self.sums + sums[:-1]
        self.dropped += int(sums[-1, 0, 0])

    def look_is_due(self) -> bool:
        """Have the pairs grown enough since the last look? If so, this is the next one."""
        pairs = self.pairs()
        if self.fixed or pairs < max(_LEAST_PAIRS, _GROWTH * self.looked_at):
            return False
        self.looks, self.looked_at = self.looks + 1, pairs
        return True

    def last_look(self) -> None:
        """The intervals are read once more when the pairs end."""
        if self.pairs() > self.looked_at:
            self.looks, self.looked_at = self.looks + 1, self.pairs()

    def pairs(self) -> int:
        """Pairs in the row that has fewest, not counting rows that were never measured."""
        counts = self.sums[:, 0, 2]
        return int(counts[counts > 0].min()) if (counts > 0).any() else 0

    def mean(self, kind: int = 0) -> torch.Tensor:
        return self.sums[:, kind, 0] / self.sums[:, kind, 2].clamp(min=1)

    def std(self, kind: int = 0) -> torch.Tensor:
        count = self.sums[:, kind, 2]
        spread = (self.sums[:, kind, 1] - count * self.mean(kind) ** 2).clamp(min=0)
        return (spread / (count - 1).clamp(min=1)).sqrt()

    def half_width(self, kind: int = 0, share: float = 1.0) -> torch.Tensor:
        """Half-width of the interval of each mean at the last look, with a `share` of its error probability."""
        from scipy.stats import t

        count = self.sums[:, kind, 2]
        error = share * (1 - self.confidence)
        if not self.fixed:
            error /= max(1, self.looks) * (self.looks + 1)
        quantile = torch.from_numpy(t.ppf(1 - error / 2, (count - 1).clamp(min=1).numpy()))
        return torch.where(count > 1, quantile * self.std(kind) / count.clamp(min=1).sqrt(), math.inf)

    def shift_interval(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Interval of source-target over source-source rates; infinite above where the latter may be zero."""
        across, inside = self.mean(0), self.mean(1)
        across_half, inside_half = self.half_width(0, 0.5), self.half_width(1, 0.5)
        low = (across - across_half).clamp(min=0) / (inside + inside_half)
        least = inside - inside_half
        return low, torch.where(least > 0, (across + across_half) / least, math.inf)

    def widest(self) -> float:
        measured = self.sums[:, 0, 2] > 0
        if not measured.any():
            return math.inf
        # a rate of exactly zero (a frozen scale of zero) has no relative width
        mean = self.mean()[measured]
        relative = torch.where(mean > 0, self.half_width()[measured] / mean.clamp(min=1e-300), 0.0)
        return float(relative.max())

    def check(self, plans: list[_Plan], number: int, batch: PairBatch, model: nn.Module) -> None:
        """Raise for the module that was the first to put out NaN or infinity."""
        bad = self.sums[:, :, 3].sum(dim=1).nonzero().flatten().tolist()
        if bad:
            first = min((plans[i] for i in bad), key=lambda plan: plan.start)
            more = f" and {len(bad) - 1} further ones" if len(bad) > 1 else ""
            raise NotFiniteError(
                f"{first.name}{more} put out NaN or infinity in batch {number} (pairs {batch.first} to {batch.last - 1}). "
                f"{_precision_advice(model)}"
            )


def _rows(plans: list[_Plan], structure: Structure, moments: Moments, with_source: bool) -> list[Row]:
    mean, std, width = moments.mean().tolist(), moments.std().tolist(), moments.half_width().tolist()
    shift_low, shift_high = (end.tolist() for end in moments.shift_interval())
    counts = moments.sums[:, :, 2].tolist()
    inside, among = moments.mean(1).tolist(), moments.mean(2).tolist()
    rows = []
    for i, plan in enumerate(plans):
        leaf = structure.leaves.get(plan.name) if plan.level == "module" else None
        half = width[i] if math.isfinite(width[i]) else 0.0
        shifted = with_source and inside[i] > 0
        rows.append(
            Row(
                name=plan.name,
                level=plan.level,
                role=plan.component.role,
                block=plan.component.block,
                kind=leaf.kind if leaf else plan.component.kind,
                component=plan.component.name,
                parameters=leaf.parameters if leaf else plan.component.parameters,
                shape=leaf.shape if leaf else None,
                mean=mean[i],
                std=std[i],
                pairs=int(counts[i][0]),
                ci_low=mean[i] - half,
                ci_high=mean[i] + half,
                source_source=inside[i] if with_source and counts[i][1] else None,
                target_target=among[i] if with_source and counts[i][2] else None,
                shift=mean[i] / inside[i] if shifted else None,
                shift_low=shift_low[i] if shifted else None,
                shift_high=shift_high[i] if shifted and math.isfinite(shift_high[i]) else None,
            )
        )
    return rows


def _selection_is_settled(rows: list[Row], base_parameters: int, options: Mapping[str, Any]) -> bool:
    """Does the selection stay when every selected score moves to the bad end of its interval and the others to the good?"""
    options = dict(options)
    signal = options.pop("signal", None)

    def selected_from(some: list[Row]) -> set[str]:
        return set(select(candidates(some, signal), base_parameters=base_parameters, **options).modules)

    try:
        names = selected_from(rows)
    except ValueError:
        if options.get("threshold") is None:
            raise
        # no score reaches the threshold
        return False
    # a component counts as selected if any of its modules is
    components = {(row.component, row.role) for row in rows if row.level == "module" and row.name in names}
    low_is_bad = options.get("order", "highest") != "lowest"

    def at_worst(row: Row) -> Row:
        selected = row.name in names if row.level == "module" else (row.component, row.role) in components
        if selected == low_is_bad:
            return replace(row, mean=row.ci_low, shift=row.shift_low)
        # no bound above is no reason to believe in the selection
        return replace(row, mean=row.ci_high, shift=None if row.shift is None else row.shift_high or _UNBOUNDED)

    try:
        return selected_from([at_worst(row) for row in rows]) == names
    except ValueError:
        # other scores would not even make a selection
        return False
