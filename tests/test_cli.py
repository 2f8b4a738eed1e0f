"""The commands as people type them: fit, test, validate, their settings and their errors."""

from __future__ import annotations

import contextlib
import csv
import gc
import hashlib
import json
import os
import re
import resource
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from conftest import QUICKSTART, ROOT, SHORT, Run
from jsonargparse import dict_to_namespace
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from digitnet.__main__ import COMMANDS, load_function
from digitnet.apply.predictor import Predictor
from digitnet.checkpoints import is_same_source, read_data_settings
from digitnet.classifier import DigitClassifier
from digitnet.cli import DigitCLI
from digitnet.data import MNISTDataModule, load_bundled_digits
from digitnet.guards import count_steps, try_optimizer
from digitnet.model import ARCHITECTURES
from digitnet.origin import CHOSEN
from digitnet.parsing import run_function
from digitnet.run_folder import prepare_loggers
from digitnet.views import see_near

ONE_CYCLE = (
    "--model.lr_scheduler", "torch.optim.lr_scheduler.OneCycleLR", "--model.lr_scheduler.max_lr", "0.002",
    "--model.lr_scheduler.total_steps", "8",
)  # fmt: skip
RESIZE = ("--data.augmentation=torchvision.transforms.v2.Resize", "--data.augmentation.size=14")
NORMALIZE = (
    "--data.augmentation=torchvision.transforms.v2.Normalize", "--data.augmentation.mean=[0.13]",
    "--data.augmentation.std=[0.3]",
)  # fmt: skip
TO_DTYPE = ("--data.augmentation=torchvision.transforms.v2.ToDtype", "--data.augmentation.dtype")
PLATEAU = ("--model.lr_scheduler", "lightning.pytorch.cli.ReduceLROnPlateau")
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))  # those of the ablations have a test of their own


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint, weights_only=True)["state_dict"]


def scalars(run: Path, tag: str) -> list[tuple[int, float]]:
    """Step and value of a TensorBoard scalar, over all event files of a run."""
    events = EventAccumulator(str(run))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


# --- help and configs -------------------------------------------------------------------------------------------------


