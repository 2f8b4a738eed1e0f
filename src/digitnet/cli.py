"""fit, validate and test: Lightning's command line, with what it lacks.

A bare ``test`` takes the newest run's best checkpoint with that run's own settings, ``fit --ckpt_path last`` goes on in
the same folder, and precision follows the hardware.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info

from digitnet.callbacks import HyperparameterSummary, RestoreBestWeights, SeedEachEpoch, Throughput
from digitnet.classifier import DigitClassifier
from digitnet.data import MNISTDataModule

LOG_DIR = Path("lightning_logs")


def find_newest(filename: str, log_dir: Path = LOG_DIR) -> Path:
    """The most recently written ``<run>/checkpoints/<filename>`` under a log folder.

    Raises:
        FileNotFoundError: when there is none.
    """
    found = sorted(log_dir.glob(f"**/checkpoints/{filename}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(
            f"no run with a checkpoints/{filename} under {log_dir}; train one first: "
            "python -m digitnet fit --config configs/final.yaml"
        )
    return found[-1]


def choose_precision(accelerator: str = "auto") -> tuple[str, str]:
    """The fastest precision that trains as well as float32 on this machine, and why.

    bfloat16 only where the hardware multiplies it natively; elsewhere it is slower than float32.

    Args:
        accelerator: as the Trainer takes it: "auto", "cpu", "gpu", "cuda", "mps".

    Returns:
        A Trainer precision and the reason, to print.
    """
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        if major >= 8:
            return "bf16-mixed", f"CUDA capability {major}.{minor} has bfloat16"
        return "32-true", f"CUDA capability {major}.{minor} has no bfloat16"
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    native = sorted(flags & {"avx512_bf16", "amx_bf16"})
    if accelerator in ("auto", "cpu") and native and not torch.backends.mps.is_available():
        return "bf16-mixed", f"this CPU has {' and '.join(native)}"
    return "32-true", "no native bfloat16 here"


class DigitCLI(LightningCLI):
    """LightningCLI for DigitClassifier on MNISTDataModule."""

    def __init__(self, args: ArgsType = None) -> None:
        super().__init__(
            DigitClassifier,
            MNISTDataModule,
            args=args,
            seed_everything_default=42,
            trainer_defaults={
                "max_epochs": 200,
                "log_every_n_steps": 10**9,  # once an epoch is enough; each step would cost more than it tells
                "num_sanity_val_steps": 0,
                "logger": {
                    "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                    "init_args": {"save_dir": str(LOG_DIR), "name": "digitnet", "default_hp_metric": False},
                },
                "callbacks": [
                    SeedEachEpoch(),
                    Throughput(),
                    LearningRateMonitor(logging_interval="epoch"),
                    HyperparameterSummary(),
                    RestoreBestWeights(),
                ],
            },
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(EarlyStopping, "early_stopping")
        parser.add_lightning_class_args(ModelCheckpoint, "best_checkpoint")
        parser.add_lightning_class_args(ModelCheckpoint, "last_checkpoint")
        shared = {"auto_insert_metric_name": False, "enable_version_counter": False}
        defaults: dict[str, dict[str, Any]] = {
            "early_stopping": {"monitor": "val/acc", "mode": "max", "patience": 10},
            "best_checkpoint": {
                "monitor": "val/acc", "mode": "max", "filename": "best", "save_weights_only": True, **shared,
            },
            "last_checkpoint": {"filename": "last", "save_on_train_epoch_end": True, **shared},
        }  # fmt: skip
        parser.set_defaults({f"{key}.{name}": value for key, args in defaults.items() for name, value in args.items()})

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {name: args for name, args in LightningCLI.subcommands().items() if name != "predict"}

    def before_instantiate_classes(self) -> None:
        trainer = self.config[self.subcommand].trainer
        if trainer.precision is None:
            trainer.precision, reason = choose_precision(trainer.accelerator)
            rank_zero_info(f"precision {trainer.precision}: {reason} (--trainer.precision overrides)")


def main(args: list[str] | None = None) -> None:
    DigitCLI(args)
