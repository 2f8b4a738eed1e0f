"""Fits a calibration at the end of training.

Temperature and thresholds come from the validation images. The detector of non-digits learns from training digits and
near misses made of them; how many digits it may turn away is decided on the validation images, too.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor

from digitnet.augment import RandomAffine
from digitnet.calibration import MIN_CONFIDENCE, Calibration, Detector
from digitnet.data import DigitDataset
from digitnet.model import DigitNet
from digitnet.near_misses import blur, make_near_misses

TARGET_ACCURACY = 0.999  # of the answers that are not called uncertain
REJECTED = 0.005  # share of the validation digits that are called no digit


def fit_calibration(
    net: DigitNet, train: DigitDataset, val: DigitDataset, num_digits: int, seed: int = 0
) -> Calibration:
    """Fit a calibration to a trained network; the same seed gives the same.

    Args:
        net: the network; left in evaluation mode.
        train: the training digits.
        val: the validation digits.
        num_digits: how many training digits, evenly spread, the detector learns from; 0 for none that detects.
        seed: of everything random.
    """
    calibration = Calibration()
    device = next(net.parameters()).device
    net.eval()
    features = extract_features(net, val.images)
    with torch.no_grad():
        logits = net.classify(features.to(device)).cpu()
    temperature = fit_temperature(logits, val.labels)
    confidence, prediction = (logits / temperature).softmax(dim=1).max(dim=1)
    threshold = choose_threshold(confidence.numpy(), (prediction == val.labels).numpy())
    calibration.temperature.fill_(temperature)
    calibration.min_confidence.fill_(threshold)
    if num_digits:
        picks = torch.linspace(0, len(train) - 1, min(num_digits, len(train))).long()
        calibration.detector = fit_detector(net, train.images[picks], train.labels[picks], seed)
        with torch.no_grad():
            scores = calibration.detector(features)
        calibration.max_score.fill_(float(scores.quantile(1 - REJECTED, interpolation="higher")))
    return calibration.eval()


def extract_features(net: DigitNet, images: Tensor, batch_size: int = 500) -> Tensor:
    """Features (N, 2304) float32 on the CPU, of images (N, 1, 28, 28)."""
    device = next(net.parameters()).device
    with torch.no_grad():
        return torch.cat([net.extract(batch.to(device)).float().cpu() for batch in images.split(batch_size)])


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The number to divide logits (N, 10) by that makes the labels (N,) most likely, in [0.5, 10].

    A few hundred images that are all read right would have it at 0.

    Source: Guo et al. 2017, On Calibration of Modern Neural Networks, arXiv 1706.04599.
    """
    logits = logits.double()

    def loss(log_temperature: float) -> float:
        return float(F.cross_entropy(logits / np.exp(log_temperature), labels))

    bounds = np.log([0.5, 10])
    return float(np.exp(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6}).x))


def choose_threshold(confidence: np.ndarray, is_right: np.ndarray, accuracy: float = TARGET_ACCURACY) -> float:
    """The lowest confidence from which on the answers are right often enough, at least 0.5.

    Args:
        confidence: (N,) in [0, 1], probability of each answer.
        is_right: (N,) bool.
        accuracy: how often the answers at or above the threshold must be right, in [0, 1].

    Returns:
        A threshold half-way between the last answer left out and the first one kept; 1 where even the most confident
        answers are wrong too often.
    """
    order = np.argsort(-confidence, kind="stable")
    confidence, num_wrong = confidence[order], np.cumsum(~is_right[order])
    num_kept = np.arange(1, len(order) + 1)
    following = np.append(confidence[1:], 0.0)
    good = np.flatnonzero((num_wrong <= (1 - accuracy) * num_kept) & (following < confidence))
    if len(good) == 0:
        return 1.0
    if good[-1] == len(order) - 1:
        return MIN_CONFIDENCE
    return max(MIN_CONFIDENCE, float(confidence[good[-1]] + following[good[-1]]) / 2)


def measure_ece(confidence: np.ndarray, is_right: np.ndarray, num_bins: int = 15) -> float:
    """Expected calibration error: how far confidence and accuracy are apart, over bins of equal width, in [0, 1].

    Source: Naeini et al. 2015; 15 bins as in Guo et al. 2017.

    Args:
        confidence: (N,) in [0, 1].
        is_right: (N,) bool.
        num_bins: how many bins.
    """
    bins = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    gaps = np.bincount(bins, weights=is_right - confidence, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(confidence))


def fit_detector(net: DigitNet, images: Tensor, labels: Tensor, seed: int = 0, num_epochs: int = 8) -> Detector:
    """Train a detector of non-digits on the features of training digits and of near misses made from them.

    Args:
        net: the trained network, in evaluation mode.
        images: training digits (N, 1, 28, 28) uint8; with half as many near misses again.
        labels: (N,) int64.
        seed: of everything random; PyTorch's own generators are left as they were.
        num_epochs: passes over the features.
    """
    generator = torch.Generator().manual_seed(seed)
    digits = images.float() / 255
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        near = make_near_misses(digits[::2], labels[::2], generator)
        near = near[torch.randperm(len(near), generator=generator)[: len(digits) * 3 // 2]]
        features = torch.cat([extract_features(net, vary(digits, generator)), extract_features(net, near)])
        targets = torch.cat([torch.zeros(len(digits)), torch.ones(len(near))])
        return _train_detector(Detector(features.shape[1]), features, targets, num_epochs)


def vary(digits: Tensor, generator: torch.Generator) -> Tensor:
    """Digits as other people's pens and papers give them: a third as they are, two turned and shifted, one blurred."""
    plain, moved, blurred = (
        digits[0::3],
        *RandomAffine(15.0, 0.05)(torch.cat([digits[1::3], digits[2::3]])).split(
            [len(digits[1::3]), len(digits[2::3])]
        ),
    )
    width, gain = torch.rand(2, len(blurred), generator=generator)
    blurred = (blur(blurred, 0.4 + 0.5 * width) * (1 + 1.5 * gain)[:, None, None, None]).clamp(max=1)
    return torch.cat([plain, moved, blurred])


def _train_detector(detector: Detector, features: Tensor, targets: Tensor, num_epochs: int) -> Detector:
    roots = features[targets == 0].sqrt()
    detector.mean.copy_(roots.mean(0))
    detector.scale.copy_(roots.std(0) + 0.05 * roots.std(0).mean())  # some features are zero for every digit
    batch_size = 128
    num_steps = max(100, num_epochs * len(features) // batch_size)
    optimizer = torch.optim.AdamW(detector.parameters(), 1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for _ in range(num_steps):
        batch = torch.randint(len(features), (batch_size,))
        loss = F.binary_cross_entropy_with_logits(detector(features[batch]), targets[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return detector.eval()
