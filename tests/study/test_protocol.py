"""The protocol's runs and figures, on bundled digits cut so that the "10,000" are the last 200."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import Run
from filelock import FileLock
from torch import Tensor, nn

from digitnet.checkpoints import load_net, save_weights
from digitnet.data import MNISTDataModule, load_bundled_digits
from digitnet.model import DigitNet
from digitnet.study import protocol as module
from digitnet.study.protocol import judge, render_table, shift, shorten_schedule
from digitnet.study.recipes import load_row

CONFIG = """\
data: {source: digits, batch_size: 800}
trainer: {max_epochs: 2, precision: 32-true, enable_model_summary: false}
pictures: {every_n_epochs: 0}
calibration: {num_digits: 0}
"""


@pytest.fixture
def few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """180 of the bundled digits, of which 81 are trained on, as ``few.npz``, and CONFIG with them as ``mine.yaml``."""
    digits = load_bundled_digits()
    images, labels = digits.images[:180], digits.labels[:180]
    np.savez(tmp_path / "few.npz", images=images, labels=labels)
    monkeypatch.setattr(module, "SPLIT", (81, 50, 49))
    config = CONFIG.replace("source: digits", "source: few.npz").replace("batch_size: 800", "batch_size: 45")
    (tmp_path / "mine.yaml").write_text(config)
    return torch.from_numpy(images)[:, None], torch.from_numpy(labels).long()


FINISHED: dict[str, Any] = {
    "seed": 42, "epochs": 2, "mistakes": [], "mistakes_shifted": [], "train_s": 1.0, "num_parameters": 7,
    "hardware": "a machine", "versions": {"torch": "2"}, "date": "2026-01-02",
}  # fmt: skip


class OneRow(nn.Module):
    """Reads the digit off every other pixel of the picture's fifteenth row."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor) -> Tensor:
        return images[:, 0, 14, :20:2].float()


@pytest.mark.parametrize(("down", "right"), [(1, 0), (-1, 0), (0, 1), (0, -1)])
def test_shift_moves_by_a_pixel_and_leaves_nothing_behind(down: int, right: int) -> None:
    images = torch.arange(1, 1 + 2 * 16, dtype=torch.uint8).reshape(2, 1, 4, 4)
    moved = shift(images, down, right)
    for row in range(4):
        for column in range(4):
            inside = 0 <= row - down < 4 and 0 <= column - right < 4
            expected = images[:, :, row - down, column - right] if inside else torch.zeros(2, 1, dtype=torch.uint8)
            assert torch.equal(moved[:, :, row, column], expected)


def test_mistakes_are_counted_alone_and_averaged_over_shifts() -> None:
    images = torch.zeros(3, 1, 28, 28, dtype=torch.uint8)
    images[:2, 0, 13:16, 7:10] = 9  # a 4, also when moved; the second is said to be a 5
    images[2, 0, 14, 4] = 1  # a faint 2, and a 7 when it is moved up or down
    images[2, 0, [13, 15], 14] = 9
    net: Any = OneRow()
    plain, averaged, losses = judge(net, images, torch.tensor([4, 5, 7]))
    assert plain == [1, 2]
    assert averaged == [1]
    # Logits of 9 for a 4 and 0 for the nine others; of 1 for a 2.
    expected = [math.log(1 + 9 * math.exp(-9)), math.log(math.exp(9) + 9), math.log(math.e + 9)]
    assert losses.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)  # logits of 9 are rounded to 1e-6


