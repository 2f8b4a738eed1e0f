"""Reads digits with a trained checkpoint: what ``predict`` and ``serve`` share."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from digitnet.calibration import CalibratedNet, Calibration, read_calibration
from digitnet.checkpoints import find_newest, load_net
from digitnet.model import Network

log = logging.getLogger(__name__)

BATCH_SIZE = 128  # images at once; more are no faster on a CPU, and take 0.4 MB each
Status = Literal["ok", "uncertain", "no digit"]


class Reading(NamedTuple):
    """What the network reads in one image; probabilities are calibrated, in [0, 1]."""

    digit: int | None  # the best guess; None where there is no digit
    confidence: float  # probability of the best guess
    runner_up: int
    runner_up_confidence: float
    probabilities: tuple[float, ...]  # ten, of the digits 0 to 9; their sum is 1
    status: Status


class Predictor:
    """A trained network with its calibration, ready to read images; safe to share between threads.

    Args:
        net: the network; it is put into evaluation mode.
        calibration: what its answers are worth; without one, its probabilities are raw and every picture is a digit.
    """

    def __init__(self, net: Network, calibration: Calibration | None = None) -> None:
        # float32 also where bfloat16 would be faster: the same image reads the same on every machine.
        net = net.float().to(memory_format=torch.channels_last)
        self.model = CalibratedNet(net, calibration or Calibration()).eval()
        self.is_calibrated = calibration is not None

    @classmethod
    def load(cls, checkpoint: Path | None = None) -> Predictor:
        """Load a checkpoint; nothing in it is executed.

        Args:
            checkpoint: the file; None takes the newest run's best.

        Raises:
            FileNotFoundError: no checkpoint is given, and there is none.
            ValueError: the file is not a DigitClassifier's checkpoint.
        """
        path = checkpoint or find_newest("best.ckpt")
        net, stored = load_net(path)
        if "calibration" not in stored:
            log.warning("%s holds no calibration (fit adds it): confidences are raw, and any picture is a digit", path)
            return cls(net)
        calibration = read_calibration(stored, path)
        if not calibration.has_detector:
            log.warning("%s has no detector of non-digits (its config leaves it out): any picture is a digit", path)
        return cls(net, calibration)

    @torch.inference_mode()
    def read(self, images: np.ndarray) -> list[Reading]:
        """Read the digit in each image.

        Args:
            images: (N, 28, 28) uint8, bright ink on 0, as MNIST has them; N may be 0.

        Raises:
            ValueError: another shape or dtype.
        """
        if images.ndim != 3 or images.shape[1:] != (28, 28) or images.dtype != np.uint8:
            raise ValueError(f"images are {images.dtype} {list(images.shape)}; they must be uint8 [N, 28, 28]")
        min_confidence = float(self.model.calibration.min_confidence)
        readings: list[Reading] = []
        images = np.require(images, requirements=["C", "W"])  # of others, such as Pillow's, PyTorch warns
        for batch in torch.from_numpy(images)[:, None].split(BATCH_SIZE):
            probabilities, _, is_digit = self.model(batch)  # (B, 10), (B, 10), (B,)
            top = probabilities.topk(2)
            for row, digits, values, found in zip(
                probabilities.tolist(), top.indices.tolist(), top.values.tolist(), is_digit.tolist(), strict=True
            ):
                status: Status = "no digit" if not found else "uncertain" if values[0] < min_confidence else "ok"
                readings.append(
                    Reading(digits[0] if found else None, values[0], digits[1], values[1], tuple(row), status)
                )
        return readings
