"""What is counted of labels, predictions and confidences: numpy in, numpy out.

Labels and predictions are (N,) integers in [0, 9]; confidences are (N,), the probability of the predicted digit, in
[0, 1].
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

NUM_BINS = 15  # of a reliability diagram; the usual number in papers


class Reliability(NamedTuple):
    """Confidence against accuracy in equal-width bins: arrays (B,), nan where a bin is empty, and their ECE."""

    edges: np.ndarray  # (B + 1,)
    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    ece: float


def count_confusions(labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """How often each digit was read as each other: (10, 10) counts, row = actual, column = predicted."""
    return np.bincount(labels.astype(int) * 10 + predictions.astype(int), minlength=100).reshape(10, 10)


def rank_confusions(counts: np.ndarray) -> list[tuple[int, int]]:
    """Each actual and other predicted digit that were confused, the commonest first, by digits where it is a tie."""
    others = counts * (1 - np.eye(10, dtype=int))
    order = np.argsort(-others, axis=None, kind="stable").tolist()
    return [divmod(place, 10) for place in order if others.flat[place]]


def find_mistakes(labels: np.ndarray, predictions: np.ndarray, confidences: np.ndarray) -> np.ndarray:
    """Where a digit was read as another, the most confident first."""
    order = np.argsort(-confidences, kind="stable")
    return order[labels[order] != predictions[order]]


def bin_reliability(confidences: np.ndarray, correct: np.ndarray) -> Reliability:
    """Sort images into NUM_BINS bins of confidence and compare it with how often they were right.

    Args:
        confidences: (N,) in [0, 1]; a value on an edge belongs to the bin below it.
        correct: (N,) bool.

    Returns:
        The bins and the expected calibration error: the mean of |accuracy - confidence| over the bins, each weighted by
        its number of images, in [0, 1]. Source: Guo et al. 2017, "On Calibration of Modern Neural Networks".
    """
    edges = np.linspace(0, 1, NUM_BINS + 1)
    bins = np.clip(np.searchsorted(edges, confidences, side="left") - 1, 0, NUM_BINS - 1)
    counts = np.bincount(bins, minlength=NUM_BINS)
    filled = np.where(counts, counts, np.nan)
    confidence = np.bincount(bins, confidences, NUM_BINS) / filled
    accuracy = np.bincount(bins, correct, NUM_BINS) / filled
    ece = float(np.nansum(np.abs(accuracy - confidence) * counts) / max(counts.sum(), 1))
    return Reliability(edges, counts, confidence, accuracy, ece)


def wilson_interval(num_right: int, num_images: int) -> tuple[float, float]:
    """The 95 % confidence interval of an accuracy, both ends in [0, 1].

    Source: Wilson 1927; unlike the normal approximation it stays sensible near 100 %.
    """
    from scipy.stats import binomtest  # takes a second that training need not wait for

    interval = binomtest(num_right, num_images).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)
