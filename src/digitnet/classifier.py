"""DigitClassifier: the training system around a network."""

from __future__ import annotations

import math
from copy import deepcopy
from functools import partial
from typing import Any, Literal, Self

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.plugins import Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor, nn
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR, ReduceLROnPlateau
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from digitnet.checkpoints import is_of_architecture, make_net
from digitnet.distillation import Teacher
from digitnet.model import ARCHITECTURES, Committee, Network
from digitnet.selection import HardExamples

Batch = tuple[Tensor, Tensor]
MAX_COLUMNS = 10
METRICS = ("train/loss", "train/acc", "val/loss", "val/acc")  # of each epoch


class MeanLoss(MeanMetric):
    """A running mean that is counted in float32 at least, whatever dtype the module is turned into.

    Lightning's bf16-true turns all of a module, metrics too, and bfloat16 counts no further than 256 by ones. And one
    that validated before it trains can still do so: torchmetrics leaves what inference mode made, which is not updated.
    """

    def reset(self) -> None:
        with torch.inference_mode(False):
            super().reset()

    def _apply(self, fn: Any, exclude_state: Any = "") -> Self:
        super()._apply(fn, exclude_state)
        if torch.finfo(self.dtype).bits < 32:
            self.set_dtype(torch.float32)
        return self


class DigitClassifier(L.LightningModule):
    """Trains and scores a network: cross-entropy loss, accuracy, any torch optimizer and schedule.

    Batches are ``(images, labels)``: images (B, 1, 28, 28) uint8, labels (B,) int64. Metrics are updated every step
    and logged once an epoch (``train/loss``, ``train/acc``, ``val/...``, ``test/...``), as logging costs more.

    Args:
        architecture: "digitnet", the write-up's network; "upright", the same on digits set upright
            (digitnet.UprightNet); or "zoom", seen from near as well, and augmented by itself (digitnet.ZoomNet).
        dropout: probability of dropping a unit after each of the two hidden dense layers, in [0, 1).
        conv_dropout: probability of dropping a value after each pooling, in [0, 1).
        optimizer: any torch optimizer, by class path or name; its arguments follow as ``init_args``. Of the default's,
            lr 0.001, eps 1e-7 and fused hold for another one, too, where it has such and they are not given.
        lr_scheduler: any torch learning-rate schedule, stepped once an epoch (OneCycleLR and CyclicLR: once a step);
            none by default. A OneCycleLR of a config that does not say its length is as long as the training.
        selection: chooses which images of each augmented batch to train on, such as digitnet.HardExamples; the loss
            and accuracy in training are then of those. All of them by default.
        teacher: gives what to train towards in place of the labels, such as digitnet.Teacher; the loss in training is
            then towards that. The labels by default.
        channels_last: keep the weights in channels-last memory format, which the images then follow. By default, where
            it is the faster one: on CPU and CUDA.
        columns: how many networks of that architecture are trained at once, each by itself, and answer as one, with the
            mean of their probabilities (digitnet.model.Committee). Loss and accuracy in training are then means over
            the single columns; clipping gradients by their norm acts on all columns together.

    Raises:
        ValueError: when there is no such architecture, a probability lies outside [0, 1), ``columns`` lies outside
            [1, 10].
    """

    def __init__(
        self,
        architecture: Literal["digitnet", "upright", "zoom"] = "digitnet",
        dropout: float = 0.2,
        conv_dropout: float = 0.0,
        # A lambda, because the command line can read its defaults back; epsilon is Keras', PyTorch's is 1e-8.
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=1e-3, eps=1e-7, fused=True),
        lr_scheduler: LRSchedulerCallable | None = None,
        selection: HardExamples | None = None,
        teacher: Teacher | None = None,
        channels_last: bool | None = None,
        columns: int = 1,
    ) -> None:
        super().__init__()
        # Functions and objects cannot be stored in a checkpoint that is safe to load; the run's config.yaml names them.
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler", "selection", "teacher"])
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.selection = selection
        self.teacher = teacher
        self.channels_last = channels_last
        self.validated_epoch = -1  # the last one that was
        self.step_loss: Tensor | None = None  # of the last batch trained on
        if architecture not in ARCHITECTURES:
            raise ValueError(f"architecture is {architecture}; there are {', '.join(ARCHITECTURES)}")
        if not 1 <= columns <= MAX_COLUMNS:
            raise ValueError(f"columns is {columns}; it must be from 1 to {MAX_COLUMNS}")
        members = [ARCHITECTURES[architecture](dropout, conv_dropout) for _ in range(columns)]
        self.net: Network = Committee(members) if columns > 1 else members[0]
        # For the sizes and FLOPs of Lightning's summary.
        self.example_input_array = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
        self.metrics = nn.ModuleDict()
        for stage in ("train", "val", "test"):
            self.metrics[f"{stage}/loss"] = MeanLoss(nan_strategy="disable")  # or it would hide a NaN loss
            self.metrics[f"{stage}/acc"] = MulticlassAccuracy(num_classes=10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 10) of images (B, 1, 28, 28), uint8 in [0, 255] or float in [0, 1]; see Committee for columns."""
        return self.net(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch if self.selection is None else self.selection(*batch)
        if self.teacher is None:
            logits, targets = self(images), None
        else:
            logits, targets = self.teacher.teach(self.net, images, labels)
        columns = len(logits) // len(labels)
        loss, _ = self._score("train", logits, labels.repeat(columns), targets)
        self.step_loss = loss.detach()
        return columns * loss  # each gets all its gradient

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        return self._score("val", self(images), labels)[1]

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        return self._score("test", self(images), labels)[1]

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Logits (B, 10); for ``Trainer.predict``, which the command line has no need of."""
        return self(batch[0])

    def _score(
        self, stage: str, logits: Tensor, labels: Tensor, targets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Update the stage's metrics; return the mean loss, a scalar, and the logits (B, 10) in float32.

        The loss is towards ``targets``, probabilities (B, 10), where they are given; else towards the labels.
        """
        logits = logits.float()  # the loss in full precision, whatever the network computed in
        losses = F.cross_entropy(logits, labels if targets is None else targets, reduction="none")  # (B,)
        self.get_metric(f"{stage}/loss").update(losses.detach())
        self.get_metric(f"{stage}/acc").update(logits.detach(), labels)
        return losses.mean(), logits

    def get_metric(self, name: str) -> Metric:
        """The running metric of a stage, such as "val/acc"."""
        metric = self.metrics[name]
        assert isinstance(metric, Metric)
        return metric

    def configure_optimizers(self, num_steps: float | None = None) -> Any:
        """The optimizer and its schedule, for Lightning.

        Args:
            num_steps: of the whole training; the trainer knows it once the run has begun.

        Raises:
            ValueError: the schedule needs an end, and the training has none.
        """
        optimizer = self.optimizer(self.parameters())
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self._make_scheduler(optimizer, num_steps)
        settings: dict[str, Any] = {"scheduler": scheduler, "interval": "epoch"}
        if isinstance(scheduler, (OneCycleLR, CyclicLR)):
            settings["interval"] = "step"  # what these two count
        if isinstance(scheduler, ReduceLROnPlateau):
            settings["monitor"] = getattr(scheduler, "monitor", "val/loss")  # Lightning's own class has one
            settings["strict"] = settings["monitor"] not in METRICS  # not every epoch need be validated
        return {"optimizer": optimizer, "lr_scheduler": settings}

    def _make_scheduler(self, optimizer: torch.optim.Optimizer, num_steps: float | None) -> Any:
        make = self.lr_scheduler
        assert make is not None
        lengths = ("total_steps", "epochs", "steps_per_epoch")
        if not isinstance(make, partial) or "total_steps" not in make.keywords:  # a config's have all their arguments
            return make(optimizer)
        given = make.keywords
        if any(given.get(name) is not None for name in lengths):
            return make(optimizer)
        steps = self.trainer.estimated_stepping_batches if num_steps is None else num_steps
        if steps == math.inf:
            raise ValueError(
                "model.lr_scheduler ends with the training, which has no end known in steps; give "
                "--trainer.max_epochs, or --model.lr_scheduler.total_steps"
            )
        # Where its rise or its fall lasts a step or less, it divides by zero.
        pct_start = given.get("pct_start", 0.3)
        shortest = int(1 / pct_start) + 1 if pct_start else 1
        return make(optimizer, total_steps=max(int(steps), shortest) + (pct_start == 1))

    def lr_scheduler_step(self, scheduler: Any, metric: Any | None) -> None:
        if not isinstance(scheduler, ReduceLROnPlateau):
            super().lr_scheduler_step(scheduler, metric)

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        # Lightning refuses fused optimizers in mixed precision, for the scale that float16 needs; bfloat16 has none.
        if str(self.trainer.precision) == "bf16-mixed" and gradient_clip_val:
            algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
            Precision.clip_gradients(self.trainer.precision_plugin, optimizer, gradient_clip_val, algorithm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_train_epoch_end(self) -> None:
        self._log_epoch("train")
        # Lightning steps these after the epoch's checkpoint is written, so that going on would miss the step.
        for config in self.trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, ReduceLROnPlateau):
                name = str(config.monitor)
                is_train = name in ("train/loss", "train/acc")
                value = self.get_metric(name).compute() if is_train else self.trainer.callback_metrics.get(name)
                if value is not None and (is_train or self.validated_epoch == self.current_epoch):
                    config.scheduler.step(value)

    def on_validation_epoch_end(self) -> None:
        self.validated_epoch = -1 if self.trainer.sanity_checking else self.current_epoch
        self._log_epoch("val")

    def on_test_epoch_end(self) -> None:
        self._log_epoch("test")

    def _log_epoch(self, stage: str) -> None:
        names = (f"{stage}/loss", f"{stage}/acc")
        self.log_dict({name: self.get_metric(name) for name in names}, prog_bar=True)

    def setup(self, stage: str) -> None:
        self._choose_memory_format()

    def _choose_memory_format(self) -> None:
        channels_last = self.channels_last
        if channels_last is None:
            device = self.device if self._trainer is None else self.trainer.strategy.root_device
            channels_last = device.type in ("cpu", "cuda")
        self.net.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.selection is not None:
            checkpoint["selection"] = self.selection.state_dict()
        if "callbacks" not in checkpoint and self._trainer is not None:  # weights only: Lightning leaves callbacks out
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, WeightAveraging):
                    callback.on_save_checkpoint(self.trainer, self, checkpoint)
                    for key in ("current_model_state", "averaging_state"):  # for going on with training
                        checkpoint.pop(key, None)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.selection is not None and "selection" in checkpoint:
            self.selection.load_state_dict(checkpoint["selection"])
        is_scored = self._trainer is None or not self.trainer.training
        if is_scored and not is_of_architecture(checkpoint, self.net):
            self.net = make_net(checkpoint)  # what is scored is what the file holds, whatever the settings say
            self._choose_memory_format()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy with weights of its own, as AverageWeights makes; what it is trained with is shared.

        The command line's optimizer hangs on to the whole Trainer, which holds locks where it started processes.
        """
        for part in (self.optimizer, self.lr_scheduler, self.selection, self.teacher):
            memo[id(part)] = part
        duplicate = type(self).__new__(type(self))
        memo[id(self)] = duplicate
        vars(duplicate).update(deepcopy(self.__getstate__(), memo))
        return duplicate
