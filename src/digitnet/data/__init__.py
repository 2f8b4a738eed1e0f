"""Where digits come from, and how they reach the network.

``fetch_digits`` finds, verifies and caches the images; ``MNISTDataModule`` cuts them into training, validation and
test sets. Pixels stay uint8 from disk to device; ink is bright (255) and paper is 0, as in MNIST.
"""

from digitnet.data.cache import Digits, verify_mnist
from digitnet.data.module import DigitDataset, MNISTDataModule, find_data
from digitnet.data.sources import fetch_digits, load_bundled_digits, load_file

__all__ = [
    "DigitDataset",
    "Digits",
    "MNISTDataModule",
    "fetch_digits",
    "find_data",
    "load_bundled_digits",
    "load_file",
    "verify_mnist",
]
