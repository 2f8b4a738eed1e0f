from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from conftest import QUICKSTART, SHORT, Run
from lightning.pytorch.callbacks import Callback

from digitnet.callbacks import AverageWeights, flatten_settings
from digitnet.classifier import DigitClassifier
from digitnet.data import MNISTDataModule

AVERAGE = ("--trainer.callbacks+=digitnet.callbacks.AverageWeights", "--trainer.callbacks.decay", 0.5)


class Snapshots(Callback):
    """The weights after every step, and those that were validated."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []
        self.validated = torch.empty(0)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.steps.append(pl_module.net.fc3.weight.detach().clone())

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.validated = pl_module.net.fc3.weight.detach().clone()


@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [("32-true", {}), ("bf16-true", {"atol": 0, "rtol": 2**-7})],
    ids=["float32", "bfloat16"],
)
def test_average_of_the_weights_by_hand(precision: Any, tolerance: dict[str, float]) -> None:
    snapshots, model = Snapshots(), DigitClassifier()
    trainer = L.Trainer(
        max_epochs=1, limit_train_batches=6, limit_val_batches=1, num_sanity_val_steps=0, accelerator="cpu",
        precision=precision,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[AverageWeights(0.75), snapshots],
    )  # fmt: skip
    trainer.fit(model, MNISTDataModule(source="digits", split=(1437, 180, 180)))
    counts = [0.75**age for age in range(6)][::-1]
    average = sum(count * weights.double() for count, weights in zip(counts, snapshots.steps, strict=True)) / sum(
        counts
    )
    for found in (snapshots.validated, model.net.fc3.weight.detach()):
        torch.testing.assert_close(found, average.to(found.dtype), **tolerance)


def test_average_goes_on_where_it_was(digitnet: Run, tmp_path: Path) -> None:
    fit = ("fit", "--config", QUICKSTART, *SHORT, *AVERAGE)
    assert digitnet(*fit) == 0
    whole = tmp_path / "lightning_logs" / "quickstart" / "version_0" / "checkpoints" / "last.ckpt"
    expected = torch.load(whole, weights_only=True)
    shutil.rmtree(tmp_path / "lightning_logs")
    assert digitnet(*fit, "--trainer.max_epochs", 1) == 0
    best, last = (torch.load(whole.with_name(name), weights_only=True) for name in ("best.ckpt", "last.ckpt"))
    assert all(torch.equal(value, best["state_dict"][name]) for name, value in last["state_dict"].items())
    assert not {"current_model_state", "averaging_state"} & best.keys()
    assert digitnet("fit", "--ckpt_path", "last", "--trainer.max_epochs", 2) == 0
    found = torch.load(whole, weights_only=True)
    for key in ("state_dict", "current_model_state"):
        assert all(torch.equal(value, found[key][name]) for name, value in expected[key].items())
    assert not torch.equal(found["state_dict"]["net.fc3.weight"], found["current_model_state"]["net.fc3.weight"])


def test_settings_for_a_table_can_be_said_in_plain_yaml() -> None:
    teacher = {"class_path": "digitnet.Teacher", "init_args": {"checkpoint": Path("a.ckpt"), "label_frac": None}}
    flat = flatten_settings({"teacher": teacher, "split": (1, 2, 3)})
    assert flat == {"teacher": "Teacher", "teacher/checkpoint": "a.ckpt", "split": [1, 2, 3]}
    assert yaml.safe_load(yaml.safe_dump(flat)) == flat


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_decay_outside_its_range(decay: float) -> None:
    with pytest.raises(ValueError, match=f"decay is {decay}"):
        AverageWeights(decay)
