"""What Lightning's own callbacks lack."""

from __future__ import annotations

import math
import os
import shlex
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, WeightAveraging
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason as Reason
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from digitnet.calibrate import fit_calibration
from digitnet.checkpoints import is_whole, save_checkpoint
from digitnet.classifier import DigitClassifier
from digitnet.data import MNISTDataModule, find_data
from digitnet.files import shorten, tell_command, write_file

MIN_CALIBRATED = 1_000  # validation images from which on confidences can be relied on


class RunCheckpoint(ModelCheckpoint):
    """ModelCheckpoint that still knows its best score when the run's folder has moved or is named in another way.

    Lightning compares the folder's name as text, and where it differs forgets what was best: the first epoch after
    going on would replace a better checkpoint. And one whose best checkpoint is gone or damaged keeps the next one.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._strategy = trainer.strategy
        super().setup(trainer, pl_module, stage)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        def rebase(path: str) -> str:
            return str(Path(str(self.dirpath), Path(path).name)) if path else path

        paths = {key: rebase(state_dict[key]) for key in ("best_model_path", "kth_best_model_path", "last_model_path")}
        best = {rebase(path): score for path, score in state_dict["best_k_models"].items()}
        state = {**state_dict, **paths, "best_k_models": best, "dirpath": self.dirpath}
        path = paths["best_model_path"]
        # Of all processes the first one says so: they must agree on what was best, or wait for each other for ever.
        if self.monitor and path and not self._strategy.broadcast(is_whole(Path(path))):
            rank_zero_info(f"{shorten(path)} is missing or damaged; the best epoch from here on takes its place")
            state |= {"best_k_models": {}, "best_model_path": "", "kth_best_model_path": "", "best_model_score": None}
        super().load_state_dict(state)


class RunEarlyStopping(EarlyStopping):
    """EarlyStopping that stays stopped: going on with a run that it ended ends at once.

    Unless patience was raised or, where a threshold had ended it, the thresholds are others.
    """

    has_met_threshold = False  # in the run that is gone on with

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "thresholds": [self.stopping_threshold, self.divergence_threshold]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "patience": self.patience})
        by_threshold = self.stopping_reason in (Reason.STOPPING_THRESHOLD, Reason.DIVERGENCE_THRESHOLD)
        thresholds = [self.stopping_threshold, self.divergence_threshold]
        self.has_met_threshold = by_threshold and state_dict.get("thresholds") == thresholds
        if by_threshold and not self.has_met_threshold:  # Lightning would keep the old reason for good
            self.stopping_reason, self.stopping_reason_message = Reason.NOT_STOPPED, None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        ended = self.has_met_threshold or self.wait_count >= max(self.patience, 1)
        trainer.should_stop = trainer.should_stop or ended

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say that it was this; Lightning tells of other ends alone."""
        if self.wait_count >= max(self.patience, 1):
            often = "once" if self.wait_count == 1 else f"{self.wait_count} times in a row"
            more = f"--early_stopping.patience {2 * self.wait_count}"
            rank_zero_info(f"early stopping: {self.monitor} was no better {often}; for more, {more}")
        elif trainer.should_stop and self.stopping_reason_message:
            rank_zero_info(f"early stopping: {self.stopping_reason_message}")


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all; Lightning's own may be stopped while it copies onto the only one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        save_checkpoint(checkpoint, Path(path))


class SaveConfig(SaveConfigCallback):
    """Writes the run's ``config.yaml`` whole or not at all, also when it replaces one: going on starts from it."""

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for logger in trainer.loggers:
            if logger.log_dir:
                text = self.parser.dump(self.config, skip_none=False)
                write_file(Path(logger.log_dir, self.config_filename), text.encode())
                break


