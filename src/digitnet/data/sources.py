"""Where digits come from: OpenML or a mirror of it, files of one's own, or the digits bundled with scikit-learn."""

from __future__ import annotations

import contextlib
import gzip
import logging
import math
import re
import socket
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.nn.functional import interpolate

from digitnet.data.cache import Digits, hold_lock, load_cache, open_npz, verify_mnist, write_cache
from digitnet.errors import say_why

log = logging.getLogger(__name__)

# A server that sends nothing for this long has failed. One that trickles may be a slow line, so a download as a whole
# has no limit: Ctrl-C is safe at any moment, and other processes wait for LOCK_TIMEOUT_S, then fetch for themselves.
SOCKET_TIMEOUT_S = 20.0
NAMES = ("mnist", "digits")  # of sources; anything else is a path
NUM_TRIES = 3  # of each source, 2 and 4 seconds apart


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
        OSError: MNIST cannot be had from anywhere (the message lists each attempt), or ``data_dir`` cannot be used.
    """
    if source == "digits":
        return load_bundled_digits()
    if source == "mnist":
        return _fetch_mnist(_data_home(data_dir))
    return load_file(source)


# --- MNIST ------------------------------------------------------------------------------------------------------------


def _data_home(data_dir: str | Path | None) -> Path:
    from sklearn.datasets import get_data_home

    try:
        return Path(get_data_home(data_dir))
    except OSError as error:
        raise OSError(
            f"no folder to keep data in: {say_why(error)}; name one you can write with --data.data_dir DIR or "
            "the environment variable SCIKIT_LEARN_DATA"
        ) from error


def _fetch_mnist(home: Path) -> Digits:
    cache = home / "digitnet" / "mnist_784.npz"
    with contextlib.suppress(FileNotFoundError, ValueError):  # said below, by the one process that replaces it
        return load_cache(cache)
    with hold_lock(cache):
        try:
            return load_cache(cache)  # another process was faster
        except FileNotFoundError:
            state = f"There is no cache at {cache}"
            rank_zero_info(f"fetching MNIST (15 MB unless scikit-learn has it), to be kept at {cache}")
        except ValueError as error:
            state = f"The cache {cache} cannot be used ({error})"
            log.warning("the cache %s cannot be used (%s); replacing it", cache, error)
        digits = _download_mnist(home, state)
        try:
            write_cache(cache, digits)
        except OSError as error:
            remedy = "each run fetches MNIST anew; --data.data_dir DIR keeps it elsewhere"
            log.warning("cannot keep a cache at %s (%s); %s", cache, say_why(error), remedy)
    return digits


def _download_mnist(home: Path, cache_state: str) -> Digits:
    sources = {"OpenML mnist_784": _fetch_openml, "torchvision's MNIST mirror": _fetch_mirror}
    failures: Counter[str] = Counter()
    for attempt in range(NUM_TRIES):
        if attempt:
            time.sleep(2**attempt)
        for name, fetch in sources.items():  # in turn: one that is down then costs one failure, not three
            try:
                with _socket_timeout(SOCKET_TIMEOUT_S):
                    digits = fetch(home)
                verify_mnist(digits)
                return digits
            except Exception as error:  # a server can fail in any way; each one is told
                log.warning("%s, try %d of %d: %s", name, attempt + 1, NUM_TRIES, say_why(error))
                failures[f"{name}: {say_why(error)}"] += 1
    attempts = "; ".join(f"{failure} ({count}x)" for failure, count in failures.items())
    raise OSError(
        f"MNIST cannot be had. {attempts}. {cache_state}. Offline, copy that file from a machine that has it; or give "
        "digits of your own with --data.source PATH (a folder of IDX files, .npz or .arff); or train on those bundled "
        "with scikit-learn: python -m digitnet fit --config configs/quickstart.yaml"
    )


def _fetch_openml(home: Path) -> Digits:
    from sklearn.datasets import fetch_openml

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "A network error occurred")  # ours tells more
        # The parser that survives pandas 3 and the fastest (1.8 s, 275 MiB), as it is told the type of every column.
        # scikit-learn keeps its download under ``home``, and removes it again should it turn out damaged.
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

    with tempfile.TemporaryDirectory(prefix="digitnet-") as folder:
        MNIST(folder, download=True)  # the test images, too
        return Digits(*_read_idx_folder(Path(folder, "MNIST", "raw")))


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """scikit-learn and torchvision open URLs without a time-out of their own; this one is the whole process's."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


