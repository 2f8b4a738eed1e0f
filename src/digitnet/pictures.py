"""What TensorBoard shows beside curves: pictures of the augmentation, the confusions and the mistakes, and a layout."""

from __future__ import annotations

from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger

from digitnet import figures
from digitnet.augment import preview_augmentation
from digitnet.data import find_data
from digitnet.scores import CollectScores

NUM_ORIGINALS, NUM_DRAWS = 8, 8  # of the grid of augmented images
MAX_MISTAKES = 24
# The page of custom scalars: training and validation in one chart each. TensorBoard reads the tags as expressions.
LAYOUT = {
    "training": {
        "loss": ["Multiline", ["train/loss$", "val/loss"]],
        "loss of single steps": ["Multiline", ["train/loss_step"]],
        "accuracy": ["Multiline", ["train/acc", "val/acc"]],
    },
    "pace": {
        "images a second": ["Multiline", ["train/images_per_s"]],
        "learning rate": ["Multiline", ["lr-.*"]],
    },
}


class Pictures(CollectScores):
    """Give TensorBoard pictures of a run: augmented training images at the start, then the state of the validation.

    Confusion matrix, mistakes and a precision-recall curve per digit, of the last validation before each is drawn.

    Args:
        every_n_epochs: how often they are drawn, which takes about a second: at the first validation after so many
            epochs, and after the last epoch. 0 draws nothing.

    Raises:
        ValueError: ``every_n_epochs`` is negative.
    """

    def __init__(self, every_n_epochs: int = 5) -> None:
        super().__init__()
        if every_n_epochs < 0:
            raise ValueError(f"pictures.every_n_epochs is {every_n_epochs}; it is a number of epochs, or 0 for none")
        self.every_n_epochs = every_n_epochs
        self.is_new_run = True  # whether the folder has no beginning yet
        self.drawn_step = 0  # when they were drawn last
        self.periods = 0  # of every_n_epochs each, that are over and drawn

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.periods = trainer.current_epoch // max(self.every_n_epochs, 1)
        self.logits, self.labels = [], []  # of a sanity check
        if not self.is_new_run:
            return
        data = find_data(trainer)
        for writer in self._find_writers(trainer):
            writer.add_custom_scalars(LAYOUT)
            if self.every_n_epochs and data.augmentation is not None:
                self._draw_augmentation(data, writer)

    def _collect(self, *args: Any) -> None:
        if self.every_n_epochs:
            super()._collect(*args)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        periods = (trainer.current_epoch + 1) // self.every_n_epochs if self.every_n_epochs else 0
        if periods > self.periods and not trainer.sanity_checking:
            self.periods = periods
            self._draw_validation(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.every_n_epochs and self.labels and self.drawn_step != trainer.global_step:
            self._draw_validation(trainer)

    @staticmethod
    def _find_writers(trainer: L.Trainer) -> list[Any]:
        """The event files to write to; none but on the first of several processes."""
        if not trainer.is_global_zero:
            return []
        return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]

    @staticmethod
    def _draw_augmentation(data: Any, writer: Any) -> None:
        originals = data.datasets[0].images[:NUM_ORIGINALS, 0].numpy()
        draws = preview_augmentation(data.augmentation, originals, NUM_DRAWS, seed=0)
        figure = figures.draw_augmentation(originals, draws, "The first training images, augmented")
        writer.add_figure("train/augmentation", figure, 0, close=False)

    def _draw_validation(self, trainer: L.Trainer) -> None:
        self.drawn_step = trainer.global_step
        step = max(0, trainer.global_step - 1)  # where val/acc is
        gathered, all_labels = self.gather(trainer)
        probabilities, labels = gathered.softmax(dim=1).numpy(), all_labels.numpy()
        images = find_data(trainer).datasets[1].images[: len(labels), 0].numpy()
        predictions, confidences = probabilities.argmax(axis=1), probabilities.max(axis=1)
        for writer in self._find_writers(trainer):
            confusion = figures.draw_confusion(labels, predictions)
            mistakes = figures.draw_mistakes(images, labels, predictions, confidences, limit=MAX_MISTAKES)
            writer.add_figure("val/confusion", confusion, step, close=False)
            writer.add_figure("val/mistakes", mistakes, step, close=False)
            for digit in np.unique(labels).tolist():
                writer.add_pr_curve(f"val/digit_{digit}", labels == digit, probabilities[:, digit], step)
