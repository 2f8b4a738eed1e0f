"""Where digits come from, and how they reach the network.

``fetch_digits`` finds, verifies and caches the images; ``MNISTDataModule`` cuts them into training, validation and
test sets. Pixels stay uint8 from disk to device; ink is bright (255) and paper is 0, as in MNIST.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import lightning as L
import numpy as np
import torch
from filelock import FileLock
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

# SHA-256 of mnist_784's 70,000 decoded images and labels, C order, uint8: the same from OpenML and from the classic
# files. Source: computed from the classic files, whose published MD5 sums match.
MNIST_SHA256 = {
    "images": "5b92582eb909c82a9bfefcd44acbe9233be3eb5b419a44cf211022ad2bf4bf96",
    "labels": "671ff9d70b4811116d55c3dd479efa7a981e2e62753ef7a6d5c15fea81e63d27",
}
SOCKET_TIMEOUT_S = 30
NUM_TRIES = 3
LOCK_TIMEOUT_S = 900  # a slow download by another process; longer means that it hangs


class Digits(NamedTuple):
    """Images (N, 28, 28) uint8 in [0, 255], and their labels (N,) uint8 in [0, 9]."""

    images: np.ndarray
    labels: np.ndarray


# --- sources -----------------------------------------------------------------------------------------------------------


def fetch_digits(source: str = "mnist", data_dir: str | Path | None = None) -> Digits:
    """Return a data set, from the cache where it is there, else from where it comes from.

    Args:
        source: "mnist" for OpenML's mnist_784, or torchvision's mirror of the same digits when OpenML cannot be had
            (70,000 images, verified by SHA-256); "digits" for scikit-learn's bundled 8x8 digits, scaled up (1,797
            images, no network); else the path of a file or folder of your own, see ``load_file``.
        data_dir: where downloads and the decoded cache are kept; scikit-learn's data home by default
            (``SCIKIT_LEARN_DATA``, or ``~/scikit_learn_data``).

    Raises:
        ValueError: the source is no name and no file, or a file does not hold digits.
        OSError: MNIST cannot be had from anywhere; the message lists each attempt.
    """
    if source == "digits":
        return load_bundled_digits()
    if source == "mnist":
        return _fetch_mnist(_data_home(data_dir))
    return load_file(Path(source))


def _data_home(data_dir: str | Path | None) -> Path:
    from sklearn.datasets import get_data_home

    return Path(get_data_home(data_dir))


def _fetch_mnist(home: Path) -> Digits:
    cache = home / "digitnet" / "mnist_784.npz"
    if (digits := _load_cache(cache)) is not None:
        return digits
    with _lock(cache):
        if (digits := _load_cache(cache)) is not None:  # another process was faster
            return digits
        digits = _download_mnist(home, cache)
        try:
            _write_cache(cache, digits)
        except OSError as error:
            rank_zero_info(f"cannot keep a cache at {cache} ({error}); each run will read the source again")
    return digits


def _download_mnist(home: Path, cache: Path) -> Digits:
    failures: dict[str, None] = {}  # in order, each told once
    for name, fetch in (("OpenML mnist_784", _fetch_openml), ("torchvision's MNIST mirror", _fetch_mirror)):
        for attempt in range(NUM_TRIES):
            time.sleep(2.0**attempt if attempt else 0)
            try:
                with _socket_timeout(SOCKET_TIMEOUT_S):
                    digits = fetch(home)
                verify_mnist(digits)
                return digits
            except Exception as error:  # a server can fail in any way; each one is told below
                reason = " ".join(str(error).split()) or type(error).__name__
                rank_zero_info(f"{name}, try {attempt + 1} of {NUM_TRIES}: {reason}")
                failures[f"{name}: {reason}"] = None
    raise OSError(
        f"MNIST cannot be had after {NUM_TRIES} tries each. {'; '.join(failures)}. The decoded cache would be {cache}. Offline, copy that file from "
        "a machine that has it, or give files of your own with --data.source PATH (IDX folder, .npz or .arff); "
        "or train on the digits bundled with scikit-learn: python -m digitnet fit --config configs/quickstart.yaml"
    )


def _fetch_openml(home: Path) -> Digits:
    from sklearn.datasets import fetch_openml

    # The parser that survives pandas 3 and the fastest one (1.8 s, 275 MiB), because it is told the type of every column.
    pixels, labels = fetch_openml(
        "mnist_784",
        version=1,
        data_home=str(home),
        as_frame=False,
        parser="pandas",
        read_csv_kwargs={"dtype": np.uint8},
        return_X_y=True,
        n_retries=1,
    )
    return Digits(np.ascontiguousarray(pixels, np.uint8).reshape(-1, 28, 28), labels.astype(np.uint8))


def _fetch_mirror(home: Path) -> Digits:
    from torchvision.datasets import MNIST

    with tempfile.TemporaryDirectory(dir=home) as folder:
        parts = [MNIST(folder, train=train, download=True) for train in (True, False)]
        return Digits(*(torch.cat([getattr(p, k) for p in parts]).numpy().astype(np.uint8) for k in ("data", "targets")))


def verify_mnist(digits: Digits) -> None:
    """Raise ValueError unless these are the 70,000 digits of mnist_784, byte for byte and in order."""
    if digits.images.shape != (70_000, 28, 28) or digits.labels.shape != (70_000,):
        raise ValueError(f"not MNIST: images {digits.images.shape}, labels {digits.labels.shape}")
    for name, expected in MNIST_SHA256.items():
        found = hashlib.sha256(getattr(digits, name).data).hexdigest()
        if found != expected:
            raise ValueError(f"altered MNIST: SHA-256 of the {name} is {found[:12]}..., not {expected[:12]}...")


def load_bundled_digits() -> Digits:
    """scikit-learn's 1,797 digits of 8x8 pixels, made to look like MNIST: 20x20, centre of mass in the middle of 28x28.

    Source: ``sklearn.datasets.load_digits``, the test set of UCI's "Optical Recognition of Handwritten Digits", 43
    writers. Their order is kept.
    """
    from sklearn.datasets import load_digits

    small, labels = load_digits(return_X_y=True)
    boxes = torch.from_numpy(small).float().view(-1, 1, 8, 8) * (255 / 16)
    boxes = nn.functional.interpolate(boxes, size=(20, 20), mode="bicubic").clamp_(0, 255).round_()[:, 0]
    images = torch.zeros(len(boxes), 28, 28)
    ramp = torch.arange(20.0) + 0.5
    mass = boxes.sum(dim=(1, 2))
    tops = (14 - (boxes.sum(2) @ ramp) / mass).round().int().clamp(0, 8)  # where the box's first row goes
    lefts = (14 - (boxes.sum(1) @ ramp) / mass).round().int().clamp(0, 8)
    for image, box, top, left in zip(images, boxes, tops.tolist(), lefts.tolist(), strict=True):
        image[top : top + 20, left : left + 20] = box
    return Digits(images.to(torch.uint8).numpy(), labels.astype(np.uint8))


def load_file(path: Path) -> Digits:
    """Read digits that are already on disk.

    Args:
        path: a folder of the four classic IDX files (``train-images-idx3-ubyte`` and so on, plain or ``.gz``; training
            images first); an ``.npz`` with ``images`` and ``labels``, or Keras' ``x_train, y_train, x_test, y_test``; or
            an ``.arff`` or ``.arff.gz`` of 784 pixels and a class.

    Raises:
        ValueError: nothing there, not one of these formats, damaged, or not digits of 28x28 pixels.
    """
    if not path.exists():
        raise ValueError(f'data.source is "{path}": no such file; give mnist, digits, or the path of your digits')
    readers: list[tuple[bool, Callable[[Path], tuple[np.ndarray, np.ndarray]]]] = [
        (path.is_dir(), _read_idx_folder),
        (path.suffix == ".npz", _read_npz),
        (path.name.endswith((".arff", ".arff.gz")), _read_arff),
    ]
    reader = next((read for matches, read in readers if matches), None)
    if reader is None:
        raise ValueError(f"{path} is neither a folder of IDX files nor an .npz, .arff or .arff.gz")
    try:
        images, labels = reader(path)
    except Exception as error:  # a damaged file can fail in any way
        raise ValueError(f"cannot read digits from {path}: {' '.join(str(error).split())}") from error
    images = images.reshape(len(images), -1)
    if images.shape[1] != 784 or len(images) == 0 or labels.shape != (len(images),):
        raise ValueError(f"{path} holds images {images.shape} and labels {labels.shape}; expected (N, 784) and (N,)")
    for name, array, top in (("pixels", images, 255), ("labels", labels, 9)):
        if array.min() < 0 or array.max() > top or not np.array_equal(array, array.astype(np.uint8)):
            raise ValueError(f"{path} has {name} that are not whole numbers from 0 to {top}")
    digits = Digits(np.ascontiguousarray(images, np.uint8).reshape(-1, 28, 28), labels.astype(np.uint8))
    try:
        verify_mnist(digits)
        rank_zero_info(f"{path}: verified, mnist_784 byte for byte")
    except ValueError:
        rank_zero_info(f"{path}: {len(digits.labels):,} digits, not the 70,000 of mnist_784")
    return digits


def _read_idx_folder(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    parts: dict[str, list[np.ndarray]] = {"images-idx3": [], "labels-idx1": []}
    for subset in ("train", "t10k"):
        for kind, arrays in parts.items():
            stem = folder / f"{subset}-{kind}-ubyte"
            data = stem.read_bytes() if stem.exists() else gzip.decompress(stem.with_name(stem.name + ".gz").read_bytes())
            ndim = data[3]
            if data[:3] != b"\0\0\x08" or ndim != int(kind[-1]):
                raise ValueError(f"{stem.name} does not start as an IDX file of {kind[-1]}-dimensional bytes")
            shape = np.frombuffer(data, ">u4", count=ndim, offset=4)
            arrays.append(np.frombuffer(data, np.uint8, offset=4 + 4 * ndim).reshape(shape))
    return np.concatenate(parts["images-idx3"]), np.concatenate(parts["labels-idx1"])


def _read_npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        if "images" in file:
            return file["images"], file["labels"]
        return np.concatenate([file["x_train"], file["x_test"]]), np.concatenate([file["y_train"], file["y_test"]])


def _read_arff(path: Path) -> tuple[np.ndarray, np.ndarray]:
    import pandas as pd

    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt") as file:
        if not any(line.strip().lower() == "@data" for line in file):
            raise ValueError("no @DATA line")
        table = pd.read_csv(file, header=None, comment="%", dtype=np.uint8).to_numpy()
    return table[:, :-1], table[:, -1]


# --- cache -------------------------------------------------------------------------------------------------------------


def _load_cache(path: Path) -> Digits | None:
    """The verified cache; None when it is not there, or damaged (said in one line)."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            digits = Digits(file["images"], file["labels"])
        verify_mnist(digits)
        return digits
    except Exception as error:  # a damaged zip file can fail in any way
        rank_zero_info(f"the cache {path} is damaged ({' '.join(str(error).split())}); replacing it")
        return None


