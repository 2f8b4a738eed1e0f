"""The checkpoint that a command of Lightning's begins from: which it is, and what has to stay as it was."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_info

from digitnet.checkpoints import (
    choose_resumable,
    count_trained_on,
    find_newest,
    find_run,
    is_of_architecture,
    read_data_settings,
    verify_checkpoint,
)
from digitnet.classifier import DigitClassifier
from digitnet.data import MNISTDataModule
from digitnet.data.sources import NAMES
from digitnet.files import tell_command
from digitnet.guards import verify_is_text

# The environment variable in which the processes that share the work of this one find the newest checkpoint, as it was
# found here: by then there may be a newer one.
CHOSEN = "DIGITNET_CHOSEN_CKPT"
# Lightning loads the old state over another optimizer or schedule, and forgets what was best by another monitor.
KEPT = (
    ("model", "optimizer"),
    ("model", "lr_scheduler"),
    ("best_checkpoint", "monitor"),
    ("best_checkpoint", "mode"),
)


@dataclass(frozen=True)
class Origin:
    """A checkpoint to begin from; with no arguments, none: a training from the start."""

    checkpoint: Path | None = None
    run_dir: Path | None = None  # of the checkpoint, when it lies in a run's folder
    trained_on: dict[str, Any] = field(default_factory=dict)  # its source and split, as far as it knows them

    def to_flags(self, subcommand: str) -> list[str]:
        """The settings of the checkpoint's run, as flags to put before what was typed."""
        if self.run_dir:
            alone = [] if subcommand == "fit" else ["--trainer.num_nodes=1"]  # nobody starts the others to score
            return ["--config", str(self.run_dir / "config.yaml"), *alone]
        return [f"--data.{name}={value}" for name, value in self.trained_on.items()]  # it knows these, at least

    def verify_recipe(self, parser: LightningArgumentParser, config: Any) -> None:
        """Refuse to go on in the run's folder with an optimizer, schedule or monitor that is not the run's.

        Args:
            parser: of ``config``.
            config: of ``fit``, the run's settings with what was typed on top.

        Raises:
            ValueError: there is one.
        """
        if not self.run_dir:
            return
        path = self.run_dir / "config.yaml"
        before = parser.parse_args(["fit", "--config", str(path)])["fit"]
        for section, name in KEPT:
            if config[section][name] != before[section][name]:
                raise ValueError(
                    f"{section}.{name} is not that of {self.run_dir}: going on keeps the run's; to train with another, "
                    f"start anew: {tell_command('fit', '--config', path)}, and your flags"
                )

    def verify_data(self, data: MNISTDataModule, teacher_settings: dict[str, Any]) -> None:
        """Refuse to train on other data than the run's, and to leave out of training what was trained on before.

        Args:
            data: what is to be trained on.
            teacher_settings: the data of the teacher, as ``read_data_settings`` has them; empty without one.

        Raises:
            ValueError: the data are others, or images of what is left out were trained on.
        """
        for name, settings in (("model.teacher", teacher_settings), (str(self.checkpoint), self.trained_on)):
            if known := count_trained_on(settings, data.source, data.split[0]):
                raise ValueError(
                    f"data.split is {list(data.split)}, but {name} was trained on {known:,} of the images that it "
                    f"leaves out of training; give {list(settings['split'])}, as {name} had it, or another"
                )
        ours = {"source": data.source, "split": list(data.split)}
        for name, before in self.trained_on.items() if self.run_dir else ():
            is_moved = name == "source" and not {before, data.source} & set(NAMES)  # a file of one's own
            if ours[name] != before and not is_moved:
                raise ValueError(
                    f"data.{name} is {ours[name]}, but {self.run_dir} was trained with {before}, of which its best "
                    "epoch and its calibration are; to train with another, start anew, without --ckpt_path"
                )

    def count_steps(self, model: DigitClassifier, max_epochs: int | None) -> int:
        """How many steps the checkpoint was trained for; 0 where there is none.

        Args:
            model: which is to go on.
            max_epochs: as the trainer has it; None and -1 are without end.

        Raises:
            ValueError: the checkpoint is of another architecture, or was trained for more epochs.
        """
        if not self.checkpoint:
            return 0
        stored = verify_checkpoint(self.checkpoint)
        if not is_of_architecture(stored, model.net):
            wanted = f"{model.hparams['architecture']} (columns {model.hparams['columns']})"
            raise ValueError(
                f"{self.checkpoint} holds another architecture than {wanted}; to go on with it, leave "
                "model.architecture and model.columns out, or the config that names them; to train anew, the "
                "checkpoint"
            )
        num_epochs = stored["epoch"] + 1
        if max_epochs not in (None, -1) and max_epochs < num_epochs:
            raise ValueError(
                f"trainer.max_epochs is {max_epochs}, but {self.checkpoint} has trained {num_epochs} epochs; give more"
            )
        return int(stored["global_step"])


def choose_origin(ckpt_path: str, to_resume: bool) -> Origin:
    """Find and verify the checkpoint to begin from.

    Args:
        ckpt_path: a file; or "best" or "last", for that of the newest run, the same one in all processes of a command.
        to_resume: whether training is to go on from it; where a ``last.ckpt`` is damaged, then from the one before.

    Raises:
        FileNotFoundError: there is no run yet.
        ValueError: the file is no checkpoint to begin from, or its run's config is no text.
    """
    if ckpt_path not in ("best", "last"):
        checkpoint = Path(ckpt_path)
    elif CHOSEN in os.environ:
        checkpoint = Path(os.environ[CHOSEN])
    else:
        checkpoint = find_newest(f"{ckpt_path}.ckpt")
        os.environ[CHOSEN] = str(checkpoint)
    if to_resume:
        checkpoint, stored, damage = choose_resumable(checkpoint)
        if damage:
            rank_zero_info(f"{damage}; going on from the one before it")
    else:
        stored = verify_checkpoint(checkpoint)
    run_dir = find_run(checkpoint)
    if run_dir:
        verify_is_text(run_dir / "config.yaml")
    return Origin(checkpoint, run_dir, read_data_settings(stored))
