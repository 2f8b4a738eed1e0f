"""What it takes to stop a run and resume it as if it had never stopped, which Lightning's callbacks lack."""

from __future__ import annotations

import os
import shlex
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason as Reason
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info

from digitnet.checkpoints import is_whole, save_checkpoint
from digitnet.files import shorten, tell_command, write_file


def find_keeper(trainer: L.Trainer, of_best: bool) -> ModelCheckpoint | None:
    """The run's own ModelCheckpoint, of the best epoch or of the last one; others, which a user added, come before."""
    keepers = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
    return next((each for each in reversed(keepers) if bool(each.monitor) == of_best), None)


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