class SeedEachEpoch(Callback):
    """Restart PyTorch's random generators at each epoch from (the run's seed, the epoch, the rank).

    Augmentation and dropout then draw the same in a run that was stopped and resumed as in one that was not, with no
    generator state to save. The order of the data is the data module's own business, and repeatable in the same way.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Where seed_everything keeps it. Without it, whatever this process began with.
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed()))

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        entropy = (self.seed, trainer.current_epoch, trainer.global_rank)
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))


class AverageWeights(WeightAveraging):
    """Keep an exponential moving average of the weights; it is what is validated, saved and scored.

    Lightning's ``EMAWeightAveraging`` updates one tensor at a time, which costs more than a step of a small network
    should; this one updates them all at once. In a checkpoint ``state_dict`` is the average, and
    ``current_model_state`` the weights that training goes on with.

    Args:
        decay: share of the old average that each step keeps, in [0, 1); 0.99 averages about the last 100 steps. The
            first steps keep less (bias correction), so that the untrained weights do not count too much.

    Raises:
        ValueError: ``decay`` lies outside its range.
    """

    def __init__(self, decay: float = 0.99) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}; it is the share that each step keeps, from 0 to below 1")
        self.decay = decay
        super().__init__(multi_avg_fn=self._average)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._device = trainer.strategy.root_device  # the module itself is moved there only later
        super().setup(trainer, pl_module, stage)
        if self._average_model is not None:
            # Counted on the CPU: to ask another device at each step is to wait for it.
            self._average_model.n_averaged = torch.zeros((), dtype=torch.long)

    def _average(self, averages: list[Tensor], currents: list[Tensor], num_averaged: Tensor | int) -> None:
        assert self._average_model is not None
        num = int(self._average_model.n_averaged)
        total = 1 - self.decay ** (num + 1)  # of all weights of the average, the newest 1 - decay
        currents = [current.to(average.dtype) for average, current in zip(averages, currents, strict=True)]
        get_ema_multi_avg_fn(1 - (1 - self.decay) / total)(averages, currents, num_averaged)


def find_keeper(trainer: L.Trainer, of_best: bool) -> ModelCheckpoint | None:
    """The run's own ModelCheckpoint, of the best epoch or of the last one; others, which a user added, come before."""
    keepers = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
    return next((each for each in reversed(keepers) if bool(each.monitor) == of_best), None)


class RestoreBestWeights(Callback):
    """After ``fit``, put the best checkpoint's weights back into the module (Keras' ``restore_best_weights``).

    Best as the run's ModelCheckpoint with a ``monitor`` has it. Lightning leaves the last weights in the module.
    """

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        best = find_keeper(trainer, of_best=True)
        # As the first process has it, which wrote the file: another machine need not share its disk.
        if best and (path := trainer.strategy.broadcast(best.best_model_path)):
            weights: dict[str, Any] = {}
            if trainer.is_global_zero:
                weights = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
            pl_module.load_state_dict(trainer.strategy.broadcast(weights))
            if trainer.is_global_zero:  # another one that went on without the file knows no score
                rank_zero_info(f"best {best.monitor} {best.best_model_score:.4f}: {shorten(path)}")


