"""What Lightning's own callbacks lack."""

from __future__ import annotations

import hashlib
import json
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from digitnet.classifier import DigitClassifier
from digitnet.machine import describe_hardware, list_versions


class SeedEachEpoch(Callback):
    """Restart the random generators at each epoch from (the run's seed, the epoch, the rank).

    Augmentation and dropout then draw the same in a run that was stopped and resumed as in one that was not, with no
    generator state to save. The order of the data is the data module's own business, and repeatable in the same way.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Where seed_everything keeps it. Without it, whatever this process began with.
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed()))

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
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: tuple[Tensor, Tensor],
        batch_idx: int,
    ) -> None:
        self.num_images += len(batch[1])
        if trainer.is_last_batch and pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self.seconds = time.perf_counter() - self.start

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        images_per_s = self.num_images * trainer.world_size / self.seconds
        pl_module.log("train/images_per_s", images_per_s, rank_zero_only=True)


class PrintEpochs(Callback):
    """One line an epoch, for logs and other places where a progress bar is no use."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # This hook comes before the module's own, which logs the training metrics.
        assert isinstance(pl_module, DigitClassifier)
        train = {name: pl_module.get_metric(name).compute() for name in ("train/loss", "train/acc")}
        values = {**train, **{name: x for name, x in trainer.callback_metrics.items() if name.startswith("val/")}}
        rank_zero_info(f"epoch {trainer.current_epoch}  " + "  ".join(f"{k} {v:.4f}" for k, v in values.items()))


class HyperparameterSummary(Callback):
    """Give TensorBoard's HPARAMS page the run's settings and ``hp/val_acc``, the best validation accuracy so far."""

    best = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.global_step == 0:
                logger.log_hyperparams(dict(logger.hparams), {"hp/val_acc": 0.0})

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.best = max(self.best, float(trainer.callback_metrics.get("val/acc", 0)))
            for logger in trainer.loggers:
                logger.log_metrics({"hp/val_acc": self.best}, step=trainer.global_step)

    def state_dict(self) -> dict[str, float]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self.best = state_dict["best"]


class ResumeHint(Callback):
    """When ``fit`` is interrupted, say what is kept and what to type to go on."""

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, KeyboardInterrupt):
            return
        last = next((c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and not c.monitor), None)
        if last and last.best_model_path:
            rank_zero_info(
                f"stopped in epoch {trainer.current_epoch}; the epochs before it are kept. "
                f"To go on: python -m digitnet fit --ckpt_path {last.best_model_path}"
            )
        else:
            rank_zero_info(f"stopped in epoch {trainer.current_epoch}, before the first checkpoint; nothing is kept")


class WriteScores(Callback):
    """Print and keep what ``test`` or ``validate`` found, in the run's ``report/`` folder.

    ``metrics.json`` and ``predictions.csv``; for ``validate``, both names begin with ``validate_``.

    Args:
        checkpoint: the checkpoint scored.
        run_dir: its run's folder; None puts ``report/`` beside the checkpoint.
        command: what was typed, for the record.
    """

    def __init__(self, checkpoint: Path, run_dir: Path | None, command: str) -> None:
        self.checkpoint = checkpoint
        self.run_dir = run_dir
        self.command = command
        self.report_dir = (run_dir or checkpoint.absolute().parent) / "report"
        self.logits: list[Tensor] = []
        self.labels: list[Tensor] = []

    def on_test_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self._collect(*args)

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self._collect(*args)

    def _collect(self, logits: Tensor, batch: tuple[Tensor, Tensor], *_: int) -> None:
        self.logits.append(logits.cpu())
        self.labels.append(batch[1].cpu())

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer, "test", prefix="")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer, "val", prefix="validate_")

    def _gather(self, trainer: L.Trainer) -> tuple[Tensor, Tensor]:
        """Logits (N, 10) and labels (N,) of all processes, in the order of the data set."""
        logits, labels = torch.cat(self.logits), torch.cat(self.labels)
        if trainer.world_size == 1:
            return logits, labels
        shards: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(shards, (logits, labels))
        logits, labels = (torch.cat(parts) for parts in zip(*shards, strict=True))
        # Process r scored images r, r + world_size, r + 2 * world_size ...
        indices = torch.cat([torch.arange(rank, len(labels), trainer.world_size) for rank in range(trainer.world_size)])
        order = indices.argsort()
        return logits[order], labels[order]

    def _write(self, trainer: L.Trainer, subset: str, prefix: str) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        start = sum(data.split[: ("train", "val", "test").index(subset)])
        num_images = data.split[("train", "val", "test").index(subset)]
        logits, labels = self._gather(trainer)
        if not trainer.is_global_zero:
            return
        assert len(labels) == num_images, f"{len(labels)} images scored of {num_images}"
        confidence, prediction = logits.softmax(dim=1).max(dim=1)
        num_errors = int((prediction != labels).sum())
        config = self.run_dir / "config.yaml" if self.run_dir else None
        stored = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        metrics = {
            "dataset": data.source,
            "subset": subset,
            "split": list(data.split),
            "first_index": start,
            "checkpoint": str(self.checkpoint),
            "epoch": stored.get("epoch"),
            "num_images": num_images,
            "num_errors": num_errors,
            "accuracy": 1 - num_errors / num_images,
            "loss": float(trainer.callback_metrics[f"{subset}/loss"]),
            "config_sha256": hashlib.sha256(config.read_bytes()).hexdigest() if config else None,
            "seed": os.environ.get("PL_GLOBAL_SEED"),
            "command": self.command,
            "precision": str(trainer.precision),
            "versions": list_versions(),
            "hardware": describe_hardware(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        rows = ["index,label,prediction,confidence"]
        for offset, row in enumerate(zip(labels.tolist(), prediction.tolist(), confidence.tolist(), strict=True)):
            rows.append(f"{start + offset},{row[0]},{row[1]},{row[2]:.6f}")
        self.report_dir.mkdir(parents=True, exist_ok=True)
        write_text(self.report_dir / f"{prefix}predictions.csv", "\n".join(rows) + "\n")
        write_text(self.report_dir / f"{prefix}metrics.json", json.dumps(metrics, indent=2) + "\n")
        print(
            f"images    {num_images:,} ({data.source}, {start:,} to {start + num_images - 1:,})\n"
            f"accuracy  {metrics['accuracy']:.2%}\n"
            f"mistakes  {num_errors:,}\n"
            f"loss      {metrics['loss']:.4f}\n"
            f"report    {os.path.relpath(self.report_dir)}"
        )


def write_text(path: Path, text: str) -> None:
    """Write all or nothing: a file beside it, renamed into place."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)
