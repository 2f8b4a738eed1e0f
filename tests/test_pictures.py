"""What TensorBoard is given beside curves, read back from its files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import QUICKSTART, SHORT, Run
from tensorboard.backend.event_processing.event_accumulator import IMAGES, TENSORS, EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.pr_curve import metadata as pr_curve
from tensorboard.util import tensor_util

from digitnet.data import fetch_digits
from digitnet.pictures import Pictures

RUN = Path("lightning_logs/quickstart/version_0")


def read_events(run: Path) -> EventAccumulator:
    events = EventAccumulator(str(run), size_guidance={IMAGES: 0, TENSORS: 0})
    events.Reload()
    return events


def fit(digitnet: Run, *flags: Any) -> None:
    flags = flags or ("--pictures.every_n_epochs", 5)
    short = {**dict(zip(SHORT[::2], SHORT[1::2], strict=True)), **dict(zip(flags[::2], flags[1::2], strict=True))}
    assert digitnet("fit", "--config", QUICKSTART, *(text for flag in short.items() for text in flag)) == 0


def test_pictures_come_on_schedule_and_after_the_last_epoch(digitnet: Run) -> None:
    fit(digitnet, "--trainer.max_epochs", 3, "--pictures.every_n_epochs", 2)
    events = read_events(RUN)
    steps = {tag: [image.step for image in events.Images(tag)] for tag in events.Tags()["images"]}
    assert steps == {"train/augmentation": [0], "val/confusion": [7, 11], "val/mistakes": [7, 11]}


def test_pictures_come_at_the_first_validation_after_so_many_epochs(digitnet: Run) -> None:
    flags = ("--trainer.max_epochs", 6, "--trainer.check_val_every_n_epoch", 2, "--pictures.every_n_epochs", 3)
    fit(digitnet, *flags)
    assert [image.step for image in read_events(RUN).Images("val/confusion")] == [15, 23]  # epochs 4 and 6


def test_a_sanity_check_is_no_validation_to_draw(digitnet: Run) -> None:
    never = ("--trainer.max_epochs", 1, "--trainer.check_val_every_n_epoch", 2)
    fit(digitnet, *never, "--trainer.num_sanity_val_steps", 2, "--pictures.every_n_epochs", 1)
    assert read_events(RUN).Tags()["images"] == ["train/augmentation"]


def test_precision_recall_curves_count_every_validation_image(digitnet: Run) -> None:
    fit(digitnet)
    labels = fetch_digits("digits").labels[1717 : 1717 + 40]
    events = read_events(RUN)
    for digit in range(10):
        (event,) = events.Tensors(f"val/digit_{digit}")
        curve = tensor_util.make_ndarray(event.tensor_proto)
        at_zero = curve[:, 0]  # the lowest threshold takes every image for this digit
        positives = (labels == digit).sum()
        assert at_zero[pr_curve.TRUE_POSITIVES_INDEX] == positives
        assert at_zero[pr_curve.FALSE_POSITIVES_INDEX] == len(labels) - positives


def test_layout_draws_training_beside_validation(digitnet: Run) -> None:
    fit(digitnet)
    (event,) = read_events(RUN).Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}
    tags = ["train/acc", "train/loss", "train/loss_step", "val/acc", "val/loss"]
    assert set(read_events(RUN).Tags()["scalars"]) | {"train/loss_step"} >= set(tags)
    shown = {title: {tag for tag in tags if any(re.match(one, tag) for one in ones)} for title, ones in charts.items()}
    assert shown["loss"] == {"train/loss", "val/loss"}  # TensorBoard matches from the start, to any end
    assert shown["loss of single steps"] == {"train/loss_step"}
    assert shown["accuracy"] == {"train/acc", "val/acc"}


def test_pictures_change_nothing_in_training(digitnet: Run) -> None:
    weights = []
    for version, every_n_epochs in enumerate((1, 0)):
        fit(digitnet, "--pictures.every_n_epochs", every_n_epochs)
        checkpoint = RUN.with_name(f"version_{version}") / "checkpoints" / "last.ckpt"
        weights.append(torch.load(checkpoint, weights_only=True)["state_dict"])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not read_events(RUN.with_name("version_1")).Tags()["images"]  # 0 draws nothing


def test_a_resumed_run_draws_no_second_beginning(digitnet: Run) -> None:
    fit(digitnet)
    assert digitnet("fit", "--ckpt_path", "last", "--trainer.max_epochs", 3) == 0
    images = read_events(RUN).Images("train/augmentation")
    assert len(images) == 1


def test_negative_interval_is_refused(digitnet: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="every_n_epochs is -1"):
        Pictures(every_n_epochs=-1)
    code = digitnet("fit", "--config", QUICKSTART, "--pictures.every_n_epochs", -1)
    assert code != 0
    assert "every_n_epochs is -1" in capsys.readouterr().err


def test_probabilities_survive_large_logits() -> None:
    pictures = Pictures()
    drawn: dict[str, np.ndarray] = {}

    class Writer:
        def add_figure(self, *args: Any, **kwargs: Any) -> None: ...

        def add_pr_curve(self, tag: str, labels: np.ndarray, probabilities: np.ndarray, step: int) -> None:
            drawn[tag] = probabilities

    class Module:
        datasets = (None, type("Data", (), {"images": torch.zeros(2, 1, 28, 28, dtype=torch.uint8)}))

    trainer = type("Trainer", (), {"global_step": 1, "world_size": 1, "datamodule": Module})()
    logits = torch.full((2, 10), -1e4)
    logits[0, 3] = logits[1, 7] = 1e4
    pictures.logits, pictures.labels = [logits], [torch.tensor([3, 7])]
    pictures._find_writers = lambda _: [Writer()]  # type: ignore[assignment, method-assign]
    pictures._draw_validation(trainer)
    assert drawn["val/digit_3"].tolist() == [1, 0]
    assert drawn["val/digit_7"].tolist() == [0, 1]
    assert len(drawn) == 2  # a curve of a digit that is not there would look like a failure
