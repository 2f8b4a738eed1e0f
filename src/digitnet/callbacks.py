"""What Lightning's own callbacks lack."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor


class SeedEachEpoch(Callback):
    """Restart the random generators at each epoch from (the run's seed, the epoch, the rank).

    Augmentation and dropout then draw the same in a run that was stopped and resumed as in one that was not, with no
    generator state to save. The order of the data is the data module's own business, and repeatable in the same way.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.seed = torch.initial_seed()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        entropy = (self.seed, trainer.current_epoch, trainer.global_rank)
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))


class RestoreBestWeights(Callback):
    """After ``fit``, put the best checkpoint's weights back into the module (Keras' ``restore_best_weights``).

    Best as the run's ModelCheckpoint with a ``monitor`` has it. Lightning leaves the last weights in the module.
    """

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.monitor and callback.best_model_path:
                checkpoint = torch.load(callback.best_model_path, map_location=pl_module.device, weights_only=True)
                pl_module.load_state_dict(checkpoint["state_dict"])
                rank_zero_info(f"best {callback.monitor} {callback.best_model_score:.4f}: {callback.best_model_path}")


class Throughput(Callback):
    """Log training speed once an epoch: ``train/images_per_s``, validation and checkpoints not counted."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.num_images = 0
        self.start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: tuple[Tensor, Tensor], batch_idx: int
    ) -> None:
        self.num_images += len(batch[1])
        if trainer.is_last_batch:
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize(pl_module.device)
            self.seconds = time.perf_counter() - self.start

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        images_per_s = self.num_images * trainer.world_size / self.seconds
        pl_module.log("train/images_per_s", images_per_s, rank_zero_only=True)


class HyperparameterSummary(Callback):
    """Give TensorBoard's HPARAMS page the run's settings and ``hp/val_acc``, the best validation accuracy so far."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(logger.hparams, {"hp/val_acc": 0.0})

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking and isinstance(trainer.early_stopping_callback, EarlyStopping):
            best = float(trainer.early_stopping_callback.best_score)
            for logger in trainer.loggers:
                logger.log_metrics({"hp/val_acc": best}, step=trainer.global_step)
