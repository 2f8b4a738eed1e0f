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
from digitnet.calibration import MIN_CONFIDENCE, NUM_TRAITS, Calibration, Detector, describe
from digitnet.data import DigitDataset
from digitnet.model import DigitNet
from digitnet.near_misses import blur, make_near_misses

TARGET_ACCURACY = 0.999  # of the answers that are not called uncertain
REJECTED = 0.01  # share of the validation digits that are called no digit
NUM_EPOCHS, BATCH_SIZE = 8, 128  # of the detector's training


def fit_calibration(
    net: DigitNet, train: DigitDataset, val: DigitDataset, num_digits: int, seed: int = 0
) -> Calibration:
    """Fit a calibration to a trained network.

    Args:
        net: the network; left in evaluation mode.
        train: the training digits.
        val: the validation digits.
        num_digits: how many training digits, evenly spread, the detector learns from; 0 for none that detects.
        seed: of everything random; PyTorch's own generators are left as they were.
    """
    net.eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        calibration = Calibration()
        if num_digits:
            picks = torch.linspace(0, len(train) - 1, min(num_digits, len(train))).long()
            generator = torch.Generator().manual_seed(seed)
            fit_detector(calibration.detector, net, train.images[picks], train.labels[picks], generator)
    traits, logits = inspect(net, val.images)
    temperature = fit_temperature(logits, val.labels)
    confidence = (logits.double() / temperature).softmax(dim=1).amax(dim=1)
    calibration.temperature.fill_(temperature)
    calibration.min_confidence.fill_(choose_threshold(confidence.numpy()))
    if num_digits:
        with torch.no_grad():
            scores = calibration.detector(traits)
        calibration.max_score.fill_(float(scores.quantile(1 - REJECTED, interpolation="higher")))
    return calibration.eval()


def inspect(net: DigitNet, images: Tensor, batch_size: int = 250) -> tuple[Tensor, Tensor]:
    """Traits (N, NUM_TRAITS) and logits (N, 10) of images (N, 1, 28, 28); float32, on the CPU."""
    device = next(net.parameters()).device
    traits, logits = torch.empty(len(images), NUM_TRAITS), torch.empty(len(images), 10)
    with torch.no_grad():
        for start in range(0, len(images), batch_size):
            rows = slice(start, start + batch_size)
            middle, features = net.extract(images[rows].to(device))
            found = net.classify(features)
            traits[rows], logits[rows] = describe(middle, features, found), found
    return traits, logits


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


def choose_threshold(confidence: np.ndarray, accuracy: float = TARGET_ACCURACY) -> float:
    """The lowest confidence from which on answers are right often enough, going by their calibrated confidence.

    Not by counting mistakes: of 1,000 answers one may be wrong, and of MNIST's labels as many are.

    Args:
        confidence: (N,) in [0, 1], the calibrated probability of each answer.
        accuracy: how often the answers from the threshold on must be right, in [0, 1].

    Returns:
        A threshold in [0.5, 1]; 1 where not even the most confident answer is right often enough.
    """
    falling = np.sort(confidence)[::-1]
    num_good = int((np.cumsum(1 - falling) <= (1 - accuracy) * np.arange(1, len(falling) + 1)).sum())
    return max(MIN_CONFIDENCE, float(falling[num_good - 1])) if num_good else 1.0


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


def fit_detector(detector: Detector, net: DigitNet, images: Tensor, labels: Tensor, generator: torch.Generator) -> None:
    """Train a detector of non-digits on what the network makes of digits, and of near misses made from them.

    Args:
        detector: left in evaluation mode.
        net: the trained network, in evaluation mode.
        images: training digits (N, 1, 28, 28) uint8; up to twice as many near misses are made of them.
        labels: (N,) int64.
        generator: what the near misses are drawn from; PyTorch's own generator is drawn from, too.
    """
    digits = images.float() / 255
    near = make_near_misses(digits[::2], labels[::2], generator)
    near = near[torch.randperm(len(near), generator=generator)[: 2 * len(digits)]]
    traits, _ = inspect(net, torch.cat([vary(digits, generator), near]))
    targets = (torch.arange(len(traits)) >= len(digits)).float()
    known = traits[: len(digits)]
    detector.mean.copy_(known.mean(0))
    detector.scale.copy_(known.std(0) + 0.05 * known.std(0).mean())  # some traits hardly vary among digits
    num_steps = max(100, NUM_EPOCHS * len(traits) // BATCH_SIZE)
    optimizer = torch.optim.AdamW(detector.parameters(), 1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    detector.train()
    for _ in range(num_steps):
        batch = torch.randint(len(traits), (BATCH_SIZE,))
        loss = F.binary_cross_entropy_with_logits(detector(traits[batch]), targets[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    detector.eval()


def vary(digits: Tensor, generator: torch.Generator) -> Tensor:
    """Digits as other people's pens and papers give them: two thirds turned and shifted, half of those blurred too."""
    plain, num_moved = digits[0::3], len(digits[1::3])
    turned = RandomAffine(15.0, 0.05)(torch.cat([digits[1::3], digits[2::3]]))
    moved, blurred = turned[:num_moved], turned[num_moved:]
    width, gain = torch.rand(2, len(blurred), generator=generator)
    blurred = (blur(blurred, 0.4 + 0.5 * width) * (1 + 1.5 * gain)[:, None, None, None]).clamp(max=1)
    return torch.cat([plain, moved, blurred])
