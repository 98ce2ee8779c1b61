"""Metrics of the `evaluate` library that need no download.

`evaluate.load("accuracy")` fetches its code from the Hub; these are the same metrics as classes. Only scripts import
this file, because `evaluate` is not needed to train.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import datasets
import evaluate
import numpy as np
from transformers import EvalPrediction


class Accuracy(evaluate.Metric):
    """Share of predictions that equal their reference."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(
            description="Share of predictions that equal their reference.",
            citation="",
            inputs_description="predictions and references: lists of class numbers.",
            features=features,
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        if len(predictions) == 0:
            raise ValueError("Accuracy of no predictions is not defined; the evaluation set is empty.")
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


def accuracy_of_logits() -> Callable[[EvalPrediction], dict[str, float]]:
    """Return a `compute_metrics` for `Trainer`: accuracy of the largest logit, over labels that are not -100."""
    metric = Accuracy(keep_in_memory=True)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        counted = prediction.label_ids != -100
        return metric.compute(
            predictions=logits.argmax(-1)[counted].tolist(), references=prediction.label_ids[counted].tolist()
        )

    return compute_metrics