def _write_cache(path: Path, digits: Digits) -> None:
    """Write all or nothing: a temporary file in the same folder, forced to disk, then renamed into place."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, suffix=".part", delete=False) as file:
        try:
            np.savez(file, images=digits.images, labels=digits.labels)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Let one process at a time make ``path``. Where no lock can be made (a read-only disk), go on without."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(str(path) + ".lock", timeout=LOCK_TIMEOUT_S)
        lock.acquire()
    except OSError:
        yield
        return
    with lock:
        lock.release()  # the with statement holds it a second time
        yield


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """scikit-learn and torchvision open URLs without a time-out of their own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


# --- to the network ----------------------------------------------------------------------------------------------------


class DigitDataset(Dataset[tuple[Tensor, Tensor]]):
    """Digits in memory, fetched a batch at a time: one indexing per batch instead of one per image.

    Args:
        digits: the images and labels.
    """

    def __init__(self, digits: Digits) -> None:
        self.images = torch.from_numpy(digits.images)[:, None]  # (N, 1, 28, 28) uint8
        self.labels = torch.from_numpy(digits.labels).long()  # (N,) int64

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """A whole batch: images (B, 1, 28, 28) uint8 and labels (B,) int64."""
        picks = torch.tensor(indices)
        return self.images[picks], self.labels[picks]


