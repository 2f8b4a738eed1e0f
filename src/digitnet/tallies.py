"""What is counted of labels, predictions and confidences: numpy in, numpy out.

Labels and predictions are (N,) integers in [0, 9]; confidences are (N,), the probability of the predicted digit, in
[0, 1].
"""

from __future__ import annotations

import math
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


def find_confused_pair(counts: np.ndarray) -> tuple[int, int] | None:
    """The actual and the predicted digit of the commonest confusion (the first of a tie); None without mistakes."""
    off_diagonal = counts * (1 - np.eye(10, dtype=int))
    if not off_diagonal.any():
        return None
    actual, predicted = divmod(int(off_diagonal.argmax()), 10)
    return actual, predicted


def bin_reliability(confidences: np.ndarray, correct: np.ndarray, num_bins: int = NUM_BINS) -> Reliability:
    """Sort images into bins of confidence and compare it with how often they were right.

    Args:
        confidences: (N,) in [0, 1].
        correct: (N,) bool.
        num_bins: bins of equal width; a value on an edge belongs to the bin below it.

    Returns:
        The bins and the expected calibration error: the mean of |accuracy - confidence| over the bins, each weighted by
        its number of images, in [0, 1]. Source: Guo et al. 2017, "On Calibration of Modern Neural Networks".
    """
    edges = np.linspace(0, 1, num_bins + 1)
    bins = np.clip(np.searchsorted(edges, confidences, side="left") - 1, 0, num_bins - 1)
    counts = np.bincount(bins, minlength=num_bins)
    filled = np.where(counts, counts, np.nan)
    confidence = np.bincount(bins, confidences, num_bins) / filled
    accuracy = np.bincount(bins, correct, num_bins) / filled
    ece = float(np.nansum(np.abs(accuracy - confidence) * counts) / max(counts.sum(), 1))
    return Reliability(edges, counts, confidence, accuracy, ece)


def wilson_interval(num_right: int, num_images: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % confidence interval of an accuracy, both ends in [0, 1].

    Source: Wilson 1927; unlike the normal approximation it stays sensible near 100 %.
    """
    p, n = num_right / num_images, num_images
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return max(centre - half, 0.0), min(centre + half, 1.0)
