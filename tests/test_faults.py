"""What `fit` promises when things go wrong, each promise tested by breaking it. See docs/reliability.md."""

from __future__ import annotations

import os
import pickle
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import QUICKSTART, SHORT, Run
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from digitnet import callbacks, resuming
from digitnet.checkpoints import choose_resumable, save_checkpoint
from digitnet.classifier import DigitClassifier
from digitnet.guards import explain_failures

# Two steps of 8 images an epoch, and few to validate on: what is tested here is not learning.
TINY = (
    *SHORT, "--trainer.limit_train_batches", 2, "--data.batch_size", 8, "--data.split", "[1777, 10, 10]",
    "--data.eval_batch_size", 10,
)  # fmt: skip
FIT = [sys.executable, "-m", "digitnet", "fit", "--config", str(QUICKSTART), *map(str, TINY)]
ENDLESS = ["--trainer.max_epochs", "1000", "--early_stopping.patience", "1000"]
RUN = Path("lightning_logs") / "quickstart" / "version_0"


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint, weights_only=True)["state_dict"]


def same_weights(one: Path, two: Path) -> bool:
    left, right = weights(one), weights(two)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def error_lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    output = capsys.readouterr()
    assert "Traceback" not in output.out + output.err
    return [line for line in output.err.splitlines() if line.startswith("digitnet: error: ")]


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)


def parts(folder: Path) -> list[Path]:
    return list(folder.rglob(".part-*"))


# --- stopped ----------------------------------------------------------------------------------------------------------


class PowerCut(BaseException):
    pass