# --- bundled digits ---------------------------------------------------------------------------------------------------


def load_bundled_digits() -> Digits:
    """scikit-learn's 1,797 digits of 8x8 pixels, made to look like MNIST: 20x20 in 28x28, centre of mass in [14, 15].

    Source: ``sklearn.datasets.load_digits``, the test set of UCI's "Optical Recognition of Handwritten Digits", 43
    writers. Their order is kept.
    """
    from sklearn.datasets import load_digits

    small, labels = load_digits(return_X_y=True)
    boxes = torch.from_numpy(small).float().view(-1, 1, 8, 8) * (255 / 16)
    boxes = interpolate(boxes, size=(20, 20), mode="bicubic").clamp_(0, 255).round_()[:, 0]  # (N, 20, 20)
    images = torch.zeros(len(boxes), 28, 28)
    ramp = torch.arange(20.0) + 0.5
    mass = boxes.sum(dim=(1, 2))
    tops = (14.5 - (boxes.sum(2) @ ramp) / mass).round().int().clamp(0, 8)  # where the box's first row goes
    lefts = (14.5 - (boxes.sum(1) @ ramp) / mass).round().int().clamp(0, 8)
    for image, box, top, left in zip(images, boxes, tops.tolist(), lefts.tolist(), strict=True):
        image[top : top + 20, left : left + 20] = box
    return Digits(images.to(torch.uint8).numpy(), labels.astype(np.uint8))


# --- files of one's own -----------------------------------------------------------------------------------------------


