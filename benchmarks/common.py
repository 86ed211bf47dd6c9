"""What every benchmark states about itself, and how it measures time and memory."""

from __future__ import annotations

import json
import platform
import statistics
import threading
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


def side_by_side(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds per call of each way, taken in turn, so that a busy machine hits all of them alike."""
    for way in ways.values():
        way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], way: str, base: str) -> dict[str, float]:
    """Median of the ratios within each round, and their quartiles."""
    ratios = [a / b for a, b in zip(seconds[way], seconds[base], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"median": round(middle, 4), "low": round(low, 4), "high": round(high, 4)}


def peak_memory(way: Callable[[], Any]) -> float:
    """Peak memory of a call above what is held before it, in MiB: exact on a GPU, sampled on a CPU."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    process, done = psutil.Process(), threading.Event()
    before = process.memory_info().rss
    peak = before

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, process.memory_info().rss)
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    way()
    done.set()
    watcher.join()
    return (peak - before) / 2**20
