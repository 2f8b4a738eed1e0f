"""How fast training is, here and now: what a step is made of, the machine's ceiling, and ``fit`` beside other loops.

Everything is measured in turns: before each epoch of ``fit``, a matrix product is timed, and a plain PyTorch loop and
Keras (where it is installed) train for as many steps, so that whatever else the machine does falls on all of them. The
first turn warms up and does not count. Ratios carry over to other machines of the kind; absolute figures do not.
"""

from __future__ import annotations

import contextlib
import copy
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from digitnet.classifier import DigitClassifier
from digitnet.cli import DigitCLI, main
from digitnet.data import MNISTDataModule, find_data
from digitnet.files import make_writable, tell_command, write_file, write_json
from digitnet.machine import describe_environment
from digitnet.model import DigitNet
from digitnet.winograd import MIN_BATCH

COMPLAINTS = "keras.stderr"
PARTS = ("data", "augmentation", "selection", "forward", "backward", "optimizer")
PRECISIONS = ("32-true", "bf16-mixed")  # that the plain loop has
FIT, STEPS, PLAIN, KERAS = "fit, whole epochs", "fit, steps alone", "plain PyTorch, steps alone", "Keras, whole epochs"


def benchmark(
    config: Path = Path("configs/final.yaml"),
    steps: int = 188,
    rounds: int = 5,
    quick: bool = False,
    keras_python: str | None = None,
    output: Path | None = None,
) -> None:
    """Measure training speed: the parts of a step, the machine's ceiling, and fit beside plain PyTorch and Keras.

    Args:
        config: a config of fit, whose recipe is timed.
        steps: training steps of a turn, at most an epoch's; 188 is a tenth of MNIST's. Validation is scaled with them.
        rounds: turns that count.
        quick: 20 steps and 2 turns, under half a minute; rough.
        keras_python: the Python of an environment with TensorFlow and Keras; by default this one, if it has them.
        output: write the figures here as JSON, and the tables beside it as Markdown.

    Raises:
        ValueError: there is nothing to time, or Keras cannot be run.
        OSError: the config or the data cannot be read, or the output cannot be written.
    """
    if quick:
        steps, rounds = 20, 2
    if min(steps, rounds) < 1:
        raise ValueError(f"steps is {steps} and rounds {rounds}; each must be at least 1")
    if not config.is_file():
        raise FileNotFoundError(f"{config}: no such config; give one with --config")
    if output and output.suffix == ".md":
        raise ValueError(
            f"output is {output}, the name of the tables beside it; give the JSON's, such as benchmark.json"
        )
    if output and (output.is_dir() or not output.name):
        raise ValueError(f"output is {output}, a folder; give a file, such as benchmark.json")
    if output:
        make_writable(output.parent, "--output")
    with tempfile.TemporaryDirectory() as folder:
        turns = Turns(steps, keras_python, Path(folder))
        cli = time_fit(config, rounds, turns)
    steps = turns.steps  # of a small data set, fewer
    result = {
        "command": tell_command("benchmark", "--config", config.as_posix())
        + f" --steps {steps} --rounds {rounds}"
        + (" --keras_python PYTHON" if keras_python and turns.keras_python else ""),
        **describe_environment(),
        "threads": torch.get_num_threads(),
        "precision": str(cli.trainer.precision),
        "batch_size": turns.plain.batch_size,
        **turns.plain.describe(min(steps, 50)),
        "ceiling_flop_per_s": max(turns.ceilings),
        "images_per_s": {
            name: [turns.plain.batch_size * steps / seconds for seconds in times[1:]]
            for name, times in turns.seconds.items()
        },
        "peak_memory_bytes": peak_memory_bytes(turns.plain.device),
    }
    result["versions"] |= turns.keras_versions
    text = render_result(result)
    print(text)
    if output:
        write_json(output, result)
        write_file(output.with_suffix(".md"), text.encode())


