"""What happens around training: averaged and best weights, calibration, and what TensorBoard and people see of it."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from digitnet.calibrate import fit_calibration
from digitnet.checkpoints import save_checkpoint
from digitnet.classifier import DigitClassifier
from digitnet.data import MNISTDataModule, find_data
from digitnet.files import shorten
from digitnet.resuming import find_keeper

MIN_CALIBRATED = 1_000  # validation images from which on confidences can be relied on


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

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self.paused = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.start += time.perf_counter() - self.paused

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.num_images:
            pl_module.log("train/images_per_s", self.num_images / self.seconds, sync_dist=True, reduce_fx="sum")


class StepLoss(Callback):
    """Log the loss of single steps, ``train/loss_step``, every ``log_every_n_steps``: few epochs make no curve.

    Of several processes, that of the first one's images.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.logged = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        assert isinstance(pl_module, DigitClassifier)
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not every or step % every or step == self.logged or pl_module.step_loss is None:
            return
        self.logged = step
        for logger in trainer.loggers:
            logger.log_metrics({"train/loss_step": float(pl_module.step_loss)}, step=step - 1)  # as train/loss


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
            # Tuples, paths and objects YAML cannot say plainly.
            of_objects = isinstance(value, list) and any(isinstance(one, dict) for one in value)
            is_text = of_objects or isinstance(value, Path)
            flat[name] = list(value) if isinstance(value, tuple) else str(value) if is_text else value
    return flat


class HyperparameterSummary(Callback):
    """Give TensorBoard's HPARAMS page the run's settings, and ``hp/val_acc`` and ``hp/val_loss`` of its best epoch.

    The best so far, as the run's ModelCheckpoint with a ``monitor`` has it, so that they are those of ``best.ckpt``;
    the one of best accuracy where that goes by a training metric.

    Args:
        settings: what the page compares runs by, as a config has it.
        is_new_run: whether the run's folder does not have them yet.
    """

    def __init__(self, settings: dict[str, Any], is_new_run: bool = True) -> None:
        self.settings = flatten_settings(settings)
        self.is_new_run = is_new_run
        self.best: dict[str, float] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        keeper = find_keeper(trainer, of_best=True)
        if keeper and not keeper.best_model_path:  # none yet, or the file is gone
            self.best = {}
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and self.is_new_run and trainer.is_global_zero:
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

    Looked at every step by one process on the CPU; else every 50 steps and at an epoch's last, as asking a device or
    other processes takes time.

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