def keep_batch(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The collate function of a data set whose ``__getitems__`` returns whole batches."""
    return batch


class MNISTDataModule(L.LightningDataModule):
    """Digits cut in order into training, validation and test sets; training images augmented on the batch's device.

    Args:
        source: "mnist" (OpenML's mnist_784, or a mirror of it), "digits" (scikit-learn's bundled digits, no network), or
            the path of your own IDX folder, .npz or .arff.
        data_dir: where downloads and the decoded cache are kept; scikit-learn's data home by default
            (SCIKIT_LEARN_DATA, or ~/scikit_learn_data).
        split: how many images to train, validate and test on, in this order from the first; they must add up to all
            there are. [60000, 5000, 5000] is the write-up's; [55000, 5000, 10000] ends in MNIST's classic test set.
        batch_size: training images a step, on each device.
        eval_batch_size: validation and test images a step.
        augmentation: what is done to each training batch, a torchvision transform or any module from images to images;
            nothing by default.

    Raises:
        ValueError: the split does not add up, or a size is not positive.
    """

    def __init__(
        self,
        source: str = "mnist",
        data_dir: str | None = None,
        split: tuple[int, int, int] = (60_000, 5_000, 5_000),
        batch_size: int = 32,
        eval_batch_size: int = 500,
        augmentation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size), ("split", min(split))):
            if value < 1:
                raise ValueError(f"data.{name} is {split if name == 'split' else value}; it must be at least 1")
        self.source = source
        self.data_dir = data_dir
        self.split = tuple(split)
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.augmentation = augmentation
        self.datasets: list[DigitDataset] = []

    def setup(self, stage: str) -> None:
        # No prepare_data: a file lock already lets one process of a machine download while the others wait.
        if self.datasets:
            return
        self.seed = torch.initial_seed()
        digits = fetch_digits(self.source, self.data_dir)
        if sum(self.split) != len(digits.labels):
            raise ValueError(
                f"data.split {list(self.split)} adds up to {sum(self.split):,}, but {self.source} has "
                f"{len(digits.labels):,} images; the three numbers must add up to all of them"
            )
        ends = np.cumsum(self.split)
        self.datasets = [
            DigitDataset(Digits(digits.images[end - n : end], digits.labels[end - n : end]))
            for n, end in zip(self.split, ends, strict=True)
        ]

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        dataset = self.datasets[0]
        # Also with one process: its order depends on the seed and the epoch alone, so a resumed run sees the same.
        world_size, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        sampler = DistributedSampler(dataset, world_size, rank, shuffle=True, seed=self.seed)
        return self._loader(dataset, self.batch_size, sampler)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return self._loader(self.datasets[1], self.eval_batch_size)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return self._loader(self.datasets[2], self.eval_batch_size)

    def _loader(
        self, dataset: DigitDataset, batch_size: int, sampler: DistributedSampler[int] | None = None
    ) -> DataLoader[tuple[Tensor, Tensor]]:
        # A generator of its own, or making an iterator would draw from the one that augmentation and dropout use.
        return DataLoader(
            dataset, batch_size, sampler=sampler, collate_fn=keep_batch, generator=torch.Generator().manual_seed(0)
        )

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Augment a training batch where it is now: on the device. Validation and test batches pass untouched."""
        if self.augmentation is None or self.trainer is None or not self.trainer.training:
            return batch
        images, labels = batch
        return self.augmentation(images), labels
