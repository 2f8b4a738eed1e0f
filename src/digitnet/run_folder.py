"""A run's folder: one process's own while it is at work in it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from lightning.pytorch.loggers import TensorBoardLogger

from digitnet.files import PART, make_writable, tell_command

LOCK = ".lock"  # a file in each run's folder, held by the process that is at work in it


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
