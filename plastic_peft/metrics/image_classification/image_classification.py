"""Accuracy, top-k accuracy, macro F1 and the confusion matrix of an image classifier, from its logits."""

import datasets
import evaluate

from plastic_peft.metrics.scores import classification_scores


_DESCRIPTION = "Accuracy, top-k accuracy, macro F1 and confusion matrix from one row of logits per image."
_INPUTS = """
Args:
    predictions: Logits or probabilities, (images, classes).
    references: Class indices, (images,).
    k: How many of the highest logits count for the top-k accuracy, at most the number of classes. Defaults to 5.
Returns:
    accuracy, top5_accuracy (named after k), macro_f1 (mean over the classes that occur in references or in the
    predicted classes), confusion_matrix (rows: reference, columns: predicted class; counts).
"""


class ImageClassification(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float32")),
                    "references": datasets.Value("int64"),
                }
            ),
        )

    def _compute(self, predictions: list, references: list, k: int = 5) -> dict:
        return classification_scores(predictions, references, k)