class Calibrate(Callback):
    """After ``fit``, with the best weights restored, add to the best checkpoint what its answers are worth.

    That is ``calibration``, the state of a Calibration, from which ``predict`` knows when to doubt.

    Args:
        num_digits: how many training digits the detector of non-digits learns from; the default takes three to
            five minutes on two cores, less of it less. 0 leaves the detector out, and everything is a digit.

    Raises:
        ValueError: ``num_digits`` is negative.
    """

    def __init__(self, num_digits: int = 24_000) -> None:
        if num_digits < 0:
            raise ValueError(f"calibration.num_digits is {num_digits}; it is a number of digits, or 0 for no detector")
        self.num_digits = num_digits

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data = find_data(trainer)
        best = find_keeper(trainer, of_best=True)
        if not (trainer.is_global_zero and best and best.best_model_path and isinstance(data, MNISTDataModule)):
            return
        assert isinstance(pl_module, DigitClassifier)
        train, val, _ = data.datasets
        was_training = pl_module.net.training
        if self.num_digits:
            told = "fitting the detector of what is no digit, some minutes (calibration.num_digits 0 leaves it out)"
            rank_zero_info(told)
        calibration = fit_calibration(pl_module.net, train, val, self.num_digits)
        pl_module.net.train(was_training)
        path = Path(best.best_model_path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["calibration"] = calibration.state_dict()
        save_checkpoint(checkpoint, path)
        rank_zero_info(
            f"calibrated on {len(val):,} validation images: temperature {calibration.temperature:.3f}, "
            f"uncertain below {calibration.min_confidence:.3f}"
        )
        if len(val) < MIN_CALIBRATED:
            rank_zero_info(f"{len(val):,} images are few for that: confidences may promise too much")


class Throughput(Callback):
    """Log training speed once an epoch, ``train/images_per_s``: from its start to its last step, without validation."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.on_train_epoch_start(trainer, pl_module)  # which Lightning leaves out when it goes on with max_steps

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.num_images = 0
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        _, (_, labels), _ = args
        self.num_images += len(labels)
        if trainer.is_last_batch and pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self.seconds = time.perf_counter() - self.start

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.num_images:
            pl_module.log("train/images_per_s", self.num_images / self.seconds, sync_dist=True, reduce_fx="sum")


class PrintEpochs(Callback):
    """One line an epoch, also above a progress bar, which has no room for the figures where a terminal is narrow."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # This hook comes before the module's own, which logs the training metrics.
        assert isinstance(pl_module, DigitClassifier)
        train = {name: pl_module.get_metric(name).compute() for name in ("train/loss", "train/acc")}
        is_validated = pl_module.validated_epoch == trainer.current_epoch
        val = {name: x for name, x in trainer.callback_metrics.items() if is_validated and name.startswith("val/")}
        values = {**train, **val}
        line = f"epoch {trainer.current_epoch}  " + "  ".join(f"{k} {v:.4f}" for k, v in values.items())
        bar = trainer.progress_bar_callback
        if bar is not None and trainer.is_global_zero:
            bar.print(line)
        else:
            rank_zero_info(line)


def flatten_settings(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings of a config under short names for a table; those left open (None) are left out.

    ``{"optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.001}}}`` becomes
    ``{"optimizer": "Adam", "optimizer/lr": 0.001}``.
    """
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = "/".join(filter(None, (prefix, key)))
        if key == "class_path":
            flat[prefix] = value.rpartition(".")[2]
        elif isinstance(value, dict):
            flat |= flatten_settings(value, prefix if key == "init_args" else name)
        elif value is not None:
            # Tuples and paths YAML cannot say plainly.
            flat[name] = list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
    return flat


class HyperparameterSummary(Callback):
    """Give TensorBoard's HPARAMS page the run's settings, and ``hp/val_acc`` and ``hp/val_loss`` of its best epoch.

    The best so far, as the run's ModelCheckpoint with a ``monitor`` has it, so that they are those of ``best.ckpt``;
    the one of best accuracy where that goes by a training metric.

    Args:
        settings: what the page compares runs by, as a config has it.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = flatten_settings(settings)
        self.best: dict[str, float] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.global_step == 0 and trainer.is_global_zero:
                if "precision" in self.settings:
                    self.settings["precision"] = str(trainer.precision)  # Lightning may take another than was asked for
                logger.hparams.update(self.settings)  # for hparams.yaml
                # Not log_hyperparams: that begins each metric with a point of its own, at 0, which spoils the chart.
                from torch.utils.tensorboard.summary import hparams  # half a second that other commands need not wait

                plain = {k: v if isinstance(v, (bool, int, float)) else str(v) for k, v in self.settings.items()}
                writer = logger.experiment._get_file_writer()
                for summary in hparams(plain, {"hp/val_acc": 0, "hp/val_loss": 0}):
                    writer.add_summary(summary)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        found = {name: float(trainer.callback_metrics.get(name, torch.nan)) for name in ("val/acc", "val/loss")}
        if trainer.sanity_checking or math.isnan(found["val/acc"]):
            return
        keeper = find_keeper(trainer, of_best=True)
        monitored = keeper.monitor if keeper and keeper.monitor in found else "val/acc"
        sign = -1 if monitored == "val/loss" else 1
        if not self.best or sign * found[monitored] > sign * self.best[monitored]:
            self.best = found
        for logger in trainer.loggers:
            figures = {f"hp/{name.replace('/', '_')}": value for name, value in self.best.items()}
            logger.log_metrics(figures, step=max(0, trainer.global_step - 1))  # as val/acc

    def state_dict(self) -> dict[str, Any]:
        return {"figures": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["figures"]


class StopOnNaN(Callback):
    """Stop ``fit`` when the loss is no longer a finite number, before a checkpoint holds what it left.

    Looked at every step on the CPU; else every 50 steps and at an epoch's last, as asking a device takes time.

    Raises:
        ValueError: the loss is infinite or not a number; the message says what to try.
    """

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        outputs, _, batch_idx = args
        alone_on_cpu = trainer.world_size == 1 and pl_module.device.type == "cpu"
        if alone_on_cpu or batch_idx % 50 == 49 or trainer.is_last_batch:
            # Of all processes: one that stopped alone would leave the others waiting.
            loss = outputs["loss"] if alone_on_cpu else trainer.strategy.reduce(outputs["loss"], reduce_op="mean")
            self._check(trainer, "train/loss", loss)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if "val/loss" in trainer.callback_metrics and not trainer.sanity_checking:
            self._check(trainer, "val/loss", trainer.callback_metrics["val/loss"])

    def _check(self, trainer: L.Trainer, name: str, loss: torch.Tensor) -> None:
        if torch.isfinite(loss):
            return
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        precision = "" if str(trainer.precision) == "32-true" else ", --trainer.precision 32-true"
        raise ValueError(
            f"{name} is {loss.item()} in epoch {trainer.current_epoch}, after step {trainer.global_step}. Try a lower "
            f"learning rate (--model.optimizer.lr; it is {rate:g}), --trainer.gradient_clip_val 1{precision}; "
            "checkpoints of the epochs before, if any, are kept, and going on from one keeps the rate"
        )


class StopCleanly(Callback):
    """Make SIGTERM stop ``fit`` as Ctrl-C does, and say what is kept and what to type to go on.

    Lightning's own handler asks the other processes from within itself, and may wait for them for ever.
    """

    advises = True  # how to go on

    def __init__(self) -> None:
        self.terminated = False
        self.is_calibrating = False
        self.before: Any = None  # the handler to put back after that

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        if trainer.local_rank == 0:
            signal.signal(signal.SIGTERM, self._terminate)  # Lightning puts the old handlers back when it is done
        else:  # its machine's first process ends the others
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Lightning is done by now, but calibrating takes minutes.
        if trainer.is_global_zero and threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGTERM, self._terminate)
            self.is_calibrating = True

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.is_calibrating:
            signal.signal(signal.SIGTERM, self.before or signal.SIG_DFL)
            self.is_calibrating = False

    def _terminate(self, signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.terminated = True
        raise KeyboardInterrupt

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        was_calibrating = self.is_calibrating
        self.teardown(trainer, pl_module, "fit")
        if not isinstance(exception, KeyboardInterrupt):
            return
        if not self.advises:
            rank_zero_info("stopped")
            return
        last = find_keeper(trainer, of_best=False)
        # Lightning names the file before it is written.
        path = last.best_model_path if last and Path(last.best_model_path).is_file() else ""
        again = tell_command("fit", "--ckpt_path", path)
        if not trainer.loggers:  # there is no config beside it
            again = f"the same command and --ckpt_path {shlex.quote(path)}"
        can_go_on = not trainer.loggers or isinstance(trainer.loggers[0], TensorBoardLogger)
        epoch = trainer.current_epoch
        if path and was_calibrating:
            to = f" To calibrate: {again}" if can_go_on else ""
            rank_zero_info(f"stopped while calibrating, the training done.{to}")
        elif path:
            to = f" To go on: {again}" if can_go_on else ""
            rank_zero_info(f"stopped in epoch {epoch}; the epochs before it are kept.{to}")
        else:
            rank_zero_info(f"stopped in epoch {epoch}, before the first checkpoint; nothing is kept")
