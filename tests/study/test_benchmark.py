"""The benchmark's figures against what can be counted by hand; speeds themselves are not tested."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import QUICKSTART, Run

from digitnet import DigitClassifier, DigitNet
from digitnet.checkpoints import save_checkpoint
from digitnet.study.benchmark import FIT, KERAS, PARTS, PLAIN, STEPS, count_val_batches, render_result

# Multiplications of an image: pixels x kernel x channels in x channels out, layer by layer.
CONV1 = 28 * 28 * 49 * 64
REST = 14 * 14 * 9 * (64 * 128 + 128 * 128) + 7 * 7 * 9 * (128 * 256 + 256 * 256) + 2304 * 128 + 128 * 64 + 64 * 10


def test_a_short_benchmark_of_the_real_fit(digitnet: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--steps", 2, "--rounds", 1, "--output", "speed.json")
    assert digitnet("benchmark", "--config", QUICKSTART, *flags) == 0
    result = json.loads((tmp_path / "speed.json").read_text())
    assert {name: len(each) for name, each in result["images_per_s"].items()} == {FIT: 1, STEPS: 1, PLAIN: 1}
    assert set(result["step_ms"]) == set(PARTS)
    assert min(result["step_ms"].values()) > 0
    # Forward, gradient of the weights, gradient of the input; the first layer needs no gradient of its input.
    assert result["flop_per_image"] == 2 * (2 * CONV1 + 3 * REST)
    assert result["ceiling_flop_per_s"] > 1e8
    assert result["peak_memory_bytes"] > 2**26
    assert (tmp_path / "speed.md").read_text() in capsys.readouterr().out
    assert not (tmp_path / "lightning_logs").exists()  # it leaves no run behind


@pytest.fixture
def known_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's is measured by the test above; each turn of another would take a second for it."""
    monkeypatch.setattr("digitnet.study.benchmark.measure_ceiling", lambda device, dtype: 1e11)


@pytest.mark.usefixtures("known_ceiling")
def test_a_selection_is_timed_and_a_schedule_that_would_end_too_soon_left_out(digitnet: Run, tmp_path: Path) -> None:
    text = "model:\n  selection: {class_path: digitnet.HardExamples}\n"
    text += (
        "  lr_scheduler: {class_path: torch.optim.lr_scheduler.OneCycleLR, init_args: {max_lr: 0.002, total_steps: 2}}"
    )
    Path("chosen.yaml").write_text(QUICKSTART.read_text().replace("model:", text))
    assert digitnet("benchmark", "--config", "chosen.yaml", "--steps", 2, "--rounds", 1, "--output", "speed.json") == 0
    result = json.loads((tmp_path / "speed.json").read_text())
    kept = 2 * (2 * CONV1 + 3 * REST) / 4  # of four images, one
    assert kept < result["flop_per_image"] < 1.15 * kept
    assert result["step_ms"]["selection"] > 0.05


@pytest.mark.usefixtures("known_ceiling")
def test_columns_are_counted_and_trained_in_the_plain_loop_too(digitnet: Run, tmp_path: Path) -> None:
    Path("two.yaml").write_text(QUICKSTART.read_text().replace("model:", "model:\n  columns: 2"))
    assert digitnet("benchmark", "--config", "two.yaml", "--steps", 2, "--rounds", 1, "--output", "speed.json") == 0
    result = json.loads((tmp_path / "speed.json").read_text())
    assert result["flop_per_image"] == 2 * 2 * (2 * CONV1 + 3 * REST)