def test_help_lists_every_command_within_a_second() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = subprocess.run([sys.executable, "-m", "digitnet", "--help"], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    for command in COMMANDS:
        assert re.search(rf"^  {command} +\w", shown.stdout, re.MULTILINE)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1  # of processor: CI may be busy


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_every_benchmark_finds_what_it_imports(path: Path) -> None:
    assert callable(runpy.run_path(str(path))["main"])


@pytest.mark.parametrize("ending", ["", "raise ValueError\n"], ids=["whole", "broken"])
def test_garbage_collection_skips_imports_and_goes_on(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "imported.py").write_text(f"import gc\nnow = gc.isenabled\nwhile_importing = now()\n{ending}")
    monkeypatch.syspath_prepend(tmp_path)
    frozen = gc.get_freeze_count()
    try:
        with contextlib.suppress(ValueError):
            assert load_function("imported:now")()
            assert not sys.modules.pop("imported").while_importing
        assert gc.isenabled()
        assert gc.get_freeze_count() > frozen
    finally:
        gc.unfreeze()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_parses(digitnet: Run, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert digitnet("fit", "--config", config, "--print_config") == 0
    parsed, written = yaml.safe_load(capsys.readouterr().out), yaml.safe_load(config.read_text())
    names = [("model", "optimizer"), ("data", "augmentation")]
    for section, name in names[1:] if config.stem == "quickstart" else names:
        found, wanted = parsed[section][name], written[section][name]
        if wanted is None:  # a network that augments by itself
            assert found is None
            assert parsed["model"]["architecture"] == written["model"]["architecture"]
            assert ARCHITECTURES[parsed["model"]["architecture"]].VIEW is see_near
        else:
            assert found["class_path"] == wanted["class_path"]
            assert found["init_args"].items() >= wanted["init_args"].items()
        if name == "optimizer" and wanted is not None:  # what another optimizer would have of the default's is said
            assert {"lr", "eps", "fused"} <= wanted["init_args"].keys()


def test_final_config_is_the_write_ups_recipe(digitnet: Run, capsys: pytest.CaptureFixture[str]) -> None:
    digitnet("fit", "--config", ROOT / "configs" / "final.yaml", "--print_config")
    config = yaml.safe_load(capsys.readouterr().out)
    optimizer = config["model"]["optimizer"]
    assert optimizer["class_path"] == "torch.optim.Adam"
    assert (optimizer["init_args"]["lr"], optimizer["init_args"]["eps"]) == (1e-3, 1e-7)
    assert optimizer["init_args"]["betas"] == [0.9, 0.999]
    assert (config["model"]["dropout"], config["model"]["conv_dropout"]) == (0.2, 0.0)
    assert config["data"]["split"] == [60_000, 5_000, 5_000]
    assert (config["data"]["source"], config["data"]["batch_size"]) == ("mnist", 32)
    assert config["data"]["augmentation"]["init_args"] == {"rotation_deg": 18.0, "shift_frac": 0.1, "scale_frac": 0.0}
    assert config["trainer"]["max_epochs"] == 200
    stopping = config["early_stopping"]
    assert (stopping["monitor"], stopping["mode"], stopping["patience"]) == ("val/acc", "max", 10)


def test_fit_commands_of_the_readme_parse(digitnet: Run, capsys: pytest.CaptureFixture[str]) -> None:
    lines = re.findall(r"^python -m digitnet (\w+)(.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert {"fit", "test", "validate", "convert"} <= {command for command, _ in lines}
    assert {command for command, _ in lines} <= COMMANDS.keys()
    for command, rest in lines:
        flags = shlex.split(rest.split("#")[0])
        if command == "fit" and "--ckpt_path" not in flags:
            flags = [str(ROOT / flag) if flag.startswith("configs/") else flag for flag in flags]
            assert digitnet("fit", *flags, "--print_config") == 0, capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:The number of training batches")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")
def test_what_readme_says_of_python_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(import lightning.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for whole, part in [
        ("split=(55_000, 5_000, 10_000)", "source='digits', split=(1437, 180, 180)"),
        ("max_epochs=3", "max_epochs=1, limit_train_batches=4, accelerator='cpu', default_root_dir=folder"),
    ]:
        assert whole in code
        code = code.replace(whole, part)
    names: dict[str, Any] = {"folder": tmp_path}
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), names)
    assert set(names["trainer"].callback_metrics) == {"test/loss", "test/acc"}


# --- fit, then test ---------------------------------------------------------------------------------------------------


def test_fit_leaves_a_complete_run(trained_run: Path) -> None:
    names = {path.name for path in trained_run.rglob("*") if path.is_file() and "events" not in path.name}
    assert names >= {"config.yaml", "hparams.yaml", "best.ckpt", "last.ckpt"}
    for tag in ("train/loss", "train/acc", "val/loss", "val/acc", "train/images_per_s", "lr-Adam"):
        assert len(scalars(trained_run, tag)) == 2, tag
    losses, accuracies = (dict(scalars(trained_run, f"val/{name}")) for name in ("loss", "acc"))
    best = min(losses, key=lambda step: losses[step])  # as this config keeps best.ckpt
    assert scalars(trained_run, "hp/val_acc")[-1][1] == accuracies[best]
    assert scalars(trained_run, "hp/val_loss")[-1][1] == losses[best]
    assert [step for step, _ in scalars(trained_run, "hp/val_acc")] == list(accuracies)  # and none before the first
    compared = yaml.safe_load((trained_run / "hparams.yaml").read_text())  # what TensorBoard's HPARAMS page shows
    assert compared["optimizer"] == "Adam"
    assert (compared["max_epochs"], compared["patience"], compared["best_by"]) == (2, 10, "val/loss")
    assert compared["optimizer/lr"] == 0.001
    assert compared["augmentation"] == "RandomAffine"
    assert compared["split"] == [1717, 40, 40]
    assert "channels_last" not in compared  # left to the hardware


def test_test_takes_the_newest_best_checkpoint_and_scores_each_image_once(
    digitnet: Run, trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = shutil.copytree(trained_run.parents[1], tmp_path / "lightning_logs")
    run, older = logs / "quickstart" / "version_0", logs / "quickstart" / "older"
    shutil.copytree(run, older, ignore=shutil.ignore_patterns("report"))  # which another test may have left there
    os.utime(older / "checkpoints" / "best.ckpt", (0, 0))
    assert digitnet("test") == 0

    metrics = json.loads((run / "report" / "metrics.json").read_text())
    rows = list(csv.DictReader((run / "report" / "predictions.csv").read_text().splitlines()))
    images, labels = load_bundled_digits()
    model = DigitClassifier.load_from_checkpoint(run / "checkpoints" / "best.ckpt", weights_only=True).eval()
    with torch.no_grad():
        probabilities = model(torch.from_numpy(images[-40:])[:, None]).softmax(1)
    readings = Predictor.load(run / "checkpoints" / "best.ckpt").read(images[-40:])
    assert [int(row["index"]) for row in rows] == list(range(1757, 1797))
    assert [int(row["label"]) for row in rows] == labels[-40:].tolist()
    assert [int(row["prediction"]) for row in rows] == probabilities.argmax(1).tolist()
    confidence = torch.tensor([float(row["confidence"]) for row in rows])
    torch.testing.assert_close(confidence, torch.tensor([one.confidence for one in readings]), atol=1e-4, rtol=0)
    assert metrics["temperature"] not in (None, 1.0)
    num_errors = sum(row["label"] != row["prediction"] for row in rows)
    assert 0 < num_errors < 40
    assert (metrics["num_images"], metrics["num_errors"]) == (40, num_errors)
    assert metrics["accuracy"] == pytest.approx(1 - num_errors / 40)
    picked = probabilities[torch.arange(40), torch.from_numpy(labels[-40:]).long()]
    assert metrics["loss"] == pytest.approx(-picked.log().mean().item(), rel=1e-3)
    assert metrics["config_sha256"] == hashlib.sha256((run / "config.yaml").read_bytes()).hexdigest()
    assert (metrics["dataset"], metrics["split"]) == ("digits", [1717, 40, 40])
    assert metrics["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert metrics["hardware"]
    assert {path.name for path in logs.glob("*/*")} == {"version_0", "older"}  # no folder for the test itself
    assert not (older / "report").exists()
    assert f"mistakes  {num_errors}" in capsys.readouterr().out


def test_validate_repeats_the_accuracy_of_the_best_epoch(digitnet: Run, trained_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained_run.parents[1], tmp_path / "lightning_logs") / "quickstart" / "version_0"
    left = ("--trainer.overfit_batches", 1)  # as in the config.yaml of a run that tried whether it can overfit
    assert digitnet("validate", "--ckpt_path", run / "checkpoints" / "best.ckpt", *left) == 0
    metrics = json.loads((run / "report" / "validate_metrics.json").read_text())
    _, accuracy = scalars(run, "val/acc")[metrics["epoch"]]
    assert metrics["accuracy"] == pytest.approx(accuracy)
    assert (metrics["subset"], metrics["num_images"]) == ("val", 40)


def test_a_checkpoint_outside_a_run_is_scored_on_the_data_it_names(
    digitnet: Run, trained_run: Path, tmp_path: Path
) -> None:
    shutil.copy(trained_run / "checkpoints" / "best.ckpt", tmp_path / "mine.ckpt")
    for flags, split in [((), [1717, 40, 40]), (("--data.split", "[1400, 197, 200]"), [1400, 197, 200])]:
        assert digitnet("test", "--ckpt_path", "mine.ckpt", *flags) == 0
        metrics = json.loads((tmp_path / "mine_report" / "metrics.json").read_text())
        assert (metrics["dataset"], metrics["split"]) == ("digits", split)
        assert (metrics["num_images"], metrics["config_sha256"]) == (split[2], None)


def test_other_optimizers_and_schedules_come_from_flags(digitnet: Run, tmp_path: Path) -> None:
    flags = ("--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", 0.01, "--model.lr_scheduler")
    schedule = ("torch.optim.lr_scheduler.ExponentialLR", "--model.lr_scheduler.gamma", 0.1)
    assert digitnet("fit", "--config", QUICKSTART, *SHORT, *flags, *schedule) == 0
    rates = scalars(tmp_path / "lightning_logs" / "quickstart" / "version_0", "lr-SGD")
    assert [value for _, value in rates] == pytest.approx([0.01, 0.001])


def test_flags_that_scoring_leaves_out_are_told(
    digitnet: Run, trained_run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    best = ("--ckpt_path", trained_run / "checkpoints" / "best.ckpt")
    assert digitnet("validate", *best, "--trainer.limit_val_batches=1", "--trainer.logger", "false") == 0
    assert "--trainer.limit_val_batches, --trainer.logger: left out, as every image is scored" in caplog.text
    caplog.clear()
    assert digitnet("validate", *best) == 0
    assert "left out" not in caplog.text


def test_a_callback_of_lightnings_that_cannot_do_its_work_is_told_in_one_line(
    digitnet: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    stop = ("--trainer.callbacks", "lightning.pytorch.callbacks.EarlyStopping", "--trainer.callbacks.monitor", "val/f1")
    assert digitnet("fit", "--config", QUICKSTART, *SHORT, *stop) == 1
    line = "digitnet: error: trainer.callbacks: EarlyStopping: Early stopping conditioned on metric `val/f1`"
    assert capsys.readouterr().err.splitlines()[-1].startswith(line)


@pytest.mark.parametrize("name", ["AdamW", "SGD", "RMSprop"])
def test_an_optimizer_is_tried_without_a_trace(name: str) -> None:
    model = DigitClassifier()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    try_optimizer(getattr(torch.optim, name)(model.parameters(), lr=0.1, weight_decay=0.1))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())


def test_a_schedule_longer_than_the_training_is_said(digitnet: Run, caplog: pytest.LogCaptureFixture) -> None:
    assert digitnet("fit", "--config", QUICKSTART, *SHORT, *ONE_CYCLE, "--trainer.max_epochs", 1) == 0
    told = "model.lr_scheduler is made for 8 steps, this training has 4: the learning rate will not come to its end"
    assert told in caplog.text


def test_patience_of_none_stops_at_the_first_epoch_that_is_no_better(
    digitnet: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    still = ("--model.optimizer.lr", 0, "--early_stopping.patience", 0)
    assert digitnet("fit", "--config", QUICKSTART, *SHORT, "--trainer.max_epochs", 5, *still) == 0
    assert len(scalars(tmp_path / "lightning_logs" / "quickstart" / "version_0", "val/loss")) == 2
    told = "early stopping: val/acc was no better once; for more, --early_stopping.patience 2"
    assert caplog.messages.count(told) == 1
    assert digitnet("fit", "--ckpt_path", "last") == 0
    assert caplog.messages.count(told) == 2
    assert "nothing was trained" in caplog.text


def test_final_config_learns_mnist(
    digitnet: Run, mnist_home: Path | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mnist_home is None:
        pytest.skip("MNIST is not at hand; set SCIKIT_LEARN_DATA")
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(mnist_home))
    short = (
        "--trainer.max_epochs", 1, "--trainer.limit_train_batches", 100, "--data.split", "[60000, 500, 9500]",
        "--pictures.every_n_epochs", 0, "--calibration.num_digits", 0,
    )  # fmt: skip
    assert digitnet("fit", "--config", ROOT / "configs" / "final.yaml", *short) == 0
    assert scalars(tmp_path / "lightning_logs" / "final" / "version_0", "val/acc")[0][1] > 0.8


@pytest.mark.slow
def test_quickstart_reaches_97_percent_in_validation(digitnet: Run, tmp_path: Path) -> None:
    assert digitnet("fit", "--config", QUICKSTART) == 0
    assert digitnet("validate") == 0
    metrics = json.loads((tmp_path / "lightning_logs/quickstart/version_0/report/validate_metrics.json").read_text())
    assert metrics["accuracy"] >= 0.97


def test_two_processes_make_one_run_and_count_each_image_once(trained_run: Path, digitnet: Run, tmp_path: Path) -> None:
    ddp = ("--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.precision=32-true")
    average = "--trainer.callbacks+=digitnet.callbacks.AverageWeights"  # copies the module, in each process
    odd = "--data.split=[1698,50,49]"  # shares that are not equal
    fit = [sys.executable, "-m", "digitnet", "fit", "--config", str(QUICKSTART), *map(str, SHORT), *ddp, average, odd]
    shutil.copytree(trained_run.parents[1], tmp_path / "lightning_logs")
    with subprocess.Popen([sys.executable, "-m", "digitnet", "test", *ddp, odd], cwd=tmp_path) as test:
        (tmp_path / "trained").mkdir()
        subprocess.run(fit, cwd=tmp_path / "trained", check=True)  # meanwhile, as both wait for imports mostly
    assert test.returncode == 0
    runs = list((tmp_path / "trained" / "lightning_logs" / "quickstart").iterdir())
    assert [run.name for run in runs] == ["version_0"]
    report = tmp_path / "lightning_logs" / "quickstart" / "version_0" / "report" / "predictions.csv"
    of_two = report.read_text()
    assert digitnet("test", odd) == 0
    of_one = report.read_text()
    for two, one in zip(csv.reader(of_two.splitlines()), csv.reader(of_one.splitlines()), strict=True):
        assert two[:3] == one[:3]
    assert len(of_one.splitlines()) == 49 + 1


def test_two_machines_need_no_disk_in_common_and_one_tests_alone(
    digitnet: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    nodes = ("--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.num_nodes=2", "--trainer.strategy=ddp")
    command = [sys.executable, "-m", "digitnet", "fit", "--config", str(QUICKSTART), *map(str, SHORT), *nodes]
    processes = []
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": str(rank), "LOCAL_RANK": "0"}
        environ = os.environ | place | {"WORLD_SIZE": "2"}
        processes.append(
            subprocess.Popen(command, cwd=tmp_path / str(rank), env=environ, stderr=subprocess.PIPE, text=True)
        )
    complaints = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], complaints
    assert not any("sync_dist" in complaint for complaint in complaints)  # Lightning's word for a lone process' figure
    assert not (tmp_path / "1" / "lightning_logs").exists()
    monkeypatch.chdir("0")
    assert digitnet("validate") == 0


# --- the same again ---------------------------------------------------------------------------------------------------


def test_after_fit_the_module_holds_the_best_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from digitnet.cli import main

    monkeypatch.chdir(tmp_path)
    # A learning rate of 10 ruins the second epoch: the best weights are then not the last ones.
    schedule = ("torch.optim.lr_scheduler.ExponentialLR", "--model.lr_scheduler.gamma", 10_000)
    cli = main([str(flag) for flag in ("fit", "--config", QUICKSTART, *SHORT, "--model.lr_scheduler", *schedule)])
    folder = tmp_path / "lightning_logs" / "quickstart" / "version_0" / "checkpoints"
    best, last = weights(folder / "best.ckpt"), weights(folder / "last.ckpt")
    assert not torch.equal(best["net.fc3.weight"], last["net.fc3.weight"])
    assert all(torch.equal(value, best[name]) for name, value in cli.model.state_dict().items())


def test_same_seed_same_weights_after_200_steps(digitnet: Run, tmp_path: Path) -> None:
    steps = (
        "--trainer.max_epochs", 1, "--trainer.limit_train_batches", 200, "--data.batch_size", 2,
        "--pictures.every_n_epochs", 0, "--calibration.num_digits", 0,
    )  # fmt: skip
    for _ in range(2):
        assert digitnet("fit", "--config", QUICKSTART, *steps) == 0
    first, second = (tmp_path / "lightning_logs/quickstart" / f"version_{n}/checkpoints/last.ckpt" for n in (0, 1))
    assert torch.load(first, weights_only=True)["global_step"] == 200
    one, two = weights(first), weights(second)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("killed_in_epoch", "more"), [(1, ()), (2, ()), (2, ("--model.selection", "digitnet.HardExamples"))]
)
def test_killed_and_resumed_is_as_if_never_killed(
    digitnet: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_in_epoch: int, more: tuple[str, ...]
) -> None:
    save_dir = tmp_path / "logs"  # not the default: the checkpoints' own record of their folder must hold
    flags = ("fit", "--config", QUICKSTART, *SHORT, "--trainer.max_epochs", 4, "--trainer.logger.save_dir", save_dir)
    assert digitnet(*flags, *more) == 0
    step = DigitClassifier.training_step

    class PowerCut(BaseException):
        pass

    def dying_step(self: DigitClassifier, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        if self.current_epoch == killed_in_epoch and batch_idx == 2:
            raise PowerCut
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(DigitClassifier, "training_step", dying_step)
        with pytest.raises(PowerCut):
            digitnet(*flags, *more)
    whole, resumed = (save_dir / "quickstart" / f"version_{n}" for n in (0, 1))
    assert digitnet("fit", "--ckpt_path", resumed / "checkpoints" / "last.ckpt") == 0  # with the settings of that run
    assert not (resumed.parent / "version_2").exists()
    for name in ("best", "last"):
        one, two = (weights(run / "checkpoints" / f"{name}.ckpt") for run in (whole, resumed))
        assert all(torch.equal(one[key], two[key]) for key in one), name
    one, two = (torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (whole, resumed))
    assert {key: one[key] for key in ("epoch", "global_step")} == {"epoch": 3, "global_step": 16}
    assert {key: two[key] for key in ("epoch", "global_step")} == {"epoch": 3, "global_step": 16}
    stopping = [state for key, state in one["callbacks"].items() if "EarlyStopping" in key]
    assert stopping == [state for key, state in two["callbacks"].items() if "EarlyStopping" in key] != []
    for tag in ("train/loss", "train/acc", "val/loss", "val/acc", "hp/val_acc"):
        assert scalars(whole, tag) == scalars(resumed, tag)


@pytest.mark.parametrize("inside", [".", "checkpoints"])
def test_going_on_and_testing_from_within_the_run_is_as_from_without(
    digitnet: Run, tmp_path: Path, trained_run: Path, monkeypatch: pytest.MonkeyPatch, inside: str
) -> None:
    run = shutil.copytree(trained_run, tmp_path / "my logs" / "toy" / "version_0")
    folder = (run / inside).resolve()
    monkeypatch.chdir(folder)
    last = os.path.relpath(run / "checkpoints" / "last.ckpt")
    assert digitnet("fit", "--ckpt_path", last, "--trainer.max_epochs", 3) == 0
    assert torch.load(last, weights_only=True)["epoch"] == 2
    logger = yaml.safe_load((run / "config.yaml").read_text())["trainer"]["logger"]["init_args"]
    assert (folder / logger["save_dir"] / logger["name"]).resolve() == run.parent
    assert digitnet("test", "--ckpt_path", last) == 0
    assert (run / "report" / "metrics.json").is_file()
    assert {path.name for path in run.parent.iterdir()} == {"version_0"}
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt", "previous.ckpt"}


def test_a_command_to_type_has_names_with_spaces_quoted(
    digitnet: Run, tmp_path: Path, trained_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(trained_run, tmp_path / "my logs" / "version_0")
    (run / "checkpoints" / "last.ckpt").write_bytes(b"cut")
    (run / "checkpoints" / "previous.ckpt").unlink(missing_ok=True)
    assert digitnet("fit", "--ckpt_path", run / "checkpoints" / "last.ckpt") == 1
    told = capsys.readouterr().err.splitlines()[-1].rpartition("start anew: ")[2]
    assert shlex.split(told) == ["python", "-m", "digitnet", "fit", "--config", "my logs/version_0/config.yaml"]


def test_going_on_with_a_stopped_run_ends_at_once(digitnet: Run, tmp_path: Path) -> None:
    stopping = ("--early_stopping.patience", 1, "--early_stopping.min_delta", 1)  # nothing is a better accuracy by 1
    assert digitnet("fit", "--config", QUICKSTART, *SHORT, "--trainer.max_epochs", 9, *stopping) == 0
    run = tmp_path / "lightning_logs" / "quickstart" / "version_0"
    epochs = len(scalars(run, "val/acc"))
    assert epochs == 2
    before = weights(run / "checkpoints" / "last.ckpt"), (run / "config.yaml").read_text()
    assert digitnet("fit", "--ckpt_path", "last") == 0
    assert len(scalars(run, "val/acc")) == epochs
    after = weights(run / "checkpoints" / "last.ckpt"), (run / "config.yaml").read_text()
    assert all(torch.equal(after[0][name], before[0][name]) for name in before[0])
    assert after[1] == before[1]
    assert digitnet("fit", "--ckpt_path", "last", "--early_stopping.patience", 3) == 0
    assert len(scalars(run, "val/acc")) > epochs
    assert yaml.safe_load((run / "config.yaml").read_text())["early_stopping"]["patience"] == 3


def test_going_on_keeps_the_optimizer_and_the_schedule(
    digitnet: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert digitnet("fit", "--config", QUICKSTART, *SHORT, *ONE_CYCLE) == 0
    run = tmp_path / "lightning_logs" / "quickstart" / "version_0"
    outside = shutil.copy(run / "checkpoints" / "last.ckpt", tmp_path / "mine.ckpt")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    on = "going on keeps the run's; to train with another, start anew: python -m digitnet fit --config "
    for flags, line in [
        (("last", "--model.optimizer.lr", "1e-4"), "model.optimizer is not that of lightning_logs/quickstart/ver"),
        (("last", "--model.optimizer", "torch.optim.SGD"), on),
        (("last", "--model.lr_scheduler.total_steps", 12, "--trainer.max_epochs", 3), "model.lr_scheduler is not"),
        (("last", "--trainer.max_epochs", 3), "for 8 steps, this training has 12; give --trainer.max_epochs 2"),
        (
            ("last", "--best_checkpoint.monitor", "val/acc", "--best_checkpoint.mode", "max"),
            "monitor is not that of li",
        ),
        ((outside,), "mine.ckpt lies outside a run: give the config it was trained with, --config"),
        ((outside, "--config", QUICKSTART, *SHORT, "--model.architecture=upright"), "holds another architecture than"),
    ]:
        assert digitnet("fit", "--ckpt_path", *flags) == 1
        assert line in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before


CYCLE = ONE_CYCLE[:-2]  # of no length


def test_a_schedule_without_a_length_is_as_long_as_the_training(
    digitnet: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shorter = ("--trainer.accumulate_grad_batches", 3, "--trainer.max_epochs", 4)  # two steps an epoch
    assert digitnet("fit", "--config", QUICKSTART, *SHORT, *CYCLE, *shorter) == 0
    run = tmp_path / "lightning_logs" / "quickstart" / "version_0"
    stored = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    [schedule] = stored["lr_schedulers"]
    assert stored["global_step"] == schedule["total_steps"] == 8
    capsys.readouterr()
    assert digitnet("fit", "--ckpt_path", "last", "--trainer.max_epochs", 5) == 1  # it has come to its end
    assert "for 8 steps, this training has 10; give --trainer.max_epochs 4" in capsys.readouterr().err
    assert digitnet("fit", "--ckpt_path", "last", "--trainer.max_epochs", 5, "--trainer.limit_train_batches", 1) == 1
    assert "for 8 steps, this training has 9; give --trainer.max_epochs 4" in capsys.readouterr().err
    for flags, line in [
        (("--trainer.max_epochs", -1), "ends with the training, which has no end known in steps; give --trainer.max"),
        (("--model.lr_scheduler.total_steps", 0), "Expected positive integer total_steps, but got 0"),
        (("--model.lr_scheduler.epochs", 2), "You must define either total_steps OR (epochs AND steps_per_epoch)"),
    ]:
        assert digitnet("fit", "--config", QUICKSTART, *SHORT, *CYCLE, *flags) == 1
        assert line in capsys.readouterr().err
    assert not run.with_name("version_1").exists()


def test_steps_that_are_done_count_as_they_were(digitnet: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert digitnet("fit", "--config", QUICKSTART, *SHORT, *CYCLE, "--model.lr_scheduler.total_steps", 16) == 0
    on = ("fit", "--ckpt_path", "last", "--trainer.max_epochs", 8, "--trainer.limit_train_batches")
    assert digitnet(*on, 2) == 1  # eight are done, and twelve would follow
    assert "for 16 steps, this training has 20; give --trainer.max_epochs 6" in capsys.readouterr().err
    assert digitnet(*on, 2, "--trainer.max_epochs", 6) == 0


def test_a_schedule_that_the_checkpoint_has_not_is_refused(
    digitnet: Run, tmp_path: Path, trained_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = shutil.copy(trained_run / "checkpoints" / "last.ckpt", tmp_path / "mine.ckpt")
    flags = (*CYCLE, "--trainer.max_epochs", 4, "--ckpt_path", last)
    assert digitnet("fit", "--config", QUICKSTART, *SHORT, *flags) == 1
    assert "model.lr_scheduler counts steps, but the checkpoint has no such schedule" in capsys.readouterr().err
    assert not Path("lightning_logs").exists()


@pytest.mark.parametrize(("pct_start", "total_steps"), [(0.25, 5), (1.0, 5), (0.0, 4)])
def test_a_schedule_without_a_length_can_be_short(
    digitnet: Run, tmp_path: Path, pct_start: float, total_steps: int
) -> None:
    flags = ("--model.lr_scheduler.pct_start", pct_start, "--trainer.max_epochs", 1)
    assert digitnet("fit", "--config", QUICKSTART, *SHORT, *CYCLE, *flags) == 0  # of four steps some divide by zero
    run = tmp_path / "lightning_logs" / "quickstart" / "version_0"
    assert (
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["lr_schedulers"][0]["total_steps"]
        == total_steps
    )


@pytest.mark.parametrize(
    "flags",
    [
        (), ("--trainer.limit_train_batches", 0.5), ("--trainer.max_steps", 7), ("--trainer.max_epochs", -1),
        ("--trainer.accumulate_grad_batches", 3), ("--data.batch_size", 100, "--trainer.limit_train_batches", 1.0),
    ],
)  # fmt: skip
def test_steps_are_counted_as_the_trainer_does(
    digitnet: Run, monkeypatch: pytest.MonkeyPatch, flags: tuple[object, ...]
) -> None:
    counted: list[float] = []

    def start(trainer: L.Trainer, model: DigitClassifier, datamodule: MNISTDataModule, **kwargs: Any) -> None:
        counted.append(count_steps(trainer, datamodule))
        trainer.strategy.connect(model)
        trainer._data_connector.attach_data(model, datamodule=datamodule)
        counted.append(trainer.estimated_stepping_batches)

    monkeypatch.setattr(L.Trainer, "fit", start)
    assert digitnet("fit", "--config", QUICKSTART, *SHORT, *flags) == 0
    assert counted[0] == counted[1]


def test_a_training_that_goes_on_outside_its_run_leaves_a_complete_one(
    digitnet: Run, tmp_path: Path, trained_run: Path
) -> None:
    last = shutil.copy(trained_run / "checkpoints" / "last.ckpt", tmp_path / "mine.ckpt")
    assert digitnet("fit", "--config", QUICKSTART, *SHORT, "--trainer.max_epochs", 3, "--ckpt_path", last) == 0
    run = tmp_path / "lightning_logs" / "quickstart" / "version_0"
    compared, before = (yaml.safe_load((each / "hparams.yaml").read_text()) for each in (run, trained_run))
    assert compared == {**before, "max_epochs": 3}
    [(_, accuracy)] = scalars(run, "val/acc")
    assert [value for _, value in scalars(run, "hp/val_acc")] == [accuracy]  # its best.ckpt knows no other


def test_the_best_of_a_run_is_that_of_its_file(digitnet: Run, tmp_path: Path, trained_run: Path) -> None:
    run = shutil.copytree(trained_run, tmp_path / "lightning_logs" / "quickstart" / "version_0")
    (run / "checkpoints" / "best.ckpt").unlink()
    last = run / "checkpoints" / "last.ckpt"
    stored = torch.load(last, weights_only=True)
    stored["callbacks"]["HyperparameterSummary"]["figures"] = {"val/acc": 1.0, "val/loss": 0.0}  # no better is to come
    torch.save(stored, last)
    assert digitnet("fit", "--ckpt_path", "last", "--trainer.max_epochs", 3) == 0
    assert (run / "checkpoints" / "best.ckpt").exists()
    for name in ("acc", "loss"):
        assert scalars(run, f"hp/val_{name}")[-1] == scalars(run, f"val/{name}")[-1]


def test_the_loss_of_single_steps_is_logged(digitnet: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses, step = [], DigitClassifier.training_step

    def kept(self: DigitClassifier, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = step(self, batch, batch_idx)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(DigitClassifier, "training_step", kept)
    often = ("--trainer.log_every_n_steps", 2, "--trainer.accumulate_grad_batches", 2, "--trainer.max_epochs", 1)
    assert digitnet("fit", "--config", QUICKSTART, *SHORT, *often, "--trainer.limit_train_batches", 8) == 0
    run = tmp_path / "lightning_logs" / "quickstart" / "version_0"
    assert dict(scalars(run, "train/loss_step")) == pytest.approx({1: losses[3], 3: losses[7]})
    assert digitnet("fit", "--ckpt_path", "last", "--trainer.max_epochs", 2) == 0
    assert [at for at, _ in scalars(run, "train/loss_step")] == [1, 3, 5, 7]


def test_a_precision_plugin_takes_the_place_of_the_precision(digitnet: Run) -> None:
    flags = ("--trainer.plugins", "lightning.pytorch.plugins.DoublePrecision", "--trainer.max_epochs", 1)
    precision = SHORT.index("--trainer.precision")
    assert digitnet("fit", "--config", QUICKSTART, *SHORT[:precision], *SHORT[precision + 2 :], *flags) == 0
    stored = weights(Path("lightning_logs") / "quickstart" / "version_0" / "checkpoints" / "best.ckpt")
    assert {weight.dtype for weight in stored.values()} == {torch.float64}
    assert (
        yaml.safe_load(Path("lightning_logs/quickstart/version_0/hparams.yaml").read_text())["precision"] == "64-true"
    )


def test_a_checkpoint_of_no_more_than_weights_is_scored(digitnet: Run, tmp_path: Path, trained_run: Path) -> None:
    stored = torch.load(trained_run / "checkpoints" / "best.ckpt", weights_only=True)
    few = {key: stored[key] for key in ("state_dict", "pytorch-lightning_version", "datamodule_hyper_parameters")}
    torch.save(few, tmp_path / "few.ckpt")
    assert digitnet("test", "--ckpt_path", "few.ckpt") == 0
    assert (tmp_path / "few_report" / "metrics.json").exists()


def test_a_progress_bar_is_shown_where_it_is_asked_for(digitnet: Run, capsys: pytest.CaptureFixture[str]) -> None:
    short = ("fit", "--config", QUICKSTART, *SHORT, "--trainer.max_epochs", 1)
    assert digitnet(*short) == 0
    assert "it/s" not in "".join(capsys.readouterr())
    assert digitnet(*short, "--trainer.enable_progress_bar", "true") == 0
    assert "it/s" in "".join(capsys.readouterr())


def test_settings_are_shown_before_there_is_a_run(digitnet: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert digitnet("test", "--print_config") == 0
    assert yaml.safe_load(capsys.readouterr().out)["data"]["batch_size"] == 32
    assert digitnet("validate", "--model.optimizer.help", "torch.optim.SGD") == 0
    assert "nesterov" in capsys.readouterr().out
    assert digitnet("test") == 1


def test_going_on_with_fewer_epochs_or_other_data_is_refused_and_changes_nothing(
    digitnet: Run, tmp_path: Path, trained_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(trained_run, tmp_path / "lightning_logs" / "quickstart" / "version_0")
    np.savez(tmp_path / "mine.npz", images=np.zeros((90, 28, 28), np.uint8), labels=np.arange(90) % 10)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for flags, line in [
        (("--trainer.max_epochs", 1), "trainer.max_epochs is 1, but"),
        (("--data.split", [1737, 30, 30]), "data.split is [1737, 30, 30], but lightning_logs/quickstart/version_0 was"),
        (("--data.source", "mine.npz", "--data.split", [70, 10, 10]), "data.source is mine.npz, but"),
    ]:
        assert digitnet("fit", "--ckpt_path", "last", *flags) == 1
        assert line in capsys.readouterr().err.splitlines()[-1]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert digitnet("fit", "--ckpt_path", run / "checkpoints" / "last.ckpt", "--trainer.max_epochs", 3) == 0


def test_ctrl_c_keeps_the_last_checkpoint_and_says_how_to_go_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "digitnet", "fit", "--config", str(QUICKSTART), *map(str, SHORT)]
    with subprocess.Popen(
        [*command, "--trainer.max_epochs", "1000", "--early_stopping.patience", "1000"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where pytest runs in the background
    ) as process:  # fmt: skip
        last = tmp_path / "lightning_logs/quickstart/version_0/checkpoints/last.ckpt"
        deadline = time.monotonic() + 90
        while not last.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        try:
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "Traceback" not in output
    assert (
        "To go on: python -m digitnet fit --ckpt_path lightning_logs/quickstart/version_0/checkpoints/last.ckpt"
        in output
    )
    assert torch.load(last, weights_only=True)["optimizer_states"]


@pytest.mark.filterwarnings("ignore:You passed")  # by Lightning, that it takes another
def test_the_precision_that_is_kept_is_the_one_that_was_used(digitnet: Run, tmp_path: Path) -> None:
    flags = ("--trainer.accelerator", "cpu", "--trainer.precision", "16-mixed", "--trainer.max_epochs", 1)
    assert digitnet("fit", "--config", QUICKSTART, *SHORT, *flags) == 0
    run = tmp_path / "lightning_logs" / "quickstart" / "version_0"
    assert yaml.safe_load((run / "hparams.yaml").read_text())["precision"] == "bf16-mixed"


def test_going_on_in_another_precision_is_told_of(
    digitnet: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    place = SHORT.index("--trainer.precision")
    short = (*SHORT[:place], *SHORT[place + 2 :])
    monkeypatch.setattr("digitnet.cli.choose_precision", lambda accelerator: ("32-true", "a slow machine"))
    assert digitnet("fit", "--config", QUICKSTART, *short, "--trainer.max_epochs", 1) == 0
    told = "lightning_logs/quickstart/version_0 began in 32-true, which --trainer.precision 32-true keeps"
    for epochs, precision in ((2, "32-true"), (3, "bf16-mixed")):
        monkeypatch.setattr("digitnet.cli.choose_precision", lambda accelerator, new=precision: (new, "a fast one"))
        assert digitnet("fit", "--ckpt_path", "last", "--trainer.max_epochs", epochs) == 0
        assert (told in caplog.messages) == (precision != "32-true")


# --- bad input: one line, exit code not 0, nothing left behind --------------------------------------------------------

WRONG = [
    (["fit", "--trainer.max_epoch", "3"], 2, "did you mean trainer.max_epochs?"),
    (["fit", "--model.droput", "0.3"], 2, "did you mean model.dropout?"),
    (["fit", "--config", "typo.yaml"], 2, "does not accept option 'model.droput'; did you mean model.dropout?"),
    (["fit", "--config", "resume.yaml"], 1, "a config has ckpt_path: a.ckpt; give it as a flag, --ckpt_path"),
    (["fit", "--config", "missing.yaml"], 2, "missing.yaml"),
    (
        ["fit", "configs/fast.yaml"],
        2,
        "configs/fast.yaml; did you mean --config configs/fast.yaml?",
    ),
    (["test", "--ckpt_path", "."], 1, '"." is a folder; give a checkpoint, as checkpoints/best.ckpt of a run'),
    (["fit", "--config", "binary.yaml"], 1, "binary.yaml is no YAML: it is no text"),
    (["fit", "--config", "empty.yaml"], 1, "empty.yaml is empty; a config has keys such as model and data"),
    (["fit", "-c", "binary.yaml"], 1, "binary.yaml is no YAML: it is no text"),
    (["fit", "--config", "broken.yaml"], 2, "line 2"),
    (["fit", "--config", "hollow.yaml"], 1, "calibration is null; give settings below it, or leave it out"),
    (["fit", "--config", "number.yaml"], 1, "model is 3; give settings below it, or leave it out"),
    (["fit", "--config", "unset.yaml"], 1, "model.dropout is empty; give it a value, or leave it out"),
    (["fit", "--trainer.max_epochs", "many"], 2, '"trainer.max_epochs": Expected int Given value: many'),
    (["fit", "--data.split", "[1297, 250, 200]"], 1, "data.split [1297, 250, 200] adds up to 1,747"),
    (["fit", "--data.split", "[1297, 500]"], 2, "data.split"),
    (["fit", "--data.split", "[2000, -453, 250]"], 1, "data.split is [2000, -453, 250]"),
    (["fit", "--seed_everything", "-5"], 1, "seed_everything is -5; it must be from 0 to 2**32 - 1"),
    (["fit", "--data.batch_size", "0"], 1, "data.batch_size is 0"),
    (["fit", "--data.augmentation.shift_frac", "-0.1"], 1, "shift_frac is -0.1"),
    (["fit", "--data.augmentation.shift", "0.1"], 2, "did you mean shift_frac?"),
    (["fit", *RESIZE], 1, "turned images (8, 1, 28, 28) into (8, 1, 14, 14); the shape must stay"),
    (["fit", *NORMALIZE], 1, "data.augmentation fails on uint8 images: Input tensor should be a float tensor"),
    (
        ["fit", *TO_DTYPE, "torch.float16"],
        1,
        "data.augmentation gives images of torch.float16; they must be torch.uint8 or",
    ),
    (
        ["fit", *TO_DTYPE, "torch.float32"],
        1,
        "levels from 0 to 255; they must lie in [0, 1], as those that are validated do",
    ),
    (["fit", "--data.source", "nowhere.npz"], 1, "nowhere.npz"),
    (["fit", "--trainer.accelerator", "cpu", "--trainer.devices", "-1"], 1, "trainer: `devices` selected with"),
    (["fit", "--model.dropout", "1.5"], 1, "dropout is 1.5"),
    (["fit", "--model.optimizer.lr", "-1"], 1, "Invalid learning rate: -1"),
    (["fit", "--model.lr_scheduler.T_max", "0"], 1, "model.lr_scheduler: "),
    (["fit", "--model.optimizer", "torch.optim.SparseAdam"], 1, "model.optimizer: SparseAdam: SparseAdam does not"),
    (["fit", "--model.optimizer", "torch.optim.LBFGS"], 1, "model.optimizer: LBFGS: view size is not compatible"),
    (["fit", "--model.optimizer", "torch.optim.LBFGS"], 1, "; give --model.channels_last false"),
    (["fit", "--model.optimizer.lr", "null"], 1, "model.optimizer or model.lr_scheduler: '<=' not supported"),
    (
        ["fit", "--early_stopping.monitor", "val/accuracy"],
        1,
        "val/accuracy, which is not logged; did you mean val/",
    ),
    (["fit", "--early_stopping.patience", "-1"], 1, "early_stopping.patience is -1; it must be at least 0"),
    (["fit", "--trainer.check_val_every_n_epoch", "0"], 1, "check_val_every_n_epoch is 0; it must be at least 1"),
    (
        ["fit", "--early_stopping.monitor", "val/loss"],
        1,
        "best val/loss is the minimum; give --early_stopping.mode min",
    ),
    (
        ["fit", "--best_checkpoint.monitor", "val/acc"],
        1,
        "best val/acc is the maximum; give --best_checkpoint.mode max",
    ),
    (
        ["fit", *PLATEAU, "--model.lr_scheduler.monitor", "val/los"],
        1,
        "model.lr_scheduler.monitor is val/los, which is",
    ),
    (["fit", *PLATEAU, "--model.lr_scheduler.monitor", "val/acc"], 1, "maximum; give --model.lr_scheduler.mode max"),
    (["fit", "--best_checkpoint.save_top_k", "3"], 1, "best_checkpoint.save_top_k is 3, and must stay 1: best.ckpt is"),
    (["fit", "--best_checkpoint.filename", "mine"], 1, 'best_checkpoint.filename is "mine", and must stay "best": '),
    (["fit", "--best_checkpoint.save_last", "true"], 1, "best_checkpoint.save_last is true, and must stay null: "),
    (["fit", "--last_checkpoint.monitor", "val/acc"], 1, 'last_checkpoint.monitor is "val/acc", and must stay null: '),
    (["fit", "--last_checkpoint.save_top_k", "0"], 1, "last_checkpoint.save_top_k is 0, and must stay 1: "),
    (["fit", "--last_checkpoint.save_weights_only", "true"], 1, "save_weights_only is true, and must stay false: "),
    (["fit", "--last_checkpoint.every_n_train_steps", "0"], 1, "every_n_train_steps is 0, and must stay null: "),
    (["fit", "--best_checkpoint.every_n_epochs", "3"], 1, "every_n_epochs is 3, and must stay null: "),
    (["fit", "--last_checkpoint.save_on_exception", "true"], 1, "save_on_exception is true, and must stay false: "),
    (
        ["fit", "--best_checkpoint.monitor", "null"],
        1,
        "best_checkpoint.monitor is null, which is not logged; there are",
    ),
    (["fit", "--trainer.accumulate_grad_batches", "0"], 1, "accumulate_grad_batches is 0; it must be at least 1"),
    (["fit", "--trainer.sync_batchnorm", "true"], 1, "each process normalizes by its own images; give --tra"),
    (["fit", "--trainer.val_check_interval", "0"], 1, "val_check_interval is 0; a number of steps is at least 1"),
    (
        ["fit", "--trainer.val_check_interval", "46"],
        1,
        "val_check_interval is 46, but a pass has 45 batches; give fewer",
    ),
    (["fit", "--trainer.limit_train_batches", "0.01"], 1, "limit_train_batches is 0.01, a share that leaves no batch"),
    (["fit", "--trainer.limit_val_batches", "0.9"], 1, "limit_val_batches is 0.9, a share that leaves no batch; give"),
    (["fit", "--trainer.strategy", "ddp_spawn"], 1, "in processes that this one does not hear from; give ddp"),
    (["fit", *ONE_CYCLE, "--trainer.max_epochs", "3"], 1, "for 8 steps, this training has 135; give --model.lr_sch"),
    (["fit", *ONE_CYCLE, "--trainer.max_epochs", "-1"], 1, "this training has inf; give --trainer.max_epochs"),
    (["fit", "--ckpt_path"], 2, "--ckpt_path: expected one argument"),
    (["fit", "--ckpt_path", "last"], 1, "no run has a checkpoints/last.ckpt"),
    (["fit", "--ckpt_path", "nowhere.ckpt"], 1, '"nowhere.ckpt": no such file; give the path of a checkpoint'),
    (["fit", "--ckpt_path", "weights.ckpt"], 1, "weights.ckpt holds weights only; to go on with training, give a last"),
    (["fit", "--trainer.logger.save_dir", "a_file"], 1, "cannot write to a_file"),
    (["fit", "--trainer.logger.sub_dir", "mine"], 1, "sub_dir mine, which splits a run over two folders; leave it out"),
    (
        ["fit", "--trainer.logger.save_dir", "s3://mine"],
        1,
        "save_dir is s3://mine; a run needs a folder of this machine",
    ),
    (["test"], 1, "train one first: python -m digitnet fit --config configs/final.yaml"),
    (["validate", "--ckpt_path", "text.ckpt"], 1, "text.ckpt is not a checkpoint"),
    (
        ["test", "--ckpt_path", "hi.ckpt"],
        1,
        "hi.ckpt is not a checkpoint that can be read safely: PyTorch did not",
    ),
    (["test", "--ckpt_path", "a_file"], 1, "a_file is not a checkpoint"),
    (["tset"], 2, "no command 'tset'; did you mean test?"),
]


@pytest.mark.parametrize(
    ("args", "code", "line"), WRONG, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_bad_input_is_told_in_one_line(
    digitnet: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], code: int, line: str
) -> None:
    (tmp_path / "typo.yaml").write_text("model:\n  droput: 0.3\n")
    (tmp_path / "resume.yaml").write_text("ckpt_path: a.ckpt\n")
    (tmp_path / "binary.yaml").write_bytes(b"\x89PNG\xff")
    (tmp_path / "empty.yaml").write_text("\n")
    (tmp_path / "broken.yaml").write_text("model: [\n")
    (tmp_path / "hollow.yaml").write_text("calibration:\ndata: {batch_size: 8}\n")
    (tmp_path / "number.yaml").write_text("model: 3\n")
    (tmp_path / "unset.yaml").write_text("model: {dropout: }\n")
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    (tmp_path / "hi.ckpt").write_text("hi\n")  # which its reader fails on with a bare 105
    (tmp_path / "a_file").write_text("a file, not a folder")
    bare = {"state_dict": DigitClassifier().state_dict(), "pytorch-lightning_version": "2.6.6"}
    torch.save(bare, tmp_path / "weights.ckpt")
    before = set(tmp_path.rglob("*"))
    if args[0] == "fit":
        args = ["fit", "--config", str(QUICKSTART), *args[1:]]
    assert digitnet(*args) == code
    errors = [text for text in capsys.readouterr().err.splitlines() if text.startswith("digitnet: error: ")]
    assert len(errors) == 1
    assert line in errors[0]
    assert set(tmp_path.rglob("*")) == before


def test_without_a_validated_epoch_fit_says_that_there_is_no_best_checkpoint(
    digitnet: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert digitnet("fit", "--config", QUICKSTART, *SHORT, "--trainer.check_val_every_n_epoch", 3) == 0
    assert not list(tmp_path.rglob("best.ckpt"))
    assert any(text.startswith("no epoch was validated, so there is no best.ckpt") for text in caplog.messages)
    caplog.clear()
    assert digitnet("fit", "--config", QUICKSTART, *SHORT, "--trainer.check_val_every_n_epoch", 2) == 0
    assert not any("no epoch was validated" in text for text in caplog.messages)
    first, second = (text for text in caplog.messages if text.startswith("epoch "))
    assert "val/acc" not in first
    assert "val/acc" in second
    assert digitnet("fit", "--config", QUICKSTART, *SHORT, "--trainer.fast_dev_run", "true") == 0  # keeps nothing
    assert not any("no epoch was validated" in text for text in caplog.messages)


@pytest.mark.parametrize("split", [[], ["a", 1, 2], (None,), 3, (1, 2, 3)])
def test_a_split_in_a_foreign_checkpoint_is_taken_only_if_it_is_one(split: Any) -> None:
    settings = read_data_settings({"datamodule_hyper_parameters": {"source": "digits", "split": split}})
    assert settings == {"source": "digits"} | ({"split": [1, 2, 3]} if split == (1, 2, 3) else {})


def test_a_place_of_an_unknown_user_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", "runs")
    logger = {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "~nobody-here/$PLACE", "name": "one"}}
    config = dict_to_namespace({"trainer": {"logger": logger}})
    prepare_loggers(config, None)
    assert config.trainer.logger.init_args.save_dir == "~nobody-here/runs"


def test_a_folder_of_a_run_without_a_checkpoint_is_told_of(
    digitnet: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    flags = ("fit", "--config", QUICKSTART, *SHORT, "--trainer.logger.version", "mine")
    assert digitnet(*flags, "--trainer.max_epochs", 0) == 0
    (tmp_path / "lightning_logs" / "older" / "checkpoints").mkdir(parents=True)
    older = tmp_path / "lightning_logs" / "older" / "checkpoints" / "last.ckpt"
    older.touch()
    os.utime(older, (1, 1))
    studied = tmp_path / "lightning_logs" / "ablations" / "seed_42"  # which leaves no checkpoint
    studied.mkdir(parents=True)
    for name in ("config.yaml", "result.json"):
        (studied / name).touch()
    assert digitnet("fit", "--ckpt_path", "last") == 1
    assert f"mine is newer than {older.relative_to(tmp_path)}, but has no checkpoints/last.ckpt" in caplog.text
    capsys.readouterr()
    assert digitnet(*flags) == 1
    assert "mine holds a run; it has no checkpoint yet; where no fit is at work in it, re" in capsys.readouterr().err


def test_images_that_were_trained_on_are_told_of(
    digitnet: Run, trained_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: Any
) -> None:
    run = shutil.copytree(trained_run.parents[1], tmp_path / "lightning_logs") / "quickstart" / "version_0"
    best = run / "checkpoints" / "best.ckpt"
    for command, split, said in [
        ("test", [1000, 700, 97], "trained on 17 of these 97 images"),
        ("validate", [1617, 90, 90], "trained on 90 of these 90 images"),
        ("test", [1717, 20, 60], ""),
    ]:
        caplog.clear()
        assert digitnet(command, "--ckpt_path", best, "--data.split", split) == 0
        told = [text for text in caplog.messages if "the checkpoint was trained on" in text]
        assert [said in text for text in told] == ([True] if said else [])
    flags = ("--data.split", [40, 1717, 40], "--trainer.max_epochs", 3)
    assert digitnet("fit", "--ckpt_path", "last", *flags) == 1
    assert (
        "was trained on 1,677 of the images that it leaves out of training; give [1717, 40" in capsys.readouterr().err
    )


def test_digits_that_were_trained_on_are_told_of_in_whatever_way_their_file_is_named(
    digitnet: Run, trained_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    digits = load_bundled_digits()
    np.savez(tmp_path / "mine.npz", images=digits.images, labels=digits.labels)
    stored = torch.load(trained_run / "checkpoints" / "best.ckpt", weights_only=True)
    stored["datamodule_hyper_parameters"]["source"] = "mine.npz"
    torch.save(stored, tmp_path / "mine.ckpt")
    Path("other.npz").write_bytes(Path("mine.npz").read_bytes())
    for source, known in [("./mine.npz", 17), (tmp_path / "mine.npz", 17), ("other.npz", 0)]:
        caplog.clear()
        flags = ("--data.source", source, "--data.split", [1000, 700, 97])
        assert digitnet("test", "--ckpt_path", "mine.ckpt", *flags) == 0
        assert any(f"was trained on {known} of these 97" in text for text in caplog.messages) == bool(known)
        folder = tmp_path / ("mine_report" if known else "mine_report_other")
        assert json.loads((folder / "metrics.json").read_text())["num_trained_on"] == known
    Path("more").mkdir()
    Path("other.npz").rename("more/other.npz")  # of the same name, and so of another folder
    assert digitnet("test", "--ckpt_path", "mine.ckpt", *flags[:1], "more/other.npz", *flags[2:]) == 0
    found = {path.parent.name: json.loads(path.read_text())["dataset"] for path in tmp_path.rglob("metrics.json")}
    assert found["mine_report_other"] == "other.npz"
    assert found["mine_report_other_2"] == "more/other.npz"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("mnist", "mnist", True), ("digits", "./digits", False), ("mnist", "mine/../mnist", False),
        ("mine.npz", "./mine.npz", True), ("mine.npz", "~nosuchuser/mine.npz", False), ("loop", "mine.npz", False),
    ],
)  # fmt: skip
def test_a_source_is_a_name_or_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one: str, other: str, same: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    assert is_same_source(one, other) is is_same_source(other, one) is same


def test_processes_that_share_the_work_take_the_same_checkpoint(
    digitnet: Run, trained_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [tmp_path / "lightning_logs" / "quickstart" / f"version_{n}" for n in (0, 1)]
    for run in runs:
        shutil.copytree(trained_run, run)
    older, newer = (run / "checkpoints" / "best.ckpt" for run in runs)
    os.utime(older, (1, 1))
    chosen: list[str | None] = []  # as a process that is started while this one works finds it
    monkeypatch.setattr(DigitCLI, "validate", lambda *args, **kwargs: chosen.append(os.environ.get(CHOSEN)))
    assert digitnet("validate") == 0
    assert [Path(str(path)).absolute() for path in chosen] == [newer]
    assert CHOSEN not in os.environ  # of the next command
    monkeypatch.setenv(CHOSEN, str(older))
    assert digitnet("validate") == 0
    assert f"validate: {older}" in caplog.messages
    assert os.environ[CHOSEN] == str(older)


def test_fewer_images_than_processes_are_refused_before_there_is_a_run(
    digitnet: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two = ("--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp")
    assert digitnet("fit", "--config", QUICKSTART, "--data.split", [1795, 1, 1], *two) == 1
    assert "data.split is [1795, 1, 1] for 2 processes; each needs an image" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_run_with_a_second_logger_goes_on(digitnet: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loggers = [
        {"class_path": f"lightning.pytorch.loggers.{name}", "init_args": {"save_dir": folder}}
        for name, folder in (("TensorBoardLogger", "lightning_logs"), ("CSVLogger", "csv"))
    ]
    fit = ("fit", "--config", QUICKSTART, *SHORT)
    assert digitnet(*fit, "--trainer.logger", json.dumps(loggers)) == 0
    (last,) = tmp_path.glob("lightning_logs/**/checkpoints/last.ckpt")
    assert digitnet("fit", "--ckpt_path", "last", "--trainer.max_epochs", 3) == 0
    assert list(tmp_path.glob("lightning_logs/**/last.ckpt")) == [last]
    assert torch.load(last, weights_only=True)["epoch"] == 2
    caplog.clear()
    assert digitnet(*fit, "--trainer.logger", json.dumps(loggers[::-1]), "--trainer.max_epochs", 1) == 0
    assert any("the first is no TensorBoardLogger, so a run that is stopped ends there" in x for x in caplog.messages)


def test_what_lightning_may_be_told_in_other_words_can_be_gone_on_with(digitnet: Run, tmp_path: Path) -> None:
    swa = "--trainer.callbacks+=lightning.pytorch.callbacks.StochasticWeightAveraging"  # whose device is no plain YAML
    other = ("--trainer.logger", "true", "--trainer.val_check_interval", "00:00:00:00", swa)
    fit = ("fit", "--config", QUICKSTART, *SHORT, *other, "--trainer.callbacks.swa_lrs", 0.001)
    assert digitnet(*fit) == 0
    (last,) = tmp_path.glob("lightning_logs/digitnet/version_0/checkpoints/last.ckpt")
    assert last.with_name("best.ckpt").exists()
    assert digitnet("fit", "--ckpt_path", "last", "--trainer.max_epochs", 3) == 0
    assert torch.load(last, weights_only=True)["epoch"] == 2


def test_without_a_logger_a_stopped_training_goes_on_by_the_same_command(
    digitnet: Run, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("fit", "--config", QUICKSTART, *SHORT, "--trainer.logger", "false")
    step = DigitClassifier.training_step

    def stop(self: DigitClassifier, *args: Any) -> torch.Tensor:
        if self.current_epoch == 1:
            raise KeyboardInterrupt
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(DigitClassifier, "training_step", stop)
        assert digitnet(*command) == 130
    (told,) = [text for text in caplog.messages if "To go on: the same command and --ckpt_path " in text]
    last = told.rpartition(" ")[2]
    assert digitnet("test") == 1
    here = Path("checkpoints", "best.ckpt")
    assert f"under lightning_logs/ yet; for {here}, type --ckpt_path {here}" in capsys.readouterr().err
    assert digitnet(*command, "--ckpt_path", last) == 0
    assert torch.load(last, weights_only=True)["epoch"] == 1


def test_without_a_logger_no_run_replaces_another(digitnet: Run, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("fit", "--config", QUICKSTART, *SHORT, "--trainer.logger", "false")
    assert digitnet(*flags) == 0
    before = Path("checkpoints/last.ckpt").read_bytes()
    assert digitnet(*flags) == 1
    assert f"would replace {Path('checkpoints/last.ckpt')}; move it, or leave the logger in" in capsys.readouterr().err
    assert Path("checkpoints/last.ckpt").read_bytes() == before


def test_files_may_stand_on_both_sides_of_a_flag(digitnet: Run, capsys: pytest.CaptureFixture[str]) -> None:
    found: dict[str, Any] = {}

    def command(files: list[Path], size: int = 1, json: bool = False) -> None:
        """Take files.

        Args:
            files: some.
            size: a number.
            json: a switch.
        """
        found.update(files=[str(file) for file in files], size=size, json=json)

    for args, files, size, json_ in [
        (["a", "--size", "2", "b"], ["a", "b"], 2, False),
        (["--size=2", "a", "--json", "b", "-"], ["a", "b", "-"], 2, True),
        (["a", "--json", "true", "b"], ["a", "b"], 1, True),
        (["a", "--json", "--", "--b-c"], ["a", "--b-c"], 1, True),
    ]:
        run_function(command, "command", args)
        assert found == {"files": files, "size": size, "json": json_}
    with pytest.raises(SystemExit):
        run_function(command, "command", ["a", "--size"])
    assert "--size: expected one argument" in capsys.readouterr().err


def test_test_leaves_a_report_to_open(
    digitnet: Run,
    trained_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("digitnet.__main__.FOLLOW_UPS", {"test": "digitnet.study.report:report"})  # as it is for people
    run = tmp_path / "lightning_logs" / "quickstart" / "version_0"
    shutil.copytree(trained_run, run)
    assert digitnet("test") == 0
    num_errors = json.loads((run / "report" / "metrics.json").read_text())["num_errors"]
    assert f"report.html: accuracy {100 * (1 - num_errors / 40):.2f} %" in capsys.readouterr().out
    assert (run / "report" / "report.html").stat().st_size > 100_000
    assert digitnet("validate") == 0  # which leaves the test's report alone
    before = {path: path.read_bytes() for path in (run / "report").iterdir()}
    assert len(before) > 3
    images, labels = load_bundled_digits()
    np.savez("mine.npz", images=images[:50], labels=labels[:50])
    assert digitnet("test", "--data.source", "mine.npz", "--data.split", [1, 1, 48]) == 0
    assert json.loads((run / "report_mine" / "metrics.json").read_text())["num_images"] == 48
    assert f"{run.relative_to(tmp_path) / 'report_mine' / 'report.html'}: accuracy" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in (run / "report").iterdir()} == before


@pytest.mark.parametrize("place", ["~/runs", "$HOME/runs"])
def test_a_run_lies_in_one_folder_when_its_place_is_not_written_out(
    digitnet: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    save_dir = f"--trainer.logger.init_args.save_dir={place}"
    for number in range(2):
        assert digitnet("fit", "--config", QUICKSTART, *SHORT, "--trainer.max_epochs", 1, save_dir) == 0
        run = tmp_path / "home" / "runs" / "quickstart" / f"version_{number}"
        assert {"config.yaml", "checkpoints/last.ckpt"} <= {str(each.relative_to(run)) for each in run.rglob("*")}
    assert {path.name for path in tmp_path.iterdir()} == {"home"}
    assert digitnet("fit", "--ckpt_path", run / "checkpoints" / "last.ckpt", "--trainer.max_epochs", 2) == 0


def test_output_that_nobody_reads_to_its_end_is_no_error() -> None:
    code = (
        "import sys; from digitnet import __main__ as module, parsing; module.load_function = lambda place: print; "
        "parsing.run_function = lambda *_: print('a table'); sys.exit(module.main(['explore']))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141  # as a shell says of a program that a closed pipe ended
    with subprocess.Popen(
        [sys.executable, "-m", "digitnet", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
