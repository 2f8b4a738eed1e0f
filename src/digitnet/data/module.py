"""From images in memory to batches on the device."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from digitnet.data.cache import Digits
from digitnet.data.sources import fetch_digits

Batch = tuple[Tensor, Tensor]


def find_data(trainer: L.Trainer) -> MNISTDataModule:
    """The data that a Trainer works on, an MNISTDataModule in every command of ours."""
    data: MNISTDataModule = trainer.datamodule  # type: ignore[attr-defined]  # which Lightning does not declare
    return data


class DigitDataset(Dataset[Batch]):
    """Digits in memory, fetched a batch at a time: one indexing per batch instead of one per image.

    Args:
        digits: the images and labels.
    """

    def __init__(self, digits: Digits) -> None:
        self.images = torch.from_numpy(digits.images)[:, None]  # (N, 1, 28, 28) uint8
        self.labels = torch.from_numpy(digits.labels).long()  # (N,) int64

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> Batch:
        """A whole batch: images (B, 1, 28, 28) uint8 and labels (B,) int64."""
        picks = torch.tensor(indices, device=self.images.device)
        return self.images[picks], self.labels[picks]

    def to(self, device: torch.device) -> DigitDataset:
        """The same digits in the memory of a device, where batches are then made, too."""
        moved = copy.copy(self)
        moved.images, moved.labels = self.images.to(device), self.labels.to(device)
        return moved


def keep_batch(batch: Any) -> Any:
    """The collate function of a data set whose ``__getitems__`` returns whole batches."""
    return batch


class MNISTDataModule(L.LightningDataModule):
    """Digits cut in order into training, validation and test sets; training images augmented on the batch's device.

    The order of the training images follows from the seed given to ``seed_everything`` (0 without one) and the epoch.

    Args:
        source: "mnist" (OpenML's mnist_784, or a mirror of it), "digits" (scikit-learn's bundled digits, no network),
            or the path of your own IDX folder, .npz or .arff.
        data_dir: where downloads and the decoded cache are kept; scikit-learn's data home by default
            (SCIKIT_LEARN_DATA, or ~/scikit_learn_data).
        split: how many images to train, validate and test on, in this order from the first; they must add up to all
            there are. [60000, 5000, 5000] is the write-up's; [55000, 5000, 10000] ends in MNIST's classic test set.
        batch_size: training images a step, on each device.
        eval_batch_size: validation and test images a step, on each device.
        augmentation: what is done to each training batch: a torchvision transform, or anything else that takes images
            and returns images, by class path, such as digitnet.augment.RandomAffine; nothing by default.

    Raises:
        ValueError: the split does not add up, or a size is not positive.
    """

    def __init__(
        self,
        source: str = "mnist",
        data_dir: str | None = None,
        split: tuple[int, int, int] = (60_000, 5_000, 5_000),
        batch_size: int = 32,
        eval_batch_size: int = 250,
        augmentation: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__()
        # For TensorBoard's HPARAMS page. Plain values, as checkpoints store them and must stay safe to load.
        self.save_hyperparameters(ignore=["data_dir", "augmentation"])
        if len(split) != 3 or min(split) < 1:
            raise ValueError(f"data.split is {list(split)}; it must be three numbers, each at least 1")
        for name, size in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if size < 1:
                raise ValueError(f"data.{name} is {size}; it must be at least 1")
        self.source = source
        self.data_dir = data_dir
        self.split = tuple(split)
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.augmentation = augmentation
        self.datasets: list[DigitDataset] = []

    def setup(self, stage: str) -> None:
        # No prepare_data: a file lock already lets one process of a machine download while the others wait.
        if self.datasets:
            return
        digits = fetch_digits(self.source, self.data_dir)
        num_images = len(digits.labels)
        if sum(self.split) != num_images:
            tenth = num_images // 10
            raise ValueError(
                f"data.split {list(self.split)} adds up to {sum(self.split):,}, but {self.source} has {num_images:,} "
                f"images; the three numbers must add up to all of them, e.g. {[num_images - 2 * tenth, tenth, tenth]}"
            )
        num_processes = self._shards()[0]
        if min(self.split[1:]) < num_processes:
            raise ValueError(
                f"data.split is {list(self.split)} for {num_processes} processes; each needs an image to validate and "
                "one to test, at least"
            )
        parts = [np.split(array, np.cumsum(self.split)[:-1]) for array in digits]
        self.datasets = [DigitDataset(Digits(*part)) for part in zip(*parts, strict=True)]
        if unknown := set(digits.labels.tolist()) - set(self.datasets[0].labels.tolist()):
            rank_zero_info(
                f"{self.source}: none of the first {self.split[0]:,} images, which are trained on, is labelled "
                f"{', '.join(map(str, sorted(unknown)))}; shuffle a file that is sorted, as the split is in order"
            )
        elif (digits.labels[1:] >= digits.labels[:-1]).all():
            rank_zero_info(f"{self.source}: sorted by labels; shuffle it, as the split is in order")

    def train_dataloader(self) -> DataLoader[Batch]:
        # Drawn from the seed and the epoch alone, with one process as with many: a resumed run sees the same order.
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))  # where seed_everything keeps it, the same in every process
        dataset = self.datasets[0]
        sampler: DistributedSampler[Batch] = DistributedSampler(dataset, *self._shards(), shuffle=True, seed=seed)
        return self._loader(dataset, sampler, self.batch_size)

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._eval_dataloader(self.datasets[1])

    def test_dataloader(self) -> DataLoader[Batch]:
        return self._eval_dataloader(self.datasets[2])

    def predict_dataloader(self) -> DataLoader[Batch]:
        return self.test_dataloader()

    def _eval_dataloader(self, dataset: DigitDataset) -> DataLoader[Batch]:
        # Each image once, in order. PyTorch's sampler would fill the last processes up with images scored before.
        sampler = UnrepeatedDistributedSampler(dataset, *self._shards(), shuffle=False)
        return self._loader(dataset, sampler, self.eval_batch_size)

    def _shards(self) -> tuple[int, int]:
        """How many processes share the data, and which of them this is."""
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _loader(self, dataset: DigitDataset, sampler: DistributedSampler[Any], batch_size: int) -> DataLoader[Batch]:
        # All of MNIST is 55 MB: a GPU holds it, and of a batch is sent no more than which images to take.
        if self.trainer:
            dataset = dataset.to(self.trainer.strategy.root_device)
        # A generator of its own, or making an iterator would draw from the one that augmentation and dropout use.
        generator = torch.Generator().manual_seed(0)
        return DataLoader(dataset, batch_size=batch_size, sampler=sampler, collate_fn=keep_batch, generator=generator)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augment a training batch where it is now: on the device. Validation and test batches pass untouched."""
        if self.augmentation is None or self.trainer is None or not self.trainer.training:
            return batch
        if isinstance(batch, Tensor):  # a module's example_input_array comes this way too, while the Trainer starts
            return batch
        images, labels = batch
        return self.augmentation(images), labels