def test_trains_each_seed_once_and_scores_its_last_epoch(
    digitnet: Run, tmp_path: Path, few: tuple[Tensor, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    left = tmp_path / "out" / f"mine-{load_row(tmp_path / 'mine.yaml').digest[:8]}" / "seed_42"
    left.mkdir(parents=True)
    (left / "config.yaml").write_text("seed_everything: 1\n")  # by one that was killed in its first epoch
    with FileLock(left / ".lock"):  # or by one that is still at work
        assert digitnet("protocol", "mine.yaml", "--seeds", 2, "--output", "out") == 1
        assert "another fit is at work in" in capsys.readouterr().err
        assert (left / "config.yaml").exists()
    assert digitnet("protocol", "mine.yaml", "--seeds", 2, "--output", "out") == 0
    runs = sorted((tmp_path / "out").glob("mine-*/seed_*"))
    assert [run.name for run in runs] == ["seed_42", "seed_43"]
    results = [json.loads((run / "result.json").read_text()) for run in runs]
    (table,) = (tmp_path / "out").glob("mine-*.md")
    assert table.read_text().count("\n| 4") == 2
    assert "wrong labels" not in table.read_text()  # which are MNIST's

    # The last epoch, scored by hand.
    images, labels = few[0][81:], few[1][81:]
    from digitnet import DigitNet

    for run, result in zip(runs, results, strict=True):
        stored = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
        assert stored["epoch"] == 1
        assert not (run / "checkpoints" / "best.ckpt").exists()  # or it would be what a bare `test` takes
        net = DigitNet().eval()
        net.load_state_dict({name.removeprefix("net."): value for name, value in stored["state_dict"].items()})
        with torch.no_grad():
            wrong = (net(images).argmax(1) != labels).nonzero()[:, 0].tolist()
        assert result["mistakes"] == wrong
        assert result["num_parameters"] == 1_413_834
    assert results[0]["mistakes"] != results[1]["mistakes"]
    assert [result["precision"] for result in results] == ["32-true", "32-true"]
    assert ", 32-true, torch " in table.read_text()

    # A run that was stopped is the newest that can be gone on with: these have ended.
    assert digitnet("fit", "--ckpt_path", "last") == 1
    assert "no run has a checkpoints/last.ckpt" in capsys.readouterr().err

    # Killed after its last epoch, while last.ckpt was written by an older tool: the epoch before is gone on with.
    last = runs[0] / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:1000])
    shutil.copy(last.with_name("previous.ckpt"), last.with_name("best.ckpt"))  # which was still there
    (runs[0] / "result.json").unlink()
    assert digitnet("protocol", "mine.yaml", "--seeds", 1, "--output", "out") == 0
    assert json.loads((runs[0] / "result.json").read_text())["mistakes"] == results[0]["mistakes"]

    before = {path: path.stat().st_mtime_ns for run in runs for path in run.rglob("*")}
    capsys.readouterr()
    assert digitnet("protocol", "mine.yaml", "--seeds", 2, "--output", "out") == 0
    assert {path: path.stat().st_mtime_ns for run in runs for path in run.rglob("*")} == before
    assert f"| 42 | {len(results[0]['mistakes'])} |" in capsys.readouterr().out
    assert digitnet("protocol", "mine.yaml", "--seeds", 1, "--output", "out") == 0
    assert table.read_text().count("\n| 4") == 2  # still all that are done


