"""Fixtures shared by the tests. Nothing here needs the network or a GPU."""

from __future__ import annotations

import gc
import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # workers that fight for the cores are slower than one; read when torch starts
    gc.disable()  # until all is imported, which it would walk in vain for a second and a half

import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning  # noqa: F401  # before scikit-learn, or typing's cache makes a flag's `int | float` a `float | int`
import pytest
import torch
from hypothesis import HealthCheck, settings
from sklearn.datasets import get_data_home

from digitnet.data import Digits, fetch_digits

os.environ["KERAS_BACKEND"] = "torch"  # before anything imports Keras

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
Run = Callable[..., int]
NUM_GENERATED = int(os.environ.get("DIGITNET_FUZZ", "0"))


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def generated(few: int) -> settings:
    """How much input hypothesis makes up: a few by default, DIGITNET_FUZZ of them where it is set."""
    return settings(
        max_examples=NUM_GENERATED or few,
        deadline=None,
        derandomize=not NUM_GENERATED,  # the default suite gives the same verdict every time
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@pytest.fixture(scope="session", autouse=True)
def _no_network() -> Iterator[None]:
    """A test that opens a connection to another machine fails."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test tried to reach {address}")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded)
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_disks() -> Iterator[None]:
    """No power cut comes between a test and its verdict; hundreds of checkpoints would wait for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def digitnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a digitnet command in this process, in an empty folder; returns its exit code. ``test`` draws no report."""
    from digitnet import __main__
    from digitnet.__main__ import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(__main__, "FOLLOW_UPS", {})  # it takes seconds

    def run(*args: object) -> int:
        try:
            return main([str(arg) for arg in args])
        except SystemExit as stop:
            return int(stop.code or 0)

    return run


@pytest.fixture(scope="session")
def mnist_home(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """A data home with MNIST in it; None when it is not at hand.

    A copy of what scikit-learn keeps of it, as scikit-learn deletes what it fails to parse; else of our cache.
    """
    home, copy = Path(get_data_home()), tmp_path_factory.mktemp("home")
    for folder, name in (("openml", "mnist_784.arff.gz"), ("digitnet", "mnist_784.npz")):
        if any((home / folder).rglob(name)):
            shutil.copytree(home / folder, copy / folder)
            return copy
    return None


@pytest.fixture(scope="session")
def real_digits(mnist_home: Path | None) -> Digits:
    """MNIST's 70,000 digits where they are at hand, else scikit-learn's 1,797."""
    return fetch_digits("mnist", mnist_home) if mnist_home else fetch_digits("digits")


# Two epochs of four steps of eight images, few images to score, and no time spent on pictures and a detector.
SHORT = (
    "--data.split", "[1717, 40, 40]",
    "--trainer.max_epochs", 2, "--trainer.limit_train_batches", 4, "--data.batch_size", 8,
    "--trainer.precision", "32-true", "--pictures.every_n_epochs", 0, "--calibration.num_digits", 0,
)  # fmt: skip


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run: bundled digits, two epochs of four steps. Copy it before changing it."""
    from digitnet.__main__ import main

    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["fit", "--config", str(QUICKSTART), *map(str, SHORT)]) == 0
    return folder / "lightning_logs" / "quickstart" / "version_0"
