"""Digits drawn by code, as a hand would on paper, and a small network that has learnt to read them.

What drives the page needs a network that truly reads drawings, within seconds and without MNIST. Digits bundled with
scikit-learn do not teach that: they have 8x8 pixels.
"""

from __future__ import annotations

from pathlib import Path

import lightning
import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.nn.functional import cross_entropy

from digitnet.apply.imaging import normalize
from digitnet.calibration import Calibration
from digitnet.model import DigitNet

Points = list[tuple[float, float]]  # x to the right, y down, shares of the paper's side


def arc(x: float, y: float, width: float, height: float, start: float, end: float) -> Points:
    """Points on an ellipse around (x, y), angles in quarter turns clockwise from the top."""
    angles = np.linspace(start, end, 24) * np.pi / 2
    return [(float(x + width * np.sin(a)), float(y - height * np.cos(a))) for a in angles]


# Strokes of each digit, in the order of a hand.
STROKES: dict[int, list[Points]] = {
    0: [arc(0.5, 0.5, 0.2, 0.3, 0, -4)],
    1: [[(0.42, 0.3), (0.52, 0.2), (0.52, 0.8)]],
    2: [[*arc(0.5, 0.36, 0.18, 0.16, -1, 1.4), (0.32, 0.8), (0.7, 0.8)]],
    3: [[*arc(0.48, 0.35, 0.17, 0.15, -0.8, 2), *arc(0.48, 0.65, 0.2, 0.16, 0, 2.9)]],
    4: [[(0.42, 0.2), (0.3, 0.58), (0.72, 0.58)], [(0.6, 0.36), (0.58, 0.82)]],
    5: [[(0.38, 0.2), (0.35, 0.46), *arc(0.47, 0.62, 0.2, 0.18, -0.3, 2.8)], [(0.38, 0.2), (0.68, 0.2)]],
    6: [[(0.58, 0.2), (0.4, 0.42), *arc(0.5, 0.64, 0.17, 0.17, -1, -5)]],
    7: [[(0.3, 0.22), (0.7, 0.22), (0.45, 0.8)]],
    8: [[*arc(0.5, 0.35, 0.15, 0.15, 2, -2), *arc(0.5, 0.66, 0.18, 0.16, 0, 4)]],
    9: [[*arc(0.49, 0.37, 0.17, 0.17, 1, -3), (0.64, 0.5), (0.58, 0.82)]],
}


def render(strokes: list[Points], width: float = 0.065, side: int = 112) -> Image.Image:
    """Strokes in black on white paper, drawn four times too large and scaled down, for smooth edges."""
    large = Image.new("L", (4 * side, 4 * side), 255)
    pen, radius = ImageDraw.Draw(large), 2 * width * side
    for points in strokes:
        scaled = [(4 * side * x, 4 * side * y) for x, y in points]
        pen.line(scaled, fill=0, width=round(2 * radius), joint="curve")
        for x, y in (scaled[0], scaled[-1]):
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=0)
    return large.resize((side, side), Image.Resampling.BOX)


def sway(strokes: list[Points], random: np.random.Generator) -> list[Points]:
    """The same digit by another hand: slanted, stretched, and every point a little off."""
    turn = np.eye(2) + random.uniform(-0.2, 0.2, (2, 2))
    bend, phase = random.uniform(0, 0.04, 2), random.uniform(0, 2 * np.pi, 2)
    swayed = []
    for points in strokes:
        at = (np.array(points) - 0.5) @ turn.T
        at += bend * np.sin(5 * at[:, ::-1] + phase) + random.normal(0, 0.004, at.shape)
        swayed.append([(float(x), float(y)) for x, y in at + 0.5])
    return swayed


def train_on_drawings(checkpoint: Path, num_each: int = 60) -> None:
    """Write a checkpoint that reads drawings: DigitNet with its first, random convolutions, and a trained head."""
    random, labels, images = np.random.default_rng(0), [], []
    for _ in range(num_each):
        for digit, strokes in STROKES.items():
            digit28 = normalize(render(sway(strokes, random), random.uniform(0.045, 0.085)))
            assert digit28 is not None
            images.append(digit28.image)
            labels.append(digit)
    targets = torch.tensor(labels)

    net = DigitNet()
    head = torch.nn.Sequential(net.fc1, torch.nn.ReLU(), net.dropout, net.fc2, torch.nn.ReLU(), net.fc3)
    features: list[torch.Tensor] = []
    hook = net.fc1.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    with torch.no_grad():
        for batch in torch.from_numpy(np.stack(images))[:, None].split(100):
            net(batch)
    hook.remove()
    known = torch.cat(features)  # (N, 2304)
    optimizer = torch.optim.Adam(head.parameters())
    for _ in range(12):
        for index in torch.randperm(len(known)).split(32):
            optimizer.zero_grad()
            cross_entropy(head(known[index]), targets[index]).backward()
            optimizer.step()
    save_checkpoint(net, checkpoint)


def save_checkpoint(net: DigitNet, checkpoint: Path) -> None:
    """Write what ``fit`` would, as far as ``Predictor`` needs it; confidences stay as they are."""
    weights = {f"net.{name}": weight for name, weight in net.state_dict().items()}
    calibration = Calibration()
    calibration.max_score.fill_(1e9)  # as of a detector that is content with everything
    stored = {"state_dict": weights, "calibration": calibration.state_dict()}
    torch.save({**stored, "pytorch-lightning_version": lightning.__version__}, checkpoint)
