"""The checkpoint that a command of Lightning's begins from: which it is, and what has to stay as it was."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_info

from digitnet.checkpoints import choose_resumable, find_newest, find_run, read_data_settings, verify_checkpoint
from digitnet.classifier import DigitClassifier
from digitnet.data import MNISTDataModule
from digitnet.data.sources import NAMES
from digitnet.files import tell_command
from digitnet.guards import Begun, verify_is_text, verify_unseen

# DDP starts the command again in each process. This environment variable hands them the checkpoint that the first one
# chose: by then there may be a newer one.
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
    """Where a command starts: a checkpoint and its run. ``Origin()`` is a training from scratch."""

    checkpoint: Path | None = None
    run_dir: Path | None = None  # of the checkpoint, when it lies in a run's folder
    trained_on: dict[str, Any] = field(default_factory=dict)  # its source and split, as far as it knows them
    begun: Begun | None = None
    weight_names: frozenset[str] = frozenset()

    def to_flags(self, to_resume: bool) -> list[str]:
        """The settings of the checkpoint's run, as flags to put before what was typed."""
        if self.run_dir:
            alone = [] if to_resume else ["--trainer.num_nodes=1"]  # scoring runs on this machine alone
            return ["--config", str(self.run_dir / "config.yaml"), *alone]
        return [f"--data.{name}={value}" for name, value in self.trained_on.items()]  # it knows these, at least

    def verify_recipe(self, parser: LightningArgumentParser, config: Any) -> None:
        """Refuse to resume the run with an optimizer, schedule or monitor that is not the run's.

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

    def verify_data(self, data: MNISTDataModule) -> None:
        """Refuse to resume the run on other data, and to leave out of training what was trained on before.

        Raises:
            ValueError: the data are others, or images of what is left out were trained on.
        """
        verify_unseen(str(self.checkpoint), self.trained_on, data)
        ours = {"source": data.source, "split": list(data.split)}
        for name, before in self.trained_on.items() if self.run_dir else ():
            is_moved = name == "source" and not {before, data.source} & set(NAMES)  # a file of one's own
            if ours[name] != before and not is_moved:
                raise ValueError(
                    f"data.{name} is {ours[name]}, but {self.run_dir} was trained with {before}, of which its best "
                    "epoch and its calibration are; to train with another, start anew, without --ckpt_path"
                )

    def verify_model(self, model: DigitClassifier, max_epochs: int | None) -> None:
        """Refuse to resume with another architecture, or for fewer epochs than are behind it.

        Args:
            model: which is to be trained.
            max_epochs: as the trainer has it; None and -1 are without end.

        Raises:
            ValueError: the checkpoint is of another architecture, or was trained for more epochs.
        """
        if not self.checkpoint:
            return
        if self.weight_names != model.net.state_dict().keys():
            wanted = f"{model.hparams['architecture']} (columns {model.hparams['columns']})"
            raise ValueError(
                f"{self.checkpoint} holds another architecture than {wanted}; to resume it, drop model.architecture "
                "and model.columns, or the config that sets them; to train from scratch, drop --ckpt_path"
            )
        assert self.begun is not None
        if max_epochs not in (None, -1) and max_epochs < self.begun.num_epochs:
            raise ValueError(
                f"trainer.max_epochs is {max_epochs}, but {self.checkpoint} has trained {self.begun.num_epochs} "
                "epochs; give more"
            )


@contextlib.contextmanager
def choose_once() -> Iterator[None]:
    """Until the block ends, the newest checkpoint is the one found first, in the processes that it starts, too."""
    is_first = CHOSEN not in os.environ
    try:
        yield
    finally:
        if is_first:
            os.environ.pop(CHOSEN, None)


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
    schedules = stored.get("lr_schedulers") or [{}]
    return Origin(
        checkpoint,
        run_dir,
        trained_on=read_data_settings(stored),
        begun=Begun(stored.get("epoch", -1) + 1, stored.get("global_step", 0), schedules[0].get("total_steps")),
        weight_names=frozenset(name.removeprefix("net.") for name in stored["state_dict"]),
    )
