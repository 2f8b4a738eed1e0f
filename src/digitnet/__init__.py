"""digitnet: train an image classifier properly in PyTorch Lightning, on handwritten digits."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from digitnet.augment import RandomAffine, RandomWarp
    from digitnet.classifier import DigitClassifier
    from digitnet.data import MNISTDataModule, fetch_digits
    from digitnet.distillation import Teacher
    from digitnet.disturb import RandomDisturbance
    from digitnet.model import DigitNet, UprightNet, ZoomNet
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
    "Teacher",
    "UprightNet",
    "ZoomNet",
    "fetch_digits",
]

_HOMES = {
    "augment": ("RandomAffine", "RandomWarp"),
    "classifier": ("DigitClassifier",),
    "data": ("MNISTDataModule", "fetch_digits"),
    "distillation": ("Teacher",),
    "disturb": ("RandomDisturbance",),
    "model": ("DigitNet", "UprightNet", "ZoomNet"),
    "selection": ("HardExamples",),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: importing torch takes seconds that ``--help`` should not."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"digitnet.{home}"), name)
    raise AttributeError(f"module 'digitnet' has no attribute {name!r}")
