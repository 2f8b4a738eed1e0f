"""Ablations: what is trained, what is not trained twice, and tables worked out by hand."""

from __future__ import annotations

import csv
import errno
import json
import math
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import ROOT
from filelock import FileLock

from digitnet.classifier import DigitClassifier
from digitnet.parsing import run_function
from digitnet.run_folder import read_precision
from digitnet.study import ablation, recipes
from digitnet.study.ablation import (
    ablate,
    compare_orders,
    load_tables,
    load_writeup,
    pick_jobs,
    tabulate,
)
from digitnet.study.history import load_history
from digitnet.study.recipes import Row, load_row, resolve

OURS = ROOT / "configs" / "ablations"
BASE = """\
data:
  source: digits
  split: [1697, 50, 50]
trainer:
  max_epochs: {epochs}
  limit_train_batches: 2
  precision: 32-true
"""


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One table of two rows, on bundled digits, one epoch of two steps."""
    monkeypatch.chdir(tmp_path)
    folder = Path("mine") / "dropout"
    folder.mkdir(parents=True)
    (folder / "base.yaml").write_text(BASE.format(epochs=1))
    (folder / "none.yaml").write_text("model:\n  dropout: 0.0\n")
    (folder / "fc_0.5.yaml").write_text("model:\n  dropout: 0.5\n")
    return folder.parent


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Training replaced by its record: what was trained, in order. A row's second seed does 0.002 better."""
    log: list[tuple[str, int]] = []

    def train(row: Row, seed: int, output: Path) -> dict[str, Any]:
        log.append((row.name, seed))
        return write_result(output, row, seed, 0.9 + 0.002 * (seed - 42), 0.95, 60.0 * (seed - 41))

    monkeypatch.setattr(ablation, "train", train)
    return log


def write_result(output: Path, row: Row, seed: int, train_acc: float, val_acc: float, seconds: float) -> dict[str, Any]:
    result = {
        "config_sha256": row.digest, "seed": seed, "epochs": 1, "train_acc": train_acc, "val_acc": val_acc,
        "run_time_s": seconds, "precision": "32-true", "hardware": "a machine", "versions": {"torch": "2.15.0"},
    }  # fmt: skip
    path = output / f"any-{row.digest[:8]}" / f"seed_{seed}" / "result.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(result))
    return result


# --- training ---------------------------------------------------------------------------------------------------------


