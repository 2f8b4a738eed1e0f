"""What stands around a run: what would spoil it is refused beforehand, and what breaks it told in one line."""

from __future__ import annotations

import contextlib
import json
import math
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from jsonargparse import Namespace
from lightning.pytorch.utilities import rank_zero_info
from torch.optim.lr_scheduler import ReduceLROnPlateau

from digitnet.checkpoints import count_trained_on
from digitnet.classifier import METRICS, DigitClassifier
from digitnet.data import MNISTDataModule
from digitnet.errors import nearest_name

# What makes best.ckpt the best epoch's and last.ckpt the last one's.
FIXED_FOR_BOTH = {
    "dirpath": None, "save_top_k": 1, "save_last": None, "every_n_epochs": None, "every_n_train_steps": None,
    "train_time_interval": None, "save_on_exception": False, "enable_version_counter": False,
    "auto_insert_metric_name": False,
}  # fmt: skip
FIXED: dict[str, dict[str, Any]] = {
    "best_checkpoint": {**FIXED_FOR_BOTH, "filename": "best"},
    "last_checkpoint": {
        **FIXED_FOR_BOTH, "filename": "last", "monitor": None, "save_weights_only": False,
        "save_on_train_epoch_end": True,
    },
}  # fmt: skip
AT_LEAST = {"trainer.check_val_every_n_epoch": 1, "trainer.accumulate_grad_batches": 1, "early_stopping.patience": 0}


class Begun(NamedTuple):
    """What is behind a checkpoint."""

    num_epochs: int
    num_steps: int
    scheduled_steps: int | None  # that its learning-rate schedule was made for, where it counts steps


@contextlib.contextmanager
def explain_failures(trainer: L.Trainer) -> Iterator[None]:
    """Tell in one line when memory is full, another process died, or a callback of Lightning's fails.

    Raises:
        OSError, ValueError: in place of what PyTorch or Lightning raised.
    """
    try:
        yield
    except (AttributeError, ImportError, TypeError) as error:
        _explain_callback(error)
        raise
    except (RuntimeError, torch.OutOfMemoryError) as error:
        text = str(error)
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
            raise ValueError("out of memory; try a smaller --data.batch_size or --data.eval_batch_size") from error
        if trainer.world_size > 1 and ("onnection" in text or isinstance(error, torch.distributed.DistError)):
            raise OSError(
                f"process {trainer.global_rank} of {trainer.world_size} lost another one, which ended or was killed; "
                "all stop. After fit, go on with: python -m digitnet fit --ckpt_path last"
            ) from error
        _explain_callback(error)
        raise
    finally:
        # Every five seconds Lightning looks whether a process it started ended badly, and if so kills this one, which
        # now has a line to print or a report to draw.
        getattr(trainer.strategy.launcher, "procs", []).clear()