def die_in_epoch(monkeypatch: pytest.MonkeyPatch, epoch: int, act: Callable[[], None]) -> None:
    """Let the second step of an epoch begin with something else."""
    step = DigitClassifier.training_step

    def training_step(self: DigitClassifier, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        if self.current_epoch == epoch and batch_idx == 1:
            act()
        return step(self, batch, batch_idx)

    monkeypatch.setattr(DigitClassifier, "training_step", training_step)


def cut_power() -> None:
    raise PowerCut


def test_sigterm_stops_and_says_how_to_go_on(
    digitnet: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    die_in_epoch(monkeypatch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert digitnet("fit", "--config", QUICKSTART, *TINY) == 128 + signal.SIGTERM
    last = RUN / "checkpoints" / "last.ckpt"
    assert (
        "stopped in epoch 1; the epochs before it are kept. "
        f"To go on: python -m digitnet fit --ckpt_path {last.absolute()}"
    ) in [re.sub(r"ckpt_path (?!/)", f"ckpt_path {Path.cwd()}/", line) for line in caplog.messages]
    assert torch.load(last, weights_only=True)["epoch"] == 0
    assert not parts(Path.cwd())
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_ctrl_c_while_scoring_is_no_failure(
    digitnet: Run, trained_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = signal.getsignal(signal.SIGINT)

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(DigitClassifier, "test_step", stop)
    try:
        assert digitnet("test", "--ckpt_path", trained_run / "checkpoints" / "best.ckpt") == 130
    finally:
        signal.signal(signal.SIGINT, handler)  # which Lightning leaves switched off
    assert capsys.readouterr().err.splitlines()[-1] == "digitnet: stopped"


def test_sigterm_while_calibrating_says_how_to_make_up_for_it(
    digitnet: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    handler = signal.getsignal(signal.SIGTERM)

    def terminate(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    with monkeypatch.context() as patch:
        patch.setattr(callbacks, "fit_calibration", terminate)
        assert digitnet("fit", "--config", QUICKSTART, *TINY) == 128 + signal.SIGTERM
    [said] = [line for line in caplog.messages if "stopped while calibrating, the training done" in line]
    last = re.search(r"To calibrate: python -m digitnet fit --ckpt_path (.*)", said)
    assert last
    assert signal.getsignal(signal.SIGTERM) == handler
    assert digitnet("fit", "--ckpt_path", last[1]) == 0
    assert "calibration" in torch.load(RUN / "checkpoints" / "best.ckpt", weights_only=True)


SCHEDULES = {
    "plateau": ("torch.optim.lr_scheduler.ReduceLROnPlateau", "--model.lr_scheduler.patience", 0,
                "--model.lr_scheduler.threshold", 0.3, "--model.lr_scheduler.factor", 0.5),
    "Lightning's plateau": ("lightning.pytorch.cli.ReduceLROnPlateau", "--model.lr_scheduler.monitor", "val/loss",
                            "--model.lr_scheduler.patience", 0, "--model.lr_scheduler.threshold", 0.3),
    "plateau, every other epoch": ("torch.optim.lr_scheduler.ReduceLROnPlateau", "--model.lr_scheduler.patience", 0,
                                   "--trainer.check_val_every_n_epoch", 2),
    "one cycle": ("torch.optim.lr_scheduler.OneCycleLR", "--model.lr_scheduler.max_lr", 0.002,
                  "--model.lr_scheduler.total_steps", 8),
}  # fmt: skip


@pytest.mark.parametrize(
    "schedule",
    [name if name.startswith("plateau") else pytest.param(name, marks=pytest.mark.slow) for name in SCHEDULES],
)
def test_schedules_go_on_as_if_never_killed(
    digitnet: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: str
) -> None:
    flags = (
        "fit",
        "--config",
        QUICKSTART,
        *TINY,
        "--trainer.max_epochs",
        4,
        "--trainer.limit_train_batches",
        2,
        "--model.lr_scheduler",
    )
    assert digitnet(*flags, *SCHEDULES[schedule]) == 0
    with monkeypatch.context() as patch:
        die_in_epoch(patch, 2, cut_power)
        with pytest.raises(PowerCut):
            digitnet(*flags, *SCHEDULES[schedule])
    assert digitnet("fit", "--ckpt_path", "last") == 0
    whole, resumed = (RUN.with_name(f"version_{n}") / "checkpoints" / "last.ckpt" for n in (0, 1))
    assert same_weights(whole, resumed)
    one, two = (torch.load(path, weights_only=True)["lr_schedulers"] for path in (whole, resumed))
    assert one == two


# --- a loss that is no number, a full disk, a damaged checkpoint ------------------------------------------------------


def test_nan_loss_stops_with_what_to_try(digitnet: Run, capsys: pytest.CaptureFixture[str]) -> None:
    ruin = ("--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", 1e30)
    assert digitnet("fit", "--config", QUICKSTART, *TINY, *ruin) == 1
    [line] = error_lines(capsys)
    assert re.search(r"train/loss is (nan|inf) in epoch 0, after step \d\. Try a lower learning rate", line)
    assert "(--model.optimizer.lr; it is " in line
    assert "), --trainer.gradient_clip_val 1; checkpoints of the epochs before, if any, are kept" in line
    assert not (RUN / "checkpoints" / "last.ckpt").exists()


def test_stopped_while_the_first_checkpoint_is_saved_there_is_none_to_go_on_from(
    digitnet: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def save(checkpoint: dict[str, Any], path: Path) -> None:
        if path.name == "last.ckpt":
            raise KeyboardInterrupt
        save_checkpoint(checkpoint, path)

    monkeypatch.setattr(resuming, "save_checkpoint", save)
    assert digitnet("fit", "--config", QUICKSTART, *TINY, "--trainer.max_epochs", 3) != 0
    assert "stopped in epoch 0, before the first checkpoint; nothing is kept" in caplog.messages


def test_full_disk_keeps_the_checkpoint_before(
    digitnet: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    flags = ("fit", "--config", QUICKSTART, *TINY)
    assert digitnet(*flags, "--trainer.max_epochs", 3) == 0

    def fill_disk() -> None:  # what is written beside the old checkpoint goes to a device without room
        part = RUN.with_name("version_1") / "checkpoints" / ".part-1-last.ckpt"
        part.symlink_to("/dev/full")

    with monkeypatch.context() as patch:
        patch.setattr(secrets, "token_hex", lambda size: "1")
        die_in_epoch(patch, 1, fill_disk)
        assert digitnet(*flags, "--trainer.max_epochs", 3) == 1
    [line] = error_lines(capsys)
    assert re.search(r"cannot save .*\.ckpt \(No space left on device\); the one before it is kept\. Make room", line)
    assert not parts(Path.cwd())
    kept = torch.load(RUN.with_name("version_1") / "checkpoints" / "last.ckpt", weights_only=True)
    assert kept["epoch"] == 0
    assert digitnet("fit", "--ckpt_path", "last") == 0
    assert same_weights(*(RUN.with_name(f"version_{n}") / "checkpoints" / "last.ckpt" for n in (0, 1)))


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "cut short": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "random bytes": lambda path: path.write_bytes(os.urandom(10_000)),
    "a bit flipped": flip_bit,
}


def test_damaged_last_checkpoint_gives_way_to_the_one_before(
    digitnet: Run, tmp_path: Path, trained_run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(trained_run, RUN)
    last, previous = RUN / "checkpoints" / "last.ckpt", RUN / "checkpoints" / "previous.ckpt"
    whole = last.read_bytes()
    for damage, spoil in DAMAGES.items():
        last.write_bytes(whole)
        spoil(last)
        path, _, reason = choose_resumable(last)
        assert path == previous, damage
        assert reason.startswith(f"{last} is not a checkpoint that can be read safely: "), damage
    assert digitnet("fit", "--ckpt_path", "last") == 0
    assert f"{reason}; going on from the one before it" in caplog.messages
    assert f"fit: {previous}" in caplog.messages
    assert same_weights(last, trained_run / "checkpoints" / "last.ckpt")


def test_a_damaged_checkpoint_never_takes_the_place_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secrets, "token_hex", lambda size: "1")
    last, previous = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    for epoch in range(2):
        save_checkpoint({"epoch": epoch, "weights": torch.zeros(1000)}, last)
    flip_bit(last)
    if Path("/dev/full").exists():
        part = tmp_path / ".part-1-last.ckpt"
        part.symlink_to("/dev/full")
        with pytest.raises(OSError, match=r"last\.ckpt \(No space left on device\); the one before it is kept$"):
            save_checkpoint({"epoch": 1}, last)
        assert torch.load(previous, weights_only=True)["epoch"] == 0
        flip_bit(previous)
        part.symlink_to("/dev/full")
        with pytest.raises(OSError, match=r"; nothing is kept$"):
            save_checkpoint({"epoch": 1}, last)
        flip_bit(previous)
    save_checkpoint({"epoch": 1}, last)
    assert [torch.load(path, weights_only=True)["epoch"] for path in (previous, last)] == [0, 1]


def test_damaged_checkpoint_without_another_is_refused(
    digitnet: Run, trained_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained_run, RUN)
    (RUN / "checkpoints" / "previous.ckpt").unlink()
    flip_bit(RUN / "checkpoints" / "last.ckpt")
    flip_bit(RUN / "checkpoints" / "best.ckpt")
    before = set(Path.cwd().rglob("*"))
    assert digitnet("fit", "--ckpt_path", "last") == 1
    [line] = error_lines(capsys)
    assert "the checksum of" in line
    anew = f"; start anew: python -m digitnet fit --config {RUN}/config.yaml"
    assert f"there is no previous.ckpt beside it{anew}" in line
    previous = RUN / "checkpoints" / "previous.ckpt"
    shutil.copy(RUN / "checkpoints" / "last.ckpt", previous)
    assert digitnet("fit", "--ckpt_path", "last") == 1
    [line] = error_lines(capsys)
    assert line.count("the checksum of") == 2
    assert line.endswith(anew)
    previous.unlink()
    assert digitnet("test") == 1
    [line] = error_lines(capsys)
    assert "best.ckpt is not a checkpoint that can be read safely: damaged: the checksum of" in line
    assert set(Path.cwd().rglob("*")) == before


@pytest.mark.parametrize("damage", [Path.unlink, flip_bit])
def test_a_best_checkpoint_that_is_lost_is_replaced_by_the_next_one(
    digitnet: Run, trained_run: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(trained_run, RUN)
    best = RUN / "checkpoints" / "best.ckpt"
    damage(best)
    assert digitnet("fit", "--ckpt_path", "last", "--trainer.max_epochs", 3) == 0
    assert f"{best} is missing or damaged; the best epoch from here on takes its place" in caplog.messages
    assert torch.load(best, weights_only=True)["epoch"] == 2
    assert digitnet("test") == 0


def test_going_on_leaves_the_unfinished_files_of_others(digitnet: Run, trained_run: Path) -> None:
    shutil.copytree(trained_run, RUN)
    (RUN / "export").mkdir()
    others, mine = RUN / "export" / ".part-1-digitnet.onnx", RUN / "checkpoints" / ".part-1-last.ckpt"
    others.touch()
    mine.touch()
    assert digitnet("fit", "--ckpt_path", "last", "--trainer.max_epochs", 3) == 0
    assert parts(RUN) == [others]


# --- several at once --------------------------------------------------------------------------------------------------


def test_runs_that_start_at_once_get_a_folder_each(
    digitnet: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lightning.pytorch.loggers import TensorBoardLogger

    look = TensorBoardLogger._get_next_version

    def look_then_lose(self: TensorBoardLogger) -> int:  # another process makes the folder that was free
        version = look(self)
        if version == 0:
            RUN.mkdir(parents=True)
        return version

    monkeypatch.setattr(TensorBoardLogger, "_get_next_version", look_then_lose)
    assert digitnet("fit", "--config", QUICKSTART, *TINY, "--trainer.max_epochs", 1) == 0
    assert not list(RUN.iterdir())
    assert (RUN.with_name("version_1") / "checkpoints" / "last.ckpt").exists()


def test_a_run_at_work_cannot_be_gone_on_with_nor_replaced(
    digitnet: Run, trained_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from filelock import FileLock

    shutil.copytree(trained_run, RUN)
    with FileLock(RUN / ".lock"):
        assert digitnet("fit", "--ckpt_path", "last") == 1
    assert error_lines(capsys) == [f"digitnet: error: another fit is at work in {RUN}; wait for it to end, or stop it"]
    assert digitnet("fit", "--config", QUICKSTART, "--trainer.logger.version", 0) == 1
    [line] = error_lines(capsys)
    assert f"{RUN} holds a run; to go on: python -m digitnet fit --ckpt_path {RUN}/checkpoints/last.ckpt" in line


@pytest.mark.slow  # three processes that import everything
def test_a_dead_process_ends_the_others(tmp_path: Path) -> None:
    ddp = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp"]
    process = subprocess.Popen(
        [*FIT, *ENDLESS, *ddp], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for(tmp_path / RUN / "checkpoints" / "last.ckpt", process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("needs Linux's /proc to find the second process")
    [child] = children.read_text().split()
    os.kill(int(child), signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output
    assert "Traceback" not in output
    assert "digitnet: error: process 0 of 2 lost another one, which ended or was killed; all stop." in output


def test_a_process_that_crashes_after_the_work_leaves_the_report_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[Any] = []
    monkeypatch.setattr(os, "kill", lambda *args: killed.append(args))
    crashed = subprocess.Popen([sys.executable, "-S", "-c", "raise SystemExit(3)"])
    crashed.wait()
    launcher = SimpleNamespace(procs=[crashed])
    watch = _ChildProcessObserver(os.getpid(), launcher.procs)
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(launcher=launcher), world_size=2)
    with explain_failures(trainer):
        pass  # trained or scored
    assert watch._run()  # and has nothing more to watch
    assert not killed


# --- files and configs of strangers -----------------------------------------------------------------------------------


class Bomb:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_checkpoint_is_refused_and_nothing_runs(
    digitnet: Run, trained_run: Path, capsys: pytest.CaptureFixture[str], zipped: bool
) -> None:
    bad = Path("bad.ckpt")
    if zipped:
        torch.save({"state_dict": DigitClassifier().state_dict(), "extra": Bomb()}, bad)
    else:
        bad.write_bytes(pickle.dumps(Bomb()))
    shutil.copytree(trained_run, RUN)
    shutil.copy(bad, RUN / "checkpoints" / "last.ckpt")
    shutil.copy(bad, RUN / "checkpoints" / "previous.ckpt")
    before = set(Path.cwd().rglob("*"))
    digit = Path(__file__).parent / "conftest.py"
    for command in (
        ("fit", "--ckpt_path", bad), ("fit", "--ckpt_path", "last"), ("test", "--ckpt_path", bad),
        ("validate", "--ckpt_path", bad), ("predict", digit, "--ckpt_path", bad), ("export", "--ckpt_path", bad),
    ):  # fmt: skip
        assert digitnet(*command) == 1, command
        [line] = error_lines(capsys)
        assert "is not a checkpoint that can be read safely" in line, command
        assert set(Path.cwd().rglob("*")) == before


REFUSED = [
    ("--data.augmentation", "os.system"),
    ("--data.augmentation", "torch.hub.load"),
    ("--data.augmentation", "torch.utils.cpp_extension.load_inline"),
    ("--data.augmentation", "lightning.pytorch.cli.os.system"),  # by another door
    ("--model.optimizer", "subprocess.Popen"),
    ("--trainer.callbacks", "antigravity.Flight"),
    ("--trainer.callbacks", "digitnet.study.benchmark.Turns"),  # starts a program
    ("--trainer.logger", "shutil.rmtree"),
    ("--data.augmentation", "mine.Negative"),
]


def test_a_config_names_only_what_it_may(
    digitnet: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = "from torch import nn\nopen('imported', 'w').close()\nclass Negative(nn.Module):\n    pass\n"
    (tmp_path / "mine.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    before = set(tmp_path.rglob("*"))
    for flag, name in REFUSED:
        assert digitnet("fit", "--config", QUICKSTART, flag, name) != 0, name
        [line] = error_lines(capsys)
        assert "a config may not name " in line, line
        assert "DIGITNET_ALLOW_IMPORTS=" in line
        assert set(tmp_path.rglob("*")) == before, name

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setenv("DIGITNET_ALLOW_IMPORTS", "mine")
    assert digitnet("fit", "--config", QUICKSTART, "--data.augmentation", "mine.Negative", "--print_config") == 0
    monkeypatch.setenv("DIGITNET_ALLOW_IMPORTS", "rm -rf")
    assert digitnet("fit", "--config", QUICKSTART) == 1
    assert "DIGITNET_ALLOW_IMPORTS is rm -rf" in capsys.readouterr().err


def test_killed_while_saving_keeps_the_curves(digitnet: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from digitnet import resuming

    flags = ("fit", "--config", QUICKSTART, *TINY, "--trainer.max_epochs", 3)
    assert digitnet(*flags) == 0

    def save(checkpoint: dict[str, Any], path: Path) -> None:
        if path.name == "last.ckpt" and checkpoint["epoch"] == 1:
            raise PowerCut  # the epoch's curves are written by now, and will be once more
        save_checkpoint(checkpoint, path)

    with monkeypatch.context() as patch:
        patch.setattr(resuming, "save_checkpoint", save)
        with pytest.raises(PowerCut):
            digitnet(*flags)
    assert digitnet("fit", "--ckpt_path", "last") == 0
    whole, resumed = (EventAccumulator(str(RUN.with_name(f"version_{n}"))) for n in (0, 1))
    whole.Reload()
    resumed.Reload()
    for tag in ("val/loss", "val/acc", "hp/val_acc", "train/loss", "lr-Adam"):
        one, two = ([(event.step, event.value) for event in events.Scalars(tag)] for events in (whole, resumed))
        assert one == two, tag


# --- what it is built on ----------------------------------------------------------------------------------------------

IMPORT_ALL = """
import importlib, pkgutil, socket, sys
def refuse(*args):
    raise SystemExit(f"an import reached for the network: {args}")
socket.socket.connect = socket.getaddrinfo = refuse
import digitnet
names = [module.name for module in pkgutil.walk_packages(digitnet.__path__, "digitnet.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
print(len(names))
"""


def test_importing_everything_needs_no_network() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", IMPORT_ALL], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 30  # modules