def load_file(path: str | Path) -> Digits:
    """Read digits that are already on disk.

    Args:
        path: a folder of the four classic IDX files (``train-images-idx3-ubyte`` and so on, plain or ``.gz``; training
            images first); an ``.npz`` with ``images`` and ``labels``, or Keras' ``x_train, y_train, x_test, y_test``;
            or an ``.arff`` or ``.arff.gz`` of 784 pixels and a class.

    Raises:
        ValueError: nothing there, not one of these formats, damaged, or not digits of 28x28 pixels.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise ValueError(f'data.source is "{path}": no such file; give mnist, digits, or the path of your digits')
    read: Callable[[Path], tuple[np.ndarray, np.ndarray]]
    if path.is_dir():
        read = _read_idx_folder
    elif path.suffix == ".npz":
        read = _read_npz
    elif path.name.endswith((".arff", ".arff.gz")):
        read = _read_arff
    else:
        raise ValueError(
            f"{path} is neither a folder of IDX files nor an .npz, .arff or .arff.gz; README.md makes an .npz"
        )
    try:
        digits = _check_digits(*read(path))
    except Exception as error:  # a damaged file can fail in any way
        raise ValueError(f"cannot read digits from {path}: {say_why(error)}") from error
    try:
        verify_mnist(digits)
        rank_zero_info(f"{path}: verified, mnist_784 byte for byte")
    except ValueError:
        rank_zero_info(f"{path}: {len(digits.labels):,} digits, others than mnist_784's")
        upper_and_lower, left_and_right = digits.images[:, [0, -1]], digits.images[:, :, [0, -1]]
        if (upper_and_lower.mean() + left_and_right.mean()) / 2 > 127.5:
            rank_zero_info(f"{path}: dark ink on bright paper, it seems; give 255 - images, or predict will misread")
    return digits


def _check_digits(images: np.ndarray, labels: np.ndarray) -> Digits:
    """Digits of arrays from anywhere, or ValueError: nothing is cast or reshaped that could lose something."""
    if images.shape[1:] not in ((784,), (28, 28), (28, 28, 1), (1, 28, 28)) or len(images) == 0:
        raise ValueError(f"it holds images of shape {images.shape}; expected (N, 28, 28) or (N, 784)")
    if labels.shape != (len(images),):
        raise ValueError(f"it holds {len(images):,} images but labels of shape {labels.shape}; expected one for each")
    if images.dtype.kind in "bf" and images.any() and images.min() >= 0 and images.max() <= 1:
        raise ValueError("it holds pixels of up to 1; expected levels from 0 to 255: multiply them by 255, and round")
    for name, array, top in (("pixels", images, 255), ("labels", labels, 9)):
        if array.dtype.kind not in "uif" or not (array.min() >= 0 and array.max() <= top and (array % 1 == 0).all()):
            raise ValueError(f"it holds {name} that are not whole numbers from 0 to {top}")
    if images.max() == 1:
        raise ValueError("it holds pixels of 0 and 1 alone; expected levels from 0 to 255, so multiply them by 255")
    return Digits(np.ascontiguousarray(images, np.uint8).reshape(-1, 28, 28), labels.astype(np.uint8))


def _read_idx_folder(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    images = [_read_idx(folder, f"{subset}-images", ndim=3) for subset in ("train", "t10k")]
    labels = [_read_idx(folder, f"{subset}-labels", ndim=1) for subset in ("train", "t10k")]
    if [len(part) for part in images] != [len(part) for part in labels]:
        raise ValueError("its image files and label files do not hold equally many")
    return np.concatenate(images), np.concatenate(labels)


def _read_idx(folder: Path, name: str, ndim: int) -> np.ndarray:
    """An IDX file of bytes: a magic number, the size of each dimension as big-endian uint32, then the values."""
    names = [f"{name}{dot}idx{ndim}-ubyte{gz}" for gz in ("", ".gz") for dot in ("-", ".")]  # both spellings are about
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise ValueError(f"it has no {names[0]}, nor {names[0]}.gz; of pictures README.md makes an .npz")
    data = path.read_bytes()
    try:
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    except Exception as error:  # EOFError, OSError or zlib.error
        raise ValueError(f"{path.name}: {say_why(error)}") from error
    start = 4 + 4 * ndim
    shape = [int.from_bytes(data[i : i + 4], "big") for i in range(4, start, 4)]
    if data[:4] != bytes([0, 0, 8, ndim]) or len(data) != start + math.prod(shape):
        raise ValueError(f"{path.name} is not a whole IDX file of bytes in {ndim} dimensions")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _read_npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with open_npz(path) as arrays:
        if {"images", "labels"} <= set(arrays):
            return arrays["images"], arrays["labels"]
        if {"x_train", "y_train", "x_test", "y_test"} <= set(arrays):
            images, labels = [arrays["x_train"], arrays["x_test"]], [arrays["y_train"], arrays["y_test"]]
            return np.concatenate(images), np.concatenate(labels)
        raise ValueError(f"it has {', '.join(arrays)}; expected images, labels or x_train, y_train, x_test, y_test")


def _read_arff(path: Path) -> tuple[np.ndarray, np.ndarray]:
    import pandas as pd

    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        attributes = []
        for line in map(str.strip, file):
            if line.lower() == "@data":
                break
            if line.lower().startswith("@attribute"):
                attributes.append(line)
        else:
            raise ValueError("it has no @DATA line")
        if any(re.search(r"\{|^@attribute\s+\W?(class|label)\b", line, re.IGNORECASE) for line in attributes[:-1]):
            raise ValueError("its class is not its last attribute; expected 784 pixels, then the class")
        # Not as uint8: some versions of pandas make a 0 of 256.
        table = pd.read_csv(file, header=None, comment="%", quotechar="'", dtype=np.float32).to_numpy()
    if not ((table >= 0) & (table <= 255) & (table % 1 == 0)).all():
        raise ValueError("it has values that are not whole numbers from 0 to 255")
    table = table.astype(np.uint8)
    return table[:, :-1], table[:, -1]
