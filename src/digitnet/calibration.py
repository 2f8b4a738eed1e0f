"""What a trained network's answers are worth: honest probabilities, when to doubt them, and what is no digit.

A checkpoint carries a calibration; ``calibrate.py`` fits it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from digitnet.model import DigitNet

MIN_CONFIDENCE = 0.5  # below, all other digits together are more likely
NUM_TRAITS = 128 * 9 + 2304 + 10


class Detector(nn.Module):
    """Tells digits from other pictures by what DigitNet makes of them: one hidden layer."""

    mean: Tensor
    scale: Tensor

    def __init__(self, num_hidden: int = 32) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(NUM_TRAITS))
        self.register_buffer("scale", torch.ones(NUM_TRAITS))
        self.hidden = nn.Linear(NUM_TRAITS, num_hidden)
        self.dropout = nn.Dropout(0.3)
        self.out = nn.Linear(num_hidden, 1)

    def forward(self, traits: Tensor) -> Tensor:
        """Scores (B,), unbounded, high where there is no digit, of traits (B, NUM_TRAITS)."""
        x = ((traits - self.mean) / self.scale).clamp(-8, 8)
        x = self.dropout(F.relu(self.hidden(x)))  # (B, num_hidden)
        return self.out(x)[:, 0]


def describe(middle: Tensor, features: Tensor, logits: Tensor) -> Tensor:
    """Traits (B, NUM_TRAITS) for a Detector: both kinds of features of ``DigitNet.extract``, and the sorted logits."""
    coarse = F.avg_pool2d(middle, 3, 2).flatten(1)  # (B, 128 * 9)
    ranked = logits.sort(dim=1, descending=True).values
    return torch.cat([coarse.sqrt(), features.sqrt(), ranked], dim=1)  # roots: many features are small, few large


class Calibration(nn.Module):
    """What the answers of one trained network are worth.

    As made, it changes nothing: temperature 1, uncertain below 0.5, and everything is a digit.
    """

    temperature: Tensor
    min_confidence: Tensor
    max_score: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("temperature", torch.tensor(1.0))
        self.register_buffer("min_confidence", torch.tensor(MIN_CONFIDENCE))
        self.register_buffer("max_score", torch.tensor(torch.inf))
        self.detector = Detector()

    @classmethod
    def from_state(cls, state: dict[str, Tensor] | None) -> Calibration:
        """A calibration as a checkpoint keeps it; the one that changes nothing where the checkpoint has none."""
        calibration = cls()
        if state is not None:
            calibration.load_state_dict(state)
        return calibration.eval()


class CalibratedNet(nn.Module):
    """A DigitNet and its calibration in one: from images to answers.

    Args:
        net: the network.
        calibration: what its answers are worth.
    """

    def __init__(self, net: DigitNet, calibration: Calibration) -> None:
        super().__init__()
        self.net = net
        self.calibration = calibration

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Read images (B, 1, 28, 28), uint8 in [0, 255] or floating point in [0, 1].

        Returns:
            Calibrated probabilities (B, 10), logits (B, 10) as they were, and whether there is a digit (B,), bool.
        """
        middle, features = self.net.extract(images)
        logits = self.net.classify(features)
        probabilities = (logits / self.calibration.temperature).softmax(dim=1)
        scores = self.calibration.detector(describe(middle, features, logits))
        return probabilities, logits, scores <= self.calibration.max_score