def time_fit(config: Path, rounds: int, turns: Turns) -> DigitCLI:
    """Run the real ``fit`` of a config for ``rounds`` + 1 short epochs, with everything else taking turns."""

    class TimedCLI(DigitCLI):
        def instantiate_trainer(self, **settings: Any) -> L.Trainer:
            trainer = super().instantiate_trainer(**settings)
            if str(trainer.precision) not in PRECISIONS:
                raise ValueError(f"trainer.precision is {trainer.precision}; benchmark takes {' or '.join(PRECISIONS)}")
            turns.steps = min(turns.steps, max(1, self.datamodule.split[0] // self.datamodule.batch_size))  # full ones
            trainer.limit_train_batches = turns.steps  # by flag, 1 step may be read as 1.0, all of an epoch
            trainer.limit_val_batches = count_val_batches(turns.steps, self.datamodule.eval_batch_size)
            # First, so that fit's own clock starts after the others had their turns.
            trainer.callbacks.insert(0, turns)  # type: ignore[attr-defined]
            self.stop.advises = False  # there is no run to go on with
            return trainer

    flags = [f"--trainer.max_epochs={rounds + 1}"]
    logger = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": str(turns.folder)}}
    flags += [f"--trainer.logger={json.dumps(logger)}", "--trainer.devices=1", "--trainer.enable_model_summary=false"]
    flags += [f"--early_stopping.patience={rounds + 1}", "--pictures.every_n_epochs=0", "--calibration.num_digits=0"]
    flags += ["--model.lr_scheduler=null"]  # it may be made for fewer steps than are timed
    # Every turn as long as the others', and with a validation, whatever the config says.
    flags += ["--trainer.max_steps=-1", "--trainer.max_time=null", "--trainer.overfit_batches=0.0"]
    flags += ["--trainer.check_val_every_n_epoch=1", "--trainer.val_check_interval=1.0", "--trainer.fast_dev_run=false"]
    flags += ["--early_stopping.stopping_threshold=null", "--early_stopping.divergence_threshold=null"]
    return main(["fit", "--config", str(config), *flags], TimedCLI)


def count_val_batches(steps: int, batch_size: int) -> int:
    """As many validation images to a step as in the write-up's epoch: 5,000 to 1,875 steps."""
    return max(1, round(steps * 5000 / 1875 / batch_size))


class Turns(Callback):
    """Before each epoch of ``fit``, lets the other loops train for as many steps; keeps everyone's seconds.

    Args:
        steps: of a turn.
        keras_python: the Python to run Keras with; None looks whether this one can.
        folder: for the data that Keras is given.
    """

    def __init__(self, steps: int, keras_python: str | None, folder: Path) -> None:
        if keras_python is None and find_spec("tensorflow") and find_spec("keras"):
            keras_python = sys.executable
        self.steps, self.keras_python, self.folder = steps, keras_python, folder
        self.seconds: dict[str, list[float]] = {FIT: [], STEPS: [], PLAIN: []}
        self.ceilings: list[float] = []
        self.keras: subprocess.Popen[str] | None = None
        self.keras_versions: dict[str, str] = {}
        self.start: float | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data = find_data(trainer)
        assert isinstance(pl_module, DigitClassifier)
        self.plain = PlainLoop(pl_module, data, str(trainer.precision))
        others = (pl_module.selection, pl_module.teacher)
        if not isinstance(pl_module.net, DigitNet) or any(other is not None for other in others):
            if self.keras_python:
                print("without Keras, which would train DigitNet, on all of each batch, towards the labels", flush=True)
            self.keras_python = None
        self.keras = start_keras(self.keras_python, data, self.steps, self.folder) if self.keras_python else None
        if self.keras:
            self.seconds[KERAS] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end_epoch()
        self.ceilings.append(measure_ceiling(self.plain.device, self.plain.dtype))
        self.seconds[PLAIN].append(self.plain.train(self.steps))
        if self.keras:
            answer = ask_keras(self.keras, self.folder / COMPLAINTS)
            self.seconds[KERAS].append(answer["seconds"])
            self.keras_versions = answer["versions"]
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.is_last_batch and self.start is not None:
            synchronize(pl_module.device)
            self.seconds[STEPS].append(time.perf_counter() - self.start)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end_epoch()
        self._stop_keras()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._stop_keras()

    def _stop_keras(self) -> None:
        if self.keras:
            with contextlib.suppress(BrokenPipeError), self.keras:  # which closes its pipes; some may be unread
                self.keras.kill()

    def _end_epoch(self) -> None:
        if self.start is not None:
            self.seconds[FIT].append(time.perf_counter() - self.start)


# --- the plain loop ---------------------------------------------------------------------------------------------------


class PlainLoop:
    """The same recipe without Lightning: the network, optimizer, augmentation and precision of a ``fit`` under way.

    Args:
        module: the module that ``fit`` trains, copied.
        data: its data.
        precision: the Trainer's.
    """

    def __init__(self, module: DigitClassifier, data: MNISTDataModule, precision: str) -> None:
        self.device, self.batch_size = module.device, min(data.batch_size, len(data.datasets[0]))
        self.dtype = torch.bfloat16 if precision.startswith("bf16") else torch.float32
        self.dataset, self.augmentation = data.datasets[0].to(self.device), data.augmentation
        self.net, self.selection = copy.deepcopy((module.net, module.selection))
        self.teacher = module.teacher
        self.optimizer = module.optimizer(self.net.parameters())

    def train(self, steps: int, mark: Callable[[str], None] = lambda part: None) -> float:
        """Train a number of steps on images picked at random, and return the seconds it took.

        Args:
            steps: how many.
            mark: called with the name of each part of a step once it is done.
        """
        start = time.perf_counter()
        for _ in range(steps):
            picks = torch.randint(len(self.dataset), (self.batch_size,)).to(self.device)
            images, labels = self.dataset.images[picks], self.dataset.labels[picks]
            mark("data")
            if self.augmentation is not None:
                images = self.augmentation(images)
            mark("augmentation")
            images, labels = self.select(images, labels)
            mark("selection")
            loss = self.compute_loss(images, labels)
            mark("forward")
            self.optimizer.zero_grad()
            loss.backward()
            mark("backward")
            self.optimizer.step()
            mark("optimizer")
        synchronize(self.device)
        return time.perf_counter() - start

    def in_precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def select(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if self.selection is None:
            return images, labels
        with self.in_precision():
            return self.selection(images, labels)

    def compute_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        with self.in_precision():
            if self.teacher is None:
                logits, targets = self.net(images), None
            else:
                logits, targets = self.teacher.teach(self.net, images, labels)
        columns = len(logits) // len(labels)
        targets = labels.repeat(columns) if targets is None else targets
        return columns * F.cross_entropy(logits.float(), targets)  # the sum over columns of each one's mean

    def describe(self, steps: int) -> dict[str, Any]:
        """Milliseconds of each part of a step, medians, and floating-point operations of an image."""
        times: dict[str, list[float]] = {part: [] for part in PARTS}
        last = time.perf_counter()

        def mark(part: str) -> None:
            nonlocal last
            synchronize(self.device)
            now = time.perf_counter()
            times[part].append(1000 * (now - last))
            last = now

        self.train(steps, mark)
        images, labels = (part[: self.batch_size] for part in (self.dataset.images, self.dataset.labels))
        with FlopCounterMode(display=False) as selecting:
            images, labels = self.select(images, labels)
        # Counted as plain sums: Winograd's way takes fewer, but not in evaluation mode, nor to score so few.
        self.net.eval()
        few = min(len(images), MIN_BATCH - 1)
        with FlopCounterMode(display=False) as learning:
            self.compute_loss(images[:few], labels[:few]).backward()
        self.net.train()
        flop = selecting.get_total_flops() + learning.get_total_flops() * len(images) / few
        return {
            "step_ms": {part: median(values) for part, values in times.items()},
            "flop_per_image": flop / self.batch_size,
        }


def measure_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large square matrix product: the best of five."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def synchronize(device: torch.device) -> None:
    """Wait for a GPU to finish what it was given; a CPU has nothing to wait for."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak_memory_bytes(device: torch.device) -> int | None:
    """The most memory used so far: of the GPU, else of this process; None on Windows, which does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# --- Keras ------------------------------------------------------------------------------------------------------------


def start_keras(python: str, data: MNISTDataModule, steps: int, folder: Path) -> subprocess.Popen[str]:
    """Start the process that trains the write-up's model in Keras, a turn for each line it is sent.

    Raises:
        ValueError: there is no such Python.
    """
    train, val, _ = data.datasets
    num_val = count_val_batches(steps, data.eval_batch_size) * data.eval_batch_size
    sizes = {"train": steps * data.batch_size, "val": num_val}
    arrays: dict[str, Any] = {}
    for name, dataset in (("train", train), ("val", val)):
        picks = np.arange(sizes[name]) % len(dataset)
        arrays |= {f"{name}_images": dataset.images[picks, 0].numpy(), f"{name}_labels": dataset.labels[picks].numpy()}
    np.savez(folder / "round.npz", **arrays)
    script = Path(__file__).with_name("keras_rounds.py")
    command = [python, str(script), str(folder / "round.npz"), str(data.batch_size), str(data.eval_batch_size)]
    pipe = subprocess.PIPE
    try:
        with (folder / COMPLAINTS).open("w") as complaints:
            return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=complaints, text=True)
    except OSError as error:
        raise ValueError(f"keras_python is {python}, which cannot be run ({error.strerror})") from error


def ask_keras(process: subprocess.Popen[str], complaints: Path) -> dict[str, Any]:
    """Let Keras take its turn.

    Args:
        process: what ``start_keras`` started.
        complaints: the file that its standard error goes to.

    Returns:
        Its ``seconds`` and ``versions``.

    Raises:
        ValueError: it has ended.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write("\n")
        process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        last = (complaints.read_text().strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"Keras has ended: {last}; give --keras_python a Python in which it works")
    answer: dict[str, Any] = json.loads(line)
    return answer


# --- the tables -------------------------------------------------------------------------------------------------------


def render_result(result: dict[str, Any]) -> str:
    """The figures as Markdown tables."""
    speeds = {name: median(each) for name, each in result["images_per_s"].items()}
    ceiling, flop = result["ceiling_flop_per_s"], result["flop_per_image"]
    lines = ["| | images/s, median | lowest to highest | ms a step | share of ceiling |", "|---|---|---|---|---|"]
    for name, each in result["images_per_s"].items():
        speed = speeds[name]
        share = "" if name == KERAS else f"{100 * speed * flop / ceiling:.0f} %"  # in another precision
        step_ms = 1000 * result["batch_size"] / speed
        lines.append(f"| {name} | {speed:,.0f} | {min(each):,.0f} to {max(each):,.0f} | {step_ms:.1f} | {share} |")
    lines += ["", f"| {' | '.join(PARTS)} | framework |", "|---" * (len(PARTS) + 1) + "|"]
    framework_ms = 1000 * result["batch_size"] * (1 / speeds[STEPS] - 1 / speeds[PLAIN])
    lines.append("| " + " | ".join(f"{x:.2f} ms" for x in (*result["step_ms"].values(), framework_ms)) + " |")
    dtype = "bfloat16" if result["precision"].startswith("bf16") else "float32"
    peak = f"{result['peak_memory_bytes'] / 2**20:,.0f} MiB" if result["peak_memory_bytes"] else "not known"
    ratios = [f"fit steps / plain PyTorch: {_ratio(result, STEPS, PLAIN)}"]
    if KERAS in speeds:
        ratios.append(f"fit / Keras: {_ratio(result, FIT, KERAS)}")
    lines += [
        "",
        f"Ratios, median of the turns: {'; '.join(ratios)}. Ceiling: {ceiling / 1e9:,.0f} GFLOP/s, the best of several "
        f"square matrix products in {dtype}; a training step takes {flop / 1e6:,.0f} MFLOP an image (convolutions "
        f"as plain sums, however they are computed). Peak memory {peak}.",
        "",
        f"{result['hardware']}, {result['threads']} threads, batch {result['batch_size']}, {result['precision']}; "
        f"{', '.join(f'{name} {number}' for name, number in result['versions'].items())}; {result['date'][:10]}; "
        f"`{result['command']}`",
        "",
    ]
    return "\n".join(lines)


def _ratio(result: dict[str, Any], ours: str, theirs: str) -> str:
    pairs = zip(result["images_per_s"][ours], result["images_per_s"][theirs], strict=True)
    ratios = [a / b for a, b in pairs]
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
