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
from digitnet.machine import choose_precision
from digitnet.model import Committee, Network, run_in_batches, to_levels
from digitnet.near_misses import blur, make_near_misses

TARGET_ACCURACY = 0.999  # of the answers that are not called uncertain
REJECTED = 0.0075  # share of the validation digits that are called no digit; fewer of the test digits, which are easier
ENERGY_WEIGHT = 0.2
NUM_EPOCHS, BATCH_SIZE, MAX_LR = 15, 128, 2e-3  # of the detector's training


def fit_calibration(
    net: Network, train: DigitDataset, val: DigitDataset, num_digits: int, seed: int = 0
) -> Calibration:
    """Fit a calibration to a trained network.

    Args:
        net: the network; left in evaluation mode.
        train: the training digits.
        val: the validation digits.
        num_digits: how many training digits, evenly spread, the detector learns from; 0 for none that detects.
        seed: of everything random; PyTorch's own generators are left as they were (but for that of a Mac's GPU).

    Returns:
        The calibration, on the CPU, in evaluation mode.
    """
    device = next(net.parameters()).device
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda):  # its detector draws weights
        calibration = Calibration()
    logits = run_in_batches(net.eval(), val.images)
    temperature = fit_temperature(logits, val.labels)
    confidence = (logits.double() / temperature).softmax(dim=1).amax(dim=1)
    calibration.temperature.fill_(temperature)
    calibration.min_confidence.fill_(choose_threshold(confidence.numpy()))
    if num_digits:
        picks = torch.linspace(0, len(train) - 1, min(num_digits, len(train))).long()
        with torch.random.fork_rng(cuda):
            torch.manual_seed(seed)
            generator = torch.Generator().manual_seed(seed)
            calibration.detector = fit_detector(train.images[picks], train.labels[picks], device, generator)
        # Logarithms of mean probabilities have no energy to tell.
        calibration.energy_weight.fill_(0.0 if isinstance(net, Committee) else ENERGY_WEIGHT)
        fit_max_score(calibration, logits, val.images)
    return calibration.cpu().eval()


def fit_max_score(calibration: Calibration, logits: Tensor, images: Tensor) -> None:
    """Set the score above which there is no digit.

    Args:
        calibration: with its detector, on the device.
        logits: (N, 10) of the network on the images, on the CPU.
        images: validation digits (N, 1, 28, 28) uint8.
    """
    scores = run_in_batches(calibration.detector, images)
    scores -= calibration.energy_weight.cpu() * logits.logsumexp(dim=1)
    calibration.max_score.fill_(float(scores.quantile(1 - REJECTED, interpolation="higher")))


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The number to divide logits (N, 10) by that makes the labels (N,) most likely, in [0.5, 10].

    Bounded below, as a few hundred images that are all read right would make 0 the likeliest.

    Source: Guo et al. 2017, On Calibration of Modern Neural Networks, arXiv 1706.04599.
    """
    logits = logits.double()

    def loss(log_temperature: float) -> float:
        return float(F.cross_entropy(logits / np.exp(log_temperature), labels))

    bounds = np.log([0.5, 10])
    return float(np.exp(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6}).x))


def choose_threshold(confidence: np.ndarray, accuracy: float = TARGET_ACCURACY) -> float:
    """The lowest confidence from which on answers are right often enough, going by their calibrated confidence.

    The mistakes themselves are not counted: where one answer in 1,000 may be wrong, as many of MNIST's labels are.

    Args:
        confidence: (N,) in [0, 1], the calibrated probability of each answer.
        accuracy: how often the answers from the threshold on must be right, in [0, 1].

    Returns:
        A threshold in [0.5, 1]; 1 where not even the most confident answer is right often enough.
    """
    falling = np.sort(confidence)[::-1]
    num_good = int((np.cumsum(1 - falling) <= (1 - accuracy) * np.arange(1, len(falling) + 1)).sum())
    return max(MIN_CONFIDENCE, float(falling[num_good - 1])) if num_good else 1.0


def fit_detector(images: Tensor, labels: Tensor, device: torch.device, generator: torch.Generator) -> Detector:
    """Train a detector of non-digits on digits and on near misses made of them.

    Args:
        images: training digits (N, 1, 28, 28) uint8; about twice as many near misses are made of them.
        labels: (N,) int64.
        device: where to train.
        generator: what is drawn from, on the CPU; PyTorch's own generator is drawn from, too.

    Returns:
        The detector, on the device, in evaluation mode.
    """
    detector = Detector().to(memory_format=torch.channels_last).to(device)
    precision, _ = choose_precision(device.type)
    digits = to_levels(images)
    pictures = torch.cat([digits, make_near_misses(digits, labels, generator, 2 * len(digits))])
    targets = torch.cat([labels, labels.new_full((len(pictures) - len(digits),), 10)])
    batch_size = min(BATCH_SIZE, len(pictures))
    num_steps = len(pictures) // batch_size
    optimizer = torch.optim.AdamW(detector.parameters())
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, MAX_LR, NUM_EPOCHS * num_steps)
    for _ in range(NUM_EPOCHS):
        for rows in torch.randperm(len(pictures), generator=generator).split(batch_size)[:num_steps]:
            batch = vary(pictures[rows], generator).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
                logits = detector.classify(batch)
            loss = F.cross_entropy(logits.float(), targets[rows].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    return detector.eval()


def vary(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures as other people's pens and papers give them: two thirds turned and shifted, half of those blurred too.

    Args:
        pictures: (B, 1, 28, 28) in [0, 1], on the CPU; their order stays.
        generator: decides how blurred and how bright.
    """
    third = len(pictures) // 3
    turned = RandomAffine(15.0, 0.05)(pictures[third:])
    width, gain = torch.rand(2, third, generator=generator)
    blurred = (blur(turned[:third], 0.4 + 0.5 * width) * (1 + 1.5 * gain)[:, None, None, None]).clamp(max=1)
    return torch.cat([pictures[:third], blurred, turned[third:]])
