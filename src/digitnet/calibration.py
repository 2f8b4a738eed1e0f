"""What a trained network's answers are worth: honest probabilities, when to doubt them, and what is no digit.

A checkpoint carries a calibration; ``calibrate.py`` fits it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from digitnet.model import Network, to_levels

MIN_CONFIDENCE = 0.5  # below, all other digits together are more likely


class Detector(nn.Module):
    """Tells digits from other pictures: a small network of its own, 70,443 parameters.

    Of its own, as what the network makes of a picture leaves out what makes it none of the ten. Eleven classes, the ten
    digits and everything else: it tells more than one that need only learn "digit or not". Source of the eleventh:
    Thulasidasan et al. 2021, arXiv 2105.07107.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, kernel_size=5, padding=2)
        self.conv2 = nn.Conv2d(16, 32, kernel_size=3, padding=1)
        self.conv3 = nn.Conv2d(32, 32, kernel_size=3, padding=1)
        self.conv4 = nn.Conv2d(32, 64, kernel_size=3, padding=1)
        self.fc1 = nn.Linear(64 * 3 * 3, 64)
        self.fc2 = nn.Linear(64, 11)
        self.pool = nn.MaxPool2d(2)
        self.dropout = nn.Dropout(0.3)

    def forward(self, images: Tensor) -> Tensor:
        """Scores (B,), the logarithm of the odds that there is no digit; ``images`` as for ``classify``."""
        logits = self.classify(images)
        return logits[:, 10] - logits[:, :10].logsumexp(dim=1)

    def classify(self, images: Tensor) -> Tensor:
        """Logits (B, 11) of the digits 0 to 9, and of everything else.

        Args:
            images: (B, 1, 28, 28), uint8 in [0, 255] or floating point in [0, 1].
        """
        x = to_levels(images)  # (B, 1, 28, 28)
        x = F.relu(self.pool(self.conv1(x)))  # (B, 16, 14, 14)
        x = F.relu(self.conv2(x))  # (B, 32, 14, 14)
        x = F.relu(self.pool(self.conv3(x)))  # (B, 32, 7, 7)
        x = F.relu(self.pool(self.conv4(x)))  # (B, 64, 3, 3)
        x = F.relu(self.fc1(self.dropout(x.flatten(1))))  # (B, 64)
        return self.fc2(x)


class Calibration(nn.Module):
    """What the answers of one trained network are worth.

    As made, it changes nothing: temperature 1, uncertain below 0.5, and everything is a digit.
    """

    temperature: Tensor  # what logits are divided by
    min_confidence: Tensor  # below, an answer is uncertain
    energy_weight: Tensor  # what the network's own doubt counts for beside the detector's score
    max_score: Tensor  # above, there is no digit

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("temperature", torch.tensor(1.0))
        self.register_buffer("min_confidence", torch.tensor(MIN_CONFIDENCE))
        self.register_buffer("energy_weight", torch.tensor(0.0))
        self.register_buffer("max_score", torch.tensor(torch.inf))
        self.detector = Detector()

    def score(self, images: Tensor, logits: Tensor) -> Tensor:
        """How unlike a digit images (B, 1, 28, 28) are, with the network's logits (B, 10) of them: (B,), unbounded.

        Source of the second part: Liu et al. 2020, Energy-based Out-of-distribution Detection, arXiv 2010.03759.
        """
        return self.detector(images) - self.energy_weight * logits.logsumexp(dim=1)

    @property
    def has_detector(self) -> bool:
        """Whether something may be no digit."""
        return bool(self.max_score < torch.inf)


def read_calibration(checkpoint: dict[str, Any], path: Path) -> Calibration:
    """The calibration that a checkpoint, read from ``path``, holds; the one that changes nothing where it holds none.

    Raises:
        ValueError: it is of another version.
    """
    calibration = Calibration().eval()
    try:
        if "calibration" in checkpoint:
            calibration.load_state_dict(checkpoint["calibration"])
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: its calibration is of another version of digitnet; fit again") from error
    return calibration


class CalibratedNet(nn.Module):
    """A network and its calibration in one: from images to answers.

    Args:
        net: the network.
        calibration: what its answers are worth.
    """

    def __init__(self, net: Network, calibration: Calibration) -> None:
        super().__init__()
        self.net = net
        self.calibration = calibration

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Read images (B, 1, 28, 28), uint8 in [0, 255] or floating point in [0, 1].

        Returns:
            Calibrated probabilities (B, 10), logits (B, 10) as they were, and whether there is a digit (B,), bool.
        """
        logits = self.net(images)
        probabilities = (logits / self.calibration.temperature).softmax(dim=1)
        return probabilities, logits, self.calibration.score(images, logits) <= self.calibration.max_score
