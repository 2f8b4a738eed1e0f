"""What stands around a run: its folder is one process's own, and what breaks it is told in one line."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import lightning as L
import torch
from filelock import FileLock, Timeout
from lightning.pytorch.loggers import TensorBoardLogger


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
    is_named = logger._version is not None
    try:
        Path(logger.log_dir).parent.mkdir(parents=True, exist_ok=True)
        while True:
            folder = Path(logger.log_dir)
            try:
                folder.mkdir(exist_ok=is_named)
                break
            except FileExistsError:
                if is_named:
                    raise
                logger._version = None  # another process was faster: look for the next one again
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"cannot write to {logger.log_dir} ({os.strerror(error.errno or 0)}); "
            "name another place with --trainer.logger.save_dir"
        ) from error
    if (folder / "config.yaml").exists() and not to_go_on:
        raise ValueError(f"{folder} holds a run; go on with fit --ckpt_path {folder}/checkpoints/last.ckpt")
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"another fit is at work in {folder}; wait for it to end, or stop it") from error
    except (NotImplementedError, OSError):  # a disk that knows no locks
        pass
    try:
        if lock.is_locked:
            for abandoned in folder.rglob(".*.part"):  # by a process that was killed: no other is at work here
                abandoned.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def explain_failures(trainer: L.Trainer) -> Iterator[None]:
    """Turn what PyTorch says of a full memory or a dead process into one line.

    Raises:
        OSError: in their place.
    """
    try:
        yield
    except (RuntimeError, torch.OutOfMemoryError) as error:
        text = str(error)
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
            raise OSError("out of memory; try a smaller --data.batch_size or --data.eval_batch_size") from error
        if trainer.world_size > 1 and ("onnection" in text or isinstance(error, torch.distributed.DistError)):
            raise OSError(
                f"process {trainer.global_rank} of {trainer.world_size} lost another one, which ended or was killed; "
                "all stop. After fit, go on with: python -m digitnet fit --ckpt_path last"
            ) from error
        raise
    finally:
        # Every five seconds Lightning looks whether a process it started ended badly, and if so kills this one, which
        # now has a line to print or a report to draw.
        getattr(trainer.strategy.launcher, "procs", []).clear()