def test_trains_every_row_with_every_seed_and_nothing_twice(
    configs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ablate(configs, seeds=2, output=Path("out"))
    results = [json.loads(path.read_text()) for path in Path("out").glob("*/seed_*/result.json")]
    assert {(Path(result["config"]).stem, result["seed"]) for result in results} == {
        (name, seed) for name in ("none", "fc_0.5") for seed in (42, 43)
    }
    assert len({(result["train_acc"], result["val_acc"]) for result in results}) > 1
    for result in results:
        run = next(Path("out").glob(f"*-{result['config_sha256'][:8]}")) / f"seed_{result['seed']}"
        history = load_history(run)
        assert history is not None
        assert [result["train_acc"]] == history.train_acc.tolist()
        assert [result["val_acc"]] == history.val_acc.tolist()
        assert f"seed_everything: {result['seed']}\n" in (run / "config.yaml").read_text()
        assert 0 < result["run_time_s"] < 100
    assert not list(Path("out").rglob("*.ckpt"))
    assert re.search(r"\[4/4\] dropout/none, seed 43, about \d+ min left", capsys.readouterr().out)
    markdown = Path("out/dropout.md").read_text()

    monkeypatch.setattr(ablation, "train", lambda *_: pytest.fail("trained again"))
    ablate(configs, seeds=2, output=Path("out"))
    assert "4 runs, 4 of them finished before" in capsys.readouterr().out
    assert Path("out/dropout.md").read_text() == markdown


def test_a_stopped_row_goes_on_after_its_last_epoch(configs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (configs / "dropout" / "base.yaml").write_text(BASE.format(epochs=2))
    (configs / "dropout" / "none.yaml").unlink()
    ablate(configs, output=Path("whole"))
    step = DigitClassifier.training_step
    epochs = []

    def stopping_step(self: DigitClassifier, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        epochs.append(self.current_epoch)
        if epochs == [0, 0, 1]:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    monkeypatch.setattr(DigitClassifier, "training_step", stopping_step)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as stop:
            ablate(configs, output=Path("stopped"))
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores Ctrl-C from the first one on
    assert stop.value.code == 130
    with pytest.raises(FileNotFoundError, match=r"no row of mine has finished under stopped yet; train them: python"):
        ablate(configs, seeds=0, output=Path("stopped"))
    ablate(configs, output=Path("stopped"))
    assert epochs == [0, 0, 1, 1, 1]
    whole, stopped = (json.loads(next(Path(out).rglob("result.json")).read_text()) for out in ("whole", "stopped"))
    for key in ("config_sha256", "seed", "epochs", "train_acc", "val_acc"):
        assert whole[key] == stopped[key], key


@pytest.mark.parametrize("is_damaged", [False, True])
def test_a_run_goes_on_in_its_precision_and_begins_anew_where_it_is_damaged(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    is_damaged: bool,
) -> None:  # fmt: skip
    run = shutil.copytree(trained_run, tmp_path / "seed_42")
    last = run / "checkpoints" / "last.ckpt"
    for path in (last.with_name("previous.ckpt"), *([last] if is_damaged else [])):
        path.write_bytes(last.read_bytes()[:100])
    called: list[list[str]] = []

    monkeypatch.setattr(recipes, "main", called.append)
    recipes.fit_or_go_on(["--config=mine.yaml"], 42, run)
    if is_damaged:
        assert called[0][:3] == ["fit", "--config=mine.yaml", "--seed_everything=42"]
        assert not (run / "checkpoints").exists()
        assert "it is trained anew\n" in capsys.readouterr().out
    else:
        assert called == [["fit", f"--ckpt_path={last}", "--trainer.precision=32-true"]]


def test_a_run_that_cannot_be_read_now_stays(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EMFILE, "too many open files")

    run = shutil.copytree(trained_run, tmp_path / "seed_42")
    before = sorted(run.rglob("*"))
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(ValueError, match="too many open files"):
        recipes.fit_or_go_on(["--config=mine.yaml"], 42, run)
    assert sorted(run.rglob("*")) == before


def test_a_run_with_a_plugin_goes_on_with_it(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(trained_run, tmp_path / "seed_42")
    config = (run / "config.yaml").read_text()
    assert "\n  plugins: null\n" in config
    (run / "config.yaml").write_text(config.replace("\n  plugins: null\n", "\n  plugins: mine.DoublePrecision\n"))
    called: list[list[str]] = []
    monkeypatch.setattr(recipes, "main", called.append)
    recipes.fit_or_go_on(["--config=mine.yaml"], 42, run)
    assert called == [["fit", f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}"]]


def test_a_run_without_a_record_of_its_precision_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"hparams\.yaml is damaged or lacks the precision; remove .*, and it is"):
        read_precision(tmp_path)


def test_a_changed_config_is_trained_again(configs: Path, trained: list[tuple[str, int]]) -> None:
    ablate(configs, output=Path("out"))
    assert trained == [("fc 0.5", 42), ("none", 42)]
    (configs / "dropout" / "none.yaml").write_text("# a comment changes nothing\nmodel: {dropout: 0.0}\n")
    ablate(configs, seeds=2, output=Path("out"))
    assert trained[2:] == [("fc 0.5", 43), ("none", 43)]
    (configs / "dropout" / "none.yaml").write_text("model: {dropout: 0.1}\n")
    ablate(configs, output=Path("out"))
    assert trained[4:] == [("none", 42)]
    with (configs / "dropout" / "base.yaml").open("a") as base:
        base.write("  gradient_clip_val: 1.0\n")
    ablate(configs, output=Path("out"))
    assert trained[5:] == [("fc 0.5", 42), ("none", 42)]


@pytest.mark.parametrize(
    "spelling",
    [
        "{class_path: digitnet.Teacher, init_args: {checkpoint: PATH}}",
        "{class_path: digitnet.Teacher, dict_kwargs: {checkpoint: PATH}}",
        "{checkpoint: PATH}",
    ],
)
def test_another_teacher_is_another_recipe(configs: Path, tmp_path: Path, spelling: str) -> None:
    config = configs / "dropout" / "none.yaml"
    before = load_row(config).digest
    teacher = tmp_path / "teacher.ckpt"
    config.write_text(f"model:\n  teacher: {spelling.replace('PATH', str(teacher))}\n")
    digests = [before, load_row(config).digest]
    for content in (b"one", b"other"):
        teacher.write_bytes(content)
        digests.append(load_row(config).digest)
    assert len(set(digests)) == 4


def test_other_data_under_the_same_name_are_another_recipe(configs: Path, tmp_path: Path) -> None:
    config = configs / "dropout" / "none.yaml"
    config.write_text(f"data: {{source: {tmp_path / 'digits.d'}}}\n")
    digests = [load_row(config).digest]
    (tmp_path / "digits.d").write_bytes(b"an .npz")
    digests.append(load_row(config).digest)
    (tmp_path / "digits.d").unlink()
    (tmp_path / "digits.d").mkdir()
    for content in (b"a folder of IDX files", b"other digits"):
        (tmp_path / "digits.d" / "t10k-images-idx3-ubyte").write_bytes(content)
        digests.append(load_row(config).digest)
    assert len(set(digests)) == 4


def test_a_run_at_work_is_left_alone(configs: Path) -> None:
    row = load_row(configs / "dropout" / "none.yaml")
    run = Path("out") / f"none-{row.digest[:8]}" / "seed_42"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("of another process\n")
    with FileLock(run / ".lock"), pytest.raises(ValueError, match="another fit is at work in"):
        ablate(configs, output=Path("out"))
    assert (run / "config.yaml").read_text() == "of another process\n"


def test_the_table_has_what_others_finished_meanwhile(
    configs: Path, monkeypatch: pytest.MonkeyPatch, trained: list[tuple[str, int]]
) -> None:
    rows = load_tables(configs)[0].rows
    train = ablation.train

    def train_beside_another(row: Row, seed: int, output: Path) -> dict[str, Any]:
        for other in rows:
            if other != row and not trained:
                write_result(output, other, seed, 0.9, 0.95, 60.0)
        return train(row, seed, output)

    monkeypatch.setattr(ablation, "train", train_beside_another)
    ablate(configs, output=Path("out"))
    assert len(trained) == 1  # the other row was finished when its turn came
    assert Path("out/dropout.md").read_text().count("| 1 | 0.9000 |") == 2


def test_a_row_that_validates_nothing_is_refused_before_it_is_trained(
    configs: Path, trained: list[tuple[str, int]]
) -> None:
    (configs / "dropout" / "none.yaml").write_text("trainer: {limit_val_batches: 0}\n")
    with pytest.raises(ValueError, match=r"none\.yaml has trainer\.limit_val_batches 0"):
        ablate(configs, output=Path("out"))
    assert trained == []


def test_a_row_whose_last_epoch_is_not_validated_is_refused(configs: Path) -> None:
    (configs / "dropout" / "base.yaml").write_text(BASE.format(epochs=3) + "  check_val_every_n_epoch: 2\n")
    with pytest.raises(ValueError, match="has no validation accuracy of its last epoch"):
        ablate(configs, output=Path("out"))


def test_a_row_too_large_for_memory_does_not_spoil_the_others(configs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = DigitClassifier.training_step

    def training_step(self: DigitClassifier, *args: Any) -> torch.Tensor:
        if self.hparams["dropout"] == 0.5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, *args)

    monkeypatch.setattr(DigitClassifier, "training_step", training_step)
    with pytest.raises(ValueError, match=r"1 of 2 runs failed, .*: dropout/fc 0\.5, seed 42: out of memory; try"):
        ablate(configs, output=Path("out"))
    assert len(list(Path("out").rglob("result.json"))) == 1


def test_a_failing_row_does_not_spoil_the_others(configs: Path) -> None:
    (configs / "dropout" / "fc_0.5.yaml").write_text("model:\n  dropout: 1.5\n")
    with pytest.raises(
        ValueError, match=r"1 of 2 runs failed, the others are kept: dropout/fc 0\.5, seed 42: dropout is 1\.5"
    ):
        ablate(configs, output=Path("out"))
    assert len(list(Path("out").rglob("result.json"))) == 1
    assert "| fc 0.5 | 0 | - |" in Path("out/dropout.md").read_text()


def test_shards_part_the_rows_and_their_results_merge(configs: Path, trained: list[tuple[str, int]]) -> None:
    every = pick_jobs(load_tables(OURS), seeds=3)
    parts = [pick_jobs(load_tables(OURS), 3, f"{i}/5") for i in range(1, 6)]
    assert len(every) == len({(row.digest, seed) for row, seed in every}) == 3 * 12  # one row stands in two tables
    assert sorted(job[0].digest + str(job[1]) for part in parts for job in part) == sorted(
        row.digest + str(seed) for row, seed in every
    )
    assert max(map(len, parts)) - min(map(len, parts)) <= 1

    for i in (1, 2):
        ablate(configs, shard=f"{i}/2", output=Path(f"machine{i}"))
    assert sorted(trained) == [("fc 0.5", 42), ("none", 42)]
    shutil.copytree("machine2", "machine1", dirs_exist_ok=True)
    ablate(configs, seeds=0, output=Path("machine1"))
    assert len(trained) == 2
    assert Path("machine1/dropout.md").read_text().count("| 1 | 0.9000 |") == 2


# --- tables -----------------------------------------------------------------------------------------------------------


def test_figures_are_means_and_deviations_worked_out_by_hand(configs: Path) -> None:
    (configs / "dropout" / "writeup.csv").write_text("row,val_acc,run_time_s\nnone,0.9878,443\nfc 0.5,0.9898,\n")
    [table] = load_tables(configs)
    none, fc = table.rows
    assert (none.name, fc.name) == ("none", "fc 0.5")  # the write-up's order, not the alphabet's
    for seed, acc, seconds in ((42, 0.98, 60), (43, 0.99, 61), (44, 0.97, 65)):  # deviations 0, 0.01, 0.01 over n - 1
        write_result(Path("out"), none, seed, acc, acc + 0.01, seconds)
    write_result(Path("out"), fc, 42, 0.9, 0.95, 443)
    ablate(configs, seeds=0, output=Path("out"))
    page = Path("out/dropout.md").read_text()
    assert "| Row | n | Training accuracy | Validation accuracy | write-up | Run time | write-up |" in page
    assert "| none | 3 | 0.9800 ± 0.0100 | 0.9900 ± 0.0100 | 0.9878 | 1:02 ± 0:03 | 7:23 |" in page
    assert "| fc 0.5 | 1 | 0.9000 | 0.9500 | 0.9898 | 7:23 | - |" in page  # one seed: no spread
    assert "a machine, 32-true, torch 2.15.0: `python -m digitnet ablate mine/dropout --seeds 3`" in page
    first, second = csv.DictReader(Path("out/dropout.csv").read_text().splitlines())
    assert (first["row"], first["n"], second["n"], second["val_acc_sd"]) == ("none", "3", "1", "")
    assert float(first["val_acc_sd"]) == pytest.approx(0.01)
    assert float(first["run_time_s_sd"]) == pytest.approx(math.sqrt(7), rel=1e-5)  # 4 + 1 + 9 over 2
    assert (float(first["writeup_run_time_s"]), second["writeup_run_time_s"]) == (443, "")


def test_a_run_that_was_copied_twice_counts_once(configs: Path) -> None:
    [table] = load_tables(configs)
    write_result(Path("out"), table.rows[0], 42, 0.98, 0.99, 60)
    shutil.copytree(next(Path("out").glob("any-*")), Path("out/again"))
    ablate(configs, seeds=0, output=Path("out"))
    assert "| 1 | 0.9800 | 0.9900 |" in Path("out/dropout.md").read_text()


def test_rows_may_be_named_by_numbers_or_by_nothing(tmp_path: Path) -> None:
    (tmp_path / "writeup.csv").write_text("row,val_acc\n0.2,0.9\n0.50,0.8\nNone,0.7\n")
    table = load_writeup(tmp_path / "writeup.csv", ["0.2", "0.50", "None"])
    assert table["val_acc"].to_dict() == {"0.2": 0.9, "0.50": 0.8, "None": 0.7}


def frame(rows: dict[str, tuple[float, float, float]], key: str = "val_acc") -> pd.DataFrame:
    return pd.DataFrame.from_dict(rows, orient="index", columns=[key, f"{key}_sd", f"writeup_{key}"])


def test_orders_are_compared_in_words() -> None:
    nan = math.nan
    alike = frame({"a": (0.9, 0.01, 0.99), "b": (0.8, 0.01, 0.98)})
    assert compare_orders(alike, "val_acc") == ("Validation accuracy. Both: a > b. 1 of 1 pairs agree.")
    mixed = frame({"a": (0.90, 0.03, 0.99), "b": (0.94, 0.04, 0.98), "c": (0.5, nan, 0.97), "d": (0.4, 0.2, nan)})
    # a and b: 0.04 apart, spread 0.05. c has no spread, d no published figure.
    assert compare_orders(mixed, "val_acc") == (
        "Validation accuracy. The write-up: a > b > c. Ours: b > a > c. "
        "2 of 3 pairs agree; we find instead b > a. Within the spread: b > a."
    )
    faster = frame({"a": (60, 3, 100), "b": (64, 4, 200), "c": (64, 0, 300)}, "run_time_s")
    assert compare_orders(faster, "run_time_s") == (
        "Run time. The write-up: a < b < c. Ours: a < b = c. 2 of 3 pairs agree; we find instead b = c. "
        "Within the spread: a < b."
    )
    assert compare_orders(mixed.tail(2), "val_acc") == ""


# --- our own configs --------------------------------------------------------------------------------------------------

SGD, ADAM = ("torch.optim.SGD", {"lr": 0.01, "momentum": 0.0}), ("torch.optim.Adam", {"lr": 1e-3, "eps": 1e-7})
ADAMW = ("torch.optim.AdamW", {"lr": 1e-3, "eps": 1e-7, "weight_decay": 0.004})
BOTH = (18.0, 0.1)
SETTINGS = {  # row: (dropout, conv_dropout), optimizer, (rotation_deg, shift_frac), epochs
    "augmentation/none": ((0.0, 0.0), SGD, None, 3),
    "augmentation/rotation 0.1": ((0.0, 0.0), SGD, (36.0, 0.0), 3),
    "augmentation/rotation 0.05": ((0.0, 0.0), SGD, (18.0, 0.0), 3),
    "augmentation/shift 0.1": ((0.0, 0.0), SGD, (0.0, 0.1), 3),
    "augmentation/rotation 0.05 + shift 0.1": ((0.0, 0.0), SGD, BOTH, 3),
    "dropout/none": ((0.0, 0.0), ADAM, BOTH, 20),
    "dropout/fc 0.2": ((0.2, 0.0), ADAM, BOTH, 20),
    "dropout/fc 0.5": ((0.5, 0.0), ADAM, BOTH, 20),
    "dropout/fc 0.2 + conv 0.5": ((0.2, 0.5), ADAM, BOTH, 20),
    "dropout/fc 0.2 + conv 0.2": ((0.2, 0.2), ADAM, BOTH, 20),
    "optimizer/sgd": ((0.0, 0.0), SGD, BOTH, 3),
    "optimizer/adam": ((0.0, 0.0), ADAM, BOTH, 3),
    "optimizer/adamw": ((0.0, 0.0), ADAMW, BOTH, 3),
}


def test_our_configs_are_the_write_ups_thirteen_rows() -> None:
    rows = {f"{table.name}/{row.name}": row for table in load_tables(OURS) for row in table.rows}
    assert list(rows) == list(SETTINGS)
    for name, ((dropout, conv_dropout), (optimizer, arguments), augmentation, epochs) in SETTINGS.items():
        settings = resolve(rows[name])
        model, data = settings["model"], settings["data"]
        assert (model["dropout"], model["conv_dropout"]) == (dropout, conv_dropout), name
        assert model["optimizer"]["class_path"] == optimizer, name
        assert arguments.items() <= model["optimizer"]["init_args"].items(), name
        assert model["lr_scheduler"] is None
        assert (data["source"], data["split"], data["batch_size"]) == ("mnist", [60_000, 5_000, 5_000], 32)
        if augmentation:
            strengths = dict(zip(("rotation_deg", "shift_frac"), augmentation, strict=True)) | {"scale_frac": 0.0}
            assert data["augmentation"] == {"class_path": "digitnet.RandomAffine", "init_args": strengths}, name
        else:
            assert data["augmentation"] is None
        assert settings["trainer"]["max_epochs"] == epochs < settings["early_stopping"]["patience"], name
    assert rows["optimizer/sgd"].digest == rows["augmentation/rotation 0.05 + shift 0.1"].digest
    assert len({row.digest for row in rows.values()}) == 12


def test_our_published_figures_are_the_write_ups() -> None:
    tables = {table.name: tabulate(table, []) for table in load_tables(OURS)}
    figures = {name: table.filter(like="writeup_").to_numpy().tolist() for name, table in tables.items()}
    assert figures["augmentation"] == [
        [0.9884, 0.9856, 443], [0.9781, 0.9806, 454], [0.9828, 0.9846, 458], [0.9821, 0.9832, 458],
        [0.9757, 0.9878, 472],
    ]  # fmt: skip
    assert figures["optimizer"] == [[0.9757, 0.9878, 472], [0.9834, 0.9866, 510], [0.9828, 0.9882, 788]]
    assert [row[:2] for row in figures["dropout"]] == [
        [0.9926, 0.9878], [0.99, 0.9898], [0.9872, 0.9846], [0.9484, 0.9474], [0.9818, 0.989],
    ]  # fmt: skip


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "flags", "line"),
    [
        ({}, ["nowhere"], r"nowhere: no such folder; give one with configs of fit"),
        ({}, ["."], r"\. has no configs: no \.yaml besides base\.yaml"),
        ({}, ["mine", "--shard", "3/2"], r'shard is "3/2"; it must be i/n with i from 1 to n'),
        ({}, ["mine", "--shard", "1"], r'shard is "1"; it must be i/n'),
        ({}, ["mine", "--seeds", "-1"], r"seeds is -1; it is how many"),
        ({}, ["mine", "--seeds", "0", "--output", "out"], r"no row of mine has finished under out yet; train them"),
        ({"odd.yaml": "model: ["}, ["mine"], r"odd\.yaml is no YAML"),
        ({"odd.yaml": "model: {droput: 0.1}"}, ["mine"], r"odd\.yaml: .*does not accept option '.*droput'"),
        ({"writeup.csv": "row,val_acc\nnoen,0.9"}, ["mine"], r"a row 'noen' without a config.*; did you mean none\?"),
        ({"writeup.csv": "row,val_acc\nnone,high"}, ["mine"], r"writeup\.csv is no table of row, train_acc.*'high'"),
        ({"writeup.csv": "val_acc\n0.9"}, ["mine"], r"writeup\.csv is no table of row, train_acc"),
        (
            {"writeup.csv": "row,val_acc\nnone,99.6"},
            ["mine"],
            r"val_acc is 99\.6, where a share from 0 to 1 is expected",
        ),
        ({"writeup.csv": "row,run_time_s\nnone,inf"}, ["mine"], r"run_time_s is inf, where a time is expected"),
        ({"writeup.csv": "row,val_accuracy\nnone,0.9"}, ["mine"], r"a column 'val_accuracy'; did you mean val_acc\?"),
        (
            {"fc 0.5.yaml": "{a: 1}"},
            ["mine"],
            r"fc 0\.5\.yaml and .*fc_0\.5\.yaml are both the row 'fc 0\.5'; rename one",
        ),
        ({"dropout/a.yaml": "{a: 1}"}, ["mine/dropout"], r"would both make the table dropout\.md; rename one"),
        (
            {"../../file": ""},
            ["mine", "--output", "file"],
            r"cannot write to file \(a file is in the way\); .*--output",
        ),
        ({"../../out/x/seed_1/result.json": "{}"}, ["mine", "--output", "out"], r"seed_1/result\.json is damaged"),
    ],
)
def test_bad_input_is_told_in_one_line(
    configs: Path, trained: list[tuple[str, int]], files: dict[str, str], flags: list[str], line: str
) -> None:
    for name, text in files.items():
        path = configs / "dropout" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    with pytest.raises((ValueError, OSError), match=line) as raised:
        run_function(ablate, "ablate", flags)
    assert "\n" not in str(raised.value)
    assert trained == []
