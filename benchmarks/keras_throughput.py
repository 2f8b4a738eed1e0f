"""Training speed of the write-up's model in Keras on TensorFlow, and of ``digitnet fit`` beside it.

TensorFlow lives in an environment of its own (tensorflow, scikit-learn, pandas); run this script with its Python:

    python benchmarks/keras_throughput.py                                          Keras alone, one line of JSON
    python benchmarks/keras_throughput.py --digitnet-python .venv/bin/python --output results/throughput.json

The second form measures the two in turn, Keras, digitnet, Keras, digitnet, ..., each time in a fresh process, so that
what else the machine does falls on both. On either side it is the real ``fit`` with all that it does: shuffling,
augmentation, 32 images a step, then validation, early stopping and checkpoints. Speed is the number of training images
in an epoch over the epoch's whole time, from its start to the start of the next; the first epoch warms up and does not
count. ``--steps 188`` is a tenth of MNIST's epoch with a tenth of its validation images, ``--steps 1875`` all of it;
what is paid once an epoch (checkpoints) weighs more in the short one.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

BATCH_SIZE = 32
STEPS_PER_EPOCH = 1875  # 60,000 images
VAL_BATCH_SIZE, VAL_BATCHES_PER_EPOCH = 500, 10  # 5,000 images
CONFIG = Path(__file__).parents[1] / "configs" / "final.yaml"


def count_val_batches(steps: int) -> int:
    return max(1, round(VAL_BATCHES_PER_EPOCH * steps / STEPS_PER_EPOCH))


def measure_keras(steps: int, epochs: int) -> dict[str, Any]:
    """Fit the notebook's model as the notebook does; the working folder gets its weights file."""
    os.environ.update(KERAS_BACKEND="tensorflow", TF_CPP_MIN_LOG_LEVEL="3")
    import keras
    import numpy as np
    from keras import layers
    from sklearn.datasets import fetch_openml

    pixels, labels = fetch_openml(
        "mnist_784", version=1, as_frame=False, parser="pandas", read_csv_kwargs={"dtype": np.uint8}, return_X_y=True
    )
    images, labels = pixels.reshape(-1, 28, 28, 1).astype("float32") / 255, labels.astype("int64")
    train = slice(0, steps * BATCH_SIZE)
    val = slice(60_000, 60_000 + count_val_batches(steps) * VAL_BATCH_SIZE)

    conv = {"padding": "same", "activation": "relu", "kernel_initializer": "he_normal"}
    dense = {"activation": "relu", "kernel_initializer": "he_normal"}
    model = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.RandomRotation(0.05, fill_mode="nearest"),
            layers.RandomTranslation(0.1, 0.1, fill_mode="nearest"),
            layers.Conv2D(64, 7, **conv), layers.MaxPooling2D(2),
            layers.Conv2D(128, 3, **conv), layers.Conv2D(128, 3, **conv), layers.MaxPooling2D(2),
            layers.Conv2D(256, 3, **conv), layers.Conv2D(256, 3, **conv), layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dense(128, **dense), layers.Dropout(0.2),
            layers.Dense(64, **dense), layers.Dropout(0.2),
            layers.Dense(10, activation="softmax"),
        ]
    )  # fmt: skip
    assert model.count_params() == 1_413_834
    model.compile(optimizer="adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])

    stamps: list[float] = []
    callbacks = [
        keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda epoch, logs: stamps.append(time.perf_counter()),
            on_train_end=lambda logs: stamps.append(time.perf_counter()),
        ),
        keras.callbacks.EarlyStopping(monitor="val_accuracy", patience=10, restore_best_weights=True),
        keras.callbacks.ModelCheckpoint("mnist.weights.h5", save_best_only=True, save_weights_only=True),
    ]
    model.fit(
        images[train],
        labels[train],
        batch_size=BATCH_SIZE,
        epochs=epochs + 1,
        validation_data=(images[val], labels[val]),
        callbacks=callbacks,
        verbose=0,  # no progress bar; ours has none either where nobody watches
    )
    versions = {package: version(package) for package in ("tensorflow", "keras", "numpy")}
    return summarize(stamps, steps, versions, precision="float32", threads=count_cores())  # TensorFlow's default


