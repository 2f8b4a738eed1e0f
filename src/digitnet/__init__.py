"""digitnet: train an image classifier properly in PyTorch Lightning, on handwritten digits."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from digitnet.augment import RandomAffine, RandomWarp
    from digitnet.classifier import DigitClassifier
    from digitnet.data import MNISTDataModule, fetch_digits
    from digitnet.distillation import Teacher
    from digitnet.disturb import RandomDisturbance
    from digitnet.model import DigitNet, ResidualNet, UprightNet, UprightResidualNet, ZoomNet, ZoomResidualNet
    from digitnet.selection import HardExamples

__version__ = "0.1.0"
__all__ = [
    "DigitClassifier",
    "DigitNet",
    "HardExamples",
    "MNISTDataModule",
    "RandomAffine",
    "RandomDisturbance",
    "RandomWarp",
    "ResidualNet",
    "Teacher",
    "UprightNet",
    "UprightResidualNet",
    "ZoomNet",
    "ZoomResidualNet",
    "fetch_digits",
]

_HOMES = {
    "DigitClassifier": "classifier",
    "DigitNet": "model",
    "HardExamples": "selection",
    "MNISTDataModule": "data",
    "RandomAffine": "augment",
    "RandomDisturbance": "disturb",
    "RandomWarp": "augment",
    "ResidualNet": "model",
    "Teacher": "distillation",
    "UprightNet": "model",
    "UprightResidualNet": "model",
    "ZoomNet": "model",
    "ZoomResidualNet": "model",
    "fetch_digits": "data",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: importing torch takes seconds that ``--help`` should not."""
    if name in _HOMES:
        return getattr(import_module(f"digitnet.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'digitnet' has no attribute {name!r}")
