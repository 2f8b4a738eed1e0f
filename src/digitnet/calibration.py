"""What a trained network's answers are worth: honest probabilities, when to doubt them, and what is no digit.

A checkpoint carries it; ``calibrate.py`` fits it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_CONFIDENCE = 0.5  # below, all other digits together are more likely


class Detector(nn.Module):
    """Tells digits from other pictures by the network's features (B, 2304): one hidden layer.

    Its scores (B,) are unbounded, high where there is no digit.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, num_features: int = 2304, num_hidden: int = 32) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("scale", torch.ones(num_features))
        self.hidden = nn.Linear(num_features, num_hidden)
        self.dropout = nn.Dropout(0.3)
        self.out = nn.Linear(num_hidden, 1)

    def forward(self, features: Tensor) -> Tensor:
        # A root, as features are many small values and few large ones.
        x = ((features.sqrt() - self.mean) / self.scale).clamp(-8, 8)
        x = self.dropout(F.relu(self.hidden(x)))  # (B, num_hidden)
        return self.out(x)[:, 0]


class Calibration(nn.Module):
    """Turns a DigitNet's features and logits into what its answers are worth.

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

    def forward(self, features: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Judge a batch.

        Args:
            features: (B, 2304), of ``DigitNet.extract``.
            logits: (B, 10).

        Returns:
            Probabilities (B, 10), and whether there is a digit (B,), bool.
        """
        probabilities = (logits / self.temperature).softmax(dim=1)
        return probabilities, self.detector(features) <= self.max_score

    @classmethod
    def from_state(cls, state: dict[str, Tensor] | None) -> Calibration:
        """A calibration as a checkpoint keeps it; the one that changes nothing where the checkpoint has none."""
        calibration = cls()
        if state is not None:
            calibration.load_state_dict(state)
        return calibration.eval()
