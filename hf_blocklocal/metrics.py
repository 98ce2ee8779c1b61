"""Metrics of every task of the scripts, without a download.

`evaluate.load("accuracy")` fetches its code from the Hub; here it is a class of the `evaluate` library. The others are
functions of arrays, made to be the `compute_metrics` of a `Trainer`. Only scripts import this file, because `evaluate`
is not needed to train.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from difflib import SequenceMatcher
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


def largest_logit(logits: Any, labels: Any) -> Any:
    """Keep the class with the largest logit alone, as a `preprocess_logits_for_metrics`."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def f1_of_labels() -> Callable[[EvalPrediction], dict[str, float]]:
    """Return a `compute_metrics` for several labels per sample, each predicted where its logit is above 0.

    `f1` is that of all labels of all samples together (micro); `exact_match` is the share of samples with every label
    right; `accuracy` that of all labels.
    """

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        said, true = _logits(prediction) > 0, np.asarray(prediction.label_ids) > 0.5
        hits, given = int((said & true).sum()), int(said.sum() + true.sum())
        return {
            "f1": 2 * hits / given if given else 1.0,
            "exact_match": float((said == true).all(-1).mean()),
            "accuracy": float((said == true).mean()),
        }

    return compute_metrics


def f1_of_classes() -> Callable[[EvalPrediction], dict[str, float]]:
    """Return a `compute_metrics` for a class per token, from logits or classes; labels of -100 do not count.

    `macro_f1` is the mean over classes of their F1, over the classes that occur among labels or predictions;
    `accuracy` the share of tokens that are right.
    """

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        said, true = _logits(prediction), np.asarray(prediction.label_ids)
        said = said.argmax(-1) if said.ndim > true.ndim else said
        said, true = said[true != -100], true[true != -100]
        if len(true) == 0:
            raise ValueError("F1 of no tokens is not defined: every label of the evaluation set is -100.")
        scores = []
        for one in np.union1d(said, true):
            hits = int(((said == one) & (true == one)).sum())
            scores.append(2 * hits / int((said == one).sum() + (true == one).sum()))
        return {"macro_f1": float(np.mean(scores)), "accuracy": float((said == true).mean())}

    return compute_metrics


def correlation() -> Callable[[EvalPrediction], dict[str, float]]:
    """Return a `compute_metrics` for a number per sample.

    `pearson` is the correlation with the right numbers, 0 for a constant; `rmse` the root of the mean squared error.
    """

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        said, true = _logits(prediction).reshape(-1), np.asarray(prediction.label_ids).reshape(-1)
        spread = said.std() * true.std()
        together = ((said - said.mean()) * (true - true.mean())).mean()
        return {
            "pearson": float(together / spread) if spread > 0 else 0.0,
            "rmse": float(np.sqrt(np.mean((said - true) ** 2))),
        }

    return compute_metrics


def match_of_answers(
    find: Callable[[Any, Any], Sequence[str]], answers: Sequence[Sequence[str]]
) -> Callable[[EvalPrediction], dict[str, float]]:
    """Return a `compute_metrics` for questions, from the scores of starts and ends.

    `exact_match` is the share of answers that equal one that is right, and `f1` the mean overlap of their words with
    the nearest of those; case, punctuation and articles do not count, as in SQuAD.

    Args:
        find: Turns scores of starts and ends, (samples, positions) each, into the answers that are meant.
        answers: For each question what is right.
    """

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        given = find(*prediction.predictions[:2])
        if len(given) != len(answers):
            raise ValueError(f"There are {len(given)} answers to {len(answers)} questions.")
        pairs = list(zip(given, answers, strict=True))
        exact = [any(_plain(said) == _plain(one) for one in right) for said, right in pairs]
        overlap = [max(_overlap(_plain(said), _plain(one)) for one in right) for said, right in pairs]
        return {"exact_match": float(np.mean(exact)), "f1": float(np.mean(overlap))}

    return compute_metrics


def match_of_texts(decode: Callable[[Any], Sequence[str]]) -> Callable[[EvalPrediction], dict[str, float]]:
    """Return a `compute_metrics` for generated texts.

    `exact_match` is the share of texts that are right to the letter; `similarity` the mean share of letters that a
    text and what it should be have in common, in order (`difflib`).

    Args:
        decode: Turns token ids into texts; -100 stands for padding.
    """

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        pairs = list(zip(decode(prediction.predictions), decode(prediction.label_ids), strict=True))
        alike = [SequenceMatcher(None, said, right, autojunk=False).ratio() for said, right in pairs]
        return {
            "exact_match": float(np.mean([said == right for said, right in pairs])),
            "similarity": float(np.mean(alike)),
        }

    return compute_metrics


def with_perplexity(metrics: Mapping[str, float]) -> dict[str, float]:
    """Add to the metrics of a language model the perplexity, `exp` of the loss, of the model and of every head."""
    losses = {key: value for key, value in metrics.items() if key.endswith("_loss")}
    return {**metrics, **{f"{key[: -len('loss')]}perplexity": float(np.exp(loss)) for key, loss in losses.items()}}


def _logits(prediction: EvalPrediction) -> np.ndarray:
    found = prediction.predictions
    return np.asarray(found[0] if isinstance(found, tuple) else found)


def _plain(text: str) -> list[str]:
    """Return the words of an answer, without case, punctuation and articles."""
    letters = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return [word for word in letters.split() if word not in ("a", "an", "the")]


def _overlap(said: list[str], right: list[str]) -> float:
    """Return the F1 of words; of no words with no words 1."""
    shared = sum((Counter(said) & Counter(right)).values())
    return 2 * shared / (len(said) + len(right)) if said or right else 1.0
