"""What stands around a run: what would spoil it is refused, its folder is one process's own, what breaks it is told."""

from __future__ import annotations

import contextlib
import json
import shutil
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from filelock import FileLock, Timeout
from jsonargparse import Namespace
from lightning.pytorch.loggers import TensorBoardLogger
from torch.optim.lr_scheduler import ReduceLROnPlateau

from digitnet.classifier import METRICS
from digitnet.errors import nearest_name
from digitnet.files import PART, make_writable, tell_command

# What makes best.ckpt the best epoch's and last.ckpt the last one's.
FIXED_FOR_BOTH = {
    "dirpath": None, "save_top_k": 1, "save_last": None, "every_n_epochs": None, "every_n_train_steps": None,
    "train_time_interval": None, "enable_version_counter": False, "auto_insert_metric_name": False,
}  # fmt: skip
FIXED: dict[str, dict[str, Any]] = {
    "best_checkpoint": {**FIXED_FOR_BOTH, "filename": "best"},
    "last_checkpoint": {
        **FIXED_FOR_BOTH, "filename": "last", "monitor": None, "save_weights_only": False,
        "save_on_train_epoch_end": True,
    },
}  # fmt: skip
LOCK = ".lock"  # a file in each run's folder, held by the process that is at work in it
AT_LEAST = {"trainer.check_val_every_n_epoch": 1, "trainer.accumulate_grad_batches": 1, "early_stopping.patience": 0}


@contextlib.contextmanager
def claim_folder(logger: TensorBoardLogger, to_go_on: bool) -> Iterator[None]:
    """Make a run's folder this process's own until the block ends: runs started at once never share one.

    Args:
        logger: of the run. Without a version of its own it gets the next one that is free.
        to_go_on: whether the folder is that of an earlier run.

    Raises:
        OSError: the folder cannot be made or written.
        ValueError: another ``fit`` is at work in it, or it holds another run.
    """
    flag = "--trainer.logger.save_dir"
    if logger._version is None:
        make_writable(Path(logger.log_dir).parent, flag)
        while True:
            try:
                Path(logger.log_dir).mkdir()
                break
            except FileExistsError:
                logger._version = None  # another process was faster: look for the next one again
    folder = Path(logger.log_dir)
    make_writable(folder, flag)
    if (folder / "config.yaml").exists() and not to_go_on:
        go_on = tell_command("fit", "--ckpt_path", folder / "checkpoints" / "last.ckpt")
        raise ValueError(f"{folder} holds a run; to go on: {go_on}")
    with _lock(folder) as is_locked:
        if is_locked:
            for mine in (folder, folder / "checkpoints"):  # not where export or test may be at work
                for abandoned in mine.glob(f"{PART}*"):  # by a fit that was killed
                    abandoned.unlink(missing_ok=True)
        yield


def discard_run(folder: Path) -> None:
    """Empty the folder, if any, of a run that was stopped before it had a checkpoint to go on from.

    Raises:
        ValueError: a ``fit`` is at work in it, or it was finished meanwhile.
    """
    if not folder.is_dir():
        return
    with _lock(folder):
        if (folder / "result.json").exists():
            raise ValueError(f"{folder} was finished by another process meanwhile; type the command again")
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK:  # Windows removes no file that is open
                path.unlink()


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"another fit is at work in {folder}; wait for it to end, or stop it") from error
    except (NotImplementedError, OSError):  # a disk that knows no locks
        pass
    try:
        yield lock.is_locked
    finally:
        lock.release()


@contextlib.contextmanager
def explain_failures(trainer: L.Trainer) -> Iterator[None]:
    """Turn what PyTorch says of a full memory or a dead process, and a callback of its settings, into one line.

    Raises:
        OSError, ValueError: in their place.
    """
    try:
        yield
    except (AttributeError, ImportError, TypeError) as error:
        _explain_callback(error)
        raise
    except (RuntimeError, torch.OutOfMemoryError) as error:
        text = str(error)
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
            raise OSError("out of memory; try a smaller --data.batch_size or --data.eval_batch_size") from error
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
        config: of fit; where a training metric is watched, it is made to be looked at when it is there.

    Raises:
        ValueError: there is one.
    """
    for key, at_least in AT_LEAST.items():
        if (value := config.get(key)) is not None and value < at_least:
            raise ValueError(f"{key} is {value}; it must be at least {at_least}")
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
        raise ValueError(f"model.optimizer: {type(optimizer).__name__}: {error}") from error
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
