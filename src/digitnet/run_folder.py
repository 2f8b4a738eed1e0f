"""A run's folder: where its logger puts it, and one process's own while it is at work in it."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from digitnet.files import PART, make_writable, shorten, tell_command

LOCK = ".lock"  # a file in each run's folder, held by the process that is at work in it


def find_first_logger(config: Any) -> Any:
    """The settings of the trainer's logger, or of the first of several: its folder is the run's. None without one."""
    loggers = config.trainer.logger
    return next(iter(loggers), None) if isinstance(loggers, list) else loggers or None


def prepare_loggers(config: Any, run_dir: Path | None) -> None:
    """Point the loggers at the folder of the run's checkpoints: a new one, or that of the run to resume.

    Args:
        config: of ``fit``; changed in place.
        run_dir: of the run to resume; None for a new one.

    Raises:
        ValueError: a logger would write elsewhere, or the run cannot be resumed.
    """
    loggers = config.trainer.logger if isinstance(config.trainer.logger, list) else [config.trainer.logger]
    for settings in (getattr(logger, "init_args", None) or {} for logger in loggers):
        if value := settings.get("sub_dir"):
            raise ValueError(f"trainer.logger has sub_dir {value}, which splits a run over two folders; leave it out")
        for name in ("save_dir", "name"):
            if value := settings.get(name):
                if "://" in str(value):  # a logger writes there, checkpoints would go to a folder of that name
                    raise ValueError(f"trainer.logger.{name} is {value}; a run needs a folder of this machine")
                # Lightning expands "~/runs" and "$SCRATCH" for a logger's own files, not for the checkpoints beside.
                settings[name] = os.path.expanduser(os.path.expandvars(value))  # noqa: PTH111  leaves unknown users be
    first = find_first_logger(config)
    is_tensorboard = str(getattr(first, "class_path", "")).endswith("TensorBoardLogger")
    if not run_dir:
        if hasattr(first, "class_path") and not is_tensorboard:
            rank_zero_info("trainer.logger: the first is no TensorBoardLogger, so a run that is stopped ends there")
        return
    if not is_tensorboard:
        raise ValueError(
            f"going on in {run_dir} takes a run whose first logger is a TensorBoardLogger; its config.yaml or "
            "--trainer.logger names another"
        )
    run = Path(os.path.normpath(run_dir.absolute()))  # "." and ".." are no names
    first.init_args.save_dir = str(shorten(run.parent.parent))
    first.init_args.name = run.parent.name
    first.init_args.version = run.name


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
        last = folder / "checkpoints" / "last.ckpt"
        to_go_on_with = f"to go on: {tell_command('fit', '--ckpt_path', last)}"
        nothing = "it has no checkpoint yet; where no fit is at work in it, remove it"
        raise ValueError(f"{folder} holds a run; {to_go_on_with if last.exists() else nothing}")
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


def read_precision(run: Path) -> str:
    """The precision that a run was begun in.

    Raises:
        ValueError: its record is damaged.
    """
    path = run / "hparams.yaml"
    try:
        return str(yaml.safe_load(path.read_text(encoding="utf-8"))["precision"])
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged or lacks the precision; remove {run}, and it is trained anew") from error


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
