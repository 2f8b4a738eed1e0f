"""MNIST decoded on disk: verified whenever it is opened, written whole or not at all, by one process at a time."""

from __future__ import annotations

import contextlib
import hashlib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_info

from digitnet.errors import say_why
from digitnet.files import PART, replace_whole

# SHA-256 of mnist_784's 70,000 decoded images and labels, C order, uint8: the same from OpenML and from the classic
# files. Source: computed from the classic files, whose published MD5 sums match. They fix the class counts as well.
MNIST_SHA256 = {
    "images": "5b92582eb909c82a9bfefcd44acbe9233be3eb5b419a44cf211022ad2bf4bf96",
    "labels": "671ff9d70b4811116d55c3dd479efa7a981e2e62753ef7a6d5c15fea81e63d27",
}
LOCK_TIMEOUT_S = 900  # longer than a slow download takes


class Digits(NamedTuple):
    """Images (N, 28, 28) uint8 in [0, 255], and their labels (N,) uint8 in [0, 9]."""

    images: np.ndarray
    labels: np.ndarray


def verify_mnist(digits: Digits) -> None:
    """Raise ValueError unless these are the 70,000 digits of mnist_784, byte for byte and in order."""
    if digits.images.shape != (70_000, 28, 28) or digits.labels.shape != (70_000,):
        raise ValueError(f"not MNIST: images {digits.images.shape}, labels {digits.labels.shape}")
    for name, expected in MNIST_SHA256.items():
        found = hashlib.sha256(getattr(digits, name).data).hexdigest()
        if found != expected:
            raise ValueError(f"altered MNIST: SHA-256 of the {name} is {found[:12]}..., not {expected[:12]}...")


def load_cache(path: Path) -> Digits:
    """The digits that ``write_cache`` wrote, verified.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it cannot be read or does not hold MNIST; the message says why.
    """
    try:
        with open_npz(path) as arrays:
            digits = Digits(arrays["images"], arrays["labels"])
        verify_mnist(digits)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged file can fail in any way
        raise ValueError(say_why(error)) from error
    return digits


def write_cache(path: Path, digits: Digits) -> None:
    """Write all or nothing."""
    with replace_whole(path) as part, part.open("wb") as file:
        np.savez(file, images=digits.images, labels=digits.labels)


@contextlib.contextmanager
def hold_lock(path: Path) -> Iterator[None]:
    """Let one process at a time make ``path``; a killed one lets go, and what it left half-written is removed.

    Where no lock can be had, go on without: on a disk that cannot be written or does not know locks, or when another
    process keeps it for longer than any download takes. Nothing breaks then: the same bytes are fetched twice.
    """
    lock = FileLock(f"{path}.lock")
    with contextlib.suppress(OSError, NotImplementedError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            rank_zero_info(f"waiting for another process that fetches MNIST (it holds {lock.lock_file})")
            lock.acquire(timeout=LOCK_TIMEOUT_S)
        for abandoned in path.parent.glob(f"{PART}*-{path.name}"):
            abandoned.unlink(missing_ok=True)
    try:
        yield
    finally:
        lock.release()


def open_npz(path: Path) -> Any:
    """An .npz file to take arrays from; nothing in it is ever unpickled."""
    with path.open("rb") as file:  # np.load takes whatever is no zip for a pickle, and advises to trust it
        if not zipfile.is_zipfile(file):
            raise ValueError("empty, cut short or not an .npz file")
    return np.load(path, allow_pickle=False)