def _explain_callback(error: Exception) -> None:
    """Name the callback of Lightning's that failed, if one did: with it, most often its settings are what is wrong.

    Raises:
        ValueError: in place of the error.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if isinstance(owner, L.Callback) and type(owner).__module__.startswith("lightning."):
            raise ValueError(f"trainer.callbacks: {type(owner).__name__}: {error}") from error


def verify_is_text(config: Path) -> None:
    """Refuse a config that is no text, or empty, by its name: of such the parser says only what it met.

    Raises:
        ValueError: it is one.
    """
    if not config.is_file():
        return  # the parser says so
    try:
        is_empty = not config.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{config} is no YAML: it is no text") from error
    if is_empty:
        raise ValueError(f"{config} is empty; a config has keys such as model and data")


def verify_sections(config: Any, defaults: Any) -> None:
    """Refuse what a config leaves empty, which the parser lets through: a section, or a setting that takes a value.

    Args:
        config: as it was parsed.
        defaults: what it would be without a config and flags.

    Raises:
        ValueError: something is empty, or a section is no list of settings.
    """
    for section, settings in vars(defaults).items():
        if not isinstance(settings, Namespace):
            continue
        if not isinstance(config[section], Namespace):
            raise ValueError(f"{section} is {json.dumps(config[section])}; give settings below it, or leave it out")
        if section in ("model", "data"):
            for name, value in vars(settings).items():
                if value is not None and config[section][name] is None:
                    raise ValueError(f"{section}.{name} is empty; give it a value, or leave it out")


def verify_settings(config: Any) -> None:
    """Refuse settings of ``fit`` that would train nothing, or make its checkpoints other than they are called.

    Args:
        config: of fit; its callbacks are set to look for what they monitor when it is there.

    Raises:
        ValueError: there is one.
    """
    for key, at_least in AT_LEAST.items():
        if (value := config.get(key)) is not None and value < at_least:
            raise ValueError(f"{key} is {value}; it must be at least {at_least}")
    interval = config.trainer.val_check_interval
    if isinstance(interval, int) and interval < 1:
        raise ValueError(f"trainer.val_check_interval is {interval}; a number of steps is at least 1")
    by_time = not isinstance(interval, (int, float, type(None)))
    if by_time and config.early_stopping.check_on_train_epoch_end is None:  # Lightning would look for a number
        config.early_stopping.check_on_train_epoch_end = False
    strategy = str(config.trainer.strategy)
    if any(way in strategy for way in ("spawn", "fork", "notebook")):
        raise ValueError(
            f"trainer.strategy {strategy} leaves what was trained, and what went wrong, in processes that this one "
            "does not hear from; give ddp"
        )
    if config.trainer.sync_batchnorm:
        raise ValueError(
            "trainer.sync_batchnorm finds no layers of PyTorch's to convert: each process normalizes by its own images"
            "; give --trainer.sync_batchnorm false"
        )
    for key, name in (
        ("early_stopping", "check_on_train_epoch_end"),
        ("best_checkpoint", "save_on_train_epoch_end"),
    ):
        verify_monitor(key, config[key].monitor, config[key].mode)
        if config[key].monitor.startswith("train/"):
            config[key][name] = True  # Lightning may look before the epoch's figure is there
    for key, values in FIXED.items():
        for name, value in values.items():
            if config[key][name] != value:
                given, needed = (json.dumps(each, default=str) for each in (config[key][name], value))
                raise ValueError(
                    f"{key}.{name} is {given}, and must stay {needed}: best.ckpt is the best epoch's, last.ckpt "
                    "the last one's, in the run's folder. To keep others too, add a "
                    "lightning.pytorch.callbacks.ModelCheckpoint to trainer.callbacks"
                )


def verify_limits(trainer: L.Trainer, data: MNISTDataModule) -> None:
    """Refuse shares that leave no batch, and a validation that no pass comes to; Lightning does so with a run begun.

    Raises:
        ValueError: there is one.
    """
    num_train = count_batches(data.split[0], data.batch_size, trainer.limit_train_batches, trainer)
    num_val = count_batches(data.split[1], data.eval_batch_size, trainer.limit_val_batches, trainer)
    for part, num, limit in (
        ("train", num_train, trainer.limit_train_batches),
        ("val", num_val, trainer.limit_val_batches),
    ):
        if limit and not num:
            raise ValueError(
                f"trainer.limit_{part}_batches is {limit}, a share that leaves no batch; give a larger one, or a number"
            )
    interval = getattr(trainer, "val_check_interval", None)  # there is none where time decides
    each_pass = trainer.check_val_every_n_epoch is not None
    if isinstance(interval, int) and each_pass and num_val and interval > num_train > 0:
        raise ValueError(
            f"trainer.val_check_interval is {interval:,}, but a pass has {num_train:,} batches; give fewer, or "
            "--trainer.check_val_every_n_epoch null to count on from pass to pass"
        )


def verify_unseen(name: str, settings: dict[str, Any], data: MNISTDataModule) -> None:
    """Refuse to leave out of training what a checkpoint was trained on: it would be scored on what it knows.

    Args:
        name: of the checkpoint, for the message.
        settings: its data, as ``read_data_settings`` has them.
        data: what is to be trained on.

    Raises:
        ValueError: it was trained on some of what is left out.
    """
    if known := count_trained_on(settings, data.source, data.split[0]):
        raise ValueError(
            f"data.split is {list(data.split)}, but {name} was trained on {known:,} of the images that it leaves out "
            f"of training; give {list(settings['split'])}, as {name} had it, or another"
        )


def verify_optimization(
    trainer: L.Trainer, model: DigitClassifier, data: MNISTDataModule, begun: Begun | None = None
) -> None:
    """Refuse an optimizer and a schedule that cannot be made, cannot take their first step, or end too early.

    Args:
        trainer: of the run, before it begins.
        model: which is to be trained; it is given the memory format that it will have.
        data: the training images.
        begun: what is behind the checkpoint that is resumed, whose schedule is kept, right or wrong; None for a new
            run.

    Raises:
        ValueError: there is one.
    """
    model.setup("fit")  # the weights' memory format, which not every optimizer can deal with
    steps = count_steps(trainer, data, begun)
    try:
        optimization = model.configure_optimizers(steps)
    except ValueError:
        raise
    except Exception as error:  # any optimizer, any argument: learning rate null is a TypeError
        raise ValueError(f"model.optimizer or model.lr_scheduler: {error}") from error
    optimizer = optimization["optimizer"] if isinstance(optimization, dict) else optimization
    verify_clipping(trainer, optimizer)
    if trainer.strategy.root_device.type == "cpu":  # where the weights are by now
        try_optimizer(optimizer)
    if isinstance(optimization, dict):
        schedule = optimization["lr_scheduler"]
        scheduled = getattr(schedule["scheduler"], "total_steps", None)  # OneCycleLR's, which counts steps
        if scheduled is not None and begun:
            scheduled = begun.scheduled_steps
            if scheduled is None:
                raise ValueError(
                    "model.lr_scheduler counts steps, but the checkpoint has no such schedule to go on with; give the "
                    "one it was trained with, or start anew, without --ckpt_path"
                )
        if scheduled is not None:
            verify_num_steps(scheduled, steps, count_steps_per_epoch(trainer, data), begun)
        try_schedule(schedule["scheduler"])
        if "monitor" in schedule and not begun:
            verify_monitor("model.lr_scheduler", schedule["monitor"], schedule["scheduler"].mode)


def count_batches(num_images: int, batch_size: int, limit: float, trainer: L.Trainer) -> int:
    """How many batches of one process some images are, at most a number of them (int) or a share (float)."""
    batches = math.ceil(math.ceil(num_images / trainer.world_size) / batch_size)
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


def count_steps_per_epoch(trainer: L.Trainer, data: MNISTDataModule) -> int:
    """How many optimizer steps an epoch has."""
    batches = count_batches(data.split[0], data.batch_size, trainer.limit_train_batches, trainer)
    return math.ceil(batches / trainer.accumulate_grad_batches)


def count_steps(trainer: L.Trainer, data: MNISTDataModule, begun: Begun | None = None) -> float:
    """How many optimizer steps the whole training has, with those behind it; it may be without end.

    Of a new run, as the trainer's ``estimated_stepping_batches``, which is not to be had before the run begins.
    """
    num_epochs, num_steps = (begun.num_epochs, begun.num_steps) if begun else (0, 0)
    steps_per_epoch = count_steps_per_epoch(trainer, data)
    epochs = math.inf if trainer.max_epochs in (None, -1) else max(0, trainer.max_epochs - num_epochs)
    steps = num_steps + (steps_per_epoch * epochs if steps_per_epoch else 0)
    return steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)


def verify_num_steps(scheduled: int, steps: float, steps_per_epoch: int, begun: Begun | None = None) -> None:
    """Refuse a schedule of a fixed number of steps that ends before the training; say so if it ends after it.

    Raises:
        ValueError: it ends before.
    """
    told = f"model.lr_scheduler is made for {scheduled:,} steps, this training has {steps:,}"
    if steps > scheduled:
        remedy = f"--model.lr_scheduler.total_steps {steps}" if steps < math.inf else "--trainer.max_epochs"
        if begun:
            remedy = f"--trainer.max_epochs {begun.num_epochs + (scheduled - begun.num_steps) // steps_per_epoch}"
        raise ValueError(f"{told}; give {remedy}")
    if steps < scheduled:
        rank_zero_info(f"{told}: the learning rate will not come to its end")


def try_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Take a step of an optimizer that is thrown away afterwards, from gradients of zero; the weights stay.

    Raises:
        ValueError: it fails, as SparseAdam does with gradients that are not sparse.
    """
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    kept = [weight.detach().clone() for weight in weights]
    try:
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        optimizer.step(lambda: 0.0)
    except Exception as error:  # any optimizer, any argument
        remedy = "; give --model.channels_last false" if "view size" in str(error) else ""
        raise ValueError(f"model.optimizer: {type(optimizer).__name__}: {error}{remedy}") from error
    finally:
        for weight, value in zip(weights, kept, strict=True):
            weight.data.copy_(value)
            weight.grad = None


