from __future__ import annotations

import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from conftest import QUICKSTART, SHORT, Run
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from digitnet.callbacks import (
    AverageWeights,
    RestoreBestWeights,
    Throughput,
    flatten_settings,
)
from digitnet.classifier import DigitClassifier
from digitnet.data import MNISTDataModule, load_bundled_digits
from digitnet.guards import verify_clipping
from digitnet.resuming import RunCheckpoint, StopCleanly

AVERAGE = ("--trainer.callbacks+=digitnet.callbacks.AverageWeights", "--trainer.callbacks.decay", 0.5)


class Snapshots(Callback):
    """The weights after every step, and those that were validated."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []
        self.validated = torch.empty(0)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.steps.append(pl_module.get_parameter("net.fc3.weight").detach().clone())

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.validated = pl_module.get_parameter("net.fc3.weight").detach().clone()


def test_speed_leaves_out_a_validation_amid_the_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, logged = iter([100.0, 102.0, 102.5, 110.5, 112.0]), {}
    monkeypatch.setattr("digitnet.callbacks.time.perf_counter", lambda: next(clock))
    trainer: Any = SimpleNamespace(is_last_batch=False, sanity_checking=False)
    module: Any = SimpleNamespace(
        device=torch.device("cpu"), log=lambda name, value, **options: logged.update({name: value})
    )
    batch, throughput = (torch.zeros(30, 1, 28, 28), torch.zeros(30)), Throughput()
    throughput.on_train_start(trainer, module)
    throughput.on_train_batch_end(trainer, module, {}, batch, 0)
    throughput.on_validation_start(trainer, module)
    throughput.on_validation_end(trainer, module)  # after eight seconds
    throughput.on_train_batch_end(trainer, module, {}, batch, 1)
    throughput.on_train_epoch_end(trainer, module)
    assert logged == {"train/images_per_s": 60 / 4}


@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [("32-true", {}), ("bf16-true", {"atol": 0, "rtol": 2**-7})],
    ids=["float32", "bfloat16"],
)
def test_average_of_the_weights_by_hand(precision: Any, tolerance: dict[str, Any]) -> None:
    snapshots, model = Snapshots(), DigitClassifier()
    trainer = L.Trainer(
        max_epochs=1, limit_train_batches=6, limit_val_batches=1, num_sanity_val_steps=0, accelerator="cpu",
        precision=precision,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[AverageWeights(0.75), snapshots],
    )  # fmt: skip
    trainer.fit(model, MNISTDataModule(source="digits", split=(1437, 180, 180)))
    counts = [0.75**age for age in range(6)][::-1]
    average = torch.zeros((), dtype=torch.float64)
    for count, weights in zip(counts, snapshots.steps, strict=True):
        average = average + count / sum(counts) * weights.double()
    for found in (snapshots.validated, model.get_parameter("net.fc3.weight").detach()):
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
    steps = [{"class_path": "ToDtype", "init_args": {"dtype": torch.float32}}]
    flat = flatten_settings({"teacher": teacher, "split": (1, 2, 3), "transforms": steps})
    assert flat.pop("transforms") == str(steps)
    assert flat == {"teacher": "Teacher", "teacher/checkpoint": "a.ckpt", "split": [1, 2, 3]}
    assert yaml.safe_load(yaml.safe_dump(flat)) == flat


def test_gradients_are_clipped_in_bfloat16_by_fused_optimizers_too(digitnet: Run, tmp_path: Path) -> None:
    # SGD at rate 1 moves the weights by the clipped gradient; one step, from the same weights as without.
    digits = load_bundled_digits()
    np.savez("few.npz", images=digits.images[:300], labels=digits.labels[:300])
    few = ("--data.source", "few.npz", "--data.split", "[200, 50, 50]", "--data.batch_size", 200)
    sgd = ("--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", 1, "--model.optimizer.fused", "true")
    one_step = (*SHORT, "--trainer.max_epochs", 1, *few, "--trainer.precision", "bf16-mixed", *sgd)
    clips: tuple[list[object], ...] = ([], ["--trainer.gradient_clip_val", 0.01], ["--trainer.gradient_clip_val", 0.02])
    by_value = ["--trainer.gradient_clip_val", 0.001, "--trainer.gradient_clip_algorithm", "value"]
    for clip in (*clips, by_value):
        assert digitnet("fit", "--config", QUICKSTART, *one_step, *clip) == 0
    runs = [tmp_path / "lightning_logs" / "quickstart" / f"version_{n}" / "checkpoints" for n in range(4)]
    free, small, twice, bounded = (torch.load(run / "last.ckpt", weights_only=True)["state_dict"] for run in runs)

    def move(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([(other[name] - one[name]).flatten() for name in one if name.startswith("net.")])

    assert move(small, twice).norm() == pytest.approx(0.01, rel=1e-3)  # both along the gradient
    start = {name: 2 * small[name] - twice[name] for name in small}
    assert move(start, free).norm() > 0.1
    assert move(start, bounded).abs().max() == pytest.approx(0.001, rel=1e-2)


def test_float16_refuses_to_clip_before_a_fused_optimizer_unscales() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    half = MixedPrecision("16-mixed", "cpu")
    trainer = L.Trainer(accelerator="cpu", plugins=[half], gradient_clip_val=1, logger=False)
    verify_clipping(trainer, torch.optim.Adam(parameters))
    with pytest.raises(ValueError, match=r"not fused: --model\.optimizer\.fused false"):
        verify_clipping(trainer, torch.optim.Adam(parameters, fused=True))


def test_a_run_that_a_threshold_ended_stays_ended(
    digitnet: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    last = tmp_path / "lightning_logs" / "quickstart" / "version_0" / "checkpoints" / "last.ckpt"
    threshold = "--early_stopping.stopping_threshold"
    assert digitnet("fit", "--config", QUICKSTART, *SHORT, "--trainer.max_epochs", 3, threshold, 0.01) == 0
    for more, epoch in (((), 0), ((threshold, "null"), 2), (("--trainer.max_epochs", 5), 4)):
        assert digitnet("fit", "--ckpt_path", "last", *more) == 0
        assert torch.load(last, weights_only=True)["epoch"] == epoch
        assert ("early stopping: Stopping threshold reached" in caplog.text) == (not more)
        caplog.clear()


def test_each_machine_stops_at_its_first_process() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        for local_rank, stops in ((0, True), (1, False)):
            trainer: Any = SimpleNamespace(global_rank=local_rank + 2, local_rank=local_rank)
            StopCleanly().on_train_start(trainer, L.LightningModule())
            assert (signal.getsignal(signal.SIGTERM) != signal.SIG_IGN) is stops
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
            signal.signal(number, handler)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_decay_outside_its_range(decay: float) -> None:
    with pytest.raises(ValueError, match=f"decay is {decay}"):
        AverageWeights(decay)


def test_weights_are_averaged_on_the_device_that_trains() -> None:
    average = AverageWeights()
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("meta")))
    average.setup(trainer, DigitClassifier(), "fit")  # Lightning moves the module afterwards
    assert average._average_model is not None
    assert {weight.device.type for weight in average._average_model.parameters()} == {"meta"}
    assert average._average_model.n_averaged.device.type == "cpu"  # or each step would wait for the device


@pytest.mark.parametrize("is_there", [True, False])
def test_all_processes_know_the_best_score_or_none_does(tmp_path: Path, is_there: bool) -> None:
    best = str(tmp_path / "checkpoints" / "best.ckpt")  # which this process lacks
    keeper = RunCheckpoint(tmp_path / "checkpoints", monitor="val/acc", mode="max")
    strategy: Any = SimpleNamespace(broadcast=lambda mine: is_there)  # as the first process finds it
    keeper._strategy = strategy
    score = torch.tensor(0.9)
    keeper.load_state_dict({
        "best_model_path": best, "kth_best_model_path": best, "last_model_path": "", "best_k_models": {best: score},
        "dirpath": "", "monitor": "val/acc", "best_model_score": score, "kth_value": score, "current_score": score,
    })  # fmt: skip
    assert keeper.best_k_models == ({best: score} if is_there else {})
    assert keeper.best_model_path == (best if is_there else "")


def test_a_process_without_the_best_file_gets_its_weights_from_the_first() -> None:
    best = nn.Linear(2, 2)
    sent = iter(["elsewhere/best.ckpt", best.state_dict()])  # by the first process, in this order
    strategy = SimpleNamespace(broadcast=lambda mine: next(sent))
    keeper = RunCheckpoint(monitor="val/acc", mode="max")  # which lost its file, and so its score
    trainer: Any = SimpleNamespace(checkpoint_callbacks=[keeper], strategy=strategy, is_global_zero=False)
    module: Any = nn.Linear(2, 2)
    RestoreBestWeights().on_fit_end(trainer, module)
    assert torch.equal(module.weight, best.weight)
