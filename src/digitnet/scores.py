"""What the network said of each image, and what ``test`` and ``validate`` leave behind of it."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from digitnet.checkpoints import (
    count_trained_on,
    find_folder,
    find_run,
    is_same_source,
    read_data_settings,
    read_temperature,
)
from digitnet.data import find_data
from digitnet.files import write_file, write_json
from digitnet.machine import describe_environment


class CollectScores(Callback):
    """Keeps what the network said of each image of a validation or a test, for callbacks that build on it."""

    def __init__(self) -> None:
        self.logits: list[Tensor] = []
        self.labels: list[Tensor] = []

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.logits, self.labels = [], []

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.logits, self.labels = [], []

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self._collect(*args)

    def on_test_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self._collect(*args)

    def _collect(self, logits: Tensor, batch: tuple[Tensor, Tensor], *_: int) -> None:
        self.logits.append(logits.cpu())
        self.labels.append(batch[1].cpu())

    def gather(self, trainer: L.Trainer) -> tuple[Tensor, Tensor]:
        """Logits (N, 10) and labels (N,) of all processes, in the order of the data set; all of them must call it."""
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


def find_report_folder(checkpoint: Path, trained_on: dict[str, Any], source: str) -> Path:
    """Where the scores of a checkpoint on a source of digits go.

    ``report`` for the data it was trained on, as ``read_data_settings`` has them; for other data ``report_<name>``, so
    that what it made of its own stays, or, where that holds something else already, ``report_<name>_2`` ...
    """
    folder = find_folder(checkpoint, "report")
    if is_same_source(trained_on.get("source", source), source):
        return folder
    folder = found = folder.with_name(f"{folder.name}_{Path(source).absolute().stem}")
    number = 1
    while found.exists() and any(found.iterdir()) and not _holds(found, source):
        number += 1
        found = folder.with_name(f"{folder.name}_{number}")
    return found


def _holds(folder: Path, source: str) -> bool:
    for name in ("metrics.json", "validate_metrics.json", "robustness.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return is_same_source(str(json.loads((folder / name).read_text())["dataset"]), source)
    return False


class WriteScores(CollectScores):
    """Print and keep what ``test`` or ``validate`` found.

    ``metrics.json`` and ``predictions.csv``; for ``validate``, both names begin with ``validate_``.

    Args:
        checkpoint: the checkpoint scored.
        report_dir: the folder where it is kept.
        command: what was typed, for the record.
    """

    def __init__(self, checkpoint: Path, report_dir: Path, command: str) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        self.command = command
        self.report_dir = report_dir

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer, "test", prefix="")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer, "val", prefix="validate_")

    def _write(self, trainer: L.Trainer, subset: str, prefix: str) -> None:
        data = find_data(trainer)
        part = ("train", "val", "test").index(subset)
        start, num_images = sum(data.split[:part]), data.split[part]
        logits, labels = self.gather(trainer)
        if not trainer.is_global_zero:
            return
        assert len(labels) == num_images, f"{len(labels)} images scored of {num_images}"
        stored = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        temperature = read_temperature(stored)
        # As predict, serve and export give it.
        confidence, prediction = (logits / (temperature or 1.0)).softmax(dim=1).max(dim=1)
        num_errors = int((prediction != labels).sum())
        run_dir = find_run(self.checkpoint)
        config = (run_dir / "config.yaml").read_bytes() if run_dir else None
        metrics = {
            "dataset": data.source,
            "data_dir": str(data.data_dir) if data.data_dir else None,
            "subset": subset,
            "split": list(data.split),
            "first_index": start,
            "checkpoint": str(self.checkpoint),
            "epoch": stored.get("epoch") if stored.get("global_step") else None,  # null: no training's own checkpoint
            "num_images": num_images,
            "num_trained_on": count_trained_on(read_data_settings(stored), data.source, start, num_images),
            "num_errors": num_errors,
            "accuracy": 1 - num_errors / num_images,
            "loss": float(trainer.callback_metrics[f"{subset}/loss"]),
            "temperature": temperature,  # of the confidences; null: the checkpoint holds no calibration
            "config_sha256": hashlib.sha256(config).hexdigest() if config else None,
            "seed": yaml.safe_load(config).get("seed_everything") if config else None,
            "command": self.command,
            "precision": str(trainer.precision),
            **describe_environment(),
        }
        rows = ["index,label,prediction,confidence"]
        for offset, row in enumerate(zip(labels.tolist(), prediction.tolist(), confidence.tolist(), strict=True)):
            rows.append(f"{start + offset},{row[0]},{row[1]},{row[2]:.6f}")
        write_file(self.report_dir / f"{prefix}predictions.csv", ("\n".join(rows) + "\n").encode())
        write_json(self.report_dir / f"{prefix}metrics.json", metrics)
        named = "test" if subset == "test" else "validation"
        print(
            f"images    {num_images:,} of {named} ({data.source}, {start:,} to {start + num_images - 1:,})\n"
            f"accuracy  {metrics['accuracy']:.2%}\n"
            f"mistakes  {num_errors:,}\n"
            f"loss      {metrics['loss']:.4f}\n"
            f"report    {self.report_dir / (f'{prefix}metrics.json' if prefix else '')}"
        )