def test_parts_train_their_own_seeds_and_tabulate_all_that_are_done(
    digitnet: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = []

    def train(flags: list[str], seed: int, run: Path, num_epochs: int) -> None:
        trained.append(seed)
        run.mkdir(parents=True)

    def score(run: Path, seed: int, num_epochs: int, data: Any, holdout: int) -> dict[str, Any]:
        run.mkdir(exist_ok=True)
        return {**FINISHED, "seed": seed, "mistakes": [seed]}

    monkeypatch.setattr(module, "SPLIT", (1597, 100, 100))
    monkeypatch.setattr(module, "train", train)
    monkeypatch.setattr(module, "score", score)
    (tmp_path / "mine.yaml").write_text(CONFIG)
    assert digitnet("protocol", "mine.yaml", "--seeds", 3, "--shard", "1/2", "--output", "out") == 0
    assert trained == [42, 44]
    assert digitnet("protocol", "mine.yaml", "--seeds", 3, "--shard", "2/2", "--output", "out") == 0
    assert trained == [42, 44, 43]
    (table,) = (tmp_path / "out").glob("mine-*.md")
    rows = [line[:4] for line in table.read_text().splitlines() if line.startswith("| 4")]
    assert rows == ["| 42", "| 43", "| 44"]
    capsys.readouterr()
    assert digitnet("protocol", "mine.yaml", "--seeds", 1, "--shard", "2/2", "--output", "out") == 0
    assert "| 44 | 1 |" in capsys.readouterr().out
    assert digitnet("protocol", "mine.yaml", "--seeds", 1, "--shard", "2/2", "--output", "other") == 1
    assert "no seed of mine.yaml is done yet, and none is in this part of them" in capsys.readouterr().err
    assert digitnet("protocol", "mine.yaml", "--shard", "3/2") == 1
    assert 'shard is "3/2"' in capsys.readouterr().err


def test_a_hold_out_of_the_training_images_is_scored_in_place_of_the_test_images(
    digitnet: Run, tmp_path: Path, few: tuple[Tensor, Tensor]
) -> None:
    schedule = "torch.optim.lr_scheduler.OneCycleLR, init_args: {max_lr: 0.002, epochs: 2, steps_per_epoch: 2}"
    config = (tmp_path / "mine.yaml").read_text().replace("batch_size: 45", "batch_size: 60")
    config = config.replace("32-true", "bf16-mixed")
    (tmp_path / "mine.yaml").write_text(config + f"model: {{lr_scheduler: {{class_path: {schedule}}}}}\n")
    assert digitnet("protocol", "mine.yaml", "--seeds", 1, "--holdout", 31, "--output", "out") == 0
    (run,) = (tmp_path / "out").glob("mine-*-holdout_31/seed_42")
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["data"]["split"] == [50, 31, 99]
    assert config["model"]["lr_scheduler"]["init_args"]["steps_per_epoch"] == 1  # 50 images in batches of 60

    images, labels = few[0][50:81], few[1][50:81]
    net = load_net(run / "checkpoints" / "last.ckpt")[0]
    with torch.no_grad():
        logits = net(images)
    wrong = 50 + (logits.argmax(1) != labels).nonzero()[:, 0]
    result = json.loads((run / "result.json").read_text())
    assert result["precision"] == "bf16-mixed"
    assert result["mistakes"] == wrong.tolist()
    assert result["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
    assert result["loss_odd"] == pytest.approx(F.cross_entropy(logits[1::2], labels[1::2]).item(), rel=1e-4)
    table = run.parent.with_name(f"{run.parent.name}.md").read_text()
    assert f"| 42 | {len(wrong)} | {(wrong % 2).sum()} | {result['loss']:.4f} | {result['loss_odd']:.4f} |" in table
    assert "2 epochs on the first 50 training images of few.npz, scored on the next 31, as" in table


@pytest.mark.parametrize(
    ("schedule", "accumulated", "flags"),
    [
        (None, 1, []),
        ({"class_path": "ExponentialLR", "init_args": {"gamma": 0.9}}, 1, []),
        ({"class_path": "OneCycleLR", "init_args": {"epochs": 3, "steps_per_epoch": 9}}, 1, ["steps_per_epoch=4"]),
        ({"class_path": "OneCycleLR", "init_args": {"epochs": 3, "steps_per_epoch": 3}}, 3, ["steps_per_epoch=2"]),
        ({"class_path": "OneCycleLR", "init_args": {"total_steps": 27}}, 1, ["total_steps=12"]),
        ({"class_path": "OneCycleLR", "init_args": {"total_steps": 35}}, 1, ["total_steps=16"]),  # it never ends
        ({"class_path": "CyclicLR", "init_args": {"step_size_up": 18, "step_size_down": None}}, 1, ["step_size_up=8"]),
    ],
)
def test_a_schedule_is_shortened_as_the_training_is(
    monkeypatch: pytest.MonkeyPatch, schedule: dict[str, Any] | None, accumulated: int, flags: list[str]
) -> None:
    monkeypatch.setattr(module, "SPLIT", (270, 10, 10))  # 9 batches of 30, and 4 of 100 images
    trainer = {"max_epochs": 3, "accumulate_grad_batches": accumulated}
    settings = {"model": {"lr_scheduler": schedule}, "data": {"batch_size": 30}, "trainer": trainer}
    assert shorten_schedule(settings, 100) == [f"--model.lr_scheduler.{flag}" for flag in flags]


@pytest.mark.parametrize("holdout", [-1, 60_000])
def test_a_hold_out_that_leaves_nothing_is_refused(
    digitnet: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], holdout: int
) -> None:
    assert digitnet("protocol", "mine.yaml", f"--holdout={holdout}") == 1
    assert f"holdout is {holdout}; it must be some of the 60,000 training images" in capsys.readouterr().err


def test_a_run_that_ended_early_is_refused(
    digitnet: Run, tmp_path: Path, few: tuple[Tensor, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    stop = "{class_path: EarlyStopping, init_args: {monitor: val/acc, mode: max, stopping_threshold: 0.001}}"
    config = (tmp_path / "mine.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(config.replace("max_epochs: 2", f"max_epochs: 3, callbacks: {stop}"))
    assert digitnet("protocol", "mine.yaml", "--seeds", 1) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "ended after 1 of 3 epochs; its figure is not fixed" in error


def test_a_training_that_validates_often_is_not_ended_by_it(
    digitnet: Run, tmp_path: Path, few: tuple[Tensor, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load((tmp_path / "mine.yaml").read_text())
    config["data"]["batch_size"] = 20  # five validations an epoch, each no better than the first
    config["trainer"] |= {"val_check_interval": 0.2}
    config["model"] = {**config.get("model", {}), "optimizer": {"class_path": "SGD", "init_args": {"lr": 1e-30}}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    assert digitnet("protocol", "mine.yaml", "--seeds", 1) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    "cut", ["limit_train_batches: 2", "limit_train_batches: 0.5", "overfit_batches: 1", "max_steps: 3", "max_time: 1d"]
)
def test_a_training_that_is_cut_short_is_refused(
    digitnet: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], cut: str
) -> None:
    (tmp_path / "mine.yaml").write_text(CONFIG.replace("max_epochs: 2", f"max_epochs: 2, {cut}"))
    assert digitnet("protocol", "mine.yaml", "--seeds", 1) == 1
    assert f"mine.yaml has trainer.{cut.replace(':', '')}" in capsys.readouterr().err
    assert not (tmp_path / "lightning_logs").exists()


@pytest.mark.parametrize("monitor", ["", "val/loss", "train/loss"])
def test_a_schedule_that_goes_by_what_is_scored_is_refused(
    digitnet: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monitor: str
) -> None:
    init_args = f", init_args: {{monitor: {monitor}}}" if monitor else ""
    kind = "lightning.pytorch.cli" if monitor else "torch.optim.lr_scheduler"
    plateau = f"lr_scheduler: {{class_path: {kind}.ReduceLROnPlateau{init_args}}}"
    config = yaml.safe_load(CONFIG)
    config["model"] = {**config.get("model", {}), **yaml.safe_load(plateau)}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    assert digitnet("protocol", "mine.yaml", "--seeds", 1) == 1
    error = capsys.readouterr().err
    refused = "mine.yaml has a ReduceLROnPlateau that goes by val/loss, of images that are scored"
    assert ("digits has 1,797 images" if monitor == "train/loss" else refused) in error  # the next thing it looks at
    assert not (tmp_path / "lightning_logs").exists()


@pytest.mark.parametrize("end", ["stopping_threshold: 0.99", "divergence_threshold: 0.0"])
def test_a_training_that_may_end_by_itself_is_refused(
    digitnet: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], end: str
) -> None:
    (tmp_path / "mine.yaml").write_text(CONFIG + f"early_stopping: {{{end}}}\n")
    assert digitnet("protocol", "mine.yaml", "--seeds", 1) == 1
    assert f"mine.yaml has early_stopping.{end.replace(':', '')}, which ends a training" in capsys.readouterr().err
    assert not (tmp_path / "lightning_logs").exists()


def test_data_that_are_not_as_many_as_mnist_are_refused(
    digitnet: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(CONFIG)
    assert digitnet("protocol", "mine.yaml", "--seeds", 1) == 1
    assert (
        "error: digits has 1,797 images; the protocol takes 70,000, in the order of MNIST's\n"
        in capsys.readouterr().err
    )


def test_a_place_that_cannot_be_written_is_told(
    digitnet: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "SPLIT", (1597, 100, 100))
    (tmp_path / "mine.yaml").write_text(CONFIG)
    (tmp_path / "file").write_text("mine")
    assert digitnet("protocol", "mine.yaml", "--output", "file") == 1
    assert "(a file is in the way); name another place with --output\n" in capsys.readouterr().err


@pytest.mark.parametrize(("part", "stop"), [("train", SystemExit(130)), ("score", KeyboardInterrupt())])
def test_stopping_says_how_to_go_on(
    digitnet: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    part: str, stop: BaseException,
) -> None:  # fmt: skip
    def be_stopped(*_: Any) -> None:
        raise stop

    monkeypatch.setattr(module, "SPLIT", (1597, 100, 100))
    monkeypatch.setattr(module, "train", lambda *_: None)
    monkeypatch.setattr(module, part, be_stopped)
    (tmp_path / "mine.yaml").write_text(CONFIG)
    assert digitnet("protocol", "mine.yaml") == 130
    assert capsys.readouterr().out.endswith("protocol stopped; the same command goes on from here\n")


def test_a_config_that_changes_between_seeds_is_refused(
    digitnet: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(CONFIG)
    trained = []

    def train(flags: list[str], seed: int, run: Path, num_epochs: int) -> None:
        trained.append(seed)
        config.write_text(CONFIG.replace("batch_size: 800", "batch_size: 900"))

    monkeypatch.setattr(module, "SPLIT", (1597, 100, 100))
    monkeypatch.setattr(module, "train", train)
    monkeypatch.setattr(module, "score", lambda *_: FINISHED)
    assert digitnet("protocol", "mine.yaml", "--seeds", 2) == 1
    assert trained == [42]
    assert "mine.yaml, its base.yaml, its teacher or its data changed meanwhile" in capsys.readouterr().err


def test_a_schedule_without_an_end_is_refused(
    digitnet: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(CONFIG.replace("max_epochs: 2", "max_epochs: -1"))
    assert digitnet("protocol", "mine.yaml", "--seeds", 1) == 1
    assert "mine.yaml has max_epochs -1; a schedule that ends by itself" in capsys.readouterr().err


def test_places_are_odd_among_all_images(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "hparams.yaml").write_text("precision: 32-true\n")
    (tmp_path / "checkpoints").mkdir()
    save_weights(DigitNet(), tmp_path / "checkpoints" / "last.ckpt")
    losses = torch.tensor([1.0, 2.0, 4.0, 8.0])
    monkeypatch.setattr(module, "judge", lambda *_: ([0], [], losses))
    monkeypatch.setattr(module, "measure_seconds", lambda run: 1.0)
    data = MNISTDataModule("digits", split=(51, 4, 1742))
    result = module.score(tmp_path, 42, 1, data, holdout=4)
    assert result["mistakes"] == [51]
    assert result["loss_odd"] == 2.5  # of places 51 and 53


def test_a_missing_config_is_told(digitnet: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert digitnet("protocol", "nothing.yaml") == 1
    assert capsys.readouterr().err == "digitnet: error: nothing.yaml: no such config\n"
    assert not list(tmp_path.iterdir())


def test_the_table_has_every_seed_their_mean_and_spread() -> None:
    common = {
        "num_parameters": 7,
        "epochs": 3,
        "hardware": "a machine",
        "versions": {"torch": "2"},
        "date": "2026-01-02",
    }
    results = [
        {"seed": 42, "mistakes": [1, 947, 6000], "mistakes_shifted": [6000], "train_s": 10.0, **common},
        {
            "seed": 43,
            "mistakes": [5000],
            "mistakes_shifted": [2, 4999],
            "train_s": 20.0,
            **common,
            "hardware": "another",
        },
    ]
    table = render_table(Path("configs/best_digitnet.yaml"), results)
    assert "| 42 | 3 | 1 | 1 | 1 | 1 | 10 s |" in table
    assert "| 43 | 1 | 1 | 0 | 2 | 0 | 20 s |" in table
    assert "| **mean ± sd** | 2.0 ± 1.4 | 1.0 ± 0.0 | 0.5 ± 0.7 | 1.5 ± 0.7 | 0.5 ± 0.7 | 15.0 ± 7.1 s |" in table
    assert "python -m digitnet protocol configs/best_digitnet.yaml --seeds 2" in table
    assert "3 epochs on all 60,000 training images of mnist, scored at the last epoch, once per seed, as docs" in table
    assert "says. a machine, torch 2, 2026-01-02; another, torch 2, 2026-01-02: " in table


@pytest.mark.parametrize("text", ['{"seed": 42', json.dumps({**FINISHED, "date": 20260102})])
def test_a_damaged_result_is_told(digitnet: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    (tmp_path / "mine.yaml").write_text(CONFIG)
    digest = load_row(tmp_path / "mine.yaml").digest[:8]
    run = tmp_path / "out" / f"mine-{digest}" / "seed_42"
    run.mkdir(parents=True)
    (run / "result.json").write_text(text)
    assert digitnet("protocol", "mine.yaml", "--seeds", 1, "--output", "out") == 1
    assert "result.json is damaged; remove it, and the seed is scored again" in capsys.readouterr().err
