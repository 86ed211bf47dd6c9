"""What every benchmark states about itself, and how it measures time and memory."""

from __future__ import annotations

import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch


RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    names = ("torch", "transformers", "peft", "accelerate", "plastic-peft")
    return {
        "machine": platform.machine(),
        "cpus": psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
    }


def save(name: str, results: Any, **settings: Any) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"settings": settings, **machine(), "results": results}, indent=1) + "\n")
    return path


# CPU seconds of one thread are what other work on a shared machine disturbs least
clock = time.perf_counter if torch.cuda.is_available() else time.process_time
if not torch.cuda.is_available():
    torch.set_num_threads(1)


def side_by_side(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds per call of each way, taken in turn, so that a busy machine hits all of them alike.

    On a CPU these are processor seconds of one computing thread and whatever threads a way starts beside it.
    """
    for way in ways.values():
        way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = clock()
            way()
            seconds[name].append(clock() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], way: str, base: str) -> dict[str, float]:
    """Median of the ratios within each round, and their quartiles."""
    ratios = [a / b for a, b in zip(seconds[way], seconds[base], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"median": round(middle, 4), "low": round(low, 4), "high": round(high, 4)}


def peak_memory(way: Callable[[], Any]) -> float:
    """Peak of the tensors that a call allocates above what is held before it, in MiB."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        way()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(held, default=0) / 2**20
