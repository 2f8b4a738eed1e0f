"""Digits from every source, whole or with one clear line; and what reaches the network. No network is used."""

from __future__ import annotations

import fcntl
import gc
import gzip
import hashlib
import http.server
import io
import multiprocessing
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from digitnet.data import (
    DigitDataset,
    Digits,
    MNISTDataModule,
    cache,
    fetch_digits,
    load_bundled_digits,
    load_file,
    module,
    sources,
    verify_mnist,
)

FORK = multiprocessing.get_context("fork")  # children start at once, without importing everything again
forks = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


# --- the real MNIST ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mnist(mnist_home: Path | None) -> Digits:
    """The real MNIST."""
    if mnist_home is None:
        pytest.skip("MNIST is not at hand: fetch it once with python -m digitnet fit, or set SCIKIT_LEARN_DATA")
    return fetch_digits("mnist", mnist_home)


def no_network(host: str, *args: Any, **kwargs: Any) -> None:
    raise OSError(f"{host}: tests use no network")


def test_mnist_is_the_classic_one(mnist: Digits) -> None:
    verify_mnist(mnist)
    train, test = mnist.labels[:60_000], mnist.labels[60_000:]
    assert train[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert test[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert np.bincount(train).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(test).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert mnist.images[:60_000].mean() / 255 == pytest.approx(0.1307, abs=5e-5)  # as in PyTorch's MNIST example


def test_cache_opens_quickly(mnist: Digits, tmp_path: Path) -> None:
    path = tmp_path / "mnist.npz"
    cache.write_cache(path, mnist)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        cache.load_cache(path)
        seconds.append(time.perf_counter() - start)
    path.unlink()
    assert min(seconds) < 0.2


def test_default_split_is_the_write_ups(mnist: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("digitnet.data.module.fetch_digits", lambda source, data_dir: mnist)
    data = MNISTDataModule()
    data.setup("fit")
    for dataset, start, end in zip(data.datasets, (0, 60_000, 65_000), (60_000, 65_000, 70_000), strict=True):
        assert np.array_equal(dataset.images[:, 0].numpy(), mnist.images[start:end])
        assert np.array_equal(dataset.labels.numpy(), mnist.labels[start:end])


# --- a stand-in for MNIST and for those who serve it ------------------------------------------------------------------


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Digits:
    """70,000 made-up digits that pass for MNIST, as their digests take the place of its own."""
    images = np.zeros((70_000, 28, 28), np.uint8)
    images[:, 14, 14] = np.arange(70_000) % 251
    labels = (np.arange(70_000) % 10).astype(np.uint8)
    for name, array in (("images", images), ("labels", labels)):
        monkeypatch.setitem(cache.MNIST_SHA256, name, hashlib.sha256(array.data).hexdigest())
    return Digits(images, labels)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A data home; emptied afterwards, as a cache takes 55 MB."""
    (tmp_path / "home").mkdir()
    yield tmp_path / "home"
    shutil.rmtree(tmp_path / "home")


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between tries, noted instead of waited."""
    naps: list[float] = []
    monkeypatch.setattr(sources, "time", SimpleNamespace(sleep=naps.append))
    return naps


Answer = Digits | Exception


def serve(monkeypatch: pytest.MonkeyPatch, openml: list[Answer], mirror: list[Answer]) -> list[str]:
    """Let OpenML and the mirror give these answers in turn, the last one for ever; return who was asked, so far."""
    asked: list[str] = []

    def stand_in(name: str, answers: list[Answer]) -> Callable[[Path], Digits]:
        def fetch(home: Path) -> Digits:
            answer = answers[min(asked.count(name), len(answers) - 1)]
            asked.append(name)
            if isinstance(answer, Exception):
                raise answer
            return answer

        return fetch

    monkeypatch.setattr(sources, "_fetch_openml", stand_in("openml", openml))
    monkeypatch.setattr(sources, "_fetch_mirror", stand_in("mirror", mirror))
    return asked


def same(left: Digits, right: Digits) -> bool:
    return np.array_equal(left.images, right.images) and np.array_equal(left.labels, right.labels)


def cache_of(home: Path) -> Path:
    return home / "digitnet" / "mnist_784.npz"


# --- fetching ---------------------------------------------------------------------------------------------------------


def test_fetched_once_then_cached(fake: Digits, home: Path, naps: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = serve(monkeypatch, openml=[fake], mirror=[])
    assert same(fetch_digits("mnist", home), fake)
    assert same(fetch_digits("mnist", home), fake)
    assert asked == ["openml"]
    assert naps == []
    assert sorted(path.name for path in home.rglob("*.npz*")) == ["mnist_784.npz", "mnist_784.npz.lock"]
    (home / "plain").touch()
    assert cache_of(home).stat().st_mode == (home / "plain").stat().st_mode  # others may read it


def test_sources_take_turns_with_pauses(
    fake: Digits, home: Path, naps: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = serve(monkeypatch, openml=[OSError("down")], mirror=[OSError("down"), TimeoutError(), fake])
    assert same(fetch_digits("mnist", home), fake)
    assert asked == ["openml", "mirror"] * 3
    assert naps == [2, 4]


def test_offline_error_says_all(home: Path, naps: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = serve(monkeypatch, openml=[OSError("no\nroute")], mirror=[TimeoutError(), OSError("refused")])
    with pytest.raises(OSError, match=r"^MNIST cannot be had\.") as caught:
        fetch_digits("mnist", home)
    message = str(caught.value)
    assert "OpenML mnist_784: no route (3x)" in message
    assert "torchvision's MNIST mirror: TimeoutError (1x)" in message
    assert "torchvision's MNIST mirror: refused (2x)" in message
    assert f"There is no cache at {cache_of(home)}" in message
    assert "--data.source PATH" in message
    assert message.endswith("python -m digitnet fit --config configs/quickstart.yaml")
    assert "\n" not in message
    assert asked == ["openml", "mirror"] * 3
    assert naps == [2, 4]
    assert not cache_of(home).exists()


def test_altered_digits_are_refused_from_both(
    fake: Digits, home: Path, naps: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    altered = Digits(fake.images.copy(), fake.labels)
    altered.images[69_999, 27, 27] ^= 1
    swapped = Digits(fake.images, fake.labels[::-1].copy())
    serve(monkeypatch, openml=[altered], mirror=[swapped])
    with pytest.raises(OSError, match=r"SHA-256 of the images is .*SHA-256 of the labels is "):
        fetch_digits("mnist", home)
    serve(monkeypatch, openml=[Digits(fake.images[1:], fake.labels[1:])], mirror=[OSError("down")])
    with pytest.raises(OSError, match=r"not MNIST: images \(69999, 28, 28\)"):
        fetch_digits("mnist", home)
    assert not cache_of(home).exists()


def test_server_that_stalls_is_left(home: Path, naps: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(home: Path) -> Digits:
        us, server = socket.socketpair()
        with us, server:
            us.recv(1)  # the server never sends anything
        raise AssertionError

    monkeypatch.setattr(sources, "SOCKET_TIMEOUT_S", 0.05)
    monkeypatch.setattr(sources, "_fetch_openml", fetch)
    monkeypatch.setattr(sources, "_fetch_mirror", fetch)
    with pytest.raises(OSError, match=r"OpenML mnist_784: timed out \(3x\)"):
        fetch_digits("mnist", home)
    assert socket.getdefaulttimeout() is None


def test_mirror_is_torchvisions(fake: Digits, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = save_idx(tmp_path / "served", fake, num_train=60_000)

    def deliver(url: str, download_root: str, filename: str, md5: str) -> None:
        shutil.copy(served / filename.removesuffix(".gz"), download_root)

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", deliver)
    assert same(sources._fetch_mirror(home), fake)
    assert not list(home.iterdir())


# --- the cache --------------------------------------------------------------------------------------------------------


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def flip_one_byte(path: Path, fake: Digits) -> None:
    with path.open("r+b") as file:
        file.seek(30_000_000)
        byte = file.read(1)[0]
        file.seek(30_000_000)
        file.write(bytes([byte ^ 1]))


def alter_one_pixel(path: Path, fake: Digits) -> None:
    images = fake.images.copy()
    images[1234, 5, 6] ^= 1
    np.savez(path, images=images, labels=fake.labels)


def put_a_pickle(path: Path, fake: Digits) -> None:
    bomb = np.empty(1, dtype=object)
    bomb[0] = Bomb(path.with_name("unpickled"))
    np.savez(path, images=bomb, labels=fake.labels)


DAMAGES: dict[str, tuple[Callable[[Path, Digits], Any], str]] = {
    "one byte flipped": (flip_one_byte, "Bad CRC-32"),
    "one pixel altered": (alter_one_pixel, "altered MNIST: SHA-256 of the images"),
    "cut short": (lambda path, fake: os.truncate(path, 40_000_000), "empty, cut short or not an .npz file"),
    "empty": (lambda path, fake: os.truncate(path, 0), "empty, cut short or not an .npz file"),
    "text": (lambda path, fake: path.write_text("404 Not Found"), "empty, cut short or not an .npz file"),
    "other arrays": (lambda path, fake: np.savez(path, weights=np.zeros(3)), "images is not a file in the archive"),
    "a pickle": (put_a_pickle, "Object arrays cannot be loaded"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_cache_is_said_and_replaced(
    fake: Digits, home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    asked = serve(monkeypatch, openml=[fake], mirror=[])
    path = cache_of(home)
    cache.write_cache(path, fake)
    spoil, reason = DAMAGES[damage]
    spoil(path, fake)

    assert same(fetch_digits("mnist", home), fake)
    [line] = caplog.messages
    assert line.startswith(f"the cache {path} cannot be used (")
    assert line.endswith("); replacing it")
    assert reason in line
    assert "\n" not in line
    assert same(cache.load_cache(path), fake)
    assert asked == ["openml"]
    assert not path.with_name("unpickled").exists()


def test_damaged_cache_that_cannot_be_replaced(home: Path, naps: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, openml=[OSError("down")], mirror=[OSError("down")])
    cache_of(home).parent.mkdir()
    cache_of(home).write_bytes(b"damaged")
    with pytest.raises(OSError, match=r"The cache .*mnist_784\.npz cannot be used \(empty, cut short"):
        fetch_digits("mnist", home)
    assert cache_of(home).read_bytes() == b"damaged"


@pytest.mark.parametrize("obstacle", ["folder is a file", "cache is a folder", "disk is full"])
def test_digits_come_even_where_no_cache_can_be_kept(
    fake: Digits, home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, obstacle: str
) -> None:
    serve(monkeypatch, openml=[fake], mirror=[])
    if obstacle == "folder is a file":
        (home / "digitnet").touch()
    elif obstacle == "cache is a folder":
        cache_of(home).mkdir(parents=True)
    else:
        monkeypatch.setattr(os, "fsync", raise_disk_full)
    assert same(fetch_digits("mnist", home), fake)
    assert caplog.messages[-1].startswith(f"cannot keep a cache at {cache_of(home)} (")
    assert not list(home.rglob(".part-*"))


def raise_disk_full(descriptor: int) -> None:
    raise OSError(28, "No space left on device")


def test_data_home(fake: Digits, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, openml=[fake], mirror=[])
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(home))
    fetch_digits("mnist")
    assert cache_of(home).exists()
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match=r"no folder to keep data in: .*file.*; name one you can write with --data"):
            fetch_digits("mnist", path)


# --- servers that misbehave -------------------------------------------------------------------------------------------


class BadServer(http.server.BaseHTTPRequestHandler):
    """Serves the four classic files, each in the way that its folder's name says."""

    folder: Path

    def do_GET(self) -> None:
        way, name = self.path.strip("/").split("/")
        data = (self.folder / name).read_bytes()
        if way == "503":
            self.send_error(503, "Service Unavailable")
            return
        if way == "page":
            data = b"<html>We are sorry, something went wrong.</html>"
        elif way == "altered":
            data = gzip.compress(bytes(1000))
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if way == "stalls":
            self.wfile.write(data[:100])
            self.wfile.flush()
            time.sleep(0.4)
        elif way == "breaks":
            self.wfile.write(data[: len(data) // 2])
        else:
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def mirror(fake: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Let torchvision ask a server on this machine, and OpenML be down; called with the ways that it answers in."""
    from torchvision.datasets import MNIST

    folder = save_idx(tmp_path / "served", fake, num_train=60_000, suffix=".gz")
    names = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    files = [f"{name}-ubyte.gz" for name in names]
    digests = [(name, hashlib.md5((folder / name).read_bytes()).hexdigest()) for name in files]
    handler = type("Handler", (BadServer,), {"folder": folder})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.handle_error = lambda *args: None  # type: ignore[method-assign]  # a client that hangs up is no news
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(MNIST, "resources", digests)
    monkeypatch.setattr(sources, "SOCKET_TIMEOUT_S", 0.15)
    monkeypatch.setattr(sources, "_fetch_openml", lambda home: (_ for _ in ()).throw(OSError("down")))

    def answer(*ways: str) -> None:
        monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/{way}/" for way in ways])

    yield answer
    server.shutdown()
    server.server_close()
    gc.collect()  # here, where sockets that torchvision left open are let pass


BAD_ANSWERS = {
    "503": "HTTP Error 503",
    "page": "File not found or corrupted",
    "altered": "File not found or corrupted",
    "breaks": "",  # torchvision finds the digest wrong, or the connection closed
    "stalls": "timed out",
}


@pytest.mark.parametrize("way", BAD_ANSWERS)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # torchvision leaves sockets open
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_bad_server_is_told_and_nothing_of_it_is_kept(
    mirror: Callable[..., None], home: Path, naps: list[float], way: str
) -> None:
    mirror(way)
    with pytest.raises(OSError, match=r"^MNIST cannot be had\.") as caught:
        fetch_digits("mnist", home)
    message = str(caught.value)
    assert "torchvision's MNIST mirror: " in message
    assert BAD_ANSWERS[way] in message
    assert "\n" not in message
    assert not [path for path in home.rglob("*") if path.is_file() and path.suffix != ".lock"]


@pytest.mark.parametrize("way", ["503", "page", "breaks"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_a_good_mirror_stands_in_for_a_bad_one(
    mirror: Callable[..., None], fake: Digits, home: Path, naps: list[float], way: str
) -> None:
    mirror(way, "whole")
    assert same(fetch_digits("mnist", home), fake)
    assert same(cache.load_cache(cache_of(home)), fake)


# --- several processes ------------------------------------------------------------------------------------------------


@forks
def test_processes_that_start_together_fetch_once(
    fake: Digits, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(home: Path) -> Digits:
        (tmp_path / f"fetched by {os.getpid()}").touch()
        time.sleep(0.3)  # time enough for the others to fetch as well, were they not kept waiting
        return fake

    monkeypatch.setattr(sources, "_fetch_openml", fetch)
    barrier = FORK.Barrier(8)

    def work() -> None:
        barrier.wait()
        os._exit(0 if same(fetch_digits("mnist", home), fake) else 1)

    processes = [FORK.Process(target=work) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=30)
    assert [process.exitcode for process in processes] == [0] * 8
    assert len(list(tmp_path.glob("fetched by *"))) == 1


@forks
def test_killed_writer_leaves_no_half_cache(
    fake: Digits, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, openml=[fake], mirror=[])

    def write_half(file: io.BufferedWriter, **arrays: np.ndarray) -> None:
        file.write(arrays["images"].tobytes()[:1_000_000])
        file.flush()
        (tmp_path / "half").touch()
        time.sleep(60)

    def work() -> None:
        monkeypatch.setattr(np, "savez", write_half)
        fetch_digits("mnist", home)

    process = FORK.Process(target=work)
    process.start()
    deadline = time.monotonic() + 20
    while not (tmp_path / "half").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not cache_of(home).exists()
    assert len(list(home.rglob(".part-*"))) == 1

    assert same(fetch_digits("mnist", home), fake)  # the dead process holds no lock
    assert same(cache.load_cache(cache_of(home)), fake)
    assert not list(home.rglob(".part-*"))


def test_lock_that_never_opens(fake: Digits, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = serve(monkeypatch, openml=[fake], mirror=[])
    monkeypatch.setattr(cache, "LOCK_TIMEOUT_S", 0.1)
    cache_of(home).parent.mkdir()
    with cache_of(home).with_name("mnist_784.npz.lock").open("w") as other_process:
        fcntl.flock(other_process, fcntl.LOCK_EX)
        assert same(fetch_digits("mnist", home), fake)
    assert asked == ["openml"]


# --- files of one's own -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def few() -> Digits:
    """Twenty digits, 14 for training and 6 for testing."""
    digits = load_bundled_digits()
    return Digits(digits.images[:20], digits.labels[:20])


def save_idx(folder: Path, digits: Digits, num_train: int = 14, dot: str = "-", suffix: str = "") -> Path:
    folder.mkdir()
    for subset, part in (("train", slice(num_train)), ("t10k", slice(num_train, None))):
        for kind, array in zip(Digits._fields, digits, strict=True):
            data = bytes([0, 0, 8, array.ndim]) + np.array(array[part].shape, ">u4").tobytes() + array[part].tobytes()
            name = f"{subset}-{kind}{dot}idx{array.ndim}-ubyte{suffix}"
            (folder / name).write_bytes(gzip.compress(data, 1) if suffix else data)
    return folder


def save_npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def save_keras_npz(path: Path, digits: Digits) -> Path:
    (x_train, x_test), (y_train, y_test) = ((array[:14], array[14:]) for array in digits)
    return save_npz(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)


def save_arff(path: Path, digits: Digits, header: str = "% made up\n@RELATION few\n", data: str = "@DATA\n") -> Path:
    attributes = "".join(f"@ATTRIBUTE pixel{i} real\n" for i in range(784)) + "@ATTRIBUTE class {0,1,2,3,4,5,6,7,8,9}\n"
    rows = np.column_stack([digits.images.reshape(-1, 784), digits.labels])
    text = header + attributes + data + "".join(",".join(map(str, row)) + "\n" for row in rows.tolist())
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def quote_last(path: Path) -> Path:
    path.write_text(re.sub(r",(\d)$", r",'\1'", path.read_text(), flags=re.MULTILINE))
    return path


FORMATS: dict[str, Callable[[Path, Digits], Path]] = {
    "idx": lambda tmp, few: save_idx(tmp / "idx", few),
    "idx.gz": lambda tmp, few: save_idx(tmp / "idx", few, suffix=".gz"),
    "idx with a dot": lambda tmp, few: save_idx(tmp / "idx", few, dot="."),
    "npz": lambda tmp, few: save_npz(tmp / "few.npz", images=few.images, labels=few.labels),
    "npz of columns and floats": lambda tmp, few: save_npz(
        tmp / "few.npz", images=few.images.reshape(-1, 784).astype(float), labels=few.labels.astype(np.int64)
    ),
    "Keras' npz": lambda tmp, few: save_keras_npz(tmp / "few.npz", few),
    "arff": lambda tmp, few: save_arff(tmp / "few.arff", few),
    "arff.gz": lambda tmp, few: save_arff(tmp / "few.arff.gz", few, data="@data\n"),
    "arff of quoted classes": lambda tmp, few: quote_last(save_arff(tmp / "few.arff", few)),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_own_file(few: Digits, tmp_path: Path, kind: str) -> None:
    found = fetch_digits(str(FORMATS[kind](tmp_path, few)))
    assert same(found, few)
    assert found.images.dtype == found.labels.dtype == np.uint8


def test_own_digits_of_dark_ink_or_sorted_by_label_are_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(sources, "rank_zero_info", told.append)
    monkeypatch.setattr(module, "rank_zero_info", told.append)
    images, labels = load_bundled_digits()
    for name, some, order in (
        ("plain", images, slice(None)),
        ("dark", 255 - images, slice(None)),
        ("sorted", images, np.argsort(labels, kind="stable")),
        ("last class alone", images, np.argsort(np.where(labels == 9, 9, 0), kind="stable")),
        ("sorted, cut in the last class", images, np.argsort(labels, kind="stable")),
    ):
        split = (1700, 47, 50) if name == "sorted, cut in the last class" else (1297, 250, 250)
        told.clear()
        path = save_npz(tmp_path / f"{name}.npz", images=some[order], labels=labels[order])
        MNISTDataModule(source=str(path), split=split).setup("fit")
        assert any("dark ink on bright paper" in line for line in told) == (name == "dark")
        assert any("labelled 8, 9; shuffle" in line for line in told) == (name == "sorted")
        assert any("sorted by labels; shuffle it" in line for line in told) == name.startswith("sorted, cut")


def shorten(path: Path) -> Path:
    os.truncate(path, path.stat().st_size - 1)
    return path


def spoil_idx(folder: Path, name: str, data: bytes | None) -> Path:
    (folder / name).unlink()
    if data is not None:
        (folder / name).write_bytes(data)
    return folder


def with_one(array: np.ndarray, value: Any, dtype: Any) -> np.ndarray:
    array = array.astype(dtype)
    array[3] = value
    return array


BAD_FILES: dict[str, tuple[Callable[[Path, Digits], Path], str]] = {
    "missing": (lambda tmp, few: tmp / "none.npz", "no such file; give mnist, digits, or the path"),
    "unknown kind": (
        lambda tmp, few: Path(shutil.copy(__file__, tmp / "few.csv")),
        "neither a folder of IDX files nor",
    ),
    "empty folder": (lambda tmp, few: tmp, "it has no train-images-idx3-ubyte, nor train-images-idx3-ubyte.gz"),
    "idx without labels": (
        lambda tmp, few: spoil_idx(save_idx(tmp / "idx", few), "t10k-labels-idx1-ubyte", None),
        "it has no t10k-labels-idx1-ubyte",
    ),
    "idx cut short": (
        lambda tmp, few: shorten(save_idx(tmp / "idx", few) / "t10k-images-idx3-ubyte").parent,
        "t10k-images-idx3-ubyte is not a whole IDX file of bytes in 3 dimensions",
    ),
    "idx empty": (
        lambda tmp, few: spoil_idx(save_idx(tmp / "idx", few), "train-labels-idx1-ubyte", b""),
        "train-labels-idx1-ubyte is not a whole IDX file of bytes in 1 dimensions",
    ),
    "idx of another kind": (
        lambda tmp, few: spoil_idx(save_idx(tmp / "idx", few), "train-labels-idx1-ubyte", b"\0\0\x09\1\0\0\0\0"),
        "train-labels-idx1-ubyte is not a whole IDX file",
    ),
    "idx.gz cut short": (
        lambda tmp, few: shorten(save_idx(tmp / "idx", few, suffix=".gz") / "train-images-idx3-ubyte.gz").parent,
        "train-images-idx3-ubyte.gz: Compressed file ended",
    ),
    "idx of unequal length": (
        lambda tmp, few: spoil_idx(save_idx(tmp / "idx", few), "t10k-labels-idx1-ubyte", b"\0\0\x08\1\0\0\0\0"),
        "do not hold equally many",
    ),
    "npz cut short": (
        lambda tmp, few: shorten(save_npz(tmp / "few.npz", images=few.images, labels=few.labels)),
        "cut short or not an .npz file",
    ),
    "npz of other arrays": (lambda tmp, few: save_npz(tmp / "few.npz", x=few.images), "it has x; expected images"),
    "npz of objects": (
        lambda tmp, few: save_npz(tmp / "few.npz", images=few.images.astype(object), labels=few.labels),
        "Object arrays cannot be loaded",
    ),
    "other sizes": (
        lambda tmp, few: save_npz(tmp / "few.npz", images=few.images.reshape(-1, 14, 56), labels=few.labels),
        "images of shape (20, 14, 56); expected (N, 28, 28)",
    ),
    "no images": (
        lambda tmp, few: save_npz(tmp / "few.npz", images=few.images[:0], labels=few.labels[:0]),
        "images of shape (0, 28, 28)",
    ),
    "one number": (lambda tmp, few: save_npz(tmp / "few.npz", images=5, labels=5), "images of shape ()"),
    "one-hot labels": (
        lambda tmp, few: save_npz(tmp / "few.npz", images=few.images, labels=np.eye(10)[few.labels]),
        "20 images but labels of shape (20, 10)",
    ),
    "pixels in [0, 1]": (
        lambda tmp, few: save_npz(tmp / "few.npz", images=few.images / 255, labels=few.labels),
        "pixels of up to 1; expected levels from 0 to 255: multiply them by 255, and round",
    ),
    "pixels that are true or false": (
        lambda tmp, few: save_npz(tmp / "few.npz", images=few.images > 127, labels=few.labels),
        "pixels of up to 1; expected levels from 0 to 255",
    ),
    "pixels of fractions of a level": (
        lambda tmp, few: save_npz(tmp / "few.npz", images=few.images / 2, labels=few.labels),
        "pixels that are not whole numbers from 0 to 255",
    ),
    "pixel of 256": (
        lambda tmp, few: save_npz(tmp / "few.npz", images=with_one(few.images, 256, np.int16), labels=few.labels),
        "pixels that are not whole numbers from 0 to 255",
    ),
    "pixel of NaN": (
        lambda tmp, few: save_npz(tmp / "few.npz", images=with_one(few.images, np.nan, float), labels=few.labels),
        "pixels that are not whole numbers from 0 to 255",
    ),
    "label of 10": (
        lambda tmp, few: save_npz(tmp / "few.npz", images=few.images, labels=with_one(few.labels, 10, int)),
        "labels that are not whole numbers from 0 to 9",
    ),
    "label of -1": (
        lambda tmp, few: save_npz(tmp / "few.npz", images=few.images, labels=with_one(few.labels, -1, int)),
        "labels that are not whole numbers from 0 to 9",
    ),
    "labels of text": (
        lambda tmp, few: save_npz(tmp / "few.npz", images=few.images, labels=few.labels.astype(str)),
        "labels that are not whole numbers from 0 to 9",
    ),
    "pixels of 0 and 1": (
        lambda tmp, few: save_npz(tmp / "few.npz", images=few.images // 255, labels=few.labels),
        "pixels of 0 and 1 alone; expected levels from 0 to 255",
    ),
    "arff with a nominal attribute first": (
        lambda tmp, few: save_arff(tmp / "few.arff", few, "@attribute y {0,1}\n@attribute p1 integer\n"),
        "its class is not its last attribute",
    ),
    "arff with an attribute named class first": (
        lambda tmp, few: save_arff(tmp / "few.arff", few, "@ATTRIBUTE 'class' INTEGER\n@ATTRIBUTE p1 INTEGER\n"),
        "its class is not its last attribute",
    ),
    "arff without data": (lambda tmp, few: save_arff(tmp / "few.arff", few, data=""), "it has no @DATA line"),
    "arff of 256": (
        lambda tmp, few: save_arff(tmp / "few.arff", few, data="@DATA\n" + "256," * 784 + "1\n"),
        "0 to 255",
    ),
    "arff with a gap": (lambda tmp, few: save_arff(tmp / "few.arff", few, data="@DATA\n" + "?," * 784 + "1\n"), "'?'"),
    "arff cut short": (lambda tmp, few: shorten(shorten(save_arff(tmp / "few.arff", few))), "0 to 255"),
    "arff.gz cut short": (lambda tmp, few: shorten(save_arff(tmp / "few.arff.gz", few)), "Compressed file ended"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_file_is_refused_in_one_line(few: Digits, tmp_path: Path, kind: str) -> None:
    save, reason = BAD_FILES[kind]
    path = save(tmp_path, few)
    with pytest.raises(ValueError, match=re.escape(reason)) as caught:
        load_file(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


# --- the bundled digits -----------------------------------------------------------------------------------------------


def test_bundled_digits_look_like_mnist() -> None:
    small, labels = load_digits(return_X_y=True)
    images, found = load_bundled_digits()
    assert images.shape == (1797, 28, 28)
    assert images.dtype == found.dtype == np.uint8
    assert np.array_equal(found, labels)
    ink = images.sum(axis=(1, 2), dtype=float)
    assert np.corrcoef(ink, small.sum(axis=1))[0, 1] > 0.99  # each image is still its own
    middle = np.arange(28) + 0.5
    for axis in (1, 2):
        centre = (images.sum(axis=axis) @ middle) / ink
        assert np.abs(centre - 14.5).max() < 0.52  # MNIST's; half a pixel, as boxes are placed on whole ones
    assert (images.max(axis=(1, 2)) > 200).all()
    assert 0.1 < images.mean() / 255 < 0.25  # MNIST: 0.13


# --- the data module --------------------------------------------------------------------------------------------------


def make_data(**changes: Any) -> MNISTDataModule:
    return MNISTDataModule(**{"source": "digits", "split": (1297, 250, 250), **changes})


def test_split_is_cut_in_order() -> None:
    data = make_data()
    data.setup("fit")
    digits = load_bundled_digits()
    assert [len(dataset) for dataset in data.datasets] == [1297, 250, 250]
    assert np.array_equal(torch.cat([dataset.images for dataset in data.datasets])[:, 0].numpy(), digits.images)
    assert np.array_equal(torch.cat([dataset.labels for dataset in data.datasets]).numpy(), digits.labels)
    for loader, dataset in ((data.val_dataloader(), data.datasets[1]), (data.test_dataloader(), data.datasets[2])):
        assert torch.equal(torch.cat([images for images, _ in loader]), dataset.images)
        assert torch.equal(torch.cat([labels for _, labels in loader]), dataset.labels)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": (60_000, 5_000, 5_000)}, r"adds up to 70,000, but digits has 1,797 images; .* \[1439, 179, 179\]"),
        ({"split": (1297, 250, 251)}, "adds up to 1,798"),
        ({"split": (1797, 0, 0)}, r"data\.split is \[1797, 0, 0\]"),
        ({"split": (2297, -250, -250)}, r"data\.split is \[2297, -250, -250\]"),
        ({"split": (1500, 297)}, "it must be three numbers"),
        ({"batch_size": 0}, r"data\.batch_size is 0; it must be at least 1"),
        ({"eval_batch_size": -5}, r"data\.eval_batch_size is -5; it must be at least 1"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_data(**settings).setup("fit")


def test_fewer_images_than_processes_are_refused() -> None:
    data = make_data(split=(1795, 1, 1))
    data.trainer = SimpleNamespace(world_size=2, global_rank=0)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"data\.split is \[1795, 1, 1\] for 2 processes; each needs an image"):
        data.setup("fit")


def test_batch_is_its_items(few: Digits) -> None:
    dataset = DigitDataset(few)
    indices = [19, 0, 7, 7]
    images, labels = dataset.__getitems__(indices)
    assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
    assert torch.equal(images, torch.stack([dataset[i][0] for i in indices]))
    assert torch.equal(labels, torch.stack([dataset[i][1] for i in indices]))
    assert images.shape == (4, 1, 28, 28)


def test_training_order_follows_seed_and_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_data()
    data.setup("fit")
    for seed, epoch in ((42, 0), (42, 1), (7, 0)):
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        torch.manual_seed(int(time.time()))  # what else is drawn does not matter
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]  # as the Trainer does
        order = torch.randperm(1297, generator=torch.Generator().manual_seed(seed + epoch))
        state = torch.get_rng_state()
        assert torch.equal(torch.cat([images for images, _ in loader]), data.datasets[0].images[order])
        assert torch.equal(torch.get_rng_state(), state)  # and the order is drawn from nobody else's generator


def test_processes_share_the_data_each_on_its_device() -> None:
    data = make_data(split=(1296, 250, 251))
    data.setup("fit")
    seen: dict[str, list[int]] = {"train": [], "test": []}
    device = torch.device("meta")  # tells where it is, and needs no GPU
    for rank in (0, 1):
        strategy = SimpleNamespace(root_device=device)
        data.trainer = SimpleNamespace(world_size=2, global_rank=rank, strategy=strategy)  # type: ignore[assignment]
        assert all(part.device == device for part in next(iter(data.train_dataloader())))
        seen["train"] += list(data.train_dataloader().sampler)
        seen["test"] += list(data.test_dataloader().sampler)
    assert sorted(seen["train"]) == list(range(1296))
    assert sorted(seen["test"]) == list(range(251))  # an odd number, and none scored twice


class Negative(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return 255 - images


class Recorder(L.LightningModule):
    """Keeps the images that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.example_input_array = torch.zeros(2, 1, 28, 28)  # goes through the data module's hook as well
        self.seen: dict[str, list[Tensor]] = {"train": [], "val": [], "test": []}

    def forward(self, images: Tensor) -> Tensor:
        return self.weight * images

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.seen["train"].append(batch[0])
        return self.weight * 1

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.seen["val"].append(batch[0])

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.seen["test"].append(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec")  # Lightning's own, with the newest torch
def test_fit_augments_training_batches_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    data, module = make_data(augmentation=Negative()), Recorder()
    trainer = L.Trainer(
        max_epochs=2, limit_train_batches=2, num_sanity_val_steps=0, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)

    train, val, test = data.datasets
    orders = [torch.randperm(1297, generator=torch.Generator().manual_seed(epoch))[:64] for epoch in (0, 1)]
    assert torch.equal(torch.cat(module.seen["train"]), 255 - train.images[torch.cat(orders)])
    assert torch.equal(torch.cat(module.seen["val"]), val.images.repeat(2, 1, 1, 1))
    assert torch.equal(torch.cat(module.seen["test"]), test.images)

    trainer.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["datamodule_hyper_parameters"] == {
        "source": "digits", "split": (1297, 250, 250), "batch_size": 32, "eval_batch_size": 250,
    }  # fmt: skip