def measure_digitnet(steps: int, epochs: int) -> dict[str, Any]:
    """Run ``digitnet fit --config configs/final.yaml`` with a stopwatch; the working folder gets its logs."""
    import torch
    from lightning.pytorch import Callback, Trainer

    from digitnet.cli import DigitCLI

    stamps: list[float] = []

    class Stopwatch(Callback):
        def on_train_epoch_start(self, *_: Any) -> None:
            stamps.append(time.perf_counter())

        def on_train_end(self, *_: Any) -> None:
            stamps.append(time.perf_counter())

    class TimedCLI(DigitCLI):
        def instantiate_trainer(self, **settings: Any) -> Trainer:
            trainer = super().instantiate_trainer(**settings)
            trainer.callbacks.append(Stopwatch())
            return trainer

    limits = {"max_epochs": epochs + 1, "limit_train_batches": steps, "limit_val_batches": count_val_batches(steps)}
    flags = [f"--trainer.{name}={value}" for name, value in limits.items()]
    cli = TimedCLI(["fit", "--config", str(CONFIG), *flags])
    versions = {package: version(package) for package in ("torch", "lightning", "numpy")}
    return summarize(stamps, steps, versions, precision=cli.trainer.precision, threads=torch.get_num_threads())


def summarize(stamps: list[float], steps: int, versions: dict[str, str], **settings: str | int) -> dict[str, Any]:
    """Speed of each epoch but the first, from the moments at which epochs began and the last one ended."""
    images_per_s = [round(steps * BATCH_SIZE / (end - start), 1) for start, end in pairwise(stamps[1:])]
    return {
        "images_per_s": round(median(images_per_s), 1),
        "each_epoch": images_per_s,
        **settings,
        "versions": {"python": platform.python_version(), **versions},
    }


def run_side(side: str, python: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one side once, in a process and a working folder of its own."""
    flags = [f"--side={side}", f"--steps={args.steps}", f"--epochs={args.epochs}"]
    with tempfile.TemporaryDirectory() as folder:
        command = [python, str(Path(__file__).resolve()), *flags]
        process = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if process.returncode:
        sys.exit(f"{process.stderr}\n{side} ended with exit code {process.returncode}; its messages are above")
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    print(f"{side}: {result['images_per_s']} images/s", file=sys.stderr)
    return result


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_hardware() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"{match[1] if match else platform.processor()}, {count_cores()} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digitnet-python", metavar="PATH", help="the Python that digitnet is installed for")
    parser.add_argument("--steps", type=int, default=188, help="training steps in an epoch (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=4, help="epochs that count, each time (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="times each side is measured (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write here, and a table into FILE.md")
    parser.add_argument("--side", choices=["keras", "digitnet"], help="measure one side once, in this process")
    args = parser.parse_args()
    if args.side:
        measure = {"keras": measure_keras, "digitnet": measure_digitnet}[args.side]
        print("\n" + json.dumps(measure(args.steps, args.epochs)))
        return

    pythons = {"keras": sys.executable}
    if args.digitnet_python:
        # Not resolved: a virtual environment's Python is a link, and is found out by its own path.
        pythons["digitnet"] = str(Path(args.digitnet_python).absolute())
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in pythons}
    for _ in range(args.repeats):
        for side, python in pythons.items():
            runs[side].append(run_side(side, python, args))

    options = " ".join(f"--{name} {getattr(args, name)}" for name in ("steps", "epochs", "repeats"))
    report: dict[str, Any] = {
        "command": f"python benchmarks/keras_throughput.py {options}"
        + " --digitnet-python .venv/bin/python" * ("digitnet" in runs),
        "date": datetime.date.today().isoformat(),
        "hardware": describe_hardware(),
        "median_images_per_s": {
            name: round(median(run["images_per_s"] for run in side), 1) for name, side in runs.items()
        },
    }
    if "digitnet" in runs:
        pairs = zip(runs["keras"], runs["digitnet"], strict=True)
        report["ratios"] = [round(ours["images_per_s"] / theirs["images_per_s"], 2) for theirs, ours in pairs]
        report["median_ratio"] = round(median(report["ratios"]), 2)
    report["runs"] = runs
    print(json.dumps(report))
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")
        args.output.with_suffix(".md").write_text(make_table(report))


def make_table(report: dict[str, Any]) -> str:
    """The report as Markdown: a row for each side, then the ratio and how it was measured."""
    lines = ["| | images/s, median | each run | precision | threads | versions |", "|---|---|---|---|---|---|"]
    for name, side in report["runs"].items():
        each = ", ".join(f"{run['images_per_s']:.0f}" for run in side)
        versions = ", ".join(f"{package} {number}" for package, number in side[0]["versions"].items())
        middle = f"{report['median_images_per_s'][name]:.0f}"
        lines.append(f"| {name} | {middle} | {each} | {side[0]['precision']} | {side[0]['threads']} | {versions} |")
    lines += ["", f"{report['hardware']}; {report['date']}; `{report['command']}`"]
    if "ratios" in report:
        pairs = ", ".join(f"{ratio:.2f}" for ratio in report["ratios"])
        lines[-1] = f"digitnet / Keras: **{report['median_ratio']:.2f}** (each pair: {pairs}). {lines[-1]}"
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