@pytest.mark.usefixtures("known_ceiling")
def test_what_would_end_the_training_early_does_not(
    digitnet: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("early.yaml").write_text(QUICKSTART.read_text() + "early_stopping: {stopping_threshold: 0.0}\n")
    step, batches = DigitClassifier.training_step, []

    def counted(self: DigitClassifier, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        batches.append((self.current_epoch, batch_idx))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(DigitClassifier, "training_step", counted)
    assert digitnet("benchmark", "--config", "early.yaml", "--steps", 1, "--rounds", 2, "--output", "speed.json") == 0
    result = json.loads((tmp_path / "speed.json").read_text())
    assert {name: len(each) for name, each in result["images_per_s"].items()} == {FIT: 2, STEPS: 2, PLAIN: 2}
    assert batches == [(0, 0), (1, 0), (2, 0)]  # turns of one step


def test_a_precision_that_the_plain_loop_has_not_is_refused(
    digitnet: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("half.yaml").write_text(QUICKSTART.read_text().replace("trainer:", "trainer:\n  precision: bf16-true"))
    assert digitnet("benchmark", "--config", "half.yaml", "--steps", 1, "--rounds", 1) == 1
    errors = capsys.readouterr().err
    assert "trainer.precision is bf16-true; benchmark takes 32-true or bf16-mixed" in errors
    assert "Traceback" not in errors


@pytest.mark.usefixtures("known_ceiling")
def test_a_config_with_two_loggers_leaves_no_run_behind(digitnet: Run, tmp_path: Path) -> None:
    settings = yaml.safe_load(QUICKSTART.read_text())
    names = ("TensorBoardLogger", "CSVLogger")
    settings["trainer"]["logger"] = [
        {"class_path": f"lightning.pytorch.loggers.{name}", "init_args": {"save_dir": "lightning_logs"}}
        for name in names
    ]
    Path("two.yaml").write_text(yaml.safe_dump(settings))
    assert digitnet("benchmark", "--config", "two.yaml", "--steps", 2, "--rounds", 1) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["two.yaml"]


@pytest.mark.usefixtures("known_ceiling")
def test_a_turn_is_at_most_an_epoch(digitnet: Run, tmp_path: Path) -> None:
    text = QUICKSTART.read_text().replace("[1437, 180, 180]", "[70, 180, 1547]")
    text += "  max_steps: 1\n  check_val_every_n_epoch: 2\n"  # of the trainer; they would cut turns, and are left out
    Path("small.yaml").write_text(text)  # an epoch is two batches of 32 and a small one, which would count as whole
    assert digitnet("benchmark", "--config", "small.yaml", "--rounds", 1, "--output", "speed.json") == 0
    result = json.loads((tmp_path / "speed.json").read_text())
    assert "--steps 2 " in result["command"]


@pytest.mark.usefixtures("known_ceiling")
def test_a_teacher_is_timed_as_part_of_the_step(digitnet: Run, tmp_path: Path) -> None:
    state = {f"net.{name}": weight for name, weight in DigitNet().state_dict().items()}
    save_checkpoint({"state_dict": state, "pytorch-lightning_version": "2.6.6"}, tmp_path / "teacher.ckpt")
    text = "model:\n  teacher: {class_path: digitnet.Teacher, init_args: {checkpoint: teacher.ckpt}}"
    Path("taught.yaml").write_text(QUICKSTART.read_text().replace("model:", text))
    assert digitnet("benchmark", "--config", "taught.yaml", "--steps", 2, "--rounds", 1, "--output", "speed.json") == 0
    result = json.loads((tmp_path / "speed.json").read_text())
    alone = 2 * (2 * CONV1 + 3 * REST)
    assert result["flop_per_image"] == alone + 2 * (CONV1 + REST)  # one more forward pass, as plain sums


def test_a_config_cannot_name_foreign_classes(digitnet: Run, capsys: pytest.CaptureFixture[str]) -> None:
    text = QUICKSTART.read_text().replace("digitnet.RandomAffine", "subprocess.Popen")
    Path("foreign.yaml").write_text(text)
    assert digitnet("benchmark", "--config", "foreign.yaml", "--quick", "true") == 2
    assert "subprocess.Popen" in capsys.readouterr().err.splitlines()[-1]


def test_what_the_machine_has_not_is_told_in_one_line(digitnet: Run, capsys: pytest.CaptureFixture[str]) -> None:
    away = "mps" if torch.cuda.is_available() else "cuda"  # no machine has both
    Path("away.yaml").write_text(QUICKSTART.read_text().replace("trainer:", f"trainer:\n  accelerator: {away}"))
    for command in ("benchmark", "fit"):
        assert digitnet(command, "--config", "away.yaml") == 1
        assert (
            f"error: `{away.upper()}Accelerator` can not run on your system" in capsys.readouterr().err.splitlines()[-1]
        )


def test_as_many_validation_images_to_a_step_as_in_an_epoch() -> None:
    assert count_val_batches(1875, 250) == 20
    assert count_val_batches(188, 500) == 1
    assert count_val_batches(2, 250) == 1


def test_tables_of_known_figures() -> None:
    result: dict[str, Any] = {
        "images_per_s": {FIT: [90, 100, 80], STEPS: [100, 110, 90], PLAIN: [125, 110, 100], KERAS: [30, 25, 20]},
        "step_ms": dict.fromkeys(PARTS, 1.5), "flop_per_image": 5e8, "ceiling_flop_per_s": 1e11, "batch_size": 32,
        "precision": "bf16-mixed", "threads": 2, "hardware": "a machine", "versions": {"torch": "2"},
        "date": "2026-11-23", "command": "benchmark", "peak_memory_bytes": 2**30,
    }  # fmt: skip
    assert "Peak memory 1,024 MiB." in render_result(result)
    result["peak_memory_bytes"] = None  # Windows
    text = render_result(result)
    assert "Peak memory not known." in text
    assert "| fit, steps alone | 100 | 90 to 110 | 320.0 | 50 % |" in text  # 100 images/s x 0.5 GFLOP of 100 GFLOP/s
    assert "| Keras, whole epochs | 25 | 20 to 30 | 1280.0 |  |" in text
    assert "fit steps / plain PyTorch: 0.90 (0.80 to 1.00)" in text  # pair by pair, not of the medians
    assert "fit / Keras: 4.00 (3.00 to 4.00)" in text
    assert "1.50 ms | 29.09 ms |" in text  # the framework: 320 ms less 32 / 110 s


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--config", "none.yaml"), "none.yaml: no such config"),
        (("--config", QUICKSTART, "--output", "b.md"), "output is b.md, the name of the tables beside it"),
        (("--config", QUICKSTART, "--output", "."), "output is ., a folder; give a file, such as benchmark.json"),
        (("--config", QUICKSTART, "--output", "no-python/b.json"), "cannot write to no-python (a file is in the way)"),
        (("--config", QUICKSTART, "--rounds", 0), "rounds 0; each must be at least 1"),
        (("--config", QUICKSTART, "--keras_python", "no-python"), "keras_python is no-python, which cannot be run"),
        (("--config", QUICKSTART, "--quick", "true", "--keras_python", sys.executable), "Keras has ended: "),
    ],
)
def test_what_cannot_be_timed_is_told_in_one_line(
    digitnet: Run,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[Any, ...],
    line: str,
) -> None:
    monkeypatch.setenv("KERAS_BACKEND", "none such")
    Path("no-python").touch()
    assert digitnet("benchmark", *flags) == 1
    complaint = capsys.readouterr().err.strip().splitlines()[-1]
    assert complaint.startswith("digitnet: error: ")
    assert line in complaint
