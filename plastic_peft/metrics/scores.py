"""Figures of a classifier from its logits, in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np


def classification_scores(predictions: Any, references: Any, k: int = 5) -> dict[str, Any]:
    """Accuracy, top-k accuracy, macro F1 and confusion matrix.

    Args:
        predictions: Logits or probabilities, (images, classes).
        references: Class indices, (images,).
        k: How many of the highest logits count for the top-k accuracy, at most the number of classes.

    Returns:
        `accuracy`, `top5_accuracy` (named after k), `macro_f1` (mean over the classes that occur in references or in the
        predicted classes), `confusion_matrix` (rows: reference, columns: predicted class; counts).

    Raises:
        ValueError: If a reference is no class that has a logit.
    """
    logits, labels = np.asarray(predictions, dtype=np.float32), np.asarray(references)
    classes = logits.shape[1]
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"references hold {labels.min()} to {labels.max()}, and the logits have {classes} classes.")
    order = np.argsort(-logits, axis=1, kind="stable")
    predicted = order[:, 0]
    confusion = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(confusion, (labels, predicted), 1)
    right = np.diag(confusion)
    occurring = confusion.sum(0) + confusion.sum(1)
    f1 = 2 * right[occurring > 0] / occurring[occurring > 0]
    return {
        "accuracy": float((predicted == labels).mean()),
        f"top{k}_accuracy": float((order[:, :k] == labels[:, None]).any(axis=1).mean()),
        "macro_f1": float(f1.mean()),
        "confusion_matrix": confusion.tolist(),
    }
