"""Metric modules for `evaluate`, shipped with the package so that nothing is downloaded to compute them."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load_metric(name: str = "image_classification") -> Any:
    """Load a shipped metric as an `evaluate.EvaluationModule`.

    Args:
        name: Folder of the metric beside this file.

    Raises:
        ValueError: If there is no such metric.
    """
    folder = Path(__file__).parent / name
    if not (folder / f"{name}.py").is_file():
        raise ValueError(f"No metric {name!r} is shipped: there is 'image_classification'.")
    import evaluate

    return evaluate.load(str(folder), keep_in_memory=True)