def try_schedule(scheduler: Any) -> None:
    """Take a step of a schedule that is thrown away afterwards: some fail only then, after a whole epoch.

    Raises:
        ValueError: it fails.
    """
    figures = [0.0] if isinstance(scheduler, ReduceLROnPlateau) else []
    try:
        with warnings.catch_warnings(action="ignore"):  # before the optimizer's first step
            scheduler.step(*figures)
    except Exception as error:  # any schedule, any argument: CosineAnnealingLR's T_max 0 divides by it
        raise ValueError(f"model.lr_scheduler: {error}; see the arguments of {type(scheduler).__name__}") from error


def verify_monitor(key: str, monitor: str | None, mode: str) -> None:
    """Refuse to watch what is not logged, or for the worst instead of the best.

    Args:
        key: the setting, such as "early_stopping", for the message.
        monitor: the metric to watch.
        mode: "min" or "max", whichever is best.

    Raises:
        ValueError: there is no such metric, or its best is the other one.
    """
    if monitor not in METRICS:
        near = nearest_name(str(monitor), METRICS) or f"; there are {', '.join(METRICS)}"
        raise ValueError(f"{key}.monitor is {'null' if monitor is None else monitor}, which is not logged{near}")
    best = "min" if monitor.endswith("loss") else "max"
    if mode != best:
        raise ValueError(f"{key}.mode is {mode}, but the best {monitor} is the {best}imum; give --{key}.mode {best}")


def verify_clipping(trainer: L.Trainer, optimizer: torch.optim.Optimizer) -> None:
    """Refuse to clip gradients that a fused optimizer has yet to unscale, as it has in float16.

    Raises:
        ValueError: the trainer would.
    """
    is_fused = getattr(optimizer, "_step_supports_amp_scaling", False)  # what Lightning goes by
    if trainer.gradient_clip_val and str(trainer.precision) == "16-mixed" and is_fused:
        raise ValueError(
            "trainer.gradient_clip_val in 16-mixed takes an optimizer that is not fused: --model.optimizer.fused false"
        )
